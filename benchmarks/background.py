"""A process that runs during a measurement."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Running:
    """A running process."""

    process: subprocess.Popen[str]

    def cpu_s(self) -> float:
        """User and system time of the process so far."""
        # The second field, the name in parentheses, may hold spaces.
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """SIGKILL: the process finishes nothing."""
        self.process.kill()
        self.process.wait()


@contextmanager
def background(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[Running]:
    """Run a command for the length of the block, then end it as an operator does.

    Raises:
        RuntimeError: It ended before the block; the message has its last lines.
    """
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=output, stderr=output, text=True
        )
        running = Running(process)
        try:
            yield running
            if process.poll() not in (None, -signal.SIGKILL):
                output.seek(0)
                last = "".join(output.readlines()[-20:])
                raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{last}")
        finally:
            process.terminate()
            process.wait()
