"""What ablate.py does: rows to train, what they cost, and the reports."""
