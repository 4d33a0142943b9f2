"""Recipes beside each other, and beside llm-compressor's: perplexity, KL, seconds and memory of a whole run each.

    python -m benchmarks.quantise [--recipes NAME,...] [--peer PYTHON] [--cached] [--rounds N] [--output FILE]

The model is the demo's weights as bfloat16 (`benchmarks.dense_folder`); beside that folder lie `calibration.txt` and
`held_out.txt`. Every run is a process of its own, its memory the highest that the system saw of it; the first one
calibrates, the others find the statistics. With `--peer`, an environment that has llm-compressor, its GPTQ runs in
turn with ours, and what it wrote is measured by our engine too. With
`--cached`, only times: GPTQ from nothing, then again and with other bits on the statistics that it left, and their
share of the first. Nothing else should be running.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.dense_folder import DEFAULT, dense_folder

HERE = Path(__file__).parent
RECIPES: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "hqq": {"method": "hqq"},
    "awq+gptq": {"method": "awq+gptq"},
    "rotate+gptq": {"method": "rotate+gptq"},
    "gptq propagated": {"method": "gptq", "propagate": True},
    "awq+gptq propagated": {"method": "awq+gptq", "propagate": True},
    "awq+gptq propagated polished": {
        "method": "awq+gptq",
        "propagate": True,
        "options": {"gptq": {"polish": 1}},
    },
    "rotate+gptq propagated": {"method": "rotate+gptq", "propagate": True},
    "rotate+gptq propagated polished": {
        "method": "rotate+gptq",
        "propagate": True,
        "options": {"gptq": {"polish": 1}},
    },
    "gptq+scales": {"method": "gptq+scales"},
    "awq+gptq+scales": {"method": "awq+gptq+scales"},
    "awq+gptq+scales propagated": {"method": "awq+gptq+scales", "propagate": True},
    "gptq+qat": {"method": "gptq+qat"},
    "rotate+gptq+qat": {"method": "rotate+gptq+qat"},
    "rtn w3": {"method": "rtn", "scheme": "w3g64-sym"},
    "gptq w3": {"method": "gptq", "scheme": "w3g64-sym"},
    "awq+gptq w3": {"method": "awq+gptq", "scheme": "w3g64-sym"},
    "gptq w4g32": {"method": "gptq", "scheme": "w4g32-sym"},
    "w8a8": {"method": "gptq", "scheme": "w8a8"},
    "smooth w8a8": {"method": "smooth+gptq", "scheme": "w8a8"},
    "fp8": {"method": "fp8", "scheme": "fp8"},
}
BASE = {"scheme": "w4g64-sym", "calibration": {"windows": 64, "window": 512}}


def main() -> None:
    asked = arguments()
    model = dense_folder()
    with tempfile.TemporaryDirectory(dir=DEFAULT.parent, prefix="quantise-") as work:
        if asked.cached:
            print(json.dumps(cached(model, Path(work), asked.rounds), indent=2))
            return
        rows = [row for name in asked.recipes for row in [ours(model, name, Path(work), asked)]]
        if asked.peer:
            rows += in_turn(model, Path(work), asked)
    report = {"rows": rows, "threads": os.environ.get("OMP_NUM_THREADS"), "cores": os.cpu_count()}
    if asked.output:
        asked.output.write_text(json.dumps(report, indent=2))
    print(table(rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", type=lambda text: text.split(","), default=list(RECIPES))
    parser.add_argument("--peer", help="Python of an environment with llm-compressor")
    parser.add_argument("--cached", action="store_true", help="time a second scheme on known statistics, and no more")
    parser.add_argument("--rounds", type=int, default=1, help="turns of us and the peer, or of --cached")
    parser.add_argument("--eval-windows", type=int, default=None)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def ours(model: Path, name: str, work: Path, asked: argparse.Namespace, *, anew: bool = False) -> dict[str, Any]:
    """One recipe: compressed, and measured against the original on the text that was held out."""
    row = compressed(model, name, work, anew=anew)
    row |= quality(model, work / "ours", asked)
    print(line(row), file=sys.stderr, flush=True)
    return row


def compressed(model: Path, name: str, work: Path, *, anew: bool) -> dict[str, Any]:
    """One recipe: seconds, stages, memory. `anew`: with no statistics there."""
    out, home = work / "ours", work / ("anew" if anew else "home")
    values = {**BASE, **RECIPES[name]}
    values["calibration"] = {**BASE["calibration"], "source": str(DEFAULT.parent / "calibration.txt")}  # type: ignore[dict-item]
    (work / "recipe.yaml").write_text(yaml.safe_dump(values))
    shutil.rmtree(out, ignore_errors=True)
    if anew:
        shutil.rmtree(home, ignore_errors=True)
    home.mkdir(exist_ok=True)
    argv = [*MIAOTUI, "compress", str(model), "--recipe", str(work / "recipe.yaml"), "-o", str(out), "--json"]
    seconds, peak, printed = run(argv, {"MIAOTUI_HOME": str(home)})
    return {"name": name, "seconds": seconds, "peak_bytes": peak, "stages": json.loads(printed)["seconds"]}


def cached(model: Path, work: Path, rounds: int) -> dict[str, Any]:
    """Whole processes: GPTQ from nothing, then on its statistics; medians, and the share that a second scheme takes."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for _ in range(rounds):
        shutil.rmtree(work / "home", ignore_errors=True)
        for label, name in (("from nothing", "gptq"), ("again", "gptq"), ("second scheme", "gptq w3")):
            row = compressed(model, name, work, anew=False)
            print(f"{label:14} {row['seconds']:6.1f} s  {row['stages']}", file=sys.stderr, flush=True)
            rows.setdefault(label, []).append(row)
    seconds = {label: statistics.median(row["seconds"] for row in found) for label, found in rows.items()}
    share = {label: round(value / seconds["from nothing"], 3) for label, value in seconds.items()}
    return {"seconds": seconds, "share": share, "rows": rows}


