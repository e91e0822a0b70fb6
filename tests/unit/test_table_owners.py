"""Each table of the program has one owner, which contains every statement that names the table."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pipeline
from pipeline.db import metadata
from pipeline.schema.bookkeeping import declare_tables

PACKAGE = Path(pipeline.__file__).parent

OWNERS = {
    "locks": "db/locks.py",
    # One module for each question about these two: see docs/decisions/0015.
    "events": "log/",
    "consumer_offsets": "log/",
    "segments": "log/segments.py",
    "gaps": "log/gaps.py",
    "installation": "log/installation.py",
    "ingest_workers": "log/workers.py",
    "projectors": "projection/registry.py",
    "projection_checkpoints": "projection/checkpoints.py",
    "dead_letters": "projection/dead_letters.py",
    "projection_workers": "projection/workers.py",
    "rebuild_ranges": "rebuild/work_list.py",
    "declared_objects": "schema/objects.py",
    "schema_changes": "schema/objects.py",
}
"""Every table, with the module or package that owns it."""

_JOIN = "one statement compares it with the log, or sums it up, in one snapshot"
EXCEPTIONS = {
    ("log/integrity.py", "segments"): "finds segments that are attached and not registered",
    ("projection/dead_letters.py", "events"): "copies the event's type into the dead letter",
    ("projection/integrity.py", "projection_checkpoints"): _JOIN,
    ("projection/integrity.py", "dead_letters"): _JOIN,
    ("projection/integrity.py", "events"): _JOIN,
    ("projection/progress.py", "projectors"): _JOIN,
    ("projection/progress.py", "projection_checkpoints"): _JOIN,
    ("projection/progress.py", "dead_letters"): _JOIN,
    ("projection/progress.py", "events"): _JOIN,
    ("readmodel/compiler.py", "events"): "every compiled statement reads the log's events",
    ("readmodel/screening.py", "events"): "every screening reads the log's events",
    ("views/order_status_history.sql", "events"): "a view that shows the log to analysts",
    ("foreign_objects.py", "events"): "reports what segments inherit for the log's table",
    ("sandbox/demo/queries.py", "events"): "proves the promises as an outsider would",
    ("sandbox/demo/queries.py", "dead_letters"): "proves the promises as an outsider would",
}
"""Other files with statements that name a table, with the reason."""
WITHOUT_STATEMENTS = {"log/ingest_tables.py"}
"""Files that name declared tables, all that ingest writes, and contain no statement."""

IN_SQL = re.compile(
    r"(?:FROM|JOIN|INTO|UPDATE|COPY|TABLE|LIKE|ONLY|USING|TRUNCATE)\s+pipeline\.(\w+)"
    r"|'pipeline\.(\w+)'"
)
TABLES = set(OWNERS)


def tables_in(sql: str) -> set[str]:
    return {name for groups in IN_SQL.findall(sql) for name in groups if name}


def tables_in_module(source: str) -> Iterator[str]:
    """The tables that statements of a module name, as text or by the declared table."""
    module = ast.parse(source)
    docstrings = {id(node.value) for node in ast.walk(module) if isinstance(node, ast.Expr)}
    for node in ast.walk(module):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings:
                yield from tables_in(node.value)
        elif isinstance(node, ast.ImportFrom):
            # ``from pipeline.log import gaps`` imports a module; the table is in one.
            source_file = PACKAGE.parent / f"{str(node.module).replace('.', '/')}.py"
            if source_file.exists():
                yield from (alias.name for alias in node.names if alias.name in TABLES)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Table" and node.args:
            yield ast.unparse(node.args[0]).strip("'")
        elif isinstance(node, ast.Attribute) and node.attr == "c":
            yield ast.unparse(node.value)


def found() -> set[tuple[str, str]]:
    named = set()
    for path in sorted(PACKAGE.rglob("*.*")):
        if path.suffix == ".py":
            tables = set(tables_in_module(path.read_text()))
        elif path.suffix == ".sql":
            tables = tables_in(re.sub("--.*", "", path.read_text()))
        else:
            continue
        file = path.relative_to(PACKAGE).as_posix()
        if file in WITHOUT_STATEMENTS:
            continue
        named |= {(file, table) for table in tables & TABLES}
    return named


def is_owner(file: str, table: str) -> bool:
    owner = OWNERS[table]
    return file.startswith(owner) if owner.endswith("/") else file == owner


def test_every_table_of_the_program_has_an_owner():
    declare_tables()

    assert {table.name for table in metadata.tables.values()} == set(OWNERS)
    assert all((PACKAGE / owner).exists() for owner in OWNERS.values())


def test_only_the_owner_of_a_table_has_statements_that_name_it():
    outside = {(file, table) for file, table in found() if not is_owner(file, table)}

    assert outside - set(EXCEPTIONS) == set()
    assert set(EXCEPTIONS) - outside == set(), "exceptions that nothing needs any more"


def test_each_owner_names_its_table():
    """If the search finds nothing at all, it proves nothing."""
    owned = {table for file, table in found() if is_owner(file, table)}

    assert owned == set(OWNERS)


def test_the_search_finds_a_table_however_a_statement_names_it():
    statements = {
        'A = text("SELECT 1 FROM pipeline.gaps")',
        'A = text(f"DELETE FROM pipeline.gaps WHERE {x}")',
        "from pipeline.log.gaps import gaps",
        "A = select(gaps.c.topic)",
        "A = text(\"SELECT to_regclass('pipeline.gaps')\")",
    }

    assert all("gaps" in set(tables_in_module(statement)) for statement in statements)
    assert not set(tables_in_module('"""FROM pipeline.gaps, a docstring."""'))
    assert not set(tables_in_module("from pipeline.log import gaps"))
