"""speedyzero: EfficientZero and SpeedyZero training as one loop on one device. Start at `iteration`; run with `python -m speedyzero`."""
