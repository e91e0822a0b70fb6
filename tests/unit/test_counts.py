"""Counts agree with their nouns, in every text that this program writes."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline
from pipeline.counts import count


@pytest.mark.parametrize(
    ("number", "nouns", "text"),
    [
        (0, ("record",), "0 records"),
        (1, ("record",), "1 record"),
        (2304, ("record",), "2,304 records"),
        (1, ("row is", "rows are"), "1 row is"),
        (2, ("row is", "rows are"), "2 rows are"),
    ],
)
def test_a_count_agrees_with_its_noun(number, nouns, text):
    assert count(number, *nouns) == text


UNITS = {"bytes", "s", "ms"}
"""They do not change with the number."""


def numbers_before_plurals(source: str) -> Iterator[str]:
    """What a f-string writes after a number with thousands separators, if it is a plural."""
    for text in ast.walk(ast.parse(source)):
        if not isinstance(text, ast.JoinedStr):
            continue
        for value, after in zip(text.values, text.values[1:], strict=False):
            match value, after:
                case (
                    ast.FormattedValue(format_spec=ast.JoinedStr(values=[ast.Constant(value=",")])),
                    ast.Constant(value=str(words)),
                ):
                    if (noun := re.match(r" ([a-z]+s)\b", words)) and noun[1] not in UNITS:
                        yield f"{ast.unparse(value)}{words}"
                case _:
                    pass


def test_every_number_before_a_plural_is_a_count():
    package = Path(pipeline.__file__).parent
    # The demo's numbers are thousands.
    files = [path for path in package.rglob("*.py") if "demo" not in path.parts]

    found = {path.name: list(numbers_before_plurals(path.read_text())) for path in files}

    assert {name: texts for name, texts in found.items() if texts} == {}
