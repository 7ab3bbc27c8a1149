"""One training step beside those of TRL and Tunix, each in an environment of its own."""
