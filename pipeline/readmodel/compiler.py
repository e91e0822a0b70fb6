"""From a declaration to the SQL that fills its tables, once for each range of the log.

A parent takes one statement, all its children one more: the rows of the parents that carry this
range's coordinates are deleted and written anew. That is also what heals a child table that was
truncated alone. Rows are written in the order of their keys, so two workers cannot deadlock.

A range is read in steps, each a query around the one before. ``OFFSET 0`` keeps the planner from
making one of two, which would compute a column anew for each of its uses.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from sqlalchemy import TextClause, text
from sqlalchemy.dialects import postgresql

from pipeline.readmodel.batch import WHERE
from pipeline.readmodel.fields import Field, Shape
from pipeline.readmodel.model import COORDINATES, VERSION_COLUMNS, Children, Declared, Source

# RFC 3339 with its zone, or a bare date. The same rule stands in pipeline.first_fault.
MOMENT = (
    "[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2}))?"
)
# As nearly all are written: which characters stand where, and that the others are digits. Pairs of
# them, so that the pattern has few states to find anew for each row.
USUAL_DATE = "____-__-__"
USUAL = f"{USUAL_DATE}T__:__:__"
USUAL_DIGITS = "^([0-9][0-9]([-T:]|([.][0-9]+)?Zx|x)?)*$"
# Between values that are checked at once. A letter, since a time with a letter in it is refused by
# its cast, whereas punctuation is passed over there.
BETWEEN = "x"
# With nothing but these, PostgreSQL's casts take decimal numbers and nothing else.
NO_NUMBER = "[^0-9.+-]"

# Below every real time, and not -infinity, which Python and its data frames cannot read.
NO_TIME = "CAST('1970-01-01 00:00:00+00' AS timestamptz)"

_quote = postgresql.dialect().identifier_preparer.quote_identifier  # type: ignore[no-untyped-call]  # SQLAlchemy's dialects are untyped


@dataclass(frozen=True)
class Program:
    """The statements of one projector for one schema.

    Attributes:
        statements: To be run in this order, in one transaction.
        screening: Names the guilty events of a range: offset, column, SQLSTATE.
    """

    statements: tuple[str, ...]
    screening: str

    @cached_property
    def clauses(self) -> tuple[TextClause, ...]:
        """The statements, as SQLAlchemy takes them."""
        return tuple(text(statement) for statement in self.statements)


@lru_cache(maxsize=256)
def compile_declared(projector: Declared, schema: str) -> Program:
    """The SQL that fills the projector's tables in ``schema``; the same text every time."""
    statements = [_upsert(projector, schema)]
    if projector.children:
        statements.append(_replace_children(projector, schema))
    return Program(tuple(statements), _screening(projector))


# -------------------------------------------------------------------------------- reading an object


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _columns(names: Iterable[str], prefix: str = "") -> str:
    return ", ".join(prefix + _quote(name) for name in names)


def _fenced(query: str) -> str:
    """The query, computed once for each row however often its columns are used further out."""
    return f"(\n{query}\nOFFSET 0\n)"


def _where(conditions: Sequence[str]) -> str:
    return "\nWHERE " + "\nAND ".join(conditions) if conditions else ""


def _text(of: str, path: str) -> str:
    """The member of a JSON object as text, NULL where it is unset."""
    *around, last = path.split(".")
    inner = "".join(f" -> {_literal(name)}" for name in around)
    return f"nullif({of}{inner} ->> {_literal(last)}, '')"


def _json(of: str, path: str) -> str:
    """The member of a JSON object as JSON, NULL where it is unset."""
    inner = "".join(f" -> {_literal(name)}" for name in path.split("."))
    return f"nullif(nullif({of}{inner}, 'null'), '\"\"')"


def _path(dotted: str) -> str:
    return _literal("{" + dotted.replace(".", ",") + "}")


_AS_JSON = (Shape.JSON, Shape.LIST)


def _value(one: Field, of: str) -> str:
    """The field's value, NULL where it is unset, as text or JSON and not yet cast."""
    return _json(of, one.path) if one.kind.shape in _AS_JSON else _text(of, one.path)


