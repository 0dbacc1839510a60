"""Omni: reference images in the stream, as latents of the VAE and features of the vision tower."""
