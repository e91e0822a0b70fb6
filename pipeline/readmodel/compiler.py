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
from pipeline.readmodel.fields import ELEMENT, Envelope, Field, Shape, columns_of
from pipeline.readmodel.model import Children, Custom, Declared, Source
from pipeline.readmodel.tables import COORDINATES, EVENT_COLUMNS, VERSION_COLUMNS

# Nearly all times and dates are written in one way. These patterns recognise it at half the price
# of pipeline.is_rfc3339(): which characters are where, and that the others are digits. Pairs of
# digits, so that the regular expression has few states to compute per row.
USUAL_DATE = "____-__-__"
USUAL = f"{USUAL_DATE}T__:__:__"
USUAL_DIGITS = "^([0-9][0-9]([-T:]|([.][0-9]+)?Zx|x)?)*$"
# Between values that are checked at once. A letter, since the cast refuses a time with a letter in
# it and ignores punctuation.
BETWEEN = "x"
# With nothing but these, PostgreSQL's casts accept decimal numbers and nothing else.
NO_NUMBER = "[^0-9.+-]"

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
    return Program(tuple(statements), _screening(projector))


@lru_cache(maxsize=64)
def rows_of(projector: Custom) -> str:
    """What ``apply`` of a ``Custom`` reads: the events of a batch, typed and checked."""
    return f"(\n{_rows(projector.input, whole=True)}\n)"


@lru_cache(maxsize=64)
def screening_of(projector: Custom) -> str:
    """Names the events whose values ``apply`` of a ``Custom`` could not read."""
    return _screening(projector.input)


class _Names:
    """The projector's tables with their schemas, by name."""

    def __init__(self, projector: Declared | Custom, schema: str | None) -> None:
        self._schemas = {table.name: schema or str(table.schema) for table in projector.tables}

    def __getitem__(self, table: str) -> str:
        return f"{quote(self._schemas[table])}.{quote(table)}"


def table_name(projector: Custom, schema: str | None = None) -> str:
    """The table of a ``Custom``, quoted and with its schema."""
    return _Names(projector, schema)[projector.name]


# -------------------------------------------------------------------------------- reading an object


def _columns(names: Iterable[str], prefix: str = "") -> str:
    return ", ".join(prefix + quote(name) for name in names)


def _fenced(query: str) -> str:
    """The query, computed once per row however often its columns are used further out."""
    return f"(\n{query}\nOFFSET 0\n)"


def _where(conditions: Sequence[str]) -> str:
    return "\nWHERE " + "\nAND ".join(conditions) if conditions else ""


def _segments(path: str) -> list[str]:
    return path.split(".") if path != ELEMENT else []


def _text(of: str, path: str) -> str:
    """The member of a JSON value as text, NULL where it is unset."""
    if path == ELEMENT:
        return f"nullif({of} #>> '{{}}', '')"
    *around, last = _segments(path)
    inner = "".join(f" -> {literal(name)}" for name in around)
    return f"nullif({of}{inner} ->> {literal(last)}, '')"


def _json(of: str, path: str) -> str:
    """The member of a JSON value as JSON, NULL where it is unset."""
    inner = "".join(f" -> {literal(name)}" for name in _segments(path))
    return f"nullif(nullif({of}{inner}, 'null'), '\"\"')"


def _path(dotted: str) -> str:
    return literal("{" + dotted.replace(".", ",") + "}")


_AS_JSON = (Shape.JSON, Shape.LIST)


def _value(field: Field, of: str) -> str:
    """The field's value in a JSON value, NULL where unset, as text or JSON and not yet cast."""
    read = _json if field.kind.shape in _AS_JSON else _text
    values = [read(of, path) for path in field.paths]
    value = values[0] if len(values) == 1 else f"coalesce({', '.join(values)})"
    if field.only_if is None:
        return value
    path, wanted = field.only_if
    return f"CASE WHEN {_text(of, path)} = {literal(wanted)} THEN {value} END"


def _by_event(field: Field) -> str:
    """The value that the type of the event says, NULL if it says none."""
    cases = " ".join(
        f"WHEN {pattern.condition} THEN {literal(word)}" for pattern, word in field.by_event
    )
    return f"CASE {cases} END"


def _read(field: Field, of: str, *more: str, by_event: bool = True) -> str:
    """What is read for a field: the first that is set of its paths, more, and the event's type."""
    values = [_value(field, of)] if field.paths else []
    values += more
    if field.by_event and by_event:
        values.append(_by_event(field))
    return values[0] if len(values) == 1 else f"coalesce({', '.join(values)})"


