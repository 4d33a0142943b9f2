"""JSON objects by id: all in memory, and each in a file of its own, so that they outlive the process."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

from miaotui.checkpoint.write import write_json

_log = logging.getLogger(__name__)

Entry = dict[str, Any]
"""An object as OpenAI's clients see it, with `id` and `created_at`."""


class Entries:
    """What `folder` has as ID.json. An entry may be changed in place; `save` has the file follow.

    Used on the event loop's thread, which no disk ever holds up.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        found = [entry for path in sorted(folder.glob("*.json")) if (entry := _load(path)) is not None]
        self._all: dict[str, Entry] = {entry["id"]: entry for entry in sorted(found, key=lambda e: e["created_at"])}
        self._writing = asyncio.Lock()

    def __len__(self) -> int:
        return len(self._all)

    def get(self, name: str) -> Entry | None:
        return self._all.get(name)

    def newest_first(self) -> list[Entry]:
        return list(reversed(self._all.values()))

    async def save(self, entry: Entry) -> None:
        """Have it here and in its file as it is now. To be cancelled does not keep it from the file."""
        self._all[entry["id"]] = entry
        await asyncio.shield(self._write(entry["id"]))

    async def remove(self, name: str) -> None:
        del self._all[name]
        await asyncio.shield(self._write(name))

    async def _write(self, name: str) -> None:
        """One at a time, and each what is the newest by then: an older state never comes last."""
        path = self.folder / f"{name}.json"
        async with self._writing:
            entry = self._all.get(name)
            if entry is None:
                await asyncio.to_thread(path.unlink, missing_ok=True)
            else:
                await asyncio.to_thread(write_json, path, dict(entry))


def _load(path: Path) -> Entry | None:
    try:
        entry = json.loads(path.read_bytes())
        if entry["id"] == path.stem and isinstance(entry["created_at"], int):
            return dict(entry)
    except (OSError, ValueError, TypeError, KeyError):
        pass
    _log.warning("%s is damaged, and left alone.", path)
    return None
