"""The checks of a soak detect every failure: each is caused once, and must be detected."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import catalogue
from pipeline.partitions import Partition
from pipeline.sandbox.simulator import Chaos
from tests.faults.harness import Bench
from tests.faults.ledger import Feed, Held, LeanLedger
from tests.given import Given, order_event, sample_events
from tests.soak.analyst import Analyst
from tests.soak.availability import Availability
from tests.soak.journal import Journal
from tests.soak.judge import Judgement, compare, judge

pytestmark = pytest.mark.faults

PARTITIONS = 2
EVENTS = 400
SPOT = "ctid = (SELECT min(ctid) FROM {})"


@pytest.fixture
def given(database) -> Iterator[Given]:
    made = Given(database)
    made(sample_events()).project(*catalogue.load().models)
    yield made
    made.close()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


@pytest.fixture
def analyst(given: Given, journal: Journal) -> Analyst:
    """An analyst that has checked before, and found nothing."""
    made = Analyst(given.database, journal)
    made.look()
    made.audit()
    assert (journal.failures, made.breaks()) == ([], 0)
    return made


HARM = {
    "UPDATE pipeline.consumer_offsets SET next_offset = next_offset - 1": "next_offset of",
    "UPDATE pipeline.consumer_offsets SET epoch = epoch - 1": "the epoch of",
    "UPDATE pipeline.consumer_offsets SET problem = 'a gap'": "is halted: a gap",
    "UPDATE pipeline.consumer_offsets SET next_offset = next_offset + 1": "holds 0 records",
    'INSERT INTO pipeline.events (topic, "partition", "offset") '
    'SELECT topic, "partition", next_offset FROM pipeline.consumer_offsets': "holds 1 records",
    "UPDATE pipeline.projection_checkpoints SET next_offset = 7 WHERE projector = 'orders'": (
        "the checkpoint of orders in Notifications:0 fell from 574 to 7"
    ),
    "DELETE FROM pipeline.projection_checkpoints WHERE projector = 'users'": (
        "the checkpoint of users in Notifications:0 fell from 574 to None"
    ),
    "UPDATE pipeline.projection_checkpoints SET next_offset = 575": "whose log ends at 574",
    "DELETE FROM upvest.instruments WHERE true": "instruments had",
    "DELETE FROM upvest.orders WHERE " + SPOT.format("upvest.orders"): "orders is at 574",
    "DELETE FROM upvest.positions WHERE " + SPOT.format("upvest.positions"): "positions is at",
}


@pytest.mark.parametrize("harm", HARM)
def test_a_single_damage_is_detected_by_the_next_check(given, journal, analyst, harm: str):
    given.execute(harm)

    analyst.look()

    assert any(HARM[harm] in failure for failure in journal.failures), journal.failures


def test_a_checkpoint_that_moved_without_its_rows_is_detected(given, journal, analyst):
    given([order_event("NEW", at="10:00:00", order="another one")])
    given.execute("UPDATE pipeline.projection_checkpoints SET next_offset = 575")

    analyst.look()

    [failure] = journal.failures
    assert "orders is at 575 of Notifications:0 without 1 events below" in failure


def test_only_an_unannounced_truncation_is_a_failure(given, journal, analyst):
    with analyst.announced("orders"):
        given.execute("TRUNCATE upvest.orders")
    analyst.look()
    assert journal.failures == []

    given.project(*catalogue.load().models)
    analyst.look()
    given.execute("TRUNCATE upvest.orders")
    analyst.look()
    assert any("orders" in failure for failure in journal.failures)


MONEY = {
    "UPDATE upvest_personal.cash_transactions SET amount = amount + 0.01 WHERE ": (
        "sums of the cash ledger"
    ),
    "UPDATE upvest.security_transactions SET quantity = quantity * 2 WHERE ": (
        "sums of the securities ledger"
    ),
    "UPDATE upvest.cash_balances SET balance = balance - 0.01 WHERE ": "cash balances",
    "DELETE FROM upvest.positions WHERE ": "positions",
}


@pytest.mark.parametrize("harm", MONEY)
def test_amounts_that_differ_from_the_log_are_detected(given, journal, analyst, harm: str):
    table = next(word for word in harm.split() if word.startswith("upvest"))
    given.execute(harm + SPOT.format(table))

    analyst.audit()

    [failure] = journal.failures
    assert MONEY[harm] in failure
    assert analyst.breaks() == 1


# ------------------------------------------------------------------------------------ availability


def test_time_counts_as_unavailable_while_records_wait_and_nothing_moves(database, journal):
    partition = Partition("Notifications", 0)
    ends = {partition: 10}
    seen = Availability(database, lambda: ends, journal)

    def sample_after(seconds: float, stored: int | None) -> None:
        journal.began -= seconds
        seen.sample(None if stored is None else {partition: stored})

    sample_after(0, 10)
    sample_after(50, 10)
    assert seen.seconds == 0, "nothing waits"
    ends[partition] = 20
    sample_after(3, 10)
    sample_after(4, None)
    sample_after(1, 15)
    assert seen.seconds == pytest.approx(8, abs=0.5)
    sample_after(0.5, 15)
    sample_after(0.1, 20)
    assert (seen.stretches, seen.lag) == (1, 0), "a time below a second is the pace of batches"
    sample_after(0, 19)
    sample_after(1000, 19)
    sample_after(1, 19)
    assert any("nothing moves any more" in failure for failure in journal.failures)


# ---------------------------------------------------------------------------- log, Kafka and ledger


@pytest.fixture
def soaked(kafka, database, topic, tmp_path) -> Iterator[tuple[Bench, Feed, LeanLedger]]:
    """A little of everything, and no faults."""
    bench = Bench(kafka, database, topic(PARTITIONS), PARTITIONS, tmp_path)
    ledger = LeanLedger()
    feed = bench.feed(
        events=EVENTS,
        chaos=Chaos(bad_amounts=0.02),
        keep_values=False,
        keep_books=True,
        into=ledger,
    )
    with feed:
        feed.wait()
    worker = bench.worker("run", "--until-end")
    assert worker.wait() == 0, worker.tail()
    yield bench, feed, ledger
    bench.close()


DAMAGE = {
    "": (0, 0, 0),
    'DELETE FROM pipeline.events WHERE "partition" = 0 AND "offset" IN (3, 5)': (2, 0, 0),
    'DELETE FROM pipeline.events WHERE "offset" = 0': (2, 0, 0),
    'UPDATE pipeline.events SET "offset" = 99999 WHERE "partition" = 1 AND "offset" = 4': (1, 1, 0),
    "UPDATE pipeline.events SET key = 'x' WHERE \"offset\" = 6": (0, 0, 2),
    "UPDATE pipeline.events SET payload = '{}' WHERE payload IS NOT NULL "
    'AND raw IS NULL AND "partition" = 0 AND "offset" < 30': None,
    "UPDATE pipeline.events SET headers = '[]' WHERE \"offset\" = 7": (0, 0, 2),
}


def test_each_lost_doubled_or_changed_record_is_counted(soaked):
    bench, _, ledger = soaked
    partitions = [Partition(bench.topic, number) for number in range(PARTITIONS)]

    for damage, expected in DAMAGE.items():
        done = Judgement()
        with bench.database.connect() as db:
            # Without the triggers that refuse it; the copy restores everything.
            db.execute("SET session_replication_role = replica")
            db.execute("CREATE TEMP TABLE kept AS SELECT * FROM pipeline.events")
            if damage:
                db.execute(damage.encode())
            differences = [
                line for partition in partitions for line in compare(bench, ledger, partition, done)
            ]
            db.execute("DELETE FROM pipeline.events")
            db.execute("INSERT INTO pipeline.events SELECT * FROM kept")

        found = (done.lost, done.double, done.changed)
        if expected is None:
            assert done.changed > 10
        else:
            assert found == expected, damage
        assert bool(differences) == bool(damage)


def test_the_judge_accepts_an_intact_result_and_detects_each_kind_of_damage(soaked):
    bench, feed, ledger = soaked
    whole = judge(bench, feed, ledger)
    assert whole.failures == []
    assert whole.records == len(ledger)
    assert min(whole.rows, whole.dead_letters, whole.repeats) > 0

    with bench.database.connect() as db:
        db.execute("SET session_replication_role = replica")
        db.execute("DELETE FROM upvest.orders WHERE ctid = (SELECT min(ctid) FROM upvest.orders)")
        db.execute("DELETE FROM pipeline.dead_letters")
        db.execute('UPDATE pipeline.events SET repeat_of = 0 WHERE "offset" = 1')
        db.execute("CREATE TABLE pipeline_shadow.left_over ()")
        db.execute("UPDATE pipeline.consumer_offsets SET next_offset = next_offset + 1")
    harmed = judge(bench, feed, ledger)
    bench.execute("DROP TABLE pipeline_shadow.left_over")

    assert harmed.differing > 0
    assert harmed.differing_from_books == 1
    differences = "\n".join(harmed.failures)
    for word in ("rows of orders", "dead letters", "repeats", "left_over", "next offset is"):
        assert word in differences, word


def test_a_record_that_was_sent_differently_does_not_match():
    ledger, partition = LeanLedger(), Partition("Notifications", 0)
    sent = Held(2, b"{}", b"key", (("name", b"value"),))
    ledger._add("Notifications", 0, 2, sent.value, sent.key, sent.headers)

    assert ledger.claim(partition, sent)
    assert not ledger.claim(partition, sent._replace(value=b"[]"))
    assert not ledger.claim(partition, sent._replace(headers=()))
    assert not ledger.claim(partition, sent._replace(offset=1)), "nothing was sent there"
