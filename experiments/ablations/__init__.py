"""The parts of ablate.py: tables, training, costs and reports."""
