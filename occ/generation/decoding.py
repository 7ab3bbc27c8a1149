"""Generation: prompts in, responses out, as one pure function.

A fixed number of slots decode. A row that ends gives its slot to the next sample; the MTP modules
draft, and the trunk judges. Every token of every sample has random numbers of its own, so that
neither slots nor drafts change a sample but for rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from occ.generation.beginning import Prompts, begin, modules_of
from occ.generation.drafting import Window, check_depth, draft, judge
from occ.generation.sampling import (
    Generation,
    SamplingConfig,
    Work,
    choose,
    choose_by_rejection,
    distribution,
    gumbel_noise,
    log_prob_of,
    uniform_noise,
)
from occ.models.cache import Cache, StackCache
from occ.models.decoder import Decoder
from occ.models.layers import at_least_float32
from occ.models.partitioning import ROWS, constrain, platform, several_devices
from occ.models.policy import Policy
from occ.models.stacks import Layers


class _Slots(NamedTuple):
    """B rows that decode; R response tokens and D drafts."""

    cache: Cache
    modules: StackCache | None
    window: Window
    sample: jax.Array  # int32 [B], which of the M samples; M is none
    running: jax.Array  # bool [B]
    stopped: jax.Array  # bool [B]
    made: jax.Array  # int32 [B], response tokens so far
    tokens: jax.Array  # int32 [B, R + D + 1], of which ended rows write the last ones
    log_prob: jax.Array  # float32 [B, R + D + 1], of which ended rows write the last ones


class _Responses(NamedTuple):
    """Of M samples."""

    tokens: jax.Array  # int32 [M, R]
    log_prob: jax.Array  # float32 [M, R]
    lengths: jax.Array  # int32 [M]
    stopped: jax.Array  # bool [M]
    experts: jax.Array | None  # int [M, P + R, L, k], from each prompt's first token on


class _Progress(NamedTuple):
    slots: _Slots
    begun: jax.Array  # int32 [], samples that have or had a slot
    responses: _Responses
    work: Work


def generate(
    policy: Policy,
    prompts: Int[Array, "prompts columns"],
    prompt_mask: Bool[Array, "prompts columns"],
    key: jax.Array,
    *,
    config: SamplingConfig,
    rows: Int[Array, "batch"] | None = None,
    prompt_of: Int[Array, "batch"] | None = None,
    slots: int = 0,
    draft_depth: int = 0,
) -> Generation:
    """Samples responses to prompts; each prompt is run once for all of its samples.

    A token's random numbers depend on the key, the row's number and the token's place in the
    response alone, so a response does not change with the other rows, with the padding, with the
    slots or with the drafts.

    Args:
      policy: the model.
      prompts: int32 [N, P], left-padded.
      prompt_mask: bool [N, P], False on padding. `check_fits` checks concrete ones.
      key: PRNG key.
      config: sampling; static under jit.
      rows: int32 [B], each sample's number, where these are some rows of a larger batch; None
        numbers them from 0.
      prompt_of: int32 [B], each sample's prompt; None is one sample of each.
      slots: rows that decode at one time; 0 is all. Static.
      draft_depth: tokens that the MTP modules draft for each pass of the trunk; 0 is none. Static.

    Returns:
      One response to each sample, after its prompt, in the order of `prompt_of`.

    Raises:
      ValueError: the model's context is too short, its modules cannot draft so many tokens, or it
        has no experts to keep.
    """
    model = policy.model
    check_depth(policy.config.mtp, draft_depth)
    if config.keep_experts and policy.config.moe is None:
        raise ValueError("generate: keep_experts is of a mixture of experts, got a dense model.")
    prompts, prompt_mask = jnp.asarray(prompts), jnp.asarray(prompt_mask)
    if prompt_of is None:
        prompt_of = jnp.arange(prompts.shape[0], dtype=jnp.int32)
    count = prompt_of.shape[0]
    if rows is None:
        rows = jnp.arange(count, dtype=jnp.int32)
    size = min(slots, count) if slots else count
    empty = _empty(model, size, count, prompts.shape[1], config, draft_depth)
    begun = begin(model, prompts, prompt_mask, size, config, draft_depth)
    layers = None
    if platform() == "cpu":
        layers, empty, begun = _apart(model, empty, begun)

    def refill(progress: _Progress) -> _Progress:
        return _refill(progress, begun, prompt_of, config)

    def step(progress: _Progress) -> _Progress:
        return _step(model, layers, progress, key, rows, config, draft_depth)

    def goes_on(progress: _Progress):
        return jnp.any(progress.slots.running) & (progress.work.steps < config.max_new_tokens)

    def nobody_waits(progress: _Progress):
        running = progress.slots.running
        return jnp.any(running) & (jnp.all(running) | (progress.begun >= count))

    def unfinished(progress: _Progress):
        return (progress.begun < count) | jnp.any(progress.slots.running)

    def decode(progress: _Progress) -> _Progress:
        return jax.lax.while_loop(nobody_waits, step, refill(progress))

    if size == count:
        end = jax.lax.while_loop(goes_on, step, refill(empty))
    else:
        end = jax.lax.while_loop(unfinished, decode, empty)
    responses = _collect(end.slots, end.responses, config)
    mask = prompt_mask[prompt_of]
    nothing = jnp.zeros(mask.shape, bool)
    taken = jnp.arange(config.max_new_tokens, dtype=jnp.int32)[None] < responses.lengths[:, None]
    return Generation(
        tokens=jnp.concatenate(
            [jnp.where(mask, prompts[prompt_of], config.pad_token), responses.tokens], 1
        ),
        response_mask=jnp.concatenate([nothing, taken], 1),
        log_prob=jnp.concatenate([nothing.astype(jnp.float32), responses.log_prob], 1),
        finished=responses.stopped,
        lengths=responses.lengths,
        work=end.work._replace(places=end.work.steps * size + prompts.size),
        experts=_aligned(responses.experts, mask, taken),
    )


def _apart(model: Decoder, empty: _Progress, begun: Prompts) -> tuple[Layers, _Progress, Prompts]:
    """Each layer, and its cache, as a stack of its own."""
    slots = empty.slots._replace(cache=empty.slots.cache.apart)
    begun = begun._replace(cache=begun.cache.apart)
    return model.layers_apart(), empty._replace(slots=slots), begun


def _aligned(experts: jax.Array | None, prompt_mask, taken) -> jax.Array | None:
    """[L, k, M, P + R] in the columns of the tokens, -1 where no token is or none was seen."""
    if experts is None:
        return None
    padding = jnp.sum(~prompt_mask, axis=1, dtype=jnp.int32)
    from_left = jnp.arange(experts.shape[1], dtype=jnp.int32)[None] - padding[:, None]
    moved = jnp.take_along_axis(experts, jnp.maximum(from_left, 0)[:, :, None, None], axis=1)
    before_last = jnp.pad(taken[:, 1:], ((0, 0), (0, 1)))
    seen = jnp.concatenate([prompt_mask, before_last], axis=1)
    return jnp.where(seen, jnp.moveaxis(moved, (2, 3), (0, 1)), -1)


def _empty(
    model: Decoder, size: int, count: int, columns: int, config: SamplingConfig, depth: int
) -> _Progress:
    """No row runs, and none has begun."""
    most, modules = config.max_new_tokens, modules_of(model, depth)
    cache = model.empty_cache(size, columns + most, depth + 1, config.keep_experts)
    hidden = jnp.zeros((size, modules + depth, model.config.width), model.config.compute)
    of_slots, of_tokens = (size,), (size, most + depth + 1)
    slots = _Slots(
        cache=cache,
        modules=model.empty_stack(modules, size, columns + most + modules + depth + 1)
        if depth
        else None,
        window=Window(
            hidden if depth else None,
            jnp.zeros((size, modules + depth), jnp.int32),
            jnp.zeros(of_slots, jnp.int32),
        ),
        sample=jnp.full(of_slots, count, jnp.int32),
        running=jnp.zeros(of_slots, bool),
        stopped=jnp.zeros(of_slots, bool),
        made=jnp.zeros(of_slots, jnp.int32),
        tokens=jnp.zeros(of_tokens, jnp.int32),
        log_prob=jnp.zeros(of_tokens, jnp.float32),
    )
    responses = _Responses(
        tokens=jnp.full((count, most), config.pad_token, jnp.int32),
        log_prob=jnp.zeros((count, most), jnp.float32),
        lengths=jnp.zeros((count,), jnp.int32),
        stopped=jnp.zeros((count,), bool),
        experts=None
        if cache.experts is None
        else jnp.full((count, columns + most, *cache.experts.shape[2:]), -1, cache.experts.dtype),
    )
    nothing, at_depths = jnp.zeros((), jnp.int32), jnp.zeros((depth,), jnp.int32)
    work = Work(nothing, nothing, at_depths, at_depths, nothing)
    return _Progress(slots, nothing, responses, work)


def _refill(progress: _Progress, begun: Prompts, prompt_of, config: SamplingConfig) -> _Progress:
    """Slots whose row has ended take the samples that wait, in their order."""
    slots, count = progress.slots, prompt_of.shape[0]
    idle = ~slots.running
    number = progress.begun - 1 + jnp.cumsum(idle, dtype=jnp.int32)
    fresh = idle & (number < count)
    prompt = prompt_of[jnp.minimum(number, count - 1)]

    def take(old, of_prompts):
        new = of_prompts[prompt]
        return jnp.where(fresh.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    modules = slots.modules
    if modules is not None and begun.modules is not None:
        modules = _copy(modules, begun.modules, fresh, prompt, modules.keys.shape[0])
    cache = Cache(
        _copy(slots.cache.stacks, begun.cache.stacks, fresh, prompt),
        take(slots.cache.lengths, begun.cache.lengths),
        _taken_experts(slots.cache.experts, begun.cache.experts, take),
    )
    return progress._replace(
        slots=slots._replace(
            cache=cache,
            modules=modules,
            window=jax.tree.map(take, slots.window, begun.window),
            sample=jnp.where(fresh, number, jnp.where(idle, count, slots.sample)),
            running=slots.running | fresh,
            stopped=slots.stopped & ~fresh,
            made=jnp.where(fresh, 0, slots.made),
        ),
        begun=jnp.minimum(progress.begun + jnp.sum(idle, dtype=jnp.int32), count),
        responses=_collect(slots, progress.responses, config),
    )


def _taken_experts(old: jax.Array | None, of_prompts: jax.Array | None, take) -> jax.Array | None:
    if old is None or of_prompts is None:
        return None
    columns = of_prompts.shape[1]
    return old.at[:, :columns].set(take(old[:, :columns], of_prompts))


def _copy(old: Any, of_prompts: Any, fresh, prompt, first: int = 0) -> Any:
    """A cache, or several, with the columns of each fresh slot's prompt, from column `first` on."""

    def row(number, old):
        slot = order[number]
        zero = jnp.zeros_like(slot)

        def one(old, new):
            columns = jax.lax.dynamic_slice_in_dim(new, prompt[slot], 1, axis=1)
            start = (zero, slot, zero, zero + first, zero)
            return jax.lax.dynamic_update_slice(old, columns, start)

        return jax.tree.map(one, old, of_prompts)

    def rows(old, new):
        columns = slice(first, first + new.shape[3])
        new = jnp.where(fresh[None, :, None, None, None], new[:, prompt], old[:, :, :, columns])
        return old.at[:, :, :, columns].set(new)

    if several_devices() is not None:  # where one row at a time would travel to all devices
        return jax.tree.map(rows, old, of_prompts)
    order = jnp.argsort(~fresh, stable=True).astype(jnp.int32)
    return jax.lax.fori_loop(0, jnp.sum(fresh, dtype=jnp.int32), row, old)


