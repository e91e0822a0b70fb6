import orjson
import pytest

from pipeline.sandbox.simulator import Simulation
from pipeline.sandbox.simulator.records import encode, murmur2, partition_of


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_keys_are_hashed_as_kafkas_own_client_hashes_them(key, hashed):
    assert murmur2(key) == hashed % 2**32


def test_events_of_one_key_share_a_partition_and_all_partitions_are_used():
    records = list(Simulation(2, events=3_000, partitions=5))

    assert {record.partition for record in records} == set(range(5))
    assert all(record.partition == partition_of(record.key, 5) for record in records)


def test_json_is_compact_and_escaped_as_go_writes_it():
    assert encode({"name": "Foods & <Grain>"}) == rb'{"name":"Foods \u0026 \u003cGrain\u003e"}'
    assert encode({"name": "Zoë"}) == '{"name":"Zoë"}'.encode()


def test_some_records_have_headers():
    records = list(Simulation(2, events=3_000))
    with_headers = [record for record in records if record.headers]

    assert 0.2 < len(with_headers) / len(records) < 0.3
    assert any(value is None for record in with_headers for _, value in record.headers)


def test_price_ticks_are_optional_and_change_no_event():
    without = list(Simulation(2, events=3_000))
    both = list(Simulation(2, events=3_000, prices_topic="Prices"))
    ticks = [record for record in both if record.topic == "Prices"]

    assert [r.value for r in both if r.topic != "Prices"] == [r.value for r in without]
    assert 200 < len(ticks) < 400
    assert all("id" not in orjson.loads(tick.value or b"") for tick in ticks)
    assert {tick.partition for tick in ticks} == {None}