def _cast(one: Field, value: str) -> str:
    return one.kind.cast.format(value)


def _objects(fields: Iterable[Field]) -> list[str]:
    """Paths that must be objects where they are there, because fields stand inside."""
    return sorted(
        {".".join(one.segments[:end]) for one in fields for end in range(1, len(one.segments))}
    )


# ------------------------------------------------------------------------------ checking its values


def _of_shape(values: Mapping[Field, str], *shapes: Shape) -> list[str]:
    return [value for one, value in values.items() if one.kind.shape in shapes]


def _checks(values: Mapping[Field, str], objects: Iterable[str]) -> list[str]:
    """Conditions for what casts alone would take too generously."""
    conditions = [f"coalesce(jsonb_typeof({one}), 'object') = 'object'" for one in objects]
    if numbers := _of_shape(values, Shape.NUMBER, Shape.INTEGER):
        conditions.append(f"concat({', '.join(numbers)}) !~ '{NO_NUMBER}'")
    conditions += [
        f"({value} IN ('true', 'false')) IS NOT FALSE" for value in _of_shape(values, Shape.BOOLEAN)
    ]
    return conditions + _check_moments(values)


def _check_moments(values: Mapping[Field, str]) -> list[str]:
    """Whether all times and dates of a row follow RFC 3339, put together.

    Nearly all are written in the one way of ``USUAL``, which is seen at half the price of the rule.
    """
    times, dates = _of_shape(values, Shape.TIME), _of_shape(values, Shape.DATE)
    if not times + dates:
        return []
    joined = f"concat_ws('{BETWEEN}', {', '.join(times + dates)}, '')"
    usual = [
        *(f"({one} LIKE '{USUAL}Z' OR {one} LIKE '{USUAL}.%') IS NOT FALSE" for one in times),
        *(f"({one} LIKE '{USUAL_DATE}') IS NOT FALSE" for one in dates),
        f"{joined} ~ '{USUAL_DIGITS}'",
    ]
    rule = [f"{joined} ~ '^(({MOMENT})?{BETWEEN})*$'"]
    if dates:
        # Only the first ten characters are cast, so nothing else would notice two dates in one.
        rule.append(f"strpos(concat({', '.join(dates)}), '{BETWEEN}') = 0")
    return [f"({' AND '.join(usual)} OR {' AND '.join(rule)})"]


def _demand(conditions: Sequence[str]) -> str:
    return f"CASE WHEN {' AND '.join(conditions)} THEN true ELSE pipeline.reject() END"


