import re
import subprocess
import sys
from collections import Counter, defaultdict
from datetime import UTC, datetime
from decimal import Decimal
from hashlib import sha256
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.rfc3339 import micros
from pipeline.sandbox.simulator import Simulation
from pipeline.sandbox.simulator.broker import Broker
from pipeline.sandbox.simulator.exact import add
from pipeline.sandbox.simulator.market import check_digit

# What Upvest's public documentation requires of each object.
REQUIRED = {
    "USER": "id created_at updated_at first_name last_name birth_date nationalities address status",
    "USER_CHECK": "id user_id type status check_confirmed_at",
    "ACCOUNT_GROUP": "id created_at updated_at type status securities_account_number",
    "ACCOUNT": "id created_at updated_at account_group_id type account_number name status",
    "ORDER": "id created_at updated_at account_id side order_type instrument_id instrument_id_type "
    "cash_amount currency quantity fee status initiation_flow client_reference executions",
    "EXECUTION": "id order_id side cash_amount share_quantity price currency transaction_time "
    "status taxes",
    "ORDER_CANCELLATION": "order_id status",
    "POSITION": "account_id instrument quantity locked_for_trading pending_settlement "
    "available_for_trading",
    "CASH_BALANCE": "account_group_id currency balance locked_for_trading pending_settlement "
    "available_for_withdrawal available_for_trading",
    "CASH_TRANSACTION": "id type account_group_id delta booking_date value_date created_at "
    "updated_at taxes references",
    "SECURITY_TRANSACTION": "id type account_group_id account_id instrument delta booking_date "
    "value_date created_at updated_at references",
    "DIRECT_DEBIT": "id created_at user_id account_group_id mandate_id cash_amount currency",
    "WITHDRAWAL": "id created_at updated_at reference_account_id account_group_id user_id amount "
    "currency remittance_information",
    "TOPUP": "id account_group_id cash_amount currency created_at status",
    "SAVINGS_PLAN": "id user_id account_id type cash_amount currency start_date period interval "
    "created_at updated_at",
    "SAVINGS_PLAN_EXECUTION": "id savings_plan_id user_id account_id order_id cash_amount currency "
    "status type execution_date created_at updated_at",
    "INSTRUMENT": "id created_at updated_at name fractional_trading trading_status",
    "CORPORATE_ACTION": "id iso_type",
    "BUSINESS": "id created_at updated_at name status",
    "BUSINESS_CHECK": "id business_id type status originally_confirmed_at check_confirmed_at",
}

# From which state a thing may come into each; None is its beginning.
LEGAL: dict[str, dict[str, set[str | None]]] = {
    "ORDER": {
        "NEW": {None},
        "PROCESSING": {"NEW"},
        "FILLED": {"PROCESSING"},
        "CANCELLED": {"NEW", "PROCESSING"},
    },
    "EXECUTION": {"FILLED": {None}, "SETTLED": {"FILLED"}, "CANCELLED": {"FILLED"}},
    "USER": {
        "INACTIVE": {None, "ACTIVE"},
        "ACTIVE": {"INACTIVE"},
        "OFFBOARDING": {"INACTIVE", "ACTIVE"},
        "OFFBOARDED": {"OFFBOARDING"},
    },
    "USER_CHECK": {"IN_PROGRESS": {None}, "PASSED": {"IN_PROGRESS"}, "FAILED": {"IN_PROGRESS"}},
    "BUSINESS_CHECK": {"IN_PROGRESS": {None}, "PASSED": {"IN_PROGRESS"}},
    "ACCOUNT_GROUP": {"PENDING_APPROVAL": {None}, "ACTIVE": {"PENDING_APPROVAL"}},
    "ACCOUNT": {
        "PENDING_APPROVAL": {None},
        "ACTIVE": {"PENDING_APPROVAL", "LOCKED"},
        "LOCKED": {"ACTIVE"},
    },
    "DIRECT_DEBIT": {
        "NEW": {None},
        "PROCESSING": {"NEW"},
        "CONFIRMED": {"PROCESSING"},
        "CANCELLED": {"NEW", "PROCESSING"},
    },
    "WITHDRAWAL": {
        "NEW": {None},
        "PROCESSING": {"NEW"},
        "CONFIRMED": {"PROCESSING"},
        "CANCELLED": {"PROCESSING"},
    },
    "TOPUP": {"CONFIRMED": {None}, "SETTLED": {"CONFIRMED"}, "CANCELLED": {"CONFIRMED"}},
    "SAVINGS_PLAN_EXECUTION": {
        "NEW": {None},
        "PROCESSING": {"NEW"},
        "FILLED": {"PROCESSING"},
        "SETTLED": {"FILLED"},
        "CANCELLED": {"NEW"},
    },
}
FEW = settings(max_examples=40, deadline=None)


