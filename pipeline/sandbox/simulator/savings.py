"""Savings plans: set up once, executed every week, month or year by an order each."""

from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Final

from pipeline.sandbox.simulator.bookkeeping import Bookkeeper
from pipeline.sandbox.simulator.market import Instrument
from pipeline.sandbox.simulator.parties import Account
from pipeline.sandbox.simulator.timeline import DAY, Json, Timeline, business_day, date_text, day_of
from pipeline.sandbox.simulator.trading import Desk

_DAYS: Final = {"WEEK": 7, "MONTH": 30, "YEAR": 365}
_AMOUNTS: Final = ("25.00", "50.00", "75.50", "100.00")


@dataclass(slots=True)
class Plan:
    """A plan and the execution of it that comes next."""

    data: Json
    account: Account
    instrument: Instrument
    amount: Decimal
    days: int
    cancelled: bool = False


class Savings:
    """Sets up plans and executes them on their days.

    Args:
        timeline: Where events are emitted and steps are scheduled.
        bookkeeper: Knows how much cash there is.
        desk: Takes the orders.
    """

    def __init__(self, timeline: Timeline, bookkeeper: Bookkeeper, desk: Desk) -> None:
        self._timeline = timeline
        self._books = bookkeeper
        self._desk = desk

    def start(self, account: Account, instrument: Instrument) -> None:
        """Set up a plan for an instrument, first executed in one to six days."""
        timeline = self._timeline
        period = timeline.pick(("WEEK", "MONTH", "MONTH", "YEAR"))
        interval = timeline.pick((1, 1, 1, 3))
        amount = timeline.pick(_AMOUNTS)
        first_day = business_day(day_of(timeline.now_ns) + timeline.between(1, 6))
        created_at = timeline.stamp()
        data: Json = {
            "id": timeline.uuid(),
            "user_id": account.group.user_id,
            "account_id": account.id,
            "type": "INSTRUMENT",
            "cash_amount": amount,
            "currency": instrument.currency,
            "start_date": date_text(first_day),
            "period": period,
            "interval": interval,
            "created_at": created_at,
            "updated_at": created_at,
            "name": timeline.pick(("Rücklage", "", "Urlaub")),
            "instrument_id": instrument.isin,
            "instrument_id_type": "ISIN",
        }
        account.group.plans += 1
        timeline.emit(account.group.key, "SAVINGS_PLAN.CREATED", data)
        plan = Plan(data, account, instrument, Decimal(amount), _DAYS[period] * interval)
        timeline.after((1, 20), self._schedule, plan, first_day)
        if timeline.chance(0.2):
            timeline.at(timeline.in_hours(timeline.between(1, 60) * DAY), self._end, plan)

    def _end(self, plan: Plan) -> None:
        plan.cancelled = True
        plan.account.group.plans -= 1
        reported = {**plan.data, "updated_at": self._timeline.stamp()}
        self._timeline.emit(plan.account.group.key, "SAVINGS_PLAN.CANCELLED", reported)

    def _schedule(self, plan: Plan, day: int) -> None:
        if plan.cancelled:
            return
        timeline = self._timeline
        created_at = timeline.stamp()
        execution: Json = {
            "id": timeline.uuid(),
            "user_id": plan.data["user_id"],
            "account_id": plan.account.id,
            "savings_plan_id": plan.data["id"],
            "order_id": None,
            "cash_amount": plan.data["cash_amount"],
            "currency": plan.instrument.currency,
            "status": "NEW",
            "type": "INSTRUMENT",
            "execution_date": date_text(day),
            "created_at": created_at,
            "updated_at": created_at,
        }
        timeline.emit(plan.account.group.key, "SAVINGS_PLAN_EXECUTION.NEW", execution)
        timeline.at(timeline.on_day(day - 1, 16), self._remind, plan, execution)
        timeline.at(timeline.on_day(day, 9), self._execute, plan, execution, day)

    def _remind(self, plan: Plan, execution: Json) -> None:
        """A notice that repeats the execution and changes nothing in it, nor its time."""
        if not plan.cancelled:
            key = plan.account.group.key
            self._timeline.emit(key, "SAVINGS_PLAN_EXECUTION.REMINDER", execution)

    def _execute(self, plan: Plan, execution: Json, day: int) -> None:
        timeline = self._timeline
        if plan.cancelled:
            self._tell(plan, execution, "CANCELLED", cancellation_reason="CANCELLED_BY_CLIENT")
            return
        timeline.after((3_600, 18_000), self._schedule, plan, business_day(day + plan.days))
        free = self._books.cash(plan.account.group, plan.instrument.currency).free
        order_id = None
        ordered: Json = dict(execution)
        if free >= plan.amount and plan.instrument.active and plan.account.status == "ACTIVE":
            order_id = self._desk.buy(
                plan.account,
                plan.instrument,
                plan.amount,
                certain=True,
                on_filled=partial(self._tell, plan, ordered, "FILLED"),
                on_settled=partial(self._tell, plan, ordered, "SETTLED"),
            )
        if order_id is None:
            self._tell(plan, execution, "CANCELLED", cancellation_reason="INSUFFICIENT_FUNDS")
            return
        ordered["order_id"] = order_id
        self._tell(plan, ordered, "PROCESSING")

    def _tell(self, plan: Plan, execution: Json, status: str, **more: str) -> None:
        reported = {**execution, **more, "updated_at": self._timeline.stamp(), "status": status}
        self._timeline.emit(plan.account.group.key, f"SAVINGS_PLAN_EXECUTION.{status}", reported)
