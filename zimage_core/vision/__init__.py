"""Images as a SigLIP2 vision tower sees them: the image processor, and the features of one image."""
