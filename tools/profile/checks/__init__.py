"""The parts of gpu_check, a file each: `run(job, record)` measures, and notes lines for people and numbers for JSON."""

NAMES = ("facts", "overlap", "parity", "capture", "speed", "idle", "train")
"""In the order in which they run: what later parts read comes first, what takes any time that is left comes last."""
