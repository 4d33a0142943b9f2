"""`benchmarks.peers` without any peer: options, weights, processes, the order of runs, the report."""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.peer_kit import models, report
from miaotui import LLM, SamplingParams
from miaotui.backends.ops import Attention
from miaotui.checkpoint import open_checkpoint
from miaotui.hardware.ceilings import Ceilings
from miaotui.measure.peers.alone.peer_runners.worker import Config, Generation
from miaotui.measure.peers.environments import PEERS, Peer, PeerUnavailableError, install, wheel_requirements
from miaotui.measure.peers.pairs import REGIMES, Duel, Moment, Pair, Plan, Run, same_start, summary
from miaotui.measure.peers.process import Worker
from miaotui.measure.work import Cost
from miaotui.model.spec import LayerSpec, ModelSpec
from tests.benchmarks.fake_runner import DIES, FAILS

QUIET, LOUD = Moment(50e9, 2e12, 0.0), Moment(50e9, 2e12, 0.5)
LIMITS = Ceilings(threads=2, working_set=90_000_000, bandwidth=1e9, int8=1e9, fp32=2e11)


class Fake:
    """An engine that takes `seconds` a token on a clock that all fakes share, and writes down that it was asked."""

    def __init__(self, name: str, seconds: float, clock: list[float], log: list[Any]) -> None:
        self.name, self.seconds, self.clock, self.log = name, seconds, clock, log

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        self.log.append((self.name, [list(prompt) for prompt in prompts], new_tokens))
        arrivals = [self.seconds * (step + 1) for step in range(new_tokens)]
        self.clock[0] += arrivals[-1]
        return Generation(arrivals[-1], [[7] * new_tokens for _ in prompts], arrivals if len(prompts) == 1 else [])

    def cpu_seconds(self) -> float:
        return 0.0


def duel(plan: Plan, moment: Moment = QUIET) -> tuple[Duel, list[Any]]:
    """Ours takes 1 ms a token and the peer 3; the log has every call, `probe` for a probe."""
    clock: list[float] = [0.0]
    log: list[Any] = []

    def probe() -> Moment:
        log.append("probe")
        return moment

    ours, peer = Fake("ours", 0.001, clock, log), Fake("peer", 0.003, clock, log)
    return Duel(ours, peer, range(1_000_000), probe, plan, lambda: clock[0]), log


# -- the order of runs ---------------------------------------------------------------------------------------
def test_engines_alternate_with_a_probe_around_every_run() -> None:
    match, log = duel(Plan(seconds=0.0, least=3, most=9))
    (pairs,) = match.measure([REGIMES["decode-1@16"]])
    names = [entry if entry == "probe" else entry[0] for entry in log]
    assert names == ["ours", "peer", "probe"] + ["ours", "probe", "peer", "probe"] * 3
    assert [run.engine for pair in pairs for run in pair] == ["ours", "peer"] * 3


def test_a_pair_shares_its_prompts_and_no_other_pair_has_them() -> None:
    match, log = duel(Plan(seconds=0.0, least=2, most=2))
    match.measure([REGIMES["throughput-32"]])
    asked = [entry[1] for entry in log if entry != "probe"]
    assert asked[2] == asked[3]
    assert asked[4] == asked[5]
    prompts = [tuple(prompt) for index in (0, 1, 2, 4) for prompt in asked[index]]
    assert len(set(prompts)) == len(prompts) == 4 * 32
    assert {len(prompt) for prompt in prompts} == {128}


def test_time_sets_the_number_of_pairs() -> None:
    for seconds, expected in ((0.0, 2), (1.5, 4), (99.0, 7)):  # a pair takes 65 × 4 ms, and so does warming up
        match, _ = duel(Plan(seconds=seconds, least=2, most=7))
        assert len(match.measure([REGIMES["decode-1@16"]])[0]) == expected


def test_regimes_share_the_time_by_their_weight() -> None:
    match, _ = duel(Plan(seconds=9.0, least=1, most=10_000))
    short, long = match.measure([REGIMES["prefill-512"], REGIMES["throughput-32"]])
    assert 700 <= len(short) <= 751  # 3 s of 4 ms
    assert len(long) == 10  # 6 s of 128 × 4 ms, of which one to warm up


