"""How an artefact is best served: a file beside its weights that commands follow where their own flags say nothing.

    {"options": {"kv_cache_dtype": "int8", "speculative": "ngram"}, "threads": 2, "cores": 2}

`options` are keyword arguments of LLM. `threads` counts on machines with as many cores only: what is best depends on
them, and the artefact may travel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from miaotui.checkpoint.beside import beside, find_beside
from miaotui.checkpoint.write import write_json
from miaotui.errors import CheckpointError

FILE = "serving.json"
OPTIONS: Mapping[str, type] = {
    "compute": str,
    "kv_cache_dtype": str,
    "speculative": str,
    "max_num_seqs": int,
    "max_num_batched_tokens": int,
    "greedy_screen": bool,
}


def write(artefact: Path, options: Mapping[str, Any], cores: int) -> Path | None:
    """Write what `options` (of LLM, `threads` among them) recommend on a machine of `cores`; None: nothing to write."""
    if not options:
        return None
    rest = {name: value for name, value in options.items() if name != "threads"}
    assert set(rest) <= set(OPTIONS)
    where = {"threads": options["threads"], "cores": cores} if "threads" in options else {}
    path = beside(artefact, FILE)
    write_json(path, {"options": rest, **where})
    return path


def read(artefact: Path, cores: int) -> dict[str, Any]:
    """LLM's keyword arguments for this artefact here; none where nothing was recommended.

    Raises CheckpointError for a file that cannot be read or holds something else.
    """
    path = find_beside(artefact, FILE)
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, " ".join(str(error).split())[:200]) from error
    if not isinstance(found, dict) or not isinstance(found.get("options"), dict):
        raise _damaged(path, "it has no options")
    options: dict[str, Any] = found["options"]
    for name, value in options.items():
        if name not in OPTIONS or type(value) is not OPTIONS[name]:
            raise _damaged(path, f"{name!r:.60} is no option of it, or {value!r:.60} no value")
    threads = found.get("threads")
    if threads is not None and found.get("cores") == cores:
        if type(threads) is not int or threads < 1:
            raise _damaged(path, f"threads is {threads!r:.60}")
        return {**options, "threads": threads}
    return dict(options)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {why}.", "Remove it to serve the model by default.")
