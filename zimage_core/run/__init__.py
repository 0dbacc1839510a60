"""Loading a pipeline, and one run of it: request, checks, placement, denoising, decoding, result."""
