"""Pruning measured on the demo model: what each kind costs in perplexity, bytes and time.

    python -m benchmarks.prune [--only NAME ...] [--windows 64] [--eval-windows 16] [--output FILE]

SmolLM2-135M in bfloat16 (`benchmarks.dense_folder`), calibrated on the first three quarters of WikiText-2's validation
text and measured on its last quarter. Each line is printed as it comes; the file has all of them. Ends with 1 where
Wanda or SparseGPT is not far below magnitude, or SparseGPT above Wanda.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.dense_folder import DEFAULT, dense_folder
from miaotui.compress.methods.sparsity import Sparsity
from miaotui.compress.pruning.run import Cut, PruneSettings, prune
from miaotui.compress.recipe import Calibration
from miaotui.hardware.detect import detect
from miaotui.measure.quality import evaluate
from miaotui.measure.quality_data import Cut as Windows

HALF, PATTERN = Sparsity.parse("50%"), Sparsity.parse("2:4")
KINDS: dict[str, dict[str, Any]] = {
    "magnitude 50%": {"sparsity": HALF, "method": "magnitude"},
    "wanda 50%": {"sparsity": HALF, "method": "wanda"},
    "sparsegpt 50%": {"sparsity": HALF, "method": "sparsegpt"},
    "wanda 2:4": {"sparsity": PATTERN, "method": "wanda"},
    "sparsegpt 2:4": {"sparsity": PATTERN, "method": "sparsegpt"},
    "26 of 30 blocks, by similarity": {"cut": Cut(blocks="26")},
    "26 of 30 blocks, by KL": {"cut": Cut(blocks="26", by="kl")},
    "75% of channels": {"cut": Cut(channels="75%")},
    "75% of channels, not corrected": {"cut": Cut(channels="75%", correct=False)},
    "2 of 3 groups of heads": {"cut": Cut(groups="2")},
    "75% of hidden dimensions": {"cut": Cut(hidden="75%")},
}
FAR = 0.7
"""Of magnitude's perplexity; Wanda and SparseGPT must lie below it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens, to calibrate on")
    parser.add_argument("--eval-windows", type=int, default=16, help="of 1024 tokens, to measure on")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local/prune.json"))
    args = parser.parse_args()
    original, texts = dense_folder(), DEFAULT.parent
    calibration = Calibration(str(texts / "calibration.txt"), args.windows)
    cut, held_out = Windows(most=args.eval_windows), str(texts / "held_out.txt")
    rows = [{"kind": "original", **quality(original, held_out, cut)}]
    show(rows[-1])
    for kind in args.only:
        with TemporaryDirectory(dir=texts) as folder:
            out = Path(folder) / "pruned"
            started = time.perf_counter()
            report = asdict(prune(str(original), PruneSettings(calibration=calibration, **KINDS[kind]), out))
            seconds = time.perf_counter() - started
            rows.append({"kind": kind, "seconds": seconds, **quality(out, held_out, cut), "report": report})
            shutil.rmtree(out)
        show(rows[-1])
    machine = {"cpu": detect().cpu, "load": Path("/proc/loadavg").read_text().split()[:3]}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2, default=str))
    return 0 if as_expected({row["kind"]: row["perplexity"] for row in rows}) else 1


def quality(model: Path, text: str, cut: Windows) -> dict[str, Any]:
    found = evaluate(str(model), text, cut=cut)
    return {key: found[key] for key in ("perplexity", "stderr", "perplexity_interval", "tokens")}


def show(row: dict[str, Any]) -> None:
    """One line."""
    text = f"{row['kind']:32} perplexity {row['perplexity']:9.2f} ± {row['stderr']:.2f}"
    if "report" in row:
        report = row["report"]
        size = f"{report['bytes'] / 1e6:.1f} MB ({report['dense_bytes'] / 1e6:.1f} dense)"
        text += f"  {report['parameters'] / 1e6:.1f} M, {size}, {row['seconds']:.0f} s"
        text += "" if report["kl_together"] is None else f", KL {report['kl_together']:.3f} without {report['removed']}"
    print(text, flush=True)


def as_expected(found: dict[str, float]) -> bool:
    """Of those that were measured."""
    plain, wanda, best = (found.get(f"{method} 50%") for method in ("magnitude", "wanda", "sparsegpt"))
    far = all(other is None or plain is None or other < FAR * plain for other in (wanda, best))
    return far and (wanda is None or best is None or best <= wanda)


if __name__ == "__main__":
    sys.exit(main())
