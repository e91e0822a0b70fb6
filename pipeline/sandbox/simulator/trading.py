"""Orders from NEW to settlement: partial fills, cancellations, mistrades, reversals."""

from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, Literal

from pipeline.sandbox.simulator.bookkeeping import Bookkeeper, Reference
from pipeline.sandbox.simulator.exact import (
    ZERO,
    add,
    cents,
    cents_up,
    multiply,
    negate,
    part,
    plain,
    subtract,
    units,
)
from pipeline.sandbox.simulator.market import Instrument, Market
from pipeline.sandbox.simulator.parties import Account, Tax
from pipeline.sandbox.simulator.timeline import Json, Timeline, business_day, date_text, day_of

Side = Literal["BUY", "SELL"]

_FEES: Final = ("0", "0", "0", "0", "0.5", ".5", "1.00")
_REJECTIONS: Final = ("Order is already with the trading partner", "", None)


@dataclass(slots=True)
class Execution:
    """A part of an order that was traded."""

    id: str
    order: "Order"
    amount: Decimal
    quantity: Decimal
    price: Decimal
    tax: Decimal
    traded_at: str
    settlement_day: int
    status: str = "FILLED"
    cash_entry: str = ""
    units_entry: str = ""

    def object(self) -> Json:
        """The object of an EXECUTION event, and an element of an order's executions."""
        return {
            "id": self.id,
            "cash_amount": str(self.amount),
            "currency": self.order.instrument.currency,
            "order_id": self.order.id,
            "price": plain(self.price),
            "share_quantity": plain(self.quantity),
            "side": self.order.side,
            "status": self.status,
            "taxes": [{"type": "TOTAL", "amount": plain(self.tax)}],
            "transaction_time": self.traded_at,
            "settlement_date": date_text(self.settlement_day),
        }

    def causes(self) -> list[Reference]:
        """What the bookings of the execution refer to."""
        return [("ORDER_EXECUTION", self.id), ("ORDER", self.order.id)]


@dataclass(slots=True)
class Order:
    """An order by amount or by quantity, never both.

    Attributes:
        bound: The worst price at which it is filled; locks are made at that price.
        locked: Cash (buys) or units (sells) that it still holds.
        certain: It will be filled in full and settle.
        parts: Sizes of the executions to come.
        open_executions: How many executions are neither settled nor taken back.
    """

    id: str
    account: Account
    instrument: Instrument
    isin: str
    side: Side
    kind: str
    amount: Decimal | None
    quantity: Decimal | None
    bound: Decimal
    fee: str
    extras: Json
    created_at: str
    updated_at: str
    certain: bool
    on_filled: Callable[[], None] | None
    on_settled: Callable[[], None] | None
    status: str = "NEW"
    reason: str | None = None
    locked: Decimal = ZERO
    parts: list[Decimal] = field(default_factory=list)
    executions: list[Execution] = field(default_factory=list)
    open_executions: int = 0

    @property
    def size(self) -> Decimal:
        """What is to be traded: the amount or the quantity."""
        return self.amount if self.amount is not None else self.quantity or ZERO

    def object(self) -> Json:
        """The object of an ORDER event."""
        thing: Json = {
            "id": self.id,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            "account_id": self.account.id,
            "cash_amount": "" if self.amount is None else str(self.amount),
            "currency": self.instrument.currency,
            "side": self.side,
            "instrument_id": self.isin,
            "instrument_id_type": "ISIN",
            "order_type": self.kind,
            "quantity": "" if self.quantity is None else plain(self.quantity),
            "limit_price": plain(self.bound) if self.kind == "LIMIT" else "",
            "stop_price": plain(self.bound) if self.kind == "STOP" else "",
            "status": self.status,
            "fee": self.fee,
            "initiation_flow": "API",
            "executions": [execution.object() for execution in self.executions],
            **self.extras,
        }
        if self.reason is not None:
            thing["cancellation_reason"] = self.reason
        return thing


