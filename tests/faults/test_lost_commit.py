"""Whatever happens to a COMMIT or its answer, the batch is in the log exactly once."""

import time
from collections.abc import Iterator

import pytest

from tests.faults.harness import Bench, until
from tests.faults.proxy import CAN_DROP, Loss, Proxy

PER_SECOND = 400
LOSSES = 6
SLOW_COMMIT_SECONDS = 3

# A COMMIT that takes long on the server, like a COMMIT that waits for a standby.
SLOW_COMMIT = f"""
CREATE TABLE audit.slow (commits bool);
INSERT INTO audit.slow VALUES (false);
CREATE FUNCTION audit.dawdle() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF (SELECT commits FROM audit.slow) THEN
        PERFORM pg_sleep({SLOW_COMMIT_SECONDS});
    END IF;
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON pipeline.consumer_offsets
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW WHEN (old.next_offset <> new.next_offset)
    EXECUTE FUNCTION audit.dawdle();
"""


@pytest.fixture
def proxy(bench: Bench) -> Iterator[Proxy]:
    with Proxy.before(bench.database.url) as made:
        yield made


@pytest.mark.core
@pytest.mark.parametrize("loss", [Loss.REQUEST, Loss.ANSWER])
def test_a_lost_commit_or_answer_neither_loses_nor_repeats_a_record(
    bench: Bench, proxy: Proxy, loss: Loss
):
    """The worker cannot tell the cases apart; only in some of them the batch is in the log."""
    worker = bench.worker("run", through=proxy.through)

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(1)
        for _ in range(LOSSES):
            proxy.lose(loss)
            until(lambda: not proxy.is_to_lose, "a COMMIT was lost")
            bench.wait_until_logged(bench.logged() + PER_SECOND // 4)

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)
    assert worker.logged("server_available")


def test_an_open_commit_ends_before_its_batch_is_resolved(bench: Bench, proxy: Proxy):
    bench.execute(SLOW_COMMIT)
    bench.worker(through=proxy.through, lock_timeout_ms="10000")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        bench.execute("UPDATE audit.slow SET commits = true")
        proxy.lose(Loss.CLIENT)
        until(lambda: not proxy.is_to_lose, "a COMMIT was cut off from its client")
        bench.execute("UPDATE audit.slow SET commits = false")
        standing = bench.logged()
        bench.wait_until_logged(standing + PER_SECOND)

    bench.finish(feed.ledger)


@pytest.mark.skipif(not CAN_DROP, reason="packets are dropped with a socket filter of Linux")
@pytest.mark.timeout(180)
def test_a_connection_that_is_silently_lost_is_closed_within_a_minute(bench: Bench, proxy: Proxy):
    worker = bench.worker(through=proxy.through)

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND)
        proxy.black_hole()
        began = time.monotonic()
        worker.wait_for_log("server_available", seconds_max=60)
        print(f"back after {time.monotonic() - began:.0f} s")

    bench.finish(feed.ledger)
