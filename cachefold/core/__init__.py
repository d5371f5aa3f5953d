"""Pure functions on tensors: decisions, merging, schedules, accounting. Imports nothing above it."""
