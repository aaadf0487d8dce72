"""When a Ctrl-C takes effect, and how the program leaves when it is told to."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

LEAVING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
asked_to_leave: list[int] = []  # those of LEAVING that came; like signals, it is the whole process's


class SecondInterrupt(KeyboardInterrupt):
    """Ctrl-C while the first one was still waiting: the program ends now."""


class Leave(KeyboardInterrupt):
    """SIGTERM, SIGHUP or SIGQUIT (Ctrl-\\) came, or nobody reads the output any more: as when a person leaves."""


@contextlib.contextmanager
def leave_on_signals(end_prompt: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """In here the first signal of LEAVING raises Leave, unless `end_prompt` ends a prompt; none ends the program.

    A terminal that closes sends SIGHUP, and so does its shell: later ones must not disturb the leave-taking. In a
    library's callback an exception can get lost: `asked_to_leave` tells whether a signal came. One that is ignored
    stays so.
    """

    def leave(number: int, frame: Any) -> None:
        asked_to_leave.append(number)
        if len(asked_to_leave) == 1 and not end_prompt():
            if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
                os._exit(0)  # its C++ code, being loaded, aborts at an exception; nothing has begun yet
            raise Leave

    asked_to_leave.clear()
    mine = [number for number in LEAVING if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in mine:
            signal.signal(number, leave)
    except ValueError:  # not the main thread: no signal arrives here
        mine = []
    try:
        yield
    finally:
        for number in mine:  # the process is about to end: to be killed now would change its exit status
            signal.signal(number, signal.SIG_IGN if asked_to_leave else signal.SIG_DFL)
        asked_to_leave.clear()


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """A Ctrl-C or a signal to leave takes effect at the end of this; a second Ctrl-C ends the program at once.

    So does a Ctrl-C after one that is on its way.
    """
    seen: list[int] = []
    another = isinstance(sys.exception(), KeyboardInterrupt)

    def note(number: int, frame: Any) -> None:
        if number == signal.SIGINT and (another or number in seen):
            raise SecondInterrupt
        seen.append(number)

    previous = {}
    try:
        for number in (signal.SIGINT, *LEAVING):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: no signal arrives here
        pass
    try:
        yield
    except BaseException:
        asked_to_leave.extend(
            n for n in seen if n in LEAVING and previous[n] is not signal.SIG_IGN
        )  # once what was raised is dealt with
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for number in sorted(seen, key=lambda number: number not in LEAVING):
        signal.raise_signal(number)


@contextlib.contextmanager
def stop_requests(patient: bool, say: Callable[[str], None]) -> Iterator[list[int]]:
    """Notes Ctrl-C, SIGTERM and SIGHUP in the list it gives; a SIGHUP that is ignored, as under nohup, stays so.

    A second one ends at once, unless `patient`: a launcher sends two. So do a terminal that closes and its shell.
    """
    asked: list[int] = []
    hang_up = getattr(signal, "SIGHUP", None)

    def note(number: int, frame: Any) -> None:
        if asked and not patient and number != hang_up:
            raise KeyboardInterrupt
        if not asked:
            say("Stopping after this step." + ("" if patient else " Ctrl-C again stops at once."))
        asked.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hang_up and signal.getsignal(hang_up) is signal.SIG_DFL:
        numbers.append(hang_up)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
