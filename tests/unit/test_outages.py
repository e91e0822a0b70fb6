"""How long an unavailable server is waited for, and what is logged; on a clock of our own."""

from datetime import timedelta
from math import ceil
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from pipeline import outages
from pipeline.backoff import LOGIN_RETRY_S, SERVER
from pipeline.errors import (
    ConfigurationError,
    HangingServerError,
    PipelineError,
    Server,
    TransientError,
)
from pipeline.ingest.monitor import BestEffort
from pipeline.outages import (
    CAUSES_S_MIN,
    GRACE_S,
    REPORTS_S,
    UNAVAILABLE_S_MAX,
    OutageLog,
    OutagePolicy,
)

HOUR_S, DAY_S = 3600.0, 86_400.0
STEP_S = 5.0
AWAY = TransientError("PostgreSQL at db:5432 refuses connections", address="db:5432/upvest")
SLOW = TransientError("PostgreSQL at db:5432 did not answer in time")
KAFKA_AWAY = TransientError(
    "Kafka at broker-2:9092 refuses connections",
    server=Server.KAFKA,
    address="broker-1:9092,broker-2:9092",
)
REFUSED = ConfigurationError("PostgreSQL at db:5432 refused the login", is_login=True)
NO_RIGHT = ConfigurationError("PostgreSQL at db:5432 refuses a right")
REFUSALS = [REFUSED, NO_RIGHT]


