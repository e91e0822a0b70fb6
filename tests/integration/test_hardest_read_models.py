"""The hardest read models that are planned, filled: the API can express them.

Each gets real events through the real projection loop, in every order, with wrong values among
them, and is rebuilt.
"""

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import pytest

from pipeline.projection.loop import Limits
from pipeline.projectors.instruments import instrument_isins
from pipeline.readmodel import Projector
from pipeline.rebuild.rebuild import rebuild
from tests.given import Event, Given, contents, create_tables, event, moment, some_id
from tests.planned_read_models import (
    PLANNED,
    account_valuations,
    corporate_actions,
    fee_collections,
    savings_plans,
    status_history,
    tax_exemptions,
    tax_wrappers,
)
from tests.servers import Postgres
from tests.servers.databases import Database, fresh_database, templates

pytestmark = [pytest.mark.both_postgres, pytest.mark.faults]

# ----------------------------------------------------------------------------------------- stories


class Story(NamedTuple):
    """What a read model is sent and what it then holds.

    Attributes:
        sent: Events that all concern the read model, in the order of their times.
        rows: Some columns of its rows, in the order of its key, whatever the order of arrival.
        children: The same of its child table, if it has one.
        wrong: Events of wrong shape, with the column that each is rejected for and its SQLSTATE.
    """

    projector: Projector
    sent: Sequence[Event]
    columns: Sequence[str]
    rows: Sequence[tuple[Any, ...]]
    child_columns: Sequence[str] = ()
    children: Sequence[tuple[Any, ...]] = ()
    wrong: Sequence[tuple[Event, str, str]] = ()


def sent(kind: str, at: float, thing: str = "thing", **body: Any) -> Event:
    """An event about ``thing`` that changed at this second and was sent three seconds later."""
    values = {"id": some_id(thing), "updated_at": moment(at), **body}
    return event(kind, values, at=at + 3, name=f"{kind} {thing} {at}")


def without(original: Event, *names: str) -> Event:
    changed = copy.deepcopy(dict(original))
    for name in names:
        del changed["object"][name]
    return changed


POSITION = {"instrument": {"uuid": some_id("iron")}, "quantity": "2.5", "weight": None}
PRICED = {**POSITION, "weight": "1", "value": {"amount": "10.10", "currency": "EUR"}}
A, B = some_id("a"), some_id("b")
OPTIONS = [{"number": 1, "type": "CASH", "rate": [1]}, {"number": "2", "movements": {}}]

