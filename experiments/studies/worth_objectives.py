"""The auxiliary objectives whose worth `experiments.studies.worth` measures, and their models.

Most are losses of the MTP modules (`occ.training.gradient.losses`), on the minibatch as it is or
with other advantages. Two need the hidden states: they are written here, since nothing trains with
them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.configs import CONFIGS
from experiments.studies.claims_grid import OVER_STARTS_SETTINGS
from experiments.studies.fidelity_estimators import by_path, shared_gradients
from occ.measures import accumulation_dtype
from occ.models.parameters import join, partition
from occ.objectives import divergences, masked, mtp
from occ.objectives.advantages import optimal_token_baseline
from occ.training.batch import Minibatch
from occ.training.config import MTPTrainingConfig, TrainConfig
from occ.training.gradient.inputs import StepInputs
from occ.training.gradient.placement import loss_gradients

Gradient = dict[str, jax.Array]  # on the shared parameters, by path


class Auxiliary(NamedTuple):
    """An objective beside the RL loss.

    Attributes:
      gradient: its gradient on a minibatch.
      advantage: the method of the advantages that it is taken with; "" is the run's own.
      modules: how many the model must have.
    """

    gradient: Callable[[StepInputs], Gradient]
    advantage: str = ""
    modules: int = 1


def rl_gradient(inputs: StepInputs) -> Gradient:
    """The RL loss's own."""
    return _of_losses(inputs, MTPTrainingConfig(loss="ce"))[0]


def _of_losses(inputs: StepInputs, config: MTPTrainingConfig) -> tuple[Gradient, ...]:
    inputs = inputs._replace(config=dataclasses.replace(inputs.config, mtp=config))
    return shared_gradients(loss_gradients(inputs))


def _module(
    config: MTPTrainingConfig,
    changed: Callable[[StepInputs], Minibatch] | None = None,
    *,
    only: int = 0,
    advantage: str = "",
) -> Auxiliary:
    """A loss of the modules: of all of them together, or of one alone, on a changed minibatch."""

    def gradient(inputs: StepInputs) -> Gradient:
        if changed is not None:
            inputs = inputs.on(changed(inputs))
        heads = _of_losses(inputs, config)[1:]
        if only:
            return heads[only - 1]
        return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *heads)

    return Auxiliary(gradient, advantage, max(only, 1))


def _rewarded(inputs: StepInputs) -> Minibatch:
    """The samples that were better than their group."""
    batch = inputs.batch
    return batch.replace(response_mask=batch.response_mask & (batch.advantages > 0))


def _exponentiated(inputs: StepInputs) -> Minibatch:
    """Every sample, weighted by the exponential of its advantage."""
    batch = inputs.batch
    weights = jnp.where(batch.response_mask, jnp.exp(batch.advantages), 0)
    return batch.replace(advantages=weights)


def _with_token_baseline(inputs: StepInputs) -> Minibatch:
    """Advantages beside the baseline of least variance at each token, by the module's own energy.

    Advantages are affine in the rewards of their group, and so serve as returns.
    """
    batch, stages, parts = inputs.batch, inputs.stages, inputs.parts
    state = stages.modules(parts, stages.trunk(parts).hidden)[0]
    logits = stages.model(parts).mtp_logits(state, 0) / stages.temperature
    energy = mtp.align(divergences.logit_energy(logits, mtp.labels_at_source(batch.tokens, 1)), 1)
    mask = mtp.aligned_mask(batch.response_mask, batch.segment_ids, 1)
    samples = inputs.config.rollout.samples
    found = optimal_token_baseline(
        *(
            values.reshape(-1, samples, mask.shape[-1])
            for values in (batch.advantages, energy, mask)
        )
    )
    return batch.replace(advantages=batch.advantages - found.reshape(mask.shape))


# ---------------------------------------------------------------------------------------------
# Objectives of hidden states
# ---------------------------------------------------------------------------------------------


