import json
from collections import Counter, defaultdict
from dataclasses import asdict
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import events
from pipeline.rfc3339 import micros
from pipeline.sandbox.simulator import Books, Chaos, Simulation
from pipeline.sandbox.simulator.chaos import MALFORMED
from pipeline.sandbox.simulator.timeline import SimulatedEvent

HEAVY = Chaos(
    repeats=0.1,
    late=0.1,
    astray=0.1,
    unknown_fields=0.05,
    unknown_enums=0.05,
    blank_updated_at=0.02,
    unknown_types=0.02,
    malformed=0.03,
    bad_amounts=0.01,
)
CALM = dict.fromkeys(asdict(HEAVY), 0.0)
KNOWN = ("USER", "ACCOUNT", "INSTRUMENT", "ORDER", "EXECUTION", "POSITION", "CASH", "SECURITY")


def read(record):
    """The record as a row of the log would have it."""
    return events.read(
        events.Record(
            record.topic,
            record.partition or 0,
            0,
            record.value,
            record.key,
            record.headers,
            record.timestamp_ms,
            1,
        )
    )


@pytest.fixture(scope="module")
def calm():
    simulation = Simulation(21, events=4_000)
    return list(simulation), simulation


@pytest.fixture(scope="module")
def wild():
    simulation = Simulation(21, events=4_000, chaos=HEAVY)
    return list(simulation), simulation


def test_the_same_seed_makes_the_same_chaos(wild):
    assert list(Simulation(21, events=4_000, chaos=HEAVY)) == wild[0]


def test_chaos_does_not_change_the_books(calm, wild):
    for table in calm[1].books.tables:
        assert calm[1].books.rows(table) == wild[1].books.rows(table)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(), events=st.integers(0, 2_000))
def test_nothing_is_lost_and_the_report_counts_what_was_added(seed, events):
    simulation = Simulation(seed, events=events, chaos=HEAVY)

    records = list(simulation)

    assert len(records) == events + simulation.report.added


def test_chaos_keeps_every_event_and_reports_every_addition(calm, wild):
    ids = {json.loads(record.value)["id"] for record in calm[0]}
    rows = [read(record) for record in wild[0]]
    good = [row for row in rows if row.problem is None]
    came = Counter(str(json.loads(row.payload)["id"]) for row in good if row.payload)
    report = wild[1].report

    assert ids <= came.keys()
    assert sum(came[event_id] - 1 for event_id in ids) == report.repeats
    bad = {event_id for event_id, _ in report.bad_amounts}
    strangers = [row for row in good if str(json.loads(row.payload)["id"]) not in ids | bad]
    assert all(not row.event_type.startswith(KNOWN) for row in strangers)
    assert len(bad) == report.counts["bad_amount"] > 0


def test_chaos_makes_every_kind_of_malformed_record(wild):
    assert all(wild[1].report.counts[kind] > 0 for kind in MALFORMED)


@pytest.mark.parametrize("kind", sorted(MALFORMED))
def test_no_malformed_record_is_an_event_of_a_read_model(calm, kind):
    near = calm[0][0]
    order = {"type": "ORDER.NEW", "object": {"id": "1", "client_reference": ""}}
    stranger = {"type": "FOO.BAR", "object": {"n": "@"}}

    row = read(near._replace(value=MALFORMED[kind](near.value, order, stranger)))

    assert row.problem is not None or row.event_type == "FOO.BAR"
    assert row.payload is None or row.event_type in (None, "FOO.BAR")


def test_repeats_are_the_same_bytes_in_their_own_or_another_partition():
    simulation = Simulation(5, events=3_000, chaos=Chaos(**(CALM | {"repeats": 0.1})))
    occurrences = defaultdict(list)
    for record in simulation:
        occurrences[record.value].append(record.partition)
    counts = simulation.report.counts

    assert len(occurrences) == 3_000
    assert (
        sum(len(copies) - 1 for copies in occurrences.values()) == simulation.report.repeats > 200
    )
    assert (
        sum(len(set(copies)) > 1 for copies in occurrences.values())
        == counts["repeat_elsewhere"]
        > 0
    )