@pytest.fixture(scope="module")
def day():
    """The events of some days, enough for everything to happen."""
    return list(Broker(11).events(40_000))


def at(text):
    """Microseconds since 1970."""
    moment = micros(text)
    assert moment is not None, text
    return int(moment)


def digest(seed, **options):
    digest_of_records = sha256()
    for record in Simulation(seed, **options):
        digest_of_records.update(repr(record).encode())
    return digest_of_records.hexdigest()


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others():
    assert digest(1, events=2_000) == digest(1, events=2_000)
    assert digest(1, events=2_000) != digest(2, events=2_000)


def test_another_process_with_other_hashes_makes_the_same_bytes():
    program = (
        "from tests.unit.simulator.test_broker import digest; print(digest('x', events=1_000))"
    )

    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hashes, "PYTHONPATH": "."},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for hashes in ("1", "2")
    ]

    assert outputs == [digest("x", events=1_000)] * 2


@FEW
@given(seed=st.integers(), events=st.integers(0, 6_000))
def test_a_simulation_of_any_length_has_that_many_events_and_balanced_books(seed, events):
    simulation = Simulation(seed, events=events)

    count = sum(1 for _ in simulation)

    assert count == simulation.books.events == events
    assert simulation.books.breaks() == []


@FEW
@given(seed=st.integers(), after=st.integers(0, 3_000))
def test_the_books_balance_when_the_simulation_is_stopped(seed, after):
    simulation = Simulation(seed, events=None)

    for count, _ in enumerate(simulation):
        if count == after:
            simulation.stop()

    assert simulation.books.breaks() == []


def test_every_event_has_the_envelope(day):
    for record in day:
        assert set(record.event) - {"webhook_id"} == {"id", "created_at", "type", "object"}
        assert record.event["type"] == record.type
        assert re.fullmatch(r"[A-Z_]+\.[A-Z_]+", record.type)
    assert len({record.event["id"] for record in day}) == len(day)
    assert 0.05 < sum("webhook_id" not in record.event for record in day) / len(day) < 0.15


def test_every_object_has_its_required_fields(day):
    for record in day:
        category, _, action = record.type.partition(".")
        if action == "DATA_CHANGE_FAILED":
            assert set(record.event["object"]) == {"user_id", "reason"}
        else:
            missing = set(REQUIRED[category].split()) - set(record.event["object"])
            assert not missing, (record.type, missing)


def test_every_type_of_event_happens(day):
    types = Counter(record.type for record in day)
    entries = Counter(
        record.event["object"]["type"] for record in day if "TRANSACTION.EXECUTED" in record.type
    )

    assert set(types) >= {
        "EXECUTION.CANCELLED",
        "INSTRUMENT.DATA_CHANGED",
        "ORDER.CANCELLED",
        "ORDER_CANCELLATION.REJECTED",
        "SAVINGS_PLAN.CANCELLED",
        "SAVINGS_PLAN_EXECUTION.SETTLED",
        "USER.OFFBOARDED",
        "USER_CHECK.FAILED",
        "WITHDRAWAL.CANCELLED",
    }
    assert set(entries) >= {
        "BALANCE_CORRECTION",
        "CASH_DIVIDEND",
        "FEE_COLLECTION",
        "ORDER_EXECUTION",
        "ORDER_EXECUTION_CANCELLATION",
        "SEPA_DIRECT_DEBIT_CHARGE_BACK",
        "WITHDRAWAL_CANCELLATION",
    }


