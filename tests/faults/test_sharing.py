"""Workers that project share the partitions; one that falls silent is replaced within a bound."""

from collections.abc import Mapping

import pytest

from pipeline.projection.sharing import LIFE, SAY_S
from tests.faults.harness import Bench, Worker, until

PER_SECOND = 300
TAKEN_OVER_SECONDS_MAX = LIFE.total_seconds() + SAY_S + 8
"""What operations.md promises, and what a busy machine takes for a pass."""
ALIKE = 10
"""So many passes over a partition by one worker, and nobody else is at it."""
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


def owners(bench: Bench, passes: int) -> Mapping[int, str]:
    """Which role alone was at a partition for its last passes."""
    rows = bench.query(
        """
        SELECT "partition", min(writer) FROM (
            SELECT *, row_number() OVER (PARTITION BY "partition" ORDER BY pass DESC) AS nth
            FROM audit.passes) AS late
        WHERE nth <= %s GROUP BY 1 HAVING count(DISTINCT writer) = 1 AND count(*) = %s
        """,
        passes,
        passes,
    )
    return dict(rows)


def wait_until_shared(bench: Bench, *workers: Worker) -> None:
    """Wait until each worker, and nobody else, is at its share of the partitions."""
    share = bench.partitions // len(workers)

    def is_shared() -> bool:
        found = sorted(owners(bench, ALIKE).values())
        return found == sorted(worker.role for worker in workers for _ in range(share))

    until(is_shared, f"shared by {', '.join(worker.role for worker in workers)}")


def wait_until_taken_over(bench: Bench, heir: Worker) -> None:
    """Wait until every partition has moved on by the only worker that still can."""
    bench.execute("TRUNCATE audit.passes")
    until(
        lambda: list(owners(bench, 1).values()) == [heir.role] * bench.partitions,
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
