"""Models from the Hugging Face hub, into its own cache: only the files that are needed, resumed where it stopped."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from miaotui.checkpoint.files import read_json
from miaotui.errors import CheckpointError, ModelNotFoundError, ResourceError

T = TypeVar("T")
R = TypeVar("R")

CONFIG = "config.json"
OFFLINE, UNREACHABLE = "HF_HUB_OFFLINE is set", "the hub cannot be reached"

_TEXT = re.compile(r"(?!.*adapter)([\w.-]+\.(json|jinja|model|txt)|chat_template[\w.-]*)")
_WEIGHTS = re.compile(r"model[\w.-]*\.safetensors|[\w.-]+-\d{5}-of-\d{5}\.safetensors")


def download(repo: str, revision: str | None = None, file: str | None = None) -> Path:
    """A hub model's snapshot folder, or its GGUF file when `file` names one or it has nothing else.

    Works from the cache when HF_HUB_OFFLINE is set or the hub cannot be reached. Raises ModelNotFoundError.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _from_cache(repo, revision, file, OFFLINE)
    cache = partial(_from_cache, repo, revision, file, UNREACHABLE)
    sizes = _guard(repo, revision, lambda: _list(repo, revision), cache)
    if isinstance(sizes, Path):
        return sizes
    wanted = choose(repo, list(sizes), file)
    print(f"Fetching {repo} from the hub ({len(wanted)} files)", file=sys.stderr, flush=True)
    folder = _guard(repo, revision, lambda: _fetch(repo, revision, wanted), cache)
    return folder / wanted[0] if wanted[0].endswith(".gguf") and folder.is_dir() else folder


@dataclass(frozen=True)
class Listing:
    """What can be told of a hub model before it is fetched. `nbytes` of weights is None when the hub did not say."""

    name: str
    format: str
    config: Mapping[str, Any]
    nbytes: int | None


