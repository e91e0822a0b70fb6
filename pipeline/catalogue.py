"""The read models and views that there are: ours, those of installed packages, those of a folder.

A file that is put into ``pipeline/projectors`` or ``pipeline/views`` is found. An installed package
brings its own by an entry point of the group ``pipeline.read_models`` that names a module or a
package of it; ``PIPELINE_READ_MODELS`` names folders. All of them take part in everything.
"""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

from sqlalchemy import Table

from pipeline import projectors
from pipeline.errors import ConfigurationError
from pipeline.readmodel import Projector

GROUP = "pipeline.read_models"
"""Of the entry points by which installed packages bring read models and views."""


@dataclass(frozen=True)
class Catalogue:
    """Read models and views.

    Attributes:
        models: The read models, by name: the order in which they take their turns.
        views: The text of each view's file, by the name of the view.
    """

    models: tuple[Projector, ...]
    views: Mapping[str, str] = field(default_factory=dict)

    @property
    def tables(self) -> dict[str, Table]:
        """The tables of all read models, by name."""
        return {table.name: table for model in self.models for table in model.tables}

    @property
    def by_name(self) -> dict[str, Projector]:
        """The read models, by name."""
        return {model.name: model for model in self.models}


@cache
def load(paths: tuple[Path, ...] = ()) -> Catalogue:
    """Everything that is declared.

    Args:
        paths: Folders with further read models (``*.py``) and views (``*.sql``).

    Raises:
        ConfigurationError: Two objects have the same name, or a file or package cannot be loaded.
    """
    found = _Found()
    found.add_package(projectors, "pipeline")
    found.add_views(files("pipeline") / "views", "pipeline")
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        found.add_entry_point(point)
    for path in paths:
        found.add_folder(path)
    return found.catalogue()


class _Found:
    """What was found so far, and where."""

    def __init__(self) -> None:
        self._models: dict[str, tuple[Projector, str]] = {}
        self._views: dict[str, tuple[str, str]] = {}
        self._tables: dict[str, str] = {}

    def catalogue(self) -> Catalogue:
        models = tuple(self._models[name][0] for name in sorted(self._models))
        return Catalogue(models, {name: text for name, (text, _) in sorted(self._views.items())})

    def add_package(self, package: ModuleType, source: str) -> None:
        """The read models of a module, or of the modules of a package."""
        self._add_models(package, source)
        for module in iter_modules(getattr(package, "__path__", ())):
            self._add_models(import_module(f"{package.__name__}.{module.name}"), source)

    def add_entry_point(self, point: EntryPoint) -> None:
        source = f"entry point {point.name} = {point.value}"
        try:
            module = point.load()
        except Exception as error:
            raise ConfigurationError(
                f"{source} of group {GROUP} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        self.add_package(module, source)
        if hasattr(module, "__path__"):
            self.add_views(files(module), source)
            self.add_views(files(module) / "views", source)

    def add_folder(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigurationError(
                f"PIPELINE_READ_MODELS: {path} is not a folder; name folders with read models "
                "(*.py) and views (*.sql)"
            )
        for file in sorted(path.glob("*.py")):
            self._add_models(_imported(file), str(file))
        self.add_views(path, str(path))
        self.add_views(path / "views", str(path))

    def add_views(self, folder: Path | Traversable, source: str) -> None:
        """The views of a folder: each file with SQL."""
        if not folder.is_dir():
            return
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            name = file.name.removesuffix(".sql")
            if name != file.name:
                self._claim(name, f"{source}: {file.name}")
                self._views[name] = (file.read_text("utf-8"), source)

    def _add_models(self, module: ModuleType, source: str) -> None:
        for model in _models(module):
            known = self._models.get(model.name)
            if known and known[0] is model:
                continue
            for table in model.tables:
                self._claim(table.name, f"{source}: {module.__name__}")
            self._models[model.name] = (model, source)

    def _claim(self, name: str, source: str) -> None:
        if taken := self._tables.get(name):
            raise ConfigurationError(
                f"two tables or views are called {name}: {taken}, and {source}. Rename one of them"
            )
        self._tables[name] = source


def _models(module: ModuleType) -> Iterator[Projector]:
    return (value for value in vars(module).values() if isinstance(value, Projector))


def _imported(file: Path) -> ModuleType:
    name = f"pipeline_read_models.{file.stem}"
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"PIPELINE_READ_MODELS: {file} cannot be loaded")
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigurationError(
            f"PIPELINE_READ_MODELS: {file} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    return module
