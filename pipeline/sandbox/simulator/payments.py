"""Money in and out: direct debits, top-ups, withdrawals, charge backs, dividends."""

from collections.abc import Iterable
from decimal import Decimal
from typing import Final

from pipeline.sandbox.simulator.bookkeeping import Bookkeeper
from pipeline.sandbox.simulator.exact import ZERO, add, cents, multiply, negate, subtract
from pipeline.sandbox.simulator.market import Instrument, Market
from pipeline.sandbox.simulator.parties import Account, Group, Tax
from pipeline.sandbox.simulator.timeline import DAY, Json, Timeline, business_day, date_text, day_of

_FUNDING: Final = ("50.00", "100.00", "250.00", "500.00", "1234.56", "2500.00", "12000.00")
_RATES: Final = ("0.12", "0.85", "1.5", "0.0333")
_TAX_RATE: Final = Decimal("0.26375")


class Payments:
    """Funds account groups, pays them out, and pays dividends to whoever holds.

    Args:
        timeline: Where events are emitted and steps are scheduled.
        bookkeeper: Moves the cash.
        market: The instruments that pay dividends.
        groups: All open account groups, read when a dividend is paid.
    """

    def __init__(
        self,
        timeline: Timeline,
        bookkeeper: Bookkeeper,
        market: Market,
        groups: Iterable[Group],
    ) -> None:
        self._timeline = timeline
        self._books = bookkeeper
        self._market = market
        self._groups = groups
        timeline.at(timeline.in_hours(DAY), self._announce_dividend)

    def fund(self, group: Group) -> None:
        """Start a payment into the group: a direct debit of its user, or a top-up."""
        amount = Decimal(self._timeline.pick(_FUNDING))
        if group.user_id is None or group.currency != "EUR" or self._timeline.chance(0.3):
            self._confirm_topup(group, amount)
        else:
            self._order_debit(group, amount)

    def withdraw(self, group: Group) -> None:
        """Start a payment of a part of what the group can withdraw, if that is anything."""
        cash = self._books.cash(group, group.currency)
        percent = Decimal(self._timeline.between(5, 60)).scaleb(-2)
        amount = cents(multiply(cash.withdrawable, percent))
        if amount <= 1 or group.user_id is None:
            return
        timeline = self._timeline
        created_at = timeline.stamp()
        withdrawal: Json = {
            "id": timeline.uuid(),
            "created_at": created_at,
            "updated_at": created_at,
            "reference_account_id": timeline.uuid(),
            "account_group_id": group.id,
            "user_id": group.user_id,
            "amount": str(amount),
            "currency": group.currency,
            "remittance_information": timeline.pick(("Auszahlung", "")),
            "status": "NEW",
        }
        timeline.emit(group.key, "WITHDRAWAL.NEW", withdrawal)
        cash.leaving = add(cash.leaving, amount)
        self._books.tell_cash(group, group.currency)
        timeline.after((30, 3600), self._pay_out, group, withdrawal, amount)

    def _pay_out(self, group: Group, withdrawal: Json, amount: Decimal) -> None:
        self._tell_withdrawal(group, withdrawal, "PROCESSING")
        cash = self._books.cash(group, group.currency)
        cash.leaving = subtract(cash.leaving, amount)
        cause = [("WITHDRAWAL", withdrawal["id"])]
        self._books.book_cash(group, "WITHDRAWAL", negate(amount), group.currency, cause)
        self._books.tell_cash(group, group.currency)
        self._timeline.after((3600, 90_000), self._finish_withdrawal, group, withdrawal, amount)

    def _finish_withdrawal(self, group: Group, withdrawal: Json, amount: Decimal) -> None:
        if not self._timeline.chance(0.06):
            self._tell_withdrawal(group, withdrawal, "CONFIRMED")
            return
        self._tell_withdrawal(group, withdrawal, "CANCELLED", reason="RETURNED_BY_BANK")
        cause = [("WITHDRAWAL", withdrawal["id"])]
        self._books.book_cash(group, "WITHDRAWAL_CANCELLATION", amount, group.currency, cause)
        self._books.tell_cash(group, group.currency)

    def _tell_withdrawal(
        self, group: Group, withdrawal: Json, status: str, *, reason: str | None = None
    ) -> None:
        reported = {**withdrawal, "updated_at": self._timeline.stamp(), "status": status}
        if reason is not None:
            reported["cancellation_reason"] = reason
        self._timeline.emit(group.key, f"WITHDRAWAL.{status}", reported)

    def _order_debit(self, group: Group, amount: Decimal) -> None:
        timeline = self._timeline
        debit: Json = {
            "id": timeline.uuid(),
            "created_at": timeline.stamp(),
            "user_id": group.user_id,
            "account_group_id": group.id,
            "mandate_id": group.mandate_id,
            "cash_amount": str(amount),
            "currency": group.currency,
            "remittance_information": timeline.pick(("Sparrate", "", "Depot")),
            "status": "NEW",
        }
        timeline.emit(group.key, "DIRECT_DEBIT.NEW", debit)
        timeline.after((10, 120), self._process_debit, group, debit, amount)

    def _process_debit(self, group: Group, debit: Json, amount: Decimal) -> None:
        reported = {**debit, "status": "PROCESSING"}
        self._timeline.emit(group.key, "DIRECT_DEBIT.PROCESSING", reported)
        self._timeline.after((30, 1800), self._finish_debit, group, debit, amount)

    def _finish_debit(self, group: Group, debit: Json, amount: Decimal) -> None:
        timeline = self._timeline
        if timeline.chance(0.04):
            reported = {**debit, "status": "CANCELLED", "cancellation_reason": "REJECTED_BY_BANK"}
            timeline.emit(group.key, "DIRECT_DEBIT.CANCELLED", reported)
            return
        timeline.emit(group.key, "DIRECT_DEBIT.CONFIRMED", {**debit, "status": "CONFIRMED"})
        cause = [("DIRECT_DEBIT", debit["id"])]
        self._books.book_cash(group, "SEPA_DIRECT_DEBIT", amount, group.currency, cause)
        self._books.tell_cash(group, group.currency)
        if timeline.chance(0.03):
            timeline.at(timeline.in_hours(DAY), self._charge_back, group, debit, amount)

    def _charge_back(self, group: Group, debit: Json, amount: Decimal) -> None:
        """The bank takes the money back, also where it is spent: the balance may go below zero."""
        kind = "SEPA_DIRECT_DEBIT_CHARGE_BACK"
        cause = [("DIRECT_DEBIT", debit["id"])]
        self._books.book_cash(group, kind, negate(amount), group.currency, cause)
        self._books.tell_cash(group, group.currency)

    def _confirm_topup(self, group: Group, amount: Decimal) -> None:
        timeline = self._timeline
        topup: Json = {
            "id": timeline.uuid(),
            "account_group_id": group.id,
            "settlement_reference": timeline.uuid(),
            "cash_amount": str(amount),
            "currency": group.currency,
            "created_at": timeline.stamp(),
            "status": "CONFIRMED",
        }
        timeline.emit(group.key, "TOPUP.CONFIRMED", topup)
        cause = [("TOPUP", topup["id"])]
        self._books.book_cash(group, "TOPUP", amount, group.currency, cause)
        self._books.tell_cash(group, group.currency)
        timeline.after((60, 7200), self._finish_topup, group, topup, amount)

    def _finish_topup(self, group: Group, topup: Json, amount: Decimal) -> None:
        timeline = self._timeline
        cash = self._books.cash(group, group.currency)
        if cash.withdrawable < amount or not timeline.chance(0.02):
            timeline.emit(group.key, "TOPUP.SETTLED", {**topup, "status": "SETTLED"})
            return
        timeline.emit(group.key, "TOPUP.CANCELLED", {**topup, "status": "CANCELLED"})
        cause = [("TOPUP", topup["id"])]
        self._books.book_cash(group, "BALANCE_CORRECTION", negate(amount), group.currency, cause)
        self._books.tell_cash(group, group.currency)

    def _announce_dividend(self) -> None:
        """About once a day, an instrument announces a dividend, paid two business days later."""
        timeline = self._timeline
        instrument = timeline.pick(self._market.all)
        today = day_of(timeline.now_ns)
        payment_day = business_day(today, later=2)
        rate = timeline.pick(_RATES)
        movement = {"payment_date": date_text(payment_day), "gross_rate": rate}
        action: Json = {
            "id": timeline.uuid(),
            "iso_type": "DVCA",
            "name": "CASH_DIVIDEND",
            "instrument": {**instrument.reference(), "name": instrument.name},
            "currency_denomination": instrument.currency,
            "mandatory_voluntary_indicator": "MANDATORY",
            "announcement_status": "PRELIMINARY_ANNOUNCEMENT_CONFIRMED",
            "function_of_message": "NEW",
            "announcement_date": date_text(today),
            "ex_date": date_text(business_day(today, later=1)),
            "options": [{"type": "CASH", "default": True, "cash_movements": [movement]}],
        }
        timeline.emit(instrument.key, "CORPORATE_ACTION.UPDATED", action)
        timeline.at(
            timeline.on_day(payment_day, 8), self._pay_dividend, instrument, action, Decimal(rate)
        )
        timeline.at(timeline.in_hours(DAY), self._announce_dividend)

    def _pay_dividend(self, instrument: Instrument, action: Json, rate: Decimal) -> None:
        timeline = self._timeline
        reported = {
            **action,
            "announcement_status": "COMPLETE",
            "function_of_message": "REPLACEMENT",
        }
        timeline.emit(instrument.key, "CORPORATE_ACTION.UPDATED", reported)
        for group in self._groups:
            for account in group.accounts:
                position = account.positions.get(instrument.id)
                if position is not None and position.quantity > 0:
                    gross = cents(multiply(position.quantity, rate))
                    timeline.after(
                        (1, 3_600), self._credit, account, instrument, action["id"], gross
                    )

    def _credit(
        self, account: Account, instrument: Instrument, action_id: str, gross: Decimal
    ) -> None:
        timeline = self._timeline
        group = account.group
        tax = cents(multiply(gross, _TAX_RATE))
        net = subtract(gross, tax)
        if net <= ZERO:
            return
        causes = [
            ("CORPORATE_ACTION", action_id),
            ("CORPORATE_ACTION_TRANSACTION_ID", timeline.uuid()),
        ]
        withheld = Tax(tax, instrument.currency) if tax else None
        entry_id = self._books.book_cash(
            group,
            "CASH_DIVIDEND",
            net,
            instrument.currency,
            causes,
            account=account,
            instrument=instrument,
            tax=withheld,
        )
        if timeline.chance(0.04):
            # Booked by mistake and taken back at once, under the same id, as in an example of
            # Upvest's; the tax keeps its sign there.
            self._books.book_cash(
                group,
                "CASH_DIVIDEND_CANCELLATION",
                negate(net),
                instrument.currency,
                causes,
                account=account,
                instrument=instrument,
                tax=withheld,
                entry_id=entry_id,
            )
        self._books.tell_cash(group, instrument.currency)
