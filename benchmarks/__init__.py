"""Scripts that measure; run them by their paths."""