STORIES = {
    "savings_plans": Story(
        savings_plans,
        [
            sent("SAVINGS_PLAN.CREATED", 1, instrument_id="X", instrument_id_type="WKN"),
            # Upvest need not move the time: the rank decides.
            sent("SAVINGS_PLAN.CANCELLED", 1, instrument_id="IE", instrument_id_type="ISIN"),
            sent("SAVINGS_PLAN.CREATED", 0, thing="second plan", interval=3),
        ],
        ["status", "isin", "instrument_id", "period_interval"],
        [("CANCELLED", "IE", "IE", None), ("ACTIVE", None, None, 3)],
        wrong=[
            (sent("SAVINGS_PLAN.CREATED", 5, interval="1.5"), "period_interval", "22P02"),
            (sent("SAVINGS_PLAN.CREATED", 6, id=None), "savings_plan_id", "23502"),
        ],
    ),
    "account_valuations": Story(
        account_valuations,
        [
            sent("ACCOUNT_VALUATION.CREATED", 1, price_quality="EOD", security_positions=[PRICED]),
            sent("INTRADAY_ACCOUNT_VALUATION.CREATED", 2, price_quality="EOD"),
            sent(
                "ACCOUNT_VALUATION.CREATED",
                3,
                total_security_value={"amount": "7.0", "currency": "EUR"},
                security_positions=[PRICED, {**POSITION, "value": None}],
            ),
        ],
        ["valuation_kind", "currency", "price_quality"],
        [("EOD", "EUR", None), ("INTRADAY", None, "EOD")],
        ["valuation_kind", "position", "value_currency"],
        [("EOD", 1, "EUR"), ("EOD", 2, None)],
        wrong=[
            (
                sent("ACCOUNT_VALUATION.CREATED", 9, security_positions=[{"value": "much"}]),
                "value",
                "22023",
            ),
            (
                sent("ACCOUNT_VALUATION.CREATED", 8, security_positions={}),
                "security_positions",
                "22023",
            ),
            (
                sent("INTRADAY_ACCOUNT_VALUATION.CREATED", 9, total_security_value={"amount": "?"}),
                "total_security_value",
                "22P02",
            ),
        ],
    ),
    "tax_wrappers": Story(
        tax_wrappers,
        [
            sent("ISA_WRAPPER.NEW", 1, status="NEW", is_flexible=True),
            sent("PEA_WRAPPER.ACTIVE", 2),
            sent("ISA_WRAPPER.INACTIVE", 3, status="INACTIVE", is_flexible=False),
            sent("ISA_WRAPPER.ACTIVE", 4, is_flexible=True),
        ],
        ["scheme", "status", "is_flexible"],
        [("ISA", "ACTIVE", True), ("PEA", "ACTIVE", None)],
        wrong=[(sent("PEA_WRAPPER.NEW", 5, is_flexible="perhaps"), "is_flexible", "22P02")],
    ),
    "fee_collections": Story(
        fee_collections,
        [
            sent("FEE_COLLECTION.CREATED", 1, status="PROCESSING", sell_to_cover_orders=[]),
            without(
                sent(
                    "FEE_COLLECTION.FINALISED",
                    3,
                    status="FINALISED",
                    calculation_breakdown={"vat": "0.19"},
                    sell_to_cover_orders=[{"id": some_id("sale"), "residual_amount": "0.10"}],
                ),
                "updated_at",
            ),
            sent("FEE_COLLECTION.CREATED", 5, status="PROCESSING", collection_amount="4"),
        ],
        ["status", "calculation_breakdown"],
        [("FINALISED", {"vat": "0.19"})],
        ["position"],
        [(1,)],
        wrong=[(sent("FEE_COLLECTION.CREATED", 9, period_start="May"), "period_start", "22007")],
    ),
    "status_history": Story(
        status_history,
        [
            sent("ORDER.NEW", 1, status="NEW"),
            sent("ORDER.CANCELLED", 2, status="CANCELLED", cancellation_reason="CLIENT"),
            sent("INSTRUMENT.ACTIVATED", 3, trading_status="ACTIVE"),
            sent("SAVINGS_PLAN.CREATED", 4),
            sent("USER_CHECK.PASSED", 5),
            sent("CORPORATE_ACTION.UPDATED", 6, announcement_status="C", function_of_message="NEW"),
            # No state, or not the entity's.
            sent("POSITION.UPDATED", 7),
            sent("ORDER_CANCELLATION.REJECTED", 8, status="REJECTED"),
            sent("TAX_EXEMPTION.UPDATE_FAILED", 9, status="NEW"),
        ],
        ["category", "status", "reason"],
        [
            ("CORPORATE_ACTION", "C", "NEW"),
            ("INSTRUMENT", "ACTIVE", None),
            ("ORDER", "CANCELLED", "CLIENT"),
            ("ORDER", "NEW", None),
            ("SAVINGS_PLAN", "ACTIVE", None),
            ("USER_CHECK", "PASSED", None),
        ],
        wrong=[(sent("TOPUP.X", 9, status="X", updated_at="soon"), "reached_at", "22007")],
    ),
    "corporate_actions": Story(
        corporate_actions,
        [
            sent("CORPORATE_ACTION.UPDATED", 1, iso_type="DVCA", options=OPTIONS[:1]),
            sent("CORPORATE_ACTION.UPDATED", 2, additional_text=["a", "b"], options=OPTIONS),
        ],
        ["iso_type", "additional_text"],
        [(None, ["a", "b"])],
        ["position", "option_number", "option_type", "option"],
        [(1, 1, "CASH", OPTIONS[0]), (2, 2, None, OPTIONS[1])],
        wrong=[
            (
                sent("CORPORATE_ACTION.UPDATED", 3, options=[{"number": "first"}]),
                "option_number",
                "22P02",
            ),
            (sent("CORPORATE_ACTION.UPDATED", 4, options=["cash"]), "object", "22023"),
        ],
    ),
    "tax_exemptions": Story(
        tax_exemptions,
        [
            sent("TAX_EXEMPTION.CREATED", 1, status="NEW", user_ids=[A]),
            sent("TAX_EXEMPTION.UPDATED", 2, status="ACTIVE", user_ids=[B, A]),
        ],
        ["status"],
        [("ACTIVE",)],
        ["position", "user_id"],
        [(1, B), (2, A)],
        wrong=[
            (sent("TAX_EXEMPTION.UPDATED", 3, user_ids=["nobody"]), "user_id", "22P02"),
            (sent("TAX_EXEMPTION.UPDATED", 4, user_ids=[{"id": A}]), "user_id", "22P02"),
        ],
    ),
    "instrument_isins": Story(
        instrument_isins,
        [
            sent("INSTRUMENT.ONBOARDED", 1, isin="IE1"),
            sent("INSTRUMENT.DATA_CHANGED", 2, isin="IE2"),
            without(sent("INSTRUMENT.DATA_CHANGED", 0, isin="IE1"), "updated_at"),
            sent("INSTRUMENT.DEACTIVATED", 4, isin=""),
        ],
        ["isin", "first_seen", "last_seen"],
        [("IE1", 1, 3), ("IE2", 2, 2)],
        wrong=[(sent("INSTRUMENT.X", 1, isin="IE1", updated_at="soon"), "first_seen", "22007")],
    ),
}

