"""Memory is bounded, whatever the backlog; with too little memory a worker ends."""

import resource

import pytest

from pipeline.sandbox.simulator.producer import Producer
from pipeline.sandbox.simulator.records import Record
from pipeline.settings import Settings
from tests.faults.harness import Bench, Worker
from tests.faults.ledger import Ledger

BACKLOG = 300_000
RESIDENT_MIB_MAX = 300
LARGE_BYTES = 900_000
LARGE = 200
ROOM_MIB = 220
"""More than a worker uses before it has read anything."""
LITTLE_ROOM_KIB = 1024
BATCH_ROWS = str(Settings.model_fields["batch_rows"].default)


@pytest.mark.timeout(300)
def test_a_long_backlog_is_read_in_bounded_memory(bench: Bench):
    """Also while PostgreSQL does not answer, so that all buffers are full."""
    with bench.feed(events=BACKLOG, keep_values=False) as feed:
        sent = feed.wait()

    with bench.database.connect(autocommit=False) as blocker:
        blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
        worker = bench.worker(batch_rows=BATCH_ROWS)
        worker.wait_for_log("server_unavailable")
    bench.wait_until_drained(sent, seconds_max=200)
    peak = worker.peak_memory_kib() // 1024

    print(f"peak {peak} MiB")
    assert peak <= RESIDENT_MIB_MAX
    bench.finish(sent)


@pytest.mark.timeout(180)
def test_large_records_are_read_in_bounded_memory(bench: Bench):
    sent = send_large_records(bench)

    with bench.database.connect(autocommit=False) as blocker:
        blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
        worker = bench.worker(batch_rows=BATCH_ROWS)
        worker.wait_for_log("partitions_claimed")
        before = worker.address_space_kib() // 1024
        limit_memory(worker, ROOM_MIB)
        worker.wait_for_log("server_unavailable")
    bench.wait_until_drained(sent)

    print(f"took {worker.address_space_kib(most=True) // 1024 - before} MiB")
    bench.finish(sent)


@pytest.mark.timeout(180)
def test_a_worker_that_runs_out_of_memory_ends_and_loses_no_record(bench: Bench):
    worker = bench.worker(batch_rows=BATCH_ROWS)
    bench.wait_until_owner_of_all(worker)
    # Much address space is reserved already, so a limit on address space would apply too late.
    limit = (worker.data_kib() + LITTLE_ROOM_KIB) * 1024
    resource.prlimit(worker.pid, resource.RLIMIT_DATA, (limit, limit))

    sent = send_large_records(bench)
    assert worker.wait() != 0, worker.tail()
    assert bench.logged() < LARGE
    bench.worker(batch_rows=BATCH_ROWS)

    bench.finish(sent)


def send_large_records(bench: Bench) -> Ledger:
    """More large records than the bound of memory allows at a time."""
    sent = Ledger(keep_values=False)
    filler = "x" * LARGE_BYTES
    with Producer(
        {"bootstrap.servers": bench.kafka.bootstrap_servers}, on_delivery=sent.note
    ) as producer:
        producer.produce(
            Record(bench.topic, number % bench.partitions, None, value.encode(), (), 0)
            for number in range(LARGE)
            if (value := f'{{"number": {number}, "filler": "{filler}"}}')
        )
    return sent


def limit_memory(worker: Worker, room_mib: int) -> None:
    """Limit the worker to this much more memory than it uses now."""
    limit = worker.address_space_kib() * 1024 + room_mib * 1024 * 1024
    resource.prlimit(worker.pid, resource.RLIMIT_AS, (limit, limit))
