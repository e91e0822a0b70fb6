"""The views for analysts: what they say of each case, and of what is not yet known."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from pipeline import catalogue
from pipeline.db import transaction
from pipeline.readmodel.model import personal_columns
from tests.given import (
    Given,
    event,
    execution,
    execution_event,
    moment,
    order_event,
    sample_events,
    some_id,
)
from tests.read_models_page import PAGE, reference, with_reference

pytestmark = pytest.mark.both_postgres

ISIN = "IE00ZQ7B0228"


def at(hour: int, minute: int = 0, second: int = 0) -> datetime:
    return datetime(2026, 1, 12, hour, minute, second, tzinfo=UTC)


def instrument(name: str, isin: str, *, time: str = "08:00:00") -> Any:
    body = {"id": some_id(name), "updated_at": moment(time), "isin": isin, "name": name}
    return event("INSTRUMENT.DATA_CHANGED", body, at=time)


def position(name: str, quantity: str, *, isin: str = "", account: str = "an account") -> Any:
    body = {
        "account_id": some_id(account),
        "instrument": {"uuid": some_id(name), "isin": isin},
        "quantity": quantity,
    }
    return event("POSITION.UPDATED", body)


def cash(amount: str, *, currency: str = "EUR", time: str = "10:00:00", **changes: Any) -> Any:
    body = {
        "id": some_id(f"{amount} {currency} {time}"),
        "type": "ORDER_EXECUTION",
        "account_group_id": some_id("a group"),
        "delta": {"amount": amount, "currency": currency},
        "booking_date": moment(time),
        "created_at": moment(time),
        "updated_at": moment(time),
    }
    return event("CASH_TRANSACTION.EXECUTED", {**body, **changes}, at=time)


def balance(amount: str, *, currency: str = "EUR") -> Any:
    body = {"account_group_id": some_id("a group"), "currency": currency, "balance": amount}
    return event("CASH_BALANCE.UPDATED", body)


def seen(given: Given, view: str, *events: Any, order: str = "1") -> Any:
    given(events).project(*catalogue.load().models)
    assert given.query("SELECT * FROM pipeline.dead_letters") == []
    return given.query(f"SELECT * FROM upvest.{view} ORDER BY {order}")


# --------------------------------------------------------------------------------------- order_book


def test_an_order_shows_what_was_filled_of_it(given: Given):
    partly = execution("SETTLED", execution="1", share_quantity="2", cash_amount="200.00")
    rest = execution(
        "FILLED",
        execution="2",
        share_quantity="3",
        cash_amount="330.00",
        taxes=[{"type": "TOTAL", "amount": "1.5"}, {"type": "SOLIDARITY", "amount": "0.5"}],
    )

    (row,) = seen(
        given, "order_book", order_event("FILLED", at="11:00:00", executions=[partly, rest])
    )

    assert (row.executions, row.filled_quantity, row.settled_quantity) == (2, 5, 2)
    assert (row.filled_amount, row.average_price) == (530, 106)
    assert row.tax == Decimal("1.5")
    assert (str(row.holder_id), row.holder_kind) == (some_id("a user"), "USER")
    assert row.last_execution_at == datetime(2026, 1, 12, 10, 0, 0, 727000, tzinfo=UTC)


def test_an_order_without_executions_is_in_the_order_book(given: Given):
    (row,) = seen(given, "order_book", order_event("NEW", at="10:00:00"))

    assert (row.executions, row.filled_quantity, row.filled_amount, row.tax) == (0, 0, 0, 0)
    assert (row.average_price, row.last_execution_at) == (None, None)


def test_a_cancelled_execution_does_not_count(given: Given):
    events = [
        order_event("CANCELLED", at="11:00:00"),
        execution_event("FILLED", at="10:30:00", execution="1", share_quantity="2"),
        execution_event("CANCELLED", at="10:40:00", execution="2", share_quantity="7"),
    ]

    (row,) = seen(given, "order_book", *events)

    assert (row.status, row.executions, row.filled_quantity) == ("CANCELLED", 1, 2)


def test_amounts_of_several_currencies_are_never_added(given: Given):
    events = [
        order_event("FILLED", at="11:00:00", currency="EUR"),
        execution_event("FILLED", at="10:30:00", execution="1", currency="EUR"),
        execution_event("FILLED", at="10:30:00", execution="2", currency="GBP"),
    ]

    (row,) = seen(given, "order_book", *events)

    assert (row.filled_amount, row.average_price, row.tax) == (None, None, None)
    assert row.filled_quantity == 2 * Decimal("2.7286680689")


def test_an_order_finds_its_instrument_by_a_former_isin(given: Given):
    events = [
        order_event("NEW", at="10:00:00"),
        instrument("Hanse World", ISIN),
        instrument("Hanse World", "IE00NEW00001", time="09:00:00"),
    ]

    (row,) = seen(given, "order_book", *events)

    assert (row.isin, row.instrument_name) == (ISIN, "Hanse World")
    assert str(row.instrument_uuid) == some_id("Hanse World")


def test_an_isin_of_several_instruments_means_the_latest(given: Given):
    events = [
        order_event("NEW", at="10:00:00"),
        instrument("Hanse World New", ISIN, time="09:00:00"),
        instrument("Hanse World", ISIN),
    ]

    (row,) = seen(given, "order_book", *events)

    assert row.instrument_name == "Hanse World New"


def test_an_unknown_instrument_shows_its_isin(given: Given):
    (row,) = seen(given, "order_book", order_event("NEW", at="10:00:00"))

    assert (row.instrument_name, row.instrument_uuid) == (ISIN, None)


def test_the_last_refused_cancellation_is_shown_with_the_order(given: Given):
    def refusal(time: str, reason: str) -> Any:
        body = {"order_id": some_id("an order"), "status": "REJECTED", "reason": reason}
        return event("ORDER_CANCELLATION.REJECTED", body, at=time)

    events = [
        refusal("10:20:00", "again"),
        refusal("10:10:00", "once"),
        order_event("NEW", at="10:00:00"),
    ]

    (row,) = seen(given, "order_book", *events)

    assert row.status == "NEW"
    assert row.cancellation_rejected_at == at(10, 20)
    assert row.cancellation_rejection_reason == "again"


def test_an_order_of_a_business_shows_the_business(given: Given):
    placed = order_event("NEW", at="10:00:00", user_id="", business_id=some_id("firm"))

    (row,) = seen(given, "order_book", placed)

    assert (str(row.holder_id), row.holder_kind) == (some_id("firm"), "BUSINESS")


# ----------------------------------------------------------------------------- order_status_history


def test_each_status_counts_from_when_it_was_first_reached(given: Given):
    events = [
        order_event("FILLED", at="10:00:30"),
        order_event("PROCESSING", at="10:00:20"),
        order_event("PROCESSING", at="10:00:10"),
        order_event("NEW", at="10:00:00"),
    ]

    rows = seen(given, "order_status_history", *events, *events, order="step")

    assert [(row.step, row.status, row.reached_at, row.after_previous) for row in rows] == [
        (1, "NEW", at(10, 0, 0), None),
        (2, "PROCESSING", at(10, 0, 10), timedelta(seconds=10)),
        (3, "FILLED", at(10, 0, 30), timedelta(seconds=20)),
    ]


def test_a_status_without_time_of_its_own_counts_from_its_event(given: Given):
    rows = seen(given, "order_status_history", order_event("NEW", at="10:00:07", updated_at=""))

    assert [row.reached_at for row in rows] == [at(10, 0, 7)]


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_a_bare_date_is_midnight_utc_in_every_session(given: Given, zone: str):
    placed = order_event("NEW", at="10:00:00", updated_at="2026-01-12")
    given([placed])

    (found,) = given.query(
        "SELECT reached_at = timestamptz '2026-01-12 00:00:00Z' AS is_midnight, z.* "
        f"FROM set_config('timezone', '{zone}', true) z, upvest.order_status_history"
    )

    assert found.is_midnight


def test_an_unreadable_time_is_not_in_the_history(given: Given):
    """It is in the log, and in the dead letters of orders; it must not break the view."""
    good = order_event("NEW", at="10:00:00")
    bad = [
        order_event("PROCESSING", at="10:00:01", updated_at="2026-02-30T00:00:00Z"),
        order_event("PROCESSING", at="10:00:01", updated_at="soon"),
        order_event("PROCESSING", at="10:00:01", updated_at={"at": 1}),
        order_event("", at="10:00:02"),
        order_event("PROCESSING", at="10:00:03", id="not an id"),
        {"type": "ORDER.PROCESSING", "object": {"id": some_id("an order"), "status": "LOST"}},
        event("ORDER.PROCESSING", ["a list"]),
        event("ORDER.PROCESSING", {"account_id": some_id("an order"), "status": "PROCESSING"}),
        event("ORDERLY.NEW", {"id": some_id("an order"), "status": "ELSE"}),
        b"not json",
        None,
    ]

    rows = given([*bad, good]).query("SELECT * FROM upvest.order_status_history")

    assert [(str(row.order_id), row.status) for row in rows] == [(some_id("an order"), "NEW")]


# ----------------------------------------------------------------------------------------- holdings


def group(*users: tuple[str, str], **changes: Any) -> Any:
    members = [{"id": some_id(name), "type": role} for name, role in users]
    body = {"id": some_id("a group"), "type": "PERSONAL", "users": members, "status": "ACTIVE"}
    return event("ACCOUNT_GROUP.ACTIVATED", {**body, **changes})


def account() -> Any:
    body = {
        "id": some_id("an account"),
        "account_group_id": some_id("a group"),
        "type": "TRADING",
        "account_number": 1,
        "name": "Annika's",
    }
    return event("ACCOUNT.ACTIVATED", body)


def test_a_holding_shows_its_owner_and_instrument(given: Given):
    events = [
        position("Hanse World", "2.5", isin="IE00OLD00001"),
        instrument("Hanse World", ISIN),
        account(),
        group(("child", "CHILD"), ("mother", "GUARDIAN")),
    ]

    (row,) = seen(given, "holdings", *events)

    assert (row.instrument_name, row.isin, row.quantity) == ("Hanse World", ISIN, Decimal("2.5"))
    assert (str(row.account_group_id), row.account_number) == (some_id("a group"), 1)
    assert [str(user) for user in row.owner_user_ids] == [some_id("child")]
    assert row.business_id is None


def test_a_holding_of_two_owners_is_one_row(given: Given):
    events = [position("x", "1"), account(), group(("a", "OWNER"), ("b", "OWNER"), ("a", "OWNER"))]

    (row,) = seen(given, "holdings", *events)

    assert {str(user) for user in row.owner_user_ids} == {some_id("a"), some_id("b")}
    assert len(row.owner_user_ids) == 2


def test_a_holding_of_a_business_has_no_users(given: Given):
    events = [position("x", "1"), account(), group(users=[], business_id=some_id("firm"))]

    (row,) = seen(given, "holdings", *events)

    assert (row.owner_user_ids, str(row.business_id)) == (None, some_id("firm"))


def test_a_holding_with_unknown_account_and_instrument_is_shown(given: Given):
    (row,) = seen(given, "holdings", position("x", "1", isin=ISIN))

    assert (row.account_group_id, row.owner_user_ids) == (None, None)
    assert (row.isin, row.instrument_name) == (ISIN, ISIN)


def test_a_negative_position_is_a_holding_and_a_closed_one_is_not(given: Given):
    rows = seen(given, "holdings", position("closed", "0.000"), position("short", "-1"))

    assert [row.quantity for row in rows] == [Decimal(-1)]


def test_no_view_shows_personal_data(given: Given):
    """Views of schema upvest are for everybody; what they read is in their dependencies."""
    shown = given.query("""
        SELECT v.relname AS view, t.relname AS table, a.attname AS column
        FROM pg_class v JOIN pg_rewrite r ON r.ev_class = v.oid
        JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
                        AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> v.oid
        JOIN pg_class t ON t.oid = d.refobjid
        JOIN pg_attribute a ON a.attrelid = t.oid AND a.attnum = d.refobjsubid AND a.attnum > 0
        WHERE v.relnamespace = 'upvest'::regnamespace AND v.relkind = 'v'
    """)
    tables = catalogue.load().tables
    personal = {(name, column) for name in tables for column in personal_columns(tables[name])}

    read = {(row.table, row.column) for row in shown}
    assert {("users", "birth_date"), ("accounts", "name")} <= personal
    assert {row.view for row in shown} >= {"users", "accounts", *catalogue.load().views}
    assert read & personal == set()


# -------------------------------------------------------------------------------------- cash_ledger


def test_the_ledger_runs_by_currency_in_the_order_of_booking(given: Given):
    events = [
        cash("-30.00", time="12:00:00", type="WITHDRAWAL"),
        cash("7.00", currency="GBP", time="11:00:00"),
        cash("100.00", time="10:00:00"),
        cash("30.00", time="13:00:00", type="WITHDRAWAL_CANCELLATION"),
        cash("-100.00", time="14:00:00", type="SEPA_DIRECT_DEBIT_CHARGE_BACK"),
    ]

    rows = seen(given, "cash_ledger", *events, order="booking_date")

    assert [(row.amount, row.currency, row.running_balance, row.is_reversal) for row in rows] == [
        (100, "EUR", 100, False),
        (7, "GBP", 7, False),
        (-30, "EUR", 70, False),
        (30, "EUR", 100, True),
        (-100, "EUR", 0, True),
    ]


# ---------------------------------------------------------------------------------- reconciliations


def test_a_break_in_cash_shows_its_amount(given: Given):
    rows = seen(
        given,
        "cash_reconciliation",
        *[balance("150.00"), balance("7", currency="GBP"), balance("0", currency="USD")],
        *[cash("100.01"), cash("7.00", currency="GBP"), cash("3", currency="CHF")],
        order="currency",
    )

    assert [(r.currency, r.balance, r.ledger_sum, r.break_amount, r.is_break) for r in rows] == [
        ("CHF", None, 3, -3, True),
        ("EUR", 150, Decimal("100.01"), Decimal("49.99"), True),
        ("GBP", 7, 7, 0, False),
        ("USD", 0, 0, 0, False),
    ]


def test_a_break_in_units_shows_its_quantity(given: Given):
    booked = {
        "id": some_id("booking"),
        "type": "ORDER_EXECUTION",
        "account_id": some_id("an account"),
        "instrument": {"uuid": some_id("x"), "isin": ISIN},
        "delta": {"amount": "1.000000000000000000000000001"},
        "updated_at": moment("10:00:00"),
    }

    (row,) = seen(
        given,
        "position_reconciliation",
        position("x", "1"),
        event("SECURITY_TRANSACTION.EXECUTED", booked),
    )

    assert (row.break_quantity, row.is_break) == (Decimal("-1E-27"), True)
    assert (row.instrument_name, row.entries) == (ISIN, 1)


def test_the_sample_adds_up(given: Given):
    given(sample_events()).project(*catalogue.load().models)

    cash_rows = given.query("SELECT is_break FROM upvest.cash_reconciliation")
    unit_rows = given.query("SELECT is_break FROM upvest.position_reconciliation")

    assert cash_rows
    assert unit_rows
    assert not any(row.is_break for row in (*cash_rows, *unit_rows))


# ----------------------------------------------------------------------------------------- comments


def test_every_view_and_column_has_a_comment(given: Given):
    """In the database itself, where psql and every other tool show it."""
    silent = given.query("""
        SELECT c.relname, a.attname FROM pg_class c
        JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace = 'upvest'::regnamespace AND c.relkind IN ('r', 'v')
          AND (obj_description(c.oid, 'pg_class') IS NULL
               OR col_description(c.oid, a.attnum) IS NULL)
    """)

    assert silent == []


def test_the_page_of_read_models_matches_the_database(given: Given):
    with transaction(given.engine) as db:
        written = reference(db)

    assert PAGE.read_text() == with_reference(PAGE.read_text(), written), (
        "write it anew: python -m tests.read_models_page"
    )
