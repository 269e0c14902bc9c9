"""Runs a command that the kernel kills when the launcher dies, however it dies.

Run by path as `python -I -S tether.py PARENT COMMAND...`: it ties itself to its parent and becomes the command. (A
`preexec_fn` would run Python between fork and exec of a process with gRPC's threads in it.)
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Does not return."""
    parent, command = int(arguments[0]), arguments[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:  # it died before we were tied to it
        sys.exit("the launcher is gone")
    os.execv(command[0], command)  # noqa: S606  # the launcher's own command


if __name__ == "__main__":
    main(sys.argv[1:])
