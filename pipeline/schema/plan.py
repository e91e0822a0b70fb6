"""What is to be done so that the schemas for analysts hold what is declared, and no more.

Additive changes are made in place, each object in a transaction of its own. For anything else the
table is recorded as it should be; the rebuild that is due anyway makes it beside the live one and
puts it in its place. What others have made on our tables survives, or is named before anything
changes. Nothing that holds data is dropped.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alembic.autogenerate import produce_migrations
from alembic.migration import MigrationContext
from alembic.operations import ops
from sqlalchemy import Connection, MetaData, Row, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.schema import SchemaItem

from pipeline.db import PERSONAL_SCHEMA, READ_SCHEMA, metadata
from pipeline.errors import ConfigurationError
from pipeline.schema import objects
from pipeline.schema.declared import DeclaredTable, DeclaredView, literal, plain_view, sql_of

SCHEMAS = objects.READ_SCHEMAS


@dataclass(frozen=True)
class Step:
    """One change, executed as a whole.

    Attributes:
        name: Schema and name of the object.
        what: What happens, for people.
        statements: What is executed.
        declared: The object as it is recorded afterwards; None to forget it.
        in_transaction: False for a statement that must not be in one.
        remade: Views of ours that the statements make again.
    """

    name: str
    what: str
    statements: tuple[str, ...]
    declared: DeclaredTable | DeclaredView | None = None
    in_transaction: bool = True
    remade: tuple[DeclaredView, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def moves(db: Connection, tables: Iterable[DeclaredTable]) -> Iterator[Step]:
    """Tables that are in the wrong one of the two schemas: a column has become personal, or is not.

    Raises:
        ConfigurationError: Others have made views on a plain view that must give way.
    """
    recorded, there = objects.recorded(db), objects.relations(db, SCHEMAS)
    for table in tables:
        before = f"{_other(table.table.schema)}.{table.table.name}"
        is_table = before in there and there[before].kind == "r"
        if not (is_table and before in recorded and recorded[before].is_ours):
            continue
        move = [
            f"ALTER TABLE {quoted(before)} SET SCHEMA {table.table.schema}",
            "UPDATE pipeline.declared_objects "  # noqa: S608 - declared names
            f"SET name = {literal(table.name)} WHERE name = {literal(before)}",
        ]
        if table.personal:
            _, others = dependents(db, there[before].oid)
            closed = (
                f"; no longer readable: {', '.join(others)}, unless the owner may read personal "
                "data. A materialized view keeps its copy until it is refreshed or dropped"
            )
            what = f"move from {before}, as a column is personal{closed if others else ''}"
            yield Step(table.name, what, tuple(move), table)
        else:
            yield _move_out(db, table, before, move, recorded, there)


def _move_out(
    db: Connection,
    table: DeclaredTable,
    before: str,
    move: Sequence[str],
    recorded: Mapping[str, objects.Recorded],
    there: Mapping[str, Row[Any]],
) -> Step:
    """The table takes the name of its plain view; views of ours on that one are made again."""
    what = f"move from {before}, as no column is personal any more"
    if not (table.name in there and table.name in recorded and recorded[table.name].is_ours):
        return Step(table.name, what, tuple(move), table)
    ours, others = dependents(db, there[table.name].oid)
    if others:
        raise ConfigurationError(
            f"{table.name} is a table again, as no column is personal any more, and others "
            f"have made views on the view of that name: {'; '.join(others)}. Nothing was "
            "changed. Have their owners drop them, then repeat `pipeline migrate`"
        )
    grants = [statement for name in ours for statement in grants_on(db, there[name].oid)]
    statements = [
        *(f"DROP VIEW {quoted(name)}" for name in [*reversed(ours), table.name]),
        "DELETE FROM pipeline.declared_objects "  # noqa: S608 - declared names
        f"WHERE name = {literal(table.name)}",
        *move,
        *(recorded[name].definition for name in ours),
        *grants,
    ]
    remade = tuple(DeclaredView(name, recorded[name].definition) for name in ours)
    return Step(table.name, what, tuple(statements), table, remade=remade)


def _other(schema: str | None) -> str:
    return READ_SCHEMA if schema == PERSONAL_SCHEMA else PERSONAL_SCHEMA


def tables(db: Connection, declared: Sequence[DeclaredTable]) -> Iterator[Step]:
    """What is missing or different of the tables.

    Raises:
        ConfigurationError: Somebody else's object has the name of a table, or others' objects are
            on a table that must be replaced; the text names each.
    """
    recorded, there = objects.recorded(db), objects.relations(db, SCHEMAS)
    for table in declared:
        _refuse_others(table.name, recorded, there, table.table.comment or "")
    present = [table for table in declared if table.name in there]
    changes = _changes(db, present)
    for table in declared:
        if table.name not in there:
            yield _create(table, was_there=table.name in recorded)
        else:
            yield from _alter(db, table, recorded.get(table.name), changes.get(table.name, []))


def _refuse_others(
    name: str,
    recorded: Mapping[str, objects.Recorded],
    there: Mapping[str, Row[Any]],
    comment: str,
) -> None:
    """Refuse an object that is not recorded, unless a DBA made it by what `--sql` printed."""
    known = recorded.get(name)
    if known is None and name in there:
        found = there[name]
        if (
            found.is_owners
            and found.comment
            and found.comment.replace("'", "''")
            in (
                comment.replace("'", "''"),
                *re.findall(r"COMMENT ON VIEW \S+ IS '((?:[^']|'')*)'", comment),
            )
        ):
            return
    if name in there and not (known and known.is_ours):
        owner = there[name].owner
        raise ConfigurationError(
            f"{name} exists, and `pipeline migrate` has not made it; its owner is {owner}. It is "
            "left as it is. Rename it or move it to another schema, then repeat: "
            f"ALTER TABLE {quoted(name)} RENAME TO …"
        )


def _create(table: DeclaredTable, *, was_there: bool) -> Step:
    watch = f"SELECT pipeline.watch_read_model({literal(table.name)}, {literal(table.projector)})"
    statements = [*sql_of(ops.CreateTableOp.from_table(table.table)), *_indexes(table), watch]
    if was_there:
        # As after TRUNCATE: the projector fills the table from the beginning of the log.
        is_main = str(table.table.name == table.projector).lower()
        statements.append(f"SELECT pipeline.start_again({literal(table.projector)}, {is_main})")
    what = "create again: somebody dropped it" if was_there else "create table"
    return Step(table.name, what, tuple(statements), table)


def _indexes(table: DeclaredTable) -> list[str]:
    return sql_of(*(ops.CreateIndexOp.from_index(index) for index in sorted(
        table.table.indexes, key=lambda index: str(index.name)
    )))  # fmt: skip


def _changes(
    db: Connection, declared: Sequence[DeclaredTable]
) -> dict[str, list[ops.MigrateOperation]]:
    """The differences that Alembic finds, by table."""
    wanted = MetaData(naming_convention=metadata.naming_convention)
    for table in declared:
        table.table.to_metadata(wanted)
    ours = {table.name for table in declared}

    def include(item: SchemaItem, _name: str | None, kind: str, *_: object) -> bool:
        return kind != "table" or f"{item.schema}.{item.name}" in ours  # type: ignore[attr-defined]  # it is a Table

    context = MigrationContext.configure(
        db,
        opts={
            "include_schemas": True,
            "include_name": lambda name, kind, _parents: kind != "schema" or name in SCHEMAS,
            "include_object": include,
        },
    )
    found = produce_migrations(context, wanted).upgrade_ops
    changes: dict[str, list[ops.MigrateOperation]] = {}
    for operation in found.ops if found else ():
        if isinstance(operation, ops.ModifyTableOps):
            name = f"{operation.schema}.{operation.table_name}"
            changes.setdefault(name, []).extend(operation.ops)
    return changes


def _alter(
    db: Connection,
    table: DeclaredTable,
    known: objects.Recorded | None,
    operations: Sequence[ops.MigrateOperation],
) -> Iterator[Step]:
    details = known.details if known else {}
    in_place, added, replaced = _sorted(operations, details)
    if _key_of(db, table) != [column.name for column in table.table.primary_key]:
        replaced.append("change the key")
    is_recorded = known is not None and (known.definition, _comparable(known.details)) == (
        table.definition,
        _comparable(table.details),
    )
    # What was changed by hand has no other fingerprint, so a rebuild must be asked for.
    by_hand = [name for name in added if name in details.get("made", ())]
    if is_recorded:
        by_hand += replaced
    mark = [_mark_stale(table)] if by_hand and _is_built(db, table) else []
    if replaced:
        _refuse_dependents(db, table, replaced)
        if not is_recorded or mark:
            what = f"{', '.join(replaced)}: by the rebuild that is due"
            yield Step(table.name, what, tuple(mark), table)
        return
    if in_place:
        statements = [*sql_of(*(operation for operation, _ in in_place)), *mark]
        yield Step(table.name, ", ".join(what for _, what in in_place), tuple(statements), table)
    elif not is_recorded:
        yield Step(table.name, "record its definition: a rebuild is due", (), table)
    yield from _index_steps(db, table, details)


def _sorted(
    operations: Sequence[ops.MigrateOperation], details: Mapping[str, Any]
) -> tuple[list[tuple[ops.MigrateOperation, str]], list[str], list[str]]:
    """What is done in place, the columns that this adds, and what only a rebuild can do."""
    in_place: list[tuple[ops.MigrateOperation, str]] = []
    added: list[str] = []
    replaced: list[str] = []
    for operation in operations:
        match operation:
            case ops.AddColumnOp(column=column) if column.nullable:
                in_place.append((operation, f"add {column.name}"))
                added.append(column.name)
            case ops.AddColumnOp(column=column):
                replaced.append(f"add {column.name}, which is never NULL")
            case ops.AlterColumnOp():
                if operation.modify_type is not None or operation.modify_nullable is not None:
                    replaced.append(f"change the type of {operation.column_name}")
                if operation.modify_comment is not False:
                    comment = ops.AlterColumnOp(
                        operation.table_name,
                        operation.column_name,
                        schema=operation.schema,
                        modify_comment=operation.modify_comment,
                    )
                    in_place.append((comment, f"comment of {operation.column_name}"))
            case ops.DropColumnOp() if operation.column_name in details.get("made", ()):
                replaced.append(f"drop {operation.column_name}")
            case ops.CreateTableCommentOp():
                in_place.append((operation, "comment"))
            case _:
                pass  # indexes follow; all else was made by others, and stays
    return in_place, added, replaced


def _comparable(details: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in details.items() if not name.startswith("made")}


IS_BUILT = text(
    "SELECT EXISTS (SELECT FROM pipeline.projectors WHERE projector = :of AND fingerprint = :code)"
)


def _is_built(db: Connection, table: DeclaredTable) -> bool:
    found = db.execute(IS_BUILT, {"of": table.projector, "code": table.fingerprint})
    return bool(found.scalar_one())


def _mark_stale(table: DeclaredTable) -> str:
    return (
        "UPDATE pipeline.projectors SET fingerprint = 'changed by hand' "  # noqa: S608 - declared
        f"WHERE projector = {literal(table.projector)}"
    )


def awaiting_rebuild(db: Connection, declared: Sequence[DeclaredTable]) -> list[str]:
    """Tables that a rebuild must replace before all that is declared can be made."""
    recorded, there = objects.recorded(db), objects.relations(db, SCHEMAS)
    present = [table for table in declared if table.name in there]
    changes = _changes(db, present)
    return [
        table.name
        for table in present
        if table.name in recorded
        and (
            _sorted(changes.get(table.name, ()), recorded[table.name].details)[2]
            or _key_of(db, table) != [column.name for column in table.table.primary_key]
        )
    ]


KEY = text("""
SELECT a.attname FROM pg_index i
CROSS JOIN LATERAL unnest(i.indkey::int[]) WITH ORDINALITY AS k(attnum, place)
JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = k.attnum
WHERE i.indisprimary AND i.indrelid = CAST(:table AS regclass) ORDER BY k.place
""")
INDEXES = text("""
SELECT c.relname AS name, i.indisvalid AS is_valid
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid
WHERE i.indrelid = CAST(:table AS regclass) AND NOT i.indisprimary
""")


def _key_of(db: Connection, table: DeclaredTable) -> list[str]:
    return list(db.execute(KEY, {"table": quoted(table.name)}).scalars())


def _index_steps(
    db: Connection, table: DeclaredTable, details: Mapping[str, Any]
) -> Iterator[Step]:
    """Indexes, made and dropped beside readers and writers: one statement, in no transaction."""
    there = {row.name: row.is_valid for row in db.execute(INDEXES, {"table": quoted(table.name)})}
    wanted = {str(index.name): index for index in table.table.indexes}
    surplus = (set(details.get("made_indexes", ())) & set(there)) - set(wanted)
    for name in sorted(surplus | {name for name in wanted if there.get(name) is False}):
        drop = f'DROP INDEX CONCURRENTLY {table.table.schema}."{name}"'
        yield Step(table.name, f"drop index {name}", (drop,), table, in_transaction=False)
    for name in sorted(name for name in wanted if not there.get(name)):
        [create] = sql_of(ops.CreateIndexOp.from_index(wanted[name]))
        beside = create.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1)
        yield Step(table.name, f"create index {name}", (beside,), table, in_transaction=False)


OTHERS_ON = text("SELECT unnest(pipeline.others_on(:table))")
GRANTS_ON = text("SELECT unnest(pipeline.grants_of(CAST(CAST(:oid AS oid) AS regclass)))")


def grants_on(db: Connection, oid: int) -> Sequence[str]:
    """The statements that give others their rights on a relation of ours."""
    return db.execute(GRANTS_ON, {"oid": oid}).scalars().all()


def _refuse_dependents(db: Connection, table: DeclaredTable, changes: Sequence[str]) -> None:
    if others := db.execute(OTHERS_ON, {"table": table.table.name}).scalars().all():
        raise ConfigurationError(
            f"{table.name} must be replaced ({', '.join(changes)}), and others have made objects "
            f"on it, which would be lost: {'; '.join(others)}. Nothing was changed. Have their "
            "owners drop them, repeat `pipeline migrate`, and make them again after the rebuild"
        )


# -------------------------------------------------------------------------------------------- views


def views(db: Connection, declared: Sequence[DeclaredView]) -> Iterator[Step]:
    """Views that are missing, or changed in their declaration or by hand.

    A view that nothing declares any more stays where views of others read it.

    Raises:
        ConfigurationError: Somebody else's object has the name of a view, or others have made views
            on a view whose columns change.
    """
    recorded, there = objects.recorded(db), objects.relations(db, SCHEMAS)
    for view in declared:
        known = recorded.get(view.name)
        _refuse_others(view.name, recorded, there, view.definition)
        if view.name not in there:
            what = "create view" if known is None else "create again: somebody dropped it"
        elif known is None:
            what = "record it: made by what `--sql` printed"
        elif known.definition != view.definition:
            _refuse_other_columns(db, view, there[view.name].oid)
            what = "replace view"
        elif known.query != known.details.get("query"):
            what = "replace view: somebody changed it"
        else:
            continue
        yield Step(view.name, what, (view.definition,), view)
    wanted = {view.name for view in declared}
    for name, known in sorted(recorded.items()):
        if known.kind != "view" or name in wanted or not known.is_ours or known.oid is None:
            continue
        if not dependents(db, known.oid)[1]:
            yield Step(name, "drop view: nothing declares it", (f"DROP VIEW {quoted(name)}",))


_NAMED = re.compile(r"CREATE VIEW [a-z_]+\.[a-z_0-9]+")
_LIKE_IT = "pipeline_columns_of_a_view"


def _refuse_other_columns(db: Connection, view: DeclaredView, oid: int) -> None:
    """A view keeps its columns, in their order, or nobody else's view may read it."""
    _, others = dependents(db, oid)
    if not others or view.of_table is not None:
        return
    columns = _columns(db, view)
    had = [tuple(row) for row in db.execute(VIEW_COLUMNS, {"oid": oid})]
    if columns is not None and columns[: len(had)] != had:
        raise ConfigurationError(
            f"{view.name} has other columns now, and others have made views on it: "
            f"{'; '.join(others)}. Nothing was changed. Have their owners drop them, repeat "
            "`pipeline migrate`, and make them again"
        )


