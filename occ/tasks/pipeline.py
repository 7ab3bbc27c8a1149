"""Problems as a stream of batches, with Grain: shuffled, sharded, filtered, and resumed exactly.

    batches = stream(task.train, batch_size=32, seed=0, keep=fits(task, 512), shard=by_process())
    iterator = iter(batches)
    iterator.get_state(), iterator.set_state(state)     # also grain.checkpoint.CheckpointSave

Two ways to the same problems, each for what it does better:

  `prompts.prompt_indices`  serves RL runs. Which prompts a rollout takes is a function of seed and
      step alone, on every process alike, so the number of the step is the whole state: a checkpoint
      needs nothing else, and a run resumed on other devices takes the same prompts.
  `stream` serves whoever reads on and on: supervised learning, scoring a set once, programs beside
      this project. Every process reads its own shard, and where it stands is the iterator's state.
      With another number of shards the batches are others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from occ.extras import require

require("data", __name__, "grain")
import grain
import jax

from occ.tasks.task import Problem, Task

Shard = tuple[int, int]


def by_process() -> Shard:
    """This process's shard of a run of several: its index, and how many there are."""
    return jax.process_index(), jax.process_count()


def fits(task: Task, max_prompt_tokens: int) -> Callable[[Problem], bool]:
    """A filter that keeps prompts of at most so many tokens."""
    return lambda problem: len(task.tokenizer.encode_prompt(problem.prompt)) <= max_prompt_tokens


def stream(
    problems: Sequence[Problem],
    *,
    batch_size: int,
    seed: int | None = None,
    epochs: int | None = None,
    keep: Callable[[Problem], bool] | None = None,
    shard: Shard = (0, 1),
    drop_remainder: bool = True,
) -> grain.IterDataset[list[Problem]]:
    """Batches of problems, as lists.

    Problems are read when their turn comes (some hundreds ahead, by Grain's threads), so a
    `LazyProblems` stays on disk. The order is
    shuffled before it is cut into shards, anew in every epoch; shards are disjoint, and together
    they are an epoch.

    Args:
      problems: with random access.
      batch_size: problems a batch, of one shard.
      seed: of the order; None keeps the order of `problems`.
      epochs: how often each problem comes; None is for ever.
      keep: problems for which it is False are passed over.
      shard: (index, count), each shard for one reader.
      drop_remainder: leave a last batch out that is not full.

    Raises:
      ValueError: no problems, a batch of none, or a shard that there is not.
    """
    index, count = shard
    if batch_size < 1 or not len(problems) or not 0 <= index < count:
        raise ValueError(
            "stream: expected batch_size >= 1, at least one problem and 0 <= index < count of "
            f"shards, got {batch_size}, {len(problems)} problems and shard {shard}."
        )
    order = grain.MapDataset.range(len(problems))
    if seed is not None:
        order = order.seed(seed).shuffle()
    mine = order.repeat(epochs)[index::count]
    chosen = mine.map(lambda number: problems[int(number)])
    if keep is not None:
        chosen = chosen.filter(keep)
    return chosen.to_iter_dataset().batch(batch_size, drop_remainder=drop_remainder, batch_fn=list)
