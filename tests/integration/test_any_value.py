"""The statements, the screening and a model in Python agree on every event, for every feature.

One read model has all features of a declaration. Whatever its events hold, each is either applied
as the model says, or rejected for a column that the model finds wrong; together with others or
alone. A ``Custom`` that reads the same columns accepts and rejects the same events.
"""

import json as json_text
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import given as over
from hypothesis import strategies as st
from sqlalchemy import text as sql

from pipeline.projection.loop import Limits
from pipeline.readmodel import (
    ELEMENT,
    Children,
    Custom,
    EntityTable,
    by_event_type,
    earliest,
    enum,
    event_category,
    integer,
    json,
    money,
    text,
    time,
    uuid,
)
from pipeline.rfc3339 import micros
from tests.given import Given, create_tables, event, moment, some_id

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

KEY = [
    by_event_type("kind", "Kind.", {"ZOO.*": "ZOO", "CIRCUS.*": "CIRCUS"}),
    uuid("animal_id", "Animal.", path=["animal", "id"]),
]
COLUMNS = [
    earliest(time("first_seen", "First.", path="seen.at", or_event_time=True)),
    time("last_seen", "Last.", path=["seen.at", "at"], or_event_time=True),
    text("isin", "ISIN.", path="code", only_if=("code_type", "ISIN")),
    enum("mood", "Mood.", path=["mood", "state.mood"], by_event={"*.SLEPT": "ASLEEP"}),
    integer("legs", "Legs.", path=["legs", "limbs"]),
    money("price", "Price."),
]
animals = EntityTable(
    table="animals",
    comment="Animals.",
    events=["ZOO.*", "CIRCUS.*", "FARM.*"],
    except_events=["FARM.*"],
    key=KEY,
    newest_by="last_seen",
    only_with=["mood"],
    fields=[event_category(), *COLUMNS],
    children=[
        Children(
            table="animal_friends",
            comment="Friends.",
            path="friends",
            fields=[uuid("friend_id", "Friend.", path=ELEMENT)],
        ),
        Children(
            table="animal_toys",
            comment="Toys.",
            path="state.toys",
            fields=[
                integer("size", "Size.", path="size"),
                json("toy", "Toy.", path=ELEMENT),
            ],
        ),
    ],
)


def log_animals(db, batch) -> None:
    columns = ", ".join(field.column for field in COLUMNS)
    db.execute(
        sql(
            f"INSERT INTO {batch.table} (event_id, {columns}, _event_type, _ingested_at) "
            f"SELECT _event_id, {columns}, _event_type, _ingested_at FROM {batch.rows} AS r "
            "ORDER BY 1 ON CONFLICT (event_id) DO NOTHING"
        ),
        batch.parameters,
    )


animal_log = Custom(
    table="animal_log",
    comment="Animals, one row per event.",
    events=["ZOO.*", "CIRCUS.*"],
    key=[uuid("event_id", "Event.")],
    fields=COLUMNS,
    reads=COLUMNS,
    apply=log_animals,
)

# ------------------------------------------------------------------------------------------- model

UNSET = st.sampled_from([None, ""])
ODD = st.sampled_from(["x", "1,5", "NaN", "5.0", " 1", True, 1.5, {}, [], {"at": "x"}, ["x"]])
IDS = st.sampled_from([some_id("a"), some_id("b")])
TIMES = st.sampled_from(
    ["2026-01-12T09:00:00.1234567Z", "2026-01-12", "2026-01-13T24:00:00+01:00", "2026-01-12T10:00Z"]
)
NUMBERS = st.sampled_from([4, "-2", "+7", "007", "99999999999"])
MEMBERS = {
    "animal": IDS,
    "id": IDS,
    "seen": st.builds(lambda at: {"at": at}, TIMES | UNSET | ODD),
    "at": TIMES,
    "code": st.sampled_from(["IE1", "X"]),
    "code_type": st.sampled_from(["ISIN", "WKN"]),
    "mood": st.sampled_from(["GLAD", "SAD"]),
    "state": st.fixed_dictionaries(
        {},
        optional={
            "mood": st.sampled_from(["CALM", "", None]),
            "toys": st.lists(
                st.builds(lambda size: {"size": size}, NUMBERS | UNSET) | st.just("ball"),
                max_size=2,
            ),
        },
    ),
    "legs": NUMBERS,
    "limbs": NUMBERS,
    "price": st.sampled_from(["1.50", "-.5", "5.", 7]),
    "friends": st.lists(IDS, max_size=3) | st.lists(IDS | UNSET | st.just("nobody"), max_size=3),
}
# Most members are right, or hardly any event would be applied.
OBJECTS = st.fixed_dictionaries(
    {},
    optional={
        name: st.one_of(values, values, values, values, values, UNSET, ODD)
        for name, values in MEMBERS.items()
    },
)
TYPES = st.sampled_from(["ZOO.SEEN", "ZOO.SLEPT", "CIRCUS.SEEN", "FARM.SEEN"])


class Read(NamedTuple):
    """What the model finds in an event: values by column, and the columns that are wrong."""

    values: Mapping[str, Any]
    wrong: frozenset[str]


def as_text(value: Any) -> str | None:
    """How PostgreSQL writes a member of JSON as text; None where it is unset."""
    if value in (None, ""):
        return None
    return value if isinstance(value, str) else json_text.dumps(value)


def member(body: Any, path: str) -> Any:
    for name in path.split("."):
        body = body.get(name) if isinstance(body, dict) else None
    return body


def first_set(body: Any, *paths: str) -> str | None:
    return next((found for path in paths if (found := as_text(member(body, path)))), None)


