"""Workers that project share the partitions; a silent worker is replaced within a bound."""

from collections import Counter
from collections.abc import Mapping

import pytest

from pipeline.projection.workers import EXPIRES_AFTER, HEARTBEAT_S
from pipeline.sandbox.simulator import Keying
from tests.faults.harness import Bench, Worker, until

PER_SECOND = 300
TAKEN_OVER_SECONDS_MAX = EXPIRES_AFTER.total_seconds() + HEARTBEAT_S + 8
"""The bound in operations.md, plus the time of a pass on a busy machine."""
PASSES = 12
"""This number of passes over a partition shows which worker has it."""
LOOKS = 300

# Who moved which partition's checkpoints. The service does not use it.
AUDIT = """
CREATE TABLE audit.passes (
    pass bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, writer text, "partition" int);
CREATE FUNCTION audit.note_pass() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO audit.passes (writer, "partition") VALUES (session_user, new.partition);
    RETURN NULL;
END $$;
CREATE TRIGGER audit AFTER UPDATE ON pipeline.projection_checkpoints FOR EACH ROW
    WHEN (new.projector = 'orders') EXECUTE FUNCTION audit.note_pass();
"""


def passes(bench: Bench) -> Mapping[int, Counter[str]]:
    """The number of passes of each role over each partition."""
    found: dict[int, Counter[str]] = {number: Counter() for number in range(bench.partitions)}
    for number, writer, count in bench.query(
        'SELECT "partition", writer, count(*) FROM audit.passes GROUP BY 1, 2'
    ):
        found[number][writer] = count
    return found


def all_workers_registered(bench: Bench, workers: int) -> bool:
    """Whether every worker has sent two heartbeats since the last worker started."""
    [(have_registered,)] = bench.query(
        """
        SELECT count(*) = %s AND min(expires_at) - %s > max(since) + make_interval(secs => %s)
        FROM pipeline.projection_workers WHERE expires_at > now()
        """,
        workers,
        EXPIRES_AFTER,
        HEARTBEAT_S,
    )
    return bool(have_registered)


def wait_until_shared(bench: Bench, *workers: Worker) -> None:
    """Wait until every worker has registered, and each projects only its own share."""
    until(lambda: all_workers_registered(bench, len(workers)), "all workers have registered")
    bench.execute("TRUNCATE audit.passes")
    until(
        lambda: min(done.total() for done in passes(bench).values()) >= PASSES,
        f"{PASSES} passes over each partition",
    )
    found = passes(bench)
    owners = [done.most_common(1)[0][0] for done in found.values()]
    share = bench.partitions // len(workers)
    assert sorted(owners) == sorted(worker.role for worker in workers for _ in range(share)), found
    # A round that began earlier ends with its old shares.
    strays = sum(done.total() - max(done.values()) for done in found.values())
    assert strays <= bench.partitions, found


def wait_until_taken_over(bench: Bench, heir: Worker) -> None:
    """Wait until this worker has advanced every partition."""
    bench.execute("TRUNCATE audit.passes")
    until(
        lambda: all(heir.role in done for done in passes(bench).values()),
        f"all taken over by {heir.role}",
        seconds_max=TAKEN_OVER_SECONDS_MAX,
    )


@pytest.fixture
def pair(bench: Bench) -> tuple[Worker, Worker]:
    """Two workers that project, beside a worker that ingests."""
    bench.execute(AUDIT)
    bench.worker("ingest")
    return bench.worker("project"), bench.worker("project")


def test_two_workers_share_the_partitions_and_one_that_is_killed_is_replaced(
    bench: Bench, pair: tuple[Worker, Worker]
):
    killed, other = pair

    with bench.feed(rate=PER_SECOND) as feed:
        wait_until_shared(bench, killed, other)
        killed.kill()
        wait_until_taken_over(bench, other)

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)


def test_a_killed_worker_that_has_the_only_busy_partition_is_replaced(
    bench: Bench, pair: tuple[Worker, Worker]
):
    """Keyed by tenant, one worker does all the work; the other must be able to continue it."""

    def busy() -> dict[int, Counter[str]]:
        return {number: done for number, done in passes(bench).items() if done}

    with bench.feed(rate=PER_SECOND, keying=Keying.TENANT) as feed:
        until(lambda: all_workers_registered(bench, len(pair)), "all workers have registered")
        bench.execute("TRUNCATE audit.passes")
        until(
            lambda: any(workers.total() >= PASSES for workers in busy().values()),
            f"{PASSES} passes",
        )
        [done] = busy().values()
        [(role, _)] = done.most_common(1)
        killed, other = sorted(pair, key=lambda worker: worker.role != role)
        killed.kill()
        bench.execute("TRUNCATE audit.passes")
        until(
            lambda: any(other.role in workers for workers in busy().values()),
            f"taken over by {other.role}",
            seconds_max=TAKEN_OVER_SECONDS_MAX,
        )

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)


def test_a_stopping_worker_releases_its_partitions_and_a_new_worker_gets_its_share(
    bench: Bench, pair: tuple[Worker, Worker]
):
    stops, other = pair

    with bench.feed(rate=PER_SECOND) as feed:
        wait_until_shared(bench, stops, other)
        assert stops.stop() == 0, stops.tail()
        assert len(bench.query("SELECT FROM pipeline.projection_workers")) == 1
        wait_until_shared(bench, other)
        wait_until_shared(bench, other, bench.worker("project"))

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("fail", [None, "after_projection@40:stop"])
def test_a_stopped_worker_is_replaced_and_changes_nothing_when_it_resumes(
    bench: Bench, fail: str | None
):
    """Stopped from outside, or in the middle of a pass with its locks held."""
    bench.execute(AUDIT)
    bench.worker("ingest")
    other = bench.worker("project")

    with bench.feed(rate=PER_SECOND) as feed:
        stopped = bench.worker("project", fail=fail)
        if fail is None:
            wait_until_shared(bench, stopped, other)
            stopped.pause()
        stopped.wait_until_stopped()
        wait_until_taken_over(bench, other)
        stopped.resume()
        wait_until_shared(bench, stopped, other)

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)


def test_all_read_models_are_at_one_offset_although_two_workers_project(
    bench: Bench, pair: tuple[Worker, Worker]
):
    with bench.feed(rate=PER_SECOND) as feed:
        wait_until_shared(bench, *pair)
        apart = [
            bench.query(
                'SELECT "partition" FROM pipeline.projection_checkpoints '
                "GROUP BY 1 HAVING count(DISTINCT next_offset) > 1"
            )
            for _ in range(LOOKS)
        ]

    assert apart == [[]] * LOOKS
    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
