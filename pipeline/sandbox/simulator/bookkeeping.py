"""The only place that moves cash and units, and reports it: entry first, then the balance."""

from collections.abc import Sequence
from decimal import Decimal

from pipeline.sandbox.simulator.exact import add, plain
from pipeline.sandbox.simulator.market import Instrument
from pipeline.sandbox.simulator.parties import Account, Cash, Group, Position, Tax
from pipeline.sandbox.simulator.timeline import Json, Timeline

Reference = tuple[str, str]
"""(type, id) of what caused an entry."""


class Bookkeeper:
    """Books entries and reports balances, so that a balance always is the sum of its entries.

    Upvest's public documentation: a reversal is a new entry with the opposite sign and its own
    type; the first entry is never changed.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def cash(self, group: Group, currency: str) -> Cash:
        """The group's cash in a currency, opened with nothing on first use."""
        return group.cash.setdefault(currency, Cash())

    def position(self, account: Account, instrument: Instrument) -> Position:
        """The account's units of an instrument, opened with nothing on first use."""
        return account.positions.setdefault(instrument.id, Position())

    def book_cash(
        self,
        group: Group,
        kind: str,
        amount: Decimal,
        currency: str,
        references: Sequence[Reference],
        *,
        account: Account | None = None,
        instrument: Instrument | None = None,
        tax: Tax | None = None,
        entry_id: str | None = None,
    ) -> str:
        """Book a change of cash and report it; returns the entry's id.

        Args:
            group: Whose cash changes.
            kind: The entry's type, such as ORDER_EXECUTION.
            amount: Plus is in, minus is out; after tax.
            currency: Of amount and tax.
            references: What caused the entry.
            account: The account concerned, where there is one.
            instrument: The instrument that paid, for corporate actions.
            tax: What went to the tax office instead; information only.
            entry_id: The id of the entry that this one reverses, to share it: the public examples
                do so now and then, so (id, type) is the key.
        """
        timeline = self._timeline
        cash = self.cash(group, currency)
        cash.balance = add(cash.balance, amount)
        booked_at = timeline.stamp()
        entry_id = entry_id or timeline.uuid()
        entry: Json = {
            "id": entry_id,
            "account_group_id": group.id,
            "booking_date": booked_at,
            "created_at": booked_at,
            "updated_at": booked_at,
            # Bare dates where a time is expected were met in the guides.
            "value_date": booked_at[:10] if timeline.chance(0.05) else booked_at,
            "delta": {"amount": str(amount), "currency": currency},
            "references": [{"id": of, "type": reference} for reference, of in references],
            "taxes": [],
            "type": kind,
        }
        if tax is not None:
            entry["taxes"] = [{"type": "TOTAL", "amount": str(tax.amount), "currency": currency}]
        if account is not None:
            entry["account_id"] = account.id
        if instrument is not None:
            entry["instrument"] = instrument.reference()
        timeline.emit(group.key, "CASH_TRANSACTION.EXECUTED", entry)
        return entry_id

    def tell_cash(self, group: Group, currency: str) -> None:
        """Tell the balance, after entries or locks have changed it."""
        cash = self.cash(group, currency)
        balance: Json = {
            "account_group_id": group.id,
            "currency": currency,
            "balance": plain(cash.balance),
            "locked_for_trading": plain(cash.locked),
            "pending_settlement": plain(cash.pending),
            "available_for_withdrawal": plain(cash.withdrawable),
            "available_for_trading": plain(cash.free),
        }
        self._timeline.emit(group.key, "CASH_BALANCE.UPDATED", balance)

    def book_units(
        self,
        account: Account,
        instrument: Instrument,
        kind: str,
        quantity: Decimal,
        references: Sequence[Reference],
        *,
        entry_id: str | None = None,
    ) -> str:
        """Book a change of units and report it; returns the entry's id."""
        timeline = self._timeline
        position = self.position(account, instrument)
        position.quantity = add(position.quantity, quantity)
        booked_at = timeline.stamp()
        entry_id = entry_id or timeline.uuid()
        entry: Json = {
            "id": entry_id,
            "account_group_id": account.group.id,
            "account_id": account.id,
            "booking_date": booked_at,
            "created_at": booked_at,
            "updated_at": booked_at,
            "value_date": booked_at,
            "delta": {"amount": plain(quantity)},
            "instrument": instrument.reference(),
            "references": [{"id": of, "type": reference} for reference, of in references],
            "type": kind,
        }
        timeline.emit(account.group.key, "SECURITY_TRANSACTION.EXECUTED", entry)
        return entry_id

    def tell_position(self, account: Account, instrument: Instrument) -> None:
        """Tell the position, after entries or locks have changed it; a closed one as 0."""
        position = self.position(account, instrument)
        reported: Json = {
            "account_id": account.id,
            "instrument": instrument.reference(),
            "quantity": plain(position.quantity),
            "locked_for_trading": plain(position.locked),
            "pending_settlement": plain(position.pending),
            "available_for_trading": plain(position.free),
        }
        if self._timeline.chance(0.5):
            reported["available_for_instruction"] = plain(position.quantity)
        self._timeline.emit(account.group.key, "POSITION.UPDATED", reported)
