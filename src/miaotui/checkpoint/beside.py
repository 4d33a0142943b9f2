"""What lies with a model without being read by it: its card, its README, its report.

In a folder they have their plain names; beside a GGUF file, which may have neighbours, they begin with its own:
`fast.gguf` has `fast.card.json`.
"""

from __future__ import annotations

from pathlib import Path

CARD = "card.json"
README = "README.md"
REPORT = "report.html"


def beside(artefact: Path, name: str) -> Path:
    """Where the file called `name` of an artefact belongs: a folder, or a `.gguf` file, there or yet to come."""
    if artefact.suffix.lower() == ".gguf" and not artefact.is_dir():
        return artefact.with_name(f"{artefact.stem}.{name}")
    return artefact / name


def find_beside(artefact: Path, name: str) -> Path | None:
    """That file where it is; a GGUF file that is alone in its folder also has what lies there under its plain name."""
    own = beside(artefact, name)
    if own.is_file():
        return own
    shared = artefact.parent / name
    if artefact.is_file() and shared.is_file() and len(list(artefact.parent.glob("*.gguf"))) == 1:
        return shared
    return None
