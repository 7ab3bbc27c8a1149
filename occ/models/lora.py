"""Adapters of a frozen trunk: given to a model, and taken up into its kernels.

    base = pretrained.load(folder)
    policy = adapt(base, dataclasses.replace(base.config, lora=LoRAConfig(rank=16)))
    ...
    pretrained.save(target, merge(policy), like=folder)

What `occ.calibrate` weighs are then the adapters' gradients. With W = W_0 + s A B, and G, M the
gradients of the RL loss and an MTP loss on W,

    g_A = s G B^T,   g_B = s A^T G       c   = <g, m> = s^2 (<G B^T, M B^T> + <A^T G, A^T M>)
                                         v^2 = <m, m>

summed over adapted kernels: c is what a step along the MTP gradient gains to first order where only
adapters move, v^2 what it costs to second, so the coefficient is that of the step that is taken.
Neither is c nor v^2 of the whole trunk. At the start, where B = 0, they are those of A^T G and
A^T M: seen through the `rank` random directions of each A, whose expectation is a multiple of
<G, M> and of |M|^2, so that c / v^2 is an estimate of the whole kernels' own.

Reference: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685. Not from
the package qwix, which finds kernels by intercepting products: within the loop over layers, whose
variables are split off and merged again, it finds none.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from occ.models.config import ModelConfig
from occ.models.parameters import ADAPTERS
from occ.models.policy import Policy, abstract_policy, create_policy
from occ.models.quantisation import dequantise, quantise
from occ.trees import path_string

KERNEL, SCALE = "/kernel", "/kernel_scale"


def adapt(policy: Policy, config: ModelConfig, *, seed: int = 0, shardings: Any = None) -> Policy:
    """Gives a model fresh adapters and freezes the rest of its trunk.

    What it says stays the same, but for rounding where the trunk is quantised.

    Args:
      policy: without adapters; its arrays are shared with the result where the dtype is the same.
      config: the same architecture with `lora`; the trunk is cast to `lora.frozen_dtype` or
        quantised, MTP modules and adapters to `param_dtype`.
      seed: of the adapters.
      shardings: of the adapted model's parameters, a tree of `jax.sharding.Sharding` as
        `occ.training.sharding.tree_shardings` makes it; None is the default device.

    Raises:
      ValueError: the model has adapters already, `config` has none, or is of another architecture.
    """
    if policy.config.lora is not None or config.lora is None:
        raise ValueError(
            "adapt: expected a policy without adapters and a configuration with lora, got "
            f"{policy.config.lora} and {config.lora}. To change adapters, `merge` them first."
        )
    if dataclasses.replace(policy.config, param_dtype=config.param_dtype) != config.whole:
        raise ValueError(
            "adapt: apart from lora and param_dtype the configuration must be the policy's own, "
            f"got {config} for {policy.config}. Use dataclasses.replace(policy.config, lora=...)."
        )
    shapes = abstract_policy(config)
    places = None
    if shardings is not None:
        places = {p: s for p, s in _by_path(shardings).items() if is_adapter(p)}
    fresh = jax.jit(functools.partial(_fresh, config, seed), out_shardings=places)()
    leaves = {**_by_path(policy.params), **_by_path(policy.rest), **fresh}
    for path in [path for path in _by_path(shapes.rest) if path.endswith(SCALE)]:
        kernel = path.removesuffix(SCALE) + KERNEL
        leaves[kernel], leaves[path] = _quantised(leaves[kernel].astype(config.base))
    return Policy(config, _filled(shapes.params, leaves), _filled(shapes.rest, leaves))


def merge(policy: Policy) -> Policy:
    """The same model without adapters, W + (alpha / rank) A B in their place, in `param_dtype`.

    Nothing of it is quantised. The products are of at least float32. A model without adapters is
    returned as it is. Works under jit, and on a mesh.
    """
    config = policy.config
    if config.lora is None:
        return policy
    leaves = {**_by_path(policy.params), **_by_path(policy.rest)}
    for path in [path for path in leaves if path.endswith(KERNEL)]:
        layer = path.removesuffix(KERNEL)
        beside = [leaves.get(layer + name) for name in (SCALE, *(f"/{a}" for a in ADAPTERS))]
        if any(leaf is not None for leaf in beside):
            leaves[path] = _merged(leaves[path], *beside, config.lora.scale, config.params)
    shapes = abstract_policy(config.whole)
    return Policy(config.whole, _filled(shapes.params, leaves), _filled(shapes.rest, leaves))


def is_adapter(path: str) -> bool:
    """Whether the parameter at "path/of/leaf" belongs to an adapter."""
    return path.split("/")[-1] in ADAPTERS


@functools.partial(jax.jit, static_argnums=(4, 5))
def _merged(kernel: Any, scales: Any, a: Any, b: Any, scale: float, dtype: Any) -> jax.Array:
    if scales is not None:
        kernel = dequantise(kernel, scales)
    if a is None:
        return kernel.astype(dtype)
    dtypes = kernel.dtype, a.dtype, jnp.dtype(jnp.float32)
    wide = max(dtypes, key=lambda dtype: dtype.itemsize)
    product = jnp.matmul(a.astype(wide), b.astype(wide), precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(wide) + scale * product).astype(dtype)


def _quantised(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A kernel in eight bits, and its scales, cut over devices as it is."""
    places = None
    if isinstance(kernel.sharding, NamedSharding):
        cut = (*kernel.sharding.spec, *[None] * kernel.ndim)[: kernel.ndim]
        scales = NamedSharding(kernel.sharding.mesh, jax.P(*cut[:-2], cut[-1]))
        places = kernel.sharding, scales
    return jax.jit(quantise, out_shardings=places)(kernel)


def _fresh(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """The adapters of a fresh model, of which nothing else is computed."""
    variables = _by_path(create_policy(config, seed).params)
    return {path: leaf for path, leaf in variables.items() if is_adapter(path)}


def _by_path(tree: Any) -> dict[str, Any]:
    return {path_string(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _filled(shapes: Any, leaves: dict[str, Any]) -> Any:
    """The leaves as a tree like `shapes`, in its dtypes."""

    def fill(path, shape):
        leaf = leaves[path_string(path)]
        return leaf if leaf.dtype == shape.dtype else leaf.astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)
