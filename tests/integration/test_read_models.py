"""The read models, each from events as Upvest writes them: newest version, values, healing."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import permutations
from typing import Any

import pytest

from pipeline import catalogue
from tests.given import Given, contents, event, full, moment, sample_events, some_id

pytestmark = pytest.mark.both_postgres

PROJECTORS = {projector.name: projector for projector in catalogue.load().models}
TABLES = [table.name for projector in PROJECTORS.values() for table in projector.tables]
DIGITS_27 = "123456789.000000000000000000000000001"
SAMPLE = sample_events()


def sent(kind: str, at: str | float, **changes: Any) -> dict[str, Any]:
    """The sample's first event of a type, sent at another time, parts of its object changed.

    A change is named by its path: ``delta__amount``. Where the object has a time of its own it
    moves along.
    """
    sample = copy.deepcopy(next(dict(sent) for sent in SAMPLE if sent["type"] == kind))
    body = sample["object"]
    if "updated_at" in body:
        body["updated_at"] = moment(at)
    for path, value in changes.items():
        *outer, last = path.split("__")
        inside = body
        for step in outer:
            inside = inside.setdefault(step, {})
        inside[last] = value
    return dict(event(kind, body, at=at))


@dataclass(frozen=True)
class Case:
    """An early and a late state of one entity, as a read model receives them."""

    projector: str
    kind: str
    column: str
    early: Mapping[str, Any]
    late: Mapping[str, Any]
    wins: object
    same: Mapping[str, Any] = field(default_factory=dict)

    def at(self, moment: str, *, late: bool) -> dict[str, Any]:
        return sent(self.kind, moment, **self.same, **(self.late if late else self.early))


BY_TIME = [
    Case("users", "USER.CREATED", "status", {"status": "INACTIVE"}, {"status": "ACTIVE"}, "ACTIVE"),
    Case(
        "users", "USER.CREATED", "status", {"status": "ACTIVE"}, {"status": "INACTIVE"}, "INACTIVE"
    ),
    Case(
        "account_groups",
        "ACCOUNT_GROUP.CREATED",
        "status",
        {"status": "LOCKED"},
        {"status": "ACTIVE"},
        "ACTIVE",
    ),
    Case(
        "accounts",
        "ACCOUNT.CREATED",
        "status",
        {"status": "ACTIVE"},
        {"status": "LOCKED"},
        "LOCKED",
    ),
    Case("instruments", "INSTRUMENT.ONBOARDED", "name", {"name": "Old"}, {"name": "New"}, "New"),
    Case(
        "positions",
        "POSITION.UPDATED",
        "quantity",
        {"quantity": "9"},
        {"quantity": "0"},
        Decimal(0),
    ),
    Case(
        "cash_balances",
        "CASH_BALANCE.UPDATED",
        "balance",
        {"balance": "100"},
        {"balance": "-0.01"},
        Decimal("-0.01"),
    ),
    Case(
        "cash_transactions",
        "CASH_TRANSACTION.EXECUTED",
        "amount",
        {"delta__amount": "1.00"},
        {"delta__amount": "2.00"},
        Decimal(2),
    ),
    Case(
        "security_transactions",
        "SECURITY_TRANSACTION.EXECUTED",
        "quantity",
        {"delta__amount": "1"},
        {"delta__amount": "2"},
        Decimal(2),
    ),
]


@pytest.mark.parametrize("case", BY_TIME, ids=lambda case: f"{case.projector}-{case.wins}")
def test_the_newest_version_stays_whatever_arrives_after_it(given: Given, case: Case):
    """Upvest promises no order between partitions."""
    early, late = case.at("10:00:00", late=False), case.at("10:00:01", late=True)

    rows = given([late, early]).project(PROJECTORS[case.projector])
    given([late], partition=1)([early], partition=2)
    rows_again = given.project(PROJECTORS[case.projector])

    assert [getattr(row, case.column) for row in rows] == [case.wins]
    assert [getattr(row, case.column) for row in rows_again] == [case.wins]


def test_the_furthest_state_of_a_check_wins_not_the_latest_time(given: Given):
    """A check has no time of its own, and the clocks of events may differ."""
    passed = sent("USER_CHECK.CREATED", "10:00:00", status="PASSED")
    begun = sent("USER_CHECK.CREATED", "10:00:05", status="IN_PROGRESS")
    unknown = sent("USER_CHECK.CREATED", "10:00:09", status="UNDER_REVIEW")

    rows = given([unknown, passed, begun]).project(PROJECTORS["user_checks"])

    assert [row.status for row in rows] == ["PASSED"]


def test_a_check_without_status_is_a_row_too(given: Given):
    compliance = sent("USER_CHECK.CREATED", "10:00:00", type="COMPLIANCE", status="")

    rows = given([compliance]).project(PROJECTORS["user_checks"])

    assert [(row.check_type, row.status) for row in rows] == [("COMPLIANCE", None)]


@pytest.mark.parametrize(
    ("kind", "end", "step"),
    [
        ("USER.CREATED", "OFFBOARDED", "ACTIVE"),
        ("ACCOUNT_GROUP.CREATED", "CLOSED", "LOCKED"),
        ("ACCOUNT.CREATED", "CLOSED", "CLOSING"),
    ],
)
def test_at_the_same_time_an_end_beats_a_step(given: Given, kind: str, end: str, step: str):
    projector = {"USER": "users", "ACCOUNT_GROUP": "account_groups", "ACCOUNT": "accounts"}
    ended = sent(kind, "10:00:00", status=end)
    moving = sent(kind, "10:00:00", status=step) | {"created_at": moment("10:00:03")}

    rows = given([ended, moving]).project(PROJECTORS[projector[kind.partition(".")[0]]])

    assert [row.status for row in rows] == [end]


def test_the_time_decides_between_alternating_states(given: Given):
    locked = sent("ACCOUNT.CREATED", "10:00:00", status="LOCKED")
    active = sent("ACCOUNT.CREATED", "10:00:00", status="ACTIVE") | {
        "created_at": moment("10:00:03")
    }

    rows = given([active, locked]).project(PROJECTORS["accounts"])

    assert [row.status for row in rows] == ["ACTIVE"]


def test_repeats_change_nothing(given: Given):
    """The same log again, behind itself and in another partition."""
    given(SAMPLE).project(*PROJECTORS.values())
    before = contents(given.engine, PROJECTORS.values(), machinery=False)
    once = contents(given.engine, PROJECTORS.values())

    given(SAMPLE).project(*PROJECTORS.values())
    after_repeat = contents(given.engine, PROJECTORS.values())
    given(SAMPLE, partition=1).project(*PROJECTORS.values())

    assert after_repeat == once
    assert contents(given.engine, PROJECTORS.values(), machinery=False) == before


def test_every_truncated_table_is_filled_again(given: Given):
    """Parents and children alike, and nothing else is harmed."""
    given(SAMPLE).project(*PROJECTORS.values())
    before = contents(given.engine, PROJECTORS.values())
    assert all(before[table] for table in TABLES)

    for table in TABLES:
        given.execute(f"TRUNCATE {full(table)}")
        assert given.rows(table) == []
        given.project(*PROJECTORS.values())
        assert contents(given.engine, PROJECTORS.values()) == before, table


# ------------------------------------------------------------------------------------------- values

UNSET = [
    ("users", "USER.CREATED", "salutation", "salutation"),
    ("users", "USER.CREATED", "birth_date", "birth_date"),
    ("users", "USER.CREATED", "address_line2", "address__address_line2"),
    ("users", "USER.CREATED", "nationalities", "nationalities"),
    ("users", "USER.CREATED", "postal_address", "postal_address"),
    ("users", "USER.CREATED", "fatca_status", "fatca__status"),
    ("users", "USER.CREATED", "tc_confirmed_at", "terms_and_conditions__confirmed_at"),
    ("user_checks", "USER_CHECK.CREATED", "document_expiration_date", "document_expiration_date"),
    ("user_checks", "USER_CHECK.CREATED", "suitability", "instrument_suitability__suitability"),
    ("account_groups", "ACCOUNT_GROUP.CREATED", "business_id", "business_id"),
    ("accounts", "ACCOUNT.CREATED", "name", "name"),
    ("accounts", "ACCOUNT.CREATED", "account_number", "account_number"),
    ("instruments", "INSTRUMENT.ONBOARDED", "wkn", "wkn"),
    ("instruments", "INSTRUMENT.ONBOARDED", "fractional_trading", "fractional_trading"),
    ("order_cancellation_rejections", "ORDER_CANCELLATION.REJECTED", "reason", "reason"),
    ("positions", "POSITION.UPDATED", "isin", "instrument__isin"),
    ("positions", "POSITION.UPDATED", "pending_settlement", "pending_settlement"),
    ("cash_balances", "CASH_BALANCE.UPDATED", "available_for_trading", "available_for_trading"),
    ("cash_transactions", "CASH_TRANSACTION.EXECUTED", "account_id", "account_id"),
    ("cash_transactions", "CASH_TRANSACTION.EXECUTED", "value_date", "value_date"),
    ("cash_transactions", "CASH_TRANSACTION.EXECUTED", "isin", "instrument__isin"),
    ("cash_transactions", "CASH_TRANSACTION.EXECUTED", "tax_details", "tax_details"),
    ("security_transactions", "SECURITY_TRANSACTION.EXECUTED", "isin", "instrument__isin"),
]


@pytest.mark.parametrize("unset", ["", None], ids=["empty", "null"])
def test_unset_is_null(given: Given, unset):
    changes: dict[str, dict[str, object]] = {}
    for _, kind, _, path in UNSET:
        changes.setdefault(kind, {})[path] = unset
    given([sent(kind, "10:00:00", **paths) for kind, paths in changes.items()])

    given.project(*PROJECTORS.values())

    assert given.query("SELECT * FROM pipeline.dead_letters") == []
    for projector, _, column, _ in UNSET:
        assert [getattr(row, column) for row in given.rows(projector)] == [None], column


def test_twenty_seven_digits_are_kept(given: Given):
    """More than a float or Python's ordinary decimal context holds."""
    given(
        [
            sent("POSITION.UPDATED", 1, quantity=DIGITS_27, locked_for_trading="-" + DIGITS_27),
            sent("SECURITY_TRANSACTION.EXECUTED", 2, delta__amount=DIGITS_27),
            sent("CASH_TRANSACTION.EXECUTED", 3, delta__amount=DIGITS_27),
            sent("CASH_BALANCE.UPDATED", 4, balance=DIGITS_27),
        ]
    )
    names = ["positions", "security_transactions", "cash_transactions", "cash_balances"]

    given.project(*(PROJECTORS[name] for name in names))

    exact = Decimal(DIGITS_27)
    (position,) = given.rows("positions")
    assert (position.quantity, position.locked_for_trading) == (exact, exact.copy_negate())
    assert [row.quantity for row in given.rows("security_transactions")] == [exact]
    assert [row.amount for row in given.rows("cash_transactions")] == [exact]
    assert [row.balance for row in given.rows("cash_balances")] == [exact]