def _of_hidden(loss: Callable[[StepInputs, jax.Array, jax.Array], jax.Array]) -> Auxiliary:
    """The gradient of a loss of the trunk's hidden states and module 1's."""

    def gradient(inputs: StepInputs) -> Gradient:
        def value(params: Any) -> jax.Array:
            parts = partition(params)
            hidden = inputs.stages.trunk(parts).hidden
            return loss(inputs, hidden, inputs.stages.modules(parts, hidden)[0])

        return by_path(jax.grad(value)(join(inputs.parts)))

    return Auxiliary(gradient)


def latent_loss(inputs: StepInputs, hidden: jax.Array, state: jax.Array) -> jax.Array:
    """1 - cosine of module 1's hidden state and the trunk's one position on, which is held fixed.

    Both predict the same token. A mean over the response's tokens.

    Reference: Teoh et al., Next-Latent Prediction Transformers Learn Compact World Models, arXiv
    2511.05963, whose latent dynamics are here the module's.
    """
    batch = inputs.batch
    target = jax.lax.stop_gradient(mtp.ahead(hidden, 1))
    apart = mtp.align(1 - _cosine(state, target), 1)
    return masked.masked_mean(apart, mtp.aligned_mask(batch.response_mask, batch.segment_ids, 1))


def alignment_loss(inputs: StepInputs, hidden: jax.Array, state: jax.Array) -> jax.Array:
    """1 - cosine of the hidden states of two better samples of a prompt, before their last token.

    A mean over pairs, then over prompts that have one. It is 0, and so is its gradient, where the
    better samples of a prompt are the same sequence.

    Reference: Wang et al., Right Makes Might: Aligning Verified Hidden States Empowers RL
    Reasoning, arXiv 2606.03234, where it stands before the marker of the answer.
    """
    batch, samples = inputs.batch, inputs.config.rollout.samples
    mask = batch.response_mask
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    anchors = jnp.take_along_axis(hidden, jnp.maximum(last - 1, 0)[:, None, None], axis=1)[:, 0]
    better = jnp.any(mask & (batch.advantages > 0), axis=1).reshape(-1, samples)
    grouped = anchors.reshape(-1, samples, anchors.shape[-1])
    cosines = _cosine(grouped[:, :, None], grouped[:, None, :])
    pairs = better[:, :, None] & better[:, None, :] & ~jnp.eye(samples, dtype=bool)[None]
    count = jnp.sum(pairs.astype(cosines.dtype), axis=(1, 2))
    each = jnp.sum(jnp.where(pairs, 1 - cosines, 0), axis=(1, 2)) / jnp.maximum(count, 1)
    return masked.masked_mean(each, count > 0)


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of vectors along the last axis; at least float32."""
    a, b = (x.astype(accumulation_dtype(x.dtype)) for x in (a, b))
    norms = jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1)
    return jnp.sum(a * b, axis=-1) * jax.lax.rsqrt(norms + 1e-12)


OWN = MTPTrainingConfig(loss="policy", reference="own")

AUXILIARIES: dict[str, Auxiliary] = {
    "policy_own": _module(OWN),
    "policy_main": _module(MTPTrainingConfig(loss="policy")),
    "ce": _module(MTPTrainingConfig(loss="ce")),
    "ce_rewarded": _module(MTPTrainingConfig(loss="ce"), _rewarded),
    "distill": _module(MTPTrainingConfig(loss="distill")),
    "total_variation": _module(MTPTrainingConfig(loss="total_variation")),
    "ce_weighted": _module(OWN, _exponentiated),
    "policy_rloo": _module(OWN, advantage="rloo"),
    "policy_opo": _module(OWN, advantage="opo"),
    "policy_otb": _module(OWN, _with_token_baseline),
    "policy_own_1": _module(OWN, only=1),
    "policy_own_2": _module(OWN, only=2),
    "policy_own_3": _module(OWN, only=3),
    "latent": _of_hidden(latent_loss),
    "alignment": _of_hidden(alignment_loss),
}
"""Policy loss against the module's own and the main head's old log-prob; cross-entropy on all
samples, on the better ones and weighted by the exponential of the advantage (advantage-weighted
regression, arXiv 1910.00177; weighted by the advantage itself it is "policy_own"); distillation
and total variation from the main head; the policy loss with other baselines (leave one out without
a standard deviation, by length, by token), and of one module alone; hidden states.
Here "ce_rewarded" is a mean over the better samples alone, where the loss of that name counts the
others as 0 in a mean over all, so that the same gradient has a smaller coefficient here."""


def _model(**changes: Any) -> Callable[[TrainConfig], TrainConfig]:
    return lambda run: dataclasses.replace(run, model=dataclasses.replace(run.model, **changes))


def _modules(**changes: Any) -> Callable[[TrainConfig], TrainConfig]:
    def change(run: TrainConfig) -> TrainConfig:
        return _model(mtp=dataclasses.replace(run.model.mtp, **changes))(run)

    return change


MODELS: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "width_128": _model(width=128, num_heads=8, num_kv_heads=4, mlp_width=256),
    "modules_2": _modules(num_modules=2),
    "modules_3": _modules(num_modules=3),
    "parallel_2": _modules(num_modules=2, kind="parallel"),
}
"""Changes of a setting's model: `SETTING-CHANGE` measures on it."""


