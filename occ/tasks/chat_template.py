"""Chat templates: Jinja programs that come with a tokenizer, and write a conversation as text."""

from __future__ import annotations

import datetime
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from occ.extras import require

require("pretrained", __name__, "jinja2")
import jinja2

from occ.tasks import chat_rendering
from occ.tasks.workers import Failure, Limits, WorkerPool

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, with whatever else a template reads."""

LIMITS = Limits(cpu_seconds=2.0, wall_seconds=10.0, memory_mib=512, batch_seconds=30.0)
"""Of one conversation; published templates need less than a millisecond."""


class ChatTemplate:
    """A template, in the dialect that published models are written for.

    Blocks take their line's white space and line break with them; `break` and `continue` work in
    loops; `tojson` leaves characters beyond ASCII as they are and escapes nothing for HTML;
    `raise_exception(text)` and `strftime_now(format)` are at hand; what stands between
    `{% generation %}` and `{% endgeneration %}` is written as it is.

    It runs in Jinja's sandbox, in a process of its own with bounds on time and memory
    (`chat_rendering.py`), which all templates share. This process only reads it.

    Args:
      source: the template.
      now: the clock of `strftime_now`.

    Raises:
      ValueError: the template is not valid Jinja.

    >>> template = ChatTemplate("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    >>> template.render([{"role": "user", "content": "2+2?"}])
    '<user>2+2?'
    """

    def __init__(
        self, source: str, *, now: Callable[[], datetime.datetime] = datetime.datetime.now
    ):
        self.source, self._now = source, now
        try:
            chat_rendering.environment().parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"ChatTemplate: line {error.lineno} is not valid Jinja: {error.message}."
            ) from None
        except RecursionError:
            raise ValueError("ChatTemplate: the template is nested too deeply.") from None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the model is to see it.

        Args:
          messages: the conversation.
          add_generation_prompt: whether the beginning of the model's next turn follows.
          **variables: what else the template reads: special tokens, `tools`, switches. Like the
            messages, what JSON can hold.

        Raises:
          ValueError: the template refuses the conversation (`raise_exception`), asks for what the
            sandbox forbids, fails, or takes more time or memory than any conversation needs.
        """
        given = {"tools": None, "documents": None} | variables
        given |= {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
        try:
            request = self.source, json.dumps(given), self._now().isoformat()
        except TypeError as error:
            raise ValueError(
                f"ChatTemplate: messages and variables must be what JSON can hold: {error}."
            ) from None
        [reply] = _pool().map([request])
        if isinstance(reply, Failure):
            raise ValueError(
                "ChatTemplate: the template was stopped, since it took more than a conversation "
                f"may ({reply.reason}: {reply.detail}). Read it before you trust the folder that "
                "it came from."
            )
        if "error" in reply:
            raise ValueError(f"ChatTemplate: {reply['error']}")
        return reply["text"]


@functools.cache
def _pool() -> WorkerPool:
    """One process for all templates, from the first rendering to the end of this process."""
    return WorkerPool(pathlib.Path(chat_rendering.__file__), "render", workers=1, limits=LIMITS)