NAMES = sorted(STORIES)
LETTERS = 'SELECT column_name, sqlstate FROM pipeline.dead_letters ORDER BY "offset"'
SKIP_WHAT_IS_LOGGED = """
    UPDATE pipeline.projection_checkpoints c SET next_offset = o.next_offset
    FROM pipeline.consumer_offsets o
    WHERE (o.topic, o.partition) = (c.topic, c.partition)
"""


def shown(row: Any, columns: Sequence[str]) -> tuple[Any, ...]:
    def plain(value: Any) -> Any:
        if hasattr(value, "hour"):
            return value.hour * 3600 + value.minute * 60 + value.second
        return str(value) if hasattr(value, "hex") else value

    return tuple(plain(getattr(row, column)) for column in columns)


@pytest.fixture(scope="module")
def with_planned(_servers, _templates) -> Callable[[Postgres], Database]:
    """A migrated database of each server, with the tables of all planned read models."""

    def prepare(database: Database) -> None:
        planned = Given(database)
        create_tables(planned.engine, *PLANNED)
        planned.close()

    return templates(_servers, prepare, _templates)


@pytest.fixture
def given(postgres_server, with_planned) -> Iterator[Given]:
    with fresh_database(postgres_server, template=with_planned(postgres_server)) as database:
        made = Given(database)
        yield made
        made.close()


def content(given: Given, story: Story) -> Mapping[str, list[tuple[Any, ...]]]:
    rows = [shown(row, story.columns) for row in given.rows(story.projector.name)]
    child = [table.name for table in story.projector.tables[1:]]
    children = [shown(row, story.child_columns) for name in child for row in given.rows(name)]
    return {"rows": sorted(rows, key=repr), "children": children}


@pytest.mark.parametrize("name", NAMES)
def test_a_read_model_is_the_same_in_any_order_of_events(given: Given, name):
    story = STORIES[name]
    expected = {"rows": sorted(story.rows, key=repr), "children": list(story.children)}
    tables = ", ".join(table.fullname for table in story.projector.tables)
    orders = list(permutations(story.sent))

    # Of a partition of its own each, or they would be repeats.
    for partition, order in enumerate(random.Random(name).sample(orders, k=min(6, len(orders)))):
        given(order, partition=partition).project(story.projector)

        assert content(given, story) == expected
        given.execute(f"TRUNCATE {tables}")
        given.execute(SKIP_WHAT_IS_LOGGED)


@pytest.mark.parametrize("batch", [1, 1000], ids=["alone", "together"])
@pytest.mark.parametrize("name", NAMES)
def test_wrong_events_are_named_with_their_column_and_the_others_are_applied(
    given: Given, name, batch
):
    story = STORIES[name]
    events = [*(wrong for wrong, _, _ in story.wrong), *story.sent]

    given(events).project(story.projector, limits=Limits(batch_offsets_max=batch))

    expected = {"rows": sorted(story.rows, key=repr), "children": list(story.children)}
    assert content(given, story) == expected
    letters = given.query(LETTERS)
    assert [tuple(letter) for letter in letters] == [
        (column, sqlstate) for _, column, sqlstate in story.wrong
    ]
    difference = rebuild(given.engine, story.projector)
    assert (difference.differing, difference.dead_letters) == (0, len(story.wrong))


def test_all_hard_read_models_apply_the_same_log(given: Given):
    events = [sent for name in NAMES for sent in STORIES[name].sent]
    random.Random(3).shuffle(events)

    given(events[::2], partition=0)(events[1::2], partition=1).project(*PLANNED)

    before = contents(given.engine, PLANNED)
    assert all(before[model.name] for model in PLANNED)
    for model in PLANNED:
        assert rebuild(given.engine, model, jobs=2).differing == 0
    assert contents(given.engine, PLANNED) == before
