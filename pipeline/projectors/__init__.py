"""The read models: one file each. A file that is dropped in here is found; nothing else to do."""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules

from sqlalchemy import Table

from pipeline.errors import ConfigurationError
from pipeline.readmodel import Projector


@cache
def discover() -> tuple[Projector, ...]:
    """Every projector of this folder, by name: the order in which they take their turns.

    Raises:
        ConfigurationError: Two projectors share a name.
    """
    found: dict[str, Projector] = {}
    for module in iter_modules(__path__):
        for value in vars(import_module(f"{__name__}.{module.name}")).values():
            if isinstance(value, Projector) and found.setdefault(value.name, value) is not value:
                raise ConfigurationError(f"two projectors are called {value.name}")
    return tuple(found[name] for name in sorted(found))


def tables() -> dict[str, Table]:
    """The tables of all read models, by name."""
    return {table.name: table for projector in discover() for table in projector.tables}
