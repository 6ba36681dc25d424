"""Measure what `sekuire --version` costs beside the interpreter with argparse: ``python -m benchmarks.start``.

Both are started in turn, and the medians of their CPU time are compared: the time until they end depends on what else
the machine does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from typing import List

FLOOR = [sys.executable, "-c", "import argparse"]
COMMAND = [sys.executable, "-m", "sekuire", "--version"]


def cpu_ms(command: List[str]) -> float:
    """Return the milliseconds of CPU time that a command uses."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return 1000 * (usage.ru_utime + usage.ru_stime)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = range(parser.parse_args().rounds)
    pairs = [(cpu_ms(FLOOR), cpu_ms(COMMAND)) for _ in rounds]
    floor, command = (statistics.median(figures) for figures in zip(*pairs))
    print(f"import argparse {floor:.1f} ms, sekuire --version {command:.1f} ms, ratio {command / floor:.2f}")


if __name__ == "__main__":
    main()