def _collect(slots: _Slots, responses: _Responses, config: SamplingConfig) -> _Responses:
    """With the responses of rows that have ended."""
    most = config.max_new_tokens
    taken = jnp.arange(most, dtype=jnp.int32)[None] < slots.made[:, None]
    ended = _Responses(
        jnp.where(taken, slots.tokens[:, :most], config.pad_token),
        jnp.where(taken, slots.log_prob[:, :most], 0),
        slots.made,
        slots.stopped,
        None
        if responses.experts is None or slots.cache.experts is None
        else slots.cache.experts[:, : responses.experts.shape[1]],
    )
    nowhere = responses.lengths.shape[0]
    where = jnp.where(slots.running, nowhere, slots.sample)
    return jax.tree.map(lambda old, new: old.at[where].set(new, mode="drop"), responses, ended)


def _step(
    model: Decoder,
    layers: Layers | None,
    progress: _Progress,
    key,
    rows,
    config: SamplingConfig,
    depth: int,
) -> _Progress:
    """Drafts, one pass of the trunk over them, and the tokens that this decides."""
    slots, work = progress.slots, progress.work
    running, lengths = slots.running, slots.cache.lengths
    numbers = rows[jnp.minimum(slots.sample, rows.shape[0] - 1)]
    noise = _noise(model, key, numbers, slots.made, config, depth)
    drafts, drawn_from, modules = jnp.zeros((running.shape[0], 0), jnp.int32), None, slots.modules
    if modules is not None:
        drafts, drawn_from, modules = draft(
            model, slots.window, modules, lengths, running, noise.drafts, config, depth
        )
    fed = jnp.concatenate([slots.window.waiting[:, None], drafts], axis=1)
    hidden, cache = model.extend(fed, slots.cache, running, layers)
    tokens, log_prob = _choose(model.logits(hidden), noise, drafts, drawn_from, config)
    verdict = judge(tokens, drafts, config.max_new_tokens - slots.made, running, config)
    made = slots.made + verdict.decided
    slots = slots._replace(
        cache=cache._replace(lengths=lengths + verdict.decided),
        modules=modules,
        window=slots.window.move(hidden, tokens, verdict.decided),
        running=running & ~verdict.stopped & (made < config.max_new_tokens),
        stopped=slots.stopped | verdict.stopped,
        made=made,
        tokens=_write(slots.tokens, tokens, slots.made),
        log_prob=_write(slots.log_prob, log_prob, slots.made),
    )
    work = work._replace(
        steps=work.steps + 1,
        passes=work.passes + jnp.sum(running, dtype=jnp.int32),
        judged=work.judged + jnp.sum(verdict.judged, axis=0, dtype=jnp.int32),
        kept=work.kept + jnp.sum(verdict.kept, axis=0, dtype=jnp.int32),
    )
    return progress._replace(slots=slots, work=work)


