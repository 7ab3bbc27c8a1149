"""Measures that read gradients: all of them, a part of them, or of a part of the minibatch.

A gradient arrives here as a dict from the path of a shared leaf to the leaf; `calibrate` makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from occ.measures.base import (
    Measure,
    Measurement,
    declare_evidence,
    gram_matrix,
    inner_product,
    psum,
    register,
    stateless,
    widen,
)

Select = Callable[[str], bool | int]


@register("gradients")
def gradients(select: Select | None = None, *, name: str | None = None) -> Measure:
    """The exact Gram matrix of the gradients that `tx.update` is given.

    c_k = <g, m_k> and <m_j, m_k> over the shared leaves. The evidence is there already: `updates`
    is g and `auxiliary` holds the m_k.

    Args:
      select: None for all shared leaves, or a function of a leaf's path: False leaves it out, True
        takes it, an integer takes that index of its leading axis (one layer of a stack). What is
        measured on some leaves is an estimate for the others.
      name: for messages; default "gradients".

    Reference: Wang et al., Joint Training of Multi-Token Prediction in Reinforcement Learning via
    Optimal Coefficient Calibration, arXiv 2605.28184: the first-order correlation and the
    second-order perturbation of its decomposition.
    """
    label = name or ("gradients" if select is None else "gradients(select)")

    def reduce(evidence, num_auxiliary):
        del num_auxiliary
        return tuple(_selected(gradient, select, label) for gradient in evidence["gradients"])

    def update(statistics, state, axis_name):
        return Measurement(psum(gram_matrix(statistics), axis_name)), state

    return Measure(
        label, ("gradients",), stateless, None, reduce, update, partial=select is not None
    )


def layer(index: int) -> Select:
    """Selects one layer of a stack of layers ("layers/..." with a leading layer axis).

    >>> select = layer(0)
    >>> select("layers/mlp/up/kernel"), select("embedding/embedding")
    (0, False)
    """

    def select(path: str) -> bool | int:
        return index if path.split("/")[0] == "layers" else False

    return select


def named(*names: str) -> Select:
    """Selects leaves by the first part of their path.

    >>> select = named("embedding")
    >>> select("embedding/embedding"), select("layers/mlp/up/kernel")
    (True, False)
    """
    return lambda path: path.split("/")[0] in names


def _selected(gradient: dict[str, Any], select: Select | None, label: str) -> dict[str, Any]:
    if select is None:
        return gradient
    chosen = {}
    for path, leaf in gradient.items():
        choice = select(path)
        if choice is not False:
            chosen[path] = leaf if choice is True else leaf[choice]
    if not chosen:
        raise ValueError(
            f"{label}: `select` takes none of the shared leaves {sorted(gradient)}. Compare the "
            "names it looks for with these paths."
        )
    return chosen


declare_evidence("second_moment", trees=True, early=False)
declare_evidence("gradient_halves", trees=True, early=False)
declare_evidence("row_subset", "readout", trees=True, early=True)


@register("preconditioned")
def preconditioned(eps: float = 1e-8, *, norm: str = "preconditioned") -> Measure:
    """Inner products of the directions that Adam makes of the gradients.

        P = diag(1 / (sqrt(nu) + eps))
        norm = "preconditioned":  c_k = <g, P m_k>,  V = [<m_j, P m_k>]
        norm = "euclidean":       c_k = <g, P m_k>,  V = [<P m_j, P m_k>]

    With a frozen preconditioner the parameters move along P g + w P m. If the objective is smooth
    in the norm of P^-1 (that is how analyses of Adam measure it), the decomposition holds with
    <a, b> replaced by <a, P b>: the first form. Smoothness in the ordinary norm gives the second,
    whose perturbation term has a correlation of its own, <P g, P m_k>, handed on as
    `Measurement.sampled_correlation` for `rules.noisy_optimal`.

    Evidence: `second_moment`, a pytree like the gradients: Adam's nu with its bias correction, from
    before this step.

    Args:
      eps: Adam's, > 0.
      norm: "preconditioned" or "euclidean".

    Raises:
      ValueError: another norm, or eps <= 0.

    Reference: Kingma and Ba, Adam, arXiv 1412.6980; the decomposition: arXiv 2605.28184.
    """
    if norm not in ("preconditioned", "euclidean"):
        raise ValueError(
            f"preconditioned: norm must be 'preconditioned' or 'euclidean', got {norm!r}."
        )
    if not eps > 0:
        raise ValueError(f"preconditioned: eps must be > 0, got {eps}.")

    def reduce(evidence, num_auxiliary):
        del num_auxiliary
        return evidence["gradients"], evidence["second_moment"]

    def update(statistics, state, axis_name):
        gradients, second_moment = statistics
        wide = tuple(jax.tree.map(widen, gradient) for gradient in gradients)
        scale = jax.tree.map(lambda nu: 1 / (jnp.sqrt(widen(nu)) + eps), second_moment)
        moved = tuple(jax.tree.map(jnp.multiply, scale, gradient) for gradient in wide)
        if norm == "preconditioned":
            root = jax.tree.map(jnp.sqrt, scale)
            rooted = tuple(jax.tree.map(jnp.multiply, root, gradient) for gradient in wide)
            return Measurement(psum(gram_matrix(rooted), axis_name)), state
        moved_gram = gram_matrix(moved)
        cross = jnp.stack([inner_product(wide[0], m) for m in moved])
        gram = moved_gram.at[0].set(cross).at[:, 0].set(cross)
        gram, same = psum((gram, moved_gram[0, 1:]), axis_name)
        return Measurement(gram, None, same), state

    label = "preconditioned" if norm == "preconditioned" else "preconditioned(euclidean)"
    return Measure(label, ("gradients", "second_moment"), stateless, None, reduce, update)


@register("preconditioned_euclidean")
def preconditioned_euclidean(eps: float = 1e-8) -> Measure:
    """`preconditioned` with norm="euclidean"."""
    return preconditioned(eps, norm="euclidean")


@register("cross_fitted")
def cross_fitted() -> Measure:
    """The correlation between disjoint halves of the minibatch; the perturbation of the whole.

        c_k = (<g_A, m_k,B> + <g_B, m_k,A>) / 2,      V = [<m_j, m_k>],   c_k,same = <g, m_k>

    Both gradients of one minibatch share its sampling noise: E<g, m> = <E g, E m> + tr Cov(g, m).
    Between halves that share no sample the second term is gone. The perturbation keeps its noise,
    because the step really takes it. The matrix may be indefinite: c is no longer an inner product
    of the vectors that the rest is made of. `rules.noisy_optimal` also reads c_same.

    Evidence: `gradient_halves`, a pair of tuples (g, m_1, .., m_K): the *mean* gradients of either
    half, which should be halves of the prompts, since the samples of a prompt are compared with
    each other.

    Reference: the decomposition of arXiv 2605.28184, in expectation over the minibatch.
    """

    def reduce(evidence, num_auxiliary):
        del num_auxiliary
        return evidence["gradients"], evidence["gradient_halves"]

    def update(statistics, state, axis_name):
        whole, (first, second) = statistics
        gram = gram_matrix(whole)
        cross = jnp.stack(
            [
                (inner_product(first[0], m_second) + inner_product(second[0], m_first)) / 2
                for m_first, m_second in zip(first[1:], second[1:], strict=True)
            ]
        )
        # |g|^2 stays as it is: nothing divides by it but the cosine.
        expected = gram.at[0, 1:].set(cross).at[1:, 0].set(cross)
        expected, same = psum((expected, gram[0, 1:]), axis_name)
        return Measurement(expected, None, same), state

    return Measure(
        "cross_fitted",
        ("gradients", "gradient_halves"),
        stateless,
        None,
        reduce,
        update,
        leading_rows=lambda rows: rows // 2,
    )


def _gram_of(evidence_name: str) -> Measure:
    """The Gram matrix of K+1 gradients that the caller passes by a name of their own."""

    def reduce(evidence, num_auxiliary):
        got = evidence[evidence_name]
        if len(got) != num_auxiliary + 1:
            raise ValueError(
                f"{evidence_name}: expected a tuple of K+1={num_auxiliary + 1} gradients, the main "
                f"one first, got {len(got)}."
            )
        return tuple(got)

    def update(statistics, state, axis_name):
        return Measurement(psum(gram_matrix(statistics), axis_name)), state

    return Measure(evidence_name, (evidence_name,), stateless, None, reduce, update)


@register("row_subset")
def row_subset(fraction: float = 0.125) -> Measure:
    """The Gram matrix of gradients on some of the minibatch's rows.

    A second backward pass over a fraction of the rows costs that fraction, and the coefficient is
    known before the trunk's backward pass over all of them.

    Evidence: `row_subset`, a tuple (g, m_1, .., m_K) of gradients on those rows alone.

    Args:
      fraction: share of the rows, in (0, 1]; for whoever makes the evidence.

    Raises:
      ValueError: a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"row_subset: fraction must be in (0, 1], got {fraction}.")
    measure = _gram_of("row_subset")
    return measure._replace(leading_rows=lambda rows: max(round(rows * fraction), 1))


