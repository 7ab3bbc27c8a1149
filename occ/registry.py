"""Factories by their names, entered where they are defined."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Factory = TypeVar("Factory", bound=Callable[..., Any])


class Registry(dict[str, Callable[..., Any]]):
    """A dict from names to factories.

    Args:
      kind: what the factories make, for messages ("rule").

    >>> shapes = Registry("shape")
    >>> @shapes.register("square")
    ... def square(side: float = 1.0) -> float:
    ...     return side * side
    >>> shapes.build("square", side=3.0)
    9.0
    """

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[Factory], Factory]:
        """Enters the factory that it decorates.

        Raises:
          ValueError: the name is taken.
        """

        def enter(factory: Factory) -> Factory:
            if name in self:
                raise ValueError(f"{self.kind} {name!r} is there already; choose another name.")
            self[name] = factory
            return factory

        return enter

    def build(self, name: str, **options: Any) -> Any:
        """What the factory of this name makes.

        Args:
          name: a key.
          **options: the arguments of its factory, by keyword.

        Raises:
          ValueError: an unknown name, an unknown option, or one that it cannot do without.
        """
        if name not in self:
            raise ValueError(f"{self.kind}: expected one of {sorted(self)}, got {name!r}.")
        parameters = inspect.signature(self[name]).parameters
        unknown = sorted(set(options) - set(parameters))
        if unknown:
            raise ValueError(
                f"{self.kind} {name!r} has no option {unknown}; it takes "
                f"{sorted(parameters) or 'none'}."
            )
        required = [p.name for p in parameters.values() if p.default is inspect.Parameter.empty]
        missing = sorted(set(required) - set(options))
        if missing:
            raise ValueError(f"{self.kind} {name!r} needs {missing}; pass it by keyword.")
        return self[name](**options)
