"""Pure functions on tensors: decisions, merging, schedules, accounting. Lowest layer."""
