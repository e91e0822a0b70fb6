"""Text from outside, made safe for a reader's terminal."""

import json
import re

# What deceives the reader of a terminal: escape sequences and controls, line separators, and all
# that is invisible (changes of direction, joiners, tags); and half surrogate pairs, which no stream
# accepts.
_CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f"
    "\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff0-\ufffb\U000110bd\U000110cd"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def printable(text: str) -> str:
    r"""The text, with escapes such as ``\x1b`` for characters that control a terminal."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def printable_json(document: str) -> str:
    """The same JSON, with JSON's escapes for characters that control a terminal."""
    return _CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], document)
