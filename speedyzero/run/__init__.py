"""Keeps a run: its directory, checkpoints, logs and signals. The algorithm never imports this package."""
