"""JSON in and out."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.responses import Response

from miaotui.serve.openai.errors import as_api_error, refused


class Json(Response):
    """An answer as JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content)


def error_response(error: Exception) -> Json:
    """Any exception as an answer in OpenAI's shape."""
    found = as_api_error(error)
    return Json(found.body(), found.status, found.headers)


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object. Raises ApiError 400."""
    try:
        found = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise refused(f"The body is not JSON: {error}.", None, "invalid_json") from None
    if not isinstance(found, dict):
        raise refused("The body is not a JSON object.", None, "invalid_json")
    return found
