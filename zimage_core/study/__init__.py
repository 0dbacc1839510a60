"""What quantising does to pictures: calibration, comparison, recipes searched under a budget."""
