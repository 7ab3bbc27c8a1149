"""From prompts to a minibatch: sample, verify, compare within groups, score."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from occ.generation.decoding import generate
from occ.generation.drafting import check_depth
from occ.generation.engines import Request, RolloutEngine
from occ.generation.engines.in_process import InProcessEngine
from occ.generation.sampler import Sampler, padding_waste
from occ.generation.sampling import Generation, SamplingConfig, check_fits
from occ.models.policy import Policy
from occ.objectives import advantages
from occ.tasks import Problem, Task
from occ.tasks.prompts import encode_prompts, prompt_indices
from occ.training import mismatch, rollout_metrics
from occ.training.batch import Minibatch, positions_from_segments, segments_of
from occ.training.config import TrainConfig
from occ.training.credit import token_advantages
from occ.training.engine import build_engine
from occ.training.processes import collect_shares, key_on_mesh, my_share, to_host
from occ.training.score import Scores, score_sequences
from occ.training.sharding import for_generation


@dataclasses.dataclass(frozen=True)
class RolloutPrograms:
    """The compiled programs of a rollout; they are the same in every regime and for every seed.

    Attributes:
      sample: `(policy, prompts, prompt_mask, key, samples) -> Generation` as in training, on the
        host.
      greedy: the same with the most likely tokens.
      evaluation: the same as `EvaluationConfig` says.
      score: `(policy, tokens, segment_ids, experts=None) -> Scores`.
      external: the engine that generates in their place; None is this process.
    """

    sample: Sampler
    greedy: Sampler
    evaluation: Sampler
    score: Callable[..., Scores]
    external: RolloutEngine | None = None

    @property
    def engine(self) -> RolloutEngine:
        """What generates."""
        if self.external is not None:
            return self.external
        return InProcessEngine((self.sample, self.greedy, self.evaluation))

    def generate(
        self,
        like: Sampler,
        policy: Policy,
        prompts: np.ndarray,
        prompt_mask: np.ndarray,
        key: jax.Array,
        samples: int = 1,
    ) -> Any:
        """Responses of the engine with this policy's weights; `like` says how they are sampled.

        Raises:
          EngineError: of another process, as `RolloutEngine` says.
        """
        engine = self.engine
        engine.update_weights(policy)
        return engine.generate(_request(like, prompts, prompt_mask, key, samples))

    def drafting(self, depth: int) -> RolloutPrograms:
        """The same programs with so many drafts for each pass of the trunk."""
        samplers = {"sample": self.sample, "greedy": self.greedy, "evaluation": self.evaluation}
        changed: dict[str, Any] = {
            name: dataclasses.replace(one, draft_depth=depth) for name, one in samplers.items()
        }
        return dataclasses.replace(self, **changed)


def build_programs(config: TrainConfig, task: Task) -> RolloutPrograms:
    """Jits what a rollout and an evaluation need.

    Raises:
      ValueError: prompts and responses do not fit the model's context, or the task's tokens its
        vocabulary; or its modules cannot draft so many tokens.
    """
    columns, response = lengths(config, task)
    if task.tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"build_programs: task {task.name!r} has {task.tokenizer.vocab_size} tokens, the model "
            f"only {config.model.vocab_size}. Raise ModelConfig.vocab_size."
        )
    rollout = config.rollout
    plain = SamplingConfig(
        max_new_tokens=response,
        stop_tokens=task.tokenizer.end_ids,
        pad_token=task.tokenizer.pad_id,
    )
    check_fits(np.ones((1, columns), bool), config.model.max_length, plain)
    check_depth(config.model.mtp, config.layout.fixed_depth)
    sample = dataclasses.replace(
        plain,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        speculation=rollout.speculation,
        keep_experts=rollout.routing_replay,
    )
    greedy = dataclasses.replace(plain, temperature=0.0)
    evaluation = dataclasses.replace(
        plain, temperature=config.evaluation.temperature, top_p=config.evaluation.top_p
    )

    def program(sampling):
        compiled = jax.jit(sampler(sampling, config), static_argnames="draft_depth")
        narrow = config.layout.generation_rows > 0
        pad, depth = task.tokenizer.pad_id, config.layout.fixed_depth
        return Sampler(compiled, narrow, pad, depth, to_host, sampling)

    score = functools.partial(
        score_sequences,
        temperature=rollout.temperature,
        logits_chunk=config.layout.logits_chunk,
        prompt_columns=columns,
    )
    samplers = program(sample), program(greedy), program(evaluation)
    external = build_engine(config, columns + response)
    return RolloutPrograms(*samplers, jax.jit(score), external)


def sampler(sampling: SamplingConfig, config: TrainConfig) -> Callable[..., Generation]:
    """A run's `(policy, prompts, prompt_mask, key, ...) -> Generation`, to be jitted.

    `draft_depth` is static, and without one the layout's. Parameters are gathered over the mesh
    once for all new tokens. Whoever plans, times or evaluates generation takes this one, and so
    that of production.
    """

    def sample(policy, prompts, prompt_mask, key, rows=None, prompt_of=None, draft_depth=None):
        dtype = config.model.compute
        policy = policy.replace(
            params=for_generation(policy.params, dtype), rest=for_generation(policy.rest, dtype)
        )
        return generate(
            policy,
            prompts,
            prompt_mask,
            key,
            config=sampling,
            rows=rows,
            prompt_of=prompt_of,
            slots=config.layout.generation_rows,
            draft_depth=config.layout.fixed_depth if draft_depth is None else draft_depth,
        )

    return sample


def lengths(config: TrainConfig, task: Task) -> tuple[int, int]:
    """Prompt columns and response tokens of a run: the configuration's, or else the task's."""
    prompt, response = config.max_prompt_tokens, config.max_response_tokens
    return (
        task.max_prompt_tokens if prompt is None else prompt,
        task.max_response_tokens if response is None else response,
    )


class Rollout(NamedTuple):
    """A rollout, ready to train on.

    Attributes:
      batch: all its sequences, [prompts x samples] rows, the samples of a prompt together.
      metrics: what was measured, as Python numbers and lists of them.
      examples: (prompt, completion, reward) of the first sample of a few prompts, for the log.
    """

    batch: Minibatch
    metrics: dict[str, Any]
    examples: list[tuple[str, str, float]]


class Drawn(NamedTuple):
    """What an engine answered to the requests of a rollout.

    Attributes:
      sampled: G responses to each prompt.
      greedy: the most likely response to each, where advantages need it.
      metrics: of the engine.
    """

    sampled: Generation
    greedy: Generation | None
    metrics: dict[str, Any]


def requests(
    programs: RolloutPrograms, config: TrainConfig, task: Task, number: int
) -> tuple[Request, ...]:
    """What the rollout of this number asks an engine for; it depends on seed and number alone."""
    rollout = config.rollout
    inputs = *_prompts(config, task, number), key_on_mesh(config.seed, number)
    sampled = _request(programs.sample, *inputs, rollout.samples)
    if config.objective.advantage != "remax":
        return (sampled,)
    return sampled, _request(programs.greedy, *inputs)


def _request(
    like: Sampler, prompts: np.ndarray, prompt_mask: np.ndarray, key: jax.Array, samples: int = 1
) -> Request:
    """To be answered as this sampler would."""
    assert like.sampling is not None
    return Request(prompts, prompt_mask, like.sampling, key, samples)


def draw(engine: RolloutEngine, policy: Policy, wanted: Sequence[Request]) -> Drawn:
    """The engine's answers with this policy's weights.

    Raises:
      EngineError: of another process, as `RolloutEngine` says.
    """
    engine.update_weights(policy)
    return answers(engine, wanted)


def answers(engine: RolloutEngine, wanted: Sequence[Request]) -> Drawn:
    """The engine's answers with the weights that it has."""
    sampled, *others = (engine.generate(request) for request in wanted)
    return Drawn(sampled, others[0] if others else None, engine.metrics())


