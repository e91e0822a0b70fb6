"""What a signal, a closed stream or a closed terminal does to each command that runs long."""

import os
import pty
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import cycle

import pytest
from confluent_kafka import Consumer, TopicPartition

from pipeline.sandbox.servers.broker import MockBroker
from tests.commands import SCRIPT, Commands, Process, on_mock, wait
from tests.given import order_event
from tests.servers.databases import Database

pytestmark = pytest.mark.faults

TOPIC = "Notifications"

UNTIL_STOPPED = {
    "run": ("run",),
    "ingest": ("ingest",),
    "project": ("project",),
    "run, two workers": ("run", "--workers", "2"),
    "simulate": ("simulate", "--rate", "20", "--topic", "Simulated"),
}
"""Commands that run until they are stopped."""
INTERRUPTIONS = [signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.fixture
def broker() -> Iterator[MockBroker]:
    with MockBroker() as broker:
        broker.create_topic(TOPIC, 2)
        broker.create_topic("Simulated", 2)
        yield broker


@pytest.fixture
def commands(database: Database, broker: MockBroker) -> Commands:
    return on_mock(database, broker)


def start_all(commands: Commands, kept: ExitStack) -> dict[str, Process]:
    """Each command that runs until stopped, at work."""
    running = {}
    for name, arguments in UNTIL_STOPPED.items():
        running[name] = kept.enter_context(commands.started(*arguments))
        if name != "simulate":
            running[name].until('"started"')
    running["run, two workers"].until('"worker": 2')
    wait(lambda: has_records(commands, "Simulated"))
    return running


def has_records(commands: Commands, topic: str) -> bool:
    servers = commands.environment["PIPELINE_KAFKA_BOOTSTRAP_SERVERS"]
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "looks"})
    ends = [consumer.get_watermark_offsets(TopicPartition(topic, number))[1] for number in (0, 1)]
    consumer.close()
    return any(ends)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("numbers", [[signal.SIGHUP], INTERRUPTIONS[1:]], ids=["SIGHUP", "others"])
def test_an_interrupted_command_reports_it_and_is_a_failure_to_a_supervisor(commands, numbers):
    with ExitStack() as kept:
        running = start_all(commands, kept)
        sent = dict(zip(running, cycle(numbers)))
        for name, process in running.items():
            process.send(sent[name])
        codes = {name: process.wait() for name, process in running.items()}

    output = {name: "".join(process.err) for name, process in running.items()}
    assert codes == {name: 128 + number for name, number in sent.items()}, output
    assert "Produced " in output.pop("simulate")
    for name, lines in output.items():
        assert f'"stop_requested", "logger": "pipeline.{LOGGERS.get(name, "signals")}"' in lines
        assert f'"signal": "{sent[name].name}"' in lines
        assert f'"exit_code": {128 + sent[name]}' in lines
        assert "Traceback" not in lines


LOGGERS = {"run, two workers": "cli"}
"""The parent speaks for all of its workers."""


def test_sighup_is_ignored_under_nohup(commands):
    with started_with(commands, ["run"], lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)) as (
        process
    ):
        process.until('"started"')
        process.send(signal.SIGHUP)
        process.send(signal.SIGTERM)
        code = process.wait()

    assert code == 0, process.err
    assert '"signal": "SIGTERM"' in "".join(process.err)


def test_systemd_may_send_sighup_after_sigterm(commands):
    """``SendSIGHUP=yes``; only a second request ends at once."""
    slow = commands.with_(enable_failpoints="1", failpoint="on_sigterm:sleep:0.5")

    with slow.started("run") as run:
        run.until('"started"')
        run.send(signal.SIGTERM)
        run.until('"stop_requested"')
        run.send(signal.SIGHUP)

        assert run.wait() == 0, run.err


# ------------------------------------------------------------------ commands that end by themselves


