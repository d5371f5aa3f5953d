"""Attention over exact tokens and folded entries. `reference` is the ground truth."""
