"""A small model's whole life: trained, pruned by steps, distilled, quantised, and measured at each stage.

    python examples/textbook/run.py -o textbook

Everything is done by the command line, on text that Python carries. A stage whose folder is there is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import prose
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

VOCABULARY = 2048
WINDOW, BATCH = 128, 16
HELD_OUT = 0.05
STEPS = {"original": 1000, "distilled-3m": 120, "distilled-1m": 300}
"""Of BATCH windows each; the student without a teacher has as many as the one with."""

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 384,
    "intermediate_size": 896,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}
SMALLER = {
    "pruned-3m": ["--blocks", "4", "--kv-heads", "4", "--channels", "512", "--hidden", "256"],
    "pruned-1m": ["--blocks", "3", "--kv-heads", "2", "--channels", "320", "--hidden", "160"],
}
SAMPLES, PROMPT, ANSWER = 32, 16, 64
"""A sample is an answer of ANSWER tokens to a prompt of PROMPT tokens; SAMPLES are asked for together."""


class Life:
    """The stages, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.times = folder / "times.json"

    def path(self, name: str) -> str:
        return str(self.folder / name)

    # -- stages ------------------------------------------------------------------------------------------
    def run(self) -> dict[str, Any]:
        self.text()
        self.start()
        train = ["--data", self.path("text.jsonl"), "--window", WINDOW, "--batch", BATCH, "--save-every", "100"]
        train += ["--evaluate-every", "100", "--rate", "2e-3", "--warmup", "40"]
        calibrate = ["--calibration", self.path("text.jsonl"), "--window", WINDOW, "--windows", "64"]
        config = self.path("new/config.json")
        self.stage("original", "distill", "--from-scratch", "--student", config, *self.steps("original"), *train)
        self.stage("pruned-3m", "prune", self.path("original"), *SMALLER["pruned-3m"], *calibrate)
        self.taught("distilled-3m", "pruned-3m", train)
        self.stage("pruned-1m", "prune", self.path("distilled-3m"), *SMALLER["pruned-1m"], *calibrate)
        self.taught("distilled-1m", "pruned-1m", train)
        alone = ["--from-scratch", "--student", self.path("pruned-1m"), *self.steps("distilled-1m")]
        self.stage("alone-1m", "distill", *alone, *train)
        quantise = ["--scheme", "w4g32-sym", "--embedding", "w8-sym"]
        self.stage("int4", "compress", self.path("distilled-1m"), *quantise, *calibrate)
        return self.table()

    def steps(self, name: str) -> list[str]:
        return ["--steps", str(STEPS[name])]

    def taught(self, name: str, student: str, train: list[Any]) -> None:
        """Distil from the original: half of the loss is its opinion, half the text's own next token."""
        learn = ["--student", self.path(student), "--kl", "0.5", "--ce", "0.5", *self.steps(name)]
        self.stage(name, "distill", self.path("original"), *learn, *train)

    def text(self) -> None:
        """Documents to learn from, and every twentieth to be judged by."""
        if (self.folder / "held_out.jsonl").exists():
            return
        documents = prose.documents()
        cut = round(len(documents) * HELD_OUT)
        for name, part in (("text", documents[cut:]), ("held_out", documents[:cut])):
            lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part)
            (self.folder / f"{name}.jsonl").write_text(lines, "utf-8")

    def start(self) -> None:
        """A tokenizer of byte pairs learnt from the text, and a configuration."""
        new = self.folder / "new"
        if (new / "config.json").exists():
            return
        new.mkdir(exist_ok=True)
        lines = (self.folder / "text.jsonl").read_text("utf-8").splitlines()
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
        backend.save(str(new / "tokenizer.json"))
        (new / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        (new / "config.json").write_text(json.dumps(CONFIG, indent=2))

    def stage(self, name: str, *arguments: Any) -> None:
        """Run one command that writes the folder of this name, unless it is there."""
        if (self.folder / name).exists():
            return
        with self.timed(name):
            self.command(*arguments, "-o", self.path(name))

    def command(self, *arguments: Any) -> str:
        words = [sys.executable, "-m", "miaotui.cli.main", *map(str, arguments)]
        print("$ miaotui", *words[3:], file=sys.stderr, flush=True)
        return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Note wall and processor seconds."""
        started, before = time.perf_counter(), _processor()
        yield
        times = json.loads(self.times.read_text()) if self.times.exists() else {}
        times[name] = [round(time.perf_counter() - started, 1), round(_processor() - before, 1)]
        self.times.write_text(json.dumps(times))

    # -- measuring ---------------------------------------------------------------------------------------
    def table(self) -> dict[str, Any]:
        """Every stage's figures, and what they add up to."""
        names = ["original", "pruned-3m", "distilled-3m", "pruned-1m", "alone-1m", "distilled-1m", "int4"]
        with self.timed("measuring"):
            rows = {name: self.figures(name) for name in names}
            eager = self.samples("original", "reference")
        first, last = rows["original"], rows["int4"]
        losses = {name: math.log(row["perplexity"]) for name, row in rows.items()}
        won = (losses["alone-1m"] - losses["distilled-1m"]) / (losses["alone-1m"] - losses["original"])
        return {
            "rows": rows,
            "eager_samples_per_second": eager,
            "times_fewer_bytes": first["bytes"] / last["bytes"],
            "times_the_samples": last["samples_per_second"] / eager,
            "won_back_by_the_teacher": won,
            "seconds": json.loads(self.times.read_text()),
        }

    def figures(self, name: str) -> dict[str, Any]:
        evaluate = ["evaluate", self.path(name), "--data", self.path("held_out.jsonl"), "--window", WINDOW, "--json"]
        weights = list((self.folder / name).glob("*.safetensors"))
        return {
            "parameters": _parameters(json.loads((self.folder / name / "config.json").read_text())),
            "bytes": sum(file.stat().st_size for file in weights),
            "perplexity": json.loads(self.command(*evaluate))["perplexity"],
            "samples_per_second": self.samples(name, "cpu"),
        }

    def samples(self, name: str, device: str) -> float:
        """Samples a second: the best of three, in a process of its own."""
        code = (
            "import sys, time\n"
            "from miaotui import LLM, SamplingParams\n"
            f"llm = LLM(sys.argv[1], device=sys.argv[2], max_model_len={PROMPT + ANSWER}, max_num_seqs={SAMPLES})\n"
            f"prompts = [[(7 * i + j) % {VOCABULARY - 300} + 300 for j in range({PROMPT})] for i in range({SAMPLES})]\n"
            f"params = SamplingParams(max_tokens={ANSWER}, temperature=0, ignore_eos=True)\n"
            "times = []\n"
            "for _ in range(3):\n"
            "    started = time.perf_counter(); llm.generate(prompts, params)\n"
            "    times.append(time.perf_counter() - started)\n"
            "print(len(prompts) / min(times))\n"
        )
        words = [sys.executable, "-c", code, self.path(name), device]
        return float(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)


def _parameters(config: dict[str, Any]) -> int:
    """Of a Llama with a tied head."""
    hidden, layers, ffn = config["hidden_size"], config["num_hidden_layers"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"] + config["num_key_value_heads"] * config["head_dim"]
    return config["vocab_size"] * hidden + layers * (2 * hidden * heads + 3 * hidden * ffn + 2 * hidden) + hidden


def _processor() -> float:
    """Seconds that the processes started here have computed, all cores together."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def shown(found: dict[str, Any]) -> str:
    """The figures as a table in Markdown."""
    lines = ["| stage | parameters | bytes | perplexity | samples/s |", "|---|---:|---:|---:|---:|"]
    for name, row in found["rows"].items():
        lines.append(
            f"| {name} | {row['parameters'] / 1e6:.2f} M | {row['bytes'] / 1e6:.2f} MB | {row['perplexity']:.2f} "
            f"| {row['samples_per_second']:.1f} |"
        )
    wall, processor = (sum(pair[i] for pair in found["seconds"].values()) for i in (0, 1))
    return "\n".join(
        [
            *lines,
            "",
            f"The original in PyTorch, eager, float32: {found['eager_samples_per_second']:.1f} samples/s.",
            f"int4 takes {found['times_fewer_bytes']:.1f} times fewer bytes and answers "
            f"{found['times_the_samples']:.1f} times as fast as that.",
            f"Of the loss that the student trained alone has over the original, the teacher won back "
            f"{found['won_back_by_the_teacher']:.0%}.",
            f"{wall / 60:.1f} minutes, {processor / 60:.1f} of a processor's, on {os.cpu_count()} cores.",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("textbook"), help="where all models go")
    life = Life(parser.parse_args().output)
    made = life.run()
    (life.folder / "figures.json").write_text(json.dumps(made, indent=2))
    print(shown(made))
