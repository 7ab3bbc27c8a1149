"""Decoders with multi-token prediction modules."""
