from __future__ import annotations

from pathlib import Path

from miaotui.hardware import ceilings, sensors
from miaotui.hardware.ceilings import Probes


def test_the_best_run_counts_and_units_are_per_second() -> None:
    speeds = iter([10.0, 30.0, 20.0])
    seen: list[tuple[int, int]] = []

    def bandwidth(threads: int, megabytes: int, seconds: float) -> list[float]:
        seen.append((threads, megabytes))
        return [1.0, next(speeds), 2.0]

    found = ceilings.measure(Probes(bandwidth, lambda t, s: 2.0, lambda t, s: 0.5), 4, 85_400_000)
    assert seen == [(4, 85)] * 3
    assert (found.bandwidth, found.int8, found.fp32) == (30e9, 2e12, 0.5e12)


def test_what_is_remembered_is_recalled(tmp_path: Path) -> None:
    found = ceilings.Ceilings(2, 1, 1e9, 1e12, 1e11)
    assert ceilings.recall("abc", tmp_path) is None
    ceilings.remember("abc", found, tmp_path / "new")
    assert ceilings.recall("abc", tmp_path / "new") == found
    (tmp_path / "new/ceilings-abc.json").write_text('{"threads": 2')
    assert ceilings.recall("abc", tmp_path / "new") is None
    ceilings.remember("abc", found, Path("/proc/nowhere"))


def test_working_set_is_beyond_the_caches_and_within_memory() -> None:
    assert ceilings.main_memory_set({"L3": 64 << 20}, 64 << 30) == 512 << 20
    assert ceilings.main_memory_set({"L3": 512 << 20}, 4 << 30) == 1 << 30
    assert ceilings.main_memory_set({}, 8 << 30) == 256 << 20


def test_a_watch_sees_others_work_and_not_its_own() -> None:
    watch = sensors.Watch()
    sum(index * index for index in range(3_000_000))
    seen = watch.read()
    assert seen.others >= 0
    assert seen.celsius is None or -50 < seen.celsius < 150


def test_sentences() -> None:
    assert sensors.Disturbance(0.0, 1.0, None, 0).sentence is None
    assert "other processes" in (sensors.Disturbance(1.5, 1.0, None, 0).sentence or "")
    assert "slowed itself" in (sensors.Disturbance(0.0, 1.0, 95.0, 3).sentence or "")


def test_hottest(tmp_path: Path) -> None:
    assert sensors.hottest(tmp_path) is None
    for index, reading in enumerate(("45000", "61500")):
        zone = tmp_path / f"sys/class/thermal/thermal_zone{index}"
        zone.mkdir(parents=True)
        (zone / "temp").write_text(reading)
    assert sensors.hottest(tmp_path) == 61.5
