"""Workers that project share the partitions; one that falls silent is replaced within a bound."""

from collections import Counter
from collections.abc import Mapping

import pytest

from pipeline.projection.workers import EXPIRES_AFTER, HEARTBEAT_S
from pipeline.sandbox.simulator import Keying
from tests.faults.harness import Bench, Worker, until

PER_SECOND = 300
TAKEN_OVER_SECONDS_MAX = EXPIRES_AFTER.total_seconds() + HEARTBEAT_S + 8
"""What operations.md promises, and what a busy machine takes for a pass."""
PASSES = 12
"""So many over a partition show whose it is."""
LOOKS = 300

# Who moved which partition's checkpoints; the service knows nothing of it.
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
    """How often each role was at each partition."""
    found: dict[int, Counter[str]] = {number: Counter() for number in range(bench.partitions)}
    for number, writer, count in bench.query(
        'SELECT "partition", writer, count(*) FROM audit.passes GROUP BY 1, 2'
    ):
        found[number][writer] = count
    return found


def have_seen_each_other(bench: Bench, workers: int) -> bool:
    """Whether all have checked in twice since the last one came."""
    [(is_so,)] = bench.query(
        """
        SELECT count(*) = %s AND min(expires_at) - %s > max(since) + make_interval(secs => %s)
        FROM pipeline.projection_workers WHERE expires_at > now()
        """,
        workers,
        EXPIRES_AFTER,
        HEARTBEAT_S,
    )
    return bool(is_so)


def wait_until_shared(bench: Bench, *workers: Worker) -> None:
    """Wait until they know each other; from then on each is alone at its share."""
    until(lambda: have_seen_each_other(bench, len(workers)), "they know each other")
    bench.execute("TRUNCATE audit.passes")
    until(
        lambda: min(done.total() for done in passes(bench).values()) >= PASSES,
        f"{PASSES} passes over each partition",
    )
    found = passes(bench)
    owners = [done.most_common(1)[0][0] for done in found.values()]
    share = bench.partitions // len(workers)
    assert sorted(owners) == sorted(one.role for one in workers for _ in range(share)), found
    # A round that had begun before is ended by the shares that it began with.
    strays = sum(done.total() - max(done.values()) for done in found.values())
    assert strays <= bench.partitions, found


def wait_until_taken_over(bench: Bench, heir: Worker) -> None:
    """Wait until every partition has moved on by the only worker that still can."""
    bench.execute("TRUNCATE audit.passes")
    until(
        lambda: all(heir.role in done for done in passes(bench).values()),
        f"all taken over by {heir.role}",
        seconds_max=TAKEN_OVER_SECONDS_MAX,
    )


@pytest.fixture
def pair(bench: Bench) -> tuple[Worker, Worker]:
    """Two that project, beside one that ingests."""
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


def test_the_worker_that_has_the_one_busy_partition_of_six_is_killed_and_replaced(
    bench: Bench, pair: tuple[Worker, Worker]
):
    """Keyed by tenant, one worker does all the work; the other must be able to continue it."""

    def busy() -> dict[int, Counter[str]]:
        return {number: done for number, done in passes(bench).items() if done}

    with bench.feed(rate=PER_SECOND, keying=Keying.TENANT) as feed:
        until(lambda: have_seen_each_other(bench, len(pair)), "they know each other")
        bench.execute("TRUNCATE audit.passes")
        until(lambda: any(it.total() >= PASSES for it in busy().values()), f"{PASSES} passes")
        [done] = busy().values()
        [(role, _)] = done.most_common(1)
        killed, other = sorted(pair, key=lambda one: one.role != role)
        killed.kill()
        bench.execute("TRUNCATE audit.passes")
        until(
            lambda: any(other.role in it for it in busy().values()),
            f"taken over by {other.role}",
            seconds_max=TAKEN_OVER_SECONDS_MAX,
        )

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)


def test_a_worker_that_stops_hands_over_and_one_that_comes_gets_its_share(
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
def test_a_worker_that_stands_still_is_replaced_and_does_no_harm_when_it_wakes(
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


def test_all_read_models_stand_at_one_instant_of_the_log_though_two_workers_project(
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