class Clock:
    """What ``time.monotonic`` returns; it does not move by itself."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(outages, "time", clock)
    return clock


def policy(*, waits_forever=True, has_run=True, time_left=lambda: None, outages=None):
    made = OutagePolicy(waits_forever=waits_forever, time_left=time_left, outages=outages)
    if has_run:
        made.on_success(*Server)
    return made


def outage(clock, waiting, *errors, lasts_s, step_s=STEP_S):
    """The lines of an outage with these errors in turn, with the seconds since it began."""
    begun, lines = clock.now, []
    for number in range(ceil(lasts_s / step_s)):
        with capture_logs() as logged:
            waiting.on_error(errors[number % len(errors)])
        lines += [(clock.now - begun, line) for line in logged]
        clock.now += step_s
    return lines


# ------------------------------------------------------------------------------- what is logged


@pytest.mark.parametrize("error", [AWAY, SLOW, REFUSED, NO_RIGHT], ids=str)
def test_a_cause_is_logged_at_once_and_named(clock, error):
    [(at, line)] = outage(clock, policy(), error, lasts_s=STEP_S)

    assert at == 0
    assert line["reason"] == str(error)
    assert line["event"] == ("access_refused" if error in REFUSALS else "server_unavailable")
    assert line["log_level"] == ("error" if error in REFUSALS else "warning")
    assert "unavailable_s" not in line


def test_a_new_cause_of_the_same_outage_is_logged_at_once(clock):
    waiting = policy()
    outage(clock, waiting, AWAY, lasts_s=30)

    [(at, line)] = outage(clock, waiting, SLOW, lasts_s=10)

    assert (at, line["reason"]) == (0, str(SLOW))


def test_causes_that_follow_within_seconds_share_a_line_unless_one_lasts(clock):
    """A server that is stopped ends sessions, then refuses them, then refuses connections."""
    stopping = [TransientError(f"PostgreSQL at db:5432 {what}") for what in ("ends", "refuses")]

    lines = outage(clock, policy(), *stopping, AWAY, AWAY, AWAY, AWAY, lasts_s=12, step_s=2)
    lines += outage(clock, policy(), AWAY, REFUSED, lasts_s=2, step_s=1)

    assert [line["reason"] for _, line in lines[:2]] == [str(stopping[0]), str(AWAY)]
    assert lines[1][0] >= CAUSES_S_MIN
    assert [line["reason"] for _, line in lines[2:]] == [str(AWAY), str(REFUSED)]


def test_a_server_that_hangs_is_logged_at_once(clock):
    """The cause comes once: connections that are tried afterwards time out."""
    hangs = HangingServerError("PostgreSQL at db:5432 hangs")

    lines = outage(clock, policy(), SLOW, hangs, SLOW, lasts_s=3, step_s=1)

    assert [line["reason"] for _, line in lines] == [str(SLOW), str(hangs)]


# ------------------------------------------------------------------ two servers, several loops


def test_an_outage_of_one_server_does_not_end_when_the_other_answers(clock):
    waiting = policy()
    outage(clock, waiting, KAFKA_AWAY, lasts_s=STEP_S)

    with capture_logs() as logged:
        waiting.on_success(Server.POSTGRESQL)
    again = outage(clock, waiting, KAFKA_AWAY, lasts_s=30)
    with capture_logs() as ended:
        waiting.on_success(Server.KAFKA)

    assert logged == again == []
    assert [(line["event"], line["server"], line["unavailable_s"]) for line in ended] == [
        ("server_available", "Kafka at broker-1:9092,broker-2:9092", 35.0)
    ]


def test_a_round_of_checks_ends_an_outage_only_if_nothing_in_it_failed(clock):
    """A heartbeat that fails on Kafka is followed by queries of the database that succeed."""
    waiting = policy()
    checks = BestEffort(cast("Any", None), waiting)

    def fail():
        raise KAFKA_AWAY

    with capture_logs() as lines:
        for _ in range(3):
            checks.begin_round()
            checks.run(fail)
            checks.run(lambda: None)
            checks.end_round()
            clock.now += STEP_S
        during = [line["event"] for line in lines]
        checks.begin_round()
        checks.run(lambda: None)
        checks.end_round()

    assert during == ["server_unavailable"]
    assert [line["event"] for line in lines] == ["server_unavailable", "server_available"]


def test_both_lines_of_an_outage_name_the_server_in_the_same_words(clock):
    waiting = policy()
    with capture_logs() as logged:
        for error in (AWAY, KAFKA_AWAY, REFUSED):
            waiting.on_error(error)
        waiting.on_success(*Server)

    names = [(line["event"], line["server"]) for line in logged]
    assert names == [
        ("server_unavailable", "PostgreSQL at db:5432/upvest"),
        ("server_unavailable", "Kafka at broker-1:9092,broker-2:9092"),
        ("access_refused", "PostgreSQL at db:5432/upvest"),
        ("server_available", "PostgreSQL at db:5432/upvest"),
        ("server_available", "Kafka at broker-1:9092,broker-2:9092"),
    ]


def test_the_loops_of_a_process_log_an_outage_once_and_it_ends_when_all_are_through(clock):
    shared = OutageLog()
    ingest, projection, rebuild = (policy(outages=shared) for _ in range(3))

    begun = [
        line
        for loop in (ingest, projection, rebuild)
        for _, line in outage(clock, loop, AWAY, SLOW, lasts_s=4, step_s=2)
    ]
    assert shared.unavailable == {Server.POSTGRESQL}
    with capture_logs() as ended:
        for loop in (ingest, projection, rebuild, rebuild):
            loop.on_success(Server.POSTGRESQL)

    assert [line["reason"] for line in begun] == [str(AWAY), str(SLOW)]
    assert [line["event"] for line in ended] == ["server_available"]
    assert shared.unavailable == frozenset()


def test_a_loop_that_succeeds_does_not_end_the_grace_period_of_another(clock):
    shared = OutageLog()
    ingest, projection = policy(outages=shared), policy(outages=shared)

    for _ in range(round(GRACE_S / STEP_S) + 1):
        outage(clock, ingest, NO_RIGHT, lasts_s=STEP_S)
        projection.on_success(Server.POSTGRESQL)
    with pytest.raises(ConfigurationError):
        ingest.on_error(NO_RIGHT)


@pytest.mark.parametrize("errors", [(AWAY,), (AWAY, SLOW), (AWAY, SLOW, AWAY)], ids=len)
def test_a_long_outage_is_logged_again_at_growing_intervals(clock, errors):
    lines = outage(clock, policy(), *errors, lasts_s=4 * HOUR_S)

    again = [(at, line) for at, line in lines if "unavailable_s" in line]
    expected = [*REPORTS_S, 2 * HOUR_S, 3 * HOUR_S]
    assert [at for at, _ in again] == pytest.approx(expected, abs=STEP_S)
    assert [line["unavailable_s"] for _, line in again] == pytest.approx(expected, abs=STEP_S)
    assert len(lines) == len(again) + len(set(errors))


def test_three_days_are_a_line_per_hour(clock):
    lines = outage(clock, policy(), AWAY, lasts_s=3 * DAY_S, step_s=10)

    assert len(lines) == 1 + len(REPORTS_S) + 3 * 24 - 2
    assert lines[-1][1]["unavailable_s"] == 71 * HOUR_S


def test_a_cause_that_counts_seconds_is_one_cause(clock):
    counting = [TransientError(f"db:5432 was silent for {seconds} s") for seconds in range(5, 60)]

    assert len(outage(clock, policy(), *counting, lasts_s=50)) == 1


def test_the_end_of_an_outage_is_logged_with_its_length_and_the_next_one_is_new(clock):
    waiting = policy()
    outage(clock, waiting, AWAY, lasts_s=90)

    with capture_logs() as ended:
        waiting.on_success(*Server)
        waiting.on_success(*Server)
    clock.now += 1
    again = outage(clock, waiting, AWAY, lasts_s=STEP_S)

    assert [(line["event"], line["unavailable_s"]) for line in ended] == [("server_available", 90)]
    assert [(at, "unavailable_s" in line) for at, line in again] == [(0, False)]


@pytest.mark.parametrize(
    ("left", "words"),
    [
        (None, "Kafka keeps the events for the length of its retention"),
        (timedelta(hours=51.5), "may delete the oldest event that was not read in about 2.1 d"),
        (timedelta(days=90), "in about 90 d"),
        (timedelta(minutes=6), "in about 6 min"),
        (timedelta(seconds=50), "in about 50 s"),
        (timedelta(0), "is over, so Kafka may have deleted events"),
        (timedelta(hours=-3), "is over, so Kafka may have deleted events"),
    ],
    ids=str,
)
def test_a_long_outage_reports_the_time_left_before_retention(clock, left, words):
    requested_at = []

    def time_left():
        requested_at.append(clock.now)
        return left

    lines = outage(clock, policy(time_left=time_left), AWAY, lasts_s=65)

    assert [at for at, _ in lines] == [0, 60]
    assert "Kafka keeps the events for the length of its retention" in lines[0][1]["effect"]
    assert words in lines[1][1]["effect"]
    assert len(requested_at) == 1, "Kafka is requested_at only for a line that is written"


# ---------------------------------------------------------------------------- how often it is tried


def test_waits_double_up_to_a_limit_and_differ_between_processes(clock):
    waiting = policy()

    pauses = [waiting.on_error(AWAY) for _ in range(2000)]

    for number, pause in enumerate(pauses[:7]):
        assert SERVER.first_s * 2**number / 2 <= pause <= SERVER.first_s * 2**number
    assert all(SERVER.longest_s / 2 <= pause <= SERVER.longest_s for pause in pauses[7:])
    assert len(set(pauses[7:])) > 100
    waiting.on_success(*Server)
    assert waiting.on_error(AWAY) <= SERVER.first_s


def test_a_refused_login_is_tried_four_times_a_minute_at_most(clock):
    waiting = policy()

    assert [waiting.on_error(REFUSED) for _ in range(3)] == [LOGIN_RETRY_S] * 3
    assert 60 / LOGIN_RETRY_S <= 4
    assert waiting.on_error(NO_RIGHT) < LOGIN_RETRY_S, "a missing right locks no account"


# -------------------------------------------------------------------------- when it is given up


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_a_refusal_at_the_start_ends_the_process_at_once(clock, refusal):
    with pytest.raises(ConfigurationError) as raised, capture_logs() as logged:
        policy(has_run=False).on_error(refusal)

    assert raised.value is refusal
    assert logged == []


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
@pytest.mark.parametrize("between", [None, SLOW], ids=["alone", "and time-outs in between"])
def test_a_refusal_while_running_ends_the_process_after_the_grace_period(clock, refusal, between):
    waiting, lines = policy(), []
    errors = [refusal, between or refusal]

    while clock.now < 1000 + GRACE_S:
        lines += outage(clock, waiting, *errors, lasts_s=2 * STEP_S)
    clock.now += STEP_S
    with pytest.raises(ConfigurationError) as raised:
        waiting.on_error(refusal)

    assert raised.value is refusal
    first = next(line for _, line in lines if line["event"] == "access_refused")
    assert f"exit with 78 in {GRACE_S:.0f} s" in first["effect"]
    assert len(lines) <= 2 * len({*errors})


def test_a_refusal_that_ends_in_time_is_forgotten(clock):
    waiting = policy()

    for _ in range(10):
        outage(clock, waiting, REFUSED, lasts_s=GRACE_S - STEP_S)
        waiting.on_success(*Server)


def test_a_refusal_before_a_long_outage_is_forgotten(clock):
    """A server that is restarted may refuse for a moment before and after."""
    waiting = policy()
    outage(clock, waiting, REFUSED, lasts_s=STEP_S)
    outage(clock, waiting, AWAY, lasts_s=HOUR_S)

    [(_, line)] = outage(clock, waiting, REFUSED, lasts_s=STEP_S)

    assert line["event"] == "access_refused"
    assert f"exit with 78 in {GRACE_S:.0f} s" in line["effect"]


@pytest.mark.parametrize("has_run", [True, False])
def test_a_command_that_ends_by_itself_waits_for_a_minute(clock, has_run):
    waiting = policy(waits_forever=False, has_run=has_run)
    outage(clock, waiting, AWAY, lasts_s=UNAVAILABLE_S_MAX)

    clock.now += 0.1
    with pytest.raises(TransientError) as raised:
        waiting.on_error(SLOW)

    assert raised.value is SLOW


# ------------------------------------------------------------------------------ whatever happens

ATTEMPTS = st.lists(
    st.tuples(
        st.sampled_from([AWAY, SLOW, REFUSED, NO_RIGHT, None]),
        st.floats(0.0, 20.0) | st.floats(0.0, 4000.0),
    ),
    max_size=60,
)


@given(attempts=ATTEMPTS, waits_forever=st.booleans())
def test_every_outage_is_logged_rarely_and_ends_in_time(attempts, waits_forever):
    """Some errors or successes (None), each with the seconds until the next."""
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(outages, "time", clock)
        waiting = policy(waits_forever=waits_forever)
        since: float | None = None
        causes: set[PipelineError] = set()
        lines: list[object] = []
        logged_at = 0.0

        for error, then_s in attempts:
            clock.now += then_s
            with capture_logs() as logged:
                if error is None:
                    waiting.on_success(*Server)
                    since, causes, lines = None, set(), []
                    continue
                since = clock.now if since is None else since
                lasts_s = clock.now - since
                try:
                    pause = waiting.on_error(error)
                except ConfigurationError:
                    assert lasts_s > min(GRACE_S, UNAVAILABLE_S_MAX)
                    return
                except TransientError:
                    assert not waits_forever
                    assert lasts_s > UNAVAILABLE_S_MAX
                    return
            assert waits_forever or lasts_s <= UNAVAILABLE_S_MAX
            assert 0 < pause <= max(SERVER.longest_s, LOGIN_RETRY_S)
            lines += logged
            if logged:
                causes.add(error)
                logged_at = clock.now
            assert error in causes or clock.now - logged_at < CAUSES_S_MIN, "a new cause is logged"
            assert error in causes or error not in REFUSALS, "a refusal is logged at once"
            again = len(REPORTS_S) + lasts_s / REPORTS_S[-1]
            # A refusal after a while is a new one, whose end is announced.
            assert len(lines) <= len(causes) + again + lasts_s / GRACE_S
