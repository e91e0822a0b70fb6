"""A crash, an error or a cut at any step of a batch neither loses nor repeats a record."""

import signal

import pytest

from pipeline.errors import ExitCode
from tests.faults.harness import Bench, until

PER_SECOND = 500

WITH_DATABASE = (
    "after_begin@2",
    "after_fence@2",
    "mid_copy@2",
    "after_copy@2",
    "before_commit@2",
)
STEPS = (
    "in_on_assign",
    "after_poll@5",
    *WITH_DATABASE,
    "after_commit_before_ack@2",
    "after_commit@2",
    "after_kafka_commit@2",
)


@pytest.mark.core
@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_neither_loses_nor_repeats_a_record(bench: Bench, step: str):
    crashing = bench.worker(fail=f"{step}:kill")
    other = bench.worker()

    with bench.feed(rate=PER_SECOND) as feed:
        assert crashing.wait() == -signal.SIGKILL, crashing.tail()

    bench.finish(feed.ledger)
    assert other.exit_code == 0, "the other worker has taken over and ended normally"


def test_a_crash_when_partitions_are_revoked_neither_loses_nor_repeats_a_record(bench: Bench):
    crashing = bench.worker(fail="in_on_revoke:kill")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_owner_of_all(crashing)
        bench.worker()
        assert crashing.wait() == -signal.SIGKILL, crashing.tail()

    bench.finish(feed.ledger)


def test_a_crash_when_partitions_are_lost_neither_loses_nor_repeats_a_record(bench: Bench):
    crashing = bench.worker(fail="in_on_lost:kill")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_owner_of_all(crashing)
        other = bench.worker()
        crashing.pause()
        bench.wait_until_owner_of_all(other)
        crashing.resume()
        assert crashing.wait() == -signal.SIGKILL, crashing.tail()

    bench.finish(feed.ledger)


def test_a_crash_on_sigterm_neither_loses_nor_repeats_a_record(bench: Bench):
    crashing = bench.worker(fail="on_sigterm:kill")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND // 2)
        assert crashing.stop() == -signal.SIGKILL, crashing.tail()
        bench.worker()

    bench.finish(feed.ledger)


@pytest.mark.parametrize(
    "error",
    [
        *(f"{step}:disconnect" for step in WITH_DATABASE),
        "after_fence@2:raise:40001",
        "before_commit@2:raise:40001",
    ],
)
def test_the_same_process_continues_after_an_error_at_any_step(bench: Bench, error: str):
    worker = bench.worker(fail=error)

    with bench.feed(rate=PER_SECOND) as feed:
        worker.wait_for_log("server_available")

    bench.finish(feed.ledger)
    assert worker.logged("server_unavailable"), "the error happened, and the worker waited"


@pytest.mark.parametrize(
    "error", ["before_commit@2:raise:57P01", "after_commit_before_ack@2:raise:57P01"]
)
def test_a_worker_continues_after_an_operator_terminates_its_session(bench: Bench, error: str):
    """Before the commit the batch is repeated; after it the batch is found in the log."""
    worker = bench.worker(fail=error)

    with bench.feed(rate=PER_SECOND) as feed:
        worker.wait_for_log("server_available")

    bench.finish(feed.ledger)


@pytest.mark.parametrize("step", ["after_poll@5", "after_fence@2"])
def test_a_long_wait_at_any_step_changes_nothing(bench: Bench, step: str):
    """Longer than PostgreSQL allows an open transaction to send nothing."""
    bench.worker(fail=f"{step}:sleep:2.5", idle_in_transaction_timeout_ms="1000")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(PER_SECOND * 4)

    bench.finish(feed.ledger)


