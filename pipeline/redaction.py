"""What must never be read by anyone: which names hold secrets, and how text is freed of them."""

import re
from collections.abc import Iterable

MASK = "***"

_SECRET_NAME = re.compile(
    r"password|passwd|passphrase|secret|token|credential|authorization|jaas|pem$|oauthbearer"
    r"|(^|[._-])(pwd|key|dsn)$",
    re.IGNORECASE,
)
# Up to the last @ of an unbroken run: a password may hold an @ that nobody escaped.
_USERINFO = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://)[^ \t\r\n\"'<>]*@")
# The same where somebody forgot the scheme.
_LOGIN = re.compile(r"(?<![^\s\"'=,(])[^\s:@/\"'<>=,]+:(?!//)[^\s\"'<>]+@")
_ASSIGNMENT = re.compile(
    r"""(?P<name>[\w.-]*(?:password|passwd|passphrase|secret|token)[\w.-]*["']?\s*[=:]\s*)"""
    r"""(?:"[^"]*"|'(?:[^'\\]|\\.)*'|[^\s,;&"']+)""",
    re.IGNORECASE,
)


def is_secret(name: str) -> bool:
    """Whether a setting, option or log field of this name may hold a secret."""
    return _SECRET_NAME.search(name) is not None


def redacted(text: str) -> str:
    """The text without the login of any URL and without the value of any ``password=…``."""
    text = _LOGIN.sub(f"{MASK}@", _USERINFO.sub(rf"\1{MASK}@", text))
    return _ASSIGNMENT.sub(rf"\g<name>{MASK}", text)


def without(text: str, values: Iterable[object]) -> str:
    """The text without these values, where they stand as words of their own."""
    for value in map(str, values):
        if value:
            text = re.sub(rf"(?<!\w){re.escape(value)}(?!\w)", MASK, text)
    return text