@pytest.fixture
def busy(commands: Commands, given) -> Iterator[tuple[Commands, Callable[[], None]]]:
    """A log with an event, and what releases the lock that somebody has on it."""
    given([order_event("NEW", at=1)])
    done = commands.run("project", "--until-end")
    assert done.code == 0, done.err
    with given.database.connect(autocommit=False) as blocker:
        blocker.execute("LOCK TABLE upvest.orders, pipeline.consumer_offsets")
        yield commands.with_(lock_timeout_ms="60000"), blocker.rollback


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_that_is_ended_early_reports_it_and_never_exits_with_0(busy, given, number):
    waiting, release = busy
    with (
        waiting.started("verify", "--only", "log") as verify,
        waiting.started("rebuild", "orders", "users", "--check", "--jobs", "1") as check,
        waiting.started("status") as status,
    ):
        wait(lambda: given.scalar(SESSIONS_THAT_WAIT) == 3)
        for process in (verify, check, status):
            process.send(number)
        codes = [verify.wait(), status.wait()]
        release()
        codes.append(check.wait())

    output = [*verify.err, *check.err, *status.err]
    assert codes == [128 + number] * 3, output
    if number != signal.SIGINT:
        assert f"ended by {number.name} before it was done" in verify.err[-1]
    assert not any("Traceback" in line for line in output)


SESSIONS_THAT_WAIT = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
    "AND wait_event_type = 'Lock'"
)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGHUP, 129)]
)
def test_a_watching_command_ends_with_0_on_ctrl_c_and_129_on_sighup(commands, given, number, code):
    given([order_event("NEW", at=1)])

    with (
        commands.started("status", "--watch") as watch,
        commands.started("events", "--follow") as follow,
    ):
        watch.until("Notifications:0")
        follow.until("Following")
        for process in (watch, follow):
            process.send(number)
        codes = [watch.wait(), follow.wait()]

    assert codes == [code, code], [watch.err, follow.err]


# ---------------------------------------------------------------------------- streams and terminals


class started_with:  # noqa: N801 - reads as a verb
    """A command with its own preparation of the child."""

    def __init__(self, commands: Commands, arguments: list[str], prepare) -> None:
        self._process = Process(
            subprocess.Popen(
                [SCRIPT, *arguments],
                env=commands.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                bufsize=1,
                preexec_fn=prepare,
            )
        )

    def __enter__(self) -> Process:
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.end()


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)])
def test_a_worker_without_standard_streams_does_its_work(commands, given, closed):
    """No socket may get the number of stderr: whatever is written there would go to a server."""

    def close() -> None:
        for number in closed:
            os.close(number)

    given([order_event("NEW", at=1)])
    with started_with(commands, ["project", "--until-end"], close) as process:
        code = process.wait()

    assert code == 0
    assert given.scalar("SELECT count(*) FROM upvest.orders") == 1


def test_a_worker_continues_when_nobody_reads_its_log(commands, given):
    given([order_event("NEW", at=1)])
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [SCRIPT, "project", "--until-end"],
        env=commands.environment,
        stderr=writing,
        stdout=writing,
        check=False,
    )
    os.close(writing)

    assert done.returncode == 0
    assert given.scalar("SELECT count(*) FROM upvest.orders") == 1


@pytest.mark.parametrize(
    "command", ["status", "events --json", "status --json", "events --follow --since 9h"]
)
def test_a_reader_that_leaves_early_ends_the_command_quietly(commands, given, command):
    """``pipeline events | head -1``."""
    given([order_event("NEW", at=n, order=str(n)) for n in range(3)])
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [SCRIPT, *command.split()],
        env=commands.environment,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)

    assert done.returncode == 128 + signal.SIGPIPE, done.stderr
    assert done.stderr in ("", "Following the log. Press Ctrl-C to end.\n")


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "--until-end"], ["rebuild", "orders"]], ids=" ".join
)
def test_a_closed_terminal_ends_the_command_normally(commands, given, arguments):
    """It gets SIGHUP, and everything that it writes from then on fails."""
    given([order_event("NEW", at=n, order=str(n)) for n in range(3)])
    slow = commands.with_(
        enable_failpoints="1", failpoint="on_sigterm:sleep:0.3", log_format="json"
    )
    ours, theirs = pty.openpty()
    with given.database.connect(autocommit=False) as blocker:
        if arguments != ["run"]:  # the others end by themselves
            blocker.execute("LOCK TABLE upvest.orders")
        process = subprocess.Popen(
            [SCRIPT, *arguments],
            env=slow.environment | {"TERM": "xterm"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take_terminal,
        )
        os.close(theirs)
        try:
            seen = read_until(ours, b"rebuilding" if "rebuild" in arguments else b'"started"')
            os.close(ours)
            blocker.rollback()
            assert process.wait(30) == 128 + signal.SIGHUP, seen
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()


def take_terminal() -> None:
    """Make stdin the controlling terminal of this new session."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def read_until(terminal: int, what: bytes) -> bytes:
    seen = b""
    while what not in seen:
        seen += os.read(terminal, 65_536)
    return seen
