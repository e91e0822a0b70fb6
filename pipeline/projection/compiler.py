"""From a declaration to the SQL that fills its tables, once for each range of the log.

A parent takes one statement, its children two more each: the rows of the parents that carry this
range's coordinates are deleted and written anew. That is also what heals a child table that was
truncated alone. Rows are written in the order of their keys, so two workers cannot deadlock.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from sqlalchemy import TextClause, text
from sqlalchemy.dialects import postgresql

from pipeline.projection.batch import WHERE
from pipeline.projection.declaration import (
    COORDINATES,
    VERSION_COLUMNS,
    Children,
    Declared,
    Source,
)
from pipeline.projection.fields import Field, Shape

# RFC 3339 with its zone, or a bare date. The same rule stands in pipeline.first_fault.
MOMENT = (
    "[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2}))?"
)
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
    for number, child in enumerate(projector.children):
        winners = _winners(projector, schema, number)
        statements.append(_delete_children(projector, schema, child, winners))
        statements.append(_insert_children(projector, schema, child, winners))
    return Program(tuple(statements), _screening(projector))


# -------------------------------------------------------------------------------- reading an object


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _columns(names: Iterable[str], prefix: str = "") -> str:
    return ", ".join(prefix + _quote(name) for name in names)


class _Record:
    """One JSON object, its members as columns.

    Args:
        alias: Name of the record in the statement.
        of: SQL of the object.
        texts: Paths that are read as text.
        jsons: Paths that are read as JSON.
    """

    def __init__(
        self, alias: str, of: str, *, texts: Iterable[str] = (), jsons: Iterable[str] = ()
    ) -> None:
        self._alias = alias
        self._of = of
        self._types: dict[str, str] = {}
        self._objects: set[str] = set()
        for path in texts:
            head, _, rest = path.partition(".")
            if rest or self._types.get(head) == "jsonb":
                self._types[head] = "jsonb"
            else:
                self._types[head] = "text"
        for path in jsons:
            self._types[path.partition(".")[0]] = "jsonb"
        for path in (*texts, *jsons):
            parts = path.split(".")
            self._objects.update(".".join(parts[:end]) for end in range(1, len(parts)))

    def join(self) -> str:
        # A record needs a column, also where nothing of the object is read.
        types = self._types or {"id": "text"}
        members = ", ".join(f"{_quote(name)} {kind}" for name, kind in sorted(types.items()))
        return f"CROSS JOIN LATERAL jsonb_to_record({self._of}) AS {self._alias}({members})"

    def raw(self, path: str) -> str:
        head, _, rest = path.partition(".")
        member = f"{self._alias}.{_quote(head)}"
        if not rest:
            return member if self._types[head] == "text" else f"({member} #>> '{{}}')"
        if "." not in rest:
            return f"({member} ->> {_literal(rest)})"
        return f"({member} #>> {_path(rest)})"

    def text(self, path: str) -> str:
        return f"nullif({self.raw(path)}, '')"

    def json(self, path: str) -> str:
        head, _, rest = path.partition(".")
        member = f"{self._alias}.{_quote(head)}"
        if rest:
            member = f"nullif({member} #> {_path(rest)}, 'null')"
        return f"nullif({member}, '\"\"')"

    def objects(self) -> list[str]:
        """Members that hold the paths' other parts, so must be objects where they are there."""
        return [self.json(path) for path in sorted(self._objects)]


def _path(dotted: str) -> str:
    return _literal("{" + dotted.replace(".", ",") + "}")


_AS_JSON = (Shape.JSON, Shape.LIST)


def _reader(alias: str, of: str, fields: Iterable[Field], lists: Iterable[str] = ()) -> _Record:
    read = [one for one in fields if one.kind.shape is not Shape.ENVELOPE]
    return _Record(
        alias,
        of,
        texts=[one.path for one in read if one.kind.shape not in _AS_JSON],
        jsons=[*(one.path for one in read if one.kind.shape in _AS_JSON), *lists],
    )


def _value(one: Field, record: _Record, instead: str | None = None) -> str:
    """The field's value, NULL where it is unset, as text or JSON and not yet cast."""
    if one.kind.shape is Shape.ENVELOPE:
        return f"e.{_quote(one.path)}"
    value = record.json(one.path) if one.kind.shape in _AS_JSON else record.text(one.path)
    return value if instead is None else f"coalesce({value}, {instead})"


