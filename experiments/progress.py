"""What a person sees while a run goes on: a progress bar, TensorBoard events, a clean Ctrl-C."""

from __future__ import annotations

import pathlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import tqdm
from tensorboardX import SummaryWriter

from occ.training.durable.disk import is_full


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop; a second one stops at once.

    Attributes:
      status: exit status of a run that stopped: 130 after Ctrl-C, as shells have it, and 0 after
        SIGTERM, by which a machine is taken away: everything was saved, and nothing failed.
    """

    def __init__(self) -> None:
        self.wished = False
        self.status = 0

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.wished

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.wished:
            raise KeyboardInterrupt
        self.wished = True
        self.status = 130 if number == signal.SIGINT else 0
        tqdm.tqdm.write("stopping after this rollout; once more to stop at once")


@contextmanager
def interrupt() -> Iterator[Interrupt]:
    """Catches Ctrl-C and SIGTERM while the block runs.

    Under `jax.distributed` SIGTERM stays with its preemption service, which tells all processes
    and lets them stop after the same rollout.
    """
    wish = Interrupt()
    numbers = (
        [signal.SIGINT] if jax.distributed.is_initialized() else [signal.SIGINT, signal.SIGTERM]
    )
    before = {number: signal.signal(number, wish._on_signal) for number in numbers}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class RunReporter:
    """Progress bar and TensorBoard events of one run.

    Args:
      title: before the bar.
      folder: of the run; events go to its `tensorboard/`.
      total: rollouts.
    """

    def __init__(self, title: str, folder: pathlib.Path, total: int):
        self._bar = tqdm.tqdm(total=total, desc=title, unit="rollout", mininterval=1.0)
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def __call__(self, row: dict[str, Any]) -> None:
        """Shows a row of metrics."""
        number = row["rollout"]
        self._bar.update(number + 1 - self._bar.n)
        self._bar.set_postfix_str(summary(row))
        for name, value in row.items():
            for suffix, scalar in _scalars(value):
                self._writer.add_scalar(name + suffix, scalar, number)

    def close(self) -> None:
        """Ends the bar and flushes the events; those that find the disk full are lost."""
        self._bar.close()
        try:
            self._writer.close()
        except OSError as error:
            if not is_full(error):
                raise
            tqdm.tqdm.write("the last TensorBoard events are lost: the disk is full")


def summary(row: dict[str, Any]) -> str:
    """Reward, coefficient and cosine of a row, in a few characters."""
    cosine = row.get("true/cosine", row.get("occ/cosine"))
    parts = [f"reward {row['reward']:.3f}"]
    if "occ/coefficient" in row:
        parts.append("coefficient " + ",".join(f"{x:+.3f}" for x in row["occ/coefficient"]))
    if cosine is not None:
        parts.append("cosine " + ",".join(f"{x:+.2f}" for x in cosine))
    return "  ".join(parts)


def _scalars(value: Any) -> list[tuple[str, float]]:
    array = np.asarray(value, np.float64)
    if array.ndim == 0:
        return [("", float(array))]
    return [(f"/{i + 1}", float(x)) for i, x in enumerate(array.ravel())]
