"""The command that puts the promises to the proof: verify."""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from itertools import groupby
from typing import Annotated

import typer

from pipeline import catalogue
from pipeline.cli.app import app, database_of, settings_of
from pipeline.cli.arguments import read_models
from pipeline.cli.output import Gauge, emit, say
from pipeline.cli.rewind import offsets
from pipeline.errors import ExitCode
from pipeline.health.verify import (
    Evidence,
    verify_declared,
    verify_kafka,
    verify_log,
    verify_read_models,
)
from pipeline.log_events import printable
from pipeline.schema.migrate import check_schema


class _Proof(StrEnum):
    LOG = "log"
    KAFKA = "kafka"
    READ_MODELS = "read-models"


@app.command(
    epilog="Exit codes: 0 everything was examined and holds; 1 something does not hold or could "
    "not be examined; 2 wrong usage; 69 a server is away; 75 a rebuild of a "
    "read model runs; 78 a setting, a right or the schema is wrong."
)
def verify(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Of the read models only these."),
    ] = None,
    only: Annotated[
        list[_Proof] | None,
        typer.Option(help="One of the three proofs; may be given more than once."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document, for programs.")
    ] = False,
) -> None:
    """Prove the promises on what is there.

    One verdict, with the evidence. The log against its own bookkeeping; the log against Kafka,
    record by record, as far back as Kafka has them; each read model against a replay of the log.
    Changes nothing; what runs goes
    on. It reads everything once: on a large log, take it for a night, or one part at a time.

    \b
    $ pipeline verify
    $ pipeline verify --only log --only kafka
    $ pipeline verify orders positions --only read-models
    """
    settings = settings_of(ctx)
    chosen = read_models(settings, names or [])
    found: list[Evidence] = []
    with database_of(settings, "verify") as engine, Gauge("verifying", unit="rows") as gauge:
        check_schema(engine)

        def observe(what: str, done: int, total: int) -> None:
            gauge.show(done, total, what)

        proofs: dict[_Proof, Callable[[], Iterable[Evidence]]] = {
            _Proof.LOG: lambda: verify_log(engine, observe),
            _Proof.KAFKA: lambda: verify_kafka(engine, settings, observe),
            _Proof.READ_MODELS: lambda: (
                *verify_declared(engine, catalogue.load(settings.read_models)),
                *verify_read_models(
                    engine, chosen, rejected_max=settings.dead_letter_budget, observe=observe
                ),
            ),
        }
        for proof, prove in proofs.items():
            if proof in (only or proofs):
                evidence = list(prove())
                found += evidence
                if not as_json:
                    _show(evidence)
    wrong = [one for one in found if one.wrong]
    unexamined = [evidence for evidence in found if not evidence.is_complete]
    if as_json:
        emit({"ok": not wrong and not unexamined, "evidence": found})
    else:
        say(_verdict(wrong, unexamined))
    if wrong or unexamined:
        raise typer.Exit(ExitCode.FOUND)


def _show(evidence: Iterable[Evidence]) -> None:
    """What holds in one line for all its subjects; what does not, one by one."""
    for (part, claim), same in groupby(evidence, key=lambda one: (one.part, one.claim)):
        of = list(same)
        wrong = [one for one in of if one.wrong]
        examined = sum(one.examined for one in of)
        sign = "✗" if wrong else "✓" if all(one.is_complete for one in of) else "?"
        typer.echo(f"{sign} {part}: {claim}: {examined:,} examined")
        for one in of:
            where = f" at {offsets(one.intervals)}" if one.intervals else ""
            if one.problem:
                wrong_here = f"{one.wrong:,} wrong{where}" if one.wrong else "not examined"
                line = f"    {one.subject}: {wrong_here}: {one.problem.what}"
                typer.echo(printable(f"{line} → {one.problem.fix}"))
            elif one.note:
                typer.echo(printable(f"    {one.subject}: {one.note}"))


def _verdict(wrong: Sequence[Evidence], unexamined: Sequence[Evidence]) -> str:
    if not wrong and unexamined:
        return "What was examined holds. Not everything could be examined: see above."
    if not wrong:
        return "Everything that was examined holds."
    claims = len({(one.part, one.claim) for one in wrong})
    return f"{claims} of the claims {'does' if claims == 1 else 'do'} not hold."
