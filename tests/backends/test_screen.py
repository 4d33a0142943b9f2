"""The screen of a head: the same token as by the whole head, with less of it read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from miaotui.backends.cpu import CpuBackend, _native, backend
from miaotui.backends.cpu.backend import CpuExecutor
from miaotui.backends.cpu.weights import matrix
from miaotui.backends.ops import FEW_ROWS, CacheSpec, ComputeType, Step, StepShape
from miaotui.quant.scheme import QuantScheme
from miaotui.quant.tensor import DenseTensor, GroupedTensor, Tensor

TOKENS = 48


def head_of(kind: str, rows: NDArray[np.float32]) -> Tensor:
    """The head as a checkpoint would hold it."""
    if kind == "float32":
        return DenseTensor("float32", rows)
    if kind == "float16":
        return DenseTensor("float16", rows.astype(np.float16))
    if kind == "bfloat16":
        return DenseTensor("bfloat16", (rows.view(np.uint32) >> 16).astype(np.uint16))
    group = 32 if kind == "int8 in groups" else rows.shape[1]
    parts = rows.reshape(len(rows), -1, group)
    scale = (np.abs(parts).max(axis=2) / 127).astype(np.float16).astype(np.float32)
    codes = np.clip(np.round(parts / np.maximum(scale, 1e-12)[:, :, None]), -127, 127) + 128
    scheme = QuantScheme(8, 32 if group == 32 else None, True, "float16")
    return GroupedTensor(scheme, codes.reshape(rows.shape).astype(np.uint8), scale, None)


def executor_of(
    head: Tensor,
    inputs: NDArray[np.float32],
    *,
    isa: str | None = None,
    compute: ComputeType = "auto",
    threads: int = 2,
    screen: bool = True,
    store: Any = None,
    norm: bool = False,
) -> CpuExecutor:
    """A model of a table of tokens and a head: a token's logits are its row of `inputs` times the head."""
    shape = StepShape(max_tokens=TOKENS, max_seqs=1, max_logits_rows=TOKENS, max_model_len=64)
    made = CpuBackend(
        shape, CacheSpec(), compute=compute, isa=isa, threads=threads, screen=screen, store=store, fuse=True
    )
    ops = made.ops
    table, weight = ops.prepare_embedding(DenseTensor("float32", inputs)), ops.prepare_linear([head])
    scale = ops.prepare_norm(np.linspace(0.5, 2.0, inputs.shape[1], dtype=np.float32), 1e-5)

    def forward(o: Any) -> Any:
        x = o.select_rows(o.embed(table))
        return o.logits(o.norm(x, scale) if norm else x, weight)

    executor = made.record(forward)
    executor.allocate_cache(4)
    return executor


def run(executor: CpuExecutor, tokens: list[int], *, greedy: bool) -> tuple[NDArray[np.float32], list[int] | None]:
    count = len(tokens)
    at = np.arange(count, dtype=np.int32)
    ends, context = np.array([0, count], np.int32), np.array([count], np.int32)
    step = Step(np.array(tokens, np.int32), at, ends, context, np.zeros((1, 4), np.int32), at, greedy)
    logits = executor.run(step)
    return logits, executor.likeliest(logits, range(count))


