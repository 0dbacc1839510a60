"""Schedule and loop; knows no model, only a callable."""
