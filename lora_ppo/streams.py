"""The streams of a program: whatever stands behind them, no work is lost to them and nobody sees a traceback."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any


class Unfailing:
    """A stream for messages: what can't be written, because a disk is full or nobody reads on, is dropped."""

    def __init__(self, stream: Any):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run_program(main: Callable[[], int]) -> int:
    """Runs a program's `main` and returns its exit status.

    Streams that were closed lead nowhere; characters that an encoding lacks are shown as escapes. Where standard output
    can't be written the program ends with one line and status 1; where whoever read it is gone, with 0.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # else the next file that is opened would become this stream
            descriptor = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if descriptor != number:
                os.dup2(descriptor, number)
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stderr = Unfailing(sys.stderr)
    try:
        try:
            status = main()
        except SystemExit as leaving:  # of --help
            status = leaving.code
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        drop_output()
        return 0
    except OSError as error:
        drop_output()
        print(f"error: {error}", file=sys.stderr)
        return 1


def drop_output() -> None:
    """Leads standard output nowhere: Python flushes it once more at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