class Part(NamedTuple):
    """What is measured together.

    Attributes:
      name: of the folder in results/worth_candidates.
      settings: with changes of the model.
      objectives: of AUXILIARIES.
    """

    name: str
    settings: tuple[str, ...]
    objectives: tuple[str, ...]


_LOSSES = ("policy_own", "ce_rewarded", "ce_weighted", "total_variation", "latent")
_BASELINES = ("policy_rloo", "policy_opo", "policy_otb")

CANDIDATES = (
    Part("losses", OVER_STARTS_SETTINGS, _LOSSES + _BASELINES),
    Part(
        "modules_2",
        ("filtering_easy-modules_2", "star_easy-modules_2"),
        ("policy_own_1", "policy_own_2"),
    ),
    Part(
        "modules_3", ("filtering_easy-modules_3",), ("policy_own_1", "policy_own_2", "policy_own_3")
    ),
    Part(
        "parallel_2",
        ("filtering_easy-parallel_2", "star_easy-parallel_2"),
        ("policy_own_1", "policy_own_2"),
    ),
    Part(
        "width_128",
        ("filtering_easy-width_128", "arithmetic_easy-width_128"),
        ("policy_own", "ce_rewarded"),
    ),
)
"""Fixed before any of them ran: starts 11 to 13, at two points of each run."""


def setting_of(name: str) -> TrainConfig:
    """The configuration of a setting, or of one with a changed model.

    Raises:
      ValueError: there is none.
    """
    setting, _, change = name.partition("-")
    if setting not in CONFIGS or (change and change not in MODELS):
        raise ValueError(
            f"worth: expected settings in {sorted(CONFIGS)}, each alone or as SETTING-CHANGE with "
            f"a change in {sorted(MODELS)}, got {name!r}."
        )
    config = CONFIGS[setting]()
    return MODELS[change](config) if change else config


def check(names: tuple[str, ...], settings: tuple[str, ...]) -> None:
    """Refuses objectives that do not exist, or not on these models.

    Raises:
      ValueError: saying which.
    """
    unknown = sorted(set(names) - set(AUXILIARIES))
    if not names or unknown or len(set(names)) < len(names):
        raise ValueError(
            f"worth: expected different objectives of {list(AUXILIARIES)}, got {list(names)}."
        )
    for setting in settings:
        there = setting_of(setting).model.mtp.num_modules
        missing = [name for name in names if AUXILIARIES[name].modules > there]
        if missing:
            raise ValueError(
                f"worth: the models of {setting} have {there} MTP module(s), too few for {missing}."
            )
