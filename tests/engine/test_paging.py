"""Idle prefixes in a file: they come back right, in this process and the next, whatever happens to the file."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miaotui.engine.params import SamplingParams
from miaotui.engine.prefix_file import PrefixFile, open_prefix_file
from miaotui.errors import ResourceError, UsageError
from tests.engine.toys import finish, naive_greedy, toy_engine

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
BLOCK = 64
MODEL = bytes(range(32))


def room(slots: int, block_bytes: int = BLOCK) -> int:
    return 4096 + slots * (block_bytes + 32)


def opened(path: Path, slots: int = 4, model: bytes = MODEL) -> PrefixFile:
    file = open_prefix_file(path, room(slots), BLOCK, model)
    assert file is not None
    file.check_integrity()
    return file


def digest(i: int) -> bytes:
    return i.to_bytes(16, "big")


def block(i: int) -> Any:
    return np.full(BLOCK, i, np.uint8)


# -- the file --------------------------------------------------------------------------------------------


def test_the_least_recently_used_gives_way(tmp_path: Path) -> None:
    file = opened(tmp_path / "p")
    for i in range(4):
        file.put(digest(i), block(i))
    assert file.touch(digest(0))
    assert not file.touch(digest(9))
    found = file.get(digest(1))
    assert found is not None
    assert (found == 1).all()
    del found
    file.put(digest(4), block(4))
    file.put(digest(5), block(5))
    file.check_integrity()
    assert [digest(i) in file for i in range(6)] == [True, True, False, False, True, True]
    assert (file.saved, file.found, len(file)) == (6, 1, 4)
    file.close()
    assert (tmp_path / "p").stat().st_size == room(4)


def test_blocks_and_their_order_outlive_the_process(tmp_path: Path) -> None:
    file = opened(tmp_path / "p")
    for i in range(4):
        file.put(digest(i), block(i))
    file.touch(digest(0))
    file.close()
    file = opened(tmp_path / "p")
    assert len(file) == 4
    file.put(digest(7), block(7))
    assert digest(0) in file
    assert digest(1) not in file
    file.close()


def test_what_was_written_before_a_crash_is_there(tmp_path: Path) -> None:
    file = opened(tmp_path / "p")
    file.put(digest(1), block(1))
    copy = tmp_path / "q"
    copy.write_bytes((tmp_path / "p").read_bytes())
    file.close()
    after = opened(copy)
    assert (after.get(digest(1)) == 1).all()  # type: ignore[union-attr]
    after.close()


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_file_never_gives_a_wrong_block(tmp_path: Path, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(seed)
    file = opened(tmp_path / "p", slots=8)
    for i in range(8):
        file.put(digest(i), block(i))
    file.close()
    content = bytearray((tmp_path / "p").read_bytes())
    kind = seed % 3
    if kind == 0:  # bits
        for _ in range(rng.randrange(1, 40)):
            content[rng.randrange(16, len(content))] ^= 1 << rng.randrange(8)
    elif kind == 1:  # a torn write
        at = rng.randrange(16, len(content))
        content[at : at + 512] = bytes(len(content[at : at + 512]))
    else:  # a short file
        del content[rng.randrange(16, len(content)) :]
    (tmp_path / "p").write_bytes(content)
    with caplog.at_level(logging.WARNING, "miaotui"):
        file = opened(tmp_path / "p", slots=8)
    assert kind != 2 or "is damaged: it is begun anew" in caplog.text
    for i in range(8):
        found = file.get(digest(i))
        assert found is None or (found == i).all()
        del found
    file.check_integrity()
    for i in range(20, 28):
        if digest(i) not in file:
            file.put(digest(i), block(i))
    assert all((file.get(digest(i)) == i).all() for i in range(20, 28))  # type: ignore[union-attr]
    file.close()


def test_a_file_of_another_model_is_begun_anew_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = opened(tmp_path / "p")
    file.put(digest(1), block(1))
    file.close()
    with caplog.at_level(logging.WARNING, "miaotui"):
        other = opened(tmp_path / "p", model=bytes(32))
    assert "belongs to another model" in caplog.text
    assert len(other) == 0
    other.close()


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    precious = tmp_path / "model.gguf"
    precious.write_bytes(b"GGUF and so on")
    with pytest.raises(UsageError, match="is no prefix cache"):
        opened(precious)
    assert precious.read_bytes() == b"GGUF and so on"


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no room for a block"):
        open_prefix_file(tmp_path / "p", 4096, BLOCK, MODEL)
    with pytest.raises(ResourceError, match="cannot be used"):
        open_prefix_file(tmp_path / "none" / "p", room(2), BLOCK, MODEL)
    with pytest.raises(ResourceError, match="cannot be used"):
        open_prefix_file(tmp_path, room(2), BLOCK, MODEL)


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    opened(tmp_path / "p").close()
    assert os.name != "posix" or (tmp_path / "p").stat().st_mode & 0o077 == 0


def test_a_second_process_goes_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("fcntl", reason="this system has no file locks")
    path = tmp_path / "p"
    script = (
        "import sys; from pathlib import Path; from miaotui.engine.prefix_file import open_prefix_file\n"
        f"file = open_prefix_file(Path({str(path)!r}), {room(4)}, {BLOCK}, {MODEL!r})\n"
        "print('open', flush=True); sys.stdin.read()"
    )
    environment = {**os.environ, "PYTHONPATH": "src"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with caplog.at_level(logging.WARNING, "miaotui"):
            assert open_prefix_file(path, room(4), BLOCK, MODEL) is None
        assert "in use by another process" in caplog.text
        process.communicate(b"")
    opened(path).close()


class FullDisk:
    """A file on a disk that takes no block any more."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def seek(self, at: int) -> None:
        self._file.seek(at)

    def write(self, content: Any) -> int:
        if len(content) == BLOCK:
            raise OSError(28, "No space left on device")
        return int(self._file.write(content))

    def close(self) -> None:
        self._file.close()


