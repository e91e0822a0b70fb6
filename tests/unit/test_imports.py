"""What a file may import: no private module of a library, and of a package only what it exports.

A package's ``__all__`` names what other packages may use: names that its ``__init__`` imports, and
modules, which ``__init__`` does not import, so that a command loads only what it needs.
"""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"pipeline", "tests", "benchmarks"}


class Imported(NamedTuple):
    """One import: in which file, and the whole dotted name."""

    file: Path
    name: str

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}: {self.name}"


def imports(folder: str) -> list[Imported]:
    return [
        Imported(path, name)
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in names_imported(ast.parse(path.read_text()))
    ]


def names_imported(module: ast.Module) -> Iterator[str]:
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_private(name: str) -> bool:
    library, *modules = name.split(".")
    return library not in OURS and any(part.startswith("_") for part in modules)


def steps_into_packages(imported: Imported) -> Iterator[tuple[Path, str]]:
    """The packages that an import enters from outside, each with the name it takes from there."""
    first, *rest = imported.name.split(".")
    package = ROOT / first
    for name in rest:
        if package.name != "pipeline" and package not in imported.file.parents:
            yield package, name
        package = package / name
        if not package.is_dir():
            return


def exported(package: Path) -> set[str]:
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def test_no_file_imports_a_private_module_of_a_library():
    found = [imported for folder in sorted(OURS) for imported in imports(folder)]

    assert len({imported.file for imported in found}) > 200
    assert [str(imported) for imported in found if is_private(imported.name)] == []
    assert is_private("confluent_kafka.admin._config")


def test_a_package_of_the_program_is_used_only_through_what_it_exports():
    ours = [found for found in imports("pipeline") if found.name.startswith("pipeline.")]
    steps = [(found, step) for found in ours for step in steps_into_packages(found)]

    assert len(steps) > 100
    assert [str(found) for found, (package, name) in steps if name not in exported(package)] == []


def test_each_module_that_a_package_exports_is_used_outside_of_it():
    ours = [found for found in imports("pipeline") if found.name.startswith("pipeline.")]
    used = {step for found in ours for step in steps_into_packages(found)}
    modules = {
        (package, name)
        for package in (ROOT / "pipeline").rglob("*")
        if (package / "__init__.py").is_file()
        for name in exported(package)
        if (package / f"{name}.py").is_file() or (package / name).is_dir()
    }

    assert len(modules) > 30
    assert modules - used == set()


def contract(name):
    """What `pyproject.toml` says of one rule for imports."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [found] = [contract for contract in settings["contracts"] if contract["name"] == name]
    return found


PURE = contract("The core is pure")


@pytest.mark.parametrize("module", PURE["source_modules"])
def test_a_pure_module_loads_no_library_for_input_or_output(module):
    """Import-linter does not see what the `__init__` of a parent package imports."""
    program = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"

    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )

    forbidden = set(PURE["forbidden_modules"]) - sys.stdlib_module_names
    assert {"confluent_kafka", "sqlalchemy"} <= forbidden
    assert forbidden.isdisjoint(json.loads(done.stdout))


def test_a_projector_imports_the_declarations_and_nothing_else():
    files = list((ROOT / "pipeline/projectors").glob("[!_]*.py"))
    names = [(file, name) for file in files for name in names_imported(ast.parse(file.read_text()))]

    assert len(files) > 10
    others = [(file, name) for file, name in names if not name.startswith("pipeline.readmodel.")]
    assert [(file.name, name) for file, name in others] == []
