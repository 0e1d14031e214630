"""The trainer: data, the loop, metrics, checkpoints, recipes, the report."""
