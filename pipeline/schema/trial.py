"""Views are tried before anything changes: made in a savepoint, over empty tables as declared.

So a plan refuses what `migrate` or a later rebuild could not make, whatever the tables look like
now: SQL that PostgreSQL refuses, personal columns in a view for everybody, missing comments. Tables
and views are temporary ones here, and their names are translated.
"""

import re
from collections.abc import Iterable, Mapping, Sequence, Set

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from pipeline.catalogue import Catalogue
from pipeline.db import PERSONAL_SCHEMA, READ_SCHEMA
from pipeline.db.identifiers import statement
from pipeline.errors import ConfigurationError
from pipeline.schema import objects
from pipeline.schema.declared import DeclaredTable, DeclaredView, tables_of, views_of

_QUALIFIED = re.compile(rf'"?\b{READ_SCHEMA}(_personal)?"?\.("?)')
_MAY = text("SELECT has_database_privilege(current_database(), 'TEMPORARY')")
_WHO = text("SELECT current_user, current_database()")
# Syntax, names, types and rights; values; what PostgreSQL does not support.
_OF_THE_FILE = frozenset({"42", "22", "0A"})


def refuse_bad_views(db: Connection, catalogue: Catalogue) -> None:
    """Raise if a view of a file cannot be made, shows personal data, or lacks a comment.

    Raises:
        ConfigurationError: The text has file, line, view and what PostgreSQL says.
    """
    _refuse_without_right(db)
    savepoint = db.begin_nested()
    try:
        tables, views = tables_of(catalogue), views_of(catalogue)
        _make_relations(db, tables, {it.name for it in tables} | {it.name for it in views})
        _make_views(db, views, catalogue.view_files)
        by_name = {_local(table.name): table for table in tables}
        for view in (view for view in views if view.of_table is None):
            file = _file(view, catalogue.view_files)
            _refuse_personal(db, view, file, by_name)
            _refuse_silent(db, view, file)
    finally:
        savepoint.rollback()


def _refuse_without_right(db: Connection) -> None:
    if not db.execute(_MAY).scalar_one():
        role, database = db.execute(_WHO).one()
        raise ConfigurationError(
            f"role {role} may not create temporary tables in database {database}. `pipeline "
            "migrate` needs them to try views before it changes anything. Have a DBA run "
            f'GRANT TEMPORARY ON DATABASE "{database}" TO "{role}"'
        )


def _make_relations(db: Connection, tables: Sequence[DeclaredTable], declared: Set[str]) -> None:
    """The tables as declared, and what else is in the schemas, which a view may read too."""
    for table in tables:
        _run(db, f'CREATE TEMPORARY TABLE "{_local(table.name)}" ({table.definition})')
    recorded = objects.recorded(db)
    for name, found in objects.relations(db, objects.READ_SCHEMAS).items():
        is_our_view = found.kind == "v" and name in recorded
        if name not in declared and not is_our_view:
            schema, _, relation = name.partition(".")
            _run(db, f'CREATE TEMPORARY VIEW "{_local(name)}" AS TABLE {schema}."{relation}"')


def _make_views(db: Connection, views: Iterable[DeclaredView], files: Mapping[str, str]) -> None:
    """In an order in which each finds what it reads."""
    waiting = list(views)
    while waiting:
        failed = [(view, error) for view in waiting if (error := _error_of(db, view))]
        if len(failed) == len(waiting):
            # A view that reads one that cannot be made is not the cause.
            names = {view.name for view, _ in failed}
            causes = [
                (view, error)
                for view, error in failed
                if not any(f'"{name}"' in _words(error) for name in names - {view.name})
            ]
            view, error = (causes or failed)[0]
            raise ConfigurationError(_described(view, error, files)) from None
        waiting = [view for view, _ in failed]


def _error_of(db: Connection, view: DeclaredView) -> DBAPIError | None:
    try:
        with db.begin_nested():
            _run(db, _translated(view.definition))
    except DBAPIError as error:
        if _state(error)[:2] not in _OF_THE_FILE:
            raise
        return error
    return None


def _described(view: DeclaredView, error: DBAPIError, files: Mapping[str, str]) -> str:
    diagnostics = getattr(error.orig, "diag", None)
    position = getattr(diagnostics, "statement_position", None)
    place = _file(view, files)
    if position:
        place += f":{1 + _translated(view.definition)[: int(position) - 1].count(chr(10))}"
    hint = _original(str(getattr(diagnostics, "message_hint", None) or ""))
    return (
        f"{place}: view {view.name} cannot be created: {_words(error)}. "
        f"{hint + ' ' if hint else ''}Nothing was changed. Correct the file, then repeat "
        "`pipeline migrate`"
    )


