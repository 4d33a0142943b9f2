"""A response as it grows: its output items, and the typed events that tell of them.

https://platform.openai.com/docs/api-reference/responses-streaming
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import orjson

from miaotui.serve.openai.tool_calls.deltas import CallArguments, CallBegins, Content, Delta

Fields = dict[str, Any]


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(24)}"


class GrowingResponse:
    """The output of one response. Each method returns the events, on the wire, of what it has changed."""

    def __init__(self, head: Fields) -> None:
        """`head`: the response without its outcome."""
        self._head = head
        self.output: list[Fields] = []
        self._open = False
        """Whether the last item still grows."""
        self._events = 0

    def opening(self) -> bytes:
        response = self.response("in_progress")
        return b"".join(self._event(name, response=response) for name in ("response.created", "response.in_progress"))

    def add(self, delta: Delta, logprobs: Sequence[Fields] = ()) -> bytes:
        """More of the answer. `logprobs` are of tokens that end in this text."""
        if isinstance(delta, Content):
            return self._add_text(delta.text, logprobs)
        if isinstance(delta, CallBegins):
            return self._close_item("completed") + self._begin_call(delta)
        return self._add_arguments(delta)

    def end(self, cut: bool, logprobs: Sequence[Fields] = ()) -> bytes:
        """Close what is open; `cut`: the answer goes on, but may not. An answer of nothing is an empty text.

        `logprobs` are of tokens that have given no text.
        """
        wire = b"" if self.output else self._begin_text()
        if logprobs and self._open and self.output[-1]["type"] == "message":
            self.output[-1]["content"][0]["logprobs"] += logprobs
        return wire + self._close_item("incomplete" if cut else "completed")

    def response(self, status: str, **outcome: Any) -> Fields:
        """The response as it is now."""
        return {**self._head, "status": status, "output": list(self.output), **outcome}

    def closing(self, response: Fields) -> bytes:
        """The last event, of a response that has come to its end."""
        return self._event(f"response.{response['status']}", response=response)

    # -- text ----------------------------------------------------------------------------------------------
    def _begin_text(self) -> bytes:
        wire = self._close_item("completed")
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item = {"type": "message", "id": new_id("msg"), "status": "in_progress", "role": "assistant"}
        wire += self._begin_item({**item, "content": []})
        self.output[-1]["content"] = [part]
        return wire + self._of_item("response.content_part.added", content_index=0, part={**part, "logprobs": []})

    def _add_text(self, text: str, logprobs: Sequence[Fields]) -> bytes:
        wire = b""
        if not self._open or self.output[-1]["type"] != "message":
            wire = self._begin_text()
        part = self.output[-1]["content"][0]
        part["text"] += text
        part["logprobs"] += logprobs
        return wire + self._of_item("response.output_text.delta", content_index=0, delta=text, logprobs=list(logprobs))

    def _close_text(self) -> bytes:
        (part,) = self.output[-1]["content"]
        return self._of_item(
            "response.output_text.done", content_index=0, text=part["text"], logprobs=part["logprobs"]
        ) + self._of_item("response.content_part.done", content_index=0, part=part)

    # -- calls ---------------------------------------------------------------------------------------------
    def _begin_call(self, call: CallBegins) -> bytes:
        item = {"type": "function_call", "id": new_id("fc"), "status": "in_progress"}
        return self._begin_item({**item, "call_id": call.id, "name": call.name, "arguments": ""})

    def _add_arguments(self, delta: CallArguments) -> bytes:
        self.output[-1]["arguments"] += delta.text
        return self._of_item("response.function_call_arguments.delta", delta=delta.text)

    def _close_call(self) -> bytes:
        call = self.output[-1]
        return self._of_item("response.function_call_arguments.done", name=call["name"], arguments=call["arguments"])

    # -- items ---------------------------------------------------------------------------------------------
    def _begin_item(self, item: Fields) -> bytes:
        self.output.append(item)
        self._open = True
        return self._event("response.output_item.added", output_index=len(self.output) - 1, item=item)

    def _close_item(self, status: str) -> bytes:
        if not self._open:
            return b""
        item = self.output[-1]
        item["status"] = status
        self._open = False
        wire = self._close_text() if item["type"] == "message" else self._close_call()
        return wire + self._event("response.output_item.done", output_index=len(self.output) - 1, item=item)

    def _of_item(self, name: str, /, **fields: Any) -> bytes:
        return self._event(name, item_id=self.output[-1]["id"], output_index=len(self.output) - 1, **fields)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        data = orjson.dumps({"type": name, "sequence_number": self._events, **fields})
        self._events += 1
        return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"
