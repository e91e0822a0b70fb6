"""What the ingest loop relies on in a log, for the real one and the fake one."""

import secrets

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.db import open_engine
from pipeline.errors import FencedError, InvariantError, PipelineError
from pipeline.partitions import Partition
from tests.contract.logs import FakeLog, RealLog, advance, owned_at, row_at

A, B = Partition("orders", 0), Partition("orders", 1)


@pytest.fixture(params=["fake", "real"])
def log(request):
    if request.param == "fake":
        return FakeLog()
    return request.getfixturevalue("real_log")


@pytest.fixture
def real_log(database):
    engine = open_engine(database.url, application="contract")
    yield RealLog(engine)
    engine.dispose()


def rows(partition, *offsets):
    return [row_at(partition, offset) for offset in offsets]


def test_a_claim_raises_the_epoch_and_returns_the_next_offset(log):
    log.begin(A, 7)

    assert [log.claim(A), log.claim(A)] == [owned_at(1, 7), owned_at(2, 7)]


def test_rows_and_next_offset_move_together(log):
    log.begin(A, 0)
    held = log.claim(A).epoch

    log.append(rows(A, 0, 1, 5), {A: advance(held, 0, 8)})

    assert log.offsets(A) == [0, 1, 5]
    assert log.find([A]) == {A: owned_at(held, 8)}


def test_a_batch_without_rows_moves_the_next_offset(log):
    log.begin(A, 0)
    held = log.claim(A).epoch

    log.append([], {A: advance(held, 0, 3)})

    assert log.offsets(A) == []
    assert log.find([A]) == {A: owned_at(held, 3)}


def test_an_older_epoch_writes_nothing(log):
    log.begin(A, 0)
    held = log.claim(A).epoch
    log.claim(A)

    with pytest.raises(FencedError) as refused:
        log.append(rows(A, 0), {A: advance(held, 0, 1)})

    assert (refused.value.partition, refused.value.held) == (A, held)
    assert log.offsets(A) == []
    assert log.find([A]) == {A: owned_at(held + 1, 0)}


def test_an_epoch_that_was_never_issued_writes_nothing(log):
    log.begin(A, 0)
    held = log.claim(A).epoch

    with pytest.raises(FencedError):
        log.append(rows(A, 0), {A: advance(held + 1, 0, 1)})

    assert log.offsets(A) == []


@pytest.mark.parametrize("expected", [0, 1, 3])
def test_another_next_offset_than_expected_writes_nothing(log, expected):
    log.begin(A, 0)
    held = log.claim(A).epoch
    log.append(rows(A, 0, 1), {A: advance(held, 0, 2)})

    with pytest.raises(FencedError):
        log.append(rows(A, 4), {A: advance(held, expected, 5)})

    assert log.offsets(A) == [0, 1]
    assert log.find([A]) == {A: owned_at(held, 2)}


def test_a_partition_that_was_never_begun_is_fenced(log):
    log.begin(A, 0)

    with pytest.raises(FencedError):
        log.append([], {B: advance(1, 0, 1)})


def test_one_fenced_partition_stops_the_whole_batch(log):
    log.begin(A, 0)
    log.begin(B, 0)
    held_a, held_b = log.claim(A).epoch, log.claim(B).epoch
    log.claim(B)

    with pytest.raises(FencedError) as refused:
        log.append(rows(A, 0, 1) + rows(B, 0), {A: advance(held_a, 0, 2), B: advance(held_b, 0, 1)})

    assert refused.value.partition == B
    assert (log.offsets(A), log.offsets(B)) == ([], [])
    assert log.find([A, B]) == {A: owned_at(held_a, 0), B: owned_at(held_b + 1, 0)}


def test_the_same_offset_twice_breaks_an_invariant(log):
    log.begin(A, 0)
    held = log.claim(A).epoch
    log.append(rows(A, 0), {A: advance(held, 0, 1)})

    with pytest.raises(InvariantError):
        log.append(rows(A, 0), {A: advance(held, 1, 2)})

    assert log.offsets(A) == [0]
    assert log.find([A]) == {A: owned_at(held, 1)}


# ------------------------------------------------------------------------------ any history at all

_number = st.integers(0, 4)
histories = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), st.sampled_from([0, 1])),
        st.tuples(
            st.just("append"),
            # For some of the partitions: how far held and expected are off, and how much is new.
            st.dictionaries(
                st.sampled_from([0, 1]),
                st.tuples(st.sampled_from([0, 0, 0, -1, 1]), st.sampled_from([0, 0, 0, -1, 2]),
                          st.lists(_number, min_size=1, max_size=3, unique=True)),
                min_size=1,
            ),
        ),
    ),
    max_size=12,
)  # fmt: skip


def answers_of(log, history, partitions) -> list[object]:
    """Every answer of a log to a history, errors included."""
    answers: list[object] = []
    for partition in partitions:
        log.begin(partition, 0)
    for kind, what in history:
        if kind == "claim":
            answers.append(log.claim(partitions[what]))
            continue
        batch, advances = [], {}
        for number, (off_epoch, off_expected, offsets) in what.items():
            partition = partitions[number]
            at = log.find([partition])[partition]
            first = at.next_offset
            batch += rows(partition, *(first + offset for offset in sorted(offsets)))
            advances[partition] = advance(
                at.epoch + off_epoch, first + off_expected, first + max(offsets) + 1
            )
        try:
            log.append(batch, advances)
        except PipelineError as error:
            answers.append((type(error), getattr(error, "partition", partitions[0]).number))
    ownerships = log.find(partitions)
    return [
        *answers,
        *((ownerships[partition], log.offsets(partition)) for partition in partitions),
    ]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(histories)
def test_both_logs_give_the_same_answers_to_any_history(real_log, history):
    topic = f"orders-{secrets.token_hex(4)}"
    partitions = [Partition(topic, 0), Partition(topic, 1)]

    assert answers_of(real_log, history, partitions) == answers_of(FakeLog(), history, partitions)
