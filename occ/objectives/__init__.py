"""Losses as pure functions of arrays with explicit masks."""
