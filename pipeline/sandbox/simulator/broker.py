"""A broker like Upvest's: the market, its customers, and what a customer does next."""

from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import Final

from pipeline.sandbox.simulator.bookkeeping import Bookkeeper
from pipeline.sandbox.simulator.exact import part
from pipeline.sandbox.simulator.market import Market
from pipeline.sandbox.simulator.onboarding import Onboarding
from pipeline.sandbox.simulator.parties import Account, Group, User
from pipeline.sandbox.simulator.payments import Payments
from pipeline.sandbox.simulator.savings import Savings
from pipeline.sandbox.simulator.timeline import HOUR, SECOND, SimulatedEvent, Timeline
from pipeline.sandbox.simulator.trading import Desk

_IDLE_HOURS: Final = 3.0
"""A customer does something every so many hours of trading, on average."""


class Broker:
    """Tells, in the order of time, what happens at a broker. The same arguments, the same events.

    Memory is bounded by customers, instruments and what has not settled yet, not by how long it
    runs.

    Args:
        seed: Everything random comes from it.
        customers: Account groups at which onboarding stops.
        start: The first day, YYYY-MM-DD; the market opens at seven in the morning (UTC).
    """

    def __init__(self, seed: int | str, *, customers: int = 400, start: str = "2026-01-05") -> None:
        midnight = datetime.combine(date.fromisoformat(start), datetime.min.time(), UTC)
        self._timeline = Timeline(seed, int(midnight.timestamp()) * SECOND + 7 * HOUR)
        self._groups: list[Group] = []
        self._books = Bookkeeper(self._timeline)
        self.market = Market(self._timeline)
        self._desk = Desk(self._timeline, self._books, self.market)
        self._savings = Savings(self._timeline, self._books, self._desk)
        self._payments = Payments(self._timeline, self._books, self.market, self._groups)
        Onboarding(self._timeline, customers=customers, on_open=self._welcome)

    def events(self, count: int | None) -> Iterator[SimulatedEvent]:
        """Exactly ``count`` events, or no end of them for None.

        Ends with every booking and its balance reported. May be called once.
        """

        def filler() -> None:
            self.market.list_one()

        return self._timeline.run(count, filler)

    def stop(self) -> None:
        """Let the events end after the step in hand."""
        self._timeline.stopped = True

    def _welcome(self, group: Group) -> None:
        self._groups.append(group)
        self._timeline.after((10, 600), self._payments.fund, group)
        self._timeline.after((900, 7200), self._act, group)

    def _act(self, group: Group) -> None:
        """What a customer does when they come by; they always come again."""
        timeline = self._timeline
        timeline.at(timeline.in_hours(self._idle()), self._act, group)
        if group.status != "ACTIVE" or group.holder.status != "ACTIVE":
            return
        account = timeline.pick(group.accounts)
        dice = timeline.random.random()
        if dice < 0.52:
            self._buy(account)
        elif dice < 0.76:
            self._sell(account)
        elif dice < 0.86:
            self._payments.fund(group)
        elif dice < 0.91:
            self._payments.withdraw(group)
        elif dice < 0.95:
            self._save(account)
        elif dice < 0.98:
            self._change_data(account)
        else:
            self._lock(account)

    def _idle(self) -> int:
        return int(self._timeline.random.expovariate(1 / _IDLE_HOURS) * HOUR)

    def _buy(self, account: Account) -> None:
        timeline = self._timeline
        free = self._books.cash(account.group, account.group.currency).free
        if free < 20:
            self._payments.fund(account.group)
            return
        instruments = self.market.tradable(account.group.currency)
        if instruments and account.status == "ACTIVE":
            amount = part(free, timeline.between(50, 600), 2)
            self._desk.buy(account, timeline.pick(instruments), amount)

    def _sell(self, account: Account) -> None:
        held = [
            instrument
            for instrument in self.market.tradable(account.group.currency)
            if instrument.id in account.positions and account.positions[instrument.id].free > 0
        ]
        if held and account.status == "ACTIVE":
            self._desk.sell(account, self._timeline.pick(held))

    def _save(self, account: Account) -> None:
        group = account.group
        instruments = [
            instrument
            for instrument in self.market.tradable(group.currency)
            if instrument.fractional
        ]
        if instruments and group.user_id is not None and group.plans < 3:
            self._savings.start(account, self._timeline.pick(instruments))

    def _change_data(self, account: Account) -> None:
        """New master data of the holder, the group or the account; sometimes refused."""
        timeline = self._timeline
        group, holder = account.group, account.group.holder
        dice = timeline.random.random()
        if dice < 0.2 and group.user_id is not None:
            refusal = {"user_id": holder.id, "reason": "Address could not be confirmed"}
            timeline.emit(holder.key, "USER.DATA_CHANGE_FAILED", refusal)
        elif dice < 0.6:
            holder.updated_at = timeline.stamp()
            address = dict(holder.data["address"])
            address["address_line1"] = f"Neue Straße {timeline.between(1, 200)}"
            holder.data = {**holder.data, "address": address}
            category = "USER" if isinstance(holder, User) else "BUSINESS"
            timeline.emit(holder.key, f"{category}.DATA_CHANGED", holder.object())
        elif dice < 0.8:
            account.name = timeline.pick(("Depot", "Ruhestand", "", "Kinder"))
            account.updated_at = timeline.stamp()
            timeline.emit(group.key, "ACCOUNT.UPDATED", account.object())
        else:
            group.updated_at = timeline.stamp()
            timeline.emit(group.key, "ACCOUNT_GROUP.UPDATED", group.object())

    def _lock(self, account: Account) -> None:
        """Lock an account or deactivate its user for some hours; both can go back."""
        timeline = self._timeline
        holder = account.group.holder
        until = timeline.in_hours(timeline.between(HOUR, 9 * HOUR))
        if isinstance(holder, User) and timeline.chance(0.4):
            self._set_user(holder, "DEACTIVATED", "INACTIVE")
            timeline.at(until, self._set_user, holder, "ACTIVATED", "ACTIVE")
        elif account.status == "ACTIVE":
            self._set_account(account, "LOCKED", "LOCKED")
            # Upvest has no event for unlocking: it is seen as a later state of the account.
            timeline.at(until, self._set_account, account, "UPDATED", "ACTIVE")

    def _set_user(self, user: User, action: str, status: str) -> None:
        user.status = status
        user.updated_at = self._timeline.stamp()
        self._timeline.emit(user.key, f"USER.{action}", user.object())

    def _set_account(self, account: Account, action: str, status: str) -> None:
        account.status = status
        account.updated_at = self._timeline.stamp()
        self._timeline.emit(account.group.key, f"ACCOUNT.{action}", account.object())
