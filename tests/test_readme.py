"""The READMEs cannot lie: their commands and their Python run, their links and targets exist, both say the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


COMMANDS = "".join(blocks(ENGLISH, "bash")).splitlines()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A PATH on which `miaotui` is this checkout."""
    folder = tmp_path_factory.mktemp("bin")
    script = folder / "miaotui"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m miaotui.cli.main "$@"\n')
    script.chmod(0o755)
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, environment: dict[str, str], demo_gguf: Path) -> None:
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("code", blocks(ENGLISH, "python"))
def test_python(code: str, environment: dict[str, str], demo_gguf: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert "leak" not in done.stderr  # of native objects, when Python ends


def test_both_languages_give_the_same_commands_and_code() -> None:
    for language in ("bash", "python", "console"):
        assert blocks(ENGLISH, language) == blocks(CHINESE, language)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_links_and_targets_exist(text: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)`", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_every_command_is_mentioned() -> None:
    from miaotui.cli.main import COMMANDS as TABLE

    for name in TABLE:
        assert f"miaotui {name} " in ENGLISH
