"""What the user calls MODEL, found: a folder, a file, a hub name, or `demo`."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from miaotui.checkpoint.base import Checkpoint
from miaotui.checkpoint.gguf import MAGIC, GGUFCheckpoint, split_paths
from miaotui.errors import CheckpointError, MiaotuiError, ModelNotFoundError

if TYPE_CHECKING:
    from miaotui.checkpoint.hub import Listing

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_HUB = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./ -]+\.gguf))?"
)


def resolve(model: str) -> Path:
    """The folder or `.gguf` file of a model; it is downloaded first when it is `demo` or a hub name.

    Raises ModelNotFoundError when there is no such model, CheckpointError when what is there cannot be one.
    """
    if model == "demo":
        from miaotui.checkpoint import demo

        return demo.locate()
    here = _here(model)
    if here is not None:
        return here
    from miaotui.checkpoint import hub

    return hub.download(*_hub_name(model))


def look(model: str) -> Checkpoint | Listing:
    """A model that is here, opened; of one that is only on the hub, what can be told without fetching its weights.

    `demo` is fetched. Raises what `resolve` and `open_checkpoint` do.
    """
    here = resolve(model) if model == "demo" else _here(model)
    if here is not None:
        return open_checkpoint(here)
    from miaotui.checkpoint import hub

    name = _hub_name(model)
    cached = hub.cached(*name)
    if cached is not None:
        with contextlib.suppress(MiaotuiError):  # such as a download that was stopped
            return open_checkpoint(cached)
    return hub.glance(*name)


def _here(model: str) -> Path | None:
    """The folder or file of that name, None when there is none."""
    try:
        path = Path(model).expanduser()
        exists = bool(model) and path.exists()
    except (OSError, ValueError, RuntimeError):
        return None
    return _found(path) if exists else None


def _hub_name(model: str) -> tuple[str, str | None, str | None]:
    """Repository, revision and file."""
    match = _HUB.fullmatch(model)
    if match is None or (model.endswith(".gguf") and match["file"] is None):
        raise ModelNotFoundError(f"There is no model at {model[:200]!r}.", _WHAT_IT_MAY_BE)
    return match["repo"], match["revision"], match["file"]


_WHAT_IT_MAY_BE = "MODEL is a folder, a .gguf file, a hub name such as org/name, or demo."


def open_checkpoint(path: Path) -> Checkpoint:
    """Open what `resolve` found. Reads headers only; raises CheckpointError for a file that is damaged."""
    path = Path(path)
    if not path.exists():
        raise ModelNotFoundError(f"There is no model at {str(path)[:200]!r}.", _WHAT_IT_MAY_BE)
    path = _found(path)
    if path.is_file() and path.suffix != ".safetensors":
        return GGUFCheckpoint(path)
    from miaotui.checkpoint.safetensors import SafetensorsCheckpoint

    return SafetensorsCheckpoint(path) if path.is_dir() else SafetensorsCheckpoint(path.parent, path.name)


def _found(path: Path) -> Path:
    """A folder with safetensors in it, or a model's file."""
    try:
        return _in_folder(path) if path.is_dir() else _file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error}.", "Check its permissions.") from error


def _file(path: Path) -> Path:
    """A file that can be a model: safetensors by its name, GGUF by its magic."""
    if path.suffix in PICKLES:
        refuse_pickle(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file.", _WHAT_IT_MAY_BE)
    if path.suffix == ".safetensors":
        return path
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise CheckpointError(f"{path} is neither GGUF nor safetensors.", _WHAT_IT_MAY_BE)
    return path


def _in_folder(folder: Path) -> Path:
    """The folder itself when it has safetensors, else the one GGUF model in it."""
    if any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").is_file():
        return folder
    models = {split_paths(path)[0]: path for path in sorted(folder.glob("*.gguf"), reverse=True)}
    found = [models[first] for first in sorted(models)]
    if len(found) == 1:
        return _file(found[0])
    if found:
        names = ", ".join(path.name for path in found[:8])
        raise ModelNotFoundError(f"{folder} has {len(found)} GGUF models: {names}.", "Pass one of the files.")
    pickled = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if pickled:
        refuse_pickle(pickled[0])
    raise ModelNotFoundError(f"{folder} has no .safetensors or .gguf file in it.", _WHAT_IT_MAY_BE)


def refuse_pickle(path: Path) -> NoReturn:
    """Pickles run whatever code their author wrote into them: they are never opened."""
    folder = path.parent if path.suffix else path
    raise CheckpointError(
        f"{path} is a pickle, which can run code when it is opened, so it is never read.",
        'Convert it to safetensors where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\" (and copy the tokenizer files).",
    )
