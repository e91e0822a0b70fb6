"""Who takes which range next."""

from pipeline.partitions import NextOffset, OffsetRange, Partition
from pipeline.projection.checkpoints import ProjectorProgress
from pipeline.projection.loop import Work, plan

ONE, TWO = Partition("Notifications", 0), Partition("Notifications", 1)


def progress(
    name: str, at: int, *, partition=ONE, first: int = 0, end: int = 100
) -> ProjectorProgress:
    return ProjectorProgress(name, partition, NextOffset(at), NextOffset(first), NextOffset(end))


def work(partition, first: int, end: int, *names: str) -> Work:
    return Work(partition, OffsetRange(NextOffset(first), NextOffset(end)), names)


def test_projectors_at_the_same_offsets_share_a_pass():
    assert plan([progress("a", 0), progress("b", 0)], 30) == [work(ONE, 0, 30, "a", "b")]


def test_a_lagging_projector_catches_up_to_the_others_and_no_further():
    planned = plan([progress("late", 10), progress("a", 25), progress("b", 25)], 30)

    assert planned == [work(ONE, 10, 25, "late"), work(ONE, 25, 55, "a", "b")]


def test_no_projector_goes_beyond_the_end_of_the_log():
    assert plan([progress("a", 90)], 30) == [work(ONE, 90, 100, "a")]
    assert plan([progress("a", 100)], 30) == []


def test_every_partition_has_its_range():
    planned = plan([progress("a", 0), progress("a", 7, partition=TWO, end=9)], 5)

    assert planned == [work(ONE, 0, 5, "a"), work(TWO, 7, 9, "a")]


def test_nothing_is_projected_below_the_beginning_of_the_log():
    planned = plan([progress("a", 0, first=5000, end=5100)], 30)

    assert planned == [work(ONE, 0, 5030, "a")]
    assert progress("a", 0, first=5000, end=5100).lag == 100


def test_a_projector_that_has_caught_up_joins_the_others():
    after = work(ONE, 25, 55, "a")

    assert after.joined_by(work(ONE, 10, 25, "late")) == work(ONE, 25, 55, "a", "late")
    assert after.joined_by(work(ONE, 10, 24, "later")) == after
    assert after.joined_by(work(TWO, 10, 25, "elsewhere")) == after
    assert after.joined_by(None) == after
