"""Three texts that have nothing in common: to calibrate on, to choose by, and to confirm by.

What is chosen by a text looks better on it than elsewhere. So the last word is had on text that nothing was chosen by,
and neither of them is what the quantisers saw. A paragraph that stands in a text twice, as Python's help does, counts
once: it must not lie on both sides of a cut.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from miaotui.checkpoint.write import atomic_file
from miaotui.errors import UsageError
from miaotui.measure.quality_data import read_data

SHORT = 40
"""Characters of a piece that may stand in a text again."""
SELF = "self"
"""Calibration by what the model writes itself."""


@dataclass(frozen=True)
class Texts:
    """`calibrate` as a recipe's `calibration.source` has it; the other two are files. `name`: of all, for people."""

    calibrate: str
    choose: Path
    confirm: Path
    name: str


def prepare(data: str | None, calibration: str | None, folder: Path) -> Texts:
    """The first half of `data` to choose by, the second to confirm by; cut between lines into files in `folder`.

    Without `calibration` (a file, or `self`), and without `data`, the prose that Python carries is cut so that half of
    it is left to calibrate on; with `data` all of it is. Raises UsageError for what cannot be read, and for one file
    that is given as both.
    """
    if data is not None and calibration not in (None, SELF):
        assert calibration is not None
        if Path(data).expanduser().resolve() == Path(calibration).expanduser().resolve():
            raise UsageError(
                f"{data} is to be calibrated on and measured on: it would flatter what was fitted to it.",
                "Give two texts, or leave --calibration out.",
            )
    prose = read_data(None)
    whole = _once(str(prose.documents[0]), "\n\n")
    if data is None:
        name, lines = prose.name, whole
        kept, lines = _cut(lines, 1, 2) if calibration is None else ("", lines)
    else:
        jsonl = data.endswith((".jsonl", ".ndjson"))
        name, lines, kept = data, _once(_text(data), "\n" if jsonl else "\n\n"), whole
    choose, confirm = _cut(lines, 1, 2)
    suffix = ".jsonl" if data is not None and data.endswith((".jsonl", ".ndjson")) else ".txt"
    folder = folder / hashlib.sha256(f"{kept}\0{lines}".encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return Texts(
        calibration or str(_written(folder / "calibrate.txt", kept)),
        _written(folder / f"choose{suffix}", choose),
        _written(folder / f"confirm{suffix}", confirm),
        name,
    )


def _text(data: str) -> str:
    read_data(data)  # refuses what is not to be used, and says where
    return Path(data).read_text(encoding="utf-8-sig")


def _once(text: str, between: str) -> str:
    """Without the pieces that were there before; short ones, such as heads, stay."""
    seen: set[str] = set()
    kept = []
    for piece in text.split(between):
        if len(piece) < SHORT or piece not in seen:
            kept.append(piece)
            seen.add(piece)
    return between.join(kept)


def _cut(text: str, part: int, parts: int) -> tuple[str, str]:
    """Two pieces of whole lines, the first with about part/parts of it."""
    at = text.find("\n", len(text) * part // parts) + 1
    if at == 0:
        raise UsageError("The text is one line, which cannot be cut in two.", "Give --data with more lines.")
    return text[:at], text[at:]


def _written(path: Path, text: str) -> Path:
    if not path.is_file():
        with atomic_file(path) as file:
            file.write(text.encode())
    return path
