"""Chat templates: Jinja programs that come with a tokenizer, and write a conversation as text.

They are programs by whoever published the model, so they run in Jinja's sandbox, which lets them
neither reach Python's internals nor change what they are given. The sandbox sets no bound on time
or memory: a template can still be slow on purpose.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

Message = Mapping[str, Any]
"""`{"role": "user", "content": "..."}`, with whatever else a template reads."""


class ChatTemplate:
    """A compiled template, in the dialect that published models are written for.

    Blocks take their line's white space and line break with them; `break` and `continue` work in
    loops; `tojson` leaves characters beyond ASCII as they are and escapes nothing for HTML;
    `raise_exception(text)` and `strftime_now(format)` are at hand; what stands between
    `{% generation %}` and `{% endgeneration %}` is written as it is.

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
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
        environment.globals["namespace"] = _Namespace
        self.source = source
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"ChatTemplate: line {error.lineno} is not valid Jinja: {error.message}."
            ) from None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The conversation as the model is to see it.

        Args:
          messages: the conversation.
          add_generation_prompt: whether the beginning of the model's next turn follows.
          **variables: what else the template reads: special tokens, `tools`, switches.

        Raises:
          ValueError: the template refuses the conversation (`raise_exception`), asks for what the
            sandbox forbids, or fails.
        """
        given = {"tools": None, "documents": None} | variables
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **given
            )
        except SecurityError as error:
            raise ValueError(
                f"ChatTemplate: the template asks for what the sandbox forbids: {error} Read it "
                "before you trust the folder that it came from."
            ) from None
        except _RefusedError as error:
            raise ValueError(f"ChatTemplate: the template refuses: {error}") from None
        except (jinja2.TemplateError, ArithmeticError, TypeError, LookupError) as error:
            raise ValueError(
                f"ChatTemplate: the template fails on these messages: {type(error).__name__}: "
                f"{error}. Pass the variables that it reads by keyword."
            ) from None


class _RefusedError(jinja2.TemplateError):
    """What a template raises by itself."""


def _raise_exception(text: str) -> None:
    raise _RefusedError(text)


class _Namespace(jinja2.utils.Namespace):
    """A template's variables, none of which may be named like Python's internals."""

    def __init__(*args, **kwargs):  # `self` may be the name of a variable
        self, *given = args
        variables = dict(*given, **kwargs)
        for name in variables:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, variables)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace with a variable {name!r}.")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, by which templates mark what a model wrote."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Any) -> Any:
        """The body, as a block without effect."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