def _check_children(child: Children, items: str) -> str:
    """Whether every row of a list is one, also of a parent that is about to lose.

    If only winners' lists were looked at, it would hang on the order of arrival which events are
    guilty, and with them what else they hold.
    """
    values = {one: _value(one, "c.item") for one in child.fields}
    casts = ", ".join(_cast(one, value) for one, value in values.items())
    conditions = [
        "jsonb_typeof(c.item) = 'object'",
        *_checks(values, [_json("c.item", path) for path in _objects(child.fields)]),
        *(f"{value} IS NOT NULL" for one, value in values.items() if one.column in child.key),
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
    """The range's events as rows, with their versions and lists.

    Args:
        projector: Whose rows.
        whole: Every column, checked; else the keys only, of rows that were checked just before.
    """
    return "\nUNION ALL\n".join(
        _rows_of(projector, source, whole=whole) for source in projector.sources
    )


_ENVELOPE = 'e.event_id, e.created_at, e.topic, e."partition", e."offset"'


def _rows_of(projector: Declared, source: Source, *, whole: bool) -> str:
    decisive = (*projector.key, projector.clock, projector.status)
    needed = {*projector.unless_unset, *(one.column for one in decisive if one)}
    fields = [one for one in projector.fields if whole or one.column in needed]
    objects = _events(projector, source)
    if source.each:
        objects = _elements(source, source.each, objects, check=whole)
    members = _members(projector, source, fields, objects)
    return _values(projector, fields, members, check=whole)


def _events(projector: Declared, source: Source) -> str:
    """The events of the range: envelope and object."""
    return (
        f"SELECT {_ENVELOPE}, e.payload -> 'object' AS object, 0 AS place\n"
        f"FROM pipeline.events AS e\nWHERE {WHERE}\nAND {projector.condition(source)}"
    )


def _elements(source: Source, each: str, events: str, *, check: bool) -> str:
    """The elements of a list in each object, with what they may lack of it."""
    inherited = "".join(
        f", {_text('e.object', path)} AS {_quote('_' + column)}"
        for column, path in source.inherit.items()
    )
    elements = _json("e.object", each)
    there = f"{elements} <> '[]'"
    if check:
        # Without an object there is no list, and so nothing that is refused.
        there = (
            f"CASE WHEN jsonb_typeof(e.object) = 'object' THEN {there} ELSE pipeline.reject() END"
        )
    return (
        f"SELECT {_ENVELOPE}, i.item AS object, i.place{inherited}\n"
        f"FROM {_fenced(events)} AS e\n"
        f"CROSS JOIN LATERAL jsonb_array_elements({elements}) WITH ORDINALITY AS i(item, place)\n"
        f"WHERE {there}"
    )


def _members(projector: Declared, source: Source, fields: Sequence[Field], objects: str) -> str:
    """What the fields read of each object, as text or JSON, and the lists of the children."""
    selected = []
    for one in fields:
        value = f"e.{_quote(one.path)}"
        if one.kind.shape is not Shape.ENVELOPE:
            value = _value(one, "e.object")
        if one.column in source.inherit:
            value = f"coalesce({value}, e.{_quote('_' + one.column)})"
        selected.append(f"{value} AS {_quote(one.column)}")
    selected += [
        "e.event_id AS _event_id",
        f"coalesce(e.created_at, {NO_TIME}) AS _version_created",
        'e.topic AS _topic, e."partition" AS _partition, e."offset" AS _offset, e.place AS _place',
        "jsonb_typeof(e.object) = 'object' AS _is_object",
        *(
            f"{_json('e.object', child.path)} AS _list_{at}"
            for at, child in enumerate(projector.children)
        ),
        *(f"{_json('e.object', path)} AS {_quote('_in_' + path)}" for path in _objects(fields)),
    ]
    return f"SELECT {', '.join(selected)}\nFROM {_fenced(objects)} AS e"


def _values(projector: Declared, fields: Sequence[Field], members: str, *, check: bool) -> str:
    """The members as values of their types, with the row's version."""
    texts = {one: f"o.{_quote(one.column)}" for one in fields}
    lists = [f"o._list_{at}" for at in range(len(projector.children))]
    selected = [
        *(f"{_cast(one, value)} AS {_quote(one.column)}" for one, value in texts.items()),
        f"o._event_id, {_version(projector, texts)}, o._place",
        *lists,
    ]
    # Without an object nothing is unset either: that is refused.
    conditions = [
        f"(o.{_quote(column)} IS NOT NULL OR NOT o._is_object)"
        for column in sorted(projector.unless_unset)
    ]
    if check:
        checks = _checks(texts, [f"o.{_quote('_in_' + path)}" for path in _objects(fields)])
        checks += map(_check_children, projector.children, lists)
        conditions.append(_demand(["o._is_object", *checks]))
    return f"SELECT {', '.join(selected)}\nFROM {_fenced(members)} AS o" + _where(conditions)


def _version(projector: Declared, texts: Mapping[Field, str]) -> str:
    time, rank = NO_TIME, "0"
    if projector.clock:
        time = f"coalesce({_cast(projector.clock, texts[projector.clock])}, o._version_created)"
    if projector.status:
        states = " ".join(f"WHEN {_literal(name)} THEN {at}" for name, at in projector.status.ranks)
        rank = f"CASE {texts[projector.status]} {states} ELSE {projector.status.unknown_rank} END"
    return (
        f"{time} AS _version_time, CAST({rank} AS smallint) AS _version_rank, "
        "o._version_created, o._topic, o._partition, o._offset"
    )


# ----------------------------------------------------------------------------------- the statements


def _table(schema: str, name: str) -> str:
    return f"{_quote(schema)}.{_quote(name)}"


def _names(fields: Iterable[Field]) -> list[str]:
    return [one.column for one in fields]


def _best_first(projector: Declared) -> str:
    """The order in which the winner of each key comes first."""
    key = _columns(_names(projector.key))
    if projector.keeps_first:
        return f"{key}, {_columns(COORDINATES)}"
    newest = ", ".join(f"{_quote(name)} DESC" for name in VERSION_COLUMNS)
    return f"{key}, {newest}, _place DESC"


def _upsert(projector: Declared, schema: str) -> str:
    rows = _rows(projector, whole=True)
    key = _names(projector.key)
    columns = [*_names(projector.fields), "_event_id", *VERSION_COLUMNS]
    others = [name for name in columns if name not in key]
    compared = COORDINATES if projector.keeps_first else VERSION_COLUMNS
    beats = "<" if projector.keeps_first else ">"
    changes = ", ".join(f"{_quote(name)} = excluded.{_quote(name)}" for name in others)
    return (
        f"INSERT INTO {_table(schema, projector.name)} AS t ({_columns(columns)})\n"
        f"SELECT DISTINCT ON ({_columns(key)}) {_columns(columns)} FROM (\n{rows}\n) AS s\n"
        f"ORDER BY {_best_first(projector)}\n"
        f"ON CONFLICT ({_columns(key)}) DO UPDATE SET {changes}\n"
        f"WHERE ({_columns(compared, 'excluded.')}) {beats} ({_columns(compared, 't.')})"
    )


def _replace_children(projector: Declared, schema: str) -> str:
    """One statement for all child tables, so that the range is read once for them.

    Its snapshot is that of a moment at which the parents are locked: nobody else has touched their
    children since.
    """
    parts = [f"winners AS MATERIALIZED (\n{_winners(projector, schema)}\n)"]
    for at, child in enumerate(projector.children):
        parts.append(f"gone_{at} AS (\n{_delete_children(projector, schema, child)}\n)")
    inserts = [
        _insert_children(projector, schema, child, at)
        for at, child in enumerate(projector.children)
    ]
    parts += [f"new_{at} AS (\n{insert}\n)" for at, insert in enumerate(inserts[:-1])]
    return "WITH " + ",\n".join(parts) + f"\n{inserts[-1]}"


def _winners(projector: Declared, schema: str) -> str:
    """Parents that carry coordinates of this range, each with its lists."""
    rows = _rows(projector, whole=False)
    key = _names(projector.key)
    same = " AND ".join(f"t.{_quote(name)} = s.{_quote(name)}" for name in (*key, *COORDINATES))
    order = ", ".join(
        [*(f"s.{_quote(name)}" for name in key)]
        + [f"s.{_quote(name)} DESC" for name in VERSION_COLUMNS]
    )
    lists = ", ".join(f"s._list_{at}" for at in range(len(projector.children)))
    return (
        f"SELECT DISTINCT ON ({_columns(key, 's.')}) {_columns(key, 's.')}, {lists}\n"
        f"FROM (\n{rows}\n) AS s\n"
        f"JOIN {_table(schema, projector.name)} AS t ON {same}\n"
        f"ORDER BY {order}, s._place DESC"
    )


def _delete_children(projector: Declared, schema: str, child: Children) -> str:
    key = _names(projector.key)
    same = " AND ".join(f"c.{_quote(name)} = w.{_quote(name)}" for name in key)
    table = _table(schema, child.table)
    return f"DELETE FROM {table} AS c USING winners AS w WHERE {same} RETURNING 1"  # noqa: S608 - names


def _insert_children(projector: Declared, schema: str, child: Children, at: int) -> str:
    key = _names(projector.key)
    place = [] if child.key else ["position"]
    columns = [*key, *place, *_names(child.fields)]
    told_apart = [*key, *(child.key or place)]
    selected = [
        *(f"w.{_quote(name)}" for name in key),
        *(["CAST(i.place AS integer) AS position"] if place else []),
        *(f"{_cast(one, _value(one, 'i.item'))} AS {_quote(one.column)}" for one in child.fields),
        "i.place AS _place",
    ]
    # Counted first, so that all that is to go has gone before anything comes.
    return (
        f"INSERT INTO {_table(schema, child.table)} ({_columns(columns)})\n"  # noqa: S608 - names
        f"SELECT DISTINCT ON ({_columns(told_apart)}) {_columns(columns)} FROM (\n"
        f"SELECT {', '.join(selected)}\nFROM winners AS w\n"
        f"CROSS JOIN LATERAL jsonb_array_elements(w._list_{at}) WITH ORDINALITY AS i(item, place)\n"
        f"WHERE w._list_{at} <> '[]' AND (SELECT count(*) FROM gone_{at}) >= 0\n) AS s\n"
        f"ORDER BY {_columns(told_apart)}, _place"
    )


# ---------------------------------------------------------------------------------------- screening

_Rule = tuple[str, str, str]
"""Column, rule of ``pipeline.first_fault`` (``!``: must be there), path."""


def _screening(projector: Declared) -> str:
    """Names the events of a range that break a rule, and the column: exact, but slower.

    It must never name an event that the statements would take by itself, or it would hang on the
    neighbours whether an event lands. What it does not name, halving finds.
    """
    parts: list[str] = []
    for source in projector.sources:
        taken = projector.condition(source)
        joins, item = "", "e.payload -> 'object'"
        if source.each:
            parts.append(_faults(taken, joins, item, [(source.each, "list", source.each)]))
            joins, item = _tolerant_elements(item, source.each, "i"), "i.item"
        needed = [projector.column(name).path for name in sorted(projector.unless_unset)]
        lists = [(child.path, "list", child.path) for child in projector.children]
        rules = _rules(projector.fields, must=_names(projector.key))
        parts.append(_faults(taken, joins, item, [*rules, *lists], needed))
        for child in projector.children:
            elements = joins + _tolerant_elements(item, child.path, "c")
            rules = _rules(child.fields, must=child.key)
            parts.append(_faults(taken, elements, "c.item", rules, needed, around=item))
        if projector.keeps_first:
            parts.append(
                "SELECT e.\"offset\", 'event_id', '23502' "  # noqa: S608 - constants only
                f"FROM pipeline.events AS e\nWHERE {WHERE} AND {taken} "
                "AND e.event_id IS NULL"
            )
    return "\nUNION ALL\n".join(parts)


def _rules(fields: Sequence[Field], must: Sequence[str]) -> list[_Rule]:
    read = [one for one in fields if one.kind.shape is not Shape.ENVELOPE]
    # A required key first: what has none is no row at all.
    objects = {".".join(one.segments[:end]) for one in read for end in range(1, len(one.segments))}
    return [
        *((path, "object", path) for path in sorted(objects)),
        *(
            (one.column, one.kind.shape.value + ("!" if one.column in must else ""), one.path)
            for one in read
            if one.kind.shape is not Shape.FREE or one.column in must
        ),
    ]


def _tolerant_elements(of: str, path: str, alias: str) -> str:
    array = f"{of} #> {_path(path)}"
    return (
        f"\nCROSS JOIN LATERAL jsonb_array_elements(CASE WHEN jsonb_typeof({array}) = 'array' "
        f"THEN {array} ELSE '[]' END) AS {alias}(item)"
    )


def _faults(
    taken: str,
    joins: str,
    item: str,
    rules: Sequence[_Rule],
    needed: Sequence[str] = (),
    *,
    around: str | None = None,
) -> str:
    columns, kinds, paths = (
        "CAST(ARRAY[" + ", ".join(_literal(rule[at]) for rule in rules) + "] AS text[])"
        for at in range(3)
    )
    there = "".join(
        f" AND nullif({around or item} #>> {_path(path)}, '') IS NOT NULL" for path in needed
    )
    return (
        'SELECT e."offset", f.fault[1] AS column_name, f.fault[2] AS sqlstate\n'
        f"FROM pipeline.events AS e{joins}\n"
        f"CROSS JOIN LATERAL pipeline.first_fault({item}, {columns}, {kinds}, {paths}) "
        "AS f(fault)\n"
        f"WHERE {WHERE} AND {taken}{there} AND f.fault IS NOT NULL"
    )
