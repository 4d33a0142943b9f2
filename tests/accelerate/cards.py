"""A made-up card with everything that a card can have; the figures are invented."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from miaotui.accelerate.card.schema import (
    Artefact,
    Card,
    Energies,
    Energy,
    Floor,
    Line,
    Model,
    Peer,
    PeerResult,
    Profile,
    Qualities,
    Quality,
    Search,
    Sensitivity,
    Speed,
    Speeds,
    Technique,
    Trial,
    TrialState,
)
from miaotui.compress.recipe import Recipe
from miaotui.measure.intervals import Estimate

REGIME = "decode-1@512"


def around(value: float, share: float) -> Estimate:
    return Estimate(value, value * share / 2, value * (1 - share), value * (1 + share))


def speed(regime: str, median: float, ceiling: float | None, unit: str = "tokens/s") -> Speed:
    better = "higher" if unit == "tokens/s" else "lower"
    return Speed(regime, unit, median, median * 0.98, median * 1.015, 160, better, ceiling, median * 0.93)  # type: ignore[arg-type]


def trial(name: str, state: TrialState, tokens: float | None, kl: float | None, why: str, size: int = 98) -> Trial:
    measured = None if tokens is None else speed(REGIME, tokens, None)
    lost = None if kl is None else around(kl, 0.12)
    ratio = None if kl is None else around(1 + kl * 0.9, 0.002)
    settings = {"scheme": name.split()[0], "method": "gptq"}
    stage = {"won": "full", "measured": "halving 2", "rejected": "KL on 4 windows", "failed": "build"}[state]
    return Trial(name, state, stage, settings, measured, lost, ratio, size << 20, 300.0, 21.5, why)


TRIALS = (
    trial("w8-channel rtn", "measured", 150.0, 0.0004, "Faithful, and slower than what else holds the floor."),
    trial("w8a8 smooth", "measured", 146.0, 0.0031, "w8-channel is faster and more faithful."),
    trial("w4g32-sym gptq", "won", 262.0, 0.0068, "The fastest that holds the floor."),
    trial("w4g32-sym rtn", "measured", 260.0, 0.0142, "gptq is as fast and loses less."),
    trial("w4g64-sym gptq", "measured", 271.0, 0.0213, "Loses 1.6% perplexity, over the floor of 1%."),
    trial("w4g128-sym gptq", "measured", 278.0, 0.0387, "Loses 3.1% perplexity, over the floor of 1%."),
    trial("w4g128-sym awq+gptq", "measured", 277.0, 0.0321, "Loses 2.6% perplexity, over the floor of 1%."),
    trial("w3g64-sym gptq", "measured", 301.0, 0.164, "Loses 14% perplexity, over the floor of 1%."),
    trial("w2g32-sym gptq", "rejected", None, 1.9, "Hopeless on 4 windows: KL 1.9."),
    trial("w4g64-asym hqq", "failed", None, None, "The build ran out of memory."),
)


def quality(ppl: float) -> Quality:
    return Quality("held_out.txt", 65_472, 64, 1024, around(ppl, 0.03))


def make_card(**changes: Any) -> Card:
    """The card, with some of its fields replaced."""
    before = (
        speed("start", 0.92, None, "s"),
        speed("load", 0.41, 0.013, "s"),
        speed("peak-memory", 512.0, 269.0, "MB"),
        speed("prefill-512", 980.0, 2100.0),
        speed("decode-1@16", 66.1, 74.6),
        speed(REGIME, 61.2, 71.0),
        speed("throughput-8", 214.0, 410.0),
        speed("throughput-64", 480.0, 1180.0),
    )
    after = (
        speed("start", 0.61, None, "s"),
        speed("load", 0.16, 0.004, "s"),
        speed("peak-memory", 240.0, 98.0, "MB"),
        speed("prefill-512", 2480.0, 5150.0),
        speed("decode-1@16", 281.0, 370.0),
        speed(REGIME, 262.0, 341.0),
        speed("throughput-8", 702.0, 1290.0),
        speed("throughput-64", 1610.0, 3660.0),
    )
    kept = Estimate(1.0043, 0.0011, 1.0021, 1.0065)
    lost = replace(
        quality(18.73),
        perplexity_ratio=kept,
        p_value=0.0003,
        kl_mean=around(0.0068, 0.1),
        kl_p99=around(0.061, 0.15),
        top1_flips=around(0.031, 0.08),
        greedy_agreement=around(41.2, 0.14),
        greedy_tokens=64,
    )
    profile = Profile(
        REGIME,
        3.82e-3,
        (
            Line("gate_up", 30, 1.31e-3, 1.12e-3),
            Line("down", 30, 0.69e-3, 0.56e-3),
            Line("logits", 1, 0.52e-3, 0.46e-3),
            Line("attention", 30, 0.43e-3, 0.19e-3),
            Line("qkv", 30, 0.33e-3, 0.24e-3),
            Line("out", 30, 0.24e-3, 0.18e-3),
            Line("host (Python)", 1, 0.21e-3, 0.0),
            Line("norm", 61, 0.09e-3, 0.0),
        ),
    )
    longer = tuple(replace(line, seconds=line.seconds * 54, least=line.least * 26) for line in profile.lines)
    prefill = Profile("prefill-512", profile.seconds * 54, longer)
    card = Card(
        created="2025-11-21T08:00:00+00:00",
        verdict="4.3 times as fast at decode-1@512 for 0.43% perplexity (95%: 0.21% to 0.65%), within the floor of 1%.",
        model=Model("smollm2-bf16", "llama", 134_515_008, 269_060_552, "6f1c9a", "apache-2.0", "a/SmolLM2-135M"),
        artefact=Artefact(
            "smollm2-fast",
            98_300_000,
            Recipe(scheme="w4g32-sym").plain(),
            "compressed-tensors",
            {"threads": 2, "kv_cache_dtype": "bf16"},
            (
                Technique(
                    "int4 weights in groups of 32", True, "Loses 0.43% perplexity, and makes decode 4.3× as fast."
                ),
                Technique("int4 in groups of 128", False, "Loses 3.1% perplexity, over the floor of 1%; 6% faster."),
                Technique("int8 cache", False, "1% slower at 512 tokens: the cache is too small here to matter."),
            ),
        ),
        floor=Floor.of(0.01, kept),
        speed=Speeds(before, after),
        quality=Qualities(quality(18.65), lost),
        search=Search("latency", REGIME, 900.0, 611.0, 0, TRIALS, before[5]),
        machine={
            "cpu": "A CPU with 2 cores",
            "isa_level": "avx512",
            "memory": 8 << 30,
            "usable_cores": 2,
            "threads": 4,
            "system": "Linux 6.1",
            "caches": {"L1d": 32 << 10, "L2": 2 << 20, "L3": 33 << 20},
            "gpus": [],
            "ceilings": {"threads": 2, "working_set": 98_000_000, "bandwidth": 3.3e10, "int8": 1.5e12, "fp32": 2e11},
            "disturbance": {"others": 0.04, "load_average": 1.1, "celsius": None, "throttled": 0},
        },
        versions={"miaotui": "0.1.0", "python": "3.11.9", "numpy": "2.1.0"},
        energy=Energies(Energy(unavailable="no power sensor: /sys/class/powercap is not there")),
        caveats=(
            "The original's weights were int4 in groups of 32 before: that this scheme keeps them is no surprise.",
            "Measured on 65,472 tokens of one text.",
        ),
        sensitivity=tuple(
            Sensitivity(
                layer, role, "w4g32-sym", weight * (0.0002 + 0.0007 * math.exp(-layer / 3) + 0.0003 * (layer > 27))
            )
            for layer in range(30)
            for role, weight in (("qkv", 0.8), ("out", 0.5), ("mlp_in", 1.0), ("mlp_out", 1.7))
        ),
        profile=(profile, prefill),
        peers=(
            Peer(
                "llama.cpp",
                "b6800",
                "Q4_0",
                (PeerResult(REGIME, "tokens/s", 262.0, 171.0, Estimate(1.53, None, 1.49, 1.57), 12),),
            ),
            Peer("vllm", why="it is not installed"),
        ),
        commands=(
            "miaotui accelerate smollm2-bf16 --goal latency --floor 1% --budget 15m --seed 0 -o smollm2-fast",
            "miaotui bench smollm2-fast",
            "miaotui evaluate smollm2-fast --data held_out.txt --reference smollm2-bf16",
        ),
        calibration={"source": "calibration.txt", "windows": 64, "window": 512, "seed": 0},
    )
    return replace(card, **changes)
