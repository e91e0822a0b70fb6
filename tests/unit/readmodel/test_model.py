"""What a read model may declare, and what its declaration comes to."""

from typing import Any

import pytest
from sqlalchemy import Text

from pipeline import catalogue
from pipeline.errors import ConfigurationError
from pipeline.projectors.executions import executions
from pipeline.projectors.orders import orders
from pipeline.readmodel import (
    Children,
    Custom,
    EntityTable,
    LedgerTable,
    Lifecycle,
    Source,
    date,
    enum,
    event_time,
    money,
    status,
    text,
    time,
    uuid,
)
from pipeline.readmodel.compiler import compile_declared
from pipeline.readmodel.event_pattern import EventPattern
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.readmodel.upvest import key_of

KITES: dict[str, Any] = {
    "table": "kites",
    "comment": "Kites.",
    "events": "KITE.*",
    "key": uuid("kite_id", "Id.", path="id"),
    "newest_by": "changed_at",
    "fields": [
        time("changed_at", "When it changed.", path="updated_at"),
        status(Lifecycle("UP", ends={"LOST"}), "State."),
        money("price", "Price.", path="price.amount"),
    ],
}


def kites(**changes):
    """A small read model."""
    return EntityTable(**{**KITES, **changes})


def tails(**changes):
    """A small child table."""
    declared = {"table": "tails", "comment": "Tails.", "path": "tails"}
    return Children(**{**declared, "fields": [text("colour", "Colour.")], **changes})


@pytest.mark.parametrize(
    ("lifecycle", "ranks", "unknown"),
    [
        (
            Lifecycle("NEW", "OPEN", ends={"DONE", "LOST"}),
            {"NEW": 1, "OPEN": 2, "DONE": 4, "LOST": 4},
            3,
        ),
        (
            Lifecycle("FILLED", ends=("SETTLED", "CANCELLED")),
            {"FILLED": 1, "SETTLED": 3, "CANCELLED": 4},
            2,
        ),
        (
            Lifecycle({"ON", "OFF"}, "LAST", ends=("GONE",)),
            {"ON": 1, "OFF": 1, "LAST": 2, "GONE": 4},
            3,
        ),
        (Lifecycle("A", {"B", "C"}), {"A": 1, "B": 2, "C": 2}, 3),
        (Lifecycle(ends={"X"}), {"X": 2}, 1),
    ],
    ids=str,
)
def test_an_unknown_state_ranks_after_all_steps_and_before_all_ends(lifecycle, ranks, unknown):
    assert dict(lifecycle.ranks) == ranks
    assert lifecycle.unknown_rank == unknown


def test_the_comment_of_a_status_lists_its_states():
    lifecycle = Lifecycle("NEW", "OPEN", ends={"DONE", "LOST"})

    assert status(lifecycle, "As of now.").comment == "NEW, OPEN, DONE or LOST. As of now."


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        ("ORDER.*", ["ORDER.NEW", "ORDER.FILLED"]),
        ("*.NEW", ["ORDER.NEW", "TRANSFER.NEW"]),
        ("ORDER.NEW", ["ORDER.NEW"]),
        (
            "*",
            ["ORDER.NEW", "ORDER.FILLED", "TRANSFER.NEW", "ORDER_CANCELLATION.REJECTED", "ORDER"],
        ),
    ],
)
def test_a_pattern_matches_whole_categories_and_actions(pattern, matching):
    types = ["ORDER.NEW", "ORDER.FILLED", "TRANSFER.NEW", "ORDER_CANCELLATION.REJECTED", "ORDER"]

    assert [name for name in types if EventPattern(pattern).matches(name)] == matching


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: text("", "Comment.", path="path"), "not a name"),
        (lambda: text("Upper", "Comment.", path="path"), "not a name"),
        (lambda: text("a", "Comment.", path="a..b"), "not a path"),
        (lambda: text("a", "Comment.", path="a'b"), "not a path"),
        (lambda: text("a", ""), "no comment"),
        (lambda: Source("ORDER"), "not an event type"),
        (lambda: Source("ORDER.'x"), "not an event type"),
        (lambda: kites(except_events=["%"]), "not an event type"),
        (lambda: kites(newest_by="nowhere"), "not a column"),
        (lambda: kites(newest_by="price"), "not a time"),
        (
            lambda: kites(newest_by=None, fields=[status(Lifecycle("A")), status(Lifecycle("B"))]),
            "status is declared twice",
        ),
        (lambda: kites(table="Kites"), "not a name for a table"),
        (lambda: kites(fields=[uuid("kite_id", "Id.")], newest_by=None), "declared twice"),
        (
            lambda: kites(indexes=[("price", "nowhere")]),
            "indexes names nowhere, which is not a column",
        ),
        (lambda: kites(only_with=["as_of"], fields=[event_time("as_of", "When.")]), "not read"),
        (lambda: tails(table="a b"), "not a name for a table"),
        (lambda: Lifecycle("A", "A"), "each once"),
        (lambda: Lifecycle(), "needs states"),
        (lambda: Lifecycle("new"), "not a state"),
        (
            lambda: LedgerTable(**{**KITES, "entry_type": enum("kind", "Kind.")}),
            "an entry of a ledger has no lifecycle",
        ),
    ],
    ids=range(20),
)
def test_a_contradictory_declaration_is_refused_at_once(wrong, why):
    with pytest.raises(ValueError, match=why):
        wrong()


