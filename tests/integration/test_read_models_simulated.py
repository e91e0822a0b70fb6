"""A simulated broker, with chaos, against its own books: to the cent, and in every view."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from decimal import Decimal

import pytest

from pipeline import catalogue
from pipeline.readmodel import Projector
from pipeline.rebuild.rebuild import check
from pipeline.sandbox.simulator import Books, Chaos, Simulation
from tests.given import Given, full
from tests.read_models_page import questions
from tests.servers.databases import fresh_database

EVENTS = 5_000
SEEDS = [11, 12]


class Broker:
    """A day at the broker in the log, read models and all, beside the broker's own books."""

    def __init__(self, given: Given, seed: int) -> None:
        self.given = given
        self.simulation = Simulation(seed=seed, events=EVENTS, chaos=Chaos())
        self._random = random.Random(seed)

    @property
    def books(self) -> Books:
        return self.simulation.books

    def happen(self) -> None:
        """Each partition in its order, all interleaved at random, projected now and then."""
        waiting: dict[int, list[bytes | None]] = defaultdict(list)
        for record in self.simulation:
            assert record.partition is not None
            waiting[record.partition].append(record.value)
        while waiting:
            partition = self._random.choice(sorted(waiting))
            count = self._random.randint(1, 400)
            self.given(waiting[partition][:count], partition=partition)
            waiting[partition][:count] = []
            if not waiting[partition]:
                del waiting[partition]
            if self._random.random() < 0.1:
                some = self._random.sample(
                    catalogue.load().models, self._random.randint(1, len(catalogue.load().models))
                )
                self.given.project(*some)
        self.given.project(*catalogue.load().models)
        self.given.execute("ANALYZE")


@pytest.fixture(scope="module", params=SEEDS, ids=lambda seed: f"seed-{seed}")
def broker(request: pytest.FixtureRequest, postgres_server_18, _templates) -> Iterator[Broker]:
    with fresh_database(postgres_server_18, template=_templates(postgres_server_18)) as database:
        broker = Broker(Given(database), request.param)
        broker.happen()
        yield broker
        broker.given.close()


def test_every_read_model_equals_the_books(broker: Broker):
    for table in broker.books.tables:
        columns = ", ".join(broker.books.columns(table))
        found = broker.given.query(f"SELECT {columns} FROM {full(table)}")

        assert Counter(map(tuple, found)) == Counter(broker.books.rows(table)), table
        assert found, table


def test_the_books_have_whole_read_models(broker: Broker):
    """Children included. A further read model needs no books: its rebuild judges it."""
    in_books = [model for model in catalogue.load().models if model.name in broker.books.tables]

    assert set(broker.books.tables) == {table.name for it in in_books for table in it.tables}


@pytest.mark.parametrize("projector", catalogue.load().models, ids=lambda projector: projector.name)
def test_every_read_model_equals_its_rebuild(broker: Broker, projector: Projector):
    """Recomputed in other ranges of the log, from its beginning."""
    difference = check(broker.given.engine, projector, chunk_offsets=333)

    assert difference.rows > 0 or projector.name not in broker.books.tables
    assert (difference.differing, difference.lag) == (0, 0)


def test_only_events_with_bad_amounts_are_dead_letters(broker: Broker):
    letters = broker.given.query(
        "SELECT e.event_id::text, e.event_type FROM pipeline.dead_letters l "
        'JOIN pipeline.events e USING (topic, "partition", "offset")'
    )

    assert sorted(map(tuple, letters)) == sorted(broker.simulation.report.bad_amounts)
    assert letters


def test_cash_and_positions_add_up(broker: Broker):
    cash = broker.given.query("SELECT * FROM upvest.cash_reconciliation")
    positions = broker.given.query("SELECT * FROM upvest.position_reconciliation")

    assert len(cash) == broker.books.count("cash_balances")
    assert len(positions) == broker.books.count("positions")
    assert [row for row in (*cash, *positions) if row.is_break] == []
    for row in cash:
        expected = broker.books.cash_balance(row.account_group_id, row.currency)
        assert row.balance == row.ledger_sum == expected


