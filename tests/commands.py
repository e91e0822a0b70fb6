"""The command line for tests: in this process, which is fast, or as a process of its own."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog

from pipeline.cli import main
from pipeline.cli.command import COMMANDS, Command, declared
from pipeline.sandbox.servers.broker import MockBroker
from tests import waiting
from tests.servers.databases import Database

SCRIPT = Path(sys.executable).with_name("pipeline")
WAIT_SECONDS_MAX = 60.0


@dataclass(frozen=True)
class Result:
    """The result of a command: exit code, data on stdout, messages and logs on stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as one JSON document."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """stdout with one JSON document per line."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def log(self) -> list[dict[str, Any]]:
        """The log lines of stderr."""
        return [json.loads(line) for line in self.err.splitlines() if line.startswith("{")]


class Commands:
    """``pipeline …`` with the settings of a test.

    Args:
        **settings: As in the environment, e.g. ``database_url=…``.
    """

    def __init__(self, **settings: str) -> None:
        self._settings = {f"PIPELINE_{name.upper()}": value for name, value in settings.items()}

    def with_(self, **settings: str) -> "Commands":
        """The same with other settings."""
        changed = Commands(**settings)
        changed._settings = self._settings | changed._settings
        return changed

    @property
    def environment(self) -> dict[str, str]:
        """The environment of the process, with only these settings."""
        rest = {name: value for name, value in os.environ.items() if name[:9] != "PIPELINE_"}
        return {**rest, **self._settings}

    def run(self, *arguments: str, **popen: Any) -> Result:
        """Run it as a process, to its end."""
        done = subprocess.run(
            [SCRIPT, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=WAIT_SECONDS_MAX,
            **popen,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    @contextmanager
    def started(self, *arguments: str) -> Iterator["Process"]:
        """Run it until the block ends."""
        process = Process(
            subprocess.Popen(
                [SCRIPT, *arguments],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                bufsize=1,
                # A shell starts background jobs with Ctrl-C ignored, perhaps this whole run too.
                preexec_fn=_enable_ctrl_c,
            )
        )
        try:
            yield process
        finally:
            process.end()


def _enable_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Process:
    """A running command; its output is read as it arrives."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.out: list[str] = []
        self.err: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=[stream, lines], daemon=True)
            for stream, lines in ((process.stdout, self.out), (process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines += [line]  # at once, for ``until``

    def until(self, text: str) -> None:
        """Wait until the command has written a text, on stdout or stderr."""
        wait(lambda: text in "".join([*self.out, *self.err]) or self._process.poll() is not None)
        assert text in "".join([*self.out, *self.err]), "".join(self.err)

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Wait for the end of the process; its exit code."""
        code = self._process.wait(WAIT_SECONDS_MAX)
        for reader in self._readers:
            reader.join()
        return code

    def end(self) -> None:
        """End the process and its readers."""
        if self._process.poll() is None:
            self._process.kill()
        self.wait()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


wait = partial(waiting.until, what="it holds", seconds_max=WAIT_SECONDS_MAX)


def on_mock(database: Database, broker: MockBroker, topic: str = "Notifications") -> Commands:
    """Settings for a database and a mock broker."""
    return Commands(
        database_url=database.dsn,
        kafka_bootstrap_servers=broker.bootstrap_servers,
        kafka_security_protocol="PLAINTEXT",
        # The mock cluster does not share partitions by the classic protocol.
        kafka_group_protocol="consumer",
        topics=topic,
    )


class InProcess:
    """Runs commands in this process, and restores what they change in it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, commands: Commands, *arguments: str) -> Result:
        """Run to the end."""
        self._capsys.readouterr()
        with self._monkeypatch.context() as patch, _as_before():
            for name in os.environ:
                if name.startswith("PIPELINE_"):
                    patch.delenv(name)
            for name, value in commands.environment.items():
                if name.startswith("PIPELINE_"):
                    patch.setenv(name, value)
            with pytest.raises(SystemExit) as end:
                main(arguments)
        out, err = self._capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Result(int(end.value.code), out, err)


@contextmanager
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers = list(root.handlers)
    names = ("", "pipeline", "alembic", "librdkafka")
    levels = {name: logging.getLogger(name).level for name in names}
    hooks = sys.excepthook, threading.excepthook
    try:
        yield
    finally:
        root.handlers = handlers
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        sys.excepthook, threading.excepthook = hooks
        logging.captureWarnings(capture=False)
        structlog.reset_defaults()


def command_names() -> list[str]:
    """The names of all commands; those of a group with both words."""
    found = []
    for name in COMMANDS:
        command = declared(name)
        members = [] if isinstance(command, Command) else command.commands
        found += [f"{name} {member.name}" for member in members] or [name]
    return found
