"""Benchmarks of the ops, one file a family; each has `cases(quick)`."""
