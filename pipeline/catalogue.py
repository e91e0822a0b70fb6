"""The read models and views that there are: ours, those of installed packages, those of a folder.

A file that is put into ``pipeline/projectors`` or ``pipeline/views`` is found. An installed package
brings its own by an entry point of the group ``pipeline.read_models`` that names a module or a
package of it; ``PIPELINE_READ_MODELS`` names folders. All of them take part in everything.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
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
from pipeline.readmodel import Projector, mistakes

GROUP = "pipeline.read_models"
"""Of the entry points by which installed packages bring read models and views."""


@dataclass(frozen=True)
class Catalogue:
    """Read models and views.

    Attributes:
        models: The read models, by name: the order in which they take their turns.
        views: The text of each view's file, by the name of the view.
        view_files: The files, by the name of the view.
    """

    models: tuple[Projector, ...]
    views: Mapping[str, str] = field(default_factory=dict)
    view_files: Mapping[str, str] = field(default_factory=dict)

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
        ConfigurationError: Two objects have the same name, a column refers to no read model, or a
            file or package cannot be loaded; the text has file and line.
    """
    found = _Found()
    found.add_package(projectors, "pipeline")
    found.add_views(files("pipeline") / "views")
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
        self._files: dict[str, str] = {}
        """Where each table or view is declared."""

    def catalogue(self) -> Catalogue:
        self._refuse_unknown_targets()
        models = tuple(self._models[name][0] for name in sorted(self._models))
        views = sorted(self._views.items())
        return Catalogue(
            models,
            {name: text for name, (text, _) in views},
            {name: file for name, (_, file) in views},
        )

    def add_package(self, package: ModuleType, source: str) -> None:
        """The read models of a module, or of the modules of a package."""
        self._add_models(package, source)
        for module in iter_modules(getattr(package, "__path__", ())):
            name = f"{package.__name__}.{module.name}"
            with _explained(f"{source}: module {name}"):
                imported = import_module(name)
            self._add_models(imported, source)

    def add_entry_point(self, point: EntryPoint) -> None:
        source = f"entry point {point.name} = {point.value} of group {GROUP}"
        with _explained(source):
            module = point.load()
        if not isinstance(module, ModuleType):
            raise ConfigurationError(
                f"{source} is not a module. Name the module or package that declares the read "
                "models"
            )
        self.add_package(module, source)
        if hasattr(module, "__path__"):
            self.add_views(files(module))
            self.add_views(files(module) / "views")

    def add_folder(self, path: Path) -> None:
        if not path.is_dir():
            raise ConfigurationError(
                f"PIPELINE_READ_MODELS: {path} is not a folder; name folders with read models "
                "(*.py) and views (*.sql)"
            )
        for file in sorted(path.glob("*.py")):
            with _explained(str(file)):
                module = _imported(file)
            self._add_models(module, str(file))
        self.add_views(path)
        self.add_views(path / "views")

    def add_views(self, folder: Path | Traversable) -> None:
        """The views of a folder: each file with SQL."""
        if not folder.is_dir():
            return
        for file in sorted(folder.iterdir(), key=lambda file: file.name):
            name = file.name.removesuffix(".sql")
            if name != file.name:
                self._claim(name, str(file))
                self._views[name] = (file.read_text("utf-8"), str(file))

    def _add_models(self, module: ModuleType, source: str) -> None:
        file = module.__file__ or source
        for model in _models(module):
            known = self._models.get(model.name)
            if known and known[0] is model:
                continue
            with _explained(file):
                tables = model.tables
            for table in tables:
                self._claim(table.name, file)
            self._models[model.name] = (model, file)

    def _claim(self, name: str, file: str) -> None:
        if taken := self._files.get(name):
            raise ConfigurationError(
                f"two tables or views are called {name}: in {taken}, and in {file}. Rename one of "
                "them"
            )
        self._files[name] = file

    def _refuse_unknown_targets(self) -> None:
        tables = {table.name for model, _ in self._models.values() for table in model.tables}
        for model, file in self._models.values():
            for column in (column for table in model.tables for column in table.columns):
                target = column.info.get("refers_to")
                if target and target not in tables:
                    near = get_close_matches(target, tables, 1)
                    meant = f"Did you mean {near[0]}?" if near else "Write uuid(…) instead"
                    raise ConfigurationError(
                        f"{file}: {column.table.name}.{column.name} refers to {target}, but no "
                        f"read model has this table. {meant}"
                    )


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """Whatever is wrong in the files of others is an error of theirs, with file and line."""
    try:
        yield
    except Exception as error:
        raise ConfigurationError(mistakes.described(error, source)) from error


def _models(module: ModuleType) -> Iterator[Projector]:
    return (value for value in vars(module).values() if isinstance(value, Projector))


def _imported(file: Path) -> ModuleType:
    name = f"pipeline_read_models.{file.stem}"
    spec = spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
