"""Records of every kind, hostile ones above all, for tests of their processing."""

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from pipeline.events import Record, Row, read

# Hypothesis measures garbage collections in a function that has no stack left if deep nesting has
# just used it.
deep_nesting = pytest.mark.filterwarnings(
    "ignore:Exception ignored in.*gc_callback:pytest.PytestUnraisableExceptionWarning"
)
"""For modules that read records nested deeply."""

SAMPLE = Path(__file__).resolve().parent / "data" / "sample_events.jsonl"
EVENT_ID = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
ORDER_ID = "7f9c24e8-3b12-4fef-91e0-56a2d5a9c001"


def row_of(value: bytes | None, **facts) -> Row:
    record = Record("orders", 3, 42, value, None, None, None, 0)
    return read(record._replace(**facts))


def envelope(**changes) -> bytes:
    event = {
        "id": EVENT_ID,
        "created_at": "2026-01-12T10:00:00.123456Z",
        "type": "ORDER.NEW",
        "object": {"id": ORDER_ID},
    }
    return json.dumps({**event, **changes}).encode()


def nested(depth: int, kind: str = "array") -> bytes:
    if kind == "array":
        return b"[" * depth + b"]" * depth
    return b'{"a":' * depth + b"1" + b"}" * depth


# Values that jsonb refuses or changes, and similar ones: value, whether there is a payload, whether
# the bytes are kept, and the text of the problem. None if the record is good.
HOSTILE = {
    "tombstone": (None, False, False, "tombstone"),
    "empty": (b"", False, True, "empty value"),
    "not UTF-8": (b'{"a": "\xff\xfe"}', False, True, "not UTF-8"),
    "not JSON": (b"hello", False, True, "not JSON"),
    "truncated": (envelope()[:-1], False, True, "not JSON"),
    "trailing garbage": (envelope() + b"x", False, True, "not JSON"),
    "NaN": (envelope(amount=float("nan")), False, True, "not JSON"),
    "raw NUL": (b'{"a": "\x00"}', False, True, "not JSON"),
    "byte order mark": (b"\xef\xbb\xbf" + envelope(), False, True, "not JSON"),
    "NUL escape": (envelope(note="a\0b"), False, True, "NUL in a string"),
    "NUL escape in a name": (b'{"a\\u0000": 1}', False, True, "NUL in a string"),
    "escaped backslash": (envelope(note="a\\u0000b"), True, False, None),
    "lone high surrogate": (b'["\\ud800"]', False, True, "lone surrogate"),
    "lone low surrogate": (b'["\\udc00"]', False, True, "lone surrogate"),
    "surrogates the wrong way": (b'["\\udc00\\ud800"]', False, True, "lone surrogate"),
    "surrogates apart": (b'["\\ud83dx\\ude00"]', False, True, "lone surrogate"),
    "surrogate before an escape": (b'["\\ud83d\\n"]', False, True, "lone surrogate"),
    "surrogate before a letter and an escape": (b'["\\ud83dx\\n"]', False, True, "lone surrogate"),
    "two high surrogates": (b'["\\ud83d\\ud83d\\ude00"]', False, True, "lone surrogate"),
    "surrogate pair": (envelope(note="\N{GRINNING FACE}"), True, False, None),
    "duplicate keys": (b'{"id": 1, "id": 2}', True, True, "envelope: id malformed"),
    "duplicate keys within": (b'{"x": {"a": 1, "a": 1}}', True, True, "no envelope"),
    "1.50 keeps its zero in jsonb": (envelope(amount="x").replace(b'"x"', b"1.50"),
                                     True, False, None),
    "40 digits": (b"[1234567890123456789012345678901234567890]", True, False, "no envelope"),
    "a negative zero": (b"[-0]", True, True, "no envelope"),
    "a negative zero with a point": (b"[-0.0]", True, True, "no envelope"),
    "1e400": (b"[1e400]", True, True, "no envelope"),
    "1e200000": (b"[1e200000]", True, True, "no envelope"),
    "a scalar": (b"42", True, False, "no envelope: not a JSON object"),
    "null": (b"null", True, False, "no envelope: not a JSON object"),
    "an array": (b"[]", True, False, "no envelope: not a JSON object"),
    "no envelope": (b'{"price": 1}', True, False, "no envelope"),
    "unknown type": (envelope(type="COMET.SEEN"), True, False, None),
    "unknown field": (envelope(comet="seen"), True, False, None),
    "id malformed": (envelope(id="42"), True, False, "envelope: id malformed"),
    "time malformed": (envelope(created_at="12.01.2026"), True, False,
                       "envelope: created_at malformed"),
    "type malformed": (envelope(type=7), True, False, "envelope: type malformed"),
    "object malformed": (envelope(object=[]), True, False, "envelope: object malformed"),
    "only an id": (b'{"id": "%s"}' % EVENT_ID.encode(), True, False,
                   "envelope: created_at missing, type missing, object missing"),
    "nested 200": (nested(200), True, False, "no envelope"),
    "nested 255": (nested(255), True, True, "no envelope"),
    "nested 1024": (nested(1024), True, True, "no envelope"),
    "nested 2,000": (nested(2_000), True, True, "envelope not read"),
    "nested 6,000": (nested(6_000), True, True, "envelope not read"),
    "nested 100,000": (nested(100_000), True, True, "envelope not read"),
    "objects nested 300": (nested(300, "object"), True, True, "no envelope"),
}  # fmt: skip


