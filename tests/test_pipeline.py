"""The stream of batches: every problem once an epoch, resumed exactly, shards disjoint."""

import itertools

import numpy as np
import pytest

from occ.tasks import Problem, Task, mathematics, pipeline
from occ.tasks.tokenizer import CharacterTokenizer

PROBLEMS = [Problem("a" * (1 + n % 5), str(n)) for n in range(23)]


def answers(batches):
    return [[problem.answer for problem in batch] for batch in batches]


def flat(batches):
    return [int(answer) for batch in answers(batches) for answer in batch]


@pytest.mark.parametrize("start", [0, 1, 4, 6, 9])
def test_a_resumed_stream_goes_on_exactly(start):
    """Over the ends of epochs too, and with problems passed over."""

    def fresh():
        keep = lambda problem: len(problem.prompt) != 3  # noqa: E731
        return iter(pipeline.stream(PROBLEMS, batch_size=4, seed=5, keep=keep))

    whole = answers(itertools.islice(fresh(), 14))
    first = fresh()
    assert answers(itertools.islice(first, start)) == whole[:start]
    resumed = fresh()
    resumed.set_state(first.get_state())
    assert answers(itertools.islice(resumed, 14 - start)) == whole[start:]


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", [None, 1])
def test_shards_are_disjoint_and_cover_all(seed, count):
    shards = [
        flat(
            pipeline.stream(
                PROBLEMS,
                batch_size=2,
                seed=seed,
                epochs=1,
                shard=(index, count),
                drop_remainder=False,
            )
        )
        for index in range(count)
    ]
    assert sorted(itertools.chain(*shards)) == list(range(23))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_epochs_are_permutations_that_differ():
    stream = pipeline.stream(PROBLEMS, batch_size=23, seed=0, epochs=3)
    epochs = [flat([batch]) for batch in stream]
    assert [sorted(epoch) for epoch in epochs] == [list(range(23))] * 3
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(23))
    again = pipeline.stream(PROBLEMS, batch_size=23, seed=0, epochs=3)
    assert answers(again) == answers(stream)
    other = pipeline.stream(PROBLEMS, batch_size=23, seed=1, epochs=1)
    assert flat(other) != epochs[0]


def test_long_prompts_are_passed_over():
    task = Task("t", CharacterTokenizer("a"), PROBLEMS, [], lambda *_: 1.0, 5, 1)
    stream = pipeline.stream(
        PROBLEMS, batch_size=1, epochs=1, keep=pipeline.fits(task, 2), drop_remainder=False
    )
    assert flat(stream) == [n for n in range(23) if n % 5 < 2]
    assert pipeline.by_process() == (0, 1)


def test_problems_are_read_when_their_turn_comes():
    read = []

    class Source(list):
        def __getitem__(self, index):
            read.append(index)
            name = str(index).encode()
            return dict.fromkeys(("identity", "problem", "answer", "subject", "level"), name)

    lazy = mathematics.LazyProblems(
        Source([None] * 5000), np.arange(5000), lambda row: Problem(row.problem, row.answer)
    )
    iterator = iter(pipeline.stream(lazy, batch_size=2, seed=0))
    assert read == [] and len(next(iterator)) == 2
    assert len(read) < 1000  # Grain reads some ahead
    assert [problem.answer for problem in lazy[3:5]] == ["3", "4"] and len(lazy[3:5]) == 2


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"batch_size": 1, "shard": (1, 1)}, {"batch_size": 1, "shard": (-1, 2)}],
)
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ValueError, match="expected batch_size >= 1"):
        pipeline.stream(PROBLEMS, **options)
    with pytest.raises(ValueError, match="0 problems"):
        pipeline.stream([], batch_size=1)
