"""One run of a pipeline: its request, its checks, loading, placement and result."""