def _checks(shapes: Sequence[tuple[Shape, str]], objects: Sequence[str]) -> list[str]:
    """Conditions for the values of a row that casts alone would take too generously."""
    numbers = [value for shape, value in shapes if shape in (Shape.NUMBER, Shape.INTEGER)]
    moments = [value for shape, value in shapes if shape in (Shape.TIME, Shape.DATE)]
    conditions = []
    if numbers:
        conditions.append(f"concat({', '.join(numbers)}) !~ '{NO_NUMBER}'")
    if moments:
        joined = f"concat_ws('{BETWEEN}', {', '.join(moments)}, '')"
        conditions.append(f"{joined} ~ '^(({MOMENT})?{BETWEEN})*$'")
    if dates := [value for shape, value in shapes if shape is Shape.DATE]:
        # Only the first ten characters are cast, so nothing else would notice two dates in one.
        conditions.append(f"strpos(concat({', '.join(dates)}), '{BETWEEN}') = 0")
    conditions += [
        f"coalesce({value}, '') IN ('', 'true', 'false')"
        for shape, value in shapes
        if shape is Shape.BOOLEAN
    ]
    conditions += [f"coalesce(jsonb_typeof({value}), 'object') = 'object'" for value in objects]
    return conditions


def _demand(conditions: Sequence[str]) -> str:
    return f"CASE WHEN {' AND '.join(conditions)} THEN true ELSE pipeline.reject() END"


def _checks_children(child: Children, items: str) -> str:
    """Whether every row of a list is one, also of a parent that is about to lose.

    If only winners' lists were looked at, it would hang on the order of arrival which events are
    guilty, and with them what else they hold.
    """
    record = _reader("r", "c.item", child.fields)
    values = {one.column: _value(one, record) for one in child.fields}
    shapes = [
        (one.kind.shape, record.raw(one.path))
        for one in child.fields
        if one.kind.shape not in _AS_JSON
    ]
    # Counting the NULLs is a way to have every value cast.
    casts = ", ".join(one.kind.cast.format(values[one.column]) for one in child.fields)
    conditions = [
        *_checks(shapes, record.objects()),
        *(f"{values[name]} IS NOT NULL" for name in child.key),
        f"num_nulls({casts}) >= 0",
    ]
    return (
        f"coalesce((SELECT bool_and({' AND '.join(conditions)}) "  # noqa: S608 - declared names
        f"FROM jsonb_array_elements({items}) AS c(item) {record.join()}), true)"
    )


# ---------------------------------------------------------------------------------- rows of a range


def _rows(projector: Declared, *, whole: bool) -> str:
    """The range's events as rows, with their versions and lists.

    Args:
        projector: Whose rows.
        whole: Every column, checked; else the keys only, of rows that were checked just before.
    """
    return "\nUNION ALL\n".join(
        _rows_of(projector, source, whole=whole) for source in projector.sources
    )


def _rows_of(projector: Declared, source: Source, *, whole: bool) -> str:
    around, of, place = _elements(source)
    lists = [child.path for child in projector.children]
    decisive = (*projector.key, projector.clock, projector.status)
    needed = {*projector.unless_unset, *(one.column for one in decisive if one)}
    fields = [one for one in projector.fields if whole or one.column in needed]
    record = _reader("o", of, fields, lists)
    inherited: dict[str, str] = {}
    if source.each:
        outer = _around(source.each, source.inherit)
        inherited = {column: outer.text(path) for column, path in source.inherit.items()}
    values = {one.column: _value(one, record, inherited.get(one.column)) for one in fields}
    selected = [
        f"{one.kind.cast.format(values[one.column])} AS {_quote(one.column)}" for one in fields
    ]
    selected += [
        "e.event_id AS _event_id",
        *_version(projector, values),
        f"{place} AS _place",
    ]
    if not whole:
        selected += [f"{record.json(path)} AS _list_{at}" for at, path in enumerate(lists)]
    shapes = [
        (one.kind.shape, values[one.column] if one.column in inherited else record.raw(one.path))
        for one in fields
        if one.kind.shape not in (Shape.ENVELOPE, *_AS_JSON)
    ]
    conditions = [WHERE, projector.condition(source)]
    if whole and (source.each or projector.keeps_first):
        # Without an object there is no list, or no key in it, and so nothing that is refused.
        conditions.append(_demand(["jsonb_typeof(e.payload -> 'object') = 'object'"]))
    conditions += [f"{values[column]} IS NOT NULL" for column in sorted(projector.unless_unset)]
    if whole:
        checks = _checks(shapes, record.objects())
        checks += [_checks_children(one, record.json(one.path)) for one in projector.children]
        conditions += [_demand(checks)] if checks else []
    return (
        f"SELECT {', '.join(selected)}\nFROM pipeline.events AS e\n"
        + "\n".join([*around, record.join()])
        + "\nWHERE "
        + "\nAND ".join(conditions)
    )


