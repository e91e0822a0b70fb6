"""Values that must be shown nowhere: every secret, and the personal data of an event.

Tests pass them to the code under test and search all its output for them, also in the forms
that a URL, an authentication or a dump gives them.
"""

import base64
import json
from collections.abc import Iterator
from urllib.parse import quote

from pipeline.sandbox.simulator.parties import _FIRST_NAMES, _LAST_NAMES

DATABASE_PASSWORD = "c4n4ry/d@tabase:pw"
WRONG_PASSWORD = "c4n4ry-wr0ng-pw"
KAFKA_PASSWORD = "c4n4ry-k4fka-pw"
KEY_PASSWORD = "c4n4ry-k3y-pw"
TOKEN = "c4n4ry-t0ken"
SECRETS = (DATABASE_PASSWORD, WRONG_PASSWORD, KAFKA_PASSWORD, KEY_PASSWORD, TOKEN)

NAME = "Kanaria Vogelsang"
IBAN = "DE75512108001245126199"
TAX_ID = "47036892816"
PERSONAL = (NAME, "Kanaria", "Vogelsang", IBAN, TAX_ID)

SIMULATED = (*_FIRST_NAMES, *_LAST_NAMES, "@example.org", "4943155501234")
"""What is personal in the simulator's events."""


def leaks(text: str) -> list[str]:
    """The canaries that a text holds, in any form."""
    return [value for value in (*SECRETS, *PERSONAL) if any(form in text for form in _forms(value))]


def simulated(text: str) -> list[str]:
    """The names, mail addresses and numbers of the simulator's people that a text holds."""
    return [value for value in SIMULATED if value in text or json.dumps(value)[1:-1] in text]


def _forms(value: str) -> Iterator[str]:
    yield value
    yield quote(value, safe="")
    yield value.encode().hex()
    # Base64 differs after zero, one or two bytes; its first and last characters depend on others.
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + value.encode()).decode()
        yield encoded[4 if before else 0 : -4]
