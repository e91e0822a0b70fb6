"""From a declaration to the SQL that fills its tables, once per range of the log.

A parent takes one statement, all its children one more: the child rows of the parents that carry
this range's coordinates are deleted and written again. That also refills a child table that was
truncated alone. Rows are written in the order of their keys, so two workers cannot deadlock.

A range is read in steps, each a query around the one before. ``OFFSET 0`` keeps the planner from
merging two of them, which would compute a column again for each of its uses.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from sqlalchemy import TextClause, text

from pipeline.db.identifiers import literal, quote
from pipeline.readmodel.batch import WHERE
from pipeline.readmodel.checking import check_children, checks, demand
from pipeline.readmodel.fields import Envelope, Field, columns_of
from pipeline.readmodel.model import Children, Custom, Declared, Source
from pipeline.readmodel.reading import cast, json_of, objects_in, read, text_of, value_of
from pipeline.readmodel.screening import screening_query
from pipeline.readmodel.tables import COORDINATES, EVENT_COLUMNS, VERSION_COLUMNS

# Below every real time, and not -infinity, which Python and its data frames cannot read.
NO_TIME = "CAST('1970-01-01 00:00:00+00' AS timestamptz)"


@dataclass(frozen=True)
class Program:
    """The statements of one projector for one schema.

    Attributes:
        statements: To be run in this order, in one transaction.
        screening: Names the events of a range that break a rule: offset, column, SQLSTATE.
    """

    statements: tuple[str, ...]
    screening: str

    @cached_property
    def clauses(self) -> tuple[TextClause, ...]:
        """The statements, as SQLAlchemy takes them."""
        return tuple(text(statement) for statement in self.statements)


@lru_cache(maxsize=256)
def compile_declared(projector: Declared, schema: str | None = None) -> Program:
    """The SQL that fills the projector's tables; the same text every time.

    Args:
        projector: The declaration.
        schema: Where the tables are; by default, each where it is declared.
    """
    names = _Names(projector, schema)
    statements = [_upsert(projector, names)]
    if projector.child_tables:
        statements.append(_replace_children(projector, names))
    return Program(tuple(statements), screening_query(projector))


@lru_cache(maxsize=64)
def rows_of(projector: Custom) -> str:
    """What ``apply`` of a ``Custom`` reads: the events of a batch, typed and checked."""
    return f"(\n{_rows(projector.input, whole=True)}\n)"


@lru_cache(maxsize=64)
def screening_of(projector: Custom) -> str:
    """Names the events whose values ``apply`` of a ``Custom`` could not read."""
    return screening_query(projector.input)


class _Names:
    """The projector's tables with their schemas, by name."""

    def __init__(self, projector: Declared | Custom, schema: str | None) -> None:
        self._schemas = {table.name: schema or str(table.schema) for table in projector.tables}

    def __getitem__(self, table: str) -> str:
        return f"{quote(self._schemas[table])}.{quote(table)}"


def table_name(projector: Custom, schema: str | None = None) -> str:
    """The table of a ``Custom``, quoted and with its schema."""
    return _Names(projector, schema)[projector.name]


def _columns(names: Iterable[str], prefix: str = "") -> str:
    return ", ".join(prefix + quote(name) for name in names)


def _fenced(query: str) -> str:
    """The query, computed once per row however often its columns are used further out."""
    return f"(\n{query}\nOFFSET 0\n)"


def _where(conditions: Sequence[str]) -> str:
    return "\nWHERE " + "\nAND ".join(conditions) if conditions else ""


# ---------------------------------------------------------------------------------- rows of a range
# Each step is a query around the one before: events, elements, members, values.


def _rows(projector: Declared, *, whole: bool) -> str:
    """The range's events as rows, with their versions and arrays.

    Args:
        projector: Whose rows.
        whole: Every column, checked; else the keys only, of rows that were checked just before.
    """
    return "\nUNION ALL\n".join(
        _rows_of(projector, source, whole=whole) for source in projector.sources
    )


_EVENT = (
    'e.event_id, e.event_type, e.created_at, e.entity_id, e.ingested_at, e.topic, e."partition", '
    'e."offset"'
)


def _rows_of(projector: Declared, source: Source, *, whole: bool) -> str:
    decisive = (*projector.key_fields, projector.clock, projector.status)
    needed = {*projector.only_with, *(field.column for field in decisive if field)}
    fields = [field for field in projector.columns if whole or field.column in needed]
    objects = _events(projector, source)
    if source.each:
        objects = _elements(source, source.each, objects, check=whole)
    members = _members(projector, source, fields, objects)
    return _values(projector, fields, members, check=whole)


def _events(projector: Declared, source: Source) -> str:
    """The events of the range: envelope and object."""
    return (
        f"SELECT {_EVENT}, e.payload -> 'object' AS object, 0 AS place\n"
        f"FROM pipeline.events AS e\nWHERE {WHERE}\nAND {projector.condition(source)}"
    )


