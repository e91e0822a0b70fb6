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
    told = sha256()
    for record in Simulation(seed, **options):
        told.update(repr(record).encode())
    return told.hexdigest()


def test_the_same_seed_tells_the_same_bytes_and_another_seed_other_ones():
    assert digest(1, events=2_000) == digest(1, events=2_000)
    assert digest(1, events=2_000) != digest(2, events=2_000)


def test_another_process_with_other_hashes_tells_the_same_bytes():
    program = (
        "from tests.unit.simulator.test_broker import digest; print(digest('x', events=1_000))"
    )

    told = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hashes, "PYTHONPATH": "."},
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for hashes in ("1", "2")
    ]

    assert told == [digest("x", events=1_000)] * 2


@FEW
@given(seed=st.integers(), events=st.integers(0, 6_000))
def test_wherever_it_ends_there_are_so_many_events_and_the_books_add_up(seed, events):
    simulation = Simulation(seed, events=events)

    told = sum(1 for _ in simulation)

    assert told == simulation.books.events == events
    assert simulation.books.breaks() == []


@FEW
@given(seed=st.integers(), after=st.integers(0, 3_000))
def test_when_stopped_the_books_add_up(seed, after):
    simulation = Simulation(seed, events=None)

    for told, _ in enumerate(simulation):
        if told == after:
            simulation.stop()

    assert simulation.books.breaks() == []


def test_every_event_has_the_envelope(day):
    for told in day:
        assert set(told.event) - {"webhook_id"} == {"id", "created_at", "type", "object"}
        assert told.event["type"] == told.type
        assert re.fullmatch(r"[A-Z_]+\.[A-Z_]+", told.type)
    assert len({told.event["id"] for told in day}) == len(day)
    assert 0.05 < sum("webhook_id" not in told.event for told in day) / len(day) < 0.15


def test_every_object_has_what_is_required_of_it(day):
    for told in day:
        category, _, action = told.type.partition(".")
        if action == "DATA_CHANGE_FAILED":
            assert set(told.event["object"]) == {"user_id", "reason"}
        else:
            missing = set(REQUIRED[category].split()) - set(told.event["object"])
            assert not missing, (told.type, missing)


