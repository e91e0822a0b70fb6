"""Several workers by one command share the partitions, and none outlives the command."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import QUICK_TO_NOTICE, Bench, Worker, until
from tests.servers import Kafka
from tests.servers.databases import Database

PER_SECOND = 300
AT_ONCE_SECONDS_MAX = 10


def running_workers(command: Worker) -> dict[int, int]:
    """The newest process of each worker of the command, by the worker's number."""
    return {line["worker"]: line["pid"] for line in command.logged("started")}


def wait_until_all_own(bench: Bench, command: Worker, workers: int) -> dict[int, int]:
    """Wait until each worker has partitions; their processes."""

    def all_own() -> bool:
        pids = set(running_workers(command).values())
        return len(pids) >= workers and set(bench.owners().values()) == set(
            running_workers(command).values()
        )

    until(all_own, "every worker owns a partition")
    return running_workers(command)


@pytest.mark.timeout(180)
def test_a_worker_that_is_killed_is_started_again_and_its_partitions_are_read(bench: Bench):
    command = bench.worker("run", "--workers", "2")

    with bench.feed(rate=PER_SECOND) as feed:
        victim = wait_until_all_own(bench, command, 2)[1]
        os.kill(victim, signal.SIGKILL)
        command.wait_for_log("worker_died")
        until(lambda: running_workers(command)[1] != victim, "the worker is started again")
        wait_until_all_own(bench, command, 2)

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    bench.judge_read_models(feed.books)
    [death] = command.logged("worker_died")
    assert (death["worker"], death["pid"], death["signal"]) == (1, victim, "SIGKILL")


def test_every_log_line_is_complete_and_names_its_worker(bench: Bench):
    command = bench.worker("run", "--workers", "3", log_level="debug")

    with bench.feed(rate=PER_SECOND) as feed:
        wait_until_all_own(bench, command, 3)

    bench.finish(feed.ledger)
    lines = [json.loads(line) for line in command.log.read_text().splitlines()]
    assert {line.get("worker") for line in lines} == {None, 1, 2, 3}
    parents = [line["event"] for line in lines if "worker" not in line]
    assert parents == ["workers_started", "stop_requested", "workers_ended"]
    for number in (1, 2, 3):
        events = [line["event"] for line in lines if line.get("worker") == number]
        assert {"started", "partitions_released", "stopped"} <= set(events)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_parent_and_workers_ends_all_with_0(bench: Bench, number: signal.Signals):
    """Like Ctrl-C from a terminal and SIGTERM from systemd: each worker receives it twice."""
    command = bench.worker("run", "--workers", "2")

    with bench.feed(rate=PER_SECOND) as feed:
        wait_until_all_own(bench, command, 2)
        os.killpg(command.pid, number)
        assert command.wait() == 0, command.tail()
        assert [line["exit_code"] for line in command.logged("stopped")] == [0, 0]
        bench.worker("run")

    bench.finish(feed.ledger)


def test_workers_whose_parent_is_killed_end_too(bench: Bench):
    command = bench.worker("run", "--workers", "2")

    with bench.feed(rate=PER_SECOND) as feed:
        wait_until_all_own(bench, command, 2)
        command.kill()
        until(lambda: command.is_gone, "no worker is left")
        assert [line["exit_code"] for line in command.logged("stopped")] == [0, 0]
        bench.worker("run")

    bench.finish(feed.ledger)


def test_a_second_signal_ends_all_workers_at_once(bench: Bench):
    command = bench.worker(
        "ingest", "--workers", "2", revoke_deadline_ms="60000", lock_timeout_ms="60000"
    )

    with bench.feed(rate=PER_SECOND) as feed:
        wait_until_all_own(bench, command, 2)
        with bench.database.connect(autocommit=False) as blocker:
            blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
            until(lambda: bench.waits_for_lock(command), "a COPY waits")
            command.send(signal.SIGTERM)
            command.wait_for_log("stop_requested")
            command.send(signal.SIGTERM)
            assert command.wait(seconds_max=AT_ONCE_SECONDS_MAX) == 128 + signal.SIGTERM
        until(lambda: command.is_gone, "no worker is left")
        bench.worker()

    bench.finish(feed.ledger)


