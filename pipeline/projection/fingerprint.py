"""What a read model was built by: another fingerprint means that a rebuild is due."""

import hashlib

from pipeline.db import READ_SCHEMA
from pipeline.projection.compiler import compile_declared
from pipeline.projection.declaration import Custom, Declared, Projector


def fingerprint(projector: Projector) -> str:
    """Hash of all that decides what the tables hold.

    Columns, types, events, and the compiled SQL, where paths, ranks, shapes and versions stand; of
    a ``Custom`` the version that its author counts.
    """
    columns = [
        f"{table.name}.{column.name} {column.type!r}"
        for table in projector.tables
        for column in table.columns
    ]
    takes = [f"{one.events} but {sorted(projector.except_types)}" for one in projector.sources]
    definition = "\n".join([*columns, *takes, *_statements(projector)])
    return hashlib.sha256(definition.encode()).hexdigest()


def _statements(projector: Projector) -> tuple[str, ...]:
    match projector:
        case Declared():
            return compile_declared(projector, READ_SCHEMA).statements
        case Custom():
            return (f"version {projector.version}",)
