"""A PostgreSQL that is stopped holds its connections open, and the kernel acknowledges for it."""

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pipeline.embedded.postgres import PostgresServer
from pipeline.errors import ExitCode
from tests.faults.harness import Bench, Worker, until

PER_SECOND = 200
GRACE_S = 30
"""What Kubernetes grants by default."""
KNOWN_S_MAX = 45
"""Five seconds of silence, ten to see whether it lives, and a busy machine."""

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc of Linux"),
]


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """SIGSTOP for the length of the block."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):  # it had ended when it was stopped
                os.kill(pid, signal.SIGCONT)


def processes_of(server: PostgresServer) -> list[int]:
    """The postmaster first, so that it starts no other, then its processes."""
    children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text()
    return [server.pid, *map(int, children.split())]


def test_a_postgresql_that_hangs_is_found_out_and_gone_on_with_when_it_wakes(
    shaky_postgres: Bench, private_postgres: PostgresServer
):
    """The membership in Kafka's group lives on; what was in flight is in the log once."""
    bench = shaky_postgres
    worker = bench.worker("run")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        in_the_midst = bench.worker(
            "rebuild", "orders", fail="mid_rebuild:stop", through=bench.as_owner
        )
        in_the_midst.wait_until_stopped()
        bench.prepare_role()
        with stopped(processes_of(private_postgres)):
            in_the_midst.resume()
            at_the_start = bench.worker("status")
            worker.wait_until_said("server_away", seconds_max=KNOWN_S_MAX)
            assert at_the_start.wait() == ExitCode.UNAVAILABLE, at_the_start.tail()
            assert in_the_midst.wait() == ExitCode.UNAVAILABLE, in_the_midst.tail()
        worker.wait_until_said("server_back")

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)
    assert any("hangs" in reason for reason in worker.reasons()), worker.tail()
    assert not worker.said("fenced_by_group", "partitions_lost", "partitions_revoked")


def test_workers_that_are_stopped_while_postgresql_hangs_end_within_a_grace_period(
    shaky_postgres: Bench, private_postgres: PostgresServer
):
    """One with a batch in hand, and one that has nothing to do."""
    bench = shaky_postgres
    bench.kafka.create_topic(f"{bench.topic}-idle", 1)
    busy = bench.worker("run")
    idle = bench.worker(topics=f"{bench.topic}-idle", group_id=f"{bench.group}-idle")

    with bench.feed(rate=PER_SECOND) as feed:
        until(lambda: set(bench.owners_of_all().values()) == {busy.pid, idle.pid}, "both own some")
        bench.wait_until_logged(PER_SECOND)
        with stopped(processes_of(private_postgres)):
            for worker in (busy, idle):
                worker.send(signal.SIGTERM)
            assert idle.wait(seconds_max=GRACE_S) == 0, idle.tail()
            assert busy.wait(seconds_max=GRACE_S) == 0, busy.tail()
        bench.worker("run")

    bench.finish(feed.ledger)


def test_a_session_that_hangs_alone_is_given_up(bench: Bench):
    """The server lives and answers others; only the session that we wait for does not."""
    worker = bench.worker(answer_timeout_ms="3000")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        with stopped(until(lambda: sessions_at_work(bench, worker), "a session is at work")):
            until(
                lambda: any("no answer to a statement" in reason for reason in worker.reasons()),
                "it has given the session up",
            )
        worker.wait_until_said("server_back")

    bench.finish(feed.ledger)


def sessions_at_work(bench: Bench, worker: Worker) -> list[int]:
    """The writer's session; of those that are idle we would not know which is asked next."""
    rows = bench.query(
        "SELECT a.pid FROM pg_stat_activity a WHERE a.usename = %s AND a.backend_xid IS NOT NULL",
        worker.role,
    )
    return [pid for (pid,) in rows]
