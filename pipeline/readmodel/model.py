"""What a projector declares: which events build which table, and which of two events wins.

Declarations are frozen values: to construct one changes nothing else.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from sqlalchemy import Connection, Table

from pipeline.readmodel import tables
from pipeline.readmodel.event_pattern import EventPattern
from pipeline.readmodel.fields import Field, Shape, columns_of, event_id

_NAME = re.compile(r"[a-z][a-z0-9_]*")
NAME_BYTES_MAX = 63
"""PostgreSQL's: what is longer is cut."""


@dataclass(frozen=True)
class Source:
    """Events that feed a table.

    Attributes:
        events: A type, ``POSITION.UPDATED``, all of a category, ``ORDER.*``, or ``*`` for all.
        each: Where the object holds an array with one row in each element: the array's path.
        inherit: For ``each``: columns that an element may lack, and the path in the object around
            it from which they are then taken.
    """

    events: str
    each: str | None = None
    inherit: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "events", EventPattern(self.events))

    def __hash__(self) -> int:
        return hash((self.events, self.each, tuple(sorted(self.inherit.items()))))

    @property
    def pattern(self) -> EventPattern:
        """The events, as a pattern."""
        return EventPattern(self.events)


@dataclass(frozen=True, kw_only=True, eq=False)
class Children:
    """A table with one row per element of an array in the parent's object.

    The rows belong to the version of the parent that won: they are replaced with it. A parent
    without the array has none. The key is the parent's and the element's ``position``, from 1.

    Attributes:
        table: Name of the table.
        comment: What one row is.
        path: The array's place in the object.
        fields: The columns, with paths inside an element; ``ELEMENT`` is the element itself.
    """

    table: str
    comment: str
    path: str
    fields: Sequence[Field]

    def __post_init__(self) -> None:
        _freeze(self, "fields")
        _refuse_bad_table(self.table, self.comment)


class Base(ABC):
    """What every kind has: a name, the events that it takes, the tables that it owns."""

    table: str
    sources: Sequence[Source]
    except_events: Sequence[str]

    @property
    def name(self) -> str:
        """The name of the projector: that of its first table."""
        return self.table

    @property
    @abstractmethod
    def tables(self) -> tuple[Table, ...]:
        """Its tables, the parent first."""

    def takes(self, event_type: str) -> bool:
        """Whether the projector uses events of this type."""
        left_out = any(EventPattern(each).matches(event_type) for each in self.except_events)
        return not left_out and any(source.pattern.matches(event_type) for source in self.sources)

    def condition(self, *sources: Source) -> str:
        """SQL on ``pipeline.events e``: the events of these sources; of all, if none is given."""
        taken = " OR ".join(source.pattern.condition for source in sources or self.sources)
        left_out = " OR ".join(EventPattern(each).condition for each in sorted(self.except_events))
        return f"({taken})" + (f" AND NOT ({left_out})" if left_out else "")


