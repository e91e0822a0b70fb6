"""Memory is bounded, whatever the backlog."""

import pytest

from pipeline.settings import Settings
from tests.faults.harness import Bench

BACKLOG = 300_000
RESIDENT_MIB_MAX = 300
BATCH_ROWS = str(Settings.model_fields["batch_rows"].default)


@pytest.mark.timeout(300)
def test_a_long_backlog_is_worked_off_in_bounded_memory(bench: Bench):
    """Also while PostgreSQL does not take it, and everything that may pile up does."""
    with bench.feed(events=BACKLOG, keep_values=False) as feed:
        sent = feed.wait()

    with bench.database.connect(autocommit=False) as blocker:
        blocker.execute("LOCK TABLE pipeline.events IN SHARE ROW EXCLUSIVE MODE")
        worker = bench.worker(batch_rows=BATCH_ROWS)
        worker.wait_until_said("server_away")
    bench.wait_until_drained(sent, seconds_max=200)
    peak = worker.peak_memory_kib() // 1024

    print(f"peak {peak} MiB")
    assert peak <= RESIDENT_MIB_MAX
    bench.finish(sent)
