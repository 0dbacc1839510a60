"""The embedded nano model, as data files."""
