"""LoRA and its relatives on networks whose weights may stay packed; imported when the first one is loaded."""
