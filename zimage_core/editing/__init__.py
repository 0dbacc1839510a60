"""Image to image, inpainting, outpainting and hires: runs that begin with an image instead of noise alone."""
