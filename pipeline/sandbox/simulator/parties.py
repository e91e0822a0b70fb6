"""The parties: users, businesses, account groups and accounts, and the people behind them."""

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final, NamedTuple

from pipeline.sandbox.simulator.exact import ZERO, add, subtract
from pipeline.sandbox.simulator.timeline import Json, Timeline

_FIRST_NAMES: Final = (
    "Annika", "Jonas", "Mila", "Denis", "Zoë", "Björn", "Aylin", "Théo", "Saoirse", "Łukasz",
    "Nora", "Emeka", "Ines", "Viktor", "Hana", "Pía",
)  # fmt: skip
_LAST_NAMES: Final = (
    "Brodersen", "Marchetti", "O'Malley", "Öztürk", "Van der Veen", "Nowak", "Schäfer", "Lefèvre",
    "Hansen", "Kowalczyk", "Thiel", "Adeyemi",
)  # fmt: skip
_PLACES: Final = (
    # street, postcode, city, state, country
    ("Lindenallee", "24105", "Kiel", "SH", "DE"),
    ("Am Speicher", "20457", "Hamburg", "HH", "DE"),
    ("Rue des Tanneurs", "67000", "Strasbourg", "", "FR"),
    ("Gartenweg", "01097", "Dresden", "SN", "DE"),
    ("Harbour Lane", "BS1 4RW", "Bristol", "", "GB"),
    ("Deichstraße", "26723", "Emden", "NI", "DE"),
)
_SALUTATIONS: Final = ("", "", "SALUTATION_MALE", "SALUTATION_FEMALE", "SALUTATION_DIVERSE")
_TITLES: Final = ("", "", "", "", "DR", "PROF_DR", "DIPL_ING")
_TRADES: Final = ("Kontor", "Mühle", "Reederei", "Gärtnerei", "Werft")


class Tax(NamedTuple):
    """A part of an amount that went to the tax office."""

    amount: Decimal
    currency: str


@dataclass(slots=True)
class User:
    """A person as Upvest last reported them."""

    id: str
    data: Json
    created_at: str
    updated_at: str
    status: str = "INACTIVE"

    @property
    def key(self) -> bytes:
        """What the producer partitions by."""
        return self.id.encode()

    @property
    def country(self) -> str:
        """Where they live."""
        return str(self.data["address"]["country"])

    def object(self) -> Json:
        """The object of a USER event."""
        return {
            "id": self.id,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            **self.data,
            "status": self.status,
        }


@dataclass(slots=True)
class Business:
    """A company as Upvest last reported it."""

    id: str
    data: Json
    created_at: str
    updated_at: str
    status: str = "INACTIVE"

    @property
    def key(self) -> bytes:
        """What the producer partitions by."""
        return self.id.encode()

    def object(self) -> Json:
        """The object of a BUSINESS event."""
        return {
            "id": self.id,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            **self.data,
            "status": self.status,
        }


@dataclass(slots=True)
class Cash:
    """The cash of an account group in one currency."""

    balance: Decimal = ZERO
    locked: Decimal = ZERO
    leaving: Decimal = ZERO
    pending: Decimal = ZERO

    @property
    def free(self) -> Decimal:
        """What can be invested."""
        return subtract(self.balance, add(self.locked, self.leaving))

    @property
    def withdrawable(self) -> Decimal:
        """What can be paid out: not what was sold and is not settled."""
        return subtract(self.free, self.pending)


@dataclass(slots=True)
class Position:
    """The units of one instrument in one account."""

    quantity: Decimal = ZERO
    locked: Decimal = ZERO
    pending: Decimal = ZERO

    @property
    def free(self) -> Decimal:
        """What can be sold."""
        return subtract(self.quantity, self.locked)


