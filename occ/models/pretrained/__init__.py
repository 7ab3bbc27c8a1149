"""Weights in and out: published checkpoints as models, and models as published checkpoints."""

from occ.models.pretrained.model import Pretrained

__all__ = ["Pretrained"]