def _columns(db: Connection, view: DeclaredView) -> list[tuple[object, ...]] | None:
    """Names and types of the columns that a view will have; None where it cannot be made yet."""
    alike, _, _ = _NAMED.sub(f"CREATE TEMPORARY VIEW {_LIKE_IT}", view.definition, 1).partition(
        ";\n"
    )
    savepoint = db.begin_nested()
    try:
        db.execute(text(alike.replace(":", r"\:")))
        return [tuple(row) for row in db.execute(COLUMNS_LIKE_IT)]
    except DBAPIError:
        return None
    finally:
        savepoint.rollback()


COLUMNS_LIKE_IT = text(f"""
SELECT attname::text AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute
WHERE attrelid = 'pg_temp.{_LIKE_IT}'::regclass AND attnum > 0 ORDER BY attnum
""")  # noqa: S608 - a constant
DEPENDENT_VIEWS = text("""
SELECT DISTINCT n.nspname || '.' || v.relname AS name, v.oid,
       pg_get_userbyid(v.relowner) AS owner, v.relkind::text AS kind
FROM pg_depend d
JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
JOIN pg_class v ON v.oid = r.ev_class
JOIN pg_namespace n ON n.oid = v.relnamespace
WHERE d.refclassid = 'pg_class'::regclass AND d.refobjid = :oid AND v.oid <> d.refobjid
ORDER BY 1
""")
VIEW_COLUMNS = text("""
SELECT attname::text AS name, format_type(atttypid, atttypmod) AS type FROM pg_attribute
WHERE attrelid = :oid AND attnum > 0 ORDER BY attnum
""")


