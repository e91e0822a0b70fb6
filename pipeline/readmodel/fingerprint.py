"""What a read model was built by: another fingerprint means that a rebuild is due."""

import hashlib
from collections.abc import Iterable

from sqlalchemy import Table

from pipeline.db.identifiers import DIALECT
from pipeline.readmodel.fields import Field
from pipeline.readmodel.model import Custom, Declared, Projector, Source

MEANING = 1
"""Of the compiler: raise it when the same declaration comes to mean other rows. A change of its SQL
that gives the same rows does not raise it, or every user would have to rebuild for nothing."""


def fingerprint(projector: Projector) -> str:
    """Hash of all that decides what the tables hold.

    Tables, types, events, paths, ranks and which of two events wins, with the meaning that the
    compiler gives them; of a ``Custom`` what it reads, and the version that its author counts.
    """
    definition = (
        MEANING,
        [_table(table) for table in projector.tables],
        [_source(source) for source in projector.sources],
        sorted(projector.except_events),
        *_rules(projector),
    )
    return hashlib.sha256(repr(definition).encode()).hexdigest()


def _table(table: Table) -> object:
    return table.name, [
        (column.name, column.type.compile(DIALECT), column.primary_key) for column in table.columns
    ]


def _source(source: Source) -> object:
    return str(source.events), source.each, sorted(source.inherit.items())


def _rules(projector: Projector) -> Iterable[object]:
    match projector:
        case Declared():
            return (
                projector.keeps_first,
                projector.clock and projector.clock.column,
                sorted(projector.only_with),
                _fields(projector.columns),
                [(child.path, _fields(child.fields)) for child in projector.child_tables],
            )
        case Custom():
            return projector.version, _fields(projector.reads)


def _fields(fields: Iterable[Field]) -> object:
    return [
        (
            field.column,
            field.paths,
            field.kind.shape.value,
            field.envelope and field.envelope.name,
            [(str(pattern), word) for pattern, word in field.by_event],
            field.only_if,
            field.keep_lowest,
            field.lifecycle and (field.lifecycle.ranks, field.lifecycle.unknown_rank),
        )
        for field in fields
    ]