REFUSED: list[tuple[str, str, str, dict[str, Any]]] = [
    ("users", "USER.CREATED", "birth_date", {"birth_date": "17.03.1988"}),
    ("users", "USER.CREATED", "user_id", {"id": "annika"}),
    ("users", "USER.CREATED", "fatca_status", {"fatca__status": "yes"}),
    ("user_checks", "USER_CHECK.CREATED", "check_confirmed_at", {"check_confirmed_at": "now"}),
    ("account_groups", "ACCOUNT_GROUP.CREATED", "user_id", {"users": [{"id": "x"}]}),
    ("accounts", "ACCOUNT.CREATED", "account_number", {"account_number": "1.5"}),
    ("accounts", "ACCOUNT.CREATED", "users", {"users": "nobody"}),
    ("instruments", "INSTRUMENT.ONBOARDED", "updated_at", {"updated_at": "yesterday"}),
    ("order_cancellation_rejections", "ORDER_CANCELLATION.REJECTED", "order_id", {"order_id": "7"}),
    ("positions", "POSITION.UPDATED", "quantity", {"quantity": "12,5"}),
    ("positions", "POSITION.UPDATED", "instrument_uuid", {"instrument__uuid": ""}),
    ("cash_balances", "CASH_BALANCE.UPDATED", "balance", {"balance": "NaN"}),
    ("cash_balances", "CASH_BALANCE.UPDATED", "currency", {"currency": None}),
    ("cash_transactions", "CASH_TRANSACTION.EXECUTED", "amount", {"delta__amount": "1 000"}),
    (
        "cash_transactions",
        "CASH_TRANSACTION.EXECUTED",
        "amount",
        {"taxes": [{"amount": "infinity"}]},
    ),
    (
        "cash_transactions",
        "CASH_TRANSACTION.EXECUTED",
        "booking_date",
        {"booking_date": "12/01/26"},
    ),
    (
        "security_transactions",
        "SECURITY_TRANSACTION.EXECUTED",
        "quantity",
        {"delta__amount": "0x1"},
    ),
]


