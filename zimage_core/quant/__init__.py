"""Packed weights: the tensor type, the operators on it, the GPU path and the choice of a path."""
