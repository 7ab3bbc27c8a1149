"""Accuracies and their intervals."""
