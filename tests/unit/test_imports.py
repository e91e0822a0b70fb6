"""No file imports a private module of a library: it may change in any release."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
OURS = {"pipeline", "tests", "benchmarks"}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, with their whole names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def is_private(module: str) -> bool:
    library, *parts = module.split(".")
    return library not in OURS and any(part.startswith("_") for part in parts)


def test_no_file_imports_a_private_module_of_a_library():
    files = [path for folder in sorted(OURS) for path in (ROOT / folder).rglob("*.py")]

    found = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in files
        for module in imported(path)
        if is_private(module)
    ]

    assert len(files) > 200
    assert found == []
    assert is_private("confluent_kafka.admin._config")
