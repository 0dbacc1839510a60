"""Model files: readers, identification, tensor names, loading."""