def _prompts(config: TrainConfig, task: Task, number: int) -> tuple[np.ndarray, np.ndarray]:
    indices = prompt_indices(config.seed, number, config.rollout.prompts, len(task.train))
    texts = [task.train[i].prompt for i in indices]
    return encode_prompts(task.tokenizer, texts, lengths(config, task)[0])


def collect(
    programs: RolloutPrograms,
    policy: Policy,
    config: TrainConfig,
    task: Task,
    number: int,
    reference: Policy | None = None,
    drawn: Drawn | None = None,
) -> Rollout:
    """Samples, verifies and scores the rollout of this number.

    Which prompts it takes, and its random numbers, depend on the seed and the number alone: not on
    the regime, and not on what was sampled before.

    Args:
      programs: from `build_programs`.
      policy: samples, and is scored.
      config: of the run.
      task: prompts and verifier.
      number: of the rollout, from 0.
      reference: frozen policy of the KL term; None where that term is off.
      drawn: its samples, of this policy or of one before it; None draws them.
    """
    rollout = config.rollout
    columns, response = lengths(config, task)
    indices = prompt_indices(config.seed, number, rollout.prompts, len(task.train))
    problems = [task.train[i] for i in indices for _ in range(rollout.samples)]
    prompt_mask = _prompts(config, task, number)[1]
    if drawn is None:
        drawn = draw(programs.engine, policy, requests(programs, config, task, number))
    sampled = drawn.sampled
    completions, rewards, valid = judge(task, problems, sampled, columns)

    grouped = (rollout.prompts, rollout.samples)
    kept = advantages.informative_groups(
        jnp.asarray(rewards).reshape(grouped), jnp.asarray(valid).reshape(grouped)
    )
    counted = valid.copy()
    if rollout.dynamic_sampling:
        counted &= np.repeat(np.asarray(kept), rollout.samples)
    if rollout.overlong_filter:
        counted &= sampled.finished

    each_mask = np.repeat(prompt_mask, rollout.samples, axis=0)
    batch = _batch(programs, policy, sampled, each_mask, counted)
    if reference is not None:
        scores = programs.score(reference, batch.tokens, batch.segment_ids)
        batch = batch.replace(reference_log_prob=to_host(scores.log_prob))
    greedy, comparable = None, valid
    if config.objective.advantage == "remax":
        each = slice(None, None, rollout.samples)
        assert drawn.greedy is not None
        _, baseline, judged = judge(task, problems[each], drawn.greedy, columns)
        greedy = jnp.asarray(baseline + _length_penalty(drawn.greedy, config, response))
        comparable = valid & np.repeat(judged, rollout.samples)
    advantage = token_advantages(
        config.objective,
        jnp.asarray(rewards + _length_penalty(sampled, config, response)).reshape(grouped),
        jnp.asarray(comparable).reshape(grouped),
        jnp.asarray(sampled.response_mask),
        old_log_prob=jnp.asarray(batch.old_log_prob),
        reference_log_prob=jnp.asarray(batch.reference_log_prob),
        greedy=greedy,
    )
    batch = batch.replace(
        advantages=np.where(batch.response_mask, np.asarray(advantage), np.float32(0))
    )
    metrics = rollout_metrics.of_samples(batch, sampled, rewards, valid, kept)
    metrics["rollout/padding_waste"] = padding_waste(prompt_mask, sampled.work)
    metrics |= rollout_metrics.of_drafts(sampled.work, sampled.lengths, number)
    metrics |= mismatch.metrics(batch, sampled.response_mask, config) | drawn.metrics
    examples = [
        (problems[i].prompt, completions[i], float(rewards[i]) if valid[i] else math.nan)
        for i in range(0, len(problems), rollout.samples)
    ][:4]
    return Rollout(batch, metrics, examples)


