"""Folding Hugging Face models: fold, unfold, folded; families; saving and loading."""
