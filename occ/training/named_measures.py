"""Measures on some leaves of this project's decoder, under names for configurations."""

from __future__ import annotations

from occ import measures


@measures.register("first_layer")
def first_layer() -> measures.Measure:
    """Gradients of the first of the trunk's `layers`; `dense_layers` before it are left out."""
    return measures.gradients(measures.layer(0), name="first_layer")


@measures.register("last_layer")
def last_layer() -> measures.Measure:
    """Gradients of the trunk's last layer alone."""
    return measures.gradients(measures.layer(-1), name="last_layer")


@measures.register("embedding")
def embedding() -> measures.Measure:
    """Gradients of the embedding alone."""
    return measures.gradients(measures.named("embedding"), name="embedding")
