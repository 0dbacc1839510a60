"""The effect of quantisation on images: calibration, comparison, sensitivity."""