def _elements(source: Source) -> tuple[list[str], str, str]:
    """Joins that lead to a row's object, its SQL, and its place in the list."""
    if source.each is None:
        return [], "e.payload -> 'object'", "0"
    around = _around(source.each, source.inherit)
    elements = (
        f"CROSS JOIN LATERAL jsonb_array_elements({around.json(source.each)}) "
        "WITH ORDINALITY AS i(item, place)"
    )
    return [around.join(), elements], "i.item", "i.place"


def _around(each: str, inherit: Mapping[str, str]) -> _Record:
    """The object around a list's elements."""
    return _Record("p", "e.payload -> 'object'", texts=inherit.values(), jsons=[each])


def _version(projector: Declared, values: dict[str, str]) -> list[str]:
    created = f"coalesce(e.created_at, {NO_TIME})"
    time = NO_TIME
    if projector.clock:
        clock = projector.clock.kind.cast.format(values[projector.clock.column])
        time = f"coalesce({clock}, e.created_at, {NO_TIME})"
    rank = "0"
    if projector.status:
        states = " ".join(f"WHEN {_literal(name)} THEN {at}" for name, at in projector.status.ranks)
        value = values[projector.status.column]
        rank = f"CASE {value} {states} ELSE {projector.status.unknown_rank} END"
    return [
        f"{time} AS _version_time",
        f"CAST({rank} AS smallint) AS _version_rank",
        f"{created} AS _version_created",
        "e.topic AS _topic",
        'e."partition" AS _partition',
        'e."offset" AS _offset',
    ]


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


def _winners(projector: Declared, schema: str, number: int) -> str:
    """Parents that carry coordinates of this range, each with its list."""
    rows = _rows(projector, whole=False)
    key = _names(projector.key)
    same = " AND ".join(f"t.{_quote(name)} = s.{_quote(name)}" for name in (*key, *COORDINATES))
    order = ", ".join(
        [*(f"s.{_quote(name)}" for name in key)]
        + [f"s.{_quote(name)} DESC" for name in VERSION_COLUMNS]
    )
    return (
        f"SELECT DISTINCT ON ({_columns(key, 's.')}) {_columns(key, 's.')}, "
        f"s._list_{number} AS _list\nFROM (\n{rows}\n) AS s\n"
        f"JOIN {_table(schema, projector.name)} AS t ON {same}\n"
        f"ORDER BY {order}, s._place DESC"
    )


def _delete_children(projector: Declared, schema: str, child: Children, winners: str) -> str:
    key = _names(projector.key)
    same = " AND ".join(f"c.{_quote(name)} = w.{_quote(name)}" for name in key)
    table = _table(schema, child.table)
    return f"DELETE FROM {table} AS c USING (\n{winners}\n) AS w\nWHERE {same}"  # noqa: S608 - names


def _insert_children(projector: Declared, schema: str, child: Children, winners: str) -> str:
    key = _names(projector.key)
    place = [] if child.key else ["position"]
    columns = [*key, *place, *_names(child.fields)]
    told_apart = [*key, *(child.key or place)]
    record = _reader("o", "i.item", child.fields)
    values = [(one, _value(one, record)) for one in child.fields]
    selected = [
        *(f"w.{_quote(name)}" for name in key),
        *(["CAST(i.place AS integer) AS position"] if place else []),
        *(f"{one.kind.cast.format(value)} AS {_quote(one.column)}" for one, value in values),
        "i.place AS _place",
    ]
    return (
        f"INSERT INTO {_table(schema, child.table)} ({_columns(columns)})\n"
        f"SELECT DISTINCT ON ({_columns(told_apart)}) {_columns(columns)} FROM (\n"
        f"SELECT {', '.join(selected)}\nFROM (\n{winners}\n) AS w\n"
        "CROSS JOIN LATERAL jsonb_array_elements(w._list) WITH ORDINALITY AS i(item, place)\n"
        f"{record.join()}\n) AS s\n"
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