def test_types_and_whole_categories_can_be_left_out():
    model = kites(events="*", except_events=["KITE.TORN", "KITE_CHECK.*"])

    types = ["KITE.UP", "KITE.TORN", "KITE_CHECK.PASSED", "ORDER.NEW"]
    assert [name for name in types if model.takes(name)] == ["KITE.UP", "ORDER.NEW"]
    assert model.condition() == (
        "(e.event_type IS NOT NULL) "
        "AND NOT (e.event_type = 'KITE.TORN' OR starts_with(e.event_type, 'KITE_CHECK.'))"
    )


def test_a_category_does_not_match_another_with_the_same_prefix():
    types = ["ORDER.NEW", "ORDER_CANCELLATION.REJECTED", "ORDER", "EXECUTION.FILLED"]
    assert [name for name in types if orders.takes(name)] == ["ORDER.NEW"]
    assert [name for name in types if executions.takes(name)] == ["ORDER.NEW", "EXECUTION.FILLED"]


def test_constructing_a_declaration_changes_nothing_elsewhere():
    before = [model.name for model in catalogue.load().models]

    twins = [kites(), kites()]

    assert [model.name for model in catalogue.load().models] == before
    assert twins[0].tables[0].metadata is not twins[1].tables[0].metadata


def test_the_key_of_a_ledger_is_the_entrys_id_and_its_type():
    entries = LedgerTable(
        table="entries",
        comment="Entries.",
        events="ENTRY.*",
        key=uuid("entry_id", "Id.", path="id"),
        entry_type=enum("entry_type", "Type.", path="type"),
        fields=[],
    )

    assert entries.tables[0].primary_key.columns.keys() == ["entry_id", "entry_type"]


def test_every_row_has_the_coordinates_of_its_event_and_an_index_on_its_time():
    parent, child = kites(children=[tails()]).tables

    assert {"_event_id", "_event_type", "_ingested_at", "_offset"} <= set(parent.columns.keys())
    assert child.primary_key.columns.keys() == ["kite_id", "position"]
    assert {"_event_type", "_ingested_at"} <= set(child.columns.keys())


def test_the_same_definition_has_the_same_fingerprint():
    assert fingerprint(kites()) == fingerprint(kites())
    assert fingerprint(kites(comment="Said better.")) == fingerprint(kites())


@pytest.mark.parametrize(
    "changes",
    [
        {"events": "KITE.UPDATED"},
        {"except_events": ["KITE.TORN"]},
        {"newest_by": None},
        {"fields": [time("changed_at", "When it changed.", path="changed")]},
        {"fields": [date("changed_at", "Another type.", path="updated_at")], "newest_by": None},
        {"fields": [money("price", "Another shape.", path="updated_at")], "newest_by": None},
        {"only_with": ["price"]},
        {"sources": [Source("KITE.*", each="kites")]},
        {"sources": [Source("KITE.*", each="kites", inherit={"price": "id"})]},
        {"key": [uuid("kite_id", "Id.", path="id"), text("colour", "Colour.")]},
        {"children": [tails()]},
        {"fields": [status(Lifecycle("UP", "LOST"), "Another order.")], "newest_by": None},
    ],
    ids=range(12),
)
def test_another_definition_has_another_fingerprint(changes):
    assert fingerprint(kites(**changes)) != fingerprint(kites())


def test_equivalent_sql_of_the_compiler_changes_no_fingerprint(monkeypatch):
    """Else every installation would have to rebuild; what means something else is counted."""
    before = fingerprint(kites())

    monkeypatch.setattr("pipeline.readmodel.checking.USUAL", "____")
    assert fingerprint(kites()) == before

    monkeypatch.setattr("pipeline.readmodel.fingerprint.MEANING", 0)
    assert fingerprint(kites()) != before


