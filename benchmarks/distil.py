"""What a short distillation wins back after a cut: 4 of SmolLM2-135M's 30 blocks go, the original teaches what is left.

    python -m benchmarks.distil [--steps 32] [--eval-windows 8] [--folder FOLDER] [--output FILE]

Trained on the first three quarters of WikiText-2's validation text, measured on its last quarter. What an interrupted
run left in --folder is taken up. Ends with 1 where less than 60% of the perplexity lost by the cut is won back.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.dense_folder import DEFAULT, dense_folder
from miaotui.compress.pruning.run import Cut, PruneSettings, prune
from miaotui.compress.recipe import Calibration
from miaotui.compress.train.distil import Request, distil
from miaotui.compress.train.settings import Settings, Task, Terms
from miaotui.hardware.detect import detect
from miaotui.measure.quality import evaluate
from miaotui.measure.quality_data import Cut as Windows

BLOCKS = 26
WON_BACK = 0.6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=32, help="of 4 windows of 256 tokens")
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--eval-windows", type=int, default=8, help="of 1024 tokens, to measure on")
    parser.add_argument("--folder", type=Path, default=DEFAULT.parent / "distil", help="for the models")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local/distil.json"))
    args = parser.parse_args()
    original, texts = dense_folder(), DEFAULT.parent
    pruned, taught = args.folder / "pruned", args.folder / "taught"
    args.folder.mkdir(parents=True, exist_ok=True)
    if not pruned.exists():
        calibration = Calibration(str(texts / "calibration.txt"), 16)
        prune(str(original), PruneSettings(calibration=calibration, cut=Cut(blocks=str(BLOCKS))), pruned)
    if not taught.exists():
        request = Request(str(pruned), str(original))
        distil(request, taught, settings(args, texts / "calibration.txt"), say=lambda line: print(line, flush=True))
    report = json.loads((taught / "training.json").read_text())
    found = {"training": {key: report[key] for key in ("steps", "tokens", "seconds", "tokens_per_second", "settings")}}
    for name, model in (("original", original), ("pruned", pruned), ("taught", taught)):
        started = time.perf_counter()
        measured = evaluate(str(model), str(texts / "held_out.txt"), cut=Windows(most=args.eval_windows))
        found[name] = {key: measured[key] for key in ("perplexity", "stderr", "tokens")}
        seconds = time.perf_counter() - started
        print(
            f"{name:9} perplexity {measured['perplexity']:8.3f} ± {measured['stderr']:.3f} ({seconds:.0f} s)",
            flush=True,
        )
    return finish(found, args.output)


def settings(args: argparse.Namespace, text: Path) -> Settings:
    return Settings(
        tasks=(Task(str(text)),),
        terms=Terms(kl=1.0),
        window=256,
        steps=args.steps,
        batch=4,
        rate=args.rate,
        warmup=max(1, args.steps // 6),
        held_out=0.01,
        evaluate_every=max(1, args.steps // 2),
        save_every=8,
    )


def finish(found: dict[str, Any], output: Path) -> int:
    """Add what was won back, write it all, and say whether it is enough."""
    before, cut, after = (found[name]["perplexity"] for name in ("original", "pruned", "taught"))
    found["won_back"] = (cut - after) / (cut - before)
    found["machine"] = {"cpu": detect().cpu, "load": Path("/proc/loadavg").read_text().split()[:3]}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=2, default=str))
    print(f"won back {found['won_back']:.0%} of the lost perplexity")
    return 0 if found["won_back"] >= WON_BACK else 1


if __name__ == "__main__":
    sys.exit(main())
