"""A wrong event costs one event: found, named without its value, put aside, retried."""

import re
import string
from datetime import date, datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, example, settings
from hypothesis import given as over
from hypothesis import strategies as st
from sqlalchemy import text

from pipeline.db import transaction
from pipeline.errors import ExitCode
from pipeline.projection import dead_letters
from pipeline.projection.apply import BrokenProjectorError
from pipeline.projection.dead_letters import RetryOutcome, retry, retry_letter
from pipeline.projection.loop import Limits
from pipeline.projectors.executions import executions
from pipeline.projectors.orders import orders
from pipeline.readmodel import Children, Custom, EntityTable, EventTable, integer, uuid
from pipeline.readmodel import text as text_field
from pipeline.readmodel.checking import USUAL, USUAL_DATE, USUAL_DIGITS
from pipeline.rebuild.rebuild import rebuild
from tests.given import (
    Given,
    create_tables,
    event,
    execution,
    execution_event,
    order_event,
    some_id,
)

DELIVERED = ["one before", "one after"]

WRONG_ORDERS: list[tuple[dict[str, Any], str, str]] = [
    ({"cash_amount": "12,5"}, "cash_amount", "22P02"),
    ({"cash_amount": "NaN"}, "cash_amount", "22P02"),
    ({"cash_amount": "1e5"}, "cash_amount", "22P02"),
    ({"cash_amount": "0x10"}, "cash_amount", "22P02"),
    ({"cash_amount": " 1"}, "cash_amount", "22P02"),
    ({"cash_amount": "."}, "cash_amount", "22P02"),
    ({"cash_amount": "1-2"}, "cash_amount", "22P02"),
    ({"cash_amount": {}}, "cash_amount", "22P02"),
    ({"cash_amount": [1]}, "cash_amount", "22P02"),
    ({"cash_amount": True}, "cash_amount", "22P02"),
    ({"updated_at": "now"}, "updated_at", "22007"),
    ({"updated_at": "infinity"}, "updated_at", "22007"),
    ({"updated_at": "12.01.2026"}, "updated_at", "22007"),
    ({"updated_at": "2026-01-12T10:00:00"}, "updated_at", "22007"),
    ({"updated_at": "2026-02-30T10:00:00Z"}, "updated_at", "22008"),
    ({"updated_at": "2026-01-12T25:00:00Z"}, "updated_at", "22008"),
    ({"updated_at": 1768212000}, "updated_at", "22007"),
    ({"expiry_date": "2026-02-30"}, "expiry_date", "22008"),
    ({"expiry_date": "20260212"}, "expiry_date", "22007"),
    ({"expiry_date": "2026-01-12|2026-01-13"}, "expiry_date", "22007"),
    ({"expiry_date": "2026-01-12x2026-01-13"}, "expiry_date", "22007"),
    ({"expiry_date": "2026-01-12x"}, "expiry_date", "22007"),
    ({"updated_at": "2026-01-12|"}, "updated_at", "22007"),
    ({"updated_at": "2026-01-12x"}, "updated_at", "22007"),
    ({"updated_at": "2026-01-12T10:00:00Zx2026-01-12"}, "updated_at", "22007"),
    ({"updated_at": "x"}, "updated_at", "22007"),
    ({"user_instrument_fit_acknowledgement": "yes"}, "fit_acknowledged", "22P02"),
    ({"user_instrument_fit_acknowledgement": 1}, "fit_acknowledged", "22P02"),
    ({"account_id": "IE00ZQ7B0228"}, "account_id", "22P02"),
    ({"id": ""}, "order_id", "23502"),
    ({"id": None}, "order_id", "23502"),
]


def found(given: Given) -> list[tuple[str, int, str | None, str]]:
    return [
        tuple(row)
        for row in given.query(
            'SELECT projector, "offset", column_name, sqlstate FROM pipeline.dead_letters '
            'ORDER BY projector, topic, partition, "offset"'
        )
    ]


ALONE_AND_TOGETHER = pytest.mark.parametrize("batch", [1, 1000], ids=["alone", "together"])
"""Whether an event is rejected must not depend on its neighbours in a batch."""


