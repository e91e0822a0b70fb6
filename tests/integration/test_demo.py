"""The demo, run as a newcomer runs it: it ends well, tells the truth, and leaves nothing behind."""

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psycopg
import pytest

from pipeline.partitions import Offset
from pipeline.sandbox.demo.load import Ledger
from pipeline.sandbox.simulator import Record
from tests import canaries, waiting

pytestmark = [pytest.mark.postgres, pytest.mark.timeout(300)]

EVENTS = 2_000
DEMO = [sys.executable, "-m", "pipeline", "demo", "--events", str(EVENTS)]
# Makes the terminal that is its stdin the one whose Ctrl-C it gets, then becomes the demo.
ON_A_TERMINAL = (
    "import fcntl, os, sys, termios;"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)
WAIT_SECONDS_MAX = 200.0

pytestmark.append(
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes left, in /proc")
)


class Room:
    """A folder for what the demo puts down, and its processes: they all carry the folder's name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # The demo takes no settings from outside, and shows none.
        self.environment = {
            **os.environ,
            "TMPDIR": str(folder),
            "COLUMNS": "92",
            "PIPELINE_DATABASE_URL": f"postgresql://u:{canaries.WRONG_PASSWORD}@127.0.0.1:1/d",
            "PIPELINE_KAFKA_PASSWORD": canaries.KAFKA_PASSWORD,
        }

    def processes(self) -> list[str]:
        mark = f"TMPDIR={self.folder}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except (FileNotFoundError, PermissionError, ProcessLookupError):
                continue  # has ended, or is somebody else's
        return found

    def contents(self) -> list[str]:
        """What the demo has left: processes, files and folders."""
        return [*self.processes(), *map(str, self.folder.iterdir())]


@pytest.fixture
def room() -> Iterator[Room]:
    # Not below pytest's own folder: as root, PostgreSQL runs as an account that may not go there.
    folder = Path(tempfile.mkdtemp(prefix="demo-", dir="/tmp"))
    folder.chmod(0o755)
    yield Room(folder)
    shutil.rmtree(folder)


def numbers(output: str, name: str) -> list[int]:
    """The number beside a name, wherever the demo tells it."""
    found = re.findall(rf"^   {re.escape(name)} +([\d,]+)\b", output, re.MULTILINE)
    return [int(number.replace(",", "")) for number in found]


until = partial(waiting.until, seconds_max=WAIT_SECONDS_MAX)


def read_until(lines: Iterator[str], text: str) -> list[str]:
    """What was printed up to and with the line that holds a text."""
    read = []
    for line in lines:
        read.append(line)
        if text in line:
            return read
    raise AssertionError(f"{text!r} never came:\n{''.join(read)}")


def test_the_demo_ends_with_every_check_held_and_leaves_nothing(room):
    ended = subprocess.run(DEMO, env=room.environment, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert room.contents() == []
    assert ended.stderr == ""
    assert canaries.leaks(ended.stdout) == canaries.simulated(ended.stdout) == []
    assert "\x1b" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 100
    [produced] = set(numbers(ended.stdout, "records produced"))
    assert numbers(ended.stdout, "in the read models") == [produced]
    logged_then, logged_at_the_end = numbers(ended.stdout, "in the log")
    assert logged_then == produced < logged_at_the_end
    assert numbers(ended.stdout, "rows right after") == [0]
    assert numbers(ended.stdout, "rows repaired")[0] >= numbers(ended.stdout, "rows before")[0] > 0
    assert numbers(ended.stdout, "rows that differed") == [0]
    assert "0 missing, 0 extra, 0 changed" in ended.stdout
    assert "WRONG" not in ended.stdout
    assert re.search(r"All \d+ checks hold", ended.stdout)


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["1  Servers and workers", "2  A day at a broker"])
def test_ctrl_c_before_the_end_leaves_nothing(room, moment):
    with subprocess.Popen(DEMO, env=room.environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        read_until(running.stdout, moment)
        running.send_signal(signal.SIGINT)
        rest = running.stdout.read()

    assert running.returncode == 130
    assert "Stopped. Servers, workers and their folder are removed." in rest
    assert room.contents() == []


@pytest.mark.faults
def test_a_killed_demo_leaves_nothing(room):
    with subprocess.Popen(DEMO, env=room.environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        read_until(running.stdout, "2  A day at a broker")
        running.kill()

    until(lambda: room.contents() == [], "processes and folders of a killed demo go")


@pytest.mark.faults
def test_the_demo_fails_if_an_amount_is_wrong_by_a_cent(room):
    with subprocess.Popen(DEMO, env=room.environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        opening = read_until(running.stdout, "2  A day at a broker")
        read_until(running.stdout, "4  Faults")
        [dsn] = re.findall(r"postgresql://\S+", "".join(opening))
        with psycopg.connect(dsn) as db:
            db.execute("UPDATE upvest.cash_balances SET balance = balance + 0.01")
        rest = running.stdout.read()

    assert running.returncode == 1
    assert re.search(r"cash balances +\d+   WRONG", rest)
    assert re.search(r"replayed +[\d,]+   WRONG", rest)
    assert "checks FAILED" in rest
    [folder] = re.findall(r"The logs of the workers and of PostgreSQL:\s+(\S+)", rest)
    assert {path.name for path in Path(folder).iterdir()} == {
        "worker-1.log",
        "worker-2.log",
        "server.log",
    }
    assert not room.processes()


@pytest.mark.faults
def test_on_a_terminal_the_demo_runs_until_ctrl_c(room):
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 92, 0, 0))
    running = subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, *DEMO[1:]],
        env={**room.environment, "TERM": "xterm-256color"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    screen = Terminal(controller)

    screen.read_until("pipeline rebuild orders --check")
    [environment] = re.findall(r"source (\S+)", screen.text)
    status = subprocess.run(
        ["bash", "-c", f"source '{environment}' && pipeline status --json"],
        capture_output=True,
        check=False,
    )
    still_up = running.poll() is None
    os.write(controller, b"\x03")
    screen.read_until_closed()

    assert running.wait(WAIT_SECONDS_MAX) == 0
    assert still_up
    assert status.returncode == 0, status.stderr
    assert json.loads(status.stdout)["ok"] is True
    assert "records produced" in screen.text
    assert "Stopping." in screen.text
    assert "Traceback" not in screen.text
    assert room.contents() == []


class Terminal:
    """The other end of a pseudo-terminal; it keeps what was written there, without colours."""

    def __init__(self, controller: int) -> None:
        self._controller = controller
        self._written = b""

    @property
    def text(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self._written.decode(errors="replace"))

    def read_until(self, text: str) -> None:
        deadline = time.monotonic() + WAIT_SECONDS_MAX
        while text not in self.text:
            assert time.monotonic() < deadline, f"{text!r} never came:\n{self.text}"
            assert self._read(), f"closed before {text!r}:\n{self.text}"

    def read_until_closed(self) -> None:
        while self._read():
            pass
        os.close(self._controller)

    def _read(self) -> bool:
        try:
            more = os.read(self._controller, 65_536)
        except OSError:  # Linux's way to say that the last writer is gone
            return False
        self._written += more
        return bool(more)


def test_the_ledger_reports_missing_extra_and_changed_records():
    ledger = Ledger()
    for offset, value in enumerate([b"first", b"second", None]):
        ledger.note("topic", 0, Offset(offset), Record("topic", 0, None, value, (), 0))
    logged = {(0, 0): ledger.digest(b"first"), (0, 1): ledger.digest(b"other"), (0, 7): None}

    found = ledger.compare(logged)

    assert (found.missing, found.extra, found.changed) == (1, 1, 1)