def test_everything_happens(day):
    types = Counter(told.type for told in day)
    entries = Counter(
        told.event["object"]["type"] for told in day if "TRANSACTION.EXECUTED" in told.type
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


def test_nothing_takes_a_step_that_its_life_cycle_forbids(day):
    states: dict[str, str] = {}
    for told in day:
        category, thing = told.type.partition(".")[0], told.event["object"]
        if category not in LEGAL or "id" not in thing:
            continue
        before, now = states.get(thing["id"]), thing["status"]
        assert before == now or before in LEGAL[category][now], (told.type, before, now)
        states[thing["id"]] = now


def test_an_order_carries_its_executions_and_no_other(day):
    executions = defaultdict(set)
    ended = {}
    for told in day:
        thing = told.event["object"]
        if told.type == "EXECUTION.FILLED":
            executions[thing["order_id"]].add(thing["id"])
        elif told.type in ("ORDER.FILLED", "ORDER.CANCELLED"):
            ended[thing["id"]] = thing

    for order_id, order in ended.items():
        assert {one["id"] for one in order["executions"]} == executions[order_id]
    assert any(order["status"] == "CANCELLED" and order["executions"] for order in ended.values())


def test_a_filled_order_was_executed_in_full(day):
    for told in day:
        order = told.event["object"]
        if told.type == "ORDER.FILLED":
            wanted, part = ("cash_amount", "cash_amount")
            if order["quantity"]:
                wanted, part = ("quantity", "share_quantity")
            traded = add(*(Decimal(one[part]) for one in order["executions"]))
            assert traded == Decimal(order[wanted])


def test_an_order_is_told_as_filled_before_and_after_its_last_execution(day):
    told_of = set()
    before = after = 0
    for told in day:
        if told.type == "EXECUTION.FILLED":
            told_of.add(told.event["object"]["id"])
        elif told.type == "ORDER.FILLED":
            executed = told.event["object"]["executions"][-1]["id"] in told_of
            before, after = before + (not executed), after + executed

    assert before > 100
    assert after > 100


def test_no_two_times_are_the_same_to_the_microsecond(day):
    times = [at(told.event["created_at"]) for told in day if len(told.event["created_at"]) > 10]
    updated = defaultdict(list)
    for told in day:
        thing = told.event["object"]
        if "updated_at" in thing and not told.type.endswith(".REMINDER"):
            updated[thing["id"], thing.get("type")].append(at(thing["updated_at"]))

    for versions in (times, *updated.values()):
        assert all(later - sooner >= 1_000 for sooner, later in pairwise(versions))


def test_an_objects_time_lies_between_the_event_before_and_its_own(day):
    last = 0
    for told in day:
        now = told.occurred_ns // 1_000
        updated_at = told.event["object"].get("updated_at")
        if updated_at and not told.type.endswith(".REMINDER"):
            assert last < at(updated_at) < now
        if len(told.event["created_at"]) > 10:
            # Nanoseconds are rounded to microseconds.
            assert at(told.event["created_at"]) - now in (0, 1)
        last = now


def test_times_have_none_to_nine_digits_and_sometimes_are_bare_dates(day):
    digits = Counter(len(told.event["created_at"].partition(".")[2].rstrip("Z")) for told in day)
    bare = [told.type for told in day if len(told.event["created_at"]) == 10]
    value_dates = [
        told.event["object"]["value_date"] for told in day if told.type.startswith("CASH_TRANS")
    ]

    assert set(digits) == set(range(10))
    assert set(bare) == {"ORDER_CANCELLATION.REJECTED"}
    assert any(len(date) == 10 for date in value_dates)


def test_amounts_are_decimal_strings_with_up_to_27_digits_and_unset_ones_are_empty(day):
    amounts = [
        value
        for told in day
        if told.type.startswith(("ORDER.", "EXECUTION.", "POSITION.", "CASH_BALANCE."))
        for name, value in told.event["object"].items()
        if name.endswith(("amount", "quantity", "price", "balance", "fee")) or "_for_" in name
    ]

    assert all(re.fullmatch(r"-?[0-9]{0,63}(\.[0-9]{1,27})?", amount) for amount in amounts)
    assert "" in amounts
    assert ".5" in amounts
    assert max(len(amount.partition(".")[2]) for amount in amounts) == 27


def test_the_parts_of_a_position_and_of_a_balance_add_up(day):
    for told in day:
        thing = told.event["object"]
        if told.type == "POSITION.UPDATED":
            locked = Decimal(thing["locked_for_trading"])
            assert add(locked, Decimal(thing["available_for_trading"])) == Decimal(
                thing["quantity"]
            )
            assert locked >= 0
        elif told.type == "CASH_BALANCE.UPDATED":
            assert Decimal(thing["locked_for_trading"]) >= 0
            assert Decimal(thing["available_for_withdrawal"]) <= Decimal(thing["balance"])


def test_nothing_stays_locked_or_pending_without_a_reason():
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


def test_instruments_have_valid_invented_isins_that_change_at_times(day):
    isins = defaultdict(set)
    for told in day:
        if told.type.startswith("INSTRUMENT."):
            isins[told.event["object"]["id"]].add(told.event["object"]["isin"])

    assert check_digit("US037833100") == "5"
    assert check_digit("DE000716460") == "0"
    for isin in set().union(*isins.values()):
        assert re.fullmatch(r"[A-Z]{2}[0-9A-Z]{9}[0-9]", isin)
        assert check_digit(isin[:-1]) == isin[-1]
    assert any(len(known) > 1 for known in isins.values())


def test_companies_hold_without_users_and_children_have_a_guardian(day):
    groups = [told.event["object"] for told in day if told.type == "ACCOUNT_GROUP.CREATED"]
    roles = Counter(user["type"] for group in groups for user in group.get("users", ()))
    orders = [told.event["object"] for told in day if told.type == "ORDER.NEW"]

    assert roles["CHILD"] == roles["GUARDIAN"] > 0
    assert any("users" not in group and "business_id" in group for group in groups)
    assert any("user_id" not in order and "business_id" in order for order in orders)
    assert {group["type"] for group in groups} == {"PERSONAL", "CHILD", "LEGAL_ENTITY"}


def test_a_reversal_now_and_then_shares_the_id_of_its_entry(day):
    kinds = defaultdict(set)
    for told in day:
        if told.type == "CASH_TRANSACTION.EXECUTED":
            kinds[told.event["object"]["id"]].add(told.event["object"]["type"])

    assert {"ORDER_EXECUTION", "ORDER_EXECUTION_CANCELLATION"} in kinds.values()
    assert {"ORDER_EXECUTION_CANCELLATION"} in kinds.values()


def test_what_is_finished_is_forgotten():
    broker = Broker(5, customers=15)
    agenda = [
        len(broker._timeline._agenda)
        for number, _ in enumerate(broker.events(60_000))
        if number % 10_000 == 9_999
    ]

    assert max(agenda) < 1_500


def test_the_market_is_closed_at_weekends(day):
    placed = [told for told in day if told.type == "ORDER.NEW"]

    for told in placed:
        moment = datetime.fromtimestamp(told.occurred_ns // 10**9, UTC)
        assert moment.weekday() < 5
