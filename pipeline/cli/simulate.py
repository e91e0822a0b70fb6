"""Produces events to Kafka: simulate."""

from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import settings_of
from pipeline.cli.command import AsJson, Servers, command
from pipeline.cli.output import Gauge, emit, say
from pipeline.counts import count
from pipeline.errors import ExitCode

if TYPE_CHECKING:
    from pipeline.sandbox.simulator import Record

PARTITIONS = 6


class KeyBy(StrEnum):
    """The values of ``Keying``, which is imported with the simulator only."""

    TENANT = "tenant"
    USER = "user"
    ENTITY = "entity"


@command(
    {
        ExitCode.DONE: "every event was produced, or stopped by SIGTERM or Ctrl-C",
        ExitCode.CONFIGURATION: "a setting is wrong, or a topic does not exist",
    },
    servers=Servers.KAFKA,
    by_signal="128 + N stopped by another signal N",
)
def simulate(
    ctx: typer.Context,
    events: Annotated[
        int | None,
        typer.Option(min=1, help="Number of events; by default, until Ctrl-C.", show_default=False),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.1, help="Records per second; as fast as possible by default."),
    ] = None,
    seed: Annotated[
        str, typer.Option(help="The same seed and options give the same records.")
    ] = "7",
    chaos: Annotated[
        bool,
        typer.Option(
            "--chaos", help="Add repeats, disorder, unknown types and fields, malformed records."
        ),
    ] = False,
    topic: Annotated[
        str | None, typer.Option(help="The topic; the first of PIPELINE_TOPICS by default.")
    ] = None,
    prices_topic: Annotated[
        str | None, typer.Option(help="The topic for prices; no prices by default.")
    ] = None,
    create_topics: Annotated[
        bool, typer.Option("--create-topics", help="Create the topics that do not exist.")
    ] = False,
    partitions: Annotated[
        int, typer.Option(min=1, max=1000, help="Partitions of topics that are created.")
    ] = PARTITIONS,
    key_by: Annotated[
        KeyBy,
        typer.Option(
            help="The key of records. By tenant, all events are in one partition; by user or by "
            "entity, in all partitions."
        ),
    ] = KeyBy.USER,
    as_json: AsJson = False,
) -> None:
    """Produce realistic Upvest events to Kafka, for tests. Never use it on real topics.

    Simulated users pass checks, pay in cash and place orders that settle. The balances are
    consistent with the orders.

    \b
    $ pipeline simulate --events 10000 --create-topics
    $ pipeline simulate --rate 200 --chaos
    $ pipeline simulate --events 1000 --key-by tenant   # one partition gets everything
    """
    from pipeline.sandbox.simulator import Chaos, Keying, Simulation
    from pipeline.sandbox.simulator.producer import Producer
    from pipeline.signals import stopped_by_signals

    settings = settings_of(ctx)
    topic = topic or settings.topics[0]
    topics = [topic] if prices_topic is None else [topic, prices_topic]
    with stopped_by_signals() as stop, Producer(settings.kafka_client()) as producer:
        if create_topics:
            producer.create_topics(*topics, partitions=partitions)
        simulation = Simulation(
            seed=seed,
            events=events,
            topic=topic,
            partitions=producer.partitions(topic),
            prices_topic=prices_topic,
            chaos=Chaos() if chaos else None,
            keep_books=False,
            keying=Keying(key_by),
        )

        def observed() -> "Iterator[Record]":
            with Gauge("producing", total=events, unit="records") as gauge:
                for number, record in enumerate(simulation, start=1):
                    gauge.show(number)
                    if stop.is_set():
                        simulation.stop()
                    yield record

        sent = producer.produce(observed(), rate=rate)
    counts = {str(kind): count for kind, count in sorted(simulation.report.counts.items())}
    if as_json:
        emit({"produced": sent, "topics": topics, "chaos": counts})
    else:
        say(f"Produced {count(sent, 'record')} to {', '.join(topics)}.")
        if chaos:
            say(f"Chaos: {', '.join(f'{count} {kind}' for kind, count in counts.items())}.")
    raise typer.Exit(stop.exit_code)
