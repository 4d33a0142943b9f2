"""OpenAI's batch file format: one request a line in, one record a line out."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
LONGEST_LINE = 4 << 20
"""Bytes of a line, its end included; as long as the body of a request to the server."""
_FIELDS = {"custom_id", "method", "url", "body"}
_SAYS_NOTHING = {"user", "metadata", "priority"}
"""Fields of a body that its answer does not depend on."""
_REFERS = {"previous_response_id", "conversation"}
"""Fields that refer to what was said before, somewhere else."""


@dataclass(frozen=True)
class Task:
    """One line's request."""

    custom_id: str
    url: str
    body: dict[str, Any]


class BadLine(Exception):
    """A line that cannot be asked; `custom_id` where one could be read."""

    def __init__(self, message: str, custom_id: str | None = None, code: str = "invalid_line") -> None:
        super().__init__(message)
        self.custom_id = custom_id
        self.code = code


def read_task(line: bytes) -> Task:
    """Understand a line. Raises BadLine."""
    if len(line) > LONGEST_LINE:
        raise BadLine(f"The line has more than {LONGEST_LINE} bytes.")
    try:
        found = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise BadLine(f"The line is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise BadLine("The line is not a JSON object.")
    name = found.get("custom_id")
    if not isinstance(name, str) or not name:
        raise BadLine("The line has no custom_id, a string that is its own.")
    if unknown := sorted(found.keys() - _FIELDS):
        raise BadLine(f"The line has {unknown[0]!r}, which means nothing here.", name)
    if found.get("method") != "POST":
        raise BadLine("The method must be POST.", name)
    url, body = found.get("url"), found.get("body")
    if url not in URLS:
        raise BadLine(f"The url must be one of {', '.join(URLS)}.", name)
    if not isinstance(body, dict):
        raise BadLine("The body is not a JSON object.", name)
    return Task(name, url, body)


def answered(custom_id: str, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a request that was answered, be the answer an error."""
    response = {"status_code": status, "request_id": _id("req"), "body": dict(body)}
    return {"id": _id("batch_req"), "custom_id": custom_id, "response": response, "error": None}


def failed(bad: BadLine) -> dict[str, Any]:
    """The record of a line that could not be asked."""
    error = {"code": bad.code, "message": str(bad)}
    return {"id": _id("batch_req"), "custom_id": bad.custom_id, "response": None, "error": error}


def succeeded(record: Mapping[str, Any]) -> bool:
    response = record["response"]
    return response is not None and bool(response["status_code"] < 400)


def deterministic(body: Mapping[str, Any]) -> bool:
    """Whether the same body always gets the same answer."""
    if any(body.get(name) is not None for name in _REFERS):
        return False
    return body.get("temperature") == 0 or body.get("seed") is not None


def request_key(model: str, url: str, body: Mapping[str, Any]) -> str:
    """What identical requests share, in hex; `model` is the fingerprint of the model and of how it is run."""
    asked = {name: value for name, value in body.items() if name not in _SAYS_NOTHING}
    canonical = orjson.dumps([model, url, asked], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(canonical).hexdigest()


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
