"""Rules by their names, for configurations and command lines."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from occ.rules.balancing import aligned_mtl, imtl_g, metabalance, nash_mtl
from occ.rules.base import Rule
from occ.rules.fixed import detach, fixed, replay
from occ.rules.minimum_norm import cagrad, mgda
from occ.rules.optimal import noisy_optimal, optimal
from occ.rules.projection import cosine_gating, gradvac, pcgrad

REGISTRY: dict[str, Callable[..., Rule]] = {
    "aligned_mtl": aligned_mtl,
    "cagrad": cagrad,
    "cosine_gating": cosine_gating,
    "detach": detach,
    "fixed": fixed,
    "gradvac": gradvac,
    "imtl_g": imtl_g,
    "metabalance": metabalance,
    "mgda": mgda,
    "nash_mtl": nash_mtl,
    "noisy_optimal": noisy_optimal,
    "optimal": optimal,
    "pcgrad": pcgrad,
    "replay": replay,
}
"""Every rule's factory by its name."""


def by_name(name: str, **options: Any) -> Rule:
    """The rule of this name.

    Args:
      name: a key of `REGISTRY`.
      **options: the arguments of its factory, by keyword.

    Raises:
      ValueError: an unknown name, an unknown option, or one that the rule cannot do without.

    >>> by_name("fixed", coefficients=0.1).name
    'fixed'
    """
    if name not in REGISTRY:
        raise ValueError(f"rules.by_name: expected one of {sorted(REGISTRY)}, got {name!r}.")
    factory = REGISTRY[name]
    parameters = inspect.signature(factory).parameters
    unknown = sorted(set(options) - set(parameters))
    if unknown:
        raise ValueError(
            f"rules.by_name: rule {name!r} has no option {unknown}; it takes "
            f"{sorted(parameters) or 'none'}."
        )
    required = [p.name for p in parameters.values() if p.default is inspect.Parameter.empty]
    missing = sorted(set(required) - set(options))
    if missing:
        raise ValueError(f"rules.by_name: rule {name!r} needs {missing}; pass it by keyword.")
    return factory(**options)
