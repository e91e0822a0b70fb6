"""The columns of a read model: meaning, place of the value in an event, which values are valid.

Every value is read as text, ``""`` becomes NULL, its shape is checked and it is cast. PostgreSQL's
casts alone would accept ``now``, ``infinity``, ``NaN`` or ``12.01.2026``.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from functools import cached_property
from typing import Any

from sqlalchemy import Boolean, Date, DateTime, Integer, Numeric, Text, Uuid
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.types import TypeEngine

from pipeline.readmodel.event_pattern import EventPattern
from pipeline.readmodel.lifecycle import Lifecycle

_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_COLUMN = re.compile(r"[a-z][a-z0-9_]*")
_LOOKS_PERSONAL = re.compile(
    r"(^|[._])((fore|sur)?names?|birth(day)?|gender|salutation|title|nationalit(y|ies)|address|street|"
    r"city|postcode|zip|(tele)?phone|mobile|e?mail|iban|bic|account_number|tax|tin|ssn|social|passport|"
    r"religion|church|fatca|counterparty|beneficiary|payer|payee|"
    r"remittance|reference_account|account_holder|memo|notes?|comments?|free_text)([0-9]*$|[._])"
)
_SYSTEM_COLUMNS = frozenset({"cmax", "cmin", "ctid", "tableoid", "xmax", "xmin"})
PERSONAL_REMARK = " Personal data."
"""At the end of the comment of each column that holds personal data, in the database too."""

ELEMENT = ""
"""As the path of a child's field: the element of the array itself, not one of its members."""


class Shape(Enum):
    """The rule that a text must follow before it is cast, by its name in ``first_invalid``."""

    FREE = "free"
    UUID = "uuid"
    NUMBER = "number"
    INTEGER = "integer"
    TIME = "time"
    DATE = "date"
    BOOLEAN = "boolean"
    JSON = "json"
    LIST = "list"


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


class Envelope(Enum):
    """Parts of an event outside its object."""

    EVENT_ID = auto()
    EVENT_TYPE = auto()
    EVENT_TIME = auto()
    ENTITY_ID = auto()
    CATEGORY = auto()


@dataclass(frozen=True, kw_only=True)
class Field:
    """A column of a read model.

    Attributes:
        column: Name of the column.
        comment: What an analyst reads about the column.
        kind: What kind of value it is.
        paths: Where the value is in the event's ``object``, with dots: ``delta.amount``. Of
            several, the first that is set counts.
        envelope: The part of the envelope that it is instead, or that counts where no path is set.
        by_event: The value by event type, where no path is set; the first pattern that matches
            counts.
        only_if: Path and text: NULL unless this text is there.
        lifecycle: Of a status by which the newest version is decided.
        keep_lowest: Of all events of a row, the lowest value counts, and not the newest.
        refers_to: Table whose key it holds.
        indexed: Whether analysts look rows up by it.
        personal: Whether it holds personal data. None means no, but is refused for a column or path
            whose name looks like personal data.
    """

    column: str
    comment: str
    kind: Kind
    paths: tuple[str, ...] = ()
    envelope: Envelope | None = None
    by_event: tuple[tuple[EventPattern, str], ...] = ()
    only_if: tuple[str, str] | None = None
    lifecycle: Lifecycle | None = None
    keep_lowest: bool = False
    refers_to: str | None = None
    indexed: bool = False
    personal: bool | None = None

    def __post_init__(self) -> None:
        if not _COLUMN.fullmatch(self.column):
            raise ValueError(
                f"{self.column!r} is not a name for a column; a name has small letters, digits and "
                "_, and begins with a letter"
            )
        if self.column in _SYSTEM_COLUMNS:
            raise ValueError(f"column {self.column}: PostgreSQL has its own of that name")
        for path in self.paths:
            if path != ELEMENT and not _PATH.fullmatch(path):
                raise ValueError(f"column {self.column}: {path!r} is not a path like delta.amount")
        if not self.comment.strip():
            raise ValueError(f"column {self.column} has no comment; say what it means")
        if self.personal is None and looks_personal(self.column, *self.paths):
            raise ValueError(
                f"column {self.column} looks as if it held personal data: write personal=True or "
                "personal=False"
            )

    @cached_property
    def description(self) -> str:
        """The comment, as it is in the database."""
        return self.comment + (PERSONAL_REMARK if self.personal else "")


def looks_personal(*names: str) -> bool:
    """Whether a column or path has a name of personal data."""
    return any(_LOOKS_PERSONAL.search(name.lower()) for name in names)


Path = str | Sequence[str]
"""Place of a value in the event's ``object``, or several of which the first that is set counts."""


def _field(
    column: str,
    comment: str,
    kind: Kind,
    path: Path | None,
    *,
    personal: bool | None,
    indexed: bool = False,
) -> Field:
    paths = [column if path is None else path] if isinstance(path, str | None) else path
    return Field(
        column=column,
        comment=comment,
        kind=kind,
        paths=tuple(paths),
        personal=personal,
        indexed=indexed,
    )


def uuid(
    column: str,
    comment: str,
    *,
    path: Path | None = None,
    personal: bool | None = None,
    indexed: bool = False,
) -> Field:
    """An id."""
    return _field(column, comment, _UUID, path, personal=personal, indexed=indexed)


def text(
    column: str,
    comment: str,
    *,
    path: Path | None = None,
    personal: bool | None = None,
    indexed: bool = False,
    only_if: tuple[str, str] | None = None,
) -> Field:
    """Any text, as it came.

    Args:
        column: Name of the column.
        comment: Its meaning.
        path: Place in the event's ``object``; by default the column's name.
        personal: Whether it holds personal data.
        indexed: Whether analysts look rows up by it.
        only_if: Path and text: NULL unless this text is there.
    """
    field = _field(column, comment, _TEXT, path, personal=personal, indexed=indexed)
    return replace(field, only_if=only_if)


