"""Read models from events: which version wins, children, values, and what is put aside."""

from datetime import UTC, date, datetime
from decimal import Decimal

import pytest

from pipeline.db import transaction
from pipeline.log import offsets
from pipeline.partitions import NextOffset, Partition
from pipeline.projectors.executions import executions
from pipeline.projectors.orders import orders
from tests.given import (
    Given,
    execution,
    execution_event,
    order_event,
    sample_events,
    some_id,
)

pytestmark = pytest.mark.both_postgres


def test_an_order_that_arrives_after_its_fill_stays_filled(given: Given):
    """Upvest promises no order between partitions."""
    placed, filled = order_event("NEW", at="10:00:00"), order_event("FILLED", at="10:00:01")

    rows = given([filled, placed, filled]).project(orders)

    assert [row.status for row in rows] == ["FILLED"]


def test_every_value_is_stored_in_its_type(given: Given):
    placed = order_event(
        "NEW",
        at="10:00:00.123456",
        cash_amount="",
        quantity="0.000000000000000000000000001",
        limit_price="123456789012345678901234567890.5",
        fee=".5",
        expiry_date="2026-02-28",
        user_instrument_fit_acknowledgement=True,
        client_reference="",
        business_id=None,
    )

    (row,) = given([placed]).project(orders)

    assert str(row.order_id) == some_id("an order")
    assert row.cash_amount is None
    assert row.quantity == Decimal("1E-27")
    assert row.limit_price == Decimal("123456789012345678901234567890.5")
    assert row.fee == Decimal("0.5")
    assert row.expiry_date == date(2026, 2, 28)
    assert row.updated_at == datetime(2026, 1, 12, 10, 0, 0, 123456, tzinfo=UTC)
    assert row.fit_acknowledged is True
    assert row.client_reference is None
    assert row.business_id is None


def test_a_log_that_begins_late_and_is_empty_has_an_end(given: Given):
    """As with PIPELINE_START=latest, or when retention has emptied the topic."""
    with transaction(given.engine) as db:
        offsets.begin(db, Partition("Prices", 0), NextOffset(500))

    rows = given([order_event("NEW", at="10:00:00")]).project(orders)

    assert len(rows) == 1


def test_the_sample_gives_the_rows_that_it_documents(given: Given):
    events = sample_events()
    newest = {}
    for event in events:
        if event["type"].startswith("ORDER."):
            newest[event["object"]["id"]] = event["object"]["status"]

    rows = given(events).project(orders, executions)

    assert {str(row.order_id): row.status for row in rows} == newest
    alone = {e["object"]["id"] for e in events if e["type"].startswith("EXECUTION.")}
    inside = {
        entry["id"]
        for e in events
        if e["type"].startswith("ORDER.")
        for entry in e["object"]["executions"]
    }
    assert {str(row.execution_id) for row in given.rows("executions")} == alone | inside
    assert len(given.rows("execution_taxes")) == len(alone | inside)
    assert given.query("SELECT * FROM pipeline.dead_letters") == []


def test_an_execution_is_taken_from_its_order_too_and_the_later_state_wins(given: Given):
    settled = execution_event("SETTLED", at="12:00:00")
    in_order = execution("FILLED")
    del in_order["order_id"]
    other = execution("FILLED", execution="another", taxes=[])
    del other["order_id"]
    filled = order_event("FILLED", at="13:00:00", executions=[in_order, other])

    rows = given([settled, filled]).project(executions)

    found = {str(row.execution_id): (row.status, str(row.order_id)) for row in rows}
    assert found == {
        some_id("an execution"): ("SETTLED", some_id("an order")),
        some_id("another"): ("FILLED", some_id("an order")),
    }
