"""What a projector declares: which events feed which table, and which of two events wins."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Index,
    Integer,
    SmallInteger,
    Table,
    Text,
    Uuid,
)

from pipeline.db import READ_SCHEMA, metadata
from pipeline.readmodel.batch import Batch
from pipeline.readmodel.fields import EVENT_ID, PERSONAL_REMARK, Field, Shape, refuse_unclassified

VERSION_COLUMNS = (
    "_version_time",
    "_version_rank",
    "_version_created",
    "_topic",
    "_partition",
    "_offset",
)
"""The version of a row, compared as one tuple. None is ever NULL: a NULL loses updates silently."""

COORDINATES = VERSION_COLUMNS[3:]

_EVENTS = re.compile(r"[A-Z][A-Z_]*\.(\*|[A-Z_]+)")


@dataclass(frozen=True)
class Source:
    """Events that feed a table.

    Attributes:
        events: A type, ``POSITION.UPDATED``, or all of a category, ``ORDER.*``.
        each: Where the object holds a list with one row in each element: the list's path.
        inherit: For ``each``: columns that an element may lack, and the path in the object around
            it from which they are then taken.
    """

    events: str
    each: str | None = None
    inherit: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _EVENTS.fullmatch(self.events):
            raise ValueError(f"{self.events!r} is neither a type like ORDER.NEW nor ORDER.*")

    def takes(self, event_type: str) -> bool:
        """Whether events of this type belong here."""
        if self.events.endswith(".*"):
            return event_type.startswith(self.events[:-1])
        return event_type == self.events

    @property
    def condition(self) -> str:
        """The same as SQL on ``pipeline.events e``."""
        if self.events.endswith(".*"):
            return f"starts_with(e.event_type, '{self.events[:-1]}')"
        return f"e.event_type = '{self.events}'"


@dataclass(frozen=True)
class Children:
    """A table with one row for each element of a list in the parent's object.

    The rows belong to the version of the parent that won: they are replaced with it. A parent
    without the list has none.

    Attributes:
        table: Name of the table.
        comment: What one row is.
        path: The list's place in the object.
        fields: The columns, with paths inside an element.
        key: Columns of ``fields`` that tell the elements of one parent apart; of two alike the
            first stays. Without it an element is known by its place in the list, in the column
            ``position``.
        indexes: Columns that analysts look up by.
    """

    table: str
    comment: str
    path: str
    fields: Sequence[Field]
    key: Sequence[str] = ()
    indexes: Sequence[str] = ()


class Base:
    """What every kind has: a name, the events it takes, the tables it owns.

    Attributes:
        name: The name of its first table.
        tables: Its tables, the parent first.
        sources: The events it takes.
        except_types: Types that are not taken though a source names them.
    """

    def __init__(
        self,
        name: str,
        tables: Sequence[Table],
        sources: Sequence[Source],
        except_types: Sequence[str],
    ) -> None:
        self.name = name
        self.tables = tuple(tables)
        self.sources = tuple(sources)
        self.except_types = frozenset(except_types)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    def takes(self, event_type: str) -> bool:
        """Whether events of this type concern the projector."""
        return event_type not in self.except_types and any(
            source.takes(event_type) for source in self.sources
        )

    def condition(self, *sources: Source) -> str:
        """SQL on ``pipeline.events e``: the events of these sources; of all, if none is named."""
        taken = " OR ".join(source.condition for source in sources or self.sources)
        left_out = ", ".join(f"'{name}'" for name in sorted(self.except_types))
        return f"({taken})" + (f" AND e.event_type NOT IN ({left_out})" if left_out else "")


class Declared(Base):
    """A projector whose SQL is compiled from its columns."""

    keeps_first = False
    """Of two events with the same key the one that stands first in the log wins, not the newest."""

    def __init__(
        self,
        *,
        table: str,
        comment: str,
        sources: Sequence[Source],
        except_types: Sequence[str],
        key: Sequence[Field],
        newest_by: str | None,
        fields: Sequence[Field],
        children: Sequence[Children],
        unless_unset: Sequence[str],
        indexes: Sequence[str],
    ) -> None:
        except_types = [Source(name).events for name in except_types]
        self.key = tuple(key)
        self.fields = (*self.key, *fields)
        self.children = tuple(children)
        self.unless_unset = frozenset(unless_unset)
        self.clock = self._clock(newest_by)
        self.status = self._status()
        parent = _parent_table(table, comment, self.key, fields, indexes)
        tables = [parent, *(_child_table(table, self.key, child) for child in children)]
        super().__init__(table, tables, sources, except_types)

    def _clock(self, newest_by: str | None) -> Field | None:
        if newest_by is None:
            return None
        clock = self.column(newest_by)
        if clock.kind.shape is not Shape.TIME:
            raise ValueError(f"newest_by: {newest_by} is not a time")
        return clock

    def _status(self) -> Field | None:
        ranked = [one for one in self.fields if one.ranks]
        if len(ranked) > 1:
            raise ValueError(
                f"two columns have steps and ends: {ranked[0].column}, {ranked[1].column}"
            )
        return ranked[0] if ranked else None

    def column(self, name: str) -> Field:
        """The field behind a column.

        Raises:
            ValueError: There is none of that name.
        """
        for one in self.fields:
            if one.column == name:
                return one
        raise ValueError(f"{name} is not a column")


class Snapshot(Declared):
    """One row for each entity: its newest event wins, in whatever order they arrive.

    Newest by the object's own time where it has one (``newest_by``), else by the rank of its status
    (an ``enum`` with ``steps`` and ``ends``), then by the envelope's time, and always, last, by the
    place in the log.

    Args:
        table: Name of the table, and of the projector.
        comment: What one row is.
        key: Column or columns that name the entity. An event without is put aside.
        fields: The other columns.
        events: The type or category that feeds the table, or several.
        sources: Instead of ``events``, where rows come from lists inside other objects too.
        except_types: Types of the category that hold no whole object and must not touch the table.
        newest_by: Column with the time of the object's last change.
        children: Tables fed by lists of the object.
        unless_unset: Columns without whose value the event makes no row here.
        indexes: Columns that analysts look up by.
    """

    def __init__(
        self,
        *,
        table: str,
        comment: str,
        key: Field | Sequence[Field],
        fields: Sequence[Field],
        events: str | Sequence[str] = (),
        sources: Sequence[Source] = (),
        except_types: Sequence[str] = (),
        newest_by: str | None = None,
        children: Sequence[Children] = (),
        unless_unset: Sequence[str] = (),
        indexes: Sequence[str] = (),
    ) -> None:
        super().__init__(
            table=table,
            comment=comment,
            sources=sources or _sources(events),
            except_types=except_types,
            key=[key] if isinstance(key, Field) else key,
            newest_by=newest_by,
            fields=fields,
            children=children,
            unless_unset=unless_unset,
            indexes=indexes,
        )


class Ledger(Snapshot):
    """One row for each entry of a ledger, corrected only by a newer version of the same entry.

    The key is the entry's id and its type, because an entry and its reversal may share the id.
    """


class Notice(Declared):
    """One row for each event, for what has no state of its own: failures, refusals, history.

    The key is the envelope's id, in the column ``event_id``; of several copies the first in the log
    stays.

    Args:
        table: Name of the table, and of the projector.
        comment: What one row is.
        events: The type or category that feeds the table, or several.
        fields: The columns.
        except_types: Types of the category that are left out.
        indexes: Columns that analysts look up by.
    """

    keeps_first = True

    def __init__(
        self,
        *,
        table: str,
        comment: str,
        events: str | Sequence[str],
        fields: Sequence[Field],
        except_types: Sequence[str] = (),
        indexes: Sequence[str] = (),
    ) -> None:
        super().__init__(
            table=table,
            comment=comment,
            sources=_sources(events),
            except_types=except_types,
            key=[EVENT_ID],
            newest_by=None,
            fields=fields,
            children=(),
            unless_unset=(),
            indexes=indexes,
        )


class Custom(Base):
    """Anything that no declaration can say: SQL of its own, set-based, once for each batch.

    Its author promises that the tables come out the same however the log is cut, ordered or
    repeated, and proves it by a test. The function names its tables without a schema, so that the
    same SQL fills the live table and, in a rebuild, the one beside it; the batch's events are
    ``pipeline.events e`` under the condition ``batch.where``.

    Args:
        tables: Made by ``read_model_table``; the first one names the projector.
        events: The type or category that feeds them, or several.
        apply: Writes what the batch says. Raise nothing for bad data: PostgreSQL does.
        version: Raise it whenever ``apply`` changes its meaning; a rebuild is then due.
    """

    def __init__(
        self,
        *,
        tables: Sequence[Table],
        events: str | Sequence[str],
        apply: Callable[[Connection, Batch], None],
        version: int = 1,
        except_types: Sequence[str] = (),
    ) -> None:
        left_out = [Source(name).events for name in except_types]
        super().__init__(tables[0].name, tables, _sources(events), left_out)
        self.apply = apply
        self.version = version
        for table in tables:
            table.info["projector"] = self.name


Projector = Declared | Custom
"""One read model: what builds it from which events, and the tables it owns."""


def read_model_table(name: str, *parts: "Column[object] | Index", comment: str) -> Table:
    """The table of a ``Custom``: its columns, each with a comment, and its indexes.

    A column with personal data says so: ``Column(…, info={"personal": True})``.

    Raises:
        ValueError: A column looks personal and says neither True nor False.
    """
    for part in parts:
        if isinstance(part, Column):
            refuse_unclassified(part.name, part.name, part.info.get("personal"))
            if part.info.get("personal"):
                part.comment = (part.comment or "") + PERSONAL_REMARK
    return Table(name, metadata, *parts, schema=READ_SCHEMA, comment=comment)


def personal_columns(table: Table) -> frozenset[str]:
    """Columns of a read model that hold personal data."""
    return frozenset(column.name for column in table.columns if column.info.get("personal"))


def _sources(events: str | Sequence[str]) -> list[Source]:
    return [Source(one) for one in ([events] if isinstance(events, str) else events)]


# --------------------------------------------------------------------------------------- the tables


def _column(one: Field, *, primary_key: bool = False) -> "Column[object]":
    return Column(
        one.column,
        one.kind.type,
        primary_key=primary_key,
        comment=one.remark,
        info={"personal": bool(one.personal)},
    )


def _version_columns() -> "list[Column[object]]":
    """Where a row comes from; a table starts with what it means, so these come last."""
    return [
        Column("_event_id", Uuid, comment="Event that wrote this row."),
        Column(
            "_version_time",
            DateTime(timezone=True),
            nullable=False,
            comment="Version: the object's own time of change, else the event's; "
            "1970 where time does not come first.",
        ),
        Column(
            "_version_rank",
            SmallInteger,
            nullable=False,
            comment="Version: how far its status has come; 0 without status.",
        ),
        Column(
            "_version_created",
            DateTime(timezone=True),
            nullable=False,
            comment="Version: when the event arose.",
        ),
        Column(
            "_topic",
            Text(collation="C"),
            nullable=False,
            comment="Topic of the event that wrote this row.",
        ),
        Column("_partition", Integer, nullable=False, comment="Partition of that event."),
        Column("_offset", BigInteger, nullable=False, comment="Offset of that event."),
    ]


def _parent_table(
    name: str, comment: str, key: Sequence[Field], fields: Sequence[Field], indexes: Sequence[str]
) -> Table:
    return Table(
        name,
        metadata,
        *(_column(one, primary_key=True) for one in key),
        *(_column(one) for one in fields),
        *_version_columns(),
        *(Index(None, column) for column in indexes),
        schema=READ_SCHEMA,
        comment=comment,
        info={"projector": name},
    )


def _child_table(parent: str, key: Sequence[Field], child: Children) -> Table:
    own_key = set(child.key)
    place: list[Column[object]] = []
    if not own_key:
        place = [
            Column(
                "position",
                Integer,
                primary_key=True,
                autoincrement=False,
                comment="Place in the list, from 1.",
            )
        ]
    return Table(
        child.table,
        metadata,
        *(_column(one, primary_key=True) for one in key),
        *place,
        *(_column(one, primary_key=one.column in own_key) for one in child.fields),
        *(Index(None, column) for column in child.indexes),
        schema=READ_SCHEMA,
        comment=child.comment,
        info={"projector": parent},
    )
