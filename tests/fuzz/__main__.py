"""Fuzz every decoder with atheris, and a local platform over HTTP: ``tox -e fuzz -- --runs 1000000``."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import List

from . import corpus, http, targets

_STATUS = re.compile(r"^#(\d+)\s+(\w+)\s+cov: (\d+) ft: (\d+) corp: (\d+)")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument(
        "--runs", type=int, default=100_000, help="inputs of the decoders (default %(default)s; 0: none)"
    )
    parser.add_argument("--requests", type=int, default=20_000, help="HTTP requests (default %(default)s; 0: none)")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations; the same one, the same inputs")
    parser.add_argument("--max-bytes", type=int, default=4096, help="longest input (default %(default)s)")
    parser.add_argument("--corpus", type=Path, help="a directory to keep and begin with what was found interesting")
    parser.add_argument("--input", type=Path, help="run only the input in this file, such as one that failed")
    options = parser.parse_args()
    if options.input is not None:
        targets.run(options.input.read_bytes())
        print(f"{options.input}: nothing escaped")
        return 0
    status = 0
    if options.runs:
        with tempfile.TemporaryDirectory(prefix="sekuire-fuzz-") as directory:
            status = _fuzz(options, Path(directory))
    return _attack(options) or status if options.requests else status


def _attack(options: argparse.Namespace) -> int:
    outcome = http.attack(options.requests, options.seed)
    print(f"local platform: {outcome}")
    for problem in outcome.problems[:10]:
        print(problem)
    return 0 if outcome.is_fine else 1


def _fuzz(options: argparse.Namespace, directory: Path) -> int:
    seeds, kept = directory / "seeds", options.corpus or directory / "corpus"
    seeds.mkdir()
    kept.mkdir(exist_ok=True)
    count = corpus.write(seeds)
    command = [
        sys.executable, "-m", "tests.fuzz.target", str(kept), str(seeds),
        f"-runs={options.runs}", f"-seed={options.seed}", f"-max_len={options.max_bytes}",
        f"-dict={Path(__file__).with_name('dictionary.txt')}", "-timeout=20", "-rss_limit_mb=2048",
        "-artifact_prefix=fuzz-",
    ]  # fmt: skip
    started = time.monotonic()
    last: List[str] = ["0", "", "0", "0", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    assert process.stdout is not None
    escaped = False
    for line in process.stdout:
        escaped = escaped or "Test unit written to" in line
        match = _STATUS.match(line)
        if match:
            last = list(match.groups())
        if not match or last[1] in ("INITED", "pulse", "DONE"):
            print(line, end="", flush=True)
    status = process.wait()
    seconds = time.monotonic() - started
    print(
        f"\n{last[0]} inputs in {seconds:.0f} s from {count} seeds; coverage {last[2]} edges, {last[3]} features, "
        f"{last[4]} inputs worth keeping; "
        + ("SOMETHING ESCAPED: give the file named above to --input" if escaped else "nothing escaped")
        + ("" if status == 0 or escaped else f", but it ended early ({status})")
    )
    return 0 if status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
