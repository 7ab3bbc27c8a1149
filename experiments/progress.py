"""What a person sees while a job goes on: one line with the time left, and a clean Ctrl-C."""

from __future__ import annotations

import dataclasses
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import tqdm

SECONDS_BETWEEN_LINES = 30.0  # where no cursor goes back, as in a log


class Interrupt:
    """Turns signals into a wish to stop; only a second Ctrl-C stops at once, and saves nothing.

    Attributes:
      status: exit status of a run that stopped: 130 after Ctrl-C, as shells have it, and 0 after
        SIGTERM, by which a machine is taken away, or SIGHUP, by which its terminal is: everything
        was saved, and nothing failed.
    """

    def __init__(self) -> None:
        self.wished = False
        self.pressed = False
        self.status = 0

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.wished

    def _on_signal(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.pressed:
            raise KeyboardInterrupt
        if not self.wished:
            self.status = 130 if number == signal.SIGINT else 0
        self.wished = True
        self.pressed |= number == signal.SIGINT
        with suppress(OSError):  # of a terminal that is gone
            tqdm.tqdm.write(
                "stopping after this rollout; Ctrl-C once more to stop at once, unsaved"
            )


@contextmanager
def interrupt() -> Iterator[Interrupt]:
    """Catches Ctrl-C, SIGTERM and SIGHUP while the block runs; what nohup ignores stays ignored.

    Under `jax.distributed` SIGTERM stays with its preemption service, which tells all processes
    and lets them stop after the same rollout.
    """
    wish = Interrupt()
    numbers = [signal.SIGINT]
    if not jax.distributed.is_initialized():
        numbers.append(signal.SIGTERM)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, wish._on_signal) for number in numbers}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Progress:
    """One line for a whole job: the share that is done, the time left, and what is going on.

    A job is made of parts, of which several may go on side by side; their sizes are in whatever
    takes about the same time everywhere, say rollouts. What an earlier call has done moves the line
    on without making the job look fast. Where standard error is no terminal the line is printed
    anew now and then.

    Args:
      total: the sum of the parts' sizes.
      quiet: show nothing (processes other than the first).
    """

    def __init__(self, total: float, quiet: bool = False):
        terminal = sys.stderr.isatty()
        self._bar: Any = tqdm.tqdm(
            total=total,
            disable=quiet,
            file=sys.stderr if terminal else _Lines(),
            mininterval=0.5 if terminal else SECONDS_BETWEEN_LINES,
            miniters=0,
            smoothing=0.0,  # the average: compilation and kinds of part are mixed all through
            bar_format="{percentage:3.0f} %|{bar:20}| {remaining} left  {desc}",
            dynamic_ncols=terminal,
            ncols=None if terminal else 100,
        )
        self._shown = False
        self._lock = threading.Lock()

    @contextmanager
    def part(self, title: str, size: float) -> Iterator[Part]:
        """A part, which is done when the block ends without an error."""
        part = Part(self, title, size)
        self._describe(title)
        yield part
        with self._lock:  # what nothing was shown of was done by an earlier call
            self._move(part, 1.0, known=part.fresh)

    def close(self, text: str = "") -> None:
        """Ends the line."""
        if text:
            self._describe(text)
            self._bar.refresh()
        self._bar.close()

    def _describe(self, text: str) -> None:
        self._bar.set_description_str(text, refresh=False)

    def show(self, part: Part, share: float, step: float, text: str) -> None:
        """As `Part.show`."""
        with self._lock:
            if part.fresh:  # what was there before this step was done by an earlier call
                self._move(part, max(share - step, 0.0), known=True)
                part.fresh = False
            known = not self._shown
            if known:  # no rate follows from what was compiled before anything ran
                self._shown, self._bar.start_t = True, time.time()
            self._describe(f"{part.title}: {text}")
            self._move(part, share, known)
            if known:
                self._bar.refresh()

    def _move(self, part: Part, share: float, known: bool) -> None:
        moved, part.share = part.size * (share - part.share), share
        if self._bar.disable:
            return
        if known:
            self._bar.initial += moved
            self._bar.n += moved
        else:
            self._bar.update(moved)


@dataclasses.dataclass
class Part:
    """A part of a job.

    Attributes:
      job: whose line it moves.
      title: of what is shown.
      size: in the job's unit.
      share: of it that is done.
      fresh: nothing was shown yet.
    """

    job: Progress
    title: str
    size: float
    share: float = 0.0
    fresh: bool = True

    def show(self, share: float, step: float, text: str) -> None:
        """What share of it is done, how much of that in this step, and its state."""
        self.job.show(self, share, step, text)


class _Lines:
    """Standard error as lines, where no cursor goes back."""

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            with suppress(OSError):  # a disk that is full, or a terminal that is gone
                print(text, file=sys.stderr)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def summary(row: dict[str, Any]) -> str:
    """Reward, coefficient and tokens a pass of a row, in a few characters."""
    text = f"reward {row['reward']:.3f}"
    if "occ/coefficient" in row:
        text += ", coefficient " + ", ".join(f"{x:+.2f}" for x in row["occ/coefficient"])
    if "rollout/tokens_a_pass" in row:
        text += f", {row['rollout/tokens_a_pass']:.2f} tokens a pass"
    return text