def enum(
    column: str,
    comment: str,
    *,
    path: Path | None = None,
    by_event: Mapping[str, str] | None = None,
    personal: bool | None = None,
    indexed: bool = False,
) -> Field:
    """One of a list of words that grows without notice, so any word is accepted.

    Args:
        column: Name of the column.
        comment: Its meaning.
        path: Place in the event's ``object``; by default the column's name.
        by_event: The word by event type where the object has none.
        personal: Whether it holds personal data.
        indexed: Whether analysts look rows up by it.
    """
    field = _field(column, comment, _TEXT, path, personal=personal, indexed=indexed)
    return replace(field, by_event=_patterns(by_event or {}))


def _patterns(by_event: Mapping[str, str]) -> tuple[tuple[EventPattern, str], ...]:
    return tuple((EventPattern(pattern), word) for pattern, word in by_event.items())


def by_event_type(column: str, comment: str, words: Mapping[str, str]) -> Field:
    """A word that only the type of the event says: ``{"ISA_WRAPPER.*": "ISA"}``.

    Args:
        column: Name of the column.
        comment: Its meaning.
        words: The word by event type; the first pattern that matches counts.
    """
    return enum(column, comment, path=(), by_event=words)


def status(
    lifecycle: Lifecycle, comment: str = "", *, by_event: Mapping[str, str] | None = None
) -> Field:
    """The state of an entity, by which the newest version is decided where times cannot.

    Where the object has no status, the action of the event is the status if it is one of the states
    (``USER_CHECK.PASSED`` without ``status`` is PASSED).

    Args:
        lifecycle: The states and their order; they begin the column's comment.
        comment: What else there is to know.
        by_event: The state by event type, where action and state have different names.
    """
    actions = {f"*.{state}": state for state in lifecycle.states}
    return Field(
        column="status",
        comment=f"{lifecycle}. {comment}".strip(),
        kind=_TEXT,
        paths=("status",),
        by_event=_patterns({**(by_event or {}), **actions}),
        lifecycle=lifecycle,
    )


def money(
    column: str, comment: str, *, path: Path | None = None, personal: bool | None = None
) -> Field:
    """An amount, exact."""
    return _field(column, comment, _NUMERIC, path, personal=personal)


def quantity(
    column: str, comment: str, *, path: Path | None = None, personal: bool | None = None
) -> Field:
    """A number of units or a price per unit, exact, with up to 27 digits after the point."""
    return _field(column, comment, _NUMERIC, path, personal=personal)


def integer(
    column: str, comment: str, *, path: Path | None = None, personal: bool | None = None
) -> Field:
    """A whole number."""
    return _field(column, comment, _INTEGER, path, personal=personal)


def time(
    column: str,
    comment: str,
    *,
    path: Path | None = None,
    or_event_time: bool = False,
    personal: bool | None = None,
) -> Field:
    """A point in time; a bare date is its midnight in UTC.

    Args:
        column: Name of the column.
        comment: Its meaning.
        path: Place in the event's ``object``; by default the column's name.
        or_event_time: Where the object has none, the time of the event counts.
        personal: Whether it holds personal data.
    """
    field = _field(column, comment, _TIME, path, personal=personal)
    return replace(field, envelope=Envelope.EVENT_TIME) if or_event_time else field


def date(
    column: str, comment: str, *, path: Path | None = None, personal: bool | None = None
) -> Field:
    """A calendar day; of a time, the day as written."""
    return _field(column, comment, _DATE, path, personal=personal)


def boolean(
    column: str, comment: str, *, path: Path | None = None, personal: bool | None = None
) -> Field:
    """True or false."""
    return _field(column, comment, _BOOLEAN, path, personal=personal)


def json(
    column: str, comment: str, *, path: Path | None = None, personal: bool | None = None
) -> Field:
    """A part of the event as it is, where its inside is not known or not settled."""
    return _field(column, comment, _JSON, path, personal=personal)


def text_list(
    column: str, comment: str, *, path: Path | None = None, personal: bool | None = None
) -> Field:
    """A list of words."""
    return _field(column, comment, _LIST, path, personal=personal)


def earliest(field: Field) -> Field:
    """The same column with the lowest value that any event of the row had."""
    return replace(field, keep_lowest=True)


def event_time(column: str, comment: str) -> Field:
    """When the event arose, by its envelope; for objects that have no time of their own."""
    return Field(column=column, comment=comment, kind=_TIME, envelope=Envelope.EVENT_TIME)


def event_type(comment: str = "Type of the event.") -> Field:
    """The type of the event: ``TAX_EXEMPTION.UPDATE_FAILED``."""
    return Field(column="event_type", comment=comment, kind=_TEXT, envelope=Envelope.EVENT_TYPE)


def event_category(comment: str = "Category of the event.") -> Field:
    """The part of the event's type before the dot: ``ORDER``."""
    return Field(column="category", comment=comment, kind=_TEXT, envelope=Envelope.CATEGORY)


def event_entity_id(comment: str = "Entity that the event is about.") -> Field:
    """The id of the entity, as ``pipeline.events.entity_id`` has it."""
    return Field(
        column="entity_id", comment=comment, kind=_UUID, envelope=Envelope.ENTITY_ID, indexed=True
    )


def event_id(comment: str = "Id of the event.") -> Field:
    """The id of the event."""
    return Field(column="event_id", comment=comment, kind=_UUID, envelope=Envelope.EVENT_ID)


def columns_of(fields: Iterable[Field]) -> list[str]:
    """The names of their columns."""
    return [field.column for field in fields]
