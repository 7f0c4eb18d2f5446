"""Training: loop and hooks, optimizer, checkpoints, curves, devices."""