def _cast(field: Field, value: str) -> str:
    return field.kind.cast.format(value)


def _objects(fields: Iterable[Field]) -> list[str]:
    """Paths that must be objects where they are set, because fields are inside."""
    return sorted(
        {
            ".".join(_segments(path)[:end])
            for field in fields
            for path in field.paths
            for end in range(1, len(_segments(path)))
        }
    )


# ------------------------------------------------------------------------------ checking its values


def _of_shape(values: Mapping[Field, str], *shapes: Shape) -> list[str]:
    return [value for field, value in values.items() if field.paths and field.kind.shape in shapes]


def _checks(values: Mapping[Field, str], objects: Iterable[str]) -> list[str]:
    """Conditions for what casts alone would accept."""
    conditions = [f"coalesce(jsonb_typeof({path}), 'object') = 'object'" for path in objects]
    if numbers := _of_shape(values, Shape.NUMBER, Shape.INTEGER):
        conditions.append(f"concat({', '.join(numbers)}) !~ '{NO_NUMBER}'")
    conditions += [
        f"({value} IN ('true', 'false')) IS NOT FALSE" for value in _of_shape(values, Shape.BOOLEAN)
    ]
    return conditions + _check_moments(values)


def _check_moments(values: Mapping[Field, str]) -> list[str]:
    """Whether all times and dates of a row follow RFC 3339; the usual spelling is seen at once."""
    times, dates = _of_shape(values, Shape.TIME), _of_shape(values, Shape.DATE)
    if not times + dates:
        return []
    joined = f"concat_ws('{BETWEEN}', {', '.join(times + dates)}, '')"
    usual = [
        *(f"({value} LIKE '{USUAL}Z' OR {value} LIKE '{USUAL}.%') IS NOT FALSE" for value in times),
        *(f"({value} LIKE '{USUAL_DATE}') IS NOT FALSE" for value in dates),
        f"{joined} ~ '{USUAL_DIGITS}'",
    ]
    rule = [f"pipeline.is_rfc3339({value}) IS NOT FALSE" for value in times + dates]
    return [f"({' AND '.join(usual)} OR {' AND '.join(rule)})"]


def _demand(conditions: Sequence[str]) -> str:
    return f"CASE WHEN {' AND '.join(conditions)} THEN true ELSE pipeline.reject() END"


def _holds_objects(fields: Iterable[Field]) -> bool:
    """Whether the elements of an array must be objects: a field reads a member of them."""
    return any(path != ELEMENT for field in fields for path in field.paths)