def custom(**changes):
    """A small read model with SQL of its own."""
    declared = {
        "table": "totals",
        "comment": "Totals.",
        "events": "X.*",
        "key": [text("colour", "Colour.")],
        "reads": [text("colour", "Colour.")],
        "apply": lambda _db, _batch: None,
    }
    return Custom(**{**declared, **changes})


@pytest.mark.parametrize(
    "changes", [{"version": 2}, {"reads": [text("colour", "Colour.", path="hue")]}]
)
def test_a_custom_projector_has_another_fingerprint_for_another_version_or_input(changes):
    assert fingerprint(custom()) == fingerprint(custom()) != fingerprint(custom(**changes))


def test_a_name_or_value_cannot_leave_its_quotes():
    made = kites(fields=[text("isin", "ISIN.", only_if=("kind", "O'NEILL"))], newest_by=None)

    (statement,) = compile_declared(made, 'sch"ema').statements

    assert "= 'O''NEILL' THEN" in statement
    assert '"sch""ema"."kites"' in statement


def test_every_projector_is_found_once_and_in_order():
    names = [projector.name for projector in catalogue.load().models]

    assert names == sorted(set(names))
    assert {"orders", "executions"} <= set(names)


def test_two_projectors_of_one_name_are_refused(monkeypatch):
    import pipeline.projectors.orders as module

    monkeypatch.setattr(module, "twin", custom(table="orders"), raising=False)

    with pytest.raises(ConfigurationError, match="called orders"):
        catalogue.load.__wrapped__()


def declared_fields():
    """Every field of every read model, children included, with its table."""
    for model in catalogue.load().models:
        yield from ((model.table, field) for field in getattr(model, "columns", ()))
        for child in getattr(model, "child_tables", ()):
            yield from ((child.table, field) for field in child.fields)


def test_every_reference_names_a_read_model_that_has_the_key():
    """``refers_to("accounts", …)`` is an id in the primary key of ``accounts``."""
    made = catalogue.load().tables
    wrong = []
    for table, field in declared_fields():
        if field.refers_to:
            target = made.get(field.refers_to)
            key = [] if target is None else target.primary_key.columns.keys()
            if key_of(field.refers_to) not in key or not field.indexed:
                wrong.append(f"{table}.{field.column} -> {field.refers_to}")

    assert wrong == []


def test_the_comment_of_every_status_begins_with_its_states():
    for table, field in declared_fields():
        if field.lifecycle:
            assert field.comment.startswith(f"{field.lifecycle}."), f"{table}.{field.column}"


@pytest.mark.parametrize("projector", catalogue.load().models, ids=lambda projector: projector.name)
def test_every_table_and_column_has_a_comment_and_its_projectors_name(projector):
    for table in projector.tables:
        assert table.comment
        assert table.info["projector"] == projector.name
        assert table.primary_key.columns
        assert [column.name for column in table.columns if not column.comment] == []


def test_text_columns_are_as_wide_as_they_need():
    """No length: an enum grows, and Upvest says nothing binding on any other text."""
    for projector in catalogue.load().models:
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
        *(
            ("a", "remittance_information"),
            ("reference_account", "x"),
            ("memo", "x"),
            ("note", "x"),
        ),
        *(("where_to", "address.postcode"), ("depot_account_number", "x"), ("church_tax", "x")),
    ],
)
def test_a_column_that_looks_personal_must_say_whether_it_is(column, path):
    with pytest.raises(ValueError, match=f"column {column} looks as if .* personal=True"):
        text(column, "A comment.", path=path)

    assert (
        text(column, "A comment.", path=path, personal=True).description
        == "A comment. Personal data."
    )
    assert text(column, "A comment.", path=path, personal=False).description == "A comment."


@pytest.mark.parametrize(
    "column",
    ["order_id", "username_taken", "taxonomy", "cityscape", "status", "notebook", "denoted"],
)
def test_other_columns_need_no_declaration_of_privacy(column):
    assert text(column, "A comment.").description == "A comment."


def test_declaring_a_column_personal_changes_no_fingerprint():
    """Else every installation would have to rebuild for a change of rights."""
    changed_at = time("changed_at", "When it changed.", path="updated_at")

    found = {
        fingerprint(kites(fields=[changed_at, text("name", "Name.", personal=personal)]))
        for personal in (True, False)
    }

    assert len(found) == 1
