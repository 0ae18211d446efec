"""Spoilt checkpoints, frames and configs, and what becomes of those who read them: the parts of `tools/faults/mutate.py`."""