def test_a_bad_value_rejects_only_its_event(given: Given):
    given(SAMPLE).project(*PROJECTORS.values())
    good = contents(given.engine, PROJECTORS.values(), machinery=False)
    bad = [sent(kind, "23:59:59", **changes) for _, kind, _, changes in REFUSED]
    given.execute(f"TRUNCATE {', '.join(map(full, TABLES))}")
    between = [SAMPLE[0], *bad, SAMPLE[1]]

    given(between, partition=1)(between, partition=1).project(*PROJECTORS.values())

    letters = given.query(
        'SELECT "offset", projector, column_name FROM pipeline.dead_letters ORDER BY 1, 2'
    )
    wanted = [(place, row[0], row[2]) for place, row in enumerate(REFUSED, start=1)]
    assert [tuple(letter) for letter in letters if letter.projector != "instrument_isins"] == wanted
    assert contents(given.engine, PROJECTORS.values(), machinery=False) == good


# ------------------------------------------------------------------------------- what each one says


def test_a_refused_change_of_data_never_touches_the_user(given: Given):
    """It names a user and carries nothing of it, not even where it has grown an id."""
    created = sent("USER.CREATED", "10:00:00")
    failed = sent("USER.DATA_CHANGE_FAILED", "11:00:00", id=created["object"]["id"], status="X")

    rows = given([created, failed]).project(PROJECTORS["users"])

    assert [(row.status, row.first_name) for row in rows] == [("INACTIVE", "Annika")]
    assert given.query("SELECT * FROM pipeline.dead_letters") == []


