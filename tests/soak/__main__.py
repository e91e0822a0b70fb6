"""Soak the pipeline: ``python -m tests.soak --minutes 60 --seed 7``."""

import argparse
import random
import shutil
import sys
import tempfile
from pathlib import Path

from pipeline.sandbox.simulator import Keying
from tests.soak.run import soak


def main() -> int:
    """Run one soak, and print its report on stdout.

    Returns:
        0 if nothing was found, else 1; then the logs stay.
    """
    arguments = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="pipeline-soak-"))
    report = soak(arguments.seed, arguments.minutes, folder, keying=arguments.key_by)
    print(report)
    if not report.has_passed:
        print(f"logs and the list of faults: {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5, help="how long faults come (5)")
    parser.add_argument("--seed", type=int, default=None, help="drawn and printed if left out")
    parser.add_argument(
        "--key-by",
        type=Keying,
        choices=list(Keying),
        default=None,
        help="how the topic is keyed; drawn from the seed if left out",
    )
    arguments = parser.parse_args()
    if arguments.seed is None:
        arguments.seed = random.randrange(10**6)
    return arguments


if __name__ == "__main__":
    sys.exit(main())
