"""The suites of experiments/benchmark.py, and the commands soak.py and score_haiku.py."""
