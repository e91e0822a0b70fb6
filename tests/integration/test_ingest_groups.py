"""Several ingests in one group share the partitions and neither lose nor repeat a record."""

import threading
from contextlib import contextmanager
from typing import Any

import pytest

from tests.integration.ingesting import (
    Ledger,
    Running,
    logged,
    next_offsets,
    offset_rows,
    settings_for,
    until,
)

PARTITIONS = 4
PACE_S = 0.01

# A classic member learns of a rebalance with its next heartbeat.
QUICK = {"heartbeat.interval.ms": "200", "session.timeout.ms": "6000"}
PROTOCOLS: dict[str, Any] = {
    "cooperative-sticky": {"options": QUICK},
    "range": {"options": {**QUICK, "partition.assignment.strategy": "range"}},
    "consumer": {"kafka_group_protocol": "consumer"},
}


@contextmanager
def producing(ledger, topic):
    """Records for every partition, all the time, until the end of the block."""
    stop = threading.Event()
    failures = []

    def produce():
        n = 0
        try:
            while not stop.is_set():
                for partition in range(PARTITIONS):
                    ledger.send(topic, [b'{"n": %d}' % n], partition=partition)
                n += 1
                ledger.flush()
                stop.wait(PACE_S)
        except BaseException as failure:  # noqa: BLE001 - raised below
            failures.append(failure)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert failures == []


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ingests_of_one_group_neither_lose_nor_repeat_a_record(kafka, topic, database, protocol):
    name = topic(PARTITIONS)
    ledger = Ledger(kafka.bootstrap_servers)
    settings = settings_for(
        database, kafka.bootstrap_servers, name, batch_rows=50, **PROTOCOLS[protocol]
    )
    running = []

    def owners():
        """How many partitions each owner has."""
        found = [row.owner for row in offset_rows(database).values()]
        return sorted(found.count(owner) for owner in set(found) - {None})

    def are_shared_by(count):
        return lambda: len(owners()) == count and sum(owners()) == PARTITIONS

    def has_moved_on():
        before = next_offsets(database, name)
        return lambda: all(
            offset > before[number] for number, offset in next_offsets(database, name).items()
        )

    try:
        with producing(ledger, name):
            for count in (1, 2, 3):
                running.append(Running(settings))
                until(are_shared_by(count), f"{count} share the partitions")
                until(has_moved_on(), "every partition moves on")
            for count in (2, 1):
                assert running.pop(0).end() is None
                until(are_shared_by(count), f"{count} share the partitions")
                until(has_moved_on(), "every partition moves on")
        until(
            lambda: sum(next_offsets(database, name).values()) == len(ledger.records),
            "all is in the log",
        )
    finally:
        errors = [ingest.end() for ingest in running]

    assert errors == [None]
    assert logged(database, name) == ledger.records
    assert owners() == []
    assert {row.problem for row in offset_rows(database).values()} == {None}
