"""Packed weights: the tensor type, the operators, the GPU paths and the choice between them."""
