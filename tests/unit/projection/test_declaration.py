"""What a projector may declare, and what its declaration comes to."""

import pytest
from sqlalchemy import Column, Text

from pipeline.db import metadata
from pipeline.errors import ConfigurationError
from pipeline.projectors import discover
from pipeline.projectors.executions import executions
from pipeline.projectors.orders import orders
from pipeline.readmodel import (
    Children,
    Custom,
    Snapshot,
    Source,
    date,
    enum,
    event_time,
    money,
    read_model_table,
    text,
    time,
    uuid,
)
from pipeline.readmodel.compiler import compile_declared
from pipeline.readmodel.fingerprint import fingerprint
from tests.given import forgotten_afterwards


def snapshot(**changes):
    """A small projector; its table is to be forgotten by whoever calls."""
    declared = {
        "table": "kites",
        "comment": "Kites.",
        "events": "KITE.*",
        "key": uuid("kite_id", "id", "Id."),
        "newest_by": "changed_at",
        "fields": [
            time("changed_at", "updated_at", "When it changed."),
            enum("status", "status", "State.", steps=("UP",), ends={"LOST"}),
            money("price", "price.amount", "Price."),
        ],
    }
    return Snapshot(**{**declared, **changes})


def prints(**changes) -> str:
    made = snapshot(**changes)
    with forgotten_afterwards(made):
        return fingerprint(made)


@pytest.mark.parametrize(
    ("steps", "ends", "ranks", "unknown"),
    [
        (("NEW", "OPEN"), {"DONE", "LOST"}, {"NEW": 1, "OPEN": 2, "DONE": 4, "LOST": 4}, 3),
        (("FILLED",), ("SETTLED", "CANCELLED"), {"FILLED": 1, "SETTLED": 3, "CANCELLED": 4}, 2),
        (({"ON", "OFF"}, "LAST"), ("GONE",), {"ON": 1, "OFF": 1, "LAST": 2, "GONE": 4}, 3),
        (("A", {"B", "C"}), (), {"A": 1, "B": 2, "C": 2}, 3),
        ((), {"X"}, {"X": 2}, 1),
    ],
)  # fmt: skip
def test_a_tuple_is_an_order_and_a_set_stands_side_by_side(steps, ends, ranks, unknown):
    """What is unknown stands behind all steps and before all ends."""
    status = enum("status", "status", "State.", steps=steps, ends=ends)

    assert dict(status.ranks) == ranks
    assert status.unknown_rank == unknown


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: text("", "path", "Comment."), "not a name"),
        (lambda: text("Upper", "path", "Comment."), "not a name"),
        (lambda: text("a", "a..b", "Comment."), "not a path"),
        (lambda: text("a", "a'b", "Comment."), "not a path"),
        (lambda: text("a", "a", ""), "no comment"),
        (lambda: Source("ORDER"), "neither a type"),
        (lambda: Source("ORDER.'x"), "neither a type"),
        (lambda: snapshot(except_types=["%"]), "neither a type"),
        (lambda: snapshot(newest_by="nowhere"), "not a column"),
        (lambda: snapshot(newest_by="price"), "not a time"),
        (
            lambda: snapshot(
                newest_by=None, fields=[enum(n, n, "State.", steps=("A",)) for n in ("x", "y")]
            ),
            "two columns have steps and ends: x, y",
        ),
    ],
    ids=range(11),
)
def test_what_makes_no_sense_is_refused_at_once(wrong, why):
    with pytest.raises(ValueError, match=why):
        wrong()


def test_a_category_is_not_another_one_that_begins_alike():
    types = ["ORDER.NEW", "ORDER_CANCELLATION.REJECTED", "ORDER", "EXECUTION.FILLED"]
    assert [name for name in types if orders.takes(name)] == ["ORDER.NEW"]
    assert [name for name in types if executions.takes(name)] == ["ORDER.NEW", "EXECUTION.FILLED"]
    assert Source("POSITION.UPDATED").takes("POSITION.UPDATED")
    assert not Source("POSITION.UPDATED").takes("POSITION.UPDATED.TWICE")


def test_the_same_definition_has_the_same_fingerprint():
    assert prints() == prints()
    assert prints(comment="Said better.") == prints()


@pytest.mark.parametrize(
    "changes",
    [
        {"events": "KITE.UPDATED"},
        {"except_types": ["KITE.TORN"]},
        {"newest_by": None},
        {"fields": [time("changed_at", "changed", "When it changed.")]},
        {"fields": [date("changed_at", "updated_at", "Another type.")], "newest_by": None},
        {"fields": [money("price", "updated_at", "Another shape.")], "newest_by": None},
        {"unless_unset": ["price"]},
        {"sources": [Source("KITE.*", each="kites")]},
        {"sources": [Source("KITE.*", each="kites", inherit={"price": "id"})]},
        {"key": [uuid("kite_id", "id", "Id."), text("colour", "colour", "Colour.")]},
        {"children": [Children("tails", "Tails.", "tails", [text("colour", "colour", "Colour.")])]},
    ],
    ids=range(11),
)
def test_another_definition_has_another_fingerprint(changes):
    assert prints(**changes) != prints()