@pytest.mark.parametrize("step", ["mid_copy@2", "before_commit@2"])
def test_a_process_that_was_stopped_continues_when_it_is_resumed(bench: Bench, step: str):
    """Like a laptop that sleeps with an open transaction; no other worker can take over."""
    worker = bench.worker(fail=f"{step}:stop")

    with bench.feed(rate=PER_SECOND) as feed:
        worker.wait_until_stopped()
        bench.wait_until_sent(feed.ledger, PER_SECOND * 4)
        worker.resume()
        bench.wait_until_logged(PER_SECOND * 4)

    bench.finish(feed.ledger)


@pytest.mark.parametrize("step", ["in_on_assign", "after_commit_before_ack@2"])
def test_a_process_that_was_stopped_outside_a_transaction_is_replaced(bench: Bench, step: str):
    """Another worker takes over meanwhile; the batch that was committed is in the log once."""
    paused = bench.worker(fail=f"{step}:stop")

    with bench.feed(rate=PER_SECOND) as feed:
        paused.wait_until_stopped()
        next_owner = bench.worker()
        bench.wait_until_owner_of_all(next_owner)
        bench.wait_until_logged(bench.logged() + PER_SECOND)
        paused.resume()
        paused.wait_for_log("partitions_fenced", "member_timed_out", "partitions_claimed")

    bench.finish(feed.ledger)


@pytest.mark.parametrize("step", ["in_on_assign", "after_commit@2"])
def test_a_worker_rejoins_the_group_after_an_error_in_the_loop(bench: Bench, step: str):
    """Also within a callback of Kafka's client, which would continue at an offset of its own."""
    worker = bench.worker(fail=f"{step}:raise:57P01")

    with bench.feed(rate=PER_SECOND) as feed:
        worker.wait_for_log("server_available")

    bench.finish(feed.ledger)


@pytest.mark.parametrize("step", ["in_on_assign", "in_on_revoke"])
def test_a_defect_in_a_callback_ends_the_worker_with_70_and_loses_no_record(
    bench: Bench, step: str
):
    defect = bench.worker(fail=f"{step}:raise:XX000")

    with bench.feed(rate=PER_SECOND) as feed:
        if step == "in_on_revoke":
            bench.wait_until_owner_of_all(defect)
        bench.worker()
        assert defect.wait() == ExitCode.INVARIANT, defect.tail()
        assert "fail point" in defect.logged("stopped")[0]["reason"]

    bench.finish(feed.ledger)


def test_a_stuck_loop_loses_its_partitions_and_rejoins(bench: Bench):
    """Longer than max.poll.interval.ms, while its heartbeats continued."""
    options = "session.timeout.ms=2000,heartbeat.interval.ms=400,max.poll.interval.ms=2000"
    stuck = bench.worker(fail="after_commit@2:sleep:6", kafka_options=options)

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_logged(1)
        next_owner = bench.worker(kafka_options=options)
        # Taken by the group, or revoked if the loop still answered.
        stuck.wait_for_log("member_timed_out", "partitions_revoked")
        until(
            lambda: set(bench.owners().values()) == {stuck.pid, next_owner.pid},
            "both own partitions",
        )

    bench.finish(feed.ledger)


@pytest.mark.parametrize("error", ["disconnect", "stop"])
def test_the_same_projection_continues_after_an_error_before_its_commit(bench: Bench, error: str):
    worker = bench.worker("run", fail=f"after_projection@5:{error}")

    with bench.feed(rate=PER_SECOND) as feed:
        if error == "stop":
            worker.wait_until_stopped()
            # Longer than PostgreSQL waits for it.
            until(
                lambda: not bench.sessions_in_transaction(worker, "idle in transaction"),
                "its pass was rolled back",
            )
            worker.resume()
        worker.wait_for_log("server_available")

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)


def test_a_crash_between_projection_and_its_commit_changes_no_table(bench: Bench):
    crashing = bench.worker("run", fail="after_projection@5:kill")

    with bench.feed(rate=PER_SECOND) as feed:
        assert crashing.wait() == -signal.SIGKILL, crashing.tail()
        bench.worker("run")

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)
