"""Conditions written out as code: whether an object and what it reaches are still as they were found.

Conditions are added one by one while something is looked at, and become one function, a line for each. To check each by
a function of its own would be a call for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeAlias

__all__ = ["Guard", "Matched"]

Matched: TypeAlias = Callable[[Any], "list[Any] | None"]
"""What a guard becomes: it takes an object, and returns what was asked for of it, or None where it is another."""


class Guard:
    """A function on its way to source. What it takes is `Guard.given`; all names are made here."""

    given = "given"

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._constants: dict[str, Any] = {}
        self._variables = 0

    def constant(self, value: Any) -> str:
        """A name for an object."""
        name = f"k{len(self._constants)}"
        self._constants[name] = value
        return name

    def let(self, expression: str) -> str:
        """A variable of that value."""
        self._variables += 1
        self._lines.append(f"v{self._variables} = {expression}")
        return f"v{self._variables}"

    def unpack(self, expression: str, count: int) -> list[str]:
        """A variable for each of `count` items. Where there are more or fewer the guard returns None.

        Of no items nothing is asked.
        """
        if count == 0:
            return []
        names = [f"v{self._variables + 1 + i}" for i in range(count)]
        self._variables += count
        self._lines.append(f"{', '.join(names)}, = {expression}")
        return names

    def require(self, *conditions: str) -> None:
        """Go on only where all of them hold."""
        self._lines += [f"if not ({condition}): return None" for condition in conditions]

    def different(self, variables: Sequence[str]) -> None:
        """Go on only where no two of them are the same object."""
        if len(variables) > 1:
            self.require(f"len({{{', '.join(f'id({name})' for name in variables)}}}) == {len(variables)}")

    def function(self, results: Sequence[str]) -> Matched:
        """The function, which returns a list of these variables."""
        lines = [*self._lines, f"return [{', '.join(results)}]"]
        body = "\n".join(f"        {line}" for line in lines)
        # ValueError: more or fewer items than variables, or a variable of a closure that is not assigned.
        source = f"def matched({Guard.given}):\n    try:\n{body}\n    except ValueError: return None\n"
        made = dict(self._constants)
        exec(_code(source), made)
        return made.pop("matched")


@lru_cache(maxsize=256)
def _code(source: str) -> Any:
    """Compiled. The source names constants only, so it is the same for other numbers, shapes and contents."""
    return compile(source, "<guard>", "exec")
