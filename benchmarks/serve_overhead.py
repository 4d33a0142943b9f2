"""What serving costs: output tokens/s over HTTP against `LLM.generate` on the same work, taken in turn.

    python -m benchmarks.serve_overhead [--model demo] [--streams 32] [--rounds 5] [--input-len 128] [--output-len 128]

A round answers the same new random prompts in four ways, greedily and to their full length:

| way | |
|---|---|
| `generate` | `LLM.generate(prompts)` in a process of its own |
| `stream` | the same engine, asked for each step's text, as a server has to; no HTTP |
| `whole` | the server, over HTTP, each answer in one piece |
| `http` | the server, over HTTP, streamed: `miaotui bench serve` |

Load generator and server share the same cores; whoever waits is stopped (SIGSTOP). Reported are the medians over
rounds, ratios within a round, and the CPU seconds of each part: that is where the rest goes. Besides: the CPU that an
idle server uses, and the time from start to /ready. Prints JSON; progress goes to stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.serve_process import Cpu, Server, serving, start, wait_ready
from miaotui import LLM, SamplingParams
from miaotui.hardware.sensors import Watch
from miaotui.measure.serving_data import Dataset, LocalTokenizer, samples

SEED = 20240229
OTHER = 1_000_000
"""What seeds of the second way of an engine are apart from those of the first."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_overhead", description=(__doc__ or "")[:90])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--idle-seconds", type=float, default=20)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.in_process:
        return _answer_in_process(options)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        report = {"model": options.model, "streams": options.streams, "cores": sorted(os.sched_getaffinity(0))}
        report |= {"input_len": options.input_len, "output_len": options.output_len}
        report["start_to_ready_s"] = _starts(options, log) if options.starts else None
        watch = Watch()
        with serving([options.model], log=log) as server:
            report["idle_core_share"] = _idle(server, options.idle_seconds) if options.idle_seconds else None
            report |= _rounds(options, server)
        report["load_average"] = watch.read().load_average
    print(json.dumps(report, indent=2))
    return 0


# -- start, and idling -------------------------------------------------------------------------------------
def _starts(options: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Seconds from starting the process to /ready, after one start that does not count."""
    times = []
    for _ in range(options.starts + 1):
        began = time.perf_counter()
        server = start([options.model], log=log)
        wait_ready(server, log)
        times.append(time.perf_counter() - began)
        server.process.terminate()
        server.process.wait(60)
        _tell(f"start to /ready: {times[-1]:.3f} s")
    return {"median": statistics.median(times[1:]), "all": times[1:]}


def _idle(server: Server, seconds: float) -> float:
    """Cores that the server uses when nobody asks it anything."""
    time.sleep(2)
    before, began = server.cpu(), time.perf_counter()
    time.sleep(seconds)
    spent, passed = server.cpu() - before, time.perf_counter() - began
    _tell(f"idle: {(spent.loop + spent.rest) / passed:.4f} of a core")
    return (spent.loop + spent.rest) / passed


# -- rounds ------------------------------------------------------------------------------------------------
def _rounds(options: argparse.Namespace, server: Server) -> dict[str, Any]:
    """All ways in turn, the first round as a warm-up; from round to round in the opposite order."""
    ways: dict[str, list[dict[str, float]]] = {"generate": [], "stream": [], "whole": [], "http": []}
    with _InProcess(options) as engine:
        for number in range(options.rounds + 1):
            for way in list(ways)[:: 1 if number % 2 else -1]:
                found = _measure(way, options, server, engine, SEED + number)
                if number:
                    ways[way].append(found)
                    _tell(f"round {number} {way}: {found['output_tokens_per_s']:.1f} output tokens/s")
    plain = [run["output_tokens_per_s"] for run in ways["generate"]]
    report: dict[str, Any] = {}
    for way, runs in ways.items():
        medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        shares = [run["output_tokens_per_s"] / one for run, one in zip(runs, plain, strict=True)]
        report[way] = {**medians, "of_generate": statistics.median(shares), "of_generate_rounds": shares}
    streamed = report["http"]
    around = streamed["loop_cpu_s"] + streamed["generator_cpu_s"]
    report["share_of_cpu_around_the_engine"] = around / (around + streamed["compute_cpu_s"])
    return report


def _measure(way: str, options: argparse.Namespace, server: Server, engine: _InProcess, seed: int) -> dict[str, float]:
    """Tokens/s and CPU seconds of one run. Within an engine no prompt comes twice: a known prefix would help."""
    if way in ("generate", "stream"):
        server.pause()
        found = engine.answer(way, seed if way == "generate" else seed + OTHER)
        server.resume()
        return found
    with _Recorder(server) as recorder:
        if way == "http":
            began, ended, found = _streamed(options, server, seed)
        else:
            began, ended, found = _whole(options, server, seed + OTHER)
    spent = recorder.between(began, ended)
    return {**found, "loop_cpu_s": spent.loop, "compute_cpu_s": spent.rest}


class _Recorder:
    """Writes down a server's CPU time twenty times a second, for intervals that are only known afterwards."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._seen: list[tuple[float, Cpu]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._record)

    def _record(self) -> None:
        while not self._over.wait(0.05):
            self._seen.append((time.perf_counter(), self._server.cpu()))

    def between(self, began: float, ended: float) -> Cpu:
        """CPU time of an interval of `time.perf_counter`, which all processes share."""
        first, last = (min(self._seen, key=lambda seen: abs(seen[0] - moment))[1] for moment in (began, ended))
        return last - first

    def __enter__(self) -> _Recorder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.1)
        self._over.set()
        self._thread.join()


