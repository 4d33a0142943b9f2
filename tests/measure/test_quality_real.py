"""The demo model and its weights rounded to 4 bits, by `evaluate` and by transformers with compressed-tensors, all in
float32: perplexity and Kullback-Leibler divergence on the same windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

torch = pytest.importorskip("torch", reason="the figures to compare with come from PyTorch and transformers")
transformers = pytest.importorskip("transformers", reason="the figures to compare with come from transformers")
pytest.importorskip("compressed_tensors", reason="transformers reads the rounded model with compressed-tensors")

from benchmarks.dense_folder import dense_folder  # noqa: E402
from miaotui.compress.writing.folder import write_folder  # noqa: E402
from miaotui.measure import quality  # noqa: E402
from miaotui.measure.quality import Reference, evaluate  # noqa: E402
from miaotui.measure.quality_data import Cut, cut_windows, read_data  # noqa: E402
from miaotui.measure.scoring import Opened  # noqa: E402
from tests.compress.toys import solve  # noqa: E402

CUT = Cut(256, most=6)


@pytest.fixture(scope="module")
def original(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dense_folder(tmp_path_factory.mktemp("quality") / "original")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights of models that vanish are not kept in the user's folder."""
    monkeypatch.setenv("MIAOTUI_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def rounded(original: Path) -> Path:
    folder = original.parent / "rounded"
    folder.mkdir()
    write_folder(solve(original, "w4g64-sym", norms=False), folder)
    return folder


@pytest.fixture(scope="module")
def theirs(original: Path, rounded: Path) -> dict[str, Any]:
    """Per token, by transformers in float32: both models' -log p, and the divergence."""
    opened = Opened.of(str(original))
    windows, _ = cut_windows(read_data(None), CUT, opened.tokenizer, opened.render)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (original, rounded)
    ]
    found: dict[str, list[Any]] = {"original": [], "rounded": [], "kl": []}
    with torch.inference_mode():
        for window in windows:
            ids = torch.tensor(window.tokens.astype(np.int64))[None]
            log_p, log_q = (model(ids).logits[0, :-1].log_softmax(-1) for model in models)
            for name, rows in (("original", log_p), ("rounded", log_q)):
                found[name].append(-rows.gather(1, ids[0, 1:, None])[:, 0])
            found["kl"].append((log_p.exp() * (log_p - log_q)).sum(-1))
    assert sum(map(len, found["kl"])) == 6 * 255
    return {name: torch.cat(rows).double() for name, rows in found.items()}


def test_perplexity_and_divergence_are_theirs(original: Path, rounded: Path, theirs: dict[str, Any]) -> None:
    report = evaluate(str(rounded), None, cut=CUT, settings=quality.EXACT, reference=Reference(str(original)))
    assert report["perplexity"] == pytest.approx(theirs["rounded"].mean().exp().item(), rel=2e-3)
    assert report["reference"]["perplexity"] == pytest.approx(theirs["original"].mean().exp().item(), rel=2e-3)
    assert report["perplexity_ratio"] > 1.05, "there is something to measure"
    assert report["kl_mean"] == pytest.approx(theirs["kl"].mean().item(), rel=0.02)
    assert report["kl_p99"] == pytest.approx(theirs["kl"].quantile(0.99).item(), rel=0.02)


def test_as_it_is_run_by_default(rounded: Path, theirs: dict[str, Any]) -> None:
    report = evaluate(str(rounded), None, cut=CUT)
    assert report["perplexity"] == pytest.approx(theirs["rounded"].mean().exp().item(), rel=0.02)
