"""What a parser tells of an answer, piece by piece."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for a reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegins:
    """A call of `name`, whose arguments follow. Calls are numbered from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of a call's arguments, as it was generated."""

    index: int
    text: str


Delta = Content | CallBegins | CallArguments