def glance(repo: str, revision: str | None = None, file: str | None = None) -> Listing:
    """The configuration and size of a hub model; of its files only config.json is fetched.

    Raises ModelNotFoundError, also when the hub is out of reach and the cache has no config.json.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached_listing(repo, revision, OFFLINE)
    work, cache = partial(_listing, repo, revision, file), partial(_cached_listing, repo, revision, UNREACHABLE)
    return _guard(repo, revision, work, cache)


def _listing(repo: str, revision: str | None, file: str | None) -> Listing:
    sizes = _list(repo, revision)
    weights = [name for name in choose(repo, list(sizes), file) if name.endswith((".safetensors", ".gguf"))]
    if CONFIG not in sizes:
        raise ModelNotFoundError(
            f"{repo} has no {CONFIG} to judge it by.", "Fetch it with `miaotui pull`, and ask again."
        )
    config = read_json(_fetch(repo, revision, [CONFIG]) / CONFIG)
    known = [sizes[name] for name in weights]
    total = sum(size for size in known if size is not None)
    return Listing(repo, weights[0].rsplit(".", 1)[-1], config, None if None in known else total)


def _cached_listing(repo: str, revision: str | None, why: str) -> Listing:
    folder = _snapshot(repo, revision)
    if folder is None or not (folder / CONFIG).is_file():
        _absent(repo, why)
    return Listing(repo, "safetensors", read_json(folder / CONFIG), None)


def _list(repo: str, revision: str | None) -> dict[str, int | None]:
    """The files of a repository with their sizes, where the hub tells them."""
    from huggingface_hub import HfApi

    # unlike list_repo_files, this is not retried
    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=20)
    return {sibling.rfilename: sibling.size for sibling in info.siblings or []}


def _fetch(repo: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    patterns = [re.sub(r"([\[*?])", r"[\1]", name) for name in wanted]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a full disk, which its error tells better
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))


def choose(repo: str, names: list[str], file: str | None) -> list[str]:
    """The files to fetch of those that a repository has; GGUF files (a split has several) come alone."""
    ggufs = [name for name in names if name.endswith(".gguf")]
    if file is not None:
        if file not in ggufs:
            raise ModelNotFoundError(f"{repo} has no file {file!r}.", _one_of(repo, ggufs))
        return _with_split(file, ggufs)
    text = [name for name in names if _TEXT.fullmatch(name)]
    weights = [name for name in names if _WEIGHTS.fullmatch(name)]
    weights = weights or [name for name in names if "/" not in name and name.endswith(".safetensors")]
    if weights:
        return text + ([SINGLE] if SINGLE in weights else weights)
    firsts = sorted({_with_split(name, ggufs)[0] for name in ggufs})
    if len(firsts) == 1:
        return _with_split(firsts[0], ggufs)
    if firsts:
        raise ModelNotFoundError(f"{repo} has {len(firsts)} GGUF models.", _one_of(repo, firsts))
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt")) for name in names):
        raise CheckpointError(
            f"{repo} has its weights only as pickles, which can run code when opened, so they are never read.",
            "Look for a revision with safetensors, or convert it with transformers where you trust it.",
        )
    raise ModelNotFoundError(f"{repo} has no .safetensors or .gguf weights.", "Choose another repository.")


SINGLE = "model.safetensors"


def _with_split(file: str, ggufs: list[str]) -> list[str]:
    """All files of the split that `file` belongs to, its first one first."""
    stem = re.sub(r"-\d{5}-of-(\d{5})\.gguf\Z", r"", file)
    if stem == file:
        return [file]
    return sorted(name for name in ggufs if name.startswith(f"{stem}-") and name[-14:] == file[-14:])


def _one_of(repo: str, ggufs: list[str]) -> str:
    listed = ", ".join(f"{repo}:{name}" for name in ggufs[:12])
    return f"Pass one of them: {listed}." if listed else "It has no GGUF files: pass the repository alone."


def _guard(repo: str, revision: str | None, work: Callable[[], T], unreachable: Callable[[], R]) -> T | R:
    """Run hub work; its errors become ours, and `unreachable` answers for a hub that cannot be reached."""
    from huggingface_hub import errors

    try:
        return work()
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo} is gated, and you have no access with this login.",
            f"Ask for it at https://huggingface.co/{repo}, then run `hf auth login` or set HF_TOKEN.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repo} has no revision {revision!r}.", "Leave @revision out.") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"The hub has no model {repo}, or it is private.",
            "Check the name; for a private one run `hf auth login` or set HF_TOKEN.",
        ) from error
    except Exception as error:
        if _is_network(error):
            return unreachable()
        if isinstance(error, OSError):
            raise ResourceError(f"{repo} could not be stored: {error}.", "Free some disk, or set HF_HOME.") from error
        raise


def _is_network(error: Exception) -> bool:
    """Whether the hub's client failed to reach it. Which HTTP library that client uses depends on its version."""
    from huggingface_hub import errors

    library = type(error).__module__.split(".")[0]
    ours = (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, ConnectionError)
    return isinstance(error, ours) or library.startswith(("httpx", "httpcore", "requests", "urllib3"))


def _from_cache(repo: str, revision: str | None, file: str | None, why: str) -> Path:
    """The snapshot of an earlier download."""
    return cached(repo, revision, file) or _absent(repo if file is None else f"{repo}:{file}", why)


def cached(repo: str, revision: str | None = None, file: str | None = None) -> Path | None:
    """A model that was downloaded before: its snapshot folder, or its file; None when its weights are not here."""
    folder = _snapshot(repo, revision)
    if folder is None:
        return None
    if file is not None:
        return folder / file if (folder / file).is_file() else None
    weights = (".safetensors", ".gguf", ".bin")
    return folder if any(path.suffix in weights for path in folder.iterdir()) else None


def _snapshot(repo: str, revision: str | None) -> Path | None:
    """A revision's folder in the hub's cache, by its documented layout (refs name snapshots)."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    name = revision or "main"
    reference = home / "refs" / name
    commit = reference.read_text().strip() if reference.is_file() else name
    folder = home / "snapshots" / commit
    return folder if folder.is_dir() else None


def _absent(what: str, why: str) -> NoReturn:
    raise ModelNotFoundError(
        f"{what} is not in the hub's cache, and {why}.",
        "Connect (unset HF_HUB_OFFLINE) and run `miaotui pull` once, or pass a folder or a .gguf file.",
    )
