"""`python -m benchmarks.run` times the ops against torch's, `python -m benchmarks.report` makes RESULTS.md."""
