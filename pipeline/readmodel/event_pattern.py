"""Which types of events a declaration is about."""

import re

_EVENTS = re.compile(r"\*|[A-Z][A-Z_]*\.(\*|[A-Z_]+)|\*\.[A-Z_]+")


class EventPattern(str):
    """Event types: ``ORDER.NEW``, a category ``ORDER.*``, an action of any ``*.NEW``, or all ``*``.

    Raises:
        ValueError: The text is none of these.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> "EventPattern":
        """Check the text."""
        if not _EVENTS.fullmatch(text):
            raise ValueError(f"{text!r} is not an event type like ORDER.NEW, ORDER.*, *.NEW or *")
        return super().__new__(cls, text)

    def matches(self, event_type: str) -> bool:
        """Whether events of this type are among them."""
        category, _, action = self.partition(".")
        if self == "*":
            return True
        if action == "*":
            return event_type.startswith(f"{category}.")
        if category == "*":
            return event_type.split(".")[1:2] == [action]
        return self == event_type

    @property
    def condition(self) -> str:
        """The same as SQL on ``pipeline.events e``."""
        category, _, action = self.partition(".")
        if self == "*":
            return "e.event_type IS NOT NULL"
        if action == "*":
            return f"starts_with(e.event_type, '{category}.')"
        if category == "*":
            return f"split_part(e.event_type, '.', 2) = '{action}'"
        return f"e.event_type = '{self}'"
