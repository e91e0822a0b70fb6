"""Finding events in the log, and following it: `pipeline events`."""

import json
import signal
from datetime import UTC, datetime, timedelta

import pytest

from tests.commands import Commands, InProcess
from tests.given import TOPIC, event, order_event, some_id

BIG = "123456789012345678901234567890.123456789"


@pytest.fixture
def find(monkeypatch, capsys, given):
    run = InProcess(monkeypatch, capsys)
    commands = Commands(database_url=given.database.dsn)

    def found(*arguments):
        result = run(commands, "events", *arguments)
        assert result.code == 0, result.err
        return result

    return found


def types(result):
    return [event["event_type"] for event in result.lines]


def test_an_entitys_timeline_is_in_the_order_of_its_events_times(given, find):
    given([order_event("FILLED", at=30)], partition=0)
    given([order_event("NEW", at=10), order_event("NEW", at=11, order="other")], partition=1)
    given([order_event("PROCESSING", at=20)], partition=2)

    result = find(some_id("an order"), "--json")

    assert types(result) == ["ORDER.NEW", "ORDER.PROCESSING", "ORDER.FILLED"]
    assert [event["status"] for event in result.lines] == ["NEW", "PROCESSING", "FILLED"]


def test_an_event_is_found_by_its_own_id_with_its_repeats(given, find):
    named_event = order_event("NEW", at=1, name="the one")
    given([named_event, order_event("NEW", at=2, order="other"), named_event])

    result = find(some_id("the one"), "--json")

    assert [(found["offset"], found["repeat_of"]) for found in result.lines] == [(0, None), (2, 0)]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("ORDER.NEW", ["ORDER.NEW"]),
        ("ORDER", ["ORDER.NEW", "ORDER.FILLED"]),
        ("ORDER.*", ["ORDER.NEW", "ORDER.FILLED"]),
        ("ORDER_CANCELLATION", ["ORDER_CANCELLATION.REJECTED"]),
        ("%", []),
    ],
)
def test_types_are_found_alone_and_by_category(given, find, wanted, found):
    given([order_event("NEW", at=1), event("ORDER_CANCELLATION.REJECTED", {"id": some_id("c")})])
    given([order_event("FILLED", at=2)])

    assert types(find("--type", wanted, "--json")) == found


def test_the_newest_events_are_shown_in_ascending_order(given, find):
    for number in range(6):
        given([order_event("NEW", at=number, order=str(number))], partition=number % 3)

    result = find("-n", "4", "--json")

    assert [event["entity_id"] for event in result.lines] == [some_id(str(n)) for n in (2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("place", "offsets"),
    [
        (TOPIC, {0, 1, 2, 3, 4}),
        (f"{TOPIC}:0", {0, 1, 2, 3, 4}),
        (f"{TOPIC}:0:3", {3}),
        (f"{TOPIC}:0:1-3", {1, 2, 3}),
        (f"{TOPIC}:0:4-99", {4}),
        (f"{TOPIC}:1", set()),
        ("Nonsense", set()),
    ],
)
def test_a_search_is_limited_to_a_topic_a_partition_or_offsets(given, find, place, offsets):
    given([order_event("NEW", at=n) for n in range(5)])

    result = find("--at", place, "--json")

    assert {event["offset"] for event in result.lines} == offsets


def test_since_and_until_are_times_of_ingestion(given, find):
    given([order_event("NEW", at=1)])
    between = datetime.now(UTC)
    given([order_event("FILLED", at=2)])

    later = find("--since", between.isoformat(), "--json")
    earlier = find("--until", between.isoformat(), "--json")
    recent = find("--since", "5m", "--json")
    nothing = find("--since", (between + timedelta(hours=1)).isoformat())

    assert types(later) == ["ORDER.FILLED"]
    assert types(earlier) == ["ORDER.NEW"]
    assert types(recent) == ["ORDER.NEW", "ORDER.FILLED"]
    assert nothing.out == ""
    assert nothing.err.startswith("No events were found")


def test_a_search_without_an_index_covers_one_day_by_default(given, find):
    given([b"{", order_event("NEW", at=1)])
    given.execute(
        "SET LOCAL session_replication_role = replica; "
        "UPDATE pipeline.events SET ingested_at = ingested_at - interval '2 days'"
    )

    assert find("--bad").out == ""
    assert "No events were found since" in find("--bad").err
    assert find("--bad", "--since", "3d", "--json").lines[0]["problem"] == "not JSON"
    assert types(find("--at", f"{TOPIC}:0:1", "--type", "ORDER", "--json")) == ["ORDER.NEW"]


def test_payloads_are_shown_unchanged_and_only_on_request(given, find):
    given([order_event("NEW", at=1, cash_amount=BIG), b'{"id": 1', None])

    without = find("--json")
    with_content = find("--json", "--payload")
    readable = find("--payload")

    assert "cash_amount" not in without.out
    assert without.lines[0].keys().isdisjoint({"payload", "raw_base64", "key_base64", "headers"})
    good, bad, tombstone = with_content.lines
    assert good["payload"]["object"]["cash_amount"] == BIG
    assert (bad["payload"], bad["raw_base64"]) == (None, "eyJpZCI6IDE=")
    assert (tombstone["payload"], tombstone["raw_base64"]) == (None, None)
    assert BIG in readable.out
    assert "tombstone" in readable.out


def test_numbers_of_a_payload_are_not_rounded_on_their_way_out(given, find):
    raw = json.dumps(order_event("NEW", at=1, cash_amount="N")).replace('"N"', BIG).encode()
    given([raw])

    assert f'"cash_amount": {BIG}' in find("--json", "--payload").out


def test_an_event_cannot_control_the_terminal(given, find):
    given([event("EVIL\x1b[31m\u202e", {"id": some_id("x"), "status": "\x07\n"})])

    result = find("--payload")

    assert "EVIL\\x1b[31m\\u202e" in result.out
    assert "\\u0007\\n" in result.out
    assert not {"\x1b", "\x07", "\u202e"} & set(result.out)


def test_following_shows_each_event_once_as_it_arrives(given):
    given([order_event("NEW", at=1, order="before")])
    commands = Commands(database_url=given.database.dsn)

    with commands.started("events", "--follow", "--json", "--type", "ORDER", "-n", "4") as follow:
        follow.until("Following")
        given([order_event("NEW", at=n, order=str(n)) for n in range(2)], partition=0)
        given([event("OTHER.NEW", {"id": some_id("x")})], partition=0)
        given([order_event("NEW", at=n, order=str(n)) for n in range(2, 4)], partition=5)
        code = follow.wait()

    assert code == 0
    found = [json.loads(line)["entity_id"] for line in follow.out]
    assert sorted(found) == sorted(some_id(str(n)) for n in range(4))


def test_following_from_a_time_begins_there_and_ends_with_ctrl_c(given):
    given([order_event("NEW", at=1)])
    commands = Commands(database_url=given.database.dsn)

    with commands.started("events", "--follow", "--since", "1h") as follow:
        follow.until("ORDER.NEW")
        follow.send(signal.SIGINT)
        code = follow.wait()

    assert code == 0
    assert "Traceback" not in "".join(follow.err)