def test_a_user_has_an_address_and_consents(given: Given):
    agreed = {"consent_document_id": some_id("terms"), "confirmed_at": "2026-01-12T08:00:00Z"}
    created = sent(
        "USER.CREATED",
        "10:00:00",
        nationalities=["DE", "", "FR"],
        postal_address={"city": "Köln"},
        fatca={"status": False, "confirmed_at": "2026-01-12T09:00:00+02:00"},
        terms_and_conditions=agreed,
        tags=[],
    )

    (row,) = given([created]).project(PROJECTORS["users"])

    assert (row.address_city, row.address_postcode, row.address_line2) == ("Kiel", "24105", "7b")
    assert row.birth_date == date(1988, 3, 17)
    assert row.nationalities == ["DE", "FR"]
    assert row.postal_address == {"city": "Köln"}
    assert row.fatca_status is False
    assert row.fatca_confirmed_at == datetime(2026, 1, 12, 7, tzinfo=UTC)
    assert str(row.tc_document_id) == some_id("terms")
    assert row.dps_document_id is None
    assert row.tags == []


def test_social_security_numbers_are_in_no_table(given: Given):
    created = sent("USER.CREATED", "10:00:00", social_security_number="12 345678 A 901")

    given([created]).project(*PROJECTORS.values())

    for table in TABLES:
        assert (
            given.query(f"SELECT 1 FROM {full(table)} t WHERE to_jsonb(t)::text LIKE '%345678%'")
            == []
        )