class _Noise(NamedTuple):
    """Random numbers of the next tokens of each row."""

    trunk: jax.Array | None  # [B, D + 1, V], None at temperature 0
    drafts: jax.Array | None  # [B, D + 1, V], the same unless drafts are judged by rejection
    log_uniform: jax.Array | None  # [B, D], None unless they are


def _noise(model: Decoder, key, rows, first, config: SamplingConfig, depth: int) -> _Noise:
    if config.temperature == 0:
        return _Noise(None, None, None)

    dtype = at_least_float32(model.config.compute)

    def gumbel(key):
        values = gumbel_noise(key, rows, first, (depth + 1, model.config.vocab_size), dtype)
        return constrain(values, ROWS, None, "tensor")

    if not depth or config.speculation == "common":
        both = gumbel(key)
        return _Noise(both, both, None)
    # All three from the split: beside it `key` itself would make keys that are equal to these.
    of_trunk, of_drafts, of_verdicts = jax.random.split(key, 3)
    log_uniform = uniform_noise(of_verdicts, rows, first, depth, dtype)
    return _Noise(gumbel(of_trunk), gumbel(of_drafts), log_uniform)


def _choose(logits, noise: _Noise, drafts, drawn_from, config: SamplingConfig):
    """The trunk's tokens after the drafts before each, and their log-probs."""
    if noise.trunk is None or noise.log_uniform is None:
        return choose(logits, noise.trunk, config)
    log_prob = distribution(logits, config)
    tokens = choose_by_rejection(log_prob, noise.trunk, drafts, drawn_from, noise.log_uniform)
    return tokens, log_prob_of(tokens, log_prob).astype(jnp.float32)


def _write(old, new, columns):
    """Each row's new values from its own column on."""
    return jax.vmap(lambda a, b, column: jax.lax.dynamic_update_slice(a, b, (column,)))(
        old, new, columns
    )
