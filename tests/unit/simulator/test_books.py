from collections import defaultdict
from decimal import Decimal
from uuid import UUID

import pytest

from pipeline.sandbox.simulator import Break, Simulation
from pipeline.sandbox.simulator.books import Books
from pipeline.sandbox.simulator.exact import add
from pipeline.sandbox.simulator.timeline import SimulatedEvent

ACCOUNT = "44868311-07c6-4c70-959f-4145a9957eda"
GROUP = "43bec846-f0dd-40ea-896d-17705c577af4"
ORDER = "67d4baf7-3944-4fd9-b133-0fef6c59b99c"


def event(event_type, **entity):
    envelope = {"id": str(UUID(int=1)), "created_at": "2026-01-05T07:00:00Z", "type": event_type}
    return SimulatedEvent(b"", event_type, {**envelope, "object": entity}, 0)


def execution(number, status, quantity, **more):
    return {
        "id": str(UUID(int=number)),
        "order_id": ORDER,
        "status": status,
        "share_quantity": quantity,
        "taxes": [{"type": "TOTAL", "amount": "0"}],
        **more,
    }


@pytest.fixture(scope="module")
def books():
    simulation = Simulation(8, events=12_000)
    for _ in simulation:
        pass
    return simulation.books


def test_keys_are_unique_and_rows_have_the_columns_that_are_named(books):
    for table in books.tables:
        rows = books.rows(table)

        assert rows, table
        assert len(rows) == books.count(table)
        assert all(len(row) == len(books.columns(table)) for row in rows)
    assert isinstance(books.rows("orders")[0][0], UUID)


def test_an_order_has_its_newest_state_and_filled_quantity():
    books = Books()
    books.record(event("ORDER.NEW", id=ORDER, status="NEW", cash_amount="", executions=[]))
    books.record(event("EXECUTION.FILLED", **execution(7, "FILLED", "2.5")))
    both = [execution(7, "FILLED", "2.5"), execution(8, "FILLED", "1")]
    books.record(event("ORDER.FILLED", id=ORDER, status="FILLED", executions=both))
    books.record(event("EXECUTION.CANCELLED", **execution(7, "CANCELLED", "2.5")))

    assert books.orders_by_status() == {"FILLED": 1}
    assert books.filled_quantity(ORDER) == books.filled_quantity(UUID(ORDER)) == 1
    assert books.count("executions") == books.count("execution_taxes") == 2


def test_empty_text_is_null_and_amounts_keep_all_their_digits():
    digits = "0.123456789012345678901234567"
    books = Books()
    books.record(event("ORDER.NEW", id=ORDER, cash_amount="", quantity=digits, executions=[]))

    order = dict(zip(books.columns("orders"), books.rows("orders")[0], strict=True))

    assert order["cash_amount"] is None
    assert order["quantity"] == Decimal(digits)


def test_a_balance_that_is_not_the_sum_of_its_entries_is_a_break():
    entry = {"account_group_id": GROUP, "references": [], "taxes": []}
    books = Books()
    for number, amount in enumerate(("10.00", "-2.50")):
        delta = {"amount": amount, "currency": "EUR"}
        books.record(
            event("CASH_TRANSACTION.EXECUTED", id=str(number), type="TOPUP", delta=delta, **entry)
        )

    def update_balance(balance):
        entity = {"account_group_id": GROUP, "currency": "EUR", "balance": balance}
        books.record(event("CASH_BALANCE.UPDATED", **entity))

    assert books.breaks() == [Break("cash_balances", (GROUP, "EUR"), None, Decimal("7.50"))]
    update_balance("7.49")
    assert books.breaks() == [
        Break("cash_balances", (GROUP, "EUR"), Decimal("7.49"), Decimal("7.50"))
    ]
    update_balance("7.5")
    assert books.breaks() == []
    assert books.cash_balance(GROUP, "EUR") == Decimal("7.5")
    assert books.cash_balance(GROUP, "GBP") == 0


def test_the_members_of_a_group_are_those_of_its_newest_state():
    books = Books()
    first_user, second_user = str(UUID(int=1)), str(UUID(int=2))
    for members in ([first_user], [first_user, second_user], [second_user]):
        users = [{"id": member, "type": "OWNER"} for member in members]
        books.record(event("ACCOUNT.UPDATED", id=ACCOUNT, users=users))

    assert books.rows("account_users") == [(UUID(ACCOUNT), UUID(second_user), "OWNER")]


def test_positions_are_found_by_account_and_instrument(books):
    columns = books.columns("positions")
    for row in books.rows("positions"):
        position = dict(zip(columns, row, strict=True))
        found = books.position(position["account_id"], position["instrument_uuid"])
        assert found == position["quantity"]
    assert books.position(ACCOUNT, ACCOUNT) == 0


def test_filled_quantities_are_those_of_the_executions(books):
    columns = books.columns("executions")
    filled: defaultdict[object, Decimal] = defaultdict(Decimal)
    for row in books.rows("executions"):
        execution = dict(zip(columns, row, strict=True))
        if execution["status"] != "CANCELLED":
            order_id = execution["order_id"]
            filled[order_id] = add(filled[order_id], execution["share_quantity"])

    for order_id, quantity in filled.items():
        assert books.filled_quantity(order_id) == quantity


def test_a_simulation_without_books_raises_an_error():
    simulation = Simulation(1, events=10, keep_books=False)

    with pytest.raises(ValueError, match="keep_books"):
        _ = simulation.books
