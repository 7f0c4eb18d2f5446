"""The suites of experiments/benchmark.py: what each measures, as rows, and the rows as Markdown."""