def test_events_of_an_entity_arrive_in_several_partitions_and_out_of_order(wild):
    occurrences = defaultdict(list)
    for record in wild[0]:
        row = read(record)
        if row.problem is None and row.entity_id is not None:
            occurrences[row.entity_id].append((record.partition, row.created_at))

    assert (
        sum(len({partition for partition, _ in arrivals}) > 1 for arrivals in occurrences.values())
        > 100
    )
    times = [[created_at for _, created_at in arrivals] for arrivals in occurrences.values()]
    assert sum(arrivals != sorted(arrivals) for arrivals in times) > 100


RANKS = {
    "NEW": 1,
    "IN_PROGRESS": 1,
    "PROCESSING": 2,
    "FILLED": 3,
    "PASSED": 3,
    "FAILED": 3,
    "SETTLED": 4,
    "CANCELLED": 5,
}


def version(category, event, entity):
    """What decides which of two events about one thing is newer."""
    created_at = micros(event["created_at"])
    rank = RANKS.get(entity.get("status", ""), 0)
    if category in ("EXECUTION", "USER_CHECK"):
        return rank, created_at
    return micros(entity.get("updated_at")) or created_at, rank, created_at


def key_of(category, event, entity):
    if category == "POSITION":
        return entity["account_id"], entity["instrument"]["uuid"]
    if category == "CASH_BALANCE":
        return entity["account_group_id"], entity["currency"]
    if "id" not in entity:
        return (event["id"],)
    return entity["id"], entity["type"] if category.endswith("TRANSACTION") else ""


@pytest.mark.parametrize("seed", range(3))
def test_a_reader_that_keeps_the_newest_state_of_each_entity_equals_the_books(seed):
    simulation = Simulation(seed, events=5_000, chaos=HEAVY)
    records = list(simulation)
    Random(seed).shuffle(records)
    strangers = {event_id for event_id, _ in simulation.report.bad_amounts}

    newest: dict[object, tuple[object, SimulatedEvent]] = {}
    for record in records:
        row = read(record)
        event = json.loads(row.payload) if row.problem is None and row.payload else {}
        if not event or event["id"] in strangers or not event["type"].startswith(KNOWN):
            continue
        entity = event["object"]
        states = [(event["type"], entity)]
        if event["type"].startswith("ORDER."):
            states += [("EXECUTION.TOLD", execution) for execution in entity.pop("executions")]
            entity["executions"] = []
        for event_type, state in states:
            category = event_type.partition(".")[0]
            key = category, event_type.endswith("_FAILED"), key_of(category, event, state)
            won = version(category, event, state)
            winner = SimulatedEvent(b"", event_type, {**event, "object": state}, 0)
            if key not in newest or won > newest[key][0]:
                newest[key] = won, winner
    books = Books()
    for _, winner in newest.values():
        books.record(winner)

    for table in set(books.tables) - {"instrument_isins"}:
        assert Counter(books.rows(table)) == Counter(simulation.books.rows(table)), table


def test_a_surprise_in_an_event_changes_nothing_else_in_it(calm, wild):
    before = {json.loads(record.value)["id"]: json.loads(record.value) for record in calm[0]}
    surprising = {"trace", "sustainability", "updated_at", "salutation", "method"}
    surprising.add("initiation_flow")
    changed = 0
    for record in wild[0]:
        row = read(record)
        if row.problem is not None or row.payload is None:
            continue
        now = json.loads(row.payload)
        was = before.get(now["id"])
        if was is None or was == now:
            continue
        changed += 1
        fields = {name for name in now if name != "object" and now[name] != was.get(name)}
        entity, old = now["object"], was["object"]
        fields |= {name for name in entity.keys() | old.keys() if entity.get(name) != old.get(name)}
        assert fields <= surprising

    assert changed > 100


def test_a_kind_of_chaos_that_is_switched_off_does_not_happen(calm):
    simulation = Simulation(21, events=4_000, chaos=Chaos(**CALM))

    assert list(simulation) == calm[0]
    assert simulation.report.counts == {}