def judge(
    task: Task, problems: list[Problem], sampled: Generation, columns: int
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts of the responses, their rewards, and which of them could be judged.

    Several processes divide the verifying between them.
    """
    tokens = np.asarray(sampled.tokens)[:, columns:]
    mask = np.asarray(sampled.response_mask)[:, columns:]
    completions = task.tokenizer.decode_batch(tokens, mask)
    mine = my_share(len(problems))
    rewards, valid = task.verify_batch(problems[mine], completions[mine])
    return (
        completions,
        collect_shares(rewards, len(problems)),
        collect_shares(valid, len(problems)),
    )


def _length_penalty(sampled: Generation, config: TrainConfig, response: int) -> np.ndarray:
    rollout = config.rollout
    if not rollout.overlong_buffer:
        return np.zeros(sampled.lengths.shape, np.float32)
    return np.asarray(
        advantages.overlong_penalty(
            jnp.asarray(sampled.lengths),
            max_length=response,
            buffer=rollout.overlong_buffer,
            penalty=rollout.overlong_penalty,
        )
    )


def _batch(programs, policy, sampled, prompt_mask, counted) -> Minibatch:
    """The sequences with the old policies' log-probs, without advantages yet."""
    segment_ids = segments_of(prompt_mask, sampled.response_mask)
    response_mask = sampled.response_mask & counted[:, None]
    old = to_host(programs.score(policy, sampled.tokens, segment_ids, sampled.experts))
    return Minibatch(
        tokens=sampled.tokens,
        segment_ids=segment_ids,
        positions=np.asarray(positions_from_segments(jnp.asarray(segment_ids))),
        response_mask=response_mask,
        advantages=np.zeros_like(sampled.log_prob),
        old_log_prob=old.log_prob,
        old_mtp_log_prob=old.mtp_log_prob,
        rollout_log_prob=sampled.log_prob,
        reference_log_prob=np.zeros_like(old.log_prob),
        experts=sampled.experts,
    )
