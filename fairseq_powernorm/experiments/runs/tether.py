"""Becomes a command that ends when the process that started it ends: python -IS tether.py PARENT COMMAND...

The kernel sends it SIGKILL. Only Linux does so; elsewhere the command outlives a parent that is killed, and holds the
run's lock until it ends. It is run by itself, before anything is loaded.
"""

import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, command: "list[str]") -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before it could be heard of
            sys.exit(128 + signal.SIGKILL)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
