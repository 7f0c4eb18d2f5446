"""Data sets and training batches."""
