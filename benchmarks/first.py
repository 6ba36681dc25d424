"""Start like an agent's program: import, log in, open the stream, run the task that waits. For ``benchmarks --goals``.

With ``--only-import`` it ends after the import. It imports nothing else of the benchmarks, whose time would count.
"""

from __future__ import annotations

import sys
from typing import Any

from sekuire import SekuireSDK, create_worker


def main() -> None:
    """Run one worker until standard input ends."""
    if sys.argv[1:] == ["--only-import"]:
        print("{}", flush=True)
        return
    url, agent_id, capability = sys.argv[1:]
    sdk: Any = SekuireSDK
    worker = create_worker(agent_id=agent_id, api_base_url=url, install_token="skt_install_benchmark")
    worker.on_task(capability, lambda ctx, document: {"sdk": sdk.__name__})
    worker.start()
    sys.stdin.read()
    worker.stop(timeout=5.0)


if __name__ == "__main__":
    main()
