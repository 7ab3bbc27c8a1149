"""The decoder: trunk, shared output head, MTP modules; and its split into pure pytrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from occ.models.attention import Context
from occ.models.block import Block
from occ.models.cache import Cache, Past, StackCache, columns_in_blocks, decode_kernel, write
from occ.models.config import ModelConfig
from occ.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    at_least_float32,
    few_rows,
    turned_product,
    vocabulary_product,
)
from occ.models.mtp import ParallelHead, SequentialModule, tokens_ahead
from occ.models.parameters import is_trained
from occ.models.partitioning import ROWS, constrain, several_devices
from occ.models.stacks import (
    Layers,
    apart,
    apply_layers,
    by_token,
    create_stack,
    expert_dtype,
    no_experts,
    remat,
    write_experts,
)


class TrunkOutput(NamedTuple):
    """Output of the trunk.

    Attributes:
      hidden: float [B, T, D], before the final norm.
      router_load: float [L, E], tokens each expert of each sparse layer received; None if dense.
    """

    hidden: jax.Array
    router_load: jax.Array | None


class Decoder(nnx.Module):
    """A decoder-only language model with K MTP modules.

    Top-level parameter names: `embedding`, `layers` (and `dense_layers` before them in a mixture
    of experts), each with a leading layer axis; `final_norm`; `output_head` unless tied; `mtp`.

    Args:
      config: the architecture.
      rngs: random numbers for the initial weights.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = Embedding(config, rngs)
        dense = config.num_layers if config.moe is None else config.moe.first_dense_layers
        if config.moe is None:
            self.layers = create_stack(config, rngs, dense, sparse=False)
        else:
            if dense:
                self.dense_layers = create_stack(config, rngs, dense, sparse=False)
            self.layers = create_stack(config, rngs, config.num_layers - dense, sparse=True)
        self.final_norm = RMSNorm(config.width, config)
        if not config.tied_embeddings:
            self.output_head = Linear(config.width, config.vocab_size, config, rngs)
        if config.mtp.num_modules:
            module = SequentialModule if config.mtp.kind == "sequential" else ParallelHead
            count, whole = config.mtp.num_modules, config.whole  # modules have no adapters
            self.mtp = nnx.List([module(whole, rngs) for _ in range(count)])

    def trunk(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        segment_ids: Int[Array, "batch time"],
        experts: Int[Array, "layers k batch time"] | None = None,
    ) -> TrunkOutput:
        """Hidden states of whole sequences.

        Args:
          tokens: int32 [B, T].
          positions: int32 [B, T], within each sequence.
          segment_ids: int32 [B, T], 0 on padding; no token sees another sequence's.
          experts: int [L, k, B, T], the choice that each sparse layer repeats; as `replayed` of
            `MixtureOfExperts`.

        Raises:
          ValueError: T exceeds `max_length`.
        """
        context = self._context(tokens, positions, segment_ids)
        hidden, loads = constrain(self.embedding(tokens), ROWS), []
        for stack in self._stacks():
            passed = apply_layers(stack, hidden, context, self.config, replayed=experts)
            hidden = passed.hidden
            loads += [] if passed.load is None else [passed.load]
        return TrunkOutput(hidden, jnp.concatenate(loads) if loads else None)

    def mtp_hidden(
        self,
        hidden: Float[Array, "batch time width"],
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        segment_ids: Int[Array, "batch time"],
    ) -> Float[Array, "heads batch time width"]:
        """Hidden states of the K modules, before the norm that precedes the output head.

        Args:
          hidden: the trunk's, before its final norm.
          tokens, positions, segment_ids: as for `trunk`.
        """
        context = self._context(tokens, positions, segment_ids)
        hidden, states = self.module_input(hidden), []
        for k, module in enumerate(self.mtp, start=1):
            if isinstance(module, SequentialModule):
                ahead = self._embed_ahead(module, tokens_ahead(tokens, segment_ids, k))
                hidden = remat(module, self.config)(hidden, ahead, context).hidden
                states.append(hidden)
            else:
                states.append(remat(module, self.config)(hidden, context).hidden)
        return constrain(jnp.stack(states), None, ROWS)

    def logits(self, hidden: Float[Array, "batch time width"]) -> Float[Array, "batch time vocab"]:
        """Next-token logits, at least float32, from the trunk's hidden state."""
        return self._readout(self.final_norm(hidden))

    def mtp_logits(
        self, state: Float[Array, "batch time width"], head: int
    ) -> Float[Array, "batch time vocab"]:
        """Logits of MTP module `head` (0-based) for token i + head + 2 at position i."""
        module = self.mtp[head]
        norm = self.final_norm if module.final_norm is None else module.final_norm
        return self._readout(norm(state), module.output_head)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        positions: Int[Array, "batch time"],
        segment_ids: Int[Array, "batch time"],
    ) -> tuple[Float[Array, "batch time vocab"], Float[Array, "heads batch time vocab"]]:
        """Logits of the main head and of all MTP modules, at their source positions."""
        hidden = self.trunk(tokens, positions, segment_ids).hidden
        main = self.logits(hidden)
        if not self.config.mtp.num_modules:
            return main, jnp.zeros((0, *main.shape), main.dtype)
        states = self.mtp_hidden(hidden, tokens, positions, segment_ids)
        return main, jnp.stack([self.mtp_logits(state, k) for k, state in enumerate(states)])

    # -- generation ---------------------------------------------------------------------------

    def empty_cache(
        self, batch: int, columns: int, spare: int = 0, keep_experts: bool = False
    ) -> Cache:
        """A cache for `columns` tokens a row, and for `spare` that may be taken back.

        With `keep_experts` it also remembers the experts of each token.

        Raises:
          ValueError: more columns than `max_length`.
        """
        _check_length(columns, self.config)
        sizes = [jax.tree.leaves(nnx.state(stack))[0].shape[0] for stack in self._stacks()]
        stacks = tuple(self.empty_stack(size, batch, columns + spare) for size in sizes)
        experts = no_experts(self.config, batch, columns + spare) if keep_experts else None
        return Cache(stacks, jnp.zeros((batch,), jnp.int32), experts)

    def empty_stack(self, layers: int, batch: int, columns: int) -> StackCache:
        """A cache for so many layers, in whole blocks of columns."""
        config = self.config
        columns = columns_in_blocks(columns, decode_kernel(config))
        shape = (layers, batch, config.num_kv_heads, columns, config.head_dim)
        empty = constrain(jnp.zeros(shape, config.compute), None, ROWS, "tensor")
        return StackCache(empty, empty)

    def prefill(
        self,
        tokens: Int[Array, "batch time"],
        lengths: Int[Array, "batch"],
        keep_experts: bool = False,
    ) -> tuple[Float[Array, "batch time width"], Cache]:
        """Hidden states of the first tokens of each row, and a cache of T columns with them.

        Args:
          tokens: int32 [B, T], padded on the right.
          lengths: int32 [B], of each row.
          keep_experts: as of `empty_cache`.
        """
        context = self._beginning(tokens, lengths)
        hidden, stacks, experts = constrain(self.embedding(tokens), ROWS), [], None
        for stack in self._stacks():
            passed = apply_layers(stack, hidden, context, self.config, generating=True)
            hidden = passed.hidden
            assert passed.new is not None
            stacks.append(passed.new)
            if keep_experts and passed.experts is not None:
                experts = by_token(passed.experts).astype(expert_dtype(self.config))
        return hidden, Cache(tuple(stacks), lengths, experts)

    def extend(
        self,
        tokens: Int[Array, "batch time"],
        cache: Cache,
        running: Bool[Array, "batch"],
        layers: Layers | None = None,
    ) -> tuple[Float[Array, "batch time width"], Cache]:
        """Hidden states of further tokens of each row; and the cache with them.

        The caller counts them: `lengths` stays as it is, so that tokens can be taken back.

        Args:
          tokens: int32 [B, T].
          cache: with room for them, which is not checked.
          running: bool [B]; what comes out for other rows means nothing.
          layers: this model's, from `layers_apart`; the cache is then `apart` too.
        """
        past = jnp.where(running, cache.lengths, 0)
        context = _further(past, tokens.shape[1], running)
        hidden, new, chosen = constrain(self.embedding(tokens), ROWS), [], []
        parts: Sequence[Block | list[Block]] = self._stacks() if layers is None else layers
        for stack, before in zip(parts, cache.stacks, strict=True):
            passed = apply_layers(
                stack, hidden, context, self.config, Past(before, 0, past), generating=True
            )
            hidden = passed.hidden
            assert passed.new is not None
            new.append(passed.new)
            chosen += [] if passed.experts is None else [passed.experts]
        cache = cache._replace(stacks=write(cache.stacks, tuple(new), past))
        if cache.experts is not None:
            # Rows that do not run write past the end, so that what they had stays.
            columns = jnp.where(running, past, cache.experts.shape[1])
            experts = write_experts(cache.experts, jnp.concatenate(chosen), columns)
            cache = cache._replace(experts=experts)
        return hidden, cache

    def layers_apart(self) -> Layers:
        """Each layer as a stack of its own, for a loop over tokens on CPUs.

        There the compiler copies a layer out of its stack to multiply with it, for every token. On
        one device all kernels are turned, those of the modules and of the output head too.
        """
        layers = tuple([layer] for stack in self._stacks() for layer in apart(stack))
        if several_devices() is None:
            head = self.embedding if self.config.tied_embeddings else self.output_head
            modules = self.mtp if self.config.mtp.num_modules else []
            head.turn()
            for part in (*modules, *(layer for (layer,) in layers)):
                for _, linear in nnx.iter_modules(part):
                    if isinstance(linear, Linear):
                        linear.turn()
        return layers

    def module_input(
        self, hidden: Float[Array, "batch time width"]
    ) -> Float[Array, "batch time width"]:
        """What the first module, or each parallel head, takes of the trunk's hidden states."""
        return self.final_norm(hidden) if self.config.mtp.hidden_after_final_norm else hidden

    def prefill_modules(
        self,
        hidden: Float[Array, "batch time width"],
        tokens: Int[Array, "batch time"],
        lengths: Int[Array, "batch"],
    ) -> StackCache:
        """Keys and values of the K modules, [K, B, kv_heads, T, head_dim] each.

        Module k's are right up to the last position whose token k ahead is there.

        Args:
          hidden, tokens, lengths: as of `prefill`.
        """
        context = self._beginning(tokens, lengths)
        hidden, new = self.module_input(hidden), []
        for k, module in enumerate(self.mtp, start=1):
            if isinstance(module, SequentialModule):
                ahead = self._embed_ahead(module, tokens_ahead(tokens, context.segment_ids, k))
                output = module(hidden, ahead, context, generating=True)
                hidden = output.hidden
            else:
                output = module(hidden, context, generating=True)
            new.append(output.new)
        return jax.tree.map(lambda *layers: jnp.stack(layers), *new)

    def extend_module(
        self,
        head: int,
        hidden: Float[Array, "batch time width"],
        ahead: Int[Array, "batch time"],
        past: Past,
        running: Bool[Array, "batch"],
    ) -> tuple[Float[Array, "batch time width"], StackCache]:
        """Hidden states of module `head` (0-based) at further positions; and the cache with them.

        Args:
          head: which.
          hidden: what it takes there: of the module before it, or `module_input`.
          ahead: int32 [B, T], tokens head + 1 ahead of the positions; not for parallel heads.
          past: of this module, of which `lengths` positions are right.
          running: bool [B], as of `extend`.
        """
        module = self.mtp[head]
        context = _further(past.lengths, hidden.shape[1], running)
        if isinstance(module, SequentialModule):
            embedded = self._embed_ahead(module, ahead)
            output = module(hidden, embedded, context, past, generating=True)
        else:
            output = module(hidden, context, past, generating=True)
        new = jax.tree.map(lambda x: x[None], output.new)
        return output.hidden, past.stack.write(new, past.lengths + past.first, head)

    # -- pieces -------------------------------------------------------------------------------

    def _beginning(self, tokens, lengths) -> Context:
        columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        valid = (columns[None] < lengths[:, None]).astype(jnp.int32)
        return self._context(tokens, jnp.broadcast_to(columns[None], tokens.shape), valid)

    def _embed_ahead(self, module: SequentialModule, ahead) -> jax.Array:
        embed = self.embedding if module.embedding is None else module.embedding
        return constrain(embed(ahead), ROWS)

    def _stacks(self) -> list[Block]:
        return [self.dense_layers, self.layers] if hasattr(self, "dense_layers") else [self.layers]

    def _context(self, tokens, positions, segment_ids) -> Context:
        _check_length(tokens.shape[1], self.config)
        return Context(positions, segment_ids)

    def _readout(
        self, normal: Float[Array, "batch time width"], own_head: Linear | None = None
    ) -> Array:
        tied, dtype = self.config.tied_embeddings, self.config.compute
        head = own_head or (self.embedding if tied else self.output_head)
        if head.turned is not None and few_rows(normal):
            logits = turned_product(normal, head.turned, at_least_float32(dtype))
        else:
            kernel = head.embedding[...].T if isinstance(head, Embedding) else head.kernel[...]
            logits = vocabulary_product(normal, kernel, dtype)
        return constrain(logits, ROWS, None, "tensor")


