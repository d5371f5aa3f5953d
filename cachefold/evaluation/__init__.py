"""What folding costs in quality, measured with the decisions of inference."""
