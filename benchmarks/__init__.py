"""`python -m benchmarks.run` times the ops against their peers, `python -m benchmarks.report` makes RESULTS.md."""
