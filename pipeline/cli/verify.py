"""Proves the guarantees on the data: verify."""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.app import migrated_database_of, settings_of
from pipeline.cli.arguments import read_models
from pipeline.cli.command import AsJson, Servers, command
from pipeline.cli.output import Gauge, emit, say
from pipeline.cli.rewind import offsets
from pipeline.errors import ExitCode
from pipeline.printable import printable

if TYPE_CHECKING:
    from pipeline.health.verify import Evidence


class _Proof(StrEnum):
    LOG = "log"
    KAFKA = "kafka"
    READ_MODELS = "read-models"


@command(
    {
        ExitCode.DONE: "everything was examined, and every claim holds",
        ExitCode.FOUND: "a claim does not hold, or could not be examined",
        ExitCode.FENCED: "a rebuild of a read model is running",
    },
    servers=Servers.BOTH,
)
def verify(
    ctx: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME...", help="Verify only these read models."),
    ] = None,
    only: Annotated[
        list[_Proof] | None,
        typer.Option(help="Run only this comparison; you can give this option several times."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Verify the guarantees on the data.

    It compares the log with its own bookkeeping; the log with Kafka, record by record, for all
    records that Kafka still has; and each read model with a replay of the log. It shows each claim
    with its evidence, then whether all claims hold. It changes nothing, and workers may run
    meanwhile. It reads all data once; if the log is large, run it at night, or run one comparison
    at a time with --only.

    \b
    $ pipeline verify
    $ pipeline verify --only log --only kafka
    $ pipeline verify orders positions --only read-models
    """
    from pipeline import catalogue
    from pipeline.health.verify import (
        verify_declared,
        verify_kafka,
        verify_log,
        verify_read_models,
    )

    settings = settings_of(ctx)
    chosen = read_models(settings, names or [])
    found: list[Evidence] = []
    with (
        migrated_database_of(settings, "verify") as engine,
        Gauge("verifying", unit="rows") as gauge,
    ):

        def observe(what: str, done: int, total: int) -> None:
            gauge.show(done, total, what)

        proofs: dict[_Proof, Callable[[], Iterable[Evidence]]] = {
            _Proof.LOG: lambda: verify_log(engine, observe),
            _Proof.KAFKA: lambda: verify_kafka(engine, settings, observe),
            _Proof.READ_MODELS: lambda: (
                *(() if names else verify_declared(engine, catalogue.load(settings.read_models))),
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
    wrong = [evidence for evidence in found if evidence.wrong]
    unexamined = [evidence for evidence in found if not evidence.is_complete]
    if as_json:
        emit({"ok": not wrong and not unexamined, "evidence": found})
    else:
        say(_verdict(wrong, unexamined))
    if wrong or unexamined:
        raise typer.Exit(ExitCode.FOUND)


def _show(found: "Iterable[Evidence]") -> None:
    """One line per claim that holds; for others, a line per subject that violates it."""
    for (part, claim), same in groupby(found, key=lambda evidence: (evidence.part, evidence.claim)):
        of_claim = list(same)
        examined = sum(evidence.examined for evidence in of_claim)
        is_complete = all(evidence.is_complete for evidence in of_claim)
        is_wrong = any(evidence.wrong for evidence in of_claim)
        sign = "✗" if is_wrong else "✓" if is_complete else "?"
        typer.echo(f"{sign} {part}: {claim}: {examined:,} examined")
        for evidence in of_claim:
            if evidence.problem:
                where = f" at {offsets(evidence.intervals)}" if evidence.intervals else ""
                state = f"{evidence.wrong:,} wrong{where}" if evidence.wrong else "not examined"
                line = f"    {evidence.subject}: {state}: {evidence.problem.what}"
                typer.echo(printable(f"{line} → {evidence.problem.fix}"))
            elif evidence.note:
                typer.echo(printable(f"    {evidence.subject}: {evidence.note}"))


def _verdict(wrong: "Sequence[Evidence]", unexamined: "Sequence[Evidence]") -> str:
    if not wrong and unexamined:
        return "All examined claims hold. Some claims could not be examined; see above."
    if not wrong:
        return "Every claim holds."
    claims = len({(evidence.part, evidence.claim) for evidence in wrong})
    return f"{claims} {'claim does' if claims == 1 else 'claims do'} not hold."