@pytest.mark.both_postgres
@ALONE_AND_TOGETHER
def test_each_wrong_value_is_named_and_the_other_events_are_applied(given: Given, batch):
    events = [order_event("NEW", at="10:00:00", order="one before")]
    events += [
        order_event("NEW", at="10:00:00", **{"order": f"wrong {number}", **changes})
        for number, (changes, _, _) in enumerate(WRONG_ORDERS)
    ]
    events += [order_event("NEW", at="10:00:00", order="one after")]

    rows = given(events).project(orders, limits=Limits(batch_offsets_max=batch))

    assert {str(row.order_id) for row in rows} == {some_id(name) for name in DELIVERED}
    assert found(given) == [
        ("orders", number, column, sqlstate)
        for number, (_, column, sqlstate) in enumerate(WRONG_ORDERS, start=1)
    ]


@pytest.mark.both_postgres
@pytest.mark.parametrize(
    ("wrong", "column", "sqlstate"),
    [
        (event("ORDER.NEW", "no object"), "object", "22023"),
        (event("ORDER.NEW", ["no object"]), "object", "22023"),
        (event("ORDER.NEW", None), "object", "22023"),
        ({"id": some_id("x"), "type": "ORDER.NEW", "created_at": "2026-01-12"}, "object", "22023"),
        (order_event("NEW", at=0, executions="none"), "executions", "22023"),
        (order_event("NEW", at=0, executions=[{}]), "execution_id", "23502"),
        (order_event("NEW", at=0, executions=["x"]), "object", "22023"),
        (order_event("NEW", at=0, executions=[execution("FILLED", price="?")]), "price", "22P02"),
        (execution_event("FILLED", at=0, taxes=[{"amount": "1,5"}]), "amount", "22P02"),
        (execution_event("FILLED", at=0, taxes={"amount": "1"}), "taxes", "22023"),
        (execution_event("FILLED", at=0, taxes=[1]), "object", "22023"),
        (
            order_event("NEW", at=0, executions=[execution("FILLED", taxes=[{"amount": []}])]),
            "amount",
            "22P02",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
@ALONE_AND_TOGETHER
def test_wrong_values_inside_lists_and_children_are_named(
    given: Given, wrong, column, sqlstate, batch
):
    valid = [execution_event("FILLED", at="10:00:00", execution=name) for name in DELIVERED]

    bad_neighbour = execution_event("FILLED", at=0, price="?")
    limits = Limits(batch_offsets_max=batch)
    rows = given([valid[0], wrong, valid[1], bad_neighbour]).project(executions, limits=limits)

    assert {str(row.execution_id) for row in rows} == {some_id(name) for name in DELIVERED}
    assert len(given.rows("execution_taxes")) == 2
    assert found(given) == [
        ("executions", 1, column, sqlstate),
        ("executions", 3, "price", "22P02"),
    ]


@ALONE_AND_TOGETHER
def test_unusual_valid_values_are_applied_beside_wrong_ones(given: Given, batch):
    odd = [
        order_event("FILLED", at=1, id="no uuid", executions=[execution("FILLED")]),
        order_event("FILLED", at=1, executions=[execution("SETTLED", execution="x", order_id="")]),
        order_event("FILLED", at=1, id={}, executions=[]),
        execution_event("FILLED", at=1, execution="y", settlement_date="2026-01-14T23:00:00+02:00"),
        execution_event("FILLED", at=1, execution="z", price="007.50", taxes=[{"more": 1}]),
    ]
    wrong = [
        order_event("FILLED", at=1, id="?", executions=[execution("FILLED", order_id="")]),
        execution_event("FILLED", at=1, price="?"),
    ]

    rows = given(odd + wrong).project(executions, limits=Limits(batch_offsets_max=batch))

    assert {str(row.execution_id) for row in rows} == {
        some_id(name) for name in ("an execution", "x", "y", "z")
    }
    assert [(offset, sqlstate) for _, offset, _, sqlstate in found(given)] == [
        (5, "22P02"),
        (6, "22P02"),
    ]


@pytest.mark.parametrize("settled_first", [True, False])
def test_an_event_is_rejected_whether_or_not_it_would_win(given: Given, settled_first):
    """Or the order of arrival would decide what else of a rejected event is in the tables."""
    bad = execution("FILLED", taxes=[{"type": "TOTAL", "amount": "1,5"}])
    filled = order_event("FILLED", at=0, executions=[bad, execution("FILLED", execution="other")])
    settled = execution_event("SETTLED", at=1)

    for delivered in [settled, filled] if settled_first else [filled, settled]:
        given([delivered]).project(executions)

    rows = [(str(row.execution_id), row.status) for row in given.rows("executions")]
    assert rows == [(some_id("an execution"), "SETTLED")]
    assert found(given) == [("executions", 1 if settled_first else 0, "amount", "22P02")]


def test_lists_that_are_unset_are_empty_lists(given: Given):
    unset_lists: list[object] = [None, "", []]
    events = [
        order_event("NEW", at=number, order=str(number), executions=unset)
        for number, unset in enumerate(unset_lists)
    ]
    events.append(execution_event("FILLED", at="10:00:00", taxes=""))

    given(events).project(executions, orders)

    assert found(given) == []
    assert len(given.rows("orders")) == 3
    assert given.rows("execution_taxes") == []


def test_a_dead_letter_holds_no_value(given: Given):
    secret = "IBAN DE02120300000000202051"
    given([order_event("NEW", at=0, cash_amount=secret, client_reference=secret)])

    given.project(orders)

    (letter,) = given.query("SELECT d::text FROM pipeline.dead_letters d")
    assert "DE02" not in letter[0]


@pytest.fixture
def unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constraint of the test's own refuses events, and is not blamed for it."""
    monkeypatch.setattr("pipeline.projection.one_pass.foreign_objects", lambda *_: [])


@pytest.mark.usefixtures("unnoticed")
def test_an_error_that_screening_misses_is_found_by_bisection(given: Given):
    """A rule of the table itself, say, that no declaration mentions."""
    given.execute("ALTER TABLE upvest.orders ADD CONSTRAINT no_big_fee CHECK (fee < 100)")
    events = [
        order_event("NEW", at="10:00:00", order=str(number), fee="500" if number % 30 == 7 else "1")
        for number in range(100)
    ]

    rows = given(events).project(orders)

    assert len(rows) == 96
    assert found(given) == [("orders", offset, None, "23514") for offset in (7, 37, 67, 97)]


def test_a_projector_that_rejects_too_much_is_halted_and_the_others_continue(given: Given):
    given([order_event("NEW", at="10:00:00", order="good")])
    given.project(orders, executions)
    wrong = [
        order_event(
            "NEW", at="10:00:00", order=str(number), fee="a lot", executions=[execution("FILLED")]
        )
        for number in range(6)
    ]

    given(wrong).project(orders, executions, limits=Limits(rejected_max=5))

    assert len(given.rows("orders")) == 1
    assert len(given.rows("executions")) == 1
    assert found(given) == []
    broken = given.query(
        "SELECT projector, problem FROM pipeline.projectors WHERE state = 'broken'"
    )
    assert [(row.projector, row.problem) for row in broken] == [
        ("orders", "at least 6 of 6 events in one pass were rejected")
    ]
    places = given.query(
        "SELECT projector, next_offset FROM pipeline.projection_checkpoints ORDER BY 1"
    )
    assert [tuple(row) for row in places] == [("executions", 7), ("orders", 1)]


def test_half_of_many_events_breaks_a_projector_too(given: Given):
    events = [
        order_event("NEW", at="10:00:00", order=str(number), fee="?" if number % 2 else "1")
        for number in range(100)
    ]

    given(events).project(orders, limits=Limits(rejected_max=1000))

    assert given.scalar("SELECT state FROM pipeline.projectors") == "broken"
    with pytest.raises(BrokenProjectorError) as refused:
        rebuild(given.engine, orders)
    assert refused.value.exit_code is ExitCode.REFUSED


def test_a_rebuild_repairs_a_broken_projector(given: Given):
    given.execute("ALTER TABLE upvest.orders ADD CONSTRAINT wrong CHECK (side <> 'BUY')")
    events = [order_event("NEW", at="10:00:00", order=str(number)) for number in range(8)]
    given(events).project(orders, limits=Limits(rejected_max=3))
    assert given.scalar("SELECT state FROM pipeline.projectors") == "broken"
    given.execute("ALTER TABLE upvest.orders DROP CONSTRAINT wrong")

    difference = rebuild(given.engine, orders)

    assert (difference.missing, difference.rows) == (8, 8)
    given([order_event("FILLED", at="11:00:00", order="0")]).project(orders)
    assert [row.status for row in given.rows("orders")].count("FILLED") == 1


@pytest.mark.both_postgres
@pytest.mark.usefixtures("unnoticed")
def test_a_dead_letter_retried_at_any_time_after_a_fix_gives_the_right_rows(given: Given):
    given.execute("ALTER TABLE upvest.orders ADD CONSTRAINT wrong CHECK (fee < 100)")
    given([order_event("NEW", at="10:00:00", fee="500")])
    given([order_event("NEW", at="10:00:00", order="other", fee="500")]).project(orders)
    given([order_event("FILLED", at="11:00:00", fee="1")]).project(orders)
    assert retry(given.engine, [orders, executions]) == (0, 2)
    (attempts,) = set(given.query("SELECT attempts FROM pipeline.dead_letters"))
    assert attempts == (2,)
    before = given.query("SELECT * FROM pipeline.projection_checkpoints")
    given.execute("ALTER TABLE upvest.orders DROP CONSTRAINT wrong")

    applied = retry(given.engine, [orders, executions])

    assert applied == (2, 0)
    assert sorted(row.status for row in given.rows("orders")) == ["FILLED", "NEW"]
    assert found(given) == []
    assert given.query("SELECT * FROM pipeline.projection_checkpoints") == before
    assert rebuild(given.engine, orders).differing == 0


def test_a_dead_letter_that_was_removed_meanwhile_is_neither_applied_nor_rejected(given: Given):
    given([order_event("NEW", at="10:00:00", fee="?")]).project(orders)
    with transaction(given.engine) as db:
        letters = dead_letters.listed(db, ["orders"])
        dead_letters.forget(db, "orders")

    with transaction(given.engine) as db:
        assert retry_letter(db, orders, letters[0]) is RetryOutcome.GONE


def test_a_rebuild_replaces_the_dead_letters(given: Given):
    given(
        [
            order_event("NEW", at="10:00:00", fee="?"),
            order_event("NEW", at="10:00:00", order="another"),
        ]
    )
    given.project(orders)
    given.execute("DELETE FROM pipeline.dead_letters")

    difference = rebuild(given.engine, orders)

    assert (difference.differing, difference.dead_letters) == (0, 1)
    assert found(given) == [("orders", 0, "fee", "22P02")]


# --------------------------------------------------------------------------------- any value at all

NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)")
DATE = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
CLOCK = r"[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})"
MOMENT = re.compile(f"{DATE}({CLOCK})?")

near_numbers = st.text(alphabet="0123456789.+-eENaInf _x,", min_size=1, max_size=12)
near_moments = st.from_regex(
    r"(20[0-9]{2}|.{4})-(0[1-9]|..)-(1[0-9]|..)(T10:(00|..):0.(\..*)?.*)?[x|]?", fullmatch=True
).filter(lambda value: "\0" not in value)
anything = st.text(
    alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"]),
    min_size=1,
    max_size=20,
)


def is_number(value: str) -> bool:
    return NUMBER.fullmatch(value) is not None


def may_be_moment(value: str) -> bool:
    """By its shape; whether there is such a day is PostgreSQL's to say."""
    return MOMENT.fullmatch(value) is not None


@pytest.mark.timeout(300)
@pytest.mark.both_postgres
def test_any_value_is_applied_by_the_rules_or_its_column_is_named(given: Given, pg_version):
    """The statement and the screening agree on every text, and both with the rules in Python."""

    @settings(
        max_examples=100 if pg_version == 18 else 30,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @over(
        numbers=st.lists(near_numbers | anything, max_size=10),
        moments=st.lists(near_moments | anything, max_size=10),
        batch=st.sampled_from([1, 1000]),
    )
    @example(
        numbers=["1_000", "+5", "-.5", "5.", "٣", "1\n"],
        moments=["2026-01-12\n", "2026-01-12", "2026-01-12x2026-01-13"],
        batch=1,
    )
    @example(
        numbers=[],
        moments=[
            "20-6-01-12T10:00:00Z",
            "2026-01-12T10:00:00.1Z3Z",
            "allballs",
            "2026-01-12|",
            "x",
        ],
        batch=1,
    )
    def agree(numbers, moments, batch) -> None:
        given.execute("TRUNCATE upvest.orders")
        first = given.scalar("SELECT coalesce(max(next_offset), 0) FROM pipeline.consumer_offsets")
        events = [order_event("NEW", at=0, order=f"n{i}", fee=n) for i, n in enumerate(numbers)]
        events += [
            order_event("NEW", at=0, order=f"m{i}", updated_at=m) for i, m in enumerate(moments)
        ]
        events += [
            order_event("NEW", at=0, order=f"d{i}", expiry_date=m) for i, m in enumerate(moments)
        ]
        offsets = given.log.append(events)
        given.execute(
            "UPDATE pipeline.projection_checkpoints SET next_offset = :first", first=first
        )

        rows = given.project(orders, limits=Limits(batch_offsets_max=batch))

        wrong = {offset: (column, sqlstate) for _, offset, column, sqlstate in found(given)}
        assert "22000" not in {sqlstate for _, sqlstate in wrong.values()}
        applied = {row._offset for row in rows}
        assert applied | set(wrong) == set(offsets)
        assert not applied & set(wrong)
        for offset, value in zip(offsets, [*numbers, *moments, *moments], strict=True):
            if offset - offsets[0] < len(numbers):
                assert (offset in applied) == is_number(value), value
            elif offset in applied:
                assert may_be_moment(value), value
            elif may_be_moment(value):
                assert not exists(value), value

    agree()


def test_the_quick_check_of_times_accepts_nothing_that_the_rule_rejects(given: Given):
    """The quick look at a row's moments lets nothing through that the rule would not."""
    usual = "2026-01-12T10:00:00.12Z"
    misspelt = {usual}
    for _ in range(2):
        misspelt |= {
            spelt[:at] + instead + spelt[at + skipped :]
            for spelt in [usual, "2026-01-12T10:00:00Z", "2026-01-12", *sorted(misspelt)[::40]]
            for at in range(len(spelt) + 1)
            for skipped in (0, 1, 2)
            for instead in ["", *"-T:.Z+ 5", "Z5", ".5Z", "5Z5", "-05", ":5"]
        }

    taken = given.query(
        "SELECT value FROM unnest(CAST(:misspelt AS text[])) AS value "
        "WHERE (value LIKE :usual || 'Z' OR value LIKE :usual || '.%' OR value LIKE :usual_date) "
        "AND value || 'x' ~ :digits",
        misspelt=sorted(misspelt),
        usual=USUAL,
        usual_date=USUAL_DATE,
        digits=USUAL_DIGITS,
    )

    assert len(misspelt) > 40_000
    assert len(taken) > 10
    assert [value for (value,) in taken if not may_be_moment(value)] == []


def exists(moment: str) -> bool:
    """Whether there surely is such a moment."""
    try:
        date.fromisoformat(moment[:10])
        return len(moment) == 10 or bool(datetime.fromisoformat(moment.upper()))
    except ValueError:
        return False


# ------------------------------------------------------------------------------------- other kinds


def test_a_custom_projector_rejects_only_the_wrong_event(given: Given):
    def count_letters(db, batch) -> None:
        db.execute(
            text(
                f"INSERT INTO {batch.table} AS l (letter, seen) "
                f"SELECT letter, sum(seen) FROM {batch.rows} AS r "
                "GROUP BY letter ORDER BY letter ON CONFLICT (letter) "
                "DO UPDATE SET seen = l.seen + excluded.seen"
            ),
            batch.parameters,
        )

    counted = Custom(
        table="letters",
        comment="Letters.",
        events="LETTER.*",
        key=[text_field("letter", "Letter.")],
        fields=[integer("seen", "How often it was seen.")],
        reads=[text_field("letter", "Letter."), integer("seen", "How often.")],
        apply=count_letters,
    )
    events = [
        event("LETTER.SEEN", {"letter": letter, "seen": 1 if letter != "q" else "many"})
        for letter in string.ascii_lowercase + "aab"
    ]
    create_tables(given.engine, counted)

    rows = given(events).project(counted, orders)

    assert {row.letter: row.seen for row in rows if row.seen > 1} == {"a": 3, "b": 2}
    assert "q" not in {row.letter for row in rows}
    assert found(given) == [("letters", 16, "seen", "22P02")]
    assert rebuild(given.engine, counted).differing == 0


@pytest.mark.both_postgres
@ALONE_AND_TOGETHER
def test_an_event_table_keeps_the_first_copy_and_an_event_without_id_is_named(given: Given, batch):
    refused = EventTable(
        table="refusals",
        comment="Refusals.",
        events="REFUSAL.SENT",
        fields=[text_field("reason", "Why.")],
    )
    first = event("REFUSAL.SENT", {"reason": "first"}, name="same")
    create_tables(given.engine, refused)
    given([{**first, "object": {"reason": "later copy"}}], partition=1)
    given.project(refused)
    without_object = {"id": some_id("x"), "type": "REFUSAL.SENT", "created_at": "2026-01-12"}
    given([first, {**first, "id": "not a uuid"}, without_object], partition=0)

    rows = given.project(refused, limits=Limits(batch_offsets_max=batch))

    assert [(row.reason, row._partition) for row in rows] == [("first", 0)]
    named = [(offset, sqlstate) for _, offset, _, sqlstate in found(given)]
    assert named == [(1, "23502"), (2, "22023")]
    assert rebuild(given.engine, refused).differing == 0


@pytest.mark.both_postgres
def test_children_are_one_row_per_element_and_values_may_be_nested(given: Given):
    clubs = EntityTable(
        table="clubs",
        comment="Clubs.",
        events="CLUB.*",
        key=uuid("club_id", "Id.", path="id"),
        fields=[integer("size", "Members.", path="facts.deep.size")],
        only_with=["size"],
        children=[
            Children(
                table="club_members",
                comment="Members.",
                path="facts.members",
                fields=[
                    uuid("member_id", "Member.", path="who.id"),
                    text_field("name", "Name.", path="who.name", personal=False),
                ],
            )
        ],
    )

    def club(members, size="1", facts=None):
        default = {"deep": {"size": size}, "members": members}
        return event("CLUB.SENT", {"id": some_id("club"), "facts": facts or default})

    def member(name, who="one"):
        return {"who": {"id": some_id(who), "name": name}}

    create_tables(given.engine, clubs)
    given(
        [
            club([member("first"), member("the same again"), member("x", "two")]),
            club([{"who": "nobody"}]),
            club([{"who": {"id": "no id"}}]),
            club([], size="5.0"),
            club([], size=""),
            club([], facts="none, so no size either"),
        ]
    )

    rows = given.project(clubs)

    assert [row.size for row in rows] == [1]
    members = given.rows("club_members")
    assert [(row.position, row.name) for row in members] == [
        (1, "first"),
        (2, "the same again"),
        (3, "x"),
    ]
    assert {row._event_type for row in members} == {"CLUB.SENT"}
    assert found(given) == [
        ("clubs", 1, "who", "22023"),
        ("clubs", 2, "member_id", "22P02"),
        ("clubs", 3, "size", "22P02"),
    ]
    given([club([member("alone")], size="+7")]).project(clubs)
    assert [row.name for row in given.rows("club_members")] == ["alone"]
    assert rebuild(given.engine, clubs).differing == 0