def skewed(height: int, width: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows with a common part and a few large columns, as heads have; inputs that favour one, some clearly."""
    rng = np.random.default_rng(seed)
    columns = np.exp(0.5 * rng.standard_normal(width)) * rng.choice([1.0, 6.0], width, p=[0.9, 0.1])
    own, common = rng.standard_normal((height, width)), 2.0 * rng.standard_normal(width)
    noise = np.linspace(0.1, 1.5, TOKENS)[:, None] * rng.standard_normal((TOKENS, width))
    inputs = (own[rng.integers(0, height, TOKENS)] + noise) / columns
    return ((own + common) * columns).astype(np.float32), inputs.astype(np.float32)


@pytest.fixture(autouse=True)
def any_head_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "SCREEN_LEAST", 0.0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["int8 in groups", "int8 in rows", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("isa", _native.isas())
def test_the_same_token_as_by_the_whole_head(isa: str, kind: str, norm: bool) -> None:
    """Rows that end inside a panel, more threads than one; one row and two."""
    rows, inputs = skewed(9003, 256 if "groups" in kind else 260, seed=len(kind))
    head = head_of(kind, rows)
    executor = executor_of(head, inputs, isa=isa, norm=norm, threads=3)
    for first in range(0, TOKENS - 1, 3):
        for tokens in ([first], [first, first + 1]):
            whole, _ = run(executor, tokens, greedy=False)
            wanted = whole.argmax(axis=1).tolist()
            assert run(executor, tokens, greedy=True)[1] == wanted
    assert executor._program.screening


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", ["int8 in groups", "float32"])
@pytest.mark.parametrize("isa", _native.isas())
def test_bounds_hold_where_they_are_tight(isa: str, kind: str, norm: bool) -> None:
    """An input along what the coarse rows miss of one row: it has the greatest logit by far, of which they see nothing.

    Other rows look better by chance, and are looked at first. All have much in common, of either sign.
    """
    height, width, apart = 3200, 2048, 32
    rng = np.random.default_rng(10)
    rows = rng.standard_normal((height, width)) + 3.0 * rng.standard_normal(width)
    head = head_of(kind, rows.astype(np.float32))
    pool, heap = _native.Pool(2), _native.Heap()
    packed = matrix(pool, heap, head).packed
    screen = _native.Screen.of(pool, heap, packed, isa)
    centre, columns, _ = np.split(screen.facts.dequantise()[0], [width, width + apart])
    plain, first, second = np.split(screen.coarse.dequantise(), [width, width + apart], axis=1)
    plain[:, columns.astype(int)] += first + second
    chosen = np.array([0, 16, height - 1, *rng.permutation(height)[:3]])  # in the first panels and the last, and others
    seen, missed = plain[chosen], (packed.dequantise() - centre - plain)[chosen]
    missed -= seen * ((seen * missed).sum(axis=1) / (seen * seen).sum(axis=1))[:, None]
    inputs = missed / (np.linspace(0.5, 2.0, width) if norm else 1.0)
    executor = executor_of(head, inputs.astype(np.float32), isa=isa, norm=norm)
    for token, row in enumerate(chosen):
        assert run(executor, [token], greedy=False)[1] == [row]
        assert executor._program.screening
        assert run(executor, [token], greedy=True)[1] == [row]


@pytest.mark.parametrize("count", range(1, FEW_ROWS + 1))
def test_little_of_the_head_is_read(count: int) -> None:
    """What a greedy step does not compute is left as it was."""
    rows, inputs = skewed(4096, 256, seed=1)
    executor = executor_of(head_of("int8 in groups", rows), inputs)
    computed = []
    for token in range(TOKENS // 2 - count):
        executor._logits[:count] = np.nan
        logits, _ = run(executor, list(range(token, token + count)), greedy=True)
        computed.append(np.isfinite(logits[0]).mean())
    assert min(computed) >= 16 / 4096
    assert np.mean(computed) < 0.3
    assert executor.greedy_bytes < 0.75 * executor.weight_bytes


@pytest.mark.parametrize("kind", ["int8 in groups", "int8 in rows", "float32"])
@pytest.mark.parametrize("height", [600, 1024])
def test_more_rows_are_only_looked_at(kind: str, height: int) -> None:
    """Their logits are computed whole, and of a greedy step not written."""
    rows, inputs = skewed(height, 256, seed=2)
    executor = executor_of(head_of(kind, rows), inputs)
    tokens = list(range(FEW_ROWS + 1))
    logits, wanted = run(executor, tokens, greedy=False)
    assert wanted == logits.argmax(axis=1).tolist()
    executor._logits[:] = np.nan
    logits, found = run(executor, tokens, greedy=True)
    assert found == wanted
    assert np.isnan(logits).all()


@pytest.mark.parametrize("kind", ["int8 in groups", "float32"])
def test_the_first_of_equals(kind: str) -> None:
    rows, inputs = skewed(640, 256, seed=3)
    rows[320:] = rows[:320]  # every logit twice, in different panels and threads
    executor = executor_of(head_of(kind, rows), inputs)
    for token in range(TOKENS):
        whole, _ = run(executor, [token], greedy=False)
        assert run(executor, [token], greedy=True)[1] == [int(whole[0].argmax())]
        assert int(whole[0].argmax()) < 320


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_an_input_that_says_nothing(value: float) -> None:
    """All logits alike, or not numbers: the first."""
    rows, inputs = skewed(320, 256, seed=4)
    inputs[0] = value
    executor = executor_of(head_of("int8 in groups", rows), inputs)
    for tokens in ([0], [0] * (FEW_ROWS + 1)):
        for greedy in (False, True):
            run(executor, [1] * len(tokens), greedy=greedy)  # what this found must not be found again
            assert run(executor, tokens, greedy=greedy)[1] == [0] * len(tokens)


def test_a_screen_that_does_not_pay_rests() -> None:
    """Where all logits are nearly alike no bound keeps one out; after a while it is tried again."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((1024, 256)).astype(np.float32)
    inputs = rng.standard_normal((TOKENS, 256)).astype(np.float32)
    executor = executor_of(head_of("int8 in groups", rows), inputs)
    seen = []
    for step in range(600):
        whole, _ = run(executor, [step % TOKENS], greedy=False)
        seen.append(executor._program.screening)
        assert run(executor, [step % TOKENS], greedy=True)[1] == [int(whole[0].argmax())]
    rests = [at for at in range(1, 600) if seen[at - 1] and not seen[at]]
    assert len(rests) >= 2
    assert 100 < rests[1] - rests[0] < 300  # whole steps count as well


def test_what_has_no_screen() -> None:
    rows, inputs = skewed(320, 256, seed=6)
    four = GroupedTensor(
        QuantScheme(4, 32, True, "float16"), np.full((320, 256), 9, np.uint8), np.ones((320, 8), np.float32), None
    )
    assert not executor_of(four, inputs)._program.screening  # nothing would be saved
    assert not executor_of(head_of("int8 in groups", rows), inputs, compute="fp32")._program.screening
    assert not executor_of(head_of("float32", rows), inputs, screen=False)._program.screening
    assert executor_of(head_of("float32", rows), inputs, compute="fp32")._program.screening


@pytest.mark.parametrize("limit", ["SCREEN_LEAST", "SCREEN_MOST", "memory"])
def test_where_it_does_not_pay_there_is_none(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, inputs = skewed(320, 256, seed=7)
    if limit == "memory":
        monkeypatch.setattr(backend.detect, "available_memory", lambda: 2 * 320 * 256 - 1)
    else:
        monkeypatch.setattr(backend, limit, {"SCREEN_LEAST": 0.9, "SCREEN_MOST": 320 * 256 - 1}[limit])
    executor = executor_of(head_of("float32", rows), inputs)
    assert not executor._program.screening
    assert executor.greedy_bytes == executor.weight_bytes


class Remembering:
    """A store that gives back what it was given, once it is full."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Any]] = []
        self.full = False
        self.taken = 0

    def take(self, description: str) -> Any:
        if not self.full:
            return None
        self.taken += 1
        assert self.kept[self.taken - 1][0] == description
        return self.kept[self.taken - 1][1]

    def put(self, description: str, weight: Any) -> None:
        assert not self.full
        self.kept.append((description, weight))

    @property
    def exhausted(self) -> bool:
        return self.full and self.taken == len(self.kept)


@pytest.mark.parametrize("kept", [True, False])
def test_it_is_kept_with_the_packed_weights(kept: bool) -> None:
    """One that was kept is taken; beside weights that were kept without one it is made anew, and kept nowhere."""
    rows, inputs = skewed(320, 256, seed=8)
    head, store = head_of("int8 in groups", rows), Remembering()
    first = executor_of(head, inputs, store=store, screen=kept)
    store.full = True
    again = executor_of(head, inputs, store=store)
    assert len(store.kept) == store.taken == (4 if kept else 2)
    assert again._program.screening
    assert first._program.screening is kept
    for token in range(TOKENS):
        assert run(again, [token], greedy=True)[1] == [int(run(first, [token], greedy=False)[0].argmax())]


def test_damaged_parts_are_refused() -> None:
    pool, heap = _native.Pool(1), _native.Heap()
    rows, _ = skewed(64, 256, seed=9)
    screen = _native.Screen.of(pool, heap, _native.PackedWeight.dense(pool, heap, rows, "float32"), "portable")
    row = screen.facts.dequantise()
    row[0, 256] = 256.0  # the first column apart
    for facts in (row, row[:, :-1]):
        wrong = _native.PackedWeight.dense(pool, heap, np.ascontiguousarray(facts), "float32")
        with pytest.raises(ValueError, match=r"no such column|no screen"):
            _native.Screen.again(screen.coarse, wrong)
    with pytest.raises(ValueError, match="no screen"):
        _native.Screen.again(screen.facts, screen.facts)
