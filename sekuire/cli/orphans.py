"""End a group of processes when the program that started it has died: ``python orphans.py DESCRIPTOR GROUP``.

``sekuire dev -- COMMAND`` starts this beside the command, in a session of its own. It imports nothing of the library,
so that it starts quickly. The descriptor is the reading end of a pipe whose writing end the program alone has: when
the program ends, killed for example, reading returns.
"""

import os
import signal
import sys
import time

#: Seconds that the group gets to end in order.
PATIENCE = 10.0


def main(descriptor: int, group: int) -> None:
    if os.read(descriptor, 1):
        # The program has ended the group itself.
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(group, number)
            end = time.monotonic() + PATIENCE
            while number == signal.SIGTERM and time.monotonic() < end:
                time.sleep(0.1)
                os.killpg(group, 0)
        except OSError:
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
