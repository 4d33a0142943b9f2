"""What a card says besides its table, as short texts: one source for the terminal, the README and the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miaotui.accelerate.card import rows
from miaotui.accelerate.card.schema import PeerResult, Trial


def machine(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The machine's facts that a reader wants, as (name, text)."""
    facts = [("Processor", str(found.get("cpu", "?")))]
    cores, threads, memory = (_count(found, name) for name in ("usable_cores", "threads", "memory"))
    if cores is not None:
        facts.append(("Cores", f"{cores:g}" if threads is None else f"{cores:g} of {threads:g} threads"))
    if "isa_level" in found:
        facts.append(("Instruction set", str(found["isa_level"])))
    sizes = _part(found, "caches")
    caches = [f"{name} {size / 1024:,.0f} KiB" for name in sizes if (size := _count(sizes, name)) is not None]
    if caches:
        facts.append(("Caches", ", ".join(caches)))
    if memory is not None:
        facts.append(("Memory", f"{memory / (1 << 30):.1f} GiB"))
    gpus = found.get("gpus")
    names = [gpu.get("name", "?") for gpu in gpus if isinstance(gpu, Mapping)] if isinstance(gpus, list) else []
    facts += [("GPU", str(name)) for name in names]
    if "system" in found:
        facts.append(("System", str(found["system"])))
    return facts


def limits(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The measured ceilings, and what disturbed the measurement."""
    ceilings, disturbance = _part(found, "ceilings"), _part(found, "disturbance")
    facts = []
    if (bandwidth := _count(ceilings, "bandwidth")) is not None:
        size = _count(ceilings, "working_set")
        over = "" if size is None else f" over {size / 1e6:,.0f} MB"
        facts.append(("Memory bandwidth", f"{bandwidth / 1e9:.1f} GB/s{over}"))
    for name, key, unit in (("int8 peak", "int8", "TOPS"), ("float32 peak", "fp32", "TFLOP/s")):
        if (peak := _count(ceilings, key)) is not None:
            facts.append((name, f"{peak / 1e12:.2f} {unit}"))
    others, celsius, throttled = (_count(disturbance, name) for name in ("others", "celsius", "throttled"))
    if others is not None:
        facts.append(("Other processes", f"{others:.2f} cores"))
    if celsius is not None:
        facts.append(("Hottest sensor", f"{celsius:.0f} °C"))
    if throttled is not None:
        facts.append(("Throttling events", f"{throttled:.0f}"))
    return facts


def _part(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = found.get(name)
    return part if isinstance(part, Mapping) else {}


def _count(found: Mapping[str, Any], name: str) -> float | None:
    """A number, where that is what stands there: a machine's facts are not checked when a card is read."""
    value = found.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def trial_row(trial: Trial) -> tuple[str, str, str, str]:
    """Its name, speed, KL and fate."""
    speed = "" if trial.speed is None else f"{rows.number(trial.speed.median)} {trial.speed.unit}".strip()
    return trial.name, speed, "" if trial.kl is None else rows.number(trial.kl.value), trial.why or trial.state


def peer_row(result: PeerResult) -> tuple[str, str, str]:
    """Ours, theirs and the ratio with its interval."""
    ours, theirs = (f"{rows.number(value)} {result.unit}" for value in (result.ours, result.theirs))
    ratio = result.ratio
    if ratio.low is None or ratio.high is None:
        return ours, theirs, rows.times(ratio.value)
    return ours, theirs, f"{rows.times(ratio.value)} ({rows.times(ratio.low)} – {rows.times(ratio.high)})"
