"""Optimal Coefficient Calibration (OCC) of auxiliary gradients, as an optax transformation."""

__version__ = "0.1.0"
