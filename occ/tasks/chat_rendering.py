"""What a worker does with a chat template; it loads this file by its path, without the package.

Templates are programs by whoever published a model, so they run in Jinja's sandbox, which lets them
neither reach Python's internals nor change what they are given; and, since the sandbox sets no
bound on time or memory, in a process that has both (`workers.py`).
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MOST_CHARACTERS = 200_000
"""Of a rendered conversation."""

PROGRAMS = re.compile(r"\s*(from jinja2\.runtime import .*|raise __jinja_exception__)", re.DOTALL)
"""What Jinja compiles in the worker: a template that it translated, and the place of its errors."""

_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def prepare() -> None:
    """Imports what Jinja imports at the first use."""
    render("{% for m in messages %}{{ m | tojson }}{% endfor %}", '{"messages": [1]}', NOW)
    render("{{ 1 / 0 }}", "{}", NOW)


NOW = "2000-01-01T00:00:00"


def render(source: str, variables: str, now: str) -> dict[str, str]:
    """A rendered template, or why it cannot be.

    Args:
      source: of the template.
      variables: what it reads, as JSON.
      now: local time, for `strftime_now`; in ISO form.

    Returns:
      {"text": ...} or {"error": ...}.
    """
    try:
        template = compiled(source)
        clock = datetime.datetime.fromisoformat(now)
        template.globals["strftime_now"] = lambda form: clock.strftime(form)
        text = template.render(**json.loads(variables))
    except SecurityError as error:
        return {
            "error": f"the template asks for what the sandbox forbids: {error} Read it before you "
            "trust the folder that it came from."
        }
    except _RefusedError as error:
        return {"error": f"the template refuses: {error}"}
    except _FAILURES as error:
        return {
            "error": f"the template fails on these messages: {type(error).__name__}: {error}. Pass "
            "the variables that it reads by keyword."
        }
    if len(text) > MOST_CHARACTERS:
        return {"error": f"it writes {len(text)} characters, more than {MOST_CHARACTERS}."}
    return {"text": text}


@functools.lru_cache(8)
def compiled(source: str) -> jinja2.Template:
    """The template as a program of the sandbox."""
    return environment().from_string(source)


def environment() -> ImmutableSandboxedEnvironment:
    """The dialect of published models; `ChatTemplate` describes it."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    found.filters["tojson"] = _to_json
    found.globals["raise_exception"] = _raise_exception
    found.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
    found.globals["namespace"] = _Namespace
    return found


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
