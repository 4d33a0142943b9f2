"""The textbook example, from its first text to its table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "textbook" / "run.py"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_textbook_case_runs_from_end_to_end(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "-o", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    rows = found["rows"]
    assert rows["original"]["parameters"] > 9e6
    assert 0.9e6 < rows["int4"]["parameters"] < 1.2e6
    assert found["times_fewer_bytes"] >= 10
    assert found["won_back_by_the_teacher"] > 0
    assert rows["distilled-1m"]["perplexity"] < rows["pruned-1m"]["perplexity"]
    assert rows["int4"]["perplexity"] < 1.05 * rows["distilled-1m"]["perplexity"]
    assert "| int4 |" in done.stdout