def dependents(db: Connection, oid: int) -> tuple[Sequence[str], Sequence[str]]:
    """Views on a relation, and views on those: ours in the order of their making, and others'."""
    recorded = objects.recorded(db)
    ours: list[str] = []
    others: list[str] = []
    to_see = [oid]
    while to_see:
        for row in db.execute(DEPENDENT_VIEWS, {"oid": to_see.pop(0)}):
            if row.name in recorded and recorded[row.name].is_ours:
                if row.name in ours:
                    ours.remove(row.name)
                ours.append(row.name)
                to_see.append(row.oid)
            else:
                others.append(f"{row.name} (owner {row.owner})")
    return ours, sorted(set(others))


def shows(db: Connection, oid: int, columns: Iterable[str]) -> bool:
    """Whether a view shows the values of columns that its table has."""
    read = set(db.execute(READ_COLUMNS, {"oid": oid}).scalars())
    return bool(read & set(columns))


READ_COLUMNS = text("""
SELECT a.attname::text FROM pg_rewrite r
JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
                AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class
JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
WHERE r.ev_class = :oid AND d.refobjsubid > 0
""")


def with_kept_columns(db: Connection, view: DeclaredView, oid: int) -> DeclaredView:
    """A view of a table with personal data that keeps the columns that it has, NULL where personal.

    So that others' views on it, which need all of its columns, stay.
    """
    if view.of_table is None:
        return view
    had = [(row.name, row.type) for row in db.execute(VIEW_COLUMNS, {"oid": oid})]
    kept = plain_view(view.of_table, nulls=had)
    return DeclaredView(view.name, kept.definition, view.of_table, view.shows_personal)


def quoted(name: str) -> str:
    """Schema and name, as SQL."""
    schema, _, relation = name.partition(".")
    return f'{schema}."{relation}"'
