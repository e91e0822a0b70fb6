"""A stopped PostgreSQL: its connections stay open, and the kernel still acknowledges packets."""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipeline.errors import ExitCode
from pipeline.sandbox.servers.postgres import PostgresServer
from tests.faults.harness import Bench, Worker, until

PER_SECOND = 150
LONG_SESSION = "session.timeout.ms=45000,heartbeat.interval.ms=500"
GRACE_S = 30
"""The default grace period of Kubernetes."""

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc of Linux"),
]


@contextmanager
def stopped(pids: Iterable[int]) -> Iterator[None]:
    """SIGSTOP for the length of the block. Each is stopped before the next is computed."""
    stopped_pids: list[int] = []
    try:
        for pid in pids:
            stopped_pids.append(pid)
            with suppress(ProcessLookupError):  # a session may end in between
                os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in stopped_pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def processes_of(server: PostgresServer) -> Iterator[int]:
    """The postmaster, so that it starts no other, and once it is stopped its processes."""
    yield server.pid
    yield from map(int, Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split())


def test_a_postgresql_that_hangs_blocks_nothing_for_longer_than_a_grace_period(
    shaky_postgres: Bench, private_postgres: PostgresServer
):
    """A worker that may wait continues when PostgreSQL resumes; the others end.

    One worker is stopped with an unfinished batch, another while it is idle; one command is in the
    middle of its work, another has not begun.
    """
    bench = shaky_postgres
    bench.kafka.create_topic(f"{bench.topic}-idle", 1)
    stays, leaves = [bench.worker("run", kafka_options=LONG_SESSION) for _ in range(2)]
    idle = bench.worker(topics=f"{bench.topic}-idle", group_id=f"{bench.group}-idle")

    with bench.feed(rate=PER_SECOND) as feed:
        all_of_them = {stays.pid, leaves.pid, idle.pid}
        until(lambda: set(bench.owners_of_all().values()) == all_of_them, "each owns some")
        until(lambda: bench.count("orders"), "there are orders")
        rebuild = bench.worker("rebuild", "orders", fail="mid_rebuild:stop", through=bench.as_owner)
        rebuild.wait_until_stopped()
        bench.prepare_role()
        with stopped(processes_of(private_postgres)):
            rebuild.resume()
            status = bench.worker("status")
            for worker in (leaves, idle):
                worker.send(signal.SIGTERM)
            assert idle.wait(seconds_max=GRACE_S) == 0, idle.tail()
            assert leaves.wait(seconds_max=GRACE_S) == 0, leaves.tail()
            assert status.wait() == ExitCode.UNAVAILABLE, status.tail()
            assert rebuild.wait() == ExitCode.UNAVAILABLE, rebuild.tail()
            stays.wait_for_log("server_unavailable")
        stays.wait_for_log("server_available")
        assert bench.worker("rebuild", "orders", through=bench.as_owner).wait() == 0

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)
    assert any("hangs" in reason for reason in stays.reasons()), stays.tail()
    assert not stays.logged("member_timed_out", "partitions_lost")


def test_a_single_session_that_hangs_is_given_up(bench: Bench):
    """The server answers other sessions; only the session of the worker does not answer."""
    worker = bench.worker(answer_timeout_ms="3000")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        with stopped(until(lambda: sessions_at_work(bench, worker), "a session is at work")):
            until(
                lambda: any("no answer to a statement" in reason for reason in worker.reasons()),
                "the worker has given the session up",
            )
        worker.wait_for_log("server_available")

    bench.finish(feed.ledger)


def sessions_at_work(bench: Bench, worker: Worker) -> list[int]:
    """The writer's session. Of idle sessions, we cannot know which is used next."""
    rows = bench.query(
        "SELECT a.pid FROM pg_stat_activity a WHERE a.usename = %s AND a.backend_xid IS NOT NULL",
        worker.role,
    )
    return [pid for (pid,) in rows]