MIAOTUI = [sys.executable, "-m", "miaotui"]


def quality(model: Path, artefact: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """By our engine in float32, against the original in float32, on the same windows."""
    argv = [
        *MIAOTUI, "evaluate", str(artefact), "--reference", str(model), "--compute", "fp32", "--json",
        "--data", str(DEFAULT.parent / "held_out.txt"),
    ]  # fmt: skip
    if asked.eval_windows:
        argv += ["--max-windows", str(asked.eval_windows)]
    _, _, printed = run(argv, {})
    return {"quality": json.loads(printed)}


def run(argv: list[str], environment: dict[str, str]) -> tuple[float, int, str]:
    """Wall seconds, peak bytes and stdout of a process. Raises SystemExit with its stderr where it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, **environment})
        assert process.stdout is not None
        printed = process.stdout.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(argv)} failed:\n{errors.read().decode()[-3000:]}")
    return time.perf_counter() - started, usage.ru_maxrss << 10, printed


# -- the peer ------------------------------------------------------------------------------------------------------
def in_turn(model: Path, work: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Our GPTQ and theirs, each from nothing, in turns; medians."""
    rows: dict[str, list[dict[str, Any]]] = {"gptq from nothing": [], "llm-compressor gptq": []}
    for _ in range(asked.rounds):
        rows["llm-compressor gptq"].append(theirs(model, work, asked))
        rows["gptq from nothing"].append(ours(model, "gptq", work, asked, anew=True))
    return [
        {
            **found[-1],
            "name": name,
            "seconds": statistics.median(row["seconds"] for row in found),
            "each": [row["seconds"] for row in found],
        }
        for name, found in rows.items()
    ]


def theirs(model: Path, work: Path, asked: argparse.Namespace) -> dict[str, Any]:
    out = work / "theirs"
    shutil.rmtree(out, ignore_errors=True)
    windows = work / "windows.json"
    if not windows.exists():
        windows.write_text(json.dumps(calibration_ids(model)))
    argv = [asked.peer, str(HERE / "quantise_peer.py"), str(model), str(windows), str(out)]
    seconds, peak, printed = run(argv, {})
    row = {"name": "llm-compressor gptq", "seconds": seconds, "peak_bytes": peak, **quality(model, out, asked)}
    row["versions"] = json.loads(printed.strip().splitlines()[-1])
    print(line(row), file=sys.stderr, flush=True)
    return row


def calibration_ids(model: Path) -> list[list[int]]:
    """The very windows that ours sees."""
    from miaotui.checkpoint import open_checkpoint
    from miaotui.compress.recipe import Calibration
    from miaotui.compress.text.data import windows
    from miaotui.model.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(model))
    text = windows(tokenizer, Calibration(str(DEFAULT.parent / "calibration.txt")))
    return [[int(i) for i in row] for row in text.tokens]


# -- words ---------------------------------------------------------------------------------------------------------
def line(row: dict[str, Any]) -> str:
    quality = row["quality"]
    perplexity, ratio = quality["perplexity"], quality["perplexity_ratio"]
    return (
        f"{row['name']:32} perplexity {perplexity:7.3f}  ratio {ratio:.4f}  KL {quality['kl_mean']:.4f}"
        f"  {row['seconds']:6.1f} s  {row['peak_bytes'] / 1e9:.2f} GB"
    )


def table(rows: list[dict[str, Any]]) -> str:
    return "\n".join(line(row) for row in rows)


if __name__ == "__main__":
    main()
