"""Runnable experiments: `python -m experiments.NAME` from a checkout."""
