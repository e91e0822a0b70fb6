"""Records of odd sizes and shapes, and transactions that do not end, through real processes."""

import json
import subprocess
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from tests.faults.harness import ENTRY, PROJECT, Bench, until
from tests.given import order_event
from tests.integration.ingesting import Ledger, is_faithful, logged, payloads
from tests.records import envelope

MIB = 1024 * 1024
RESIDENT_MIB_MAX = 450
ORDERS = 600
pytestmark = pytest.mark.timeout(240)
CLIENT_LIMIT = {"message.max.bytes": 26_000_000}


def status_of(bench: Bench) -> Mapping[str, Any]:
    """The document of `pipeline status --json`."""
    done = subprocess.run(
        [*ENTRY, "status", "--json"],
        env={"PATH": "/usr/bin:/bin", "PIPELINE_DATABASE_URL": bench.database.url},
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
    )
    status: Mapping[str, Any] = json.loads(done.stdout)
    return status


def test_records_of_one_byte_and_of_20_megabytes_are_in_the_log_within_bounded_memory(
    bench: Bench, topic: Callable[..., str]
):
    name = topic(1, config={"max.message.bytes": str(25_000_000)})
    ledger = Ledger(bench.kafka.bootstrap_servers, CLIENT_LIMIT)
    large = 20 * MIB
    ledger.send(name, [b"1", envelope(note="x" * large), b"x", b"\xff" * large, b"", None])
    ledger.send(name, [envelope(note="y" * large)]).flush()

    worker = bench.worker(topics=name)
    bench.wait_until_logged(7, seconds_max=120)
    peak = worker.peak_memory_kib() // 1024
    assert worker.stop() == 0, worker.tail()

    print(f"peak {peak} MiB")
    assert peak <= RESIDENT_MIB_MAX
    assert logged(bench.database, name) == ledger.records
    stored = payloads(bench.database, name)
    assert [at for at, value in ledger.values.items() if not is_faithful(value, stored[at])] == []


def test_a_huge_key_type_or_list_of_headers_is_stored(bench: Bench):
    """Values that an index cannot hold are not indexed."""
    ledger = Ledger(bench.kafka.bootstrap_servers)
    good = json.dumps(order_event("NEW", at=1)).encode()
    huge = json.dumps({**order_event("NEW", at=2), "type": "COMET." + "N" * 10_000}).encode()
    ledger.send(bench.topic, [good], key=b"\x00\xff" * 250_000)
    ledger.send(bench.topic, [huge, huge])
    headers = [(f"name {n % 7}", b"\xff" * (n % 3)) for n in range(10_000)]
    ledger.send(bench.topic, [good], headers=headers)
    ledger.send(bench.topic, [good], headers=[("n" * 30_000, b"v" * 100_000)]).flush()

    once = bench.worker("run", "--until-end")

    assert once.wait() == 0, once.tail()
    assert logged(bench.database, bench.topic) == ledger.records
    assert bench.query("SELECT status FROM upvest.orders") == [("NEW",)]
    [unknown] = status_of(bench)["recent"]["unknown_types"]
    assert len(unknown) > 10_000


def test_an_open_transaction_is_reported_as_lag_until_it_is_aborted(
    bench: Bench,
):
    """No record after it may be read, and the lag must show the records that wait."""
    ledger = Ledger(bench.kafka.bootstrap_servers)
    ledger.send(bench.topic, [b"1", b"2"]).flush()
    hangs = Ledger(bench.kafka.bootstrap_servers, {"transactional.id": bench.topic})
    hangs.producer.init_transactions(20)
    hangs.producer.begin_transaction()
    hangs.send(bench.topic, [b"3"] * 5).flush()
    ledger.send(bench.topic, [b"4", b"5"]).flush()

    worker = bench.worker()
    bench.wait_until_logged(2)
    until(lambda: status_of(bench)["lag"] == 7, "status reports the records that wait")
    once = bench.worker("ingest", "--until-end", group_id=f"{bench.group}-once")
    assert once.wait() == 0, once.tail()
    hangs.producer.abort_transaction(20)
    until(lambda: bench.logged() == 10, "the rest flows")
    until(lambda: status_of(bench)["lag"] == 0, "nothing waits any more")

    assert worker.stop() == 0, worker.tail()
    assert logged(bench.database, bench.topic) == ledger.records


def test_read_models_are_right_when_added_partitions_move_keys(bench: Bench):
    """The newer events of an order come from another partition than its older events, and first."""
    quick = "session.timeout.ms=6000,heartbeat.interval.ms=200,fetch.wait.max.ms=50"
    worker = bench.worker(
        "run", start="latest", kafka_options=f"{quick},topic.metadata.refresh.interval.ms=500"
    )
    bench.wait_until_owner_of_all(worker)
    ledger = Ledger(bench.kafka.bootstrap_servers)

    def send(status: str, order: int, partitions: int) -> None:
        event = order_event(status, at=len(status), order=f"order {order}")
        key = f"order {order}".encode()
        ledger.send(
            bench.topic, [json.dumps(event).encode()], partition=order % partitions, key=key
        )

    for order in range(ORDERS // 2):
        send("NEW", order, bench.partitions)
    ledger.flush()
    bench.kafka.create_partitions(bench.topic, bench.partitions + 3)
    ledger.producer.list_topics(bench.topic, timeout=20)
    for order in range(ORDERS):
        send("FILLED", order, bench.partitions + 3)
        if order >= ORDERS // 2:
            send("NEW", order, bench.partitions)
    ledger.flush()
    bench.wait_until_logged(len(ledger.records))
    assert worker.stop() == 0, worker.tail()

    assert logged(bench.database, bench.topic) == ledger.records
    assert len(bench.next_offsets()) == bench.partitions + 3
    once = bench.worker("project", "--until-end")
    assert once.wait() == 0, once.tail()
    found = bench.query("SELECT status, count(*) FROM upvest.orders GROUP BY 1")
    assert found == [("FILLED", ORDERS)]