def test_members_are_replaced_with_the_group(given: Given):
    guardian = {"id": some_id("guardian"), "type": "GUARDIAN"}
    child = {"id": some_id("child"), "type": "CHILD"}
    before = sent("ACCOUNT_GROUP.CREATED", "10:00:00", users=[child, guardian])
    after = sent("ACCOUNT_GROUP.CREATED", "10:00:01", users=[child])
    late = sent("ACCOUNT_GROUP.CREATED", "09:00:00", users=[guardian, guardian, child])

    given([before]).project(PROJECTORS["account_groups"])
    both = given.rows("account_group_users")
    given([after, late]).project(PROJECTORS["account_groups"])
    remaining = given.rows("account_group_users")

    assert [(str(row.user_id), row.role) for row in both] == [
        (some_id("child"), "CHILD"),
        (some_id("guardian"), "GUARDIAN"),
    ]
    assert [(str(row.user_id), row.role) for row in remaining] == [(some_id("child"), "CHILD")]


def test_a_member_without_role_does_not_reject_the_group(given: Given):
    """Upvest's schema requires neither the member's id nor its role."""
    group = sent("ACCOUNT_GROUP.CREATED", "10:00:00", users=[{"id": some_id("x")}, {}])

    given([group]).project(PROJECTORS["account_groups"])

    members = [(row.position, row.role) for row in given.rows("account_group_users")]
    assert members == [(1, None), (2, None)]


def test_a_group_of_a_business_has_no_members(given: Given):
    group = sent("ACCOUNT_GROUP.CREATED", "10:00:00", business_id=some_id("firm"))
    del group["object"]["users"]

    (row,) = given([group]).project(PROJECTORS["account_groups"])

    assert str(row.business_id) == some_id("firm")
    assert given.rows("account_group_users") == []


def test_account_numbers_keep_their_leading_zeros(given: Given):
    group = sent("ACCOUNT_GROUP.CREATED", "10:00:00", securities_account_number="000012345")

    (row,) = given([group]).project(PROJECTORS["account_groups"])

    assert row.securities_account_number == "000012345"


def test_an_entry_and_its_reversal_may_share_their_id(given: Given):
    entry = sent("CASH_TRANSACTION.EXECUTED", "10:00:00", type="FEE_COLLECTION", delta__amount="-5")
    undone = sent(
        "CASH_TRANSACTION.EXECUTED",
        "10:00:01",
        type="FEE_COLLECTION_CANCELLATION",
        delta__amount="5",
    )

    rows = given([undone, entry]).project(PROJECTORS["cash_transactions"])

    assert [(row.transaction_type, row.amount) for row in rows] == [
        ("FEE_COLLECTION", Decimal(-5)),
        ("FEE_COLLECTION_CANCELLATION", Decimal(5)),
    ]
    assert len({row.cash_transaction_id for row in rows}) == 1


def test_an_entry_s_taxes_and_references_keep_their_order_and_their_entry(given: Given):
    entry = sent(
        "CASH_TRANSACTION.EXECUTED",
        "10:00:00",
        taxes=[{"type": "TOTAL", "amount": "1.10", "currency": "EUR"}],
        references=[
            {"id": some_id("b"), "type": "ORDER"},
            {"id": some_id("a"), "type": "NEW_KIND"},
        ],
        tax_details=[{"anything": 1}],
    )

    (row,) = given([entry]).project(PROJECTORS["cash_transactions"])

    assert row.tax_details == [{"anything": 1}]
    (tax,) = given.rows("cash_transaction_taxes")
    assert (tax.cash_transaction_id, tax.transaction_type, tax.tax_type, tax.amount) == (
        row.cash_transaction_id,
        row.transaction_type,
        "TOTAL",
        Decimal("1.10"),
    )
    references = given.rows("cash_transaction_references")
    assert [
        (reference.position, str(reference.reference_id), reference.reference_type)
        for reference in references
    ] == [
        (1, some_id("b"), "ORDER"),
        (2, some_id("a"), "NEW_KIND"),
    ]


