"""Layers that the three networks share."""
