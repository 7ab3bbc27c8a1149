"""Instruments: what a step, a rollout, an answer costs; plans; other projects in one run."""