# Whole rows are no dependency on columns: their attribute is number 0 in the query's tree.
READS = text(r"""
SELECT DISTINCT t.relname::text AS name, a.attname::text AS column_name,
       strpos(r.ev_action::text, '\:varattno 0 ') > 0 AS whole_rows
FROM pg_rewrite r
JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid
                AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> r.ev_class
JOIN pg_class t ON t.oid = d.refobjid AND t.relnamespace = pg_my_temp_schema()
LEFT JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid AND a.attnum > 0
WHERE r.ev_class = to_regclass(:view)
ORDER BY 1, 2
""")
SILENT = text("""
SELECT '' AS column_name
WHERE coalesce(obj_description(to_regclass(:view), 'pg_class'), '') !~ '\\S'
UNION ALL
SELECT * FROM (
    SELECT attname::text FROM pg_attribute
    WHERE attrelid = to_regclass(:view) AND attnum > 0
      AND coalesce(col_description(attrelid, attnum), '') !~ '\\S' ORDER BY attnum
) columns
""")


def _words(error: DBAPIError) -> str:
    diagnostics = getattr(error.orig, "diag", None)
    return _original(str(getattr(diagnostics, "message_primary", None) or error.orig))


def _refuse_personal(
    db: Connection, view: DeclaredView, file: str, tables: Mapping[str, DeclaredTable]
) -> None:
    """A view for everybody may read no personal column, nor a view that shows personal data."""
    if view.shows_personal:
        return
    read = []
    for row in db.execute(READS, {"view": _temporary(view.name)}):
        table = tables.get(row.name)
        if table is None and row.name.startswith(_PERSONAL):
            read.append(_original(f"pg_temp.{row.name}"))
        elif table is not None and row.column_name in table.personal:
            read.append(f"{table.name}.{row.column_name}")
        elif table is not None and table.personal and row.whole_rows:
            read.append(f"whole rows of {table.name}")
    if read:
        raise ConfigurationError(
            f'{file}: view {view.name} says "Personal data: none" but reads personal data: '
            f"{', '.join(sorted(set(read)))}. Nothing was changed. Leave it out; or, if the view "
            f"is for those who may read personal data, make it in {PERSONAL_SCHEMA} and write "
            '"-- Personal data: shown"'
        )


def _refuse_silent(db: Connection, view: DeclaredView, file: str) -> None:
    silent = db.execute(SILENT, {"view": _temporary(view.name)}).scalars().all()
    if silent:
        lines = [
            f"COMMENT ON COLUMN {view.name}.{column} IS '…';"
            if column
            else f"COMMENT ON VIEW {view.name} IS '…';"
            for column in silent
        ]
        raise ConfigurationError(
            f"{file}: view {view.name} lacks comments, which analysts read. Nothing was changed. "
            f"Add to the file: {' '.join(lines)}"
        )


# -------------------------------------------------------------------------------------------- names

# In a name of ours there is no $: upvest_personal.users is pg_temp.p$users here.
_PERSONAL = "p$"


def _local(name: str) -> str:
    schema, _, relation = name.partition(".")
    return (_PERSONAL if schema == PERSONAL_SCHEMA else "") + relation


def _temporary(name: str) -> str:
    return f'pg_temp."{_local(name)}"'


def _translated(sql: str) -> str:
    """The same lines, about temporary tables and views."""
    return _QUALIFIED.sub(lambda it: f"pg_temp.{it[2]}{_PERSONAL if it[1] else ''}", sql)


def _original(words: str) -> str:
    """PostgreSQL's text, about the tables and views that the author named."""
    personal = re.sub(rf'pg_temp\.("?){re.escape(_PERSONAL)}', rf"{PERSONAL_SCHEMA}.\1", words)
    return personal.replace("pg_temp", READ_SCHEMA).replace(_PERSONAL, "")


def _file(view: DeclaredView, files: Mapping[str, str]) -> str:
    name = view.name.partition(".")[2]
    return files.get(name, f"{name}.sql")


def _state(error: DBAPIError) -> str:
    return str(getattr(error.orig, "sqlstate", None) or "")


def _run(db: Connection, sql: str) -> None:
    db.execute(statement(sql))
