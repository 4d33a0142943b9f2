"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from miaotui.errors import UsageError
from miaotui.serve.openai.tool_calls.formats import format_named


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Bounds and names. Raises UsageError for one that cannot mean anything. Times are in seconds."""

    served_model_names: tuple[str, ...]
    """What requests may call the model; answers use the first."""
    max_queue: int = 256
    """Sequences that may wait for a seat in the step; a request past that is refused with 429."""
    request_timeout: float | None = 600.0
    """From a request's arrival to the end of its answer."""
    max_body_bytes: int = 4 << 20
    max_file_bytes: int = 200 << 20
    """The longest file that `/v1/files` takes."""
    shutdown_timeout: float = 30.0
    """What running requests get to finish in after SIGTERM."""
    tool_call_parser: str | None = None
    """The format of the model's tool calls; None finds it out from the chat template."""

    def __post_init__(self) -> None:
        if self.tool_call_parser is not None:
            format_named(self.tool_call_parser, "")
        if not self.served_model_names or not all(self.served_model_names):
            raise UsageError("The served model has no name.", "Give --served-model-name NAME.")
        for name, least in (("max_queue", 0), ("max_body_bytes", 1), ("max_file_bytes", 1), ("shutdown_timeout", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}.", f"Give at least {least}.")
        if self.request_timeout is not None and self.request_timeout <= 0:
            raise UsageError(f"request_timeout is {self.request_timeout}.", "Give more than 0 seconds.")