@register("readout")
def readout() -> Measure:
    """The Gram matrix over what the losses reach directly: output head and final norm.

    These gradients exist before any backward pass through the trunk, so the measure costs nothing
    but the inner products. Where the head is tied, the embedding's gradient as a head counts, and
    what reaches it as the trunk's input does not.

    Evidence: `readout`, a tuple (g, m_1, .., m_K) of those leaves' gradients.
    """
    return _gram_of("readout")


@register("sketched")
def sketched(rank: int = 8, *, seed: int = 0) -> Measure:
    """Inner products of random sketches of the gradients, unbiased.

        S(G) = A' G B,   A [a, r] and B [b, r] with independent entries N(0, 1/r)
        E <S(G), S(M)> = <G, M>

    for every matrix of gradients [.., a, b]; a leaf that is no larger than its sketch is taken as
    it is. The random matrices are new at every step, so that the error averages out over time.

    The sketch of a weight gradient X' D is (X A)' (D B), with activations X and cotangents D: a
    backward pass that makes sketches alone need not form X' D. As a measure on gradients that are
    there already it saves no operation; it shows what such a backward pass would know, and its K+1
    sketches are all that devices or micro-batches must exchange.

    Args:
      rank: r >= 1.
      seed: of the random matrices.

    Raises:
      ValueError: rank < 1.

    Reference: Woodruff, Sketching as a Tool for Numerical Linear Algebra, arXiv 1411.4357.
    """
    if rank < 1:
        raise ValueError(f"sketched: rank must be >= 1, got {rank}.")

    def reduce(evidence, num_auxiliary):
        del num_auxiliary
        return evidence["gradients"]

    def update(statistics, step, axis_name):
        key = jax.random.fold_in(jax.random.key(seed), step)
        sketches = tuple(
            {
                path: _sketch(leaf, jax.random.fold_in(key, index), rank)
                for index, (path, leaf) in enumerate(sorted(gradient.items()))
            }
            for gradient in statistics
        )
        return Measurement(psum(gram_matrix(sketches), axis_name)), step + 1

    return Measure(
        f"sketched({rank})",
        ("gradients",),
        lambda num_auxiliary, leaves: jnp.zeros((), jnp.int32),
        None,
        reduce,
        update,
    )


def _sketch(leaf: jax.Array, key: jax.Array, rank: int) -> jax.Array:
    if leaf.ndim < 2 or leaf.shape[-2] * leaf.shape[-1] <= rank * rank:
        return leaf
    wide = widen(leaf)
    # Layers of a stack share the random matrices: their sketches are compared within a layer only.
    left, right = (
        jax.random.normal(k, (size, rank), wide.dtype) * rank**-0.5
        for k, size in zip(jax.random.split(key), wide.shape[-2:], strict=True)
    )
    with jax.default_matmul_precision("highest"):
        return jnp.einsum("...ab,ar,bs->...rs", wide, left, right)