class Desk:
    """Takes orders and leads each through its life, as Upvest's public documentation describes it.

    NEW, PROCESSING, then FILLED or CANCELLED; each execution FILLED, then SETTLED, seldom
    CANCELLED. ORDER.FILLED may be emitted before or after the EXECUTION.FILLED that completes it.

    A finished order is forgotten once its last execution has settled.
    """

    def __init__(self, timeline: Timeline, bookkeeper: Bookkeeper, market: Market) -> None:
        self._timeline = timeline
        self._books = bookkeeper
        self._market = market

    def buy(
        self,
        account: Account,
        instrument: Instrument,
        amount: Decimal,
        *,
        certain: bool = False,
        on_filled: Callable[[], None] | None = None,
        on_settled: Callable[[], None] | None = None,
    ) -> str | None:
        """Place an order to buy for about so much cash; None if there is too little for it.

        Args:
            account: Who buys.
            instrument: What.
            amount: At most the cash that is free.
            certain: The order will be filled in full and settle; for savings plans.
            on_filled: Called once the order is filled.
            on_settled: Called once all of it has settled.
        """
        timeline = self._timeline
        by_amount = certain or (instrument.fractional and timeline.chance(0.7))
        order = self._new_order(account, instrument, "BUY", by_amount=by_amount)
        order.certain, order.on_filled, order.on_settled = certain, on_filled, on_settled
        if by_amount:
            order.amount = order.locked = amount
        else:
            places = 4 if instrument.fractional and timeline.chance(0.3) else 0
            order.quantity = units(amount, order.bound, places)
            order.locked = cents_up(multiply(order.quantity, order.bound))
        if order.locked <= ZERO or self._books.cash(account.group, instrument.currency).free < (
            order.locked
        ):
            return None
        self._place(order)
        return order.id

    def sell(self, account: Account, instrument: Instrument) -> None:
        """Place an order to sell some or all free units of an instrument."""
        timeline = self._timeline
        free = self._books.position(account, instrument).free
        everything = timeline.chance(0.3)
        by_amount = not everything and instrument.fractional and timeline.chance(0.5)
        order = self._new_order(account, instrument, "SELL", by_amount=by_amount)
        if by_amount:
            per_mille = timeline.between(50, 900)
            order.amount = cents(multiply(part(free, per_mille, instrument.places), order.bound))
            order.locked = units(order.amount, order.bound, instrument.places)
        else:
            places = 4 if instrument.fractional else 0
            order.quantity = free if everything else part(free, timeline.between(100, 900), places)
            order.locked = order.quantity
        if ZERO < order.locked <= free and (order.amount is None or order.amount > ZERO):
            self._place(order)

    def _new_order(
        self, account: Account, instrument: Instrument, side: Side, *, by_amount: bool
    ) -> Order:
        timeline = self._timeline
        kind = "MARKET" if by_amount else timeline.pick(("MARKET", "LIMIT", "LIMIT", "STOP"))
        price = self._market.move(instrument)
        created_at = timeline.stamp()
        holder = account.group.holder
        extras: Json = {
            "client_reference": f"APP-{timeline.between(1, 10**6):06d}"
            if timeline.chance(0.5)
            else "",
        }
        extras["business_id" if account.group.user_id is None else "user_id"] = holder.id
        if timeline.chance(0.8):
            extras["execution_flow"] = timeline.pick(("STRAIGHT_THROUGH", "BLOCK"))
        if timeline.chance(0.5):
            extras["user_instrument_fit_acknowledgement"] = True
        if kind != "MARKET":
            last_day = business_day(day_of(timeline.now_ns), later=timeline.between(0, 20))
            extras["expiry_date"] = date_text(last_day)
        slack = Decimal("1.05") if side == "BUY" else Decimal("0.95")
        return Order(
            id=timeline.uuid(),
            account=account,
            instrument=instrument,
            isin=instrument.isin,
            side=side,
            kind=kind,
            amount=None,
            quantity=None,
            bound=cents(multiply(price, slack)),
            fee=timeline.pick(_FEES),
            extras=extras,
            created_at=created_at,
            updated_at=created_at,
            certain=False,
            on_filled=None,
            on_settled=None,
        )

    def _place(self, order: Order) -> None:
        timeline = self._timeline
        timeline.emit(order.account.group.key, "ORDER.NEW", order.object())
        self._lock(order, order.locked)
        waits = (60, 14_400) if order.kind != "MARKET" else (1, 60)
        if not order.certain and timeline.chance(0.05 if order.kind == "MARKET" else 0.2):
            timeline.after(waits, self._cancel, order)
        else:
            timeline.after(waits, self._process, order)

    def _lock(self, order: Order, change: Decimal) -> None:
        """Hold (or with a negative change, release) cash or units for the order, and tell."""
        account, instrument = order.account, order.instrument
        if order.side == "BUY":
            cash = self._books.cash(account.group, instrument.currency)
            cash.locked = add(cash.locked, change)
            self._books.tell_cash(account.group, instrument.currency)
        else:
            position = self._books.position(account, instrument)
            position.locked = add(position.locked, change)
            self._books.tell_position(account, instrument)

    def _tell(self, order: Order, status: str) -> None:
        order.status = status
        order.updated_at = self._timeline.stamp()
        self._timeline.emit(order.account.group.key, f"ORDER.{status}", order.object())

    def _tell_execution(self, execution: Execution, status: str) -> None:
        execution.status = status
        key = execution.order.account.group.key
        self._timeline.emit(key, f"EXECUTION.{status}", execution.object())

    def _process(self, order: Order) -> None:
        timeline = self._timeline
        self._tell(order, "PROCESSING")
        if timeline.chance(0.04):
            timeline.after((1, 5), self._reject_cancellation, order)
        if (order.amount is None or order.amount > 100) and timeline.chance(0.3):
            order.parts = self._split(order, timeline.between(2, 5))
        else:
            order.parts = [order.size]
        timeline.after((1, 90), self._fill, order)

    def _split(self, order: Order, count: int) -> list[Decimal]:
        """The order in ``count`` parts of its amount or quantity, the last one the rest."""
        places = 2
        if order.amount is None:
            places = 4 if order.instrument.fractional else 0
        parts = [part(order.size, 1000 // (count + 1), places) for _ in range(count - 1)]
        parts = [part for part in parts if part > ZERO]
        return [*parts, subtract(order.size, add(*parts))]

    def _reject_cancellation(self, order: Order) -> None:
        """A notice that changes nothing: the client wanted to cancel, too late."""
        rejection: Json = {"order_id": order.id, "status": "REJECTED"}
        reason = self._timeline.pick(_REJECTIONS)
        if reason is not None:
            rejection["reason"] = reason
        self._timeline.emit(
            order.account.group.key,
            "ORDER_CANCELLATION.REJECTED",
            rejection,
            bare_date=self._timeline.chance(0.1),
        )

    def _fill(self, order: Order) -> None:
        """Trade the next part; with the last one the order is filled."""
        timeline = self._timeline
        execution = self._execute(order, order.parts.pop(0))
        last = not order.parts
        told_before = last and timeline.chance(0.3)
        if told_before:
            self._tell(order, "FILLED")
        self._tell_execution(execution, "FILLED")
        self._book(execution, release=order.locked if last else None)
        if last:
            timeline.after((0, 30), self._complete, order, told_before)
        elif not order.certain and timeline.chance(0.12):
            timeline.after((60, 3600), self._cancel, order)
        else:
            timeline.after((1, 120), self._fill, order)
        if not order.certain and timeline.chance(0.006):
            timeline.after((900, 5400), self._mistrade, execution)
        else:
            settlement = timeline.on_day(execution.settlement_day, 6)
            timeline.at(settlement, self._settle, execution)

    def _execute(self, order: Order, size: Decimal) -> Execution:
        timeline = self._timeline
        instrument = order.instrument
        price = self._market.move(instrument)
        price = min(price, order.bound) if order.side == "BUY" else max(price, order.bound)
        if order.amount is None:
            quantity, amount = size, cents(multiply(size, price))
        else:
            quantity, amount = units(size, price, instrument.places), size
        taxed = order.side == "SELL" and timeline.chance(0.4)
        execution = Execution(
            id=timeline.uuid(),
            order=order,
            amount=amount,
            quantity=quantity,
            price=price,
            tax=part(amount, timeline.between(1, 60), 2) if taxed else ZERO,
            traded_at=timeline.stamp(),
            settlement_day=business_day(day_of(timeline.now_ns), later=instrument.settlement_days),
        )
        order.executions.append(execution)
        order.open_executions += 1
        return execution

    def _book(self, execution: Execution, *, release: Decimal | None) -> None:
        """Move cash against units; release the order's lock for this part, or all that is left."""
        order = execution.order
        account, instrument = order.account, order.instrument
        cash = self._books.cash(account.group, instrument.currency)
        position = self._books.position(account, instrument)
        if order.side == "BUY":
            freed = execution.amount if release is None else release
            delta, quantity = negate(execution.amount), execution.quantity
            cash.locked = subtract(cash.locked, freed)
            position.pending = add(position.pending, execution.quantity)
        else:
            freed = execution.quantity if release is None else release
            delta, quantity = subtract(execution.amount, execution.tax), negate(execution.quantity)
            position.locked = subtract(position.locked, freed)
            cash.pending = add(cash.pending, delta)
        order.locked = subtract(order.locked, freed)
        currency, causes = instrument.currency, execution.causes()
        tax = Tax(execution.tax, currency) if execution.tax else None
        execution.cash_entry = self._books.book_cash(
            account.group, "ORDER_EXECUTION", delta, currency, causes, account=account, tax=tax
        )
        execution.units_entry = self._books.book_units(
            account, instrument, "ORDER_EXECUTION", quantity, causes
        )
        self._books.tell_cash(account.group, currency)
        self._books.tell_position(account, instrument)

    def _complete(self, order: Order, told_before: bool) -> None:  # noqa: FBT001 - a step's argument
        if not told_before:
            self._tell(order, "FILLED")
        fee = cents(Decimal(order.fee))
        if fee:
            group, currency = order.account.group, order.instrument.currency
            cause = [("ORDER", order.id)]
            self._books.book_cash(
                group, "FEE_COLLECTION", negate(fee), currency, cause, account=order.account
            )
            self._books.tell_cash(group, currency)
        if order.on_filled is not None:
            order.on_filled()

    def _cancel(self, order: Order) -> None:
        """End the order, whatever was filled of it; what was filled stays."""
        order.reason = self._timeline.pick(
            (
                "CANCELLED_BY_CLIENT",
                "CANCELLED_BY_CLIENT",
                "CANCELLED_BY_TRADING_PARTNER",
                "CANCELLED_BY_UPVEST_PLATFORM",
                "CANCELLED_BY_UPVEST_OPERATIONS",
            )
        )
        self._tell(order, "CANCELLED")
        left, order.locked = order.locked, ZERO
        self._lock(order, negate(left))

    def _settle(self, execution: Execution) -> None:
        self._tell_execution(execution, "SETTLED")
        order = execution.order
        if order.side == "BUY":
            position = self._books.position(order.account, order.instrument)
            position.pending = subtract(position.pending, execution.quantity)
            self._books.tell_position(order.account, order.instrument)
        else:
            self._settle_cash(execution)
            self._books.tell_cash(order.account.group, order.instrument.currency)
        order.open_executions -= 1
        if order.open_executions == 0 and order.on_settled is not None:
            order.on_settled()

    def _settle_cash(self, execution: Execution) -> None:
        cash = self._books.cash(execution.order.account.group, execution.order.instrument.currency)
        cash.pending = subtract(cash.pending, subtract(execution.amount, execution.tax))

    def _mistrade(self, execution: Execution) -> None:
        """Take an execution back: it is cancelled, and its bookings are reversed."""
        timeline = self._timeline
        order = execution.order
        account, instrument = order.account, order.instrument
        self._tell_execution(execution, "CANCELLED")
        order.open_executions -= 1
        share_id = timeline.chance(0.5)
        if order.side == "BUY":
            delta, quantity = execution.amount, negate(execution.quantity)
            position = self._books.position(account, instrument)
            position.pending = subtract(position.pending, execution.quantity)
        else:
            delta = negate(subtract(execution.amount, execution.tax))
            quantity = execution.quantity
            self._settle_cash(execution)
        kind, causes = "ORDER_EXECUTION_CANCELLATION", execution.causes()
        self._books.book_cash(
            account.group,
            kind,
            delta,
            instrument.currency,
            causes,
            account=account,
            entry_id=execution.cash_entry if share_id else None,
        )
        self._books.book_units(
            account,
            instrument,
            kind,
            quantity,
            causes,
            entry_id=execution.units_entry if share_id else None,
        )
        self._books.tell_cash(account.group, instrument.currency)
        self._books.tell_position(account, instrument)
