"""The command that produces events: simulate."""

from collections.abc import Iterator
from typing import Annotated

import typer

from pipeline.cli.app import app, settings_of
from pipeline.cli.output import Gauge, emit, say
from pipeline.sandbox.simulator import Chaos, Keying, Record, Simulation
from pipeline.sandbox.simulator.producer import Producer
from pipeline.signals import stopped_by_signals

_PARTITIONS = 6


@app.command(
    epilog="Exit codes: 0 everything was produced, or stopped by SIGTERM or Ctrl-C; 128 + its "
    "number when stopped by another signal; 2 wrong usage; 69 the brokers are away; 78 a "
    "setting is wrong or a topic does not exist.",
)
def simulate(
    ctx: typer.Context,
    events: Annotated[
        int | None,
        typer.Option(min=1, help="How many events; without it, until Ctrl-C.", show_default=False),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(min=0.1, help="Records a second; without it, as fast as it goes."),
    ] = None,
    seed: Annotated[
        str, typer.Option(help="The same seed and arguments give the same records.")
    ] = "7",
    chaos: Annotated[
        bool,
        typer.Option(
            "--chaos", help="Add repeats, disorder, unknown types and fields, malformed messages."
        ),
    ] = False,
    topic: Annotated[
        str | None, typer.Option(help="Where to; the first of PIPELINE_TOPICS if not given.")
    ] = None,
    prices_topic: Annotated[
        str | None, typer.Option(help="Where prices go; no prices if not given.")
    ] = None,
    create_topics: Annotated[
        bool, typer.Option("--create-topics", help="Create the topics that do not exist.")
    ] = False,
    partitions: Annotated[
        int, typer.Option(min=1, max=1000, help="Partitions of topics that are created.")
    ] = _PARTITIONS,
    key_by: Annotated[
        Keying,
        typer.Option(
            help="How Upvest keys the topic: by tenant, all events are in one partition; by user "
            "or by entity, they spread."
        ),
    ] = Keying.USER,
    as_json: Annotated[
        bool, typer.Option("--json", help="At the end one JSON document, for programs.")
    ] = False,
) -> None:
    """Produce a believable broker's events to Kafka. Never point it at real topics.

    Users onboard, pass checks, fund accounts, place orders that settle; books are kept, so that
    balances add up.

    \b
    $ pipeline simulate --events 10000 --create-topics
    $ pipeline simulate --rate 200 --chaos
    $ pipeline simulate --events 1000 --key-by tenant   # one partition gets everything
    """
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
            keying=key_by,
        )

        def observed() -> Iterator[Record]:
            with Gauge("producing", total=events, unit="records") as gauge:
                for number, record in enumerate(simulation, start=1):
                    gauge.show(number)
                    if stop.is_set():
                        simulation.stop()
                    yield record

        sent = producer.produce(observed(), rate=rate)
    report = {
        "produced": sent,
        "topics": topics,
        "chaos": {str(kind): count for kind, count in sorted(simulation.report.counts.items())},
    }
    if as_json:
        emit(report)
    else:
        say(f"Produced {sent:,} records to {', '.join(topics)}.")
    if chaos and not as_json:
        what = (f"{count} {kind}" for kind, count in sorted(simulation.report.counts.items()))
        say(f"Chaos: {', '.join(what)}.")
    raise typer.Exit(stop.exit_code)