def test_no_entity_takes_a_step_that_its_life_cycle_forbids(day):
    states: dict[str, str] = {}
    for record in day:
        category, entity = record.type.partition(".")[0], record.event["object"]
        if category not in LEGAL or "id" not in entity:
            continue
        before, now = states.get(entity["id"]), entity["status"]
        assert before == now or before in LEGAL[category][now], (record.type, before, now)
        states[entity["id"]] = now


def test_an_order_contains_exactly_its_executions(day):
    executions = defaultdict(set)
    ended = {}
    for record in day:
        entity = record.event["object"]
        if record.type == "EXECUTION.FILLED":
            executions[entity["order_id"]].add(entity["id"])
        elif record.type in ("ORDER.FILLED", "ORDER.CANCELLED"):
            ended[entity["id"]] = entity

    for order_id, order in ended.items():
        assert {execution["id"] for execution in order["executions"]} == executions[order_id]
    assert any(order["status"] == "CANCELLED" and order["executions"] for order in ended.values())


def test_a_filled_order_was_executed_in_full(day):
    for record in day:
        order = record.event["object"]
        if record.type == "ORDER.FILLED":
            wanted, part = ("cash_amount", "cash_amount")
            if order["quantity"]:
                wanted, part = ("quantity", "share_quantity")
            traded = add(*(Decimal(execution[part]) for execution in order["executions"]))
            assert traded == Decimal(order[wanted])


def test_the_filled_order_arrives_before_or_after_its_last_execution(day):
    filled_executions = set()
    before = after = 0
    for record in day:
        if record.type == "EXECUTION.FILLED":
            filled_executions.add(record.event["object"]["id"])
        elif record.type == "ORDER.FILLED":
            executed = record.event["object"]["executions"][-1]["id"] in filled_executions
            before, after = before + (not executed), after + executed

    assert before > 100
    assert after > 100


def test_no_two_times_are_the_same_to_the_microsecond(day):
    times = [
        at(record.event["created_at"]) for record in day if len(record.event["created_at"]) > 10
    ]
    updated = defaultdict(list)
    for record in day:
        entity = record.event["object"]
        if "updated_at" in entity and not record.type.endswith(".REMINDER"):
            updated[entity["id"], entity.get("type")].append(at(entity["updated_at"]))

    for versions in (times, *updated.values()):
        assert all(later - sooner >= 1_000 for sooner, later in pairwise(versions))


def test_an_objects_time_is_between_the_previous_event_and_its_own(day):
    last = 0
    for record in day:
        now = record.occurred_ns // 1_000
        updated_at = record.event["object"].get("updated_at")
        if updated_at and not record.type.endswith(".REMINDER"):
            assert last < at(updated_at) < now
        if len(record.event["created_at"]) > 10:
            # Nanoseconds are rounded to microseconds.
            assert at(record.event["created_at"]) - now in (0, 1)
        last = now


def test_times_have_none_to_nine_digits_and_sometimes_are_bare_dates(day):
    digits = Counter(
        len(record.event["created_at"].partition(".")[2].rstrip("Z")) for record in day
    )
    bare = [record.type for record in day if len(record.event["created_at"]) == 10]
    value_dates = [
        record.event["object"]["value_date"]
        for record in day
        if record.type.startswith("CASH_TRANS")
    ]

    assert set(digits) == set(range(10))
    assert set(bare) == {"ORDER_CANCELLATION.REJECTED"}
    assert any(len(date) == 10 for date in value_dates)


