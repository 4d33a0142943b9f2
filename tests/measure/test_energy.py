"""Joules per token over machines laid out in a folder, whose counters the work itself moves on."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from miaotui.accelerate.card.schema import Energies, Energy
from miaotui.hardware.gpus import live_gpus
from miaotui.hardware.sensors import affinity
from miaotui.measure import energy
from miaotui.measure.energy import Meter, per_token
from tests.hardware.test_power import Driver, lay, zone

LIMIT = 100_000_000


class Machine:
    """A package of 100 J before it begins anew, and a thermal zone."""

    def __init__(self, root: Path, joules: float = 5.0) -> None:
        self.root, self.joules = root, joules
        self.heat(50.0)
        self.use(0.0)

    def use(self, joules: float) -> None:
        self.joules += joules
        lay(self.root, zone("intel-rapl:0", "package-0", round(self.joules * 1e6) % LIMIT, LIMIT))

    def heat(self, celsius: float) -> None:
        lay(self.root, {"class/thermal/thermal_zone0/temp": round(celsius * 1000)})

    def throttle(self, times: int) -> None:
        for cpu in affinity():
            lay(self.root, {f"devices/system/cpu/cpu{cpu}/thermal_throttle/core_throttle_count": times})


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_what_was_used_is_counted(machine: Machine) -> None:
    with Meter(root=machine.root) as meter:
        machine.use(2.5)
        used = meter.read()
    assert used.joules == pytest.approx(2.5)
    assert used.sources == ("package-0 (RAPL)",)
    assert (used.unavailable, used.throttled, used.marks) == (None, 0, ())
    assert used.celsius == 50.0
    assert used.seconds > 0


def test_a_counter_that_begins_anew_loses_nothing(machine: Machine) -> None:
    with Meter(root=machine.root, period=100) as meter:
        for _ in range(4):
            machine.use(60.0)
            used = meter.read()
    assert used.joules == pytest.approx(240.0)


class Watched(Meter):
    """Tells when it has looked by itself."""

    looks = 0

    def _look(self) -> None:
        super()._look()
        self.looks += 1

    def wait(self) -> None:
        """Until it has looked at everything that is there now."""
        enough = self.looks + 2
        while self.looks < enough:
            time.sleep(0.001)


def test_it_looks_between_readings(machine: Machine) -> None:
    """Heat that has passed, and a counter that began anew twice, are seen all the same."""
    with Watched(root=machine.root, period=0.005) as meter:
        machine.heat(97.0)
        for _ in range(4):
            machine.use(60.0)
            meter.wait()
        machine.heat(40.0)
        used = meter.read()
    assert used.joules == pytest.approx(240.0)
    assert used.celsius == 97.0
    assert used.marks == ("the hottest sensor reached 97 °C",)


def test_throttling_marks_the_figures(machine: Machine) -> None:
    machine.throttle(7)
    with Meter(root=machine.root) as meter:
        machine.throttle(9)
        used = meter.read()
    assert used.throttled == 2 * len(affinity())
    assert "slowed itself down" in used.marks[0]


def test_a_counter_that_falls_silent_is_no_zero(machine: Machine) -> None:
    with Meter(root=machine.root) as meter:
        machine.use(1.0)
        (machine.root / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("busy\n")
        used = meter.read()
    assert used.joules is None
    assert used.unavailable == "package-0 (RAPL) stopped answering"


def test_watts_are_summed_over_time(tmp_path: Path) -> None:
    chip = "class/hwmon/hwmon0"
    lay(tmp_path, {f"{chip}/name": "power_meter", f"{chip}/power1_average": 200_000_000})
    with Meter(root=tmp_path, gpus=live_gpus(lambda name: Driver()), period=0.01) as meter:
        time.sleep(0.2)
        used = meter.read()
    assert used.joules == pytest.approx(200 * used.seconds, rel=0.05)
    assert used.sources == ("the whole machine (ACPI power meter)",), "the machine's meter has the GPU's watts in it"


def test_a_gpu_is_counted_beside_the_processor_and_marks_what_slowed_it(machine: Machine) -> None:
    driver = Driver(10_000, reasons=0x20)
    with Meter(root=machine.root, gpus=live_gpus(lambda name: driver)) as meter:
        driver.millijoules = 13_000
        machine.use(1.0)
        used = meter.read()
    assert used.joules == pytest.approx(4.0)
    assert used.sources == ("package-0 (RAPL)", "A GPU 0 (NVML)")
    assert used.celsius == 64
    assert used.marks == ("A GPU 0 was slowed down by heat",)


# -- per token -------------------------------------------------------------------------------------------
def test_joules_per_token(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "ROUND", 0.01)

    def work() -> int:
        machine.use(0.5 * 8)
        return 8

    found = per_token(work, regime="decode", seconds=0.05, root=machine.root)
    assert found.joules_per_token == found.low == found.high == pytest.approx(0.5)
    card = Energy.of(asdict(found))
    assert (card.joules_per_token, card.regime, card.sources) == (pytest.approx(0.5), "decode", ("package-0 (RAPL)",))
    both = Energies.of([{"energy": asdict(found)}, {}])
    assert both.before == card
    assert both.after is not None
    assert both.after.unavailable == "no regime that makes tokens was measured"
    assert Energies.of([{"energy": asdict(found)}]).after is None
    assert "energy: 0.5 J/token" in energy.sentence(asdict(found))


@pytest.mark.parametrize("shown", [False, True])
def test_without_a_counter_that_moves_there_is_no_figure(
    tmp_path: Path, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "ROUND", 0.01)
    ran = []
    if shown:
        Machine(tmp_path)
    found = per_token(lambda: ran.append(1) or 4, regime="decode", seconds=0.02, root=tmp_path)  # type: ignore[func-returns-value]
    assert found.joules_per_token is None
    assert ("stood still" if shown else "no energy counter") in (found.unavailable or "")
    assert bool(ran) == shown, "nothing is run where nothing counts"
    assert "unavailable (" in energy.sentence(asdict(found))
    assert Energy.of(asdict(found)).unavailable == found.unavailable


def test_an_llm_is_asked_one_sequence_at_a_time(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    class Echo:
        asked: list[Any]

        def generate(self, prompts: Any, params: Any) -> Any:
            self.asked = prompts
            machine.use(6.4)
            completion = type("Completion", (), {"token_ids": list(range(params.max_tokens))})
            return [type("Output", (), {"outputs": [completion]})]

    monkeypatch.setattr(energy, "ROUND", 0.01)
    monkeypatch.setattr(energy, "per_token", lambda work, **options: per_token(work, **options, root=machine.root))
    llm = Echo()
    found = energy.of_llm(llm, lambda count: [0] * count, seconds=0.02)
    assert found.joules_per_token == pytest.approx(0.1)
    assert [len(prompt) for prompt in llm.asked] == [16]
