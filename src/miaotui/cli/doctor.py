"""`miaotui doctor`: the machine, what it lacks, and what a model could do on it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from miaotui.errors import DependencyError
from miaotui.hardware import ceilings, detect, sensors
from miaotui.hardware.cgroups import read_text

if TYPE_CHECKING:
    from miaotui.hardware.ceilings import Ceilings, Probes
    from miaotui.hardware.detect import Machine
    from miaotui.model.spec import ModelSpec


QUIET = 0.2
"""Cores' worth of other work below which a measurement is worth keeping."""


@click.command("doctor")
@click.argument("model", required=False)
@click.option("--measure", is_flag=True, help="Measure the ceilings anew instead of recalling them.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_context
def command(context: click.Context, model: str | None, measure: bool, as_json: bool) -> None:
    """Look at this machine: cores, memory, measured bandwidth and peak, GPUs, and what is missing.

    With MODEL: will it fit, and how many tokens a second are possible at the most. Of a hub model that is not here
    only config.json is fetched. The exit status is 1 when it does not fit.
    """
    machine = detect.detect()
    probes, complaint = _probes()
    limits = None if probes is None else _limits(machine, probes, anew=measure)
    report: dict[str, Any] = {
        "machine": machine.as_dict(),
        "available_memory": detect.available_memory(),
        "ceilings": None if limits is None else asdict(limits),
        "disturbance": asdict(sensors.glance()),
    }
    if model is not None:
        report["model"] = _examine(model, probes, machine.usable_cores)
    report["missing"] = list(_missing(machine, complaint))
    click.echo(json.dumps(report, ensure_ascii=False, indent=2) if as_json else "\n".join(_lines(report)))
    if model is not None and not report["model"]["fits"]:
        context.exit(1)


def _probes() -> tuple[Probes | None, str | None]:
    """The native probes, or why there are none."""
    from miaotui.cli.probes import native_probes

    try:
        return native_probes(), None
    except DependencyError as error:
        return None, error.message


def _limits(machine: Machine, probes: Probes, *, anew: bool) -> Ceilings:
    """The machine's ceilings, from earlier unless `anew`; measuring takes some three seconds.

    What was measured while other processes were busy is shown this once, and not remembered.
    """
    from miaotui.checkpoint.demo import cache_folder

    found = None if anew else ceilings.recall(machine.fingerprint(), cache_folder())
    if found is None:
        click.echo("measuring bandwidth and peak …", err=True)
        working_set = ceilings.main_memory_set(machine.caches, detect.available_memory())
        watch = sensors.Watch()
        found = ceilings.measure(probes, machine.usable_cores, working_set)
        if watch.read().others < QUIET:
            ceilings.remember(machine.fingerprint(), found, cache_folder())
    return found


def _examine(model: str, probes: Probes | None, threads: int) -> dict[str, Any]:
    """What MODEL needs and could do. Its ceilings are measured over a working set of its own size."""
    from miaotui.measure.fit import ceilings_of, fit

    spec, size, about = _look(model)
    available = detect.available_memory()
    found = fit(spec, size, available)
    possible = {}
    if probes is not None:
        limits = ceilings.measure(probes, threads, ceilings.within(found.step_bytes, available))
        possible = ceilings_of(spec, found, limits)
    return {"name": model, **about, **asdict(found), "fits": found.fits, "ceilings": possible}


def _look(model: str) -> tuple[ModelSpec, int, dict[str, Any]]:
    """MODEL's spec, the bytes of its weights, and where both were taken from; a hub model's weights are not fetched."""
    from miaotui.checkpoint import look
    from miaotui.checkpoint.hub import Listing
    from miaotui.measure.fit import weight_bytes_of
    from miaotui.model.families import read_spec, spec_of_config

    found = look(model)
    if not isinstance(found, Listing):
        spec, _ = read_spec(found)
        about = {"path": str(found.path), "format": found.format, "family": spec.family, "size_from": "files"}
        return spec, found.nbytes, about
    spec = spec_of_config(found.config)
    told = "hub" if found.nbytes is not None else "estimate"
    size = found.nbytes if found.nbytes is not None else weight_bytes_of(spec, found.config)
    return spec, size, {"path": None, "format": found.format, "family": spec.family, "size_from": told}


def _missing(machine: Machine, native_complaint: str | None) -> Iterator[dict[str, str]]:
    """What is not there, what for, and the command that gets it."""
    from importlib.metadata import PackageNotFoundError, version

    if native_complaint is not None:
        yield _lack(native_complaint, "everything on a CPU", "pip install --force-reinstall miaotui  (make build)")
    named = os.environ.get("MIAOTUI_ISA")
    if named and named != machine.isa_level:
        yield _lack(f"kernels {named!r:.40}, which MIAOTUI_ISA names", "running on this processor", "unset MIAOTUI_ISA")
    try:
        torch = version("torch")
    except PackageNotFoundError:
        torch = None
        yield _lack("PyTorch", "the reference backend; not needed to run on a CPU", "pip install 'miaotui[reference]'")
    if not machine.gpus and _nvidia_cards():
        yield _lack(
            "the NVIDIA driver", "--device cuda", "sudo ubuntu-drivers install  (or your system's driver package)"
        )
    if machine.gpus and torch is not None and torch.endswith("+cpu"):
        yield _lack("PyTorch with CUDA", "--device cuda", "pip install --force-reinstall torch")
    from miaotui.checkpoint import demo

    if not (demo.cache_folder() / "demo" / demo.FILE).is_file():
        yield _lack("the demo model", "MODEL `demo` without a network", "miaotui pull demo")


def _lack(what: str, use: str, remedy: str) -> dict[str, str]:
    return {"what": what, "for": use, "command": remedy}


def _nvidia_cards(root: Path = Path("/")) -> bool:
    """Whether the PCI bus holds an NVIDIA display or 3D controller, with or without a driver."""
    for device in (root / "sys/bus/pci/devices").glob("*"):
        if read_text(device / "vendor") == "0x10de" and (read_text(device / "class") or "").startswith("0x03"):
            return True
    return False


def _lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    rows = [*_machine_rows(report), *(_model_rows(report["model"]) if "model" in report else [])]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        yield f"{name:<{width}}  {text}"
    for lack in report["missing"]:
        yield f"missing: {lack['what']} ({lack['for']})\n    {lack['command']}"


def _machine_rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    machine, limits, disturbance = report["machine"], report["ceilings"], report["disturbance"]
    yield "processor", f"{machine['cpu']} ({machine['architecture']}), {machine['system']}"
    yield "kernels", f"{machine['isa_level']}: {' '.join(machine['isa']) or 'no vector extensions known'}"
    quota = "" if machine["quota"] is None else f", quota {machine['quota']:.1f}"
    nodes = f"{machine['numa_nodes']} NUMA node{'s' if machine['numa_nodes'] > 1 else ''}"
    yield (
        "cores",
        f"{machine['usable_cores']} used of {machine['cores']} ({machine['threads']} threads{quota}), {nodes}",
    )
    yield "caches", ", ".join(f"{level} {_size(size)}" for level, size in machine["caches"].items()) or "unknown"
    yield "memory", f"{_size(report['available_memory'])} free of {_size(machine['memory'])}"
    if limits is not None:
        arithmetic = f"int8 {limits['int8'] / 1e12:.2f} TOPS, float32 {limits['fp32'] / 1e12:.2f} TFLOP/s"
        yield "measured", f"{limits['bandwidth'] / 1e9:.1f} GB/s, {arithmetic} on {limits['threads']} threads"
    for gpu in machine["gpus"]:
        capability = ".".join(str(part) for part in gpu["capability"])
        free = f"{_size(gpu['memory_free'])} free of {_size(gpu['memory'])}"
        yield "GPU", f"{gpu['name']} ({capability}), {free}, driver {gpu['driver']}"
    if not machine["gpus"]:
        yield "GPU", "none"
    heat = "" if disturbance["celsius"] is None else f", {disturbance['celsius']:.0f} °C"
    yield "other work", f"{disturbance['others']:.1f} cores busy, load {disturbance['load_average']:.1f}{heat}"


def _model_rows(model: dict[str, Any]) -> Iterator[tuple[str, str]]:
    told = {"files": "", "hub": " to be fetched", "estimate": " by an estimate"}[model["size_from"]]
    size = f"{model['parameters'] / 1e6:,.0f} M parameters, {_size(model['weight_bytes'])}{told}"
    yield "model", f"{model['name']}: {model['family']}, {model['format']}, {size}"
    kept = f"{model['cache_bytes_per_token'] / 1024:.1f} KiB of cache a token"
    if model["fits"]:
        yield "fits", f"yes, with {model['context']} of {model['max_position']} positions ({kept})"
    else:
        needed = model["weight_bytes"] + model["cache_bytes_per_token"] * 256
        yield "fits", f"no: it needs {_size(needed)} and more, {_size(model['available'])} are free"
    if model["ceilings"]:
        most = ", ".join(f"{name} {value:,.0f}" for name, value in model["ceilings"].items())
        yield "at the most", f"tokens/s: {most}"


def _size(count: int) -> str:
    """Bytes for people."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.3g} {unit}"
        amount /= 1024
    return f"{amount:.3g} TiB"
