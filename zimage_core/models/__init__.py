"""The three networks."""