@dataclass(frozen=True, kw_only=True, eq=False)
class Declared(Base):
    """A projector whose SQL is compiled from its columns.

    Attributes:
        table: Name of the table, and of the projector.
        comment: What one row is.
        events: The type or category that feeds the table, or several.
        sources: Instead of ``events``, where rows come from arrays inside other objects too.
        except_events: Types or categories that are left out: they hold no whole object.
        fields: The columns beside the key.
        only_with: Columns without whose value an event makes no row here.
        indexes: Further indexes, of several columns each; of one column, the field says it.
    """

    table: str
    comment: str
    events: str | Sequence[str] = ()
    sources: Sequence[Source] = ()
    except_events: Sequence[str] = ()
    fields: Sequence[Field]
    only_with: Sequence[str] = ()
    indexes: Sequence[Sequence[str]] = ()

    keeps_first: ClassVar[bool] = False
    """Of two events with the same key, the one that is first in the log wins, not the newest."""

    def __post_init__(self) -> None:
        _freeze(self, "fields", "only_with", "except_events")
        object.__setattr__(self, "indexes", tuple(tuple(columns) for columns in self.indexes))
        _refuse_bad_table(self.table, self.comment)
        object.__setattr__(
            self, "sources", tuple(self.sources) or _sources(self.table, self.events)
        )
        for name in self.except_events:
            EventPattern(name)
        self._refuse_bad_columns()
        for name in (name for columns in self.indexes for name in columns):
            self.column(name, "indexes")
        for name in self.only_with:
            field = self.column(name, "only_with")
            if not (field.paths or field.by_event):
                raise ValueError(f"{self.table}: only_with: {name} is not read from the object")

    def _refuse_bad_columns(self) -> None:
        for column in self.columns:
            if not (column.paths or column.envelope or column.by_event):
                raise ValueError(f"{self.table}.{column.column}: path is empty; say where it is")
        _refuse_doubles(self.table, self.key_fields, self.fields)
        _refuse_long_names(self.table, self.columns, self.indexes)

    @property
    @abstractmethod
    def key_fields(self) -> tuple[Field, ...]:
        """The columns of the primary key."""

    @property
    def clock(self) -> Field | None:
        """The column with the time that decides which event is newest, if there is one."""
        return None

    @property
    def status(self) -> Field | None:
        """The column whose lifecycle decides where times cannot."""
        return None

    @property
    def child_tables(self) -> tuple[Children, ...]:
        """The tables that are fed by arrays of the object."""
        return ()

    @cached_property
    def columns(self) -> tuple[Field, ...]:
        """The columns of the table, the key first."""
        return (*self.key_fields, *self.fields)

    def column(self, name: str, named_by: str = "") -> Field:
        """The field of a column.

        Args:
            name: Its name.
            named_by: The attribute that names it, for the error.

        Raises:
            ValueError: There is none of that name.
        """
        for column in self.columns:
            if column.column == name:
                return column
        raise ValueError(
            f"{self.table}: {named_by} names {name}, which is not a column; its columns are "
            f"{', '.join(columns_of(self.columns))}"
        )

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """Its tables, the parent first."""
        parent = tables.parent(
            self.table, self.comment, self.key_fields, self.fields, self.indexes, self.name
        )
        return (
            parent,
            *(
                tables.child(child.table, child.comment, self.key_fields, child.fields, self.name)
                for child in self.child_tables
            ),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class EntityTable(Declared):
    """One row per entity: its newest event wins, in whatever order they arrive.

    Newest by the object's own time where it has one (``newest_by``), else by the rank of its
    status (a ``status`` with its lifecycle), then by the envelope's time, and always, last, by the
    place in the log.

    Attributes:
        key: Column or columns that name the entity. An event without is a dead letter.
        newest_by: Column with the time of the object's last change.
        children: Tables fed by arrays of the object.
    """

    key: Field | Sequence[Field]
    newest_by: str | None = None
    children: Sequence[Children] = ()

    def __post_init__(self) -> None:
        _freeze(self, "children")
        super().__post_init__()
        for child in self.children:
            _refuse_doubles(child.table, [*self.key_fields, tables.POSITION], child.fields)
            _refuse_long_names(child.table, child.fields, ())
        if self.clock and self.clock.kind.shape is not Shape.TIME:
            raise ValueError(f"{self.table}: newest_by: {self.newest_by} is not a time")

    @property
    def key_fields(self) -> tuple[Field, ...]:
        """The columns of the primary key."""
        return (self.key,) if isinstance(self.key, Field) else tuple(self.key)

    @property
    def clock(self) -> Field | None:
        """The column with the time that decides which event is newest, if there is one."""
        return self.column(self.newest_by, "newest_by") if self.newest_by else None

    @property
    def status(self) -> Field | None:
        """The column whose lifecycle decides where times cannot."""
        return next((column for column in self.columns if column.lifecycle), None)

    @property
    def child_tables(self) -> tuple[Children, ...]:
        """The tables that are fed by arrays of the object."""
        return tuple(self.children)


@dataclass(frozen=True, kw_only=True, eq=False)
class LedgerTable(EntityTable):
    """One row per entry of a ledger, corrected only by a newer version of the same entry.

    The key is the entry's id together with its type, since an entry and its reversal may share the
    id. An entry has no lifecycle: what is undone is undone by an entry of its own.

    Attributes:
        key: The entry's id.
        entry_type: The column with the type, the second column of the key.
    """

    entry_type: Field

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.status:
            raise ValueError(f"{self.table}: an entry of a ledger has no lifecycle")

    @property
    def key_fields(self) -> tuple[Field, ...]:
        """The columns of the primary key."""
        return (*super().key_fields, self.entry_type)


@dataclass(frozen=True, kw_only=True, eq=False)
class EventTable(Declared):
    """One row per event, for what has no state of its own: failures, refusals, history.

    The key is the id of the event, in the column ``event_id``; of several copies the first in the
    log stays.
    """

    keeps_first: ClassVar[bool] = True

    @property
    def key_fields(self) -> tuple[Field, ...]:
        """The columns of the primary key."""
        return (event_id(),)


@dataclass(frozen=True, kw_only=True, eq=False)
class Custom(Base):
    """What no other kind can express: set-based SQL of its own, run once per batch.

    Its author promises that the table comes out the same however the log is divided, ordered or
    repeated, and proves it by a test.

    Attributes:
        table: Name of the table, and of the projector.
        comment: What one row is.
        events: The type or category that feeds it, or several.
        except_events: Types or categories that are left out.
        key: Columns of the primary key; their paths mean nothing.
        fields: The other columns; the same.
        indexes: Further indexes, of several columns each.
        reads: What ``apply`` reads of each event: the columns of ``batch.rows``, typed and checked.
            An event with a value of the wrong shape becomes a dead letter.
        apply: Writes what the batch says, by one or more statements on ``batch.rows`` and
            ``batch.table``. It raises nothing for bad data: PostgreSQL does.
        version: Raise it whenever ``apply`` changes its meaning; a rebuild is then due.
    """

    table: str
    comment: str
    events: str | Sequence[str]
    except_events: Sequence[str] = ()
    key: Sequence[Field]
    fields: Sequence[Field] = ()
    indexes: Sequence[Sequence[str]] = ()
    reads: Sequence[Field]
    apply: Callable[[Connection, "CustomBatch"], None]
    version: int = 1

    def __post_init__(self) -> None:
        _freeze(self, "key", "fields", "reads", "except_events")
        object.__setattr__(self, "indexes", tuple(tuple(columns) for columns in self.indexes))
        _refuse_bad_table(self.table, self.comment)
        if not self.key:
            raise ValueError(f"{self.table}: key is empty; name what one row is of")
        _refuse_doubles(self.table, self.key, self.fields)
        columns = columns_of((*self.key, *self.fields))
        for name in (name for names in self.indexes for name in names):
            if name not in columns:
                raise ValueError(
                    f"{self.table}: indexes names {name}, which is not a column; its columns are "
                    f"{', '.join(columns)}"
                )
        _refuse_long_names(self.table, (*self.key, *self.fields), self.indexes)
        # Its own checks, at the line of the declaration.
        _ = self.input

    @cached_property
    def input(self) -> "CustomInput":
        """What it reads, as a declaration that the compiler knows."""
        return CustomInput(
            table=self.table,
            comment=self.comment,
            events=self.events,
            except_events=self.except_events,
            fields=self.reads,
        )

    @property
    def sources(self) -> Sequence[Source]:  # type: ignore[override]  # derived, not declared
        """The events that it takes."""
        return self.input.sources

    @cached_property
    def tables(self) -> tuple[Table, ...]:
        """Its table."""
        return (tables.custom(self.table, self.comment, self.key, self.fields, self.indexes),)


@dataclass(frozen=True, kw_only=True, eq=False)
class CustomInput(Declared):
    """What a ``Custom`` reads of each event; it has no table of its own."""

    @property
    def key_fields(self) -> tuple[Field, ...]:
        """None: ``apply`` decides what a row is."""
        return ()


@dataclass(frozen=True)
class CustomBatch:
    """The events that a ``Custom`` has to take, and the table that it has to write.

    Attributes:
        table: The table, quoted and with its schema: the live one, or that of a rebuild.
        rows: A query on the events of the batch: the columns of ``reads``, and ``_event_id``,
            ``_event_type``, ``_event_time``, ``_ingested_at``, ``_topic``, ``_partition``,
            ``_offset``.
        parameters: Values of the names that ``rows`` binds.
    """

    table: str
    rows: str
    parameters: Mapping[str, Any]


Projector = EntityTable | LedgerTable | EventTable | Custom
"""The declaration of a read model: what builds it from which events, and its tables."""


def personal_columns(table: Table) -> frozenset[str]:
    """Columns of a read model's table that hold personal data."""
    return frozenset(column.name for column in table.columns if column.info.get("personal"))


def _sources(table: str, events: str | Sequence[str]) -> tuple[Source, ...]:
    if not events:
        raise ValueError(f"{table}: events is empty; give a type, CATEGORY.* or *")
    return tuple(Source(pattern) for pattern in ([events] if isinstance(events, str) else events))


def _freeze(declaration: object, *names: str) -> None:
    for name in names:
        object.__setattr__(declaration, name, tuple(getattr(declaration, name)))


def _refuse_bad_table(table: str, comment: str) -> None:
    if not _NAME.fullmatch(table):
        raise ValueError(
            f"{table!r} is not a name for a table; a name has small letters, digits and _, and "
            "begins with a letter"
        )
    if not comment.strip():
        raise ValueError(f"{table}: comment is empty; say what one row is")


def _refuse_doubles(table: str, key: Sequence[Field], fields: Sequence[Field]) -> None:
    """Refuse a column that there is twice; of a child, the key has columns that it gets itself."""
    names = columns_of((*key, *fields))
    for column in fields:
        if names.count(column.column) > 1:
            in_key = next((it for it in key if it.column == column.column), None)
            other = f"by the key ({in_key.comment.rstrip('.')})" if in_key else "above it"
            raise ValueError(
                f"{table}.{column.column} is declared twice: here and {other}. Give this one "
                "another name"
            )
    if doubled := [name for name in columns_of(key) if names.count(name) > 1]:
        raise ValueError(f"{table}.{doubled[0]} is declared twice: both are of the key")


def _refuse_long_names(
    table: str, fields: Sequence[Field], indexes: Sequence[Sequence[str]]
) -> None:
    """PostgreSQL would cut them: the next `pipeline migrate` would not find what it has made."""
    of_indexes = [[field.column] for field in fields if field.indexed] + [
        list(it) for it in indexes
    ]
    names = [
        *(("column", field.column) for field in fields),
        ("primary key", f"{table}_pkey"),
        *(("index", f"{table}_{'_'.join(columns)}_idx") for columns in of_indexes),
    ]
    for what, name in names:
        if len(name) > NAME_BYTES_MAX:
            raise ValueError(
                f"{table}: {what} {name} would have a name of {len(name)} bytes, and PostgreSQL "
                f"allows {NAME_BYTES_MAX}. Choose a shorter name for the table or the column"
            )