def integer_of(value: str | None) -> int | None:
    """None of an unset value; raises for what is no integer of PostgreSQL's."""
    if value is None:
        return None
    if not re.fullmatch("[+-]?[0-9]+", value) or abs(int(value)) >= 2**31:
        raise ValueError
    return int(value)


def time_of(value: str | None) -> datetime | None:
    if value is None:
        return None
    found = micros(value)
    if found is None:
        raise ValueError
    return EPOCH + timedelta(microseconds=found)


def read(kind: str, body: dict[str, Any], sent_at: datetime) -> Read:
    """The columns of one event."""
    values: dict[str, Any] = {}
    wrong = set()

    def take(column: str, convert: Any, *paths: str) -> None:
        try:
            values[column] = convert(first_set(body, *paths))
        except ValueError:
            wrong.add(column)

    take("animal_id", lambda value: value and UUID(value), "animal", "id")
    if "animal_id" in values and values["animal_id"] is None:
        wrong.add("animal_id")
    take("first_seen", lambda value: time_of(value) or sent_at, "seen.at")
    take("last_seen", lambda value: time_of(value) or sent_at, "seen.at", "at")
    take("isin", lambda value: value if body.get("code_type") == "ISIN" else None, "code")
    take("mood", lambda value: value, "mood", "state.mood")
    take("legs", integer_of, "legs", "limbs")
    price = as_text(body.get("price"))
    if price and not re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)", price):
        wrong.add("price")
    for name in ("seen", "state"):
        if as_text(body.get(name)) and not isinstance(body[name], dict):
            wrong.add(name)
    if kind.endswith(".SLEPT"):
        values["mood"] = values.get("mood") or "ASLEEP"
    return Read(values, frozenset(wrong))


def wrong_children(body: dict[str, Any]) -> set[str]:
    wrong = set()
    for name, path in (("friends", "friends"), ("state.toys", "state.toys")):
        listed = member(body, path)
        if as_text(listed) and not isinstance(listed, list):
            wrong.add(name)
    friends, toys = member(body, "friends"), member(body, "state.toys")
    for friend in friends if isinstance(friends, list) else []:
        try:
            UUID(as_text(friend) or some_id("unset"))
        except ValueError:
            wrong.add("friend_id")
    for toy in toys if isinstance(toys, list) else []:
        if not isinstance(toy, dict):
            wrong.add("object")
        else:
            try:
                integer_of(as_text(toy.get("size")))
            except ValueError:
                wrong.add("size")
    return wrong


def newest(found: Sequence[tuple[int, str, Read, datetime]]) -> list[tuple[Any, ...]]:
    """Rows of ``animals``, as the model has them."""
    rows: dict[Any, list[tuple[Any, ...]]] = {}
    for offset, kind, event_read, sent_at in found:
        values = event_read.values
        key = kind.partition(".")[0], values["animal_id"]
        rows.setdefault(key, []).append((values["last_seen"], sent_at, offset, values))
    return [
        (
            *key,
            min(values["first_seen"] for *_, values in versions),
            *(max(versions, key=lambda row: row[:3])[3][name] for name in SHOWN),
        )
        for key, versions in rows.items()
    ]


SHOWN = ["last_seen", "isin", "mood", "legs"]
ROWS = f"SELECT kind, animal_id, first_seen, {', '.join(SHOWN)} FROM upvest.animals"
LETTERS = """
    SELECT "offset", column_name FROM pipeline.dead_letters
    WHERE projector = :projector AND "offset" >= :first
"""


@pytest.mark.faults
@pytest.mark.timeout(400)
@pytest.mark.both_postgres
def test_each_event_is_applied_by_the_rules_or_rejected_for_a_wrong_column(
    given: Given, pg_version
):
    create_tables(given.engine, animals, animal_log)

    @settings(
        max_examples=40 if pg_version == 18 else 10,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @over(
        sent=st.lists(st.tuples(TYPES, OBJECTS), min_size=1, max_size=25),
        batch=st.sampled_from([1, 1000]),
    )
    def agree(sent, batch) -> None:
        # Alone, each event takes a pass of its own.
        sent = sent[:5] if batch == 1 else sent
        given.execute("TRUNCATE upvest.animals, upvest.animal_friends, upvest.animal_toys")
        given.execute("TRUNCATE upvest.animal_log")
        offsets = given.log.append(
            event(kind, body, at=number) for number, (kind, body) in enumerate(sent)
        )
        given.execute(
            "UPDATE pipeline.projection_checkpoints SET next_offset = :first", first=offsets[0]
        )

        given.project(animals, animal_log, limits=Limits(batch_offsets_max=batch))

        applied, rejected, refused_by_custom = [], {}, {}
        for number, (offset, (kind, body)) in enumerate(zip(offsets, sent, strict=True)):
            sent_at = datetime.fromisoformat(moment(number))
            found = read(kind, body, sent_at)
            if kind.startswith("FARM."):
                continue
            if wrong := found.wrong - {"animal_id"}:
                refused_by_custom[offset] = wrong
            if found.values.get("mood") is None:
                continue
            if wrong := found.wrong | wrong_children(body):
                rejected[offset] = wrong
            else:
                applied.append((offset, kind, found, sent_at))
        assert named(given, "animals", offsets[0], rejected) == []
        assert named(given, "animal_log", offsets[0], refused_by_custom) == []
        assert sorted(map(tuple, given.query(ROWS)), key=repr) == sorted(newest(applied), key=repr)

    agree()


def named(given: Given, projector: str, first: int, expected: Mapping[Any, Any]) -> list[Any]:
    """Where the dead letters are not those expected."""
    letters = dict(tuple(row) for row in given.query(LETTERS, projector=projector, first=first))
    return [
        (offset, letters.get(offset), expected.get(offset))
        for offset in sorted({*letters, *expected})
        if letters.get(offset) not in expected.get(offset, ())
    ]
