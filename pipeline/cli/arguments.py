"""What several commands take as arguments: times, partitions and offsets, names of read models."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

import typer

from pipeline.partitions import NextOffset, Offset, OffsetRange, Partition, after

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from pipeline.readmodel import Projector
    from pipeline.settings import Settings

OFFSET_MAX = 2**63 - 1
"""Kafka numbers records with 64 bits, as PostgreSQL stores them."""
_COORDINATES = "must be TOPIC, TOPIC:PARTITION or TOPIC:PARTITION:OFFSET[-OFFSET]"


class Coordinates(NamedTuple):
    """A topic, one partition of it, or a range of offsets of that partition."""

    topic: str
    partition: int | None
    offsets: OffsetRange | None

    def includes(self, partition: Partition) -> bool:
        """Whether it is this topic and, if one is named, this partition."""
        return self.topic == partition.topic and self.partition in (None, partition.number)


def parse_time(value: str) -> datetime:
    """A moment, or a span before now: 15m, 2h, 7d."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86_400}.get(value[-1:])
    try:
        if unit and value[:-1].isdecimal():
            return datetime.now(UTC) - timedelta(seconds=int(value[:-1]) * unit)
        found = datetime.fromisoformat(value)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        raise typer.BadParameter(
            "must be a time such as 2026-01-31T08:00:00Z (years 1 to 9999), or a time before now "
            "such as 15m, 2h, 7d"
        ) from None


def parse_coordinates(value: str) -> Coordinates:
    """Topic, partition and offsets."""
    topic, _, rest = value.partition(":")
    number, _, offsets = rest.partition(":")
    first, _, last = offsets.partition("-")
    try:
        partition = int(number) if rest else None
        if not offsets:
            return Coordinates(topic, partition, None)
        begin, end = Offset(int(first)), after(Offset(int(last or first)))
    except ValueError:
        raise typer.BadParameter(_COORDINATES) from None
    if not 0 <= begin < end <= OFFSET_MAX:
        raise typer.BadParameter(_COORDINATES)
    return Coordinates(topic, partition, OffsetRange(NextOffset(begin), end))


def parse_partitions(value: str) -> Coordinates:
    """A topic or one partition of it, without offsets."""
    found = parse_coordinates(value)
    if found.offsets is not None:
        raise typer.BadParameter("must be TOPIC or TOPIC:PARTITION")
    return found


def logged_partitions(engine: "Engine", wanted: Coordinates, text: str) -> list[Partition]:
    """The partitions of the log that were asked for.

    Args:
        engine: The database.
        wanted: A topic or a partition.
        text: As it was written.

    Raises:
        typer.BadParameter: There is none; the message names those of the topic.
    """
    from pipeline.db import transaction
    from pipeline.log.ranges import ranges

    with transaction(engine) as db:
        logged = sorted(ranges(db))
    if chosen := [partition for partition in logged if wanted.includes(partition)]:
        return chosen
    what, topic = f"the log has no partition {text}", wanted.topic
    if in_brackets := re.fullmatch(r"(.+)\[(\d+)\]", text):
        topic = in_brackets[1]
        what = f"write it as {topic}:{in_brackets[2]}"
    raise typer.BadParameter(f"{what}; {_logged(logged, topic)}")


def _logged(logged: Sequence[Partition], topic: str) -> str:
    """What the log has of a topic, or which topics it has."""
    if not logged:
        return "the log is empty: run `pipeline ingest` first"
    numbers = [partition.number for partition in logged if partition.topic == topic]
    if not numbers:
        return f"the log has the topics {', '.join(sorted({it.topic for it in logged}))}"
    return f"the log has partitions {_intervals(numbers)} of {topic}"


def _intervals(numbers: Sequence[int]) -> str:
    """``0-5``, or ``0-2, 4`` where some are missing."""
    begins = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return ", ".join(
        str(begin) if begin == end else f"{begin}-{end}"
        for begin, end in zip(begins, ends, strict=True)
    )


def read_models(settings: "Settings", names: Sequence[str]) -> "list[Projector]":
    """The read models with these names, or all if none is named.

    Raises:
        typer.BadParameter: There is no read model of a name.
    """
    from pipeline import catalogue

    by_name = catalogue.load(settings.read_models).by_name
    if unknown := [name for name in names if name not in by_name]:
        raise typer.BadParameter(
            f"there is no read model {', '.join(unknown)}; the read models are {', '.join(by_name)}"
        )
    return [by_name[name] for name in dict.fromkeys(names or by_name)]
