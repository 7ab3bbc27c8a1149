"""What a measure is, and the inner products that all of them are made of.

A measure turns evidence into a Gram matrix in two stages, so that a coefficient does not depend on
how a minibatch was cut up: `reduce` makes statistics that *add up* over micro-batches and devices,
and `update` turns the sum of them, once, into a `Measurement`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from occ.registry import Registry

Statistics = Any
MeasureState = Any


class Measurement(NamedTuple):
    """What a measure knows after an update.

    Attributes:
      gram: float [K+1, K+1], the Gram matrix; None from an estimator that never had one, which
        `calibrate` fills with NaN before a rule sees it.
      ratio: None, or float [] or [K]: c_k / v_k^2 as estimated by a measure that yields it
        directly, one for all heads or one a head.
      sampled_correlation: None, or float [K]: the inner products of what the step really takes,
        which belong to the perturbation, where the matrix holds another first-order correlation:
        one free of the common sampling noise (`cross_fitted`), or one in another norm
        (`preconditioned`).
      signal: None, or float [K+1]: inner products of the expected main gradient with every expected
        gradient, itself first (`past_gradients`).
    """

    gram: Any
    ratio: jax.Array | None = None
    sampled_correlation: jax.Array | None = None
    signal: jax.Array | None = None


class Measure(NamedTuple):
    """An estimator of the Gram matrix.

    Attributes:
      name: for messages and logs.
      evidence: keyword arguments of `tx.update` that it reads. `"gradients"` stands for the
        gradients themselves, which `calibrate` always has; every other name is the caller's to
        pass.
      init: `(num_auxiliary, leaves) -> state`; leaves: the shared parameters by their paths.
      zero: `(num_auxiliary, dtype) -> statistics` of an empty minibatch; None where the statistics
        are the gradients, which have accumulators of their own.
      reduce: `(evidence, num_auxiliary) -> statistics`, additive over micro-batches.
      update: `(statistics, state, axis_name) -> (Measurement, state)`.
      yields_ratio: the measurement holds a ratio and no Gram matrix.
      yields_signal: the measurement holds a `signal`, of averages over updates.
      leading_rows: from the rows of a minibatch to how many at its top are looked at apart from
        the others; None for measures that do not cut a minibatch.
      partial: it looks at some of the leaves, so that a group of leaves may have none for it.
    """

    name: str
    evidence: tuple[str, ...]
    init: Callable[[int, Mapping[str, Any]], MeasureState]
    zero: Callable[[int, Any], Statistics] | None
    reduce: Callable[[Mapping[str, Any], int], Statistics]
    update: Callable[[Statistics, MeasureState, Any], tuple[Measurement, MeasureState]]
    yields_ratio: bool = False
    yields_signal: bool = False
    leading_rows: Callable[[int], int] | None = None
    partial: bool = False

    @property
    def early(self) -> bool:
        """Whether all that it reads exists before the backward pass through the trunk."""
        return all(name in EVIDENCE and EVIDENCE[name].early for name in self.evidence)

    @property
    def tree_evidence(self) -> set[str]:
        """Names of evidence that consists of gradients or of trees like them."""
        return {name for name in self.evidence if name in EVIDENCE and EVIDENCE[name].trees}

    def require(self, evidence: Mapping[str, Any]) -> None:
        """Checks that all is there that it reads.

        Raises:
          ValueError: some is not; it is named.
        """
        missing = [name for name in self.evidence if evidence.get(name) is None]
        if missing:
            got = sorted(k for k, v in evidence.items() if v is not None and k != "gradients")
            raise ValueError(
                f"calibrate: measure {self.name!r} needs the evidence {missing}, got "
                f"{got or 'none'}. Pass it by keyword: "
                f"tx.update(grads, state, params, auxiliary=..., {missing[0]}=...)."
            )


class Evidence(NamedTuple):
    """What a training step can hand to a measure, by keyword.

    Attributes:
      trees: pytrees like the parameters, or tuples of them; a measure sees their shared leaves.
      early: it exists before the backward pass through the trunk.
    """

    trees: bool
    early: bool


EVIDENCE: dict[str, Evidence] = {"gradients": Evidence(trees=True, early=False)}
"""Every evidence name that a measure reads, entered by `declare_evidence` beside that measure."""

REGISTRY = Registry("measure")
"""Every measure's factory by its name; `@register("name")` enters one where it is defined."""

register = REGISTRY.register


def declare_evidence(*names: str, trees: bool, early: bool) -> None:
    """Enters names of evidence. See `Evidence`."""
    EVIDENCE.update(dict.fromkeys(names, Evidence(trees, early)))


def accumulation_dtype(*dtypes: Any) -> Any:
    """The dtype in which gradients of these dtypes are summed: at least float32.

    Works under strict dtype promotion too, where mixing dtypes by accident is an error.

    >>> accumulation_dtype(jnp.bfloat16)
    dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(jnp.float32, *dtypes)


def widen(leaf: jax.Array) -> jax.Array:
    """The leaf in the dtype in which it is summed."""
    return leaf.astype(accumulation_dtype(leaf.dtype))


def stateless(num_auxiliary: int, leaves: Mapping[str, Any]) -> MeasureState:
    """`init` of a measure that remembers nothing."""
    del num_auxiliary, leaves
    return ()


def psum(values: Any, axis_name: Any) -> Any:
    """Sum over a mapped axis, or the values themselves without one."""
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def inner_product(left: Any, right: Any) -> jax.Array:
    """Inner product of two pytrees of gradients, accumulated in at least float32.

    Leaf by leaf, without raveling: of a leaf that is sharded over devices each device sums its own
    part, and one scalar is communicated.

    Args:
      left: pytree of arrays.
      right: pytree of the same structure and shapes.

    Returns:
      Scalar, sum over all leaves of the elementwise product; the real part for complex leaves.

    >>> float(inner_product({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 4.0])}))
    11.0
    """
    products = [
        _leaf_inner_product(a, b)
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    ]
    dtype = accumulation_dtype(*products)
    return sum((product.astype(dtype) for product in products), jnp.zeros((), dtype))


def _leaf_inner_product(a: jax.Array, b: jax.Array) -> jax.Array:
    dtype = accumulation_dtype(a.dtype, b.dtype)
    return jnp.real(jnp.sum(jnp.conj(a.astype(dtype)) * b.astype(dtype)))


def gram_matrix(gradients: tuple[Any, ...]) -> jax.Array:
    """Gram matrix of a tuple of K+1 gradient pytrees, the main one first.

    Args:
      gradients: K+1 pytrees of the same structure.

    Returns:
      float [K+1, K+1], symmetric; (K+1)(K+2)/2 inner products are computed.

    >>> g, m = jnp.array([1.0, 0.0]), jnp.array([2.0, 1.0])
    >>> gram_matrix((g, m)).tolist()
    [[1.0, 2.0], [2.0, 5.0]]
    """
    size = len(gradients)
    upper = {
        (i, j): inner_product(gradients[i], gradients[j])
        for i in range(size)
        for j in range(i, size)
    }
    rows = [jnp.stack([upper[min(i, j), max(i, j)] for j in range(size)]) for i in range(size)]
    return jnp.stack(rows)
