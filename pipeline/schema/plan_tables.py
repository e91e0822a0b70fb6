"""What the plan does to tables: made, altered in place, or left to the rebuild that is due.

Additive changes are made in place, each object in a transaction of its own. For anything else the
table is recorded as it should be; the rebuild makes it beside the live one and swaps it in. Nothing
that holds data is dropped.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alembic.autogenerate import produce_migrations
from alembic.migration import MigrationContext
from alembic.operations import Operations, ops
from sqlalchemy import Connection, MetaData, text
from sqlalchemy.schema import SchemaItem

from pipeline.db import metadata
from pipeline.db.identifiers import literal, quote, relation
from pipeline.errors import ConfigurationError
from pipeline.projection import registry
from pipeline.schema import objects
from pipeline.schema.declared import DeclaredTable
from pipeline.schema.step import Step, refuse_others


def tables(
    db: Connection, declared: Sequence[DeclaredTable], moves: Mapping[str, str] | None = None
) -> Iterator[Step]:
    """What is missing or different of the tables.

    Args:
        db: An open transaction.
        declared: The tables.
        moves: Tables that a step before moves to another schema: the name that they will have, and
            the one that they have.

    Raises:
        ConfigurationError: Somebody else's object has the name of a table, or others' objects are
            on a table that must be replaced; the text names each.
    """
    recorded, found = objects.recorded(db), objects.relations(db, objects.READ_SCHEMAS)
    names = {table.name: (moves or {}).get(table.name, table.name) for table in declared}
    for table in declared:
        if names[table.name] == table.name:
            refuse_others(table.name, recorded, found, table.table.comment or "")
    changes = _changes(db, [table for table in declared if names[table.name] in found], names)
    for table in declared:
        name = names[table.name]
        if name not in found:
            yield _create(table, was_there=name in recorded)
        else:
            yield from _alter(db, table, name, recorded.get(name), changes.get(table.name, []))


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
    db: Connection, declared: Sequence[DeclaredTable], names: Mapping[str, str]
) -> dict[str, list[ops.MigrateOperation]]:
    """The differences that Alembic finds, by table.

    Args:
        db: An open transaction.
        declared: Tables that exist.
        names: The name that each has now.
    """
    wanted = MetaData(naming_convention=metadata.naming_convention)
    ours = {names[table.name]: table for table in declared}
    for name, table in ours.items():
        table.table.to_metadata(wanted, schema=name.partition(".")[0])

    def include(item: SchemaItem, _name: str | None, kind: str, *_: object) -> bool:
        return kind != "table" or f"{item.schema}.{item.name}" in ours  # type: ignore[attr-defined]  # it is a Table

    context = MigrationContext.configure(
        db,
        opts={
            "include_schemas": True,
            "include_name": lambda name, kind, _parents: (
                kind != "schema" or name in objects.READ_SCHEMAS
            ),
            "include_object": include,
        },
    )
    found = produce_migrations(context, wanted).upgrade_ops
    changes: dict[str, list[ops.MigrateOperation]] = {}
    for operation in found.ops if found else ():
        if isinstance(operation, ops.ModifyTableOps):
            table = ours[f"{operation.schema}.{operation.table_name}"]
            for change in operation.ops:
                # Where the table is when the statement is executed.
                change.schema = table.table.schema  # type: ignore[attr-defined]  # each has one
                changes.setdefault(table.name, []).append(change)
    return changes


def _alter(
    db: Connection,
    table: DeclaredTable,
    name: str,
    known: objects.Recorded | None,
    operations: Sequence[ops.MigrateOperation],
) -> Iterator[Step]:
    details = known.details if known else {}
    in_place, added, replaced = _sorted(operations, details)
    if _key_of(db, name) != [column.name for column in table.table.primary_key]:
        replaced.append("change the key")
    # The step that moves a table records it too.
    is_recorded = name != table.name or (
        known is not None
        and (known.definition, _comparable(known.details))
        == (table.definition, _comparable(table.details))
    )
    # What was changed by hand has no other fingerprint, so a rebuild must be asked for.
    by_hand = [column for column in added if column in details.get("made", ())]
    if is_recorded:
        by_hand += replaced
    is_built = registry.is_built(db, table.projector, table.fingerprint)
    mark = [registry.stale_statement(table.projector)] if by_hand and is_built else []
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
    yield from _index_steps(db, table, name, details)


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


def awaiting_rebuild(db: Connection, declared: Sequence[DeclaredTable]) -> list[str]:
    """Tables that a rebuild must replace before all that is declared can be made."""
    recorded, found = objects.recorded(db), objects.relations(db, objects.READ_SCHEMAS)
    present = [table for table in declared if table.name in found]
    changes = _changes(db, present, {table.name: table.name for table in present})
    return [
        table.name
        for table in present
        if table.name in recorded
        and (
            _sorted(changes.get(table.name, ()), recorded[table.name].details)[2]
            or _key_of(db, table.name) != [column.name for column in table.table.primary_key]
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


def _key_of(db: Connection, name: str) -> list[str]:
    return list(db.execute(KEY, {"table": relation(name)}).scalars())


def _index_steps(
    db: Connection, table: DeclaredTable, name_now: str, details: Mapping[str, Any]
) -> Iterator[Step]:
    """Indexes, made and dropped beside readers and writers: one statement, in no transaction."""
    rows = db.execute(INDEXES, {"table": relation(name_now)})
    found = {row.name: row.is_valid for row in rows}
    wanted = {str(index.name): index for index in table.table.indexes}
    surplus = (set(details.get("made_indexes", ())) & set(found)) - set(wanted)
    for name in sorted(surplus | {name for name in wanted if found.get(name) is False}):
        drop = f"DROP INDEX CONCURRENTLY {table.table.schema}.{quote(name)}"
        yield Step(table.name, f"drop index {name}", (drop,), table, in_transaction=False)
    for name in sorted(name for name in wanted if not found.get(name)):
        [create] = sql_of(ops.CreateIndexOp.from_index(wanted[name]))
        beside = create.replace("CREATE INDEX", "CREATE INDEX CONCURRENTLY", 1)
        yield Step(table.name, f"create index {name}", (beside,), table, in_transaction=False)


OTHERS_ON = text("SELECT unnest(pipeline.others_on(:table))")


def _refuse_dependents(db: Connection, table: DeclaredTable, changes: Sequence[str]) -> None:
    if others := db.execute(OTHERS_ON, {"table": table.table.name}).scalars().all():
        raise ConfigurationError(
            f"{table.name} must be replaced ({', '.join(changes)}), and others have made objects "
            f"on it, which would be lost: {'; '.join(others)}. Nothing was changed. Have their "
            "owners drop them, repeat `pipeline migrate`, and make them again after the rebuild"
        )


def sql_of(*operations: ops.MigrateOperation) -> list[str]:
    """The statements of operations of Alembic's, one each, without semicolon."""
    written: list[str] = []
    context = MigrationContext.configure(
        dialect_name="postgresql",
        # Or each percent sign is written twice.
        dialect_opts={"paramstyle": "named"},
        opts={"as_sql": True, "output_buffer": _Lines(written)},
    )
    with Operations.context(context) as executing:
        for operation in operations:
            executing.invoke(operation)
    return [statement.strip().removesuffix(";") for statement in written if statement.strip()]


class _Lines:
    """Collects what Alembic would print."""

    def __init__(self, into: list[str]) -> None:
        self._into = into

    def write(self, text: str) -> None:
        self._into.append(text)

    def flush(self) -> None:
        """Everything is there already."""
