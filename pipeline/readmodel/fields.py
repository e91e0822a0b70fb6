"""The columns of a read model: what they mean, where their values stand in an event, what is legal.

Every value is read as text, ``""`` becomes NULL, its shape is checked and it is cast. PostgreSQL's
casts alone would take ``now``, ``infinity``, ``NaN`` or ``12.01.2026`` without a word.
"""

import re
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from typing import Any

from sqlalchemy import Boolean, Date, DateTime, Integer, Numeric, Text, Uuid
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import TypeEngine

_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_COLUMN = re.compile(r"[a-z][a-z0-9_]*")
_LOOKS_PERSONAL = re.compile(
    r"(^|[._])((fore|sur)?names?|birth(day)?|gender|salutation|title|nationalit(y|ies)|address|street|"
    r"city|postcode|zip|(tele)?phone|mobile|e?mail|iban|bic|account_number|tax|tin|ssn|social|passport|"
    r"religion|church|fatca|counterparty|beneficiary|payer|payee)([0-9]*$|[._])"
)
PERSONAL_REMARK = " Personal data."
"""Behind the comment of each column that holds personal data, in the database too."""


class Shape(Enum):
    """Which rule a text must follow before it is cast; the names are those of ``first_fault``."""

    FREE = "free"
    UUID = "uuid"
    NUMBER = "number"
    INTEGER = "integer"
    TIME = "time"
    DATE = "date"
    BOOLEAN = "boolean"
    JSON = "json"
    LIST = "list"
    ENVELOPE = "envelope"


@dataclass(frozen=True)
class Kind:
    """A kind of value: its type in PostgreSQL, its shape, and how its text becomes that type.

    Attributes:
        cast: SQL with ``{}`` for the value, which is NULL where it is unset.
    """

    type: TypeEngine[Any]
    shape: Shape
    cast: str


# The order of a list is kept; elements that are unset are left out.
_TEXT_LIST = (
    "CASE WHEN {0} IS NOT NULL THEN ARRAY(SELECT l.item FROM jsonb_array_elements_text({0}) "
    "WITH ORDINALITY AS l(item, place) WHERE l.item <> '' ORDER BY l.place) END"
)

_UUID = Kind(Uuid(), Shape.UUID, "CAST({} AS uuid)")
_TEXT = Kind(Text(), Shape.FREE, "{}")
_NUMERIC = Kind(Numeric(), Shape.NUMBER, "CAST({} AS numeric)")
_INTEGER = Kind(Integer(), Shape.INTEGER, "CAST({} AS integer)")
_TIME = Kind(DateTime(timezone=True), Shape.TIME, "CAST({} AS timestamptz)")
_DATE = Kind(Date(), Shape.DATE, "CAST(left({}, 10) AS date)")
_BOOLEAN = Kind(Boolean(), Shape.BOOLEAN, "CAST({} AS boolean)")
_JSON = Kind(JSONB(), Shape.JSON, "{}")
_LIST = Kind(ARRAY(Text()), Shape.LIST, _TEXT_LIST)
# Read from the log's own columns; the path of such a field is the column's name.
_ENVELOPE_TIME = Kind(DateTime(timezone=True), Shape.ENVELOPE, "{}")
_ENVELOPE_ID = Kind(Uuid(), Shape.ENVELOPE, "{}")


@dataclass(frozen=True)
class Field:
    """A column of a read model.

    Attributes:
        column: Name of the column.
        path: Place of the value in the event's ``object``, with dots: ``delta.amount``.
        comment: What an analyst reads about the column.
        kind: What kind of value it is.
        ranks: For a status: the rank of each known value.
        unknown_rank: For a status: the rank of any other value.
        personal: Whether it holds personal data, so that only some may see it. None is no, but will
            not do for a column or path that looks like yes.
    """

    column: str
    path: str
    comment: str
    kind: Kind
    ranks: tuple[tuple[str, int], ...] = ()
    unknown_rank: int = 0
    personal: bool | None = None

    def __post_init__(self) -> None:
        if not _COLUMN.fullmatch(self.column):
            raise ValueError(f"{self.column!r} is not a name for a column")
        if not _PATH.fullmatch(self.path):
            raise ValueError(f"column {self.column}: {self.path!r} is not a path like delta.amount")
        if not self.comment:
            raise ValueError(f"column {self.column} has no comment")
        refuse_unclassified(self.column, self.path, self.personal)

    @property
    def remark(self) -> str:
        """The comment, as it stands in the database."""
        return self.comment + (PERSONAL_REMARK if self.personal else "")

    @property
    def segments(self) -> Sequence[str]:
        """The path, taken apart."""
        return self.path.split(".")