def test_a_compiler_that_says_the_same_otherwise_changes_no_fingerprint(monkeypatch):
    """Else every installation would have to rebuild; what means something else is counted."""
    before = prints()

    monkeypatch.setattr("pipeline.readmodel.compiler.USUAL", "____")
    assert prints() == before

    monkeypatch.setattr("pipeline.readmodel.fingerprint.MEANING", 0)
    assert prints() != before


def test_a_custom_projector_counts_its_versions():
    table = read_model_table("totals", comment="Totals.")
    made = [
        Custom(tables=[table], events="X.*", apply=lambda _db, _batch: None, version=number)
        for number in (1, 2)
    ]
    metadata.remove(table)

    assert fingerprint(made[0]) != fingerprint(made[1])


def test_a_name_or_value_cannot_leave_its_quotes():
    made = snapshot(fields=[enum("status", "status", "State.", steps=("O'NEILL",))], newest_by=None)
    with forgotten_afterwards(made):
        (statement,) = compile_declared(made, 'sch"ema').statements

    assert "WHEN 'O''NEILL' THEN" in statement
    assert '"sch""ema"."kites"' in statement


def test_what_stands_in_the_envelope_is_read_from_the_log_itself():
    made = snapshot(fields=[event_time("as_of", "When.")], newest_by=None)
    with forgotten_afterwards(made):
        (statement,) = compile_declared(made, "upvest").statements

    assert 'e."created_at" AS "as_of"' in statement


def test_every_projector_is_found_once_and_in_order():
    names = [one.name for one in discover()]

    assert names == sorted(set(names))
    assert {"orders", "executions"} <= set(names)


def test_two_projectors_of_one_name_are_refused(monkeypatch):
    import pipeline.projectors.orders as module

    twin = Custom(
        tables=[read_model_table("twin", comment="Twin.")],
        events="X.*",
        apply=lambda _db, _batch: None,
    )
    twin.name = "orders"
    monkeypatch.setattr(module, "twin", twin, raising=False)

    with forgotten_afterwards(twin), pytest.raises(ConfigurationError, match="called orders"):
        discover.__wrapped__()


@pytest.mark.parametrize("projector", discover(), ids=lambda one: one.name)
def test_every_table_and_column_has_a_comment_and_its_projectors_name(projector):
    for table in projector.tables:
        assert table.comment
        assert table.info["projector"] == projector.name
        assert table.primary_key.columns
        assert [column.name for column in table.columns if not column.comment] == []


def test_text_columns_are_as_wide_as_they_need():
    """No length: an enum grows, and Upvest says nothing binding on any other text."""
    for projector in discover():
        for table in projector.tables:
            for column in table.columns:
                assert not isinstance(column.type, Text) or column.type.length is None


# -------------------------------------------------------------------------------- personal data


@pytest.mark.parametrize(
    ("column", "path"),
    [
        *(("name", "label"), ("last_name", "x"), ("iban", "x"), ("tax_id", "x"), ("tin", "x")),
        *(("birth_date", "x"), ("born", "person.birthday"), ("email", "x"), ("phone_number", "x")),
        *(("sender", "counterparty.account.identification.iban"), ("address_line1", "x")),
        *(("where_to", "address.postcode"), ("depot_account_number", "x"), ("church_tax", "x")),
    ],
)
def test_a_column_that_looks_personal_must_say_whether_it_is(column, path):
    with pytest.raises(ValueError, match=f"column {column} looks as if .* personal=True"):
        text(column, path, "A comment.")

    assert text(column, path, "A comment.", personal=True).remark == "A comment. Personal data."
    assert text(column, path, "A comment.", personal=False).remark == "A comment."


@pytest.mark.parametrize(
    "column", ["order_id", "username_taken", "taxonomy", "cityscape", "status"]
)
def test_other_columns_need_say_nothing(column):
    assert text(column, column, "A comment.").remark == "A comment."


def test_a_column_of_a_custom_table_that_looks_personal_must_say_so_too():
    with pytest.raises(ValueError, match="column iban looks"):
        read_model_table("made_up", Column("iban", Text, comment="IBAN."), comment="x")

    table = read_model_table(
        "made_up", Column("iban", Text, comment="IBAN.", info={"personal": True}), comment="x"
    )
    metadata.remove(table)
    assert table.columns["iban"].comment == "IBAN. Personal data."


def test_what_is_said_of_persons_changes_no_fingerprint():
    """Else every installation would have to rebuild for a change of rights."""
    changed_at = time("changed_at", "updated_at", "When it changed.")
    found = set()
    for personal in (True, False):
        one = snapshot(fields=[changed_at, text("name", "name", "Name.", personal=personal)])
        with forgotten_afterwards(one):
            found.add(fingerprint(one))

    assert len(found) == 1
