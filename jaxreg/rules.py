"""Ordered rules from patterns over `/`-separated paths to values."""

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

Pattern = str | re.Pattern[str] | Callable[[str], bool]

TOP = "."
"""The path of the top module itself."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rules:
    """Patterns and the value that each assigns; the first that matches a path wins.

    The values are the leaves of this pytree, the patterns its structure.

    Args:
        patterns: for each rule a glob, a compiled regular expression that must match the whole
            path, or a predicate of the path. In a glob `*` matches within one segment, `**` any
            number of whole segments, and `.` alone the top module; `?` and `[...]` are as in
            Python's fnmatch.
        values: for each rule its value; None exempts.
        strict: whether a rule that wins nothing is an error.
    """

    patterns: tuple[Pattern, ...] = dataclasses.field(metadata={"static": True})
    values: tuple[Any, ...]
    strict: bool = dataclasses.field(default=True, metadata={"static": True})

    @classmethod
    def of(cls, rules: Any, kind: type, *, strict: bool, owner: str) -> "Rules":
        """Build rules from a mapping whose values are of a kind, or None.

        Raises:
            TypeError: for anything else. `owner` is the function that it names.
        """
        if not isinstance(rules, Mapping):
            raise TypeError(
                f"`{owner}` takes a mapping from patterns to a {kind.__name__} or None;"
                f" got {rules!r}."
            )
        for pattern, value in rules.items():
            if not (value is None or isinstance(value, kind)):
                raise TypeError(
                    f"`{owner}` takes a {kind.__name__}, or None to exempt; got {value!r} for"
                    f" {pattern!r}."
                )
            # A class is no predicate, though it can be called: what it makes is mostly true.
            predicate = callable(pattern) and not isinstance(pattern, type)
            if not (isinstance(pattern, str | re.Pattern) or predicate):
                raise TypeError(
                    f"`{owner}` takes rules from a glob, a compiled regular expression or a"
                    f" predicate; got the pattern {pattern!r}."
                )
        return cls(tuple(rules), tuple(rules.values()), strict)

    def find(self, path: str) -> int | None:
        """Return the index of the first rule that matches the path, or None."""
        return next((i for i, p in enumerate(self.patterns) if matches(p, path)), None)

    def name(self, index: int) -> str:
        """Return the rule's pattern as a person would write it."""
        pattern = self.patterns[index]
        if isinstance(pattern, str):
            return f'"{pattern}"'
        if isinstance(pattern, re.Pattern):
            return f're.compile("{pattern.pattern}")'
        return getattr(pattern, "__name__", repr(pattern))

    def require_wins(
        self, winners: Iterable[int | None], paths: Iterable[str], what: str, otherwise: str
    ) -> None:
        """Raise if some rule is not among the winners.

        Args:
            winners: the indices of the rules that won something.
            paths: the paths there are, for the message.
            what: what the paths name, in the plural.
            otherwise: why a path that a rule does match may not count as won.
        """
        idle = set(range(len(self.patterns))) - set(winners)
        if not self.strict or not idle:
            return
        paths = list(dict.fromkeys(paths))
        complaints = [self._complain(index, paths, what, otherwise) for index in sorted(idle)]
        raise ValueError("\n".join(complaints))

    def _complain(self, index: int, paths: list[str], what: str, otherwise: str) -> str:
        pattern = self.patterns[index]
        start = f"The rule {self.name(index)} wins none of the {len(paths)} {what}"
        taken = [path for path in paths if matches(pattern, path)]
        if taken:
            first = self.find(taken[0])
            if first is not None and first != index:
                return (
                    f'{start}: it matches "{taken[0]}", but the earlier rule {self.name(first)}'
                    " wins that. Put the narrower rule first."
                )
            return f'{start}: it matches "{taken[0]}", {otherwise}.'
        nearest = _nearest(pattern, paths)
        return f"{start}. Nearest: {nearest}. `strict=False` allows rules that win nothing."


def matches(pattern: Pattern, path: str) -> bool:
    """Return whether the pattern matches the whole path."""
    if isinstance(pattern, str):
        return names(pattern, path) or _glob(_segments(pattern), _segments(path))
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    return bool(pattern(path))


def names(pattern: Pattern, path: str) -> bool:
    """Return whether the pattern is the path itself, spelt out."""
    return isinstance(pattern, str) and pattern == path


def _segments(path: str) -> list[str]:
    return [] if path == TOP else path.split("/")


def _glob(pattern: list[str], path: list[str]) -> bool:
    if not pattern:
        return not path
    first, *rest = pattern
    if first == "**":
        return any(_glob(rest, path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], first) and _glob(rest, path[1:])


def _nearest(pattern: Pattern, paths: list[str]) -> str:
    if not paths:
        return "there are none"
    wanted = pattern if isinstance(pattern, str) else getattr(pattern, "pattern", "")
    near = difflib.get_close_matches(wanted, paths, n=3, cutoff=0.0)
    return ", ".join(f'"{path}"' for path in near)
