"""Optimiser, training loop, checkpoints, curves."""