# -- values --------------------------------------------------------------------------------------------------
def test_values() -> None:
    arrivals = [0.5 + 0.01 * step for step in range(65)]
    assert REGIMES["decode-1@16"].value(Generation(9.0, [[0] * 65], arrivals)) == pytest.approx(100)
    assert REGIMES["prefill-512"].value(Generation(9.0, [[0]], [0.25])) == pytest.approx(2048)
    assert REGIMES["throughput-32"].value(Generation(4.0, [[0] * 128] * 32)) == pytest.approx(1024)


@pytest.mark.parametrize(
    "run",
    [Generation(1.0, [[0] * 64], [0.1] * 64), Generation(1.0, [[0] * 65]), Generation(1.0, [])],
    ids=["too few tokens", "no arrivals", "nothing"],
)
def test_a_run_that_did_something_else_is_refused(run: Generation) -> None:
    with pytest.raises(PeerUnavailableError, match="decode-1@16"):
        REGIMES["decode-1@16"].value(run)


def pair(ours: float, peer: float, *, others: float = 0.0, after: Moment = QUIET) -> Pair:
    return Run("ours", ours, others, QUIET, QUIET), Run("peer", peer, 0.0, QUIET, after)


def costs() -> dict[str, Cost]:
    attention = Attention(heads=4, kv_heads=2, head_dim=8, scale=1.0, rope=None, window=None)
    spec = ModelSpec(
        family="llama", vocab_size=100, hidden_size=32, intermediate_size=48, max_position=512,
        layers=(LayerSpec(attention),), activation="silu", norm_eps=1e-5,
    )  # fmt: skip
    return {
        "ours": Cost(spec, 50_000_000, 0.0, integer=True),
        "peer": Cost(spec, 100_000_000, 0.0, integer=False),
    }


def test_summary_takes_ratios_within_pairs() -> None:
    pairs = [pair(300, 100), pair(200, 50), pair(100, 50)]
    entry = summary(REGIMES["decode-1@16"], pairs, costs(), LIMITS, least=3)
    assert entry["ratio"]["each"] == [3, 4, 2]
    assert entry["ratio"]["median"] == 3
    assert 2 <= entry["ratio"]["low"] <= 3 <= entry["ratio"]["high"] <= 4
    assert (entry["ours"]["median"], entry["ours"]["spread"]) == (200, 1.0)
    assert (entry["pairs"], entry["left_out"], entry["disturbed"]) == (3, 0, 0)
    assert [run["engine"] for run in entry["runs"]] == ["ours", "peer"] * 3


def test_summary_holds_each_against_its_own_ceiling() -> None:
    entry = summary(REGIMES["decode-1@16"], [pair(500, 100)], costs(), LIMITS, least=1)
    assert entry["ours"]["of_ceiling"] == pytest.approx(500 / 1000, rel=0.01)  # 50 MB at 50 GB/s
    assert entry["peer"]["of_ceiling"] == pytest.approx(100 / 500, rel=0.01)
    batch = summary(REGIMES["throughput-32"], [pair(500, 100)], costs(), LIMITS, least=1)
    assert batch["ours"]["of_ceiling"] is not None
    assert batch["peer"]["of_ceiling"] is None
    assert entry["ours"]["of_sustained"] is batch["ours"]["of_sustained"] is None


def test_what_memory_sustains_is_another_ceiling() -> None:
    slow, fast = replace(QUIET, sustained=20e9), replace(QUIET, sustained=30e9)
    mine = replace(pair(400, 100)[0], before=slow, after=fast)
    entry = summary(REGIMES["decode-1@16"], [(mine, pair(400, 100)[1])], costs(), LIMITS, least=1)
    assert entry["ours"]["of_ceiling"] == pytest.approx(400 / 1000, rel=0.01)
    assert entry["ours"]["of_sustained"] == pytest.approx(400 / 500, rel=0.01)  # 50 MB at 25 GB/s
    assert entry["peer"]["of_sustained"] is None


def test_disturbed_pairs_are_left_out_while_enough_are_left() -> None:
    pairs = [pair(100, 50), pair(900, 50, others=0.9), pair(900, 50, after=LOUD)]
    entry = summary(REGIMES["decode-1@16"], pairs, costs(), LIMITS, least=1)
    assert (entry["pairs"], entry["left_out"], entry["disturbed"], entry["ours"]["median"]) == (1, 2, 0, 100)
    entry = summary(REGIMES["decode-1@16"], pairs, costs(), LIMITS, least=2)
    assert (entry["pairs"], entry["left_out"], entry["disturbed"], entry["ours"]["median"]) == (3, 0, 2, 900)