# -------------------------------------------------------------------------------------- any record


_WHITE = st.sampled_from(["", "", "", " ", "\n", "\t ", "  "])
_DIGITS = st.text("0123456789", min_size=1, max_size=45)


@st.composite
def json_numbers(draw):
    """Numbers as people and programs spell them, extreme ones among them."""
    whole = draw(_DIGITS).lstrip("0") or "0"
    fraction = draw(st.one_of(st.just(""), _DIGITS.map(lambda digits: f".{digits}")))
    exponent = draw(
        st.one_of(
            st.just(""),
            st.tuples(
                st.sampled_from("eE"), st.sampled_from(["", "+", "-"]), st.integers(0, 400)
            ).map(lambda parts: "".join(map(str, parts))),
        )
    )
    return draw(st.sampled_from(["", "-"])) + whole + fraction + exponent


_STRING_PIECES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters='"\\'), max_size=6).filter(
        lambda text: all(character >= " " for character in text)
    ),
    st.sampled_from(["\\n", "\\\\", '\\"', "\\/", "\\u0041", "\\u00e4", ", ", ": ", '\\": ', "{ "]),
    st.sampled_from(["\\u0000", "\\ud800", "\\udc00", "\\ud83d\\ude00", "\\uD83D"]),
)
json_strings = st.lists(_STRING_PIECES, max_size=4).map(lambda pieces: f'"{"".join(pieces)}"')
_NAMES = st.one_of(
    json_strings, st.sampled_from(['"a"', '"b"', '"id"', '"type"', '"object"', '"created_at"'])
)


def _joined(pieces: list[str], white: list[str], brackets: str) -> str:
    spaced = [f"{piece}{gap}" for piece, gap in zip(pieces, white, strict=False)]
    return brackets[0] + ",".join(spaced) + brackets[1]


def _containers(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    members = st.tuples(_NAMES, _WHITE, _WHITE, values).map("{0[0]}{0[1]}:{0[2]}{0[3]}".format)
    white = st.lists(_WHITE, min_size=4, max_size=4)
    return st.one_of(
        st.builds(_joined, st.lists(values, max_size=4), white, st.just("[]")),
        st.builds(_joined, st.lists(members, max_size=4), white, st.just("{}")),
    )


json_texts = st.recursive(
    st.one_of(json_numbers(), json_strings, st.sampled_from(["true", "false", "null"])),
    _containers,
    max_leaves=12,
)
"""JSON texts in every spelling of the grammar, with those that jsonb refuses or changes."""

values = st.one_of(
    st.none(),
    st.binary(max_size=60),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")),
    json_texts.map(str.encode),
    st.builds(nested, st.integers(1, 1100), st.sampled_from(["array", "object"])),
    st.tuples(st.sampled_from(SAMPLE.read_bytes().splitlines()), st.integers(0, 3000), st.binary())
    .map(lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] + 1 :]),
)  # fmt: skip
header_lists = st.none() | st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        st.none() | st.binary(max_size=12),
    ),
    max_size=5,
)


# -------------------------------------------------------------------------------------------- times


@st.composite
def rfc3339_times(draw: st.DrawFn) -> str:
    """A time of RFC 3339, or nearly: each part may be at or beyond its limit."""
    two = "{:02}".format
    date = "-".join(
        [
            draw(st.sampled_from(["0000", "0001", "1969", "1970", "2026", "9999"])),
            draw(st.integers(0, 13).map(two)),
            draw(st.integers(0, 32).map(two)),
        ]
    )
    clock = ":".join(
        [
            draw(st.integers(0, 25).map(two)),
            draw(st.sampled_from(["00", "30", "59", "60"])),
            draw(st.sampled_from(["00", "07", "59", "60", "61"])),
        ]
    )
    digits = draw(
        st.text("0123456789", max_size=12)
        | st.sampled_from(["9999995", "99999949", "0000005", "0000015", "5" * 40])
    )
    hours, minutes = draw(st.integers(0, 17)), draw(st.integers(0, 60))
    offset = f"{draw(st.sampled_from('+-'))}{hours:02}:{minutes:02}"
    zone = draw(st.sampled_from(["Z", "Z", "z", "", offset, offset]))
    separator = draw(st.sampled_from("TTTt _"))
    text = draw(
        st.sampled_from(
            [
                f"{date}{separator}{clock}{'.' if digits else ''}{digits}{zone}",
                f"2026-01-12{separator}24:00:00{'.' if digits else ''}{digits}{zone}",
                f"2026-01-12{separator}{clock}Z",
                date,
            ]
        )
    )
    if draw(st.integers(0, 3)):
        return text
    at = draw(st.integers(0, len(text)))
    inserted = draw(st.text("0123456789TtZz:.,+- WQ\u0664\uff11\n", max_size=4))
    return text[:at] + inserted + text[at + draw(st.integers(0, 4)) :]