def _check_length(length: int, config: ModelConfig) -> None:
    if length > config.max_length:
        raise ValueError(
            f"Decoder: {length} tokens exceed the context of max_length={config.max_length}. "
            "Shorten prompt or response, or raise ModelConfig.max_length."
        )


def _further(lengths, time: int, running) -> Context:
    """Of the T tokens after the first `lengths` of each row."""
    positions = lengths[:, None] + jnp.arange(time, dtype=jnp.int32)[None]
    return Context(positions, jnp.broadcast_to(running[:, None], positions.shape).astype(jnp.int32))


# ---------------------------------------------------------------------------------------------
# Pure pytrees
# ---------------------------------------------------------------------------------------------


def split_model(model: Decoder) -> tuple[nnx.GraphDef, dict[str, Any], dict[str, Any]]:
    """Splits a model into its structure and plain nested dicts of arrays.

    Returns:
      The graph definition (static, hashable), the trained parameters, and all other variables
      (a router's correction bias; beside adapters, the frozen trunk).
    """
    trained = nnx.All(nnx.Param, lambda path, _: is_trained(path, model.config.lora is not None))
    graphdef, params, rest = nnx.split(model, trained, ...)
    return graphdef, _plain(nnx.to_pure_dict(params)), _plain(nnx.to_pure_dict(rest))


def merge_model(graphdef: nnx.GraphDef, params: dict[str, Any], rest: dict[str, Any]) -> Decoder:
    """The inverse of `split_model`; works under jit, grad and vmap."""
    return nnx.merge(graphdef, nnx.State(_numbered(params)), nnx.State(_numbered(rest)))


def _plain(tree: Any) -> Any:
    """Integer keys (of lists) as strings, so that keys sort and paths read alike everywhere."""
    if isinstance(tree, dict):
        return {str(key): _plain(value) for key, value in tree.items()}
    return tree


def _numbered(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {int(key) if key.isdigit() else key: _numbered(value) for key, value in tree.items()}
    return tree
