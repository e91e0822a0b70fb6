"""The closed list of problems: each is reported somewhere, with the facts that its texts name."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter

import pipeline
from pipeline.health import problems
from pipeline.health.problem import Kind

PACKAGE = Path(pipeline.__file__).parent
KINDS = {name: kind for name, kind in vars(problems).items() if isinstance(kind, Kind)}


def names_in(*texts: str) -> set[str]:
    parts = [part for text in texts for part in Formatter().parse(text)]
    return {name for _, name, _, _ in parts if name} - {"subject"}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in (PACKAGE / "health").rglob("*.py"):
        yield path, ast.parse(path.read_text())


def test_every_kind_of_problem_is_reported_with_exactly_its_facts():
    reported: dict[str, set[str]] = {}
    for path, tree in trees():
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    func=ast.Attribute(
                        value=ast.Attribute(value=ast.Name(id="problems"), attr=name), attr="of"
                    ),
                    keywords=keywords,
                ):
                    facts = {word.arg for word in keywords if word.arg}
                    wanted = names_in(KINDS[name].what, KINDS[name].fix)
                    assert facts == wanted, f"{path.name}: {name}"
                    reported[name] = facts
                case _:
                    pass
    indirect = {
        # Chosen from two or more kinds with the same facts before they are used.
        *("SERVER_ERROR", "SERVER_UNAVAILABLE", "STANDBY_PAUSED", "STANDBY_LAGS"),
        *("DEFAULT_TOPIC_MISSING", "MISSING_IN_LOG", "DIFFERS_FROM_KAFKA", "MISSING_IN_KAFKA"),
    }
    assert reported.keys() | indirect == KINDS.keys()


def test_every_kind_of_problem_has_a_fix():
    assert all(kind.what and kind.fix for kind in KINDS.values())
    assert {kind.severity for kind in KINDS.values()} == {"error", "warning", "unknown"}


def test_a_fix_is_a_sentence_of_its_own_and_no_text_names_a_count_without_its_noun():
    for name, kind in KINDS.items():
        assert not kind.fix.startswith(("or ", "and ")), name
        assert not re.search(r"\{\w+:,\} (?!bytes|should)[a-z]+", kind.what), name
        assert not re.search(r"\bbehind\b|\bprojectors?\b", kind.what), name


def test_no_other_module_writes_the_text_of_a_problem():
    elsewhere = {
        path.name
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("Problem", "Kind")
    }

    assert elsewhere == {"problem.py", "problems.py"}
