"""What people do to read models by hand, while `pipeline run` works on them."""

import subprocess

import pytest

from tests.faults.harness import ENTRY, PROJECT, Bench, until

PER_SECOND = 100
pytestmark = pytest.mark.timeout(300)


def rebuild(bench: Bench, *options: str) -> tuple[int, str]:
    """Exit code and output."""
    done = subprocess.run(
        [*ENTRY, "rebuild", *options, "--json"],
        env={"PATH": "/usr/bin:/bin", "PIPELINE_DATABASE_URL": bench.database.url},
        capture_output=True,
        text=True,
        check=False,
        cwd=PROJECT,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_table_restored_from_an_older_copy_is_repaired_during_live_traffic(
    bench: Bench,
):
    worker = bench.worker("run")
    with bench.feed(rate=PER_SECOND) as feed:
        until(lambda: bench.query("SELECT FROM upvest.orders LIMIT 1"), "there are orders")
        bench.execute("CREATE TABLE audit.older AS TABLE upvest.orders")
        kept = len(bench.query("SELECT FROM audit.older"))
        until(lambda: len(bench.query("SELECT FROM upvest.orders")) >= kept + 20, "there are more")
        bench.execute(
            "BEGIN; LOCK TABLE upvest.orders IN SHARE ROW EXCLUSIVE MODE; "
            "DELETE FROM upvest.orders; "
            "INSERT INTO upvest.orders SELECT * FROM audit.older; COMMIT"
        )
        code, output = rebuild(bench, "orders", "--check")
        assert code == 1, output
        code, output = rebuild(bench, "orders")
        assert code == 0, output

    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    assert worker.exit_code == 0
    bench.judge_read_models(feed.books)


def test_a_dropped_table_halts_only_its_read_model(bench: Bench):
    """Until somebody restores an older copy of the table and rebuilds it."""
    worker = bench.worker("run")
    with bench.feed(rate=PER_SECOND) as feed:
        until(lambda: bench.query("SELECT FROM upvest.orders LIMIT 1"), "there are orders")
        bench.execute("ALTER TABLE upvest.orders RENAME TO gone")
        worker.wait_for_log("read_model_broken")
        before = len(bench.query("SELECT FROM upvest.executions"))
        until(
            lambda: len(bench.query("SELECT FROM upvest.executions")) > before,
            "another read model continues",
        )
        bench.execute("ALTER TABLE upvest.gone RENAME TO orders")
        code, output = rebuild(bench, "orders")
        assert code == 0, output

    assert "upvest.orders does not exist" in worker.logged("read_model_broken")[0]["reason"]
    bench.wait_until_projected(feed.ledger)
    bench.finish(feed.ledger)
    assert worker.exit_code == 0
    bench.judge_read_models(feed.books)


@pytest.mark.core
def test_a_rebuild_that_is_killed_at_any_step_is_resumed(bench: Bench):
    with bench.feed(events=1500) as feed:
        sent = feed.wait()
    assert bench.worker("run", "--until-end").wait() == 0
    bench.execute("DELETE FROM upvest.orders WHERE side = 'SELL'")

    for failpoint in ("mid_rebuild", "before_swap", "after_swap"):
        # A rebuild creates tables, so it runs as the owner.
        died = bench.worker(
            "rebuild", "orders", fail=f"{failpoint}:kill", through=lambda _: bench.database.url
        )
        assert died.wait() == -9, died.tail()

    code, output = rebuild(bench, "orders")
    assert code == 0, output
    bench.judge_read_models(feed.books)
    left = bench.query(
        "SELECT relname FROM pg_class WHERE relnamespace = 'pipeline_shadow'::regnamespace"
    )
    assert left == []
    bench.judge(sent)