def _streamed(options: argparse.Namespace, server: Server, seed: int) -> tuple[float, float, dict[str, float]]:
    """By the load generator in its own process. Its trial request is not in the interval that is returned."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "miaotui.cli.main", "bench", "serve", "--base-url", server.url]
        command += ["--random-input-len", str(options.input_len), "--random-output-len", str(options.output_len)]
        command += ["--num-prompts", str(options.streams), "--seed", str(seed), "--temperature", "0"]
        command += ["--tokenizer", options.model, "--save-result", "--save-detailed"]
        command += ["--result-dir", folder, "--result-filename", "report.json"]
        subprocess.run(command, check=True, capture_output=True)
        report = json.loads(Path(folder, "report.json").read_text())
    assert report["failed"] == 0, report["failures"]
    began = min(report["start_times"])
    found = {
        "output_tokens_per_s": report["output_throughput"],
        "seconds": report["duration"],
        "generator_cpu_s": report["client_cpu_seconds"],
        "median_ttft_ms": report["median_ttft_ms"],
        "median_tpot_ms": report["median_tpot_ms"],
    }
    return began, began + report["duration"], found


def _whole(options: argparse.Namespace, server: Server, seed: int) -> tuple[float, float, dict[str, float]]:
    """Not streamed, by this process."""
    fields = {"max_tokens": options.output_len, "temperature": 0, "ignore_eos": True}
    bodies = [{"prompt": prompt, **fields} for prompt in _prompts(options, seed)]

    async def ask_all() -> int:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            return sum(await asyncio.gather(*(ask(session, body) for body in bodies)))

    async def ask(session: aiohttp.ClientSession, body: dict[str, Any]) -> int:
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            return int((await response.json())["usage"]["completion_tokens"])

    cpu, began = time.process_time(), time.perf_counter()
    tokens = asyncio.run(ask_all())
    seconds = time.perf_counter() - began
    found = {"output_tokens_per_s": tokens / seconds, "seconds": seconds}
    return began, began + seconds, {**found, "generator_cpu_s": time.process_time() - cpu}


def _prompts(options: argparse.Namespace, seed: int) -> list[str]:
    """Those that `miaotui bench serve --seed` sends."""
    dataset = Dataset(input_len=options.input_len, output_len=options.output_len)
    drawn = samples(dataset, options.streams, seed, LocalTokenizer(options.model), chat=False)
    return [str(sample.prompt) for sample in asyncio.run(drawn)]


# -- without a server ----------------------------------------------------------------------------------------
class _InProcess:
    """`LLM` in a process of its own, stopped while it is not asked."""

    def __init__(self, options: argparse.Namespace) -> None:
        flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in _WORK]
        command = [sys.executable, "-m", "benchmarks.serve_overhead", "--in-process", *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self, way: str, seed: int) -> dict[str, float]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.send_signal(signal.SIGCONT)
        print(way, seed, file=self._process.stdin, flush=True)
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        self._process.send_signal(signal.SIGSTOP)
        return found

    def __enter__(self) -> _InProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


_WORK = ("model", "streams", "input_len", "output_len")
"""Options that both processes need."""


def _answer_in_process(options: argparse.Namespace) -> int:
    """Answer `WAY SEED` lines with a line of figures each."""
    params = SamplingParams(temperature=0.0, max_tokens=options.output_len, ignore_eos=True)
    with LLM(options.model) as llm:
        for line in sys.stdin:
            way, seed = line.split()
            prompts = _prompts(options, int(seed))
            cpu, began = time.process_time(), time.perf_counter()
            tokens = _generate(llm, prompts, params) if way == "generate" else _stream(llm, prompts, params)
            seconds = time.perf_counter() - began
            found = {"output_tokens_per_s": tokens / seconds, "seconds": seconds}
            print(json.dumps({**found, "compute_cpu_s": time.process_time() - cpu}), flush=True)
    return 0


def _generate(llm: LLM, prompts: list[str], params: SamplingParams) -> int:
    return sum(len(output.outputs[0].token_ids) for output in llm.generate(prompts, params))


def _stream(llm: LLM, prompts: list[str], params: SamplingParams) -> int:
    for i, prompt in enumerate(prompts):
        ids = llm.tokenizer.encode(prompt, parse_special=True)
        llm.engine.add_request(ids, params, request_id=f"r{i}", stream=True)
    tokens = 0
    while llm.engine.has_work:
        tokens += sum(len(output.outputs[0].token_ids) for output in llm.engine.step())
    return tokens


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
