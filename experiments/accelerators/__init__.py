"""Compilation of a training step for another machine: targets, compilation, advice and the report."""
