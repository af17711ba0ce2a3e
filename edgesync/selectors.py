"""Label selectors, as kubectl writes them: which devices a command is about.

``region=eu,site!=lab``, ``tier in (a,b)``, ``tier notin (a,b)``, ``gpu`` (has the label), ``!gpu`` (has not); a comma
is AND. As in Kubernetes, ``!=`` and ``notin`` also match where the label is missing. It decides from a mapping alone
and knows nothing of devices; the gateway's register and ``events -l`` call it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from edgesync import limits
from edgesync.errors import UsageError

MAX_SELECTOR_CHARS = 4096
MAX_REQUIREMENTS = 64

_KEY = r"[A-Za-z0-9](?:[A-Za-z0-9._/-]*[A-Za-z0-9])?"
_VALUE = r"(?:[A-Za-z0-9](?:[A-Za-z0-9._:-]*[A-Za-z0-9])?)?"
_EQUALITY = re.compile(rf"\s*({_KEY})\s*(==|=|!=)\s*({_VALUE})\s*\Z")
_SET = re.compile(rf"\s*({_KEY})\s+(in|notin)\s*\(([^()]*)\)\s*\Z")
_EXISTS = re.compile(rf"\s*(!?)\s*({_KEY})\s*\Z")
_LABEL_KEY = re.compile(rf"{_KEY}\Z")
_LABEL_VALUE = re.compile(rf"{_VALUE}\Z")

Operator = Literal["in", "notin", "exists", "absent"]


@dataclass(frozen=True)
class Requirement:
    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case "in":
                return value is not None and value in self.values
            case "notin":
                return value is None or value not in self.values
            case "exists":
                return value is not None
            case "absent":
                return value is None


@dataclass(frozen=True)
class Selector:
    """All requirements must hold; one with none matches everything."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(requirement.matches(labels) for requirement in self.requirements)


def parse(text: str) -> Selector:
    """Read a selector. Raises UsageError: naming the part that is not understood."""
    if len(text) > MAX_SELECTOR_CHARS:
        raise UsageError(f"a selector has at most {MAX_SELECTOR_CHARS} characters")
    if not text.strip():
        return Selector()
    parts = _split(text)
    if len(parts) > MAX_REQUIREMENTS:
        raise UsageError(f"a selector has at most {MAX_REQUIREMENTS} requirements")
    return Selector(tuple(_requirement(part) for part in parts))


def parse_label(text: str) -> tuple[str, str]:
    """Read ``key=value`` as given to ``--label``. Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"label {text!a} is not of the form key=value")
    check_label(key, value)
    return key, value


def check_label(key: str, value: str) -> None:
    """Raise UsageError unless a selector could name this label."""
    if len(key) > limits.MAX_LABEL_BYTES or not _LABEL_KEY.match(key):
        raise UsageError(
            f"label name {key[:80]!a} must be letters, digits, '.', '_', '/' or '-', "
            f"at most {limits.MAX_LABEL_BYTES} of them"
        )
    if len(value) > limits.MAX_LABEL_BYTES or not _LABEL_VALUE.match(value):
        raise UsageError(
            f"label value {value[:80]!a} must be letters, digits, '.', '_', ':' or '-', "
            f"at most {limits.MAX_LABEL_BYTES} of them"
        )


def _split(text: str) -> list[str]:
    """Split at commas outside parentheses."""
    parts = [""]
    depth = 0
    for character in text:
        if character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _requirement(part: str) -> Requirement:
    if match := _EQUALITY.match(part):
        key, sign, value = match.groups()
        return Requirement(key, "notin" if sign == "!=" else "in", (value,))
    if match := _SET.match(part):
        key, word, inside = match.groups()
        values = tuple(value.strip() for value in inside.split(","))
        if all(_LABEL_VALUE.match(value) for value in values):
            return Requirement(key, "in" if word == "in" else "notin", values)
    elif match := _EXISTS.match(part):
        absent, key = match.groups()
        return Requirement(key, "absent" if absent else "exists")
    raise UsageError(
        f"selector {part.strip()[:80]!a} is not understood: write key=value, key!=value, 'key in (a,b)', "
        "'key notin (a,b)', key or !key, separated by commas"
    )


__all__ = ["Requirement", "Selector", "check_label", "parse", "parse_label"]