def test_the_order_book_has_what_was_filled(broker: Broker):
    orders = broker.given.query("SELECT * FROM upvest.order_book")

    assert len(orders) == broker.books.count("orders")
    for row in orders:
        assert row.filled_quantity == broker.books.filled_quantity(row.order_id)
        assert row.instrument_name is not None
    assert Counter(row.status for row in orders) == broker.books.orders_by_status()


def test_the_last_line_of_each_statement_is_the_balance(broker: Broker):
    last = broker.given.query(
        "SELECT DISTINCT ON (account_group_id, currency) * FROM upvest.cash_ledger "
        "ORDER BY account_group_id, currency, booking_date DESC, created_at DESC, "
        "cash_transaction_id DESC, transaction_type DESC"
    )

    assert last
    for row in last:
        assert row.running_balance == broker.books.cash_balance(row.account_group_id, row.currency)


def test_holdings_are_the_positions_that_are_not_closed(broker: Broker):
    holdings = broker.given.query("SELECT * FROM upvest.holdings")

    open_ones = sum(1 for row in broker.given.rows("positions") if row.quantity)
    assert len(holdings) == open_ones
    for row in holdings:
        assert row.quantity == broker.books.position(row.account_id, row.instrument_uuid)
        assert row.quantity != Decimal(0)
        assert (row.owner_user_ids is None) == (row.business_id is not None)


def test_the_last_status_of_each_order_in_the_history_is_the_order_s(broker: Broker):
    """The history comes from the log, the orders from their projector: two ways to one end."""
    history = broker.given.query(
        "SELECT DISTINCT ON (order_id) order_id, status FROM upvest.order_status_history "
        "ORDER BY order_id, step DESC"
    )

    orders = {row.order_id: row.status for row in broker.given.rows("orders")}
    in_history = {row.order_id: row.status for row in history}
    assert {order: in_history[order] for order in orders} == orders
    # An order whose amount is bad has a history, and its row waits among the dead letters.
    bad = [kind for _, kind in broker.simulation.report.bad_amounts if kind == "ORDER.NEW"]
    assert len(in_history) == len(orders) + len(bad)


@pytest.mark.parametrize("view", ["order_book", "order_status_history"])
def test_one_order_is_found_by_indexes(broker: Broker, view: str):
    order_id = broker.given.scalar("SELECT order_id FROM upvest.executions LIMIT 1")

    with broker.given.database.connect() as db:
        # These tables are so small that reading one whole may look cheaper than its index.
        db.execute("SET enable_seqscan = off")
        plan = db.execute(f"EXPLAIN SELECT * FROM upvest.{view} WHERE order_id = '{order_id}'")
        text = "\n".join(line for (line,) in plan)

    large = ("orders", "executions", "execution_taxes", "notifications")
    assert not [table for table in large if f"Seq Scan on {table}" in text], text
    assert "Index Cond" in text


def test_one_group_s_statement_is_found_by_an_index(broker: Broker):
    group = broker.given.scalar("SELECT account_group_id FROM upvest.cash_transactions LIMIT 1")

    plan = broker.given.query(
        f"EXPLAIN SELECT * FROM upvest.cash_ledger WHERE account_group_id = '{group}'"
    )

    assert "cash_transactions_account_group_id_idx" in "\n".join(line for (line,) in plan)


@pytest.mark.parametrize(
    ("question", "sql"), list(questions()), ids=[question for question, _ in questions()]
)
def test_the_page_s_questions_have_answers(broker: Broker, question: str, sql: str):
    rows = broker.given.query(sql)

    assert (rows == []) == question.startswith("9."), question


def test_the_page_asks_ten_questions():
    assert len(list(questions())) == 10