class Says:
    def __init__(self, *ids: int) -> None:
        self.ids = list(ids)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        return Generation(1.0, [self.ids])

    def cpu_seconds(self) -> float:
        return 0.0


def test_same_start() -> None:
    assert same_start(Says(1, 2, 3, 4, 5), Says(1, 2, 3, 4, 9), [0])["agree"] == 4
    assert same_start(Says(1, 2, 3, 4), Says(1, 2, 3, 4), [0])["agree"] == 4
    with pytest.raises(PeerUnavailableError, match="answers differently"):
        same_start(Says(1, 2, 3, 4, 5), Says(1, 2, 3, 9, 9), [0])


# -- processes -----------------------------------------------------------------------------------------------
def start(folder: Path, weights: str = "there") -> Worker:
    cpu = min(os.sched_getaffinity(0))
    config = Config(weights, 1, [cpu], 4, 256)
    return Worker(
        "tests.benchmarks.fake_runner", Path(sys.executable), config, folder / "log", home=Path(__file__).parents[2]
    )


def test_a_worker_answers_pinned_and_sleeps_in_between(tmp_path: Path) -> None:
    with start(tmp_path) as worker:
        assert worker.settings == {"threads": 1, "omp": "1"}
        assert worker.facts == {"cpus": [min(os.sched_getaffinity(0))]}
        assert worker.versions == {"numpy": np.__version__}
        assert worker.generate([[5], [8]], 2) == Generation(0.5, [[6, 7], [9, 10]])
        assert worker.generate([[5]], 2).arrivals == [0.1, 0.1]
        state = Path(f"/proc/{worker._process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        assert state in "Tt"
        assert worker.cpu_seconds() > 0
    assert "what a library prints" in (tmp_path / "log").read_text()
    assert worker._process.returncode == 0


@pytest.mark.parametrize(("token", "why"), [(FAILS, "ValueError: such a prompt"), (DIES, "the last words")])
def test_a_worker_that_breaks_says_why(tmp_path: Path, token: int, why: str) -> None:
    with start(tmp_path) as worker, pytest.raises(PeerUnavailableError, match=why):
        worker.generate([[token]], 2)


def test_a_worker_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailableError, match="FileNotFoundError: no such weights"):
        start(tmp_path, "absent")


# -- environments --------------------------------------------------------------------------------------------
def test_requirements_of_a_wheel_without_what_is_not_needed(tmp_path: Path) -> None:
    wheel = tmp_path / "it-1-py3-none-any.whl"
    fields = ["regex", "torch==2.13.0+cpu; platform_machine == 'x86_64'", "torchaudio", "setuptools<81,>=78"]
    fields += ["six>=1.16; python_version > '3.11'", "av; extra == 'audio'", "torchmetrics[x]>=1"]
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = "".join(f"Requires-Dist: {field}\n" for field in fields)
        archive.writestr("it-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: it\n{lines}\nText: none\n")
    wanted = wheel_requirements(wheel, frozenset({"torch", "torchaudio", "setuptools"}))
    assert wanted == ["regex", "six>=1.16; python_version > '3.11'", "torchmetrics[x]>=1"]


def test_every_version_is_pinned() -> None:
    for peer in PEERS.values():
        named = [argument for step in peer.steps for argument in step] + ([peer.around[0]] if peer.around else [])
        assert all("==" in requirement for requirement in named), peer.name


def test_a_failed_installation_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "it" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'ERROR: no such package'\nexit 1\n")
    python.chmod(0o755)
    peer = Peer("it", "none", "gguf", "it", (("it==1",),))
    with pytest.raises(PeerUnavailableError, match="no such package"):
        install(peer, tmp_path, lambda line: None)
    python.write_text('#!/bin/sh\necho "$@" >> calls\n')
    monkeypatch.chdir(tmp_path)
    install(peer, tmp_path, lambda line: None)
    install(peer, tmp_path, lambda line: None)
    install(replace(peer, steps=(("it==2",),)), tmp_path, lambda line: None)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.rpartition(" ")[2] for call in calls] == ["it==1", "it==2"]


