"""Failures in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}` with an HTTP status."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from miaotui.errors import MiaotuiError, RequestError

_log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer that is an error. `headers` go with it over HTTP."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def refused(message: str, param: str | None, code: str | None = None) -> ApiError:
    """A request that cannot be served as it is asked."""
    return ApiError(400, message, param=param, code=code)


def no_such_model(name: str, served: tuple[str, ...]) -> ApiError:
    message = f"The model `{name}` is not served here. Ask for {' or '.join(f'`{known}`' for known in served)}."
    return ApiError(404, message, param="model", code="model_not_found")


def overloaded(waiting: int, retry_after: int) -> ApiError:
    """The queue is full."""
    return ApiError(
        429,
        f"The queue is full: {waiting} sequences are running or waiting. Try again in {retry_after} s.",
        type="rate_limit_error",
        code="queue_full",
        headers={"retry-after": str(retry_after)},
    )


def loading() -> ApiError:
    return _unavailable("The model is still loading. Try again in a moment.", "model_loading", 1)


def shutting_down() -> ApiError:
    return _unavailable("The server is shutting down. Ask another one, or later.", "shutting_down", 5)


def engine_failed() -> ApiError:
    """Nothing will be answered any more."""
    return _unavailable("The engine has failed. The server's log says why.", "engine_failed", 5)


def _unavailable(message: str, code: str, retry_after: int) -> ApiError:
    headers = {"retry-after": str(retry_after)}
    return ApiError(503, message, type="service_unavailable_error", code=code, headers=headers)


def timed_out(seconds: float) -> ApiError:
    """The deadline has passed. A client that tried again at once would only wait as long again."""
    return ApiError(
        504,
        f"The request took more than {seconds:g} s and was stopped. Ask for fewer tokens, or raise --request-timeout.",
        type="timeout_error",
        code="request_timeout",
        headers={"x-should-retry": "false"},
    )


def as_api_error(error: Exception) -> ApiError:
    """Any exception as an answer. What is no error of ours and no fault of the request is logged, and not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        too_long = "the context holds" in error.message
        return refused(str(error), error.param, "context_length_exceeded" if too_long else "invalid_value")
    if isinstance(error, MiaotuiError):
        return ApiError(500, str(error), type="server_error")
    _log.error("A request failed", exc_info=error)
    return ApiError(500, "The server has failed on this request; its log has more.", type="server_error")
