"""Speed and memory, measured beside dense transformers after a parity check."""