def test_a_value_date_may_be_a_bare_date(given: Given):
    entry = sent("CASH_TRANSACTION.EXECUTED", "10:00:00", value_date="2026-01-14")

    (row,) = given([entry]).project(PROJECTORS["cash_transactions"])

    assert row.value_date == datetime(2026, 1, 14, tzinfo=UTC)


def test_each_refused_cancellation_is_one_row_even_when_repeated(given: Given):
    first = sent("ORDER_CANCELLATION.REJECTED", "10:00:00", reason="too late")
    second = sent("ORDER_CANCELLATION.REJECTED", "10:00:01", reason="still too late")

    given([first, second, first])([second], partition=1)
    rows = given.project(PROJECTORS["order_cancellation_rejections"])

    assert {(row.reason, row.rejected_at) for row in rows} == {
        ("too late", datetime(2026, 1, 12, 10, 0, 0, tzinfo=UTC)),
        ("still too late", datetime(2026, 1, 12, 10, 0, 1, tzinfo=UTC)),
    }
    assert len(rows) == 2


def test_balances_of_the_same_second_are_ordered_by_offset(given: Given):
    """A fee collection gives several balances inside one second, with whole-second clocks."""
    given([sent("CASH_BALANCE.UPDATED", "10:00:00", balance=value) for value in ("9", "8", "7")])

    rows = given.project(PROJECTORS["cash_balances"])

    assert [row.balance for row in rows] == [Decimal(7)]
    assert rows[0].as_of == datetime(2026, 1, 12, 10, tzinfo=UTC)


# --------------------------------------------------------------------------------- instrument_isins

ISINS = [
    sent("INSTRUMENT.ONBOARDED", "10:00:00", isin="DE000OLD0001"),
    sent("INSTRUMENT.ONBOARDED", "11:00:00", isin="DE000OLD0001"),
    sent("INSTRUMENT.ONBOARDED", "12:00:00", isin="DE000NEW0001"),
]


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_every_isin_of_an_instrument_is_kept_in_any_order_of_arrival(given: Given, order):
    isins = PROJECTORS["instrument_isins"]

    for place in order:
        given([ISINS[place]], partition=place % 2).project(isins)
    given([ISINS[order[0]]], partition=2)

    def at(hour: int) -> datetime:
        return datetime(2026, 1, 12, hour, tzinfo=UTC)

    assert [(row.isin, row.first_seen, row.last_seen) for row in given.project(isins)] == [
        ("DE000NEW0001", at(12), at(12)),
        ("DE000OLD0001", at(10), at(11)),
    ]


def test_an_isin_is_valid_from_its_event_if_the_instrument_has_no_time(given: Given):
    untimed = sent("INSTRUMENT.ONBOARDED", "10:00:00", updated_at="")

    (row,) = given([untimed]).project(PROJECTORS["instrument_isins"])

    assert row.first_seen == row.last_seen == datetime(2026, 1, 12, 10, tzinfo=UTC)


def test_an_instrument_without_isin_has_no_row_of_isins(given: Given):
    given([sent("INSTRUMENT.ONBOARDED", "10:00:00", isin="")])

    assert given.project(PROJECTORS["instrument_isins"]) == []
    assert given.query("SELECT * FROM pipeline.dead_letters") == []


@pytest.mark.parametrize("changes", [{"id": "x"}, {"updated_at": "now"}, {"id": None}], ids=str)
def test_only_the_bad_event_of_an_instrument_is_a_dead_letter(given: Given, changes):
    good = [sent("INSTRUMENT.ONBOARDED", hour, isin=f"DE{hour:010}") for hour in range(20)]
    bad = sent("INSTRUMENT.ONBOARDED", "10:00:00", **changes)

    rows = given([*good[:7], bad, *good[7:]]).project(PROJECTORS["instrument_isins"])

    assert len(rows) == 20
    letters = given.query('SELECT projector, "offset" FROM pipeline.dead_letters')
    assert [tuple(letter) for letter in letters] == [("instrument_isins", 7)]