def _elements(source: Source, each: str, events: str, *, check: bool) -> str:
    """The elements of an array in each object, with what they may lack of it."""
    inherited = "".join(
        f", {text_of('e.object', path)} AS {quote('_' + column)}"
        for column, path in source.inherit.items()
    )
    elements = json_of("e.object", each)
    is_filled = f"{elements} <> '[]'"
    if check:
        # Without an object there is no array, and so nothing that is refused.
        is_filled = (
            f"CASE WHEN jsonb_typeof(e.object) = 'object' THEN {is_filled} "
            "ELSE pipeline.reject() END"
        )
    return (
        f"SELECT {_EVENT}, i.item AS object, i.place{inherited}\n"
        f"FROM {_fenced(events)} AS e\n"
        f"CROSS JOIN LATERAL jsonb_array_elements({elements}) WITH ORDINALITY AS i(item, place)\n"
        f"WHERE {is_filled}"
    )


def _members(projector: Declared, source: Source, fields: Sequence[Field], objects: str) -> str:
    """What the fields read of each object, as text or JSON, and the arrays of the children."""
    selected = []
    for field in fields:
        inherited = [f"e.{quote('_' + field.column)}"] if field.column in source.inherit else []
        if field.paths or field.by_event:
            # The action of an event says nothing about the elements of an array inside.
            value = read(field, "e.object", *inherited, by_event=not source.each)
            selected.append(f"{value} AS {quote(field.column)}")
    selected += [
        "e.event_id AS _event_id, e.event_type AS _event_type, e.created_at AS _event_time",
        "e.entity_id AS _entity_id, e.ingested_at AS _ingested_at",
        f"coalesce(e.created_at, {NO_TIME}) AS _version_created",
        'e.topic AS _topic, e."partition" AS _partition, e."offset" AS _offset, e.place AS _place',
        "jsonb_typeof(e.object) = 'object' AS _is_object",
        *(
            f"{json_of('e.object', child.path)} AS _list_{at}"
            for at, child in enumerate(projector.child_tables)
        ),
        *(f"{json_of('e.object', path)} AS {quote('_in_' + path)}" for path in objects_in(fields)),
    ]
    return f"SELECT {', '.join(selected)}\nFROM {_fenced(objects)} AS e"


_ENVELOPE = {
    Envelope.EVENT_ID: "o._event_id",
    Envelope.EVENT_TYPE: "o._event_type",
    Envelope.EVENT_TIME: "o._event_time",
    Envelope.ENTITY_ID: "o._entity_id",
    Envelope.CATEGORY: "split_part(o._event_type, '.', 1)",
}


def _typed(field: Field, value: str) -> str:
    """The column's value in its type: the member that was read, else the part of the envelope."""
    if field.envelope is None:
        return cast(field, value)
    of_envelope = _ENVELOPE[field.envelope]
    return f"coalesce({cast(field, value)}, {of_envelope})" if field.paths else of_envelope


def _values(projector: Declared, fields: Sequence[Field], members: str, *, check: bool) -> str:
    """The members as values of their types, with the row's version."""
    texts = {field: f"o.{quote(field.column)}" for field in fields}
    arrays = [f"o._list_{at}" for at in range(len(projector.child_tables))]
    selected = [
        *(f"{_typed(field, value)} AS {quote(field.column)}" for field, value in texts.items()),
        f"o._event_id, o._event_type, o._event_time, o._ingested_at, {_version(projector, texts)}",
        "o._place",
        *arrays,
    ]
    # Without an object nothing is unset either: that is refused.
    conditions = [
        f"({texts[projector.column(column)]} IS NOT NULL OR NOT o._is_object)"
        for column in sorted(projector.only_with)
    ]
    if check:
        around = [f"o.{quote('_in_' + path)}" for path in objects_in(fields)]
        of_children = map(check_children, projector.child_tables, arrays)
        conditions.append(demand(["o._is_object", *checks(texts, around), *of_children]))
    return f"SELECT {', '.join(selected)}\nFROM {_fenced(members)} AS o" + _where(conditions)


def _version(projector: Declared, texts: Mapping[Field, str]) -> str:
    time, rank = NO_TIME, "0"
    if projector.clock:
        time = f"coalesce({_typed(projector.clock, texts[projector.clock])}, o._version_created)"
    if projector.status and projector.status.lifecycle:
        lifecycle = projector.status.lifecycle
        states = " ".join(f"WHEN {literal(name)} THEN {at}" for name, at in lifecycle.ranks)
        rank = f"CASE {texts[projector.status]} {states} ELSE {lifecycle.unknown_rank} END"
    return (
        f"{time} AS _version_time, CAST({rank} AS smallint) AS _version_rank, "
        "o._version_created, o._topic, o._partition, o._offset"
    )


# ----------------------------------------------------------------------------------- the statements


def _best_first(projector: Declared) -> str:
    """The order in which the winner of each key comes first."""
    key = _columns(columns_of(projector.key_fields))
    if projector.keeps_first:
        return f"{key}, {_columns(COORDINATES)}"
    newest = ", ".join(f"{quote(name)} DESC" for name in VERSION_COLUMNS)
    return f"{key}, {newest}, _place DESC"


