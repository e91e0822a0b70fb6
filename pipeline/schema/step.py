"""A step of the plan, and the refusal of what belongs to somebody else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row

from pipeline.db import identifiers
from pipeline.errors import ConfigurationError
from pipeline.schema import objects
from pipeline.schema.declared import DeclaredTable, DeclaredView


@dataclass(frozen=True)
class Step:
    """One change, executed as a whole.

    Attributes:
        name: Schema and name of the object.
        what: What happens, for people.
        statements: What is executed.
        declared: The object as it is recorded afterwards; None to forget it.
        in_transaction: False for a statement that must not be in one.
        remade: Views of ours that the statements make again, or that read what they rename: how
            PostgreSQL shows their queries is recorded afterwards.
    """

    name: str
    what: str
    statements: tuple[str, ...]
    declared: DeclaredTable | DeclaredView | None = None
    in_transaction: bool = True
    remade: tuple[DeclaredView, ...] = ()

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def refuse_others(
    name: str,
    recorded: Mapping[str, objects.Recorded],
    found: Mapping[str, Row[Any]],
    comment: str = "",
) -> None:
    """Refuse an object that is not recorded, unless a DBA made it by what `--sql` printed.

    Args:
        name: Schema and name that an object of ours will have.
        recorded: The objects that we made.
        found: What exists.
        comment: By which a DBA's object is recognised; empty if nobody can have made it.

    Raises:
        ConfigurationError: The object belongs to somebody else.
    """
    known = recorded.get(name)
    if name not in found or (known and known.is_ours):
        return
    if known is None and comment and found[name].is_owners and found[name].comment == comment:
        return
    raise ConfigurationError(
        f"{name} exists, and `pipeline migrate` has not made it; its owner is {found[name].owner}. "
        "It is left as it is. Rename it or move it to another schema, then repeat: "
        f"ALTER TABLE {identifiers.relation(name)} RENAME TO …"
    )
