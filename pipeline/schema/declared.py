"""What the schemas for analysts should hold: tables and views, as they are declared.

A table with a personal column is in ``upvest_personal``; under its plain name, ``upvest`` has a
view of it without those columns. A view of a file is SQL that psql runs unchanged.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table
from sqlalchemy.schema import CreateColumn

from pipeline.catalogue import Catalogue
from pipeline.db import PERSONAL_SCHEMA, READ_SCHEMA
from pipeline.db.identifiers import DIALECT, literal
from pipeline.db.identifiers import quote_if_needed as quote
from pipeline.errors import ConfigurationError
from pipeline.readmodel.fingerprint import fingerprint
from pipeline.readmodel.model import personal_columns

_CREATE_VIEW = re.compile(r"CREATE VIEW ([a-z_]+)\.([a-z_0-9]+)\b")
_COMMENT = re.compile(r"COMMENT ON VIEW \S+ IS '((?:[^']|'')*)'")
_REVIEWED = re.compile(r"^-- Personal data: (none|shown)\b", re.MULTILINE)


@dataclass(frozen=True)
class DeclaredTable:
    """A table of a read model.

    Attributes:
        table: As SQLAlchemy describes it.
        projector: Name of the projector that fills it.
        fingerprint: Of that projector.
    """

    table: Table
    projector: str
    fingerprint: str

    @property
    def name(self) -> str:
        """Schema and name."""
        return f"{self.table.schema}.{self.table.name}"

    @property
    def definition(self) -> str:
        """Columns and key: what is between the parentheses of ``CREATE TABLE``."""
        columns = [
            str(CreateColumn(column).compile(dialect=DIALECT)) for column in self.table.columns
        ]
        key = ", ".join(quote(column.name) for column in self.table.primary_key)
        return ",\n".join([*columns, f"PRIMARY KEY ({key})"])

    @property
    def details(self) -> Mapping[str, Any]:
        """What else a rebuild needs to make the table."""
        return {
            "projector": self.projector,
            "fingerprint": self.fingerprint,
            "columns": [column.name for column in self.table.columns],
            "comments": {
                "": self.table.comment,
                **{column.name: column.comment for column in self.table.columns},
            },
            "indexes": {
                str(index.name): ", ".join(quote(column.name) for column in index.columns)
                for index in self.table.indexes
            },
        }

    @property
    def personal(self) -> Sequence[str]:
        """Columns that hold personal data."""
        return [c.name for c in self.table.columns if c.name in personal_columns(self.table)]


@dataclass(frozen=True)
class DeclaredView:
    """A view: of a file, or without the personal columns of a table.

    Attributes:
        name: Schema and name.
        definition: The statements that make it, comments included.
        comment: Its comment.
        of_table: The table of which it leaves out the personal columns; None for a file.
        shows_personal: Whether it shows personal data, so that only some may see it.
    """

    name: str
    definition: str
    comment: str = ""
    of_table: DeclaredTable | None = None
    shows_personal: bool = False

    @property
    def replacement(self) -> str:
        """The statements that make it in the place of one with the same first columns."""
        return self.definition.replace("CREATE VIEW", "CREATE OR REPLACE VIEW", 1)


def tables_of(catalogue: Catalogue) -> list[DeclaredTable]:
    """The tables of all read models."""
    return [
        DeclaredTable(table, model.name, fingerprint(model))
        for model in catalogue.models
        for table in model.tables
    ]


def views_of(catalogue: Catalogue) -> list[DeclaredView]:
    """The views of all tables with personal data, and those of the files.

    Raises:
        ConfigurationError: A file is no view, or does not say whether it shows personal data.
    """
    plain = [plain_view(table) for table in tables_of(catalogue) if table.personal]
    return [*plain, *(_view(name, text) for name, text in sorted(catalogue.views.items()))]


def plain_view(table: DeclaredTable, *, nulls: Iterable[tuple[str, str]] = ()) -> DeclaredView:
    """The view of a table with personal data, without these columns.

    Args:
        table: The table.
        nulls: Columns with their types that the view had and that others' objects need: they are
            NULL from now on. In order, with the columns that it shows.
    """
    shown = [column for column in table.table.columns if column.name not in table.personal]
    names = {column.name for column in shown}
    kept = dict(nulls)
    order = [*kept, *(name for name in (c.name for c in shown) if name not in kept)]
    selected = ", ".join(
        quote(name) if name in names else f"CAST(NULL AS {kept[name]}) AS {quote(name)}"
        for name in order
    )
    name = f"{READ_SCHEMA}.{quote(table.table.name)}"
    hidden = ", ".join(table.personal)
    comment = (
        f"{table.table.comment} Without personal data: {hidden}. All columns are in {table.name}."
    )
    statements = [
        f"CREATE VIEW {name} AS\nSELECT {selected}\n"
        f"FROM {PERSONAL_SCHEMA}.{quote(table.table.name)}",
        f"COMMENT ON VIEW {name} IS {literal(comment)}",
        *(
            f"COMMENT ON COLUMN {name}.{quote(column.name)} IS {literal(column.comment or '')}"
            for column in shown
        ),
    ]
    definition = ";\n".join(statements) + ";\n"
    return DeclaredView(f"{READ_SCHEMA}.{table.table.name}", definition, comment, table)


def _view(name: str, definition: str) -> DeclaredView:
    found = _CREATE_VIEW.search(definition)
    reviewed = _REVIEWED.search(definition)
    if found is None or found[2] != name or found[1] not in (READ_SCHEMA, PERSONAL_SCHEMA):
        raise ConfigurationError(
            f"{name}.sql does not make view {name}: it must have a line CREATE VIEW "
            f"{READ_SCHEMA}.{name}, or {PERSONAL_SCHEMA}.{name} if it shows personal data"
        )
    if reviewed is None:
        raise ConfigurationError(
            f"{name}.sql does not say whether it shows personal data. Look at its columns, then "
            'write the line "-- Personal data: none, reviewed DATE", or "-- Personal data: shown"'
        )
    shows = reviewed[1] == "shown"
    if shows != (found[1] == PERSONAL_SCHEMA):
        raise ConfigurationError(
            f"{name}.sql: a view that shows personal data is in {PERSONAL_SCHEMA}, any other in "
            f"{READ_SCHEMA}; it says {reviewed[1]}, and makes {found[1]}.{name}"
        )
    comment = _COMMENT.search(definition)
    words = comment[1].replace("''", "'") if comment else ""
    return DeclaredView(f"{found[1]}.{name}", definition, words, shows_personal=shows)
