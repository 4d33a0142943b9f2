"""A runner in its own process: started once, asked one thing at a time, and stopped dead in between."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from miaotui.measure.peers.alone.peer_runners.worker import Config, Generation
from miaotui.measure.peers.environments import PeerUnavailableError

START_SECONDS, ANSWER_SECONDS = 600.0, 900.0
ALONE = Path(__file__).parent / "alone"


class Worker:
    """One engine. After `__init__` it is loaded and paused; whoever asks it something wakes it for that time only.

    Idle engines keep threads that spin or poll; a paused one (SIGSTOP to its process group) takes nothing from the
    one that is being measured. `module` is run by `python`, which imports from `home` beside its own; `who` begins the
    messages. Raises PeerUnavailableError when it fails to start, to answer, or in time.
    """

    def __init__(
        self, module: str, python: Path, config: Config, log: Path, who: str = "it", home: Path = ALONE
    ) -> None:
        command = [str(python), "-m", module, json.dumps(asdict(config))]
        self._log, self._who = log, who
        self._buffer = b""
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=home,
                env=_environment(python, config.threads, home),
                start_new_session=True,
            )
        try:
            started = time.perf_counter()
            ready = self._answer(START_SECONDS)["ready"]
            self.start_seconds = time.perf_counter() - started
        except BaseException:
            self.close()
            raise
        self.versions: dict[str, str] = ready["versions"]
        self.settings: dict[str, Any] = ready["settings"]
        self.facts: dict[str, Any] = ready["facts"]
        self._pause()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generation:
        """Greedy continuations that never stop early; see `runners.worker`."""
        self._signal(signal.SIGCONT)
        try:
            line = json.dumps({"prompts": [list(prompt) for prompt in prompts], "new_tokens": new_tokens})
            with contextlib.suppress(BrokenPipeError):  # it died: reading its answer says so better
                _pipe(self._process.stdin).write(line.encode() + b"\n")
                _pipe(self._process.stdin).flush()
            return Generation(**self._answer(ANSWER_SECONDS))
        finally:
            self._pause()

    def cpu_seconds(self) -> float:
        """Processor time that it and its processes have taken so far."""
        return sum(
            _cpu_seconds(stat) for stat in Path("/proc").glob("[0-9]*/stat") if _group(stat) == self._process.pid
        )

    def close(self) -> None:
        """End it, and whatever it started."""
        self._signal(signal.SIGCONT)
        _pipe(self._process.stdin).close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._signal(signal.SIGKILL)
        self._process.wait()
        _pipe(self._process.stdout).close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _pause(self) -> None:
        """Returns when it stands still, or is no more."""
        self._signal(signal.SIGSTOP)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _answer(self, limit: float) -> dict[str, Any]:
        """The next line, as JSON."""
        stream, until = _pipe(self._process.stdout), time.monotonic() + limit
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([stream], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise PeerUnavailableError(f"{self._who} gave no answer within {limit:.0f} s")
            piece = os.read(stream.fileno(), 1 << 20)
            if not piece:
                raise PeerUnavailableError(f"{self._who} ended without an answer ({_last_line(self._log)})")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise PeerUnavailableError(f"{self._who} failed: {str(message['error'])[:300]}")
        return message


def _fields(stat: Path) -> list[str]:
    """/proc/PID/stat after the name: state, parent, group, … ; empty when the process is gone."""
    try:
        return stat.read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _group(stat: Path) -> int | None:
    fields = _fields(stat)
    return int(fields[2]) if fields else None


def _cpu_seconds(stat: Path) -> float:
    fields = _fields(stat)
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") if fields else 0.0


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None
    return stream


def _environment(python: Path, threads: int, home: Path) -> dict[str, str]:
    """As many threads everywhere; Intel's OpenMP where the peer's environment has it, as vLLM's guide asks."""
    number = str(threads)
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    variables = {**os.environ, **dict.fromkeys(names, number), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    variables["PYTHONPATH"] = str(home)
    openmp = python.parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        variables["LD_PRELOAD"] = str(openmp)
    return variables


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it wrote nothing"
