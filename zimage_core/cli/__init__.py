"""One file a verb; each a thin caller of a public function."""
