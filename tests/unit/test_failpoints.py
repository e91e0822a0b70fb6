"""Fail points do what a test asks for, and nothing unless they are enabled."""

import os
import signal
import socket
import subprocess
import sys
import time
from typing import get_args

import pytest

from pipeline import failpoints
from pipeline.errors import ConfigurationError, InvariantError, PoisonRecordError, TransientError

ENABLED = {"PIPELINE_ENABLE_FAILPOINTS": "1"}
PASS_ONCE = """
import os
from pipeline import failpoints
failpoints.arm(os.environ)
failpoints.reach("after_poll")
print("passed", flush=True)
"""


@pytest.fixture(autouse=True)
def disarmed(monkeypatch):
    monkeypatch.setattr(failpoints, "_armed", None)


def arm(spec: str) -> None:
    failpoints.arm({**ENABLED, "PIPELINE_FAILPOINT": spec})


def run(spec: str, **environment) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", PASS_ONCE],
        env={**os.environ, "PIPELINE_FAILPOINT": spec, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("enabling", [{}, {"PIPELINE_ENABLE_FAILPOINTS": "0"},
                                      {"PIPELINE_ENABLE_FAILPOINTS": "true"}])  # fmt: skip
def test_a_fail_point_is_refused_unless_fail_points_are_enabled(enabling):
    with pytest.raises(ConfigurationError, match="for tests only"):
        failpoints.arm({"PIPELINE_FAILPOINT": "after_poll:kill", **enabling})

    failpoints.reach("after_poll")


def test_enabling_fail_points_arms_none():
    failpoints.arm(ENABLED)

    failpoints.reach("after_poll")


@pytest.mark.parametrize(
    "spec",
    [
        "", "kill", "after_poll", "after_poll:", "nowhere:kill", "after_poll@x:kill",
        "after_poll@0:kill", "after_poll:explode", "after_poll:sleep", "after_poll:sleep:long",
        "after_poll:raise", "after_poll:raise:1", "after_poll:kill:9",
    ],
)  # fmt: skip
def test_an_unknown_fail_point_is_refused_at_start(spec):
    with pytest.raises(ConfigurationError, match="PIPELINE_FAILPOINT"):
        arm(spec)


@pytest.mark.parametrize("failpoint", get_args(failpoints.Place))
def test_every_fail_point_can_be_armed_alone(failpoint):
    arm(f"{failpoint}:raise:40001")

    for other in get_args(failpoints.Place):
        if other != failpoint:
            failpoints.reach(other)
    with pytest.raises(TransientError):
        failpoints.reach(failpoint)


@pytest.mark.parametrize(
    ("sqlstate", "branch"),
    [("40001", TransientError), ("22P02", PoisonRecordError), ("XX000", InvariantError)],
)
def test_raise_is_postgresqls_error_of_that_code(sqlstate, branch):
    arm(f"before_commit:raise:{sqlstate}")

    with pytest.raises(branch, match=f"fail point before_commit: {sqlstate}"):
        failpoints.reach("before_commit")


def test_only_the_chosen_pass_fails():
    arm("after_copy@3:raise:40001")

    failpoints.reach("after_copy")
    failpoints.reach("after_copy")
    with pytest.raises(TransientError):
        failpoints.reach("after_copy")
    failpoints.reach("after_copy")


def test_sleep_delays_the_step():
    arm("after_begin:sleep:0.05")
    began = time.monotonic()

    failpoints.reach("after_begin")

    assert time.monotonic() - began >= 0.05


def test_disconnect_closes_the_connection_of_the_step():
    arm("mid_copy:disconnect")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        failpoints.reach("mid_copy", connection_fd=ours.fileno())

        assert theirs.recv(1) == b""


def test_disconnect_where_there_is_no_connection_is_refused():
    arm("after_poll:disconnect")

    with pytest.raises(ConfigurationError, match="cannot be done at after_poll"):
        failpoints.reach("after_poll")


def test_kill_is_sigkill():
    process = run("after_poll:kill", **ENABLED)
    output, _ = process.communicate(timeout=30)

    assert (process.returncode, output) == (-signal.SIGKILL, "")


def test_stop_stops_the_process_until_it_is_continued():
    process = run("after_poll:stop", **ENABLED)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)

    process.send_signal(signal.SIGCONT)

    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "passed\n")


def test_a_process_that_is_not_enabled_ends_at_once():
    process = run("after_poll:kill", PIPELINE_ENABLE_FAILPOINTS="")
    output, complaint = process.communicate(timeout=30)

    assert process.returncode == 1
    assert output == ""
    assert "for tests only" in complaint