def test_a_full_disk_is_said_once_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = opened(tmp_path / "p")
    file.put(digest(1), block(1))
    file._file = FullDisk(file._file)  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING, "miaotui"):
        for i in range(2, 9):
            file.put(digest(i), block(i))
    assert caplog.text.count("No space left on device") == 1
    file.check_integrity()
    assert digest(8) not in file
    file.close()


# -- the engine ------------------------------------------------------------------------------------------


def prompts(count: int) -> list[list[int]]:
    return [[(i * 31 + j) % 256 for j in range(64 + i)] for i in range(count)]


@pytest.mark.parametrize("slots", [1, 3, 5, 200])
@pytest.mark.parametrize("blocks", [7, 11])
def test_prefixes_beyond_memory_come_back(tmp_path: Path, slots: int, blocks: int) -> None:
    engine = toy_engine(blocks=blocks, file=tmp_path / "p", slots=slots)
    for _ in range(3):
        for prompt in prompts(6):
            request = engine.add_request(prompt, GREEDY)
            assert finish(engine)[request].outputs[0].token_ids == naive_greedy(prompt, 8)
    stats = engine.stats
    assert stats.blocks_paged_out > 0
    if slots == 200:
        assert stats.blocks_paged_in >= 2 * 6 * 3
        assert stats.prefix_hits >= 2 * 6 * 48
    engine.close()


def test_the_next_process_finds_them(tmp_path: Path) -> None:
    engine = toy_engine(file=tmp_path / "p", slots=50)
    for prompt in prompts(3):
        engine.add_request(prompt, GREEDY)
    finish(engine)
    assert engine.stats.blocks_paged_out == 0
    engine.close()
    again = toy_engine(file=tmp_path / "p", slots=50)
    for prompt in prompts(3):
        request = again.add_request(prompt, GREEDY)
        output = finish(again)[request]
        assert output.num_cached_tokens == (len(prompt) - 1) // 16 * 16
        assert output.outputs[0].token_ids == naive_greedy(prompt, 8)
    again.close()


def test_a_file_damaged_while_in_use(tmp_path: Path) -> None:
    """Blocks that fail their checksum are computed again, and a prefix ends where one is missing."""
    engine = toy_engine(blocks=7, file=tmp_path / "p", slots=100)
    rng = random.Random(1)
    for _ in range(4):
        for prompt in prompts(6):
            with (tmp_path / "p").open("r+b") as file:
                file.seek(rng.randrange(4096 + 100 * 32, 4096 + 100 * 32 + 30 * BLOCK))
                file.write(b"?")
            request = engine.add_request(prompt, GREEDY)
            assert finish(engine)[request].outputs[0].token_ids == naive_greedy(prompt, 8)
    engine.close()


def test_many_at_once_under_pressure(tmp_path: Path) -> None:
    engine = toy_engine(blocks=14, seqs=4, budget=40, file=tmp_path / "p", slots=24)
    longer = SamplingParams(temperature=0.0, max_tokens=30)
    for _ in range(3):
        asked = {engine.add_request(prompt[:35], longer): prompt[:35] for prompt in prompts(6)}
        for request, output in finish(engine).items():
            assert output.outputs[0].token_ids == naive_greedy(asked[request], 30)
    assert engine.stats.preemptions > 0
    assert engine.stats.blocks_paged_in > 0
    engine.close()