# -- options and report --------------------------------------------------------------------------------------
def test_options() -> None:
    options = peers.parse(["--peers", "openvino, llama.cpp", "--quick"])
    assert [peer.name for peer in options.peers] == ["openvino", "llama.cpp"]
    assert options.plan == peers.QUICK
    assert [peer.name for peer in peers.parse([]).peers] == ["llama.cpp", "openvino", "vllm", "transformers"]
    assert [peer.name for peer in peers.parse(["--shape", "qwen2.5-7b"]).peers] == ["llama.cpp"]
    assert peers.parse(["--seconds", "20"]).plan == replace(Plan(), seconds=20.0)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--peers", "nothing.cpp"], "nothing.cpp is not among llama.cpp"),
        (["--regimes", ","], "nothing is not among decode-1@16"),
        (["--shape", "llama-3.2-1b", "--peers", "vllm"], "read GGUF: llama.cpp, openvino"),
        (["--threads", "0"], "choose from 1"),
    ],
)
def test_options_that_mean_nothing(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        peers.parse(arguments)
    assert stop.value.code == 2
    assert why in capsys.readouterr().err


def document(*names: str, fingerprint: str = "f", options: dict[str, str] | None = None) -> dict[str, Any]:
    """A report with one regime for each of these peers."""

    def entry(name: str) -> dict[str, Any]:
        regime = REGIMES["decode-1@16"]
        result = summary(regime, [pair(300, 100), pair(315, 105), pair(330, 110, others=1.0)], costs(), LIMITS, least=3)
        weights = {"name": "m", "weights": "GGUF Q4_0", "bytes": 1}
        return {"name": name, "versions": {"it": "1.2"}, "weights": weights, "results": [result]}

    return {
        "schema": peers.SCHEMA,
        "machine": {"cpu": "A <fast> & small CPU", "isa_level": "avx512", "fingerprint": fingerprint},
        "threads": 2,
        "options": options or {},
        "model": {"title": "A model", "name": "m"},
        "peers": [entry(name) for name in names],
        "not_measured": [],
    }


def test_markdown() -> None:
    shown = document("llama.cpp")
    shown["not_measured"].append({"name": "vllm", "why": "it failed: out of luck"})
    lines = report.markdown(shown).splitlines()
    row = next(line for line in lines if line.startswith("| llama.cpp 1.2"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "llama.cpp 1.2", "GGUF Q4_0", "decode-1@16", "315 ±5%", "105 ±5%", "**3.00×** (3.00–3.00)", "32%", "21%", "3",
    ]  # fmt: skip
    assert row.count("|") == lines[2].count("|") == lines[3].count("|")
    assert (
        "- llama.cpp: 1 pairs were disturbed by other processes and counted all the same, too few being left." in lines
    )
    shown["peers"][0]["results"][0]["ours"]["of_sustained"] = 0.4
    assert "| 32%, 40% |" in report.markdown(shown)
    shown["peers"][0]["results"][0]["pairs"] = 2
    assert "| **3.00×** |" in report.markdown(shown)
    assert "- Not measured: vllm, because it failed: out of luck." in lines


def test_chart_is_xml_with_a_bar_for_each() -> None:
    root = ElementTree.fromstring(report.chart(document("llama.cpp", "openvino")))
    space = "{http://www.w3.org/2000/svg}"
    widths = [float(bar.attrib["width"]) for bar in root.iter(f"{space}rect")]
    assert widths == [420, 140, 140]
    texts = [text.text for text in root.iter(f"{space}text")]
    assert texts[:3] == ["decode-1@16", "miaotui", "315"]
    assert "A <fast> & small CPU" in str(texts[-1])


def test_reports_of_one_machine_are_merged() -> None:
    new, old = document("openvino"), document("llama.cpp", "openvino")
    old["peers"][1]["versions"] = {"it": "old"}
    old["not_measured"] = [{"name": "vllm", "why": "of something"}]
    peers.merge(new, old)
    assert [(entry["name"], entry["versions"]["it"]) for entry in new["peers"]] == [
        ("llama.cpp", "1.2"),
        ("openvino", "1.2"),
    ]
    assert [entry["name"] for entry in new["not_measured"]] == ["vllm"]
    for other in (document("openvino", fingerprint="another"), document("openvino", options={"compute": "fp32"})):
        peers.merge(other, old)
        assert [entry["name"] for entry in other["peers"]] == ["openvino"]


def test_a_whole_comparison_on_fakes(
    tmp_path: Path, demo_gguf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything but the engines: `main` writes JSON with the promised fields, the table, the chart."""

    loaded: dict[str, dict[str, Any]] = {}

    class FakeWorker(Fake):
        def __init__(self, module: str, python: Path, config: Config, log: Path, who: str) -> None:
            self.versions, self.settings, self.start_seconds = {"it": "1.2"}, {"threads": 1}, 0.1
            self.facts = {"weight_bytes": 90_000_000, "block_bytes": 368_640, "greedy_bytes": 80_000_000}
            loaded[who] = config.options
            super().__init__(who, 0.001 if who != "it" else 0.003, [0.0], [])
            if module.endswith("vllm_cpu"):
                raise PeerUnavailableError("it is only a test")

        def __enter__(self) -> FakeWorker:
            return self

        def __exit__(self, *error: object) -> None:
            return None

    monkeypatch.setattr(peers, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(peers, "install", lambda peer, folder, tell: Path("python"))
    monkeypatch.setattr(peers, "Worker", FakeWorker)
    monkeypatch.setattr(peers, "_prober", lambda limits: lambda: QUIET)
    monkeypatch.setattr(peers.ceilings, "measure", lambda probes, threads, working_set: LIMITS)
    monkeypatch.setattr(peers, "_pin", lambda cpus: None)
    arguments = ["--peers", "llama.cpp,vllm", "--seconds", "0", "--output", str(tmp_path / "out"), "--threads", "1"]
    assert peers.main([*arguments, "--regimes", "prefill-512,decode-1@16", "--compute", "int8-batch"]) == 0
    written = json.loads((tmp_path / "out" / "peers.json").read_text())
    assert set(written) == {"schema", "machine", "threads", "options", "cpus", "model", "peers", "not_measured"}
    assert loaded == {"miaotui itself": {"compute": "int8-batch"}, "it": {}}
    assert "miaotui with compute int8-batch" in (tmp_path / "out" / "peers.md").read_text()
    (entry,) = written["peers"]
    assert {"name", "when", "commit", "versions", "weights", "settings", "same_start", "limits", "results"} <= set(
        entry
    )
    assert entry["same_start"]["agree"] == 24
    for result in entry["results"]:
        assert set(result) == {
            "regime", "unit", "pairs", "left_out", "disturbed", "ours", "peer", "ratio", "runs",
        }  # fmt: skip
        assert result["ratio"]["median"] == pytest.approx(3)
        assert set(result["ours"]) == {"median", "low", "high", "spread", "of_ceiling", "of_sustained"}
    assert written["not_measured"] == [{"name": "vllm", "why": "it is only a test"}]
    assert (tmp_path / "out" / "peers.md").read_text() == capsys.readouterr().out
    assert (tmp_path / "out" / "peers.svg").read_text().startswith("<svg")


# -- weights -------------------------------------------------------------------------------------------------
def greedy(model: Path, prompt: list[int]) -> list[int]:
    with LLM(str(model), threads=2, max_model_len=64, max_num_seqs=1) as llm:
        output = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))[0]
        return list(output.outputs[0].token_ids)


def test_all_forms_of_the_demo_say_the_same(tmp_path: Path, demo_gguf: Path) -> None:
    gguf = models.demo_gguf(tmp_path)
    checkpoint = open_checkpoint(gguf)
    kinds = {getattr(checkpoint.tensor(name), "kind", "F32") for name in checkpoint.names()}
    assert kinds == {"Q4_0", "Q8_0", "F32"}
    prompt = [504, 3575, 282, 4649, 314]
    expected = greedy(gguf, prompt)
    assert greedy(models.demo_int4(tmp_path), prompt)[:6] == expected[:6]
    assert greedy(models.demo_bf16(tmp_path), prompt)[:6] == expected[:6]
    assert models.describe(models.demo_int4(tmp_path))["weights"] == "compressed-tensors int4"


@pytest.mark.parametrize("name", sorted(models.SHAPES))
def test_random_shapes_run(tmp_path: Path, demo_gguf: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    small = replace(
        models.SHAPES[name], layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=16, vocabulary=49200
    )
    monkeypatch.setitem(models.SHAPES, name, small)
    path = models.random_gguf(tmp_path, name)
    ids = greedy(path, [1, 2, 3])
    assert len(ids) == 12
    embedding = open_checkpoint(path).tensor("token_embd.weight").dense32()
    assert embedding.std() == pytest.approx(64**-0.5, rel=0.05)
