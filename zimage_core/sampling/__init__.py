"""Noise levels, starting noise, guidance and the sampling loop, for any model given as a callable."""