def _check_children(child: Children, items: str) -> str:
    """Whether every element of an array is valid, also of a parent that is about to lose.

    If only winners' arrays were looked at, the order of arrival would decide which events are
    rejected, and with them what else they hold.
    """
    values = {field: _value(field, "c.item") for field in child.fields}
    casts = ", ".join(_cast(field, value) for field, value in values.items())
    conditions = [
        *(["jsonb_typeof(c.item) = 'object'"] if _holds_objects(child.fields) else []),
        *_checks(values, [_json("c.item", path) for path in _objects(child.fields)]),
        # Counting the NULLs is a way to have every value cast.
        f"num_nulls({casts}) >= 0",
    ]
    every = (
        f"SELECT bool_and({' AND '.join(conditions)}) "  # noqa: S608 - declared names
        f"FROM jsonb_array_elements({items}) AS c(item)"
    )
    return f"({items} IS NULL OR {items} = '[]' OR coalesce(({every}), true))"


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
        f", {_text('e.object', path)} AS {quote('_' + column)}"
        for column, path in source.inherit.items()
    )
    elements = _json("e.object", each)
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
            value = _read(field, "e.object", *inherited, by_event=not source.each)
            selected.append(f"{value} AS {quote(field.column)}")
    selected += [
        "e.event_id AS _event_id, e.event_type AS _event_type, e.created_at AS _event_time",
        "e.entity_id AS _entity_id, e.ingested_at AS _ingested_at",
        f"coalesce(e.created_at, {NO_TIME}) AS _version_created",
        'e.topic AS _topic, e."partition" AS _partition, e."offset" AS _offset, e.place AS _place',
        "jsonb_typeof(e.object) = 'object' AS _is_object",
        *(
            f"{_json('e.object', child.path)} AS _list_{at}"
            for at, child in enumerate(projector.child_tables)
        ),
        *(f"{_json('e.object', path)} AS {quote('_in_' + path)}" for path in _objects(fields)),
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
        return _cast(field, value)
    of_envelope = _ENVELOPE[field.envelope]
    return f"coalesce({_cast(field, value)}, {of_envelope})" if field.paths else of_envelope


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
        checks = _checks(texts, [f"o.{quote('_in_' + path)}" for path in _objects(fields)])
        checks += map(_check_children, projector.child_tables, arrays)
        conditions.append(_demand(["o._is_object", *checks]))
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
            f"{_cast(field, _value(field, 'i.item'))} AS {quote(field.column)}"
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


# ---------------------------------------------------------------------------------------- screening

_Rule = tuple[str, str, str]
"""Column, rule of ``pipeline.first_invalid`` (``!``: must be set), paths separated by ``|``."""

_OBJECT: _Rule = ("object", "object!", ELEMENT)


def _screening(projector: Declared) -> str:
    """Names the events of a range that break a rule, and the column: exact, but slower.

    It must never name an event that the statements would accept alone, or the neighbours would
    decide whether an event is accepted. What it does not name, bisection finds.
    """
    parts: list[str] = []
    for source in projector.sources:
        taken = projector.condition(source)
        joins, item = "", "e.payload -> 'object'"
        if source.each:
            rules: list[_Rule] = [_OBJECT, (source.each, "list", source.each)]
            parts.append(_rejected(taken, joins, item, rules))
            joins, item = _tolerant_elements(item, source.each, "i"), "i.item"
        needed = [projector.column(name) for name in sorted(projector.only_with)]
        lists: list[_Rule] = [(child.path, "list", child.path) for child in projector.child_tables]
        must = [
            field.column
            for field in projector.key_fields
            if not (field.by_event or field.envelope or field.column in source.inherit)
        ]
        rules = [_OBJECT, *_rules(projector.columns, must), *lists]
        parts.append(_rejected(taken, joins, item, rules, needed))
        for child in projector.child_tables:
            elements = joins + _tolerant_elements(item, child.path, "c")
            is_object = [_OBJECT] if _holds_objects(child.fields) else []
            rules = [*is_object, *_rules(child.fields)]
            parts.append(_rejected(taken, elements, "c.item", rules, needed, around=item))
        if projector.keeps_first:
            parts.append(
                "SELECT e.\"offset\", 'event_id', '23502' "  # noqa: S608 - constants only
                f"FROM pipeline.events AS e\nWHERE {WHERE} AND {taken} "
                "AND e.event_id IS NULL"
            )
    return "\nUNION ALL\n".join(parts)


def _rules(fields: Sequence[Field], must: Sequence[str] = ()) -> list[_Rule]:
    read = [field for field in fields if field.paths]
    return [
        *((path, "object", path) for path in _objects(read)),
        *(
            (
                field.column,
                field.kind.shape.value + ("!" if field.column in must else ""),
                "|".join(field.paths),
            )
            for field in read
            if field.kind.shape is not Shape.FREE or field.column in must
        ),
    ]


def _tolerant_elements(of: str, path: str, alias: str) -> str:
    array = f"{of} #> {_path(path)}"
    return (
        f"\nCROSS JOIN LATERAL jsonb_array_elements(CASE WHEN jsonb_typeof({array}) = 'array' "
        f"THEN {array} ELSE '[]' END) AS {alias}(item)"
    )


def _rejected(
    taken: str,
    joins: str,
    item: str,
    rules: Sequence[_Rule],
    needed: Sequence[Field] = (),
    *,
    around: str | None = None,
) -> str:
    columns, kinds, paths = (
        "CAST(ARRAY[" + ", ".join(literal(rule[at]) for rule in rules) + "] AS text[])"
        for at in range(3)
    )
    is_set = "".join(f" AND {_read(field, around or item)} IS NOT NULL" for field in needed)
    return (
        'SELECT e."offset", f.invalid[1] AS column_name, f.invalid[2] AS sqlstate\n'
        f"FROM pipeline.events AS e{joins}\n"
        f"CROSS JOIN LATERAL pipeline.first_invalid({item}, {columns}, {kinds}, {paths}) "
        "AS f(invalid)\n"
        f"WHERE {WHERE} AND {taken}{is_set} AND f.invalid IS NOT NULL"
    )
