"""The page `docs/read-models.md`: its reference is generated from the database's comments.

``python -m tests.read_models_page`` writes it again, after a table or a view has changed.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, text

from pipeline import catalogue
from pipeline.db import PERSONAL_SCHEMA
from pipeline.readmodel import Projector
from pipeline.readmodel.model import Declared

PAGE = Path(__file__).parent.parent / "docs" / "read-models.md"
BEGIN, END = "<!-- reference: written by python -m tests.read_models_page -->", "<!-- end -->"

RELATIONS = text("""
SELECT n.nspname AS schema, c.relname AS name, c.relkind = 'v' AS is_view,
       obj_description(c.oid, 'pg_class') AS comment
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE n.nspname IN ('upvest', 'upvest_personal') AND c.relkind IN ('r', 'v')
ORDER BY is_view, name
""")
COLUMNS = text("""
SELECT a.attname AS name, format_type(a.atttypid, a.atttypmod) AS type,
       col_description(a.attrelid, a.attnum) AS comment
FROM pg_attribute a
WHERE a.attrelid = CAST(:relation AS regclass) AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attnum
""")


def reference(db: Connection) -> str:
    """Every table and view for analysts, as Markdown."""
    models = catalogue.load().models
    owners = {table.name: model for model in models for table in model.tables}
    relations = db.execute(RELATIONS).all()
    tables = [row for row in relations if not row.is_view and row.name in owners]
    # Children come after their parents.
    tables.sort(
        key=lambda row: (owners[row.name].name, row.name != owners[row.name].name, row.name)
    )
    lines = ["## Tables", ""]
    for row in tables:
        lines += [*_heading(row), *_how(owners[row.name], row.name), *_columns(db, row)]
    lines += ["## Views", ""]
    for row in relations:
        # A table with personal data has a plain view of its name without them.
        if row.is_view and row.name not in owners:
            lines += [*_heading(row), *_columns(db, row)]
    return "\n".join(lines).rstrip() + "\n"


def questions() -> Iterator[tuple[str, str]]:
    """The questions of the page, and the SQL that answers each."""
    yield from re.findall(
        r"^### (\d+\. [^\n]+)\n.*?```sql\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )


def with_reference(page: str, written: str) -> str:
    """The page with its reference replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{written}\n{END}{after}"


def _heading(row: Any) -> list[str]:
    return [f"### `{row.name}`", "", row.comment, ""]


def _how(projector: Projector, table: str) -> list[str]:
    declared = next(made for made in projector.tables if made.name == table)
    personal = f" All columns: `{declared.fullname}`." if declared.schema == PERSONAL_SCHEMA else ""
    key = ", ".join(f"`{column.name}`" for column in declared.primary_key)
    if table != projector.name:
        return [f"Key: {key}. Replaced with its row in `{projector.name}`.{personal}", ""]
    fed = ", ".join(
        f"`{source.events}`" + (f" (its list `{source.each}`)" if source.each else "")
        for source in projector.sources
    )
    left_out = ", ".join(f"`{name}`" for name in sorted(projector.except_events))
    fed += f", without {left_out}" if left_out else ""
    return [f"Key: {key}. Fed by {fed}. {_winner(projector)}{personal}", ""]


def _winner(projector: Projector) -> str:
    if not isinstance(projector, Declared):
        return "Grows only."
    if projector.keeps_first:
        return "One row for each event."
    further = f"the further `{projector.status.column}`" if projector.status else "the newer event"
    if projector.clock:
        return f"The newest `{projector.clock.column}` wins; at the same time {further}."
    if projector.status:
        return f"{further[0].upper()}{further[1:]} wins; of the same, the newer event."
    return "The newer event wins."


def _columns(db: Connection, relation: Any) -> list[str]:
    rows = db.execute(COLUMNS, {"relation": f"{relation.schema}.{relation.name}"})
    return [
        "| column | type | says |",
        "|---|---|---|",
        *(
            f"| `{row.name}` | {row.type.replace('timestamp with time zone', 'timestamptz')} "
            f"| {row.comment.replace('|', chr(92) + '|')} |"
            for row in rows
            if not row.name.startswith("_")
        ),
        "",
    ]


if __name__ == "__main__":
    from pipeline.db import open_engine
    from pipeline.sandbox.servers.postgres import PostgresServer
    from pipeline.schema.migrate import migrate

    with PostgresServer() as server:
        migrate(server.url("postgres"))
        engine = open_engine(server.url("postgres"), application="read models page")
        with engine.connect() as connection:
            PAGE.write_text(with_reference(PAGE.read_text(), reference(connection)))
        engine.dispose()
