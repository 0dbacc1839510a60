"""A checkpoint compared with diffusers, block by block."""