def test_amounts_are_decimal_strings_with_up_to_27_digits_and_unset_ones_are_empty(day):
    amounts = [
        value
        for record in day
        if record.type.startswith(("ORDER.", "EXECUTION.", "POSITION.", "CASH_BALANCE."))
        for name, value in record.event["object"].items()
        if name.endswith(("amount", "quantity", "price", "balance", "fee")) or "_for_" in name
    ]

    assert all(re.fullmatch(r"-?[0-9]{0,63}(\.[0-9]{1,27})?", amount) for amount in amounts)
    assert "" in amounts
    assert ".5" in amounts
    assert max(len(amount.partition(".")[2]) for amount in amounts) == 27


def test_the_parts_of_a_position_and_of_a_balance_add_up(day):
    for record in day:
        entity = record.event["object"]
        if record.type == "POSITION.UPDATED":
            locked = Decimal(entity["locked_for_trading"])
            assert add(locked, Decimal(entity["available_for_trading"])) == Decimal(
                entity["quantity"]
            )
            assert locked >= 0
        elif record.type == "CASH_BALANCE.UPDATED":
            assert Decimal(entity["locked_for_trading"]) >= 0
            assert Decimal(entity["available_for_withdrawal"]) <= Decimal(entity["balance"])


def test_no_amount_stays_locked_or_pending_without_a_reason():
    simulation = Simulation(3, events=None, customers=15)
    orders = {}
    for record in simulation:
        if simulation.books.events > 30_000:
            simulation.stop()
        del record
    books = simulation.books
    for row in books.rows("orders"):
        order = dict(zip(books.columns("orders"), row, strict=True))
        orders[order["order_id"]] = order
    busy = {
        order["account_id"]
        for order in orders.values()
        if order["status"] in ("NEW", "PROCESSING") and order["side"] == "SELL"
    }

    for row in books.rows("positions"):
        position = dict(zip(books.columns("positions"), row, strict=True))
        if position["account_id"] not in busy:
            assert position["locked_for_trading"] == 0


def test_instruments_have_valid_fictitious_isins_that_sometimes_change(day):
    isins = defaultdict(set)
    for record in day:
        if record.type.startswith("INSTRUMENT."):
            isins[record.event["object"]["id"]].add(record.event["object"]["isin"])

    assert check_digit("US037833100") == "5"
    assert check_digit("DE000716460") == "0"
    for isin in set().union(*isins.values()):
        assert re.fullmatch(r"[A-Z]{2}[0-9A-Z]{9}[0-9]", isin)
        assert check_digit(isin[:-1]) == isin[-1]
    assert any(len(known) > 1 for known in isins.values())


def test_companies_have_no_users_and_children_have_a_guardian(day):
    groups = [record.event["object"] for record in day if record.type == "ACCOUNT_GROUP.CREATED"]
    roles = Counter(user["type"] for group in groups for user in group.get("users", ()))
    orders = [record.event["object"] for record in day if record.type == "ORDER.NEW"]

    assert roles["CHILD"] == roles["GUARDIAN"] > 0
    assert any("users" not in group and "business_id" in group for group in groups)
    assert any("user_id" not in order and "business_id" in order for order in orders)
    assert {group["type"] for group in groups} == {"PERSONAL", "CHILD", "LEGAL_ENTITY"}


def test_a_reversal_sometimes_has_the_id_of_its_entry(day):
    kinds = defaultdict(set)
    for record in day:
        if record.type == "CASH_TRANSACTION.EXECUTED":
            kinds[record.event["object"]["id"]].add(record.event["object"]["type"])

    assert {"ORDER_EXECUTION", "ORDER_EXECUTION_CANCELLATION"} in kinds.values()
    assert {"ORDER_EXECUTION_CANCELLATION"} in kinds.values()


def test_finished_entities_are_removed_from_memory():
    broker = Broker(5, customers=15)
    agenda = [
        len(broker._timeline._agenda)
        for number, _ in enumerate(broker.events(60_000))
        if number % 10_000 == 9_999
    ]

    assert max(agenda) < 1_500


def test_the_market_is_closed_at_weekends(day):
    placed = [record for record in day if record.type == "ORDER.NEW"]

    for record in placed:
        moment = datetime.fromtimestamp(record.occurred_ns // 10**9, UTC)
        assert moment.weekday() < 5
