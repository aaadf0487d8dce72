"""Which entries a sandbox supports: the start script runs, the untouched start fails the check, the truth passes it.

Found once by running all of them, and kept in the cache folder, by the entry's scripts and the kind of sandbox.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from lora_ppo.files import cache_folder, replace_file
from tasks.os_interaction.commands import Ran, SandboxFailed, in_short
from tasks.os_interaction.entries import Entry
from tasks.os_interaction.sandbox import Sandbox

VERSION = "3"  # raised where the sandbox changes what entries can do
SETTING_UP = 60.0  # seconds that a start script, a truth and a check may take here


def checked(sandbox: Sandbox, entry: Entry) -> Ran:
    """What an entry's check says of the system as it stands."""
    return sandbox.check(entry.check, SETTING_UP, entry.files.get("tests", b""))


def why_not(entry: Entry, make: Callable[[], Sandbox]) -> str:
    """Why an entry isn't supported; empty where it is."""
    if entry.unsupported:
        return entry.unsupported
    try:
        for solved in (False, True):
            sandbox = make()
            try:
                ran = sandbox.run(entry.start, SETTING_UP)
                if ran.status or ran.timed_out:
                    return f"the start script fails ({in_short(ran)})"
                if solved:
                    truth = sandbox.run(entry.truth, SETTING_UP, stdin=entry.files.get("solution", b""))
                found = checked(sandbox, entry)
                if found.status == 0 and not solved:
                    return "the untouched start passes the check"
                if solved and found.status:
                    how = f"; the truth itself ends with {in_short(truth)}" if truth.status else ""
                    return f"the truth does not pass the check{how}"
            finally:
                sandbox.close()
    except SandboxFailed as failed:
        return f"the sandbox failed: {failed}"
    return ""


def cache_file(entries: Sequence[Entry], kind: str) -> Path:
    """Where the result for these entries is kept, on this machine and for this user."""
    keys = "".join(entry.name + entry.key for entry in entries)
    fingerprint = hashlib.sha256(f"{VERSION}/{kind}/{os.geteuid()}/{os.uname().release}/{keys}".encode()).hexdigest()
    return cache_folder() / "os_interaction" / f"{fingerprint[:24]}.json"


def left_out(
    entries: Sequence[Entry],
    make: Callable[[], Sandbox],
    kind: str,
    done: Callable[[int], None] = lambda count: None,
    again: bool = False,
    workers: int = 0,
) -> dict[str, str]:
    """The entries that are not supported, by name, with the reason; `done` is told how many were tried.

    Of several processes one tries them, and the others wait for its result. Sandboxes that could not be made at all are
    no result: nothing is kept then. Raises SandboxFailed.
    """
    path = cache_file(entries, kind)
    if not again and (found := kept(path)) is not None:
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not again and (found := kept(path)) is not None:
            return found
        return tried(entries, make, path, done, workers)


def kept(path: Path) -> dict[str, str] | None:
    """A result that was kept; None where there is none."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def tried(
    entries: Sequence[Entry], make: Callable[[], Sandbox], path: Path, done: Callable[[int], None], workers: int
) -> dict[str, str]:
    """`left_out`, by running them; the result is kept at `path`."""
    make().close()
    reasons = {}
    with ThreadPoolExecutor(workers or 2 * (os.cpu_count() or 1)) as pool:
        found = pool.map(lambda entry: why_not(entry, make), entries)
        for number, (entry, why) in enumerate(zip(entries, found, strict=True), 1):
            if why:
                reasons[entry.name] = why
            done(number)
    if not any(why.startswith("the sandbox failed") for why in reasons.values()):
        replace_file(path, json.dumps(reasons, indent=1).encode("ascii"))
    return reasons
