"""What is logged when partitions are released or lost, on a database that does not answer."""

import threading
from typing import Any, cast

from structlog.testing import capture_logs

from pipeline.db import open_engine
from pipeline.ingest.halts import HaltLog
from pipeline.ingest.membership import Membership
from pipeline.ingest.state import Bounds, IngestMachine
from pipeline.outages import OutagePolicy
from pipeline.partitions import Epoch, NextOffset, Partition

ORDERS = Partition("orders", 0)


def test_partitions_that_postgresql_cannot_release_are_one_line_that_frightens_nobody():
    machine = IngestMachine(Bounds(batch_rows_max=10, batch_bytes_max=1000))
    machine.claimed(ORDERS, Epoch(1), NextOffset(5), NextOffset(9))
    nothing = cast("Any", None)
    membership = Membership(
        engine=open_engine("postgresql://u@127.0.0.1:1/upvest", application="test"),
        machine=machine,
        consumer=nothing,
        claimer=nothing,
        copies=nothing,
        installation=nothing,
        outages=OutagePolicy(waits_forever=True),
        halts=HaltLog(),
        stop=threading.Event(),
        drain=lambda _partitions: None,
    )

    with capture_logs() as lines:
        membership.release([ORDERS], "partitions_released")

    [line] = lines
    assert (line["event"], line["records_to_read_again"]) == ("partitions_released", 0)
    assert "the next owner claims them" in line["effect"]