def test_several_workers_catch_up_and_end(bench: Bench):
    with bench.feed(rate=2000) as feed:
        bench.wait_until_sent(feed.ledger, 4000)

    command = bench.worker("run", "--until-end", "--workers", "2")

    assert command.wait() == 0, command.tail()
    bench.judge(feed.ledger)
    bench.judge_read_models(feed.books)
    assert {line["worker"] for line in command.logged("started")} == {1, 2}


def test_a_one_shot_worker_waits_for_records_that_others_have_not_written(bench: Bench):
    """The other workers own partitions and cannot write."""
    slow = bench.worker()
    bench.wait_until_owner_of_all(slow)
    bench.alter_role(slow.role, "CONNECTION LIMIT 0")
    bench.end_sessions(of=slow)
    with bench.feed(rate=2000) as feed:
        bench.wait_until_sent(feed.ledger, 2000)
    slow.wait_for_log("server_unavailable")

    to_end = bench.worker("ingest", "--until-end")
    until(lambda: to_end.pid in bench.owners().values(), "it owns some")
    mine = {number for number, pid in bench.owners().items() if pid == to_end.pid}
    ends = {partition.number: end for partition, end in feed.ledger.ends.items()}
    bench.wait_until_logged(sum(ends[number] for number in mine))
    bench.alter_role(slow.role, "CONNECTION LIMIT -1")

    assert to_end.wait() == 0, to_end.tail()
    stored = {partition.number: offset for partition, offset in bench.next_offsets().items()}
    assert stored == ends
    bench.finish(feed.ledger)


def test_each_worker_has_a_name_of_its_own_in_the_group(bench: Bench):
    command = bench.worker("ingest", "--workers", "2", group_instance_id="here")

    with bench.feed(rate=PER_SECOND) as feed:
        first = wait_until_all_own(bench, command, 2)
        os.kill(first[1], signal.SIGKILL)
        until(lambda: running_workers(command)[1] != first[1], "the worker is started again")
        wait_until_all_own(bench, command, 2)

    bench.finish(feed.ledger)
    assert not command.logged("member_timed_out")


def test_a_worker_that_another_process_replaces_ends_the_command_with_75(bench: Bench):
    older = bench.worker("ingest", "--workers", "2", group_instance_id="here")

    with bench.feed(rate=PER_SECOND) as feed:
        wait_until_all_own(bench, older, 2)
        bench.worker("ingest", "--workers", "2", group_instance_id="here")
        assert older.wait() == 75, older.tail()

    bench.finish(feed.ledger)
    assert not older.logged("worker_died")


@pytest.mark.timeout(120)
def test_a_worker_that_dies_again_and_again_ends_a_one_shot_command(bench: Bench):
    with bench.feed(rate=2000) as feed:
        bench.wait_until_sent(feed.ledger, 1000)

    command = bench.worker("ingest", "--until-end", "--workers", "2", fail="after_begin@1:kill")

    assert command.wait() == 128 + signal.SIGKILL, command.tail()
    pauses = [line["restart_in_s"] for line in command.logged("worker_died") if line["worker"] == 1]
    assert pauses[:3] == [1, 2, 4]
    assert bench.worker("ingest", "--until-end").wait() == 0
    bench.judge(feed.ledger)


def test_more_workers_than_partitions_are_logged(
    kafka: Kafka, database: Database, topic: Callable[..., str], tmp_path: Path
):
    bench = Bench(kafka, database, topic(1), 1, tmp_path)
    command = bench.worker("ingest", "--workers", "2", kafka_options=QUICK_TO_NOTICE)

    with bench.feed(rate=PER_SECOND) as feed:
        command.wait_for_log("workers_without_partition")

    bench.finish(feed.ledger)
    bench.close()
    [line] = command.logged("workers_without_partition")
    assert (line["workers"], line["partitions"]) == (2, 1)
