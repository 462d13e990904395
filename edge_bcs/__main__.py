"""The command `edge-bcs`, and `python -m edge_bcs`: Ctrl-C at any moment ends it in good order."""

from __future__ import annotations

import signal

_AGAIN = 0.05  # seconds
# Until the command line is there, and once it is done, Ctrl-C ends the process without a word. Where it is
# ignored (nohup, the background), that stays.
_INTERRUPTIBLE = signal.getsignal(signal.SIGINT) is signal.default_int_handler
if _INTERRUPTIBLE:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os  # noqa: E402
import threading  # noqa: E402
from types import FrameType  # noqa: E402


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt as soon as no import is under way.

    Within one, libraries in C take it for a fault of theirs, or lose it, and the command would go on.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            later = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
            later.daemon = True
            later.start()
            return
        frame = frame.f_back
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line on the arguments of this process, and exit."""
    from edge_bcs.cli import main as command_line

    if _INTERRUPTIBLE:
        signal.signal(signal.SIGINT, interrupt)
    try:
        command_line(prog_name="edge-bcs")
    finally:
        if _INTERRUPTIBLE:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()
