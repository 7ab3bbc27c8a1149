"""The gradient of a train step: losses, cotangents, where the coefficient is placed."""
