"""English that every Python carries: the manual's topics, docstrings of the standard library, IDLE's notes."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from miaotui.compress.text.sources import prose

LEAST = 80
"""Characters of a docstring that is worth reading."""
NOTES = (
    "idlelib/NEWS.txt",
    "idlelib/NEWS2x.txt",
    "idlelib/HISTORY.txt",
    "idlelib/README.txt",
    "email/architecture.rst",
)


def documents(seed: int = 0) -> list[str]:
    """All of it, each document once, shuffled."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [row.text for row in prose()]
    found += [text for name in NOTES if (root / name).exists() for text in _pieces((root / name).read_text("utf-8"))]
    found += _docstrings(root)
    unique = list(dict.fromkeys(text for text in found if text.strip()))
    random.Random(seed).shuffle(unique)
    return unique


def _docstrings(root: Path) -> Iterator[str]:
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(file.parts):
            continue
        try:
            tree = ast.parse(file.read_text("utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= LEAST:
                    yield text


def _pieces(text: str) -> list[str]:
    """A long file in pieces of some paragraphs, so that the held-out share has something of each."""
    paragraphs = re.split(r"\n\s*\n", text)
    return ["\n\n".join(paragraphs[i : i + 8]) for i in range(0, len(paragraphs), 8)]
