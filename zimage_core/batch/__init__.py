"""Many prompts from a table: rows in, datasets out."""
