"""API keys: who may ask, how often, and until when.

A key is 256 random bits, so a plain SHA-256 of it is as good as a slow hash: nobody can guess what was hashed. What is
compared are digests, all of them every time, in constant time. Neither keys nor digests appear in logs or errors.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from miaotui.checkpoint.write import atomic_file
from miaotui.errors import UsageError
from miaotui.serve.answers import error_response
from miaotui.serve.openai.errors import ApiError

PREFIX = "mt-"
_BYTES = 32
_FIELDS = {"name", "sha256", "created", "expires", "requests_per_minute"}
_NAME = re.compile(r"[\w.@:+-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Key:
    """What is known of a key. Times are seconds since 1970; None: for ever, or as often as one likes."""

    name: str
    sha256: str = field(repr=False)
    created: float = 0.0
    expires: float | None = None
    requests_per_minute: int | None = None

    def expired(self, now: float) -> bool:
        return self.expires is not None and now >= self.expires


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def new_secret() -> str:
    """A key that nobody has had yet."""
    return PREFIX + secrets.token_urlsafe(_BYTES)


def check_name(name: str) -> None:
    """Raise UsageError for a name that would be hard to read in a log."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r:.80} cannot be a key's name.", "Use letters, digits and . _ - + @ : without spaces, 64 at most."
        )


def read_keys(path: Path) -> list[Key]:
    """The keys of a file that `write_keys` wrote. Raises UsageError for anything else."""
    hint = "Make it with `miaotui keys create`."
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UsageError(f"The keys file {path} cannot be read: {error.strerror}.", hint) from None
    except ValueError as error:
        raise UsageError(f"The keys file {path} is not JSON: {error}.", hint) from None
    entries = content.get("keys") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise UsageError(f"The keys file {path} has no list `keys`.", hint)
    keys = [_key(entry, path, hint) for entry in entries]
    if len({key.name for key in keys}) < len(keys):
        raise UsageError(f"The keys file {path} has a name twice.", "Give every key a name of its own.")
    return keys


def _key(entry: Any, path: Path, hint: str) -> Key:
    if not isinstance(entry, dict) or entry.keys() - _FIELDS or not entry.keys() >= {"name", "sha256"}:
        raise UsageError(f"The keys file {path} has an entry that is no key.", hint)
    key = Key(**entry)
    per_minute = key.requests_per_minute
    wrong = {
        "name": not (isinstance(key.name, str) and _NAME.fullmatch(key.name)),
        "sha256": not (isinstance(key.sha256, str) and _DIGEST.fullmatch(key.sha256)),
        "created": not _is_time(key.created),
        "expires": not (key.expires is None or _is_time(key.expires)),
        "requests_per_minute": not (per_minute is None or (type(per_minute) is int and per_minute > 0)),
    }
    if any(wrong.values()):
        names = " and ".join(name for name, is_wrong in wrong.items() if is_wrong)
        raise UsageError(f"The keys file {path} has a key whose {names} cannot be.", hint)
    return key


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def write_keys(path: Path, keys: Sequence[Key]) -> None:
    """Replace the file whole, readable by its owner alone."""
    content = {"keys": [{name: getattr(key, name) for name in sorted(_FIELDS)} for key in keys]}
    with atomic_file(path, mode=0o600) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")


@contextlib.contextmanager
def editing(path: Path) -> Iterator[None]:
    """Keep others that use this from changing the file between our reading and our writing."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


class Keys:
    """All keys of a server: those it was given, and those of a file, which is read again when it has changed."""

    def __init__(self, secrets: Sequence[str] = (), file: Path | None = None) -> None:
        """Raises UsageError for a key that no client could send, and for an unreadable file."""
        if not all(secret.isascii() and secret.isprintable() and secret.split() == [secret] for secret in secrets):
            raise UsageError(
                "An API key is empty, or has a character that cannot be sent.",
                "Use ASCII letters, digits and signs, without spaces.",
            )
        self._given = [Key(f"key-{i + 1}", digest(secret)) for i, secret in enumerate(secrets)]
        self._file = file
        self._stamp: tuple[int, int, int] | None = None
        self._listed: list[Key] = []
        if file is not None:
            self._listed = read_keys(file)
            self._stamp = _stamp(file)

    def find(self, secret: str) -> Key | None:
        """The key, be it expired; None when nobody has it."""
        self._refresh()
        wanted, found = digest(secret), None
        for key in (*self._given, *self._listed):
            if hmac.compare_digest(key.sha256, wanted):
                found = key
        return found

    def _refresh(self) -> None:
        """Read a changed file again. One that has become unreadable lets nobody in until it is mended."""
        if self._file is None:
            return
        stamp = _stamp(self._file)
        if stamp != self._stamp:
            self._stamp = stamp
            try:
                self._listed = read_keys(self._file)
            except UsageError as error:
                self._listed = []
                _log.error("%s No key of it is taken until it is mended.", error)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


class Rates:
    """A token bucket for each key's name: a minute's worth at once, then evenly."""

    def __init__(self) -> None:
        self._buckets: dict[str, tuple[float, float]] = {}

    def take(self, key: Key, now: float) -> float:
        """0 when the key may ask at `now` (monotonic seconds); else the seconds until it may."""
        if key.requests_per_minute is None:
            return 0.0
        most = float(key.requests_per_minute)
        left, since = self._buckets.get(key.name, (most, now))
        left = min(most, left + (now - since) * most / 60)
        allowed = left >= 1
        self._buckets[key.name] = (left - 1 if allowed else left, now)
        return 0.0 if allowed else (1 - left) * 60 / most


class RequireKey:
    """ASGI middleware: lets a request through that has a key, or that asks for one of the `open_paths`.

    Only POST counts against a key's rate: looking at figures or models costs nothing.
    The key's name is left in `scope["state"]["key"]` for the access log.
    """

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open = open_paths
        self._rates = Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in self._open:
            try:
                key = self._admit(Headers(scope=scope), counted=scope["method"] == "POST")
                scope.setdefault("state", {})["key"] = key
            except ApiError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admit(self, headers: Headers, *, counted: bool) -> str:
        """The name of the request's key. Raises ApiError 401, and 429 for one that is `counted` and too many."""
        kind, _, secret = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secret:
            raise _unauthorized("No API key was given. Send the header Authorization: Bearer KEY.")
        key = self._keys.find(secret.strip())
        if key is None:
            raise _unauthorized("The API key is not known here. Check it, or ask for a new one.")
        if key.expired(time.time()):
            raise _unauthorized("The API key has expired. Ask for a new one.")
        wait = self._rates.take(key, time.monotonic()) if counted else 0.0
        if wait:
            seconds = math.ceil(wait)
            raise ApiError(
                429,
                f"The API key may ask {key.requests_per_minute} times a minute. Try again in {seconds} s.",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"retry-after": str(seconds)},
            )
        return key.name


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
