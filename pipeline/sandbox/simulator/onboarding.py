"""How customers come: registered, checked, activated, given an account group and accounts."""

from collections.abc import Callable
from typing import Final

from pipeline.sandbox.simulator.parties import (
    Account,
    Business,
    Group,
    User,
    new_business,
    new_user,
)
from pipeline.sandbox.simulator.timeline import DAY, MINUTE, Json, Timeline, date_text, day_of

_ACCOUNT_NAMES: Final = ("Depot", "", "Rücklage", "Altersvorsorge", "Zweitdepot")


class Onboarding:
    """Brings in customers until the population is reached.

    Args:
        timeline: Where events are emitted and steps are scheduled.
        customers: How many account groups there will be.
        on_open: Called with every account group that has become active.
    """

    def __init__(
        self, timeline: Timeline, *, customers: int, on_open: Callable[[Group], None]
    ) -> None:
        self._timeline = timeline
        self._customers = customers
        self._on_open = on_open
        self._come = 0
        self._adults: list[User] = []
        timeline.after((900, 1200), self._arrive)

    def _arrive(self) -> None:
        timeline = self._timeline
        dice = timeline.random.random()
        if dice < 0.03:
            self._register_business()
        elif dice < 0.1 and self._adults:
            self._register_child(timeline.pick(self._adults))
        else:
            self._register_adult()
        self._come += 1
        if self._come < self._customers:
            # A rush on the first morning, then a few dozen a day.
            gap = (1, 4) if self._come < 15 else (6, 40)
            timeline.at(timeline.in_hours(timeline.between(*gap) * MINUTE), self._arrive)

    def _register_adult(self) -> None:
        user = new_user(self._timeline, child=False)
        self._timeline.emit(user.key, "USER.CREATED", user.object())
        checks = ["KYC", "INSTRUMENT_FIT"]
        if self._timeline.chance(0.3):
            checks.append("POR")
        self._timeline.after((2, 40), self._start_check, user, checks, 1)

    def _register_child(self, guardian: User) -> None:
        child = new_user(self._timeline, child=True, surname=str(guardian.data["last_name"]))
        self._timeline.emit(child.key, "USER.CREATED", child.object())
        self._timeline.after((60, 600), self._activate_child, child, guardian)

    def _activate_child(self, child: User, guardian: User) -> None:
        self._tell_user(child, "ACTIVATED", "ACTIVE")
        members: list[Json] = [
            {"id": child.id, "type": "CHILD"},
            {"id": guardian.id, "type": "GUARDIAN"},
        ]
        self._timeline.after((2, 30), self._create_group, child, "CHILD", members)

    def _start_check(self, user: User, checks: list[str], attempt: int) -> None:
        timeline = self._timeline
        kind, *rest = checks
        check_id = timeline.uuid()
        check: Json = {
            "id": check_id,
            "user_id": user.id,
            "type": kind,
            "status": "IN_PROGRESS",
            "check_confirmed_at": timeline.stamp(),
        }
        if kind == "INSTRUMENT_FIT":
            check["instrument_suitability"] = {"suitability": timeline.chance(0.8)}
        else:
            check["data_download_link"] = f"https://files.example.org/{kind.lower()}/{check_id}.zip"
            today = day_of(timeline.now_ns)
            if kind == "KYC":
                check["document_type"] = timeline.pick(("PASSPORT", "ID_CARD", "RESIDENCE_PERMIT"))
                check["document_expiration_date"] = date_text(today + timeline.between(90, 3000))
                check["nationality"] = user.country
                check["provider"] = "EXAMPLE_IDENT"
                check["method"] = timeline.pick(("VIDEO_ID", "ELECTRONIC_ID", "IN_PERSON_ID"))
            else:
                check["document_type"] = "UTILITY_BILL"
                check["issuance_date"] = date_text(today - timeline.between(1, 80))
                check["confirmed_address"] = user.data["address"]
        timeline.emit(user.key, "USER_CHECK.CREATED", check)
        timeline.after((20, 900), self._finish_check, user, check, rest, attempt)

    def _finish_check(self, user: User, check: Json, rest: list[str], attempt: int) -> None:
        timeline = self._timeline
        passed = not timeline.chance(0.08 if attempt == 1 else 0.4)
        status = "PASSED" if passed else "FAILED"
        done = {**check, "status": status, "check_confirmed_at": timeline.stamp()}
        timeline.emit(user.key, f"USER_CHECK.{status}", done)
        if passed and rest:
            timeline.after((2, 60), self._start_check, user, rest, 1)
        elif passed:
            timeline.after((2, 30), self._activate, user)
        elif attempt < 3:
            # A renewal is a check with an id of its own.
            again = [check["type"], *rest]
            timeline.after((600, 7200), self._start_check, user, again, attempt + 1)
        else:
            timeline.at(timeline.in_hours(DAY), self._offboard, user, "OFFBOARDING")

    def _activate(self, user: User) -> None:
        self._tell_user(user, "ACTIVATED", "ACTIVE")
        self._adults.append(user)
        members: list[Json] = [{"id": user.id, "type": "OWNER"}]
        self._timeline.after((1, 20), self._create_group, user, "PERSONAL", members)

    def _offboard(self, user: User, status: str) -> None:
        if status == "OFFBOARDING":
            self._tell_user(user, "OFFBOARDING_INITIATED", status)
            self._timeline.at(self._timeline.in_hours(DAY), self._offboard, user, "OFFBOARDED")
        else:
            self._tell_user(user, "OFFBOARDED", status)

    def _tell_user(self, user: User, action: str, status: str) -> None:
        user.status = status
        user.updated_at = self._timeline.stamp()
        self._timeline.emit(user.key, f"USER.{action}", user.object())

    def _register_business(self) -> None:
        business = new_business(self._timeline)
        self._timeline.emit(business.key, "BUSINESS.CREATED", business.object())
        self._timeline.after((60, 600), self._check_business, business)

    def _check_business(self, business: Business) -> None:
        timeline = self._timeline
        confirmed_at = timeline.stamp()
        check: Json = {
            "id": timeline.uuid(),
            "business_id": business.id,
            "type": "KYB",
            "status": "IN_PROGRESS",
            "originally_confirmed_at": confirmed_at,
            "check_confirmed_at": confirmed_at,
            "data_download_link": f"https://files.example.org/kyb/{business.id}.pdf",
        }
        timeline.emit(business.key, "BUSINESS_CHECK.CREATED", check)
        timeline.after((60, 1800), self._pass_business, business, {**check, "status": "PASSED"})

    def _pass_business(self, business: Business, check: Json) -> None:
        timeline = self._timeline
        timeline.emit(business.key, "BUSINESS_CHECK.PASSED", check)
        business.status = "ACTIVE"
        business.updated_at = timeline.stamp()
        timeline.emit(business.key, "BUSINESS.ACTIVATED", business.object())
        timeline.after((1, 20), self._create_group, business, "LEGAL_ENTITY", [])

    def _create_group(self, holder: User | Business, kind: str, members: list[Json]) -> None:
        timeline = self._timeline
        british = holder.data["address"]["country"] == "GB"
        created_at = timeline.stamp()
        group = Group(
            id=timeline.uuid(),
            kind=kind,
            number=f"{timeline.between(0, 10**9):09d}",
            currency="GBP" if british else "EUR",
            holder=holder,
            members=members,
            created_at=created_at,
            updated_at=created_at,
            mandate_id=timeline.uuid(),
        )
        timeline.emit(group.key, "ACCOUNT_GROUP.CREATED", group.object())
        self._create_account(group)
        if timeline.chance(0.2):
            self._create_account(group)
        timeline.after((2, 120), self._activate_group, group)

    def _create_account(self, group: Group) -> None:
        timeline = self._timeline
        created_at = timeline.stamp()
        account = Account(
            id=timeline.uuid(),
            group=group,
            number=len(group.accounts) + 1,
            kind="PORTFOLIO" if group.accounts and timeline.chance(0.3) else "TRADING",
            name=timeline.pick(_ACCOUNT_NAMES),
            created_at=created_at,
            updated_at=created_at,
        )
        group.accounts.append(account)
        timeline.emit(group.key, "ACCOUNT.CREATED", account.object())

    def _activate_group(self, group: Group) -> None:
        timeline = self._timeline
        group.status = "ACTIVE"
        group.updated_at = timeline.stamp()
        timeline.emit(group.key, "ACCOUNT_GROUP.ACTIVATED", group.object())
        for account in group.accounts:
            account.status = "ACTIVE"
            account.updated_at = timeline.stamp()
            timeline.emit(group.key, "ACCOUNT.ACTIVATED", account.object())
        self._on_open(group)