def _upsert(projector: Declared, names: _Names) -> str:
    rows = _rows(projector, whole=True)
    key = columns_of(projector.key_fields)
    lowest = {field.column for field in projector.columns if field.keep_lowest}
    columns = [*columns_of(projector.columns), "_event_id", *EVENT_COLUMNS, *VERSION_COLUMNS]
    compared = COORDINATES if projector.keeps_first else VERSION_COLUMNS
    sign = "<" if projector.keeps_first else ">"
    wins = f"({_columns(compared, 'excluded.')}) {sign} ({_columns(compared, 't.')})"
    selected = ", ".join(
        f"min({quote(name)}) OVER (PARTITION BY {_columns(key)}) AS {quote(name)}"
        if name in lowest
        else quote(name)
        for name in columns
    )
    changes = []
    for name in columns:
        column = quote(name)
        if name in lowest:
            changes.append(f"{column} = least(t.{column}, excluded.{column})")
        elif name not in key and lowest:
            changes.append(
                f"{column} = CASE WHEN {wins} THEN excluded.{column} ELSE t.{column} END"
            )
        elif name not in key:
            changes.append(f"{column} = excluded.{column}")
    lower = "".join(
        f"\nOR least(t.{quote(name)}, excluded.{quote(name)}) IS DISTINCT FROM t.{quote(name)}"
        for name in sorted(lowest)
    )
    return (
        f"INSERT INTO {names[projector.name]} AS t ({_columns(columns)})\n"
        f"SELECT DISTINCT ON ({_columns(key)}) {selected} FROM (\n{rows}\n) AS s\n"
        f"ORDER BY {_best_first(projector)}\n"
        f"ON CONFLICT ({_columns(key)}) DO UPDATE SET {', '.join(changes)}\n"
        f"WHERE {wins}{lower}"
    )


def _replace_children(projector: Declared, names: _Names) -> str:
    """One statement for all child tables, so that the range is read once for them.

    Its snapshot is taken while the parents are locked, so no other session has written their
    children since.
    """
    parts = [f"winners AS MATERIALIZED (\n{_winners(projector, names)}\n)"]
    for at, child in enumerate(projector.child_tables):
        parts.append(f"gone_{at} AS (\n{_delete_children(projector, names, child)}\n)")
    inserts = [
        _insert_children(projector, names, child, at)
        for at, child in enumerate(projector.child_tables)
    ]
    parts += [f"new_{at} AS (\n{insert}\n)" for at, insert in enumerate(inserts[:-1])]
    return "WITH " + ",\n".join(parts) + f"\n{inserts[-1]}"


def _winners(projector: Declared, names: _Names) -> str:
    """Parents that carry coordinates of this range, each with its arrays."""
    rows = _rows(projector, whole=False)
    key = columns_of(projector.key_fields)
    same = " AND ".join(f"t.{quote(name)} = s.{quote(name)}" for name in (*key, *COORDINATES))
    order = ", ".join(
        [*(f"s.{quote(name)}" for name in key)]
        + [f"s.{quote(name)} DESC" for name in VERSION_COLUMNS]
    )
    arrays = ", ".join(f"s._list_{at}" for at in range(len(projector.child_tables)))
    return (
        f"SELECT DISTINCT ON ({_columns(key, 's.')}) {_columns(key, 's.')}, "
        f"{_columns(EVENT_COLUMNS, 's.')}, {arrays}\n"
        f"FROM (\n{rows}\n) AS s\n"
        f"JOIN {names[projector.name]} AS t ON {same}\n"
        f"ORDER BY {order}, s._place DESC"
    )


def _delete_children(projector: Declared, names: _Names, child: Children) -> str:
    key = columns_of(projector.key_fields)
    same = " AND ".join(f"c.{quote(name)} = w.{quote(name)}" for name in key)
    return f"DELETE FROM {names[child.table]} AS c USING winners AS w WHERE {same} RETURNING 1"  # noqa: S608 - names


def _insert_children(projector: Declared, names: _Names, child: Children, at: int) -> str:
    key = columns_of(projector.key_fields)
    columns = [*key, "position", *columns_of(child.fields), *EVENT_COLUMNS]
    selected = [
        *(f"w.{quote(name)}" for name in key),
        "CAST(i.place AS integer) AS position",
        *(
            f"{cast(field, value_of(field, 'i.item'))} AS {quote(field.column)}"
            for field in child.fields
        ),
        *(f"w.{quote(name)}" for name in EVENT_COLUMNS),
    ]
    # Counted first, so that all old rows are gone before a new one comes.
    return (
        f"INSERT INTO {names[child.table]} ({_columns(columns)})\n"  # noqa: S608 - names
        f"SELECT {', '.join(selected)}\nFROM winners AS w\n"
        f"CROSS JOIN LATERAL jsonb_array_elements(w._list_{at}) WITH ORDINALITY AS i(item, place)\n"
        f"WHERE w._list_{at} <> '[]' AND (SELECT count(*) FROM gone_{at}) >= 0\n"
        f"ORDER BY {_columns(key, 'w.')}, i.place"
    )
