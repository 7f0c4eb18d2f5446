"""Does a training step compile and fit on another machine: targets, compilation, advice and the report."""
