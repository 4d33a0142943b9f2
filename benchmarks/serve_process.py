"""A server in a process of its own, and what the kernel says about that process."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Server:
    """A running server: its address and its process."""

    host: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def get(self, path: str) -> tuple[int, bytes]:
        """Status and body."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()

    def rss(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * PAGE

    def cpu(self) -> Cpu:
        """CPU time until now."""
        seconds = thread_seconds(self.process.pid)
        loop = seconds.pop(self.process.pid)
        return Cpu(loop, sum(seconds.values()))

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class Cpu:
    """CPU seconds of a server: of the thread with its event loop, and of all others, which compute."""

    loop: float
    rest: float

    def __sub__(self, earlier: Cpu) -> Cpu:
        return Cpu(self.loop - earlier.loop, self.rest - earlier.rest)


def thread_seconds(pid: int) -> dict[int, float]:
    """CPU seconds of each thread of a process that still lives."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = (task / "stat").read_text().rpartition(")")[2].split()
            found[int(task.name)] = (int(words[11]) + int(words[12])) / TICK
    return found


@contextlib.contextmanager
def serving(arguments: Sequence[str], *, module: str = "miaotui.cli.main", log: Path) -> Iterator[Server]:
    """`python -m module serve ARGUMENTS --port 0`, ready; its stderr goes to `log`. Ended by SIGTERM, then by force."""
    server = start(arguments, module=module, log=log)
    try:
        wait_ready(server, log)
        yield server
    finally:
        server.resume()
        server.process.terminate()
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


def start(arguments: Sequence[str], *, module: str = "miaotui.cli.main", log: Path) -> Server:
    """Start one and wait until it listens, which it does before its model is loaded."""
    command = [sys.executable, "-m", module, "serve", *arguments, "--port", "0"]
    with log.open("wb") as errors:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
    while not (found := re.search(r"Listening on https?://([\d.]+):(\d+)", log.read_text(errors="replace"))):
        if process.poll() is not None:
            raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')}")
        time.sleep(0.002)
    return Server(found[1], int(found[2]), process)


def wait_ready(server: Server, log: Path, pause: float = 0.005) -> None:
    """Until /ready says so."""
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            if server.get("/ready")[0] == 200:
                return
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended: {log.read_text(errors='replace')}")
        time.sleep(pause)
