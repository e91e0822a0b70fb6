"""A worker started twice, or killed as an owner, costs no record and is logged."""

from functools import partial

import pytest
from confluent_kafka import Consumer

from pipeline.errors import ExitCode
from tests.faults.harness import Bench, until
from tests.faults.proxy import CAN_DROP, Proxy

PER_SECOND = 200


def test_a_member_id_that_is_used_twice_ends_the_older_worker_with_75(bench: Bench):
    older = bench.worker(group_instance_id="one")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_owner_of_all(older)
        newer = bench.worker(group_instance_id="one")
        assert older.wait() == ExitCode.FENCED, older.tail()
        assert "PIPELINE_GROUP_INSTANCE_ID" in older.logged("stopped")[0]["reason"]
        bench.wait_until_owner_of_all(newer)

    bench.finish(feed.ledger)
    assert newer.exit_code == 0


def test_a_member_that_was_replaced_for_a_moment_joins_again(bench: Bench):
    """The other member may be the same client: after a pause of the brokers it joins twice."""
    worker = bench.worker(group_instance_id="one")

    with bench.feed(rate=PER_SECOND) as feed:
        bench.wait_until_owner_of_all(worker)
        replace_member("one", bench)
        worker.wait_for_log("member_replaced")
        bench.wait_until_logged(bench.logged() + PER_SECOND)

    bench.finish(feed.ledger)
    assert worker.exit_code == 0


def replace_member(instance: str, bench: Bench) -> None:
    """Join with a member's instance id, then end without leaving, as static members do."""
    other = Consumer(
        {
            "bootstrap.servers": bench.kafka.bootstrap_servers,
            "group.id": bench.group,
            "group.instance.id": instance,
            "partition.assignment.strategy": "cooperative-sticky",
        }
    )
    other.subscribe([bench.topic])

    def has_partitions() -> bool:
        other.poll(0.1)
        return bool(other.assignment())

    until(has_partitions, "the group has the other member instead")
    other.close()


@pytest.mark.skipif(not CAN_DROP, reason="packets are dropped with a socket filter of Linux")
@pytest.mark.parametrize("step", ["after_fence@3", "mid_copy@3"])
def test_a_machine_that_loses_its_power_blocks_no_worker(bench: Bench, step: str):
    """PostgreSQL receives nothing: no FIN, no RST, and the locked rows stay locked."""
    with bench.feed(rate=PER_SECOND) as feed, Proxy.before(bench.database.url) as proxy:
        lost = bench.worker(fail=f"{step}:stop", through=proxy.through)
        lost.wait_until_stopped()
        proxy.black_hole()
        lost.kill()
        assert bench.sessions_in_transaction(lost), "its transaction is still open"
        next_owner = bench.worker()
        bench.wait_until_owner_of_all(next_owner)
        bench.wait_until_logged(bench.logged() + PER_SECOND)

    bench.finish(feed.ledger)


# Commits of one partition wait for a lock of the test, like commits of a slow writer.
HOLD_BACK = """
CREATE FUNCTION audit.hold_back() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM pg_advisory_xact_lock_shared(17);
    RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER hold_back AFTER UPDATE ON pipeline.consumer_offsets
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
    WHEN (old.next_offset <> new.next_offset AND new.partition = 0)
    EXECUTE FUNCTION audit.hold_back();
"""


def test_a_projector_skips_no_event_that_is_committed_late(bench: Bench):
    """Other writers commit while an older transaction of one writer stays open."""
    bench.execute(HOLD_BACK)
    late, _other = [bench.worker("run", lock_timeout_ms="60000") for _ in range(2)]

    with bench.feed(rate=PER_SECOND) as feed:
        until(lambda: len(set(bench.owners().values()) - {None}) == 2, "both own partitions")
        bench.wait_until_logged(PER_SECOND)
        with bench.database.connect(autocommit=False) as holder:
            holder.execute("SELECT pg_advisory_xact_lock(17)")
            until(lambda: any(map(bench.waits_for_lock, bench.workers)), "a commit is held back")
            before, projected = bench.next_offsets(), bench.projected()
            bench.wait_until_logged(bench.logged() + PER_SECOND)
            until(lambda: bench.projected() > projected + PER_SECOND // 2, "others are projected")
            assert [
                partition.number
                for partition, end in bench.next_offsets().items()
                if end == before[partition]
            ], "the partition whose commit is held back has not moved"

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)
    assert late.exit_code == 0


@pytest.mark.timeout(240)
def test_a_rebuild_that_is_started_twice_or_killed_during_live_traffic_is_resumed(bench: Bench):
    """While two workers project; a killed rebuild has changed nothing that readers see."""
    bench.worker("run")
    bench.worker("project")
    rebuild = partial(
        bench.worker,
        *("rebuild", "orders"),
        through=bench.as_owner,
        idle_in_transaction_timeout_ms="60000",
    )

    with bench.feed(rate=PER_SECOND) as feed:
        until(lambda: bench.count("orders"), "the table has orders")
        for step in ("mid_rebuild", "before_swap", "after_swap"):
            dies = rebuild(fail=f"{step}:stop")
            dies.wait_until_stopped()
            before = bench.count("orders")
            if step == "before_swap":
                twin = rebuild()
                assert twin.wait() == ExitCode.FENCED, twin.tail()
                assert "another rebuild" in twin.tail()
            dies.kill()
            assert bench.count("orders") >= before
        resumed = rebuild(log_level="debug")
        assert resumed.wait() == 0, resumed.tail()
        assert resumed.logged("rebuild_resumed"), resumed.tail()
        assert resumed.logged("read_model_rebuilt")[0]["differing"] == 0, resumed.tail()

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)
    left = "SELECT count(*) FROM pg_class WHERE relnamespace = 'pipeline_shadow'::regnamespace"
    assert bench.query(left) == [(0,)]


def test_an_analysts_long_transaction_blocks_nothing_and_sees_one_snapshot(bench: Bench):
    """During load and a rebuild; the worker needs no temporary tables."""
    bench.execute(f'REVOKE TEMPORARY ON DATABASE "{bench.database.name}" FROM PUBLIC')
    bench.worker("run")

    with bench.feed(rate=PER_SECOND) as feed:
        until(lambda: bench.count("orders"), "the table has orders")
        with bench.database.connect(autocommit=False) as analyst:
            analyst.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            sight = "SELECT count(*), max(_offset), min(updated_at) FROM upvest.orders"
            seen = analyst.execute(sight).fetchall()
            bench.wait_until_logged(bench.logged() + PER_SECOND * 2)
            rebuild = bench.worker("rebuild", "orders", "executions", through=bench.as_owner)
            assert rebuild.wait() == 0, rebuild.tail()
            assert bench.count("orders") > seen[0][0]
            assert analyst.execute(sight).fetchall() == seen

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)