@dataclass(slots=True)
class Group:
    """An account group: holds cash, and the accounts that hold securities."""

    id: str
    kind: str
    number: str
    currency: str
    holder: User | Business
    members: list[Json]
    created_at: str
    updated_at: str
    status: str = "PENDING_APPROVAL"
    accounts: list["Account"] = field(default_factory=list)
    cash: dict[str, Cash] = field(default_factory=dict)
    mandate_id: str = ""
    plans: int = 0

    @property
    def key(self) -> bytes:
        """What the producer partitions by: its holder's, so that a user's events stay in order."""
        return self.holder.key

    @property
    def user_id(self) -> str | None:
        """The person who holds it, None for a company."""
        return self.holder.id if isinstance(self.holder, User) else None

    def membership(self) -> Json:
        """The fields that say who holds it: users, or a business instead of them."""
        if isinstance(self.holder, Business):
            return {"business_id": self.holder.id}
        return {"users": [dict(member) for member in self.members]}

    def object(self) -> Json:
        """The object of an ACCOUNT_GROUP event."""
        return {
            "id": self.id,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            "type": self.kind,
            "status": self.status,
            **self.membership(),
            "securities_account_number": self.number,
        }


@dataclass(slots=True)
class Account:
    """An account: holds securities."""

    id: str
    group: Group
    number: int
    kind: str
    name: str
    created_at: str
    updated_at: str
    status: str = "PENDING_APPROVAL"
    positions: dict[str, Position] = field(default_factory=dict)

    def object(self) -> Json:
        """The object of an ACCOUNT event."""
        return {
            "id": self.id,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            "account_group_id": self.group.id,
            "type": self.kind,
            **self.group.membership(),
            "account_number": self.number,
            "name": self.name,
            "status": self.status,
        }


def new_user(timeline: Timeline, *, child: bool, surname: str | None = None) -> User:
    """A person nobody has met before."""
    street, postcode, city, state, country = timeline.pick(_PLACES)
    year = timeline.between(2010, 2022) if child else timeline.between(1946, 2005)
    address: Json = {
        "address_line1": f"{street} {timeline.between(1, 180)}",
        "postcode": postcode,
        "city": city,
        "country": country,
    }
    if state:
        address["state"] = state
    if timeline.chance(0.2):
        address["address_line2"] = timeline.pick(("", "c/o Nowak", "3. OG"))
    data: Json = {
        "first_name": timeline.pick(_FIRST_NAMES),
        "last_name": surname or timeline.pick(_LAST_NAMES),
        "salutation": timeline.pick(_SALUTATIONS),
        "title": "" if child else timeline.pick(_TITLES),
        "birth_date": f"{year}-{timeline.between(1, 13):02d}-{timeline.between(1, 29):02d}",
        "birth_city": city,
        "birth_country": country,
        "birth_name": "",
        "nationalities": [country, "TR"] if timeline.chance(0.1) else [country],
        "address": address,
        "postal_address": dict(address) if timeline.chance(0.1) else None,
    }
    if timeline.chance(0.3):
        user_mail = f"{data['first_name']}.{timeline.between(1, 9999)}@example.org".lower()
        data["email"] = user_mail
        data["phone_number"] = timeline.pick(("", "4943155501234"))
        data["fatca"] = {"status": False, "confirmed_at": timeline.stamp()}
    if timeline.chance(0.05):
        data["tags"] = ["CLIENT_EMPLOYEE"]
    created_at = timeline.stamp()
    return User(id=timeline.uuid(), data=data, created_at=created_at, updated_at=created_at)


def new_business(timeline: Timeline) -> Business:
    """A company nobody has met before."""
    street, postcode, city, _, country = timeline.pick(_PLACES)
    data: Json = {
        "name": f"{timeline.pick(_LAST_NAMES)} & {timeline.pick(_TRADES)} GmbH",
        "business_type": timeline.pick(("limited_company", "sole_trader")),
        "legal_entity_identifier": f"529900ZQ{timeline.between(0, 10**12):012d}",
        "address": {
            "address_line1": f"{street} {timeline.between(1, 180)}",
            "postcode": postcode,
            "city": city,
            "country": country,
        },
    }
    created_at = timeline.stamp()
    return Business(id=timeline.uuid(), data=data, created_at=created_at, updated_at=created_at)