def refuse_unclassified(column: str, path: str, personal: object) -> None:
    """Raise for a column that looks personal and of which nobody has said whether it is.

    Raises:
        ValueError: It does; the text says what to write.
    """
    if personal is None and looks_personal(column, path):
        raise ValueError(
            f"column {column} looks as if it held personal data: say personal=True or "
            "personal=False"
        )


def looks_personal(*names: str) -> bool:
    """Whether columns or paths are called like what tells of a person."""
    return any(_LOOKS_PERSONAL.search(name.lower()) for name in names)


def uuid(column: str, path: str, comment: str, *, personal: bool | None = None) -> Field:
    """An id."""
    return Field(column, path, comment, _UUID, personal=personal)


def text(column: str, path: str, comment: str, *, personal: bool | None = None) -> Field:
    """Any text, as it came."""
    return Field(column, path, comment, _TEXT, personal=personal)


Step = str | Set[str]
"""One state, or several that stand side by side."""


def enum(
    column: str,
    path: str,
    comment: str,
    *,
    steps: Iterable[Step] = (),
    ends: Sequence[Step] | Set[str] = (),
    personal: bool | None = None,
) -> Field:
    """One of a list of words that grows without notice, so any word is taken.

    With ``steps`` and ``ends`` it is the status that the newest version is told by, where the times
    cannot tell: a later state beats an earlier one, and a state that we do not know stands behind
    all steps and before all ends. A tuple is an order; a set stands side by side.

    Args:
        column: Name of the column.
        path: Place in the event's ``object``.
        comment: What it says.
        steps: States that may be left again: ``("NEW", "PROCESSING")``.
        ends: States that are final: ``{"FILLED", "CANCELLED"}``.
        personal: Whether it holds personal data; None is no.
    """
    levels = [*steps]
    last = [ends] if isinstance(ends, Set) and ends else [*ends]
    if not levels and not last:
        return Field(column, path, comment, _TEXT, personal=personal)
    ranked = [*levels, None, *last]
    ranks = {
        state: rank
        for rank, level in enumerate(ranked, start=1)
        if level is not None
        for state in sorted({level} if isinstance(level, str) else level)
    }
    return Field(column, path, comment, _TEXT, tuple(ranks.items()), len(levels) + 1, personal)


def money(column: str, path: str, comment: str, *, personal: bool | None = None) -> Field:
    """An amount, exact."""
    return Field(column, path, comment, _NUMERIC, personal=personal)


def quantity(column: str, path: str, comment: str, *, personal: bool | None = None) -> Field:
    """A number of units or a price per unit, exact, up to 27 digits behind the point."""
    return Field(column, path, comment, _NUMERIC, personal=personal)


def integer(column: str, path: str, comment: str, *, personal: bool | None = None) -> Field:
    """A whole number."""
    return Field(column, path, comment, _INTEGER, personal=personal)


def time(column: str, path: str, comment: str, *, personal: bool | None = None) -> Field:
    """A point in time; a bare date is its midnight in UTC."""
    return Field(column, path, comment, _TIME, personal=personal)


def date(column: str, path: str, comment: str, *, personal: bool | None = None) -> Field:
    """A calendar day; of a time, the day as written."""
    return Field(column, path, comment, _DATE, personal=personal)


def boolean(column: str, path: str, comment: str, *, personal: bool | None = None) -> Field:
    """True or false."""
    return Field(column, path, comment, _BOOLEAN, personal=personal)


def json(column: str, path: str, comment: str, *, personal: bool | None = None) -> Field:
    """A part of the event as it is, where its inside is not known or not settled."""
    return Field(column, path, comment, _JSON, personal=personal)


def text_list(column: str, path: str, comment: str, *, personal: bool | None = None) -> Field:
    """A list of words."""
    return Field(column, path, comment, _LIST, personal=personal)


def event_time(column: str, comment: str) -> Field:
    """When the event arose, as its envelope says; for objects that carry no time of their own."""
    return Field(column, "created_at", comment, _ENVELOPE_TIME)


EVENT_ID = Field("event_id", "event_id", "Id of the event that says so.", _ENVELOPE_ID)
