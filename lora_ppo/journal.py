"""Durable lines of JSON, the journal that chains them by hashes, and the seeds from which a turn is drawn again."""

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from lora_ppo.checkpoint import fsync

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors put it in front


class LineFile:
    """A file of JSON lines to which one is added durably: written, flushed and fsynced, or kept until that works."""

    def __init__(self, path: Path):
        self.path = path
        self.unwritten: list[bytes] = []

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line. Raises OSError if it can't be written now; it is then written before the next one."""
        self.add(record)
        self.flush()

    def add(self, record: dict[str, Any]) -> None:
        """Notes a line that `flush` writes."""
        self.unwritten.append(json.dumps(record).encode("ascii"))

    def flush(self) -> None:
        """Writes what waits to be written. Raises OSError if that can't be done now."""
        if not self.unwritten:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = b"".join(line + b"\n" for line in self.unwritten)
        with self.path.open("ab+", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            if start:
                file.seek(start - 1)
                data = data if file.read(1) in b"\r\n" else b"\n" + data  # what a crash left is a line of its own
            try:
                if file.write(data) < len(data):
                    raise OSError(errno.ENOSPC, "no space left for a whole line")
                os.fsync(file.fileno())
                if not start:
                    fsync(self.path.parent)  # a new file's name has to survive, too
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, start)
                raise
        self.unwritten.clear()

    def lines(self) -> list[bytes]:
        """Its lines, without their ends."""
        there = self.path.exists() and not self.path.is_char_device()  # /dev/full would never end
        return (self.path.read_bytes() if there else b"").removeprefix(BYTE_ORDER_MARK).splitlines()

    def read(self) -> tuple[list[dict[str, Any]], list[int]]:
        """The records, and the numbers of lines that hold none. A last line that was not finished is cut off."""
        if not self.path.exists() or self.path.is_char_device():
            return [], []
        data = self.path.read_bytes()
        whole = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if torn(data[whole:]):
            with contextlib.suppress(OSError):  # in a folder that can't be written to nothing is appended either
                os.truncate(self.path, whole)
        parsed = [(number, parse(line)) for number, line in enumerate(self.lines(), 1) if line.strip()]
        return [r for _, r in parsed if r is not None], [number for number, record in parsed if record is None]

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it holds none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def torn(line: bytes) -> bool:
    """Whether a line without an end was never finished: no whole record begins it."""
    try:
        json.JSONDecoder().raw_decode(line.decode("ascii"))
    except (ValueError, RecursionError):
        return bool(line)
    return False


# ------------------------------------------------------------------------------------------------------- the journal


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the hash of all that it says, however a tool may have set its blanks, as its last member."""
    return record | {"sha256": hashlib.sha256(json.dumps(record).encode("ascii")).hexdigest()}


def unsealed(line: bytes) -> dict[str, Any] | None:
    """The record of a line that is what its hash says; None for any other."""
    record = parse(line) or {}
    told = {name: value for name, value in record.items() if name != "sha256"}
    return record if isinstance(record.get("prev"), str) and sealed(told) == record else None


class Entry(NamedTuple):
    """A line of a journal. `record` is None where the line is damaged; `sealed` lines carry hashes."""

    number: int  # of the line, from 1
    end: int  # bytes up to its end, as the program wrote them
    record: dict[str, Any] | None
    prev: str
    sha256: str
    sealed: bool

    @property
    def turn(self) -> int:
        """The turn that it ends, or -1."""
        ends = self.record and self.record.get("type") in ("turn", "passed")
        return self.record.get("number", -1) if ends else -1


class Journal(LineFile):
    """The lines of a run. Each carries the hash of the one before it, and as its last member the hash of itself."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.head = ""  # the hash of the last line

    def add(self, record: dict[str, Any]) -> None:
        line = sealed(record | {"prev": self.head})
        self.head = line["sha256"]
        super().add(line)


class Chain:
    """What a journal's lines say, as a chain: a line follows the one whose hash it carries, wherever both stand.

    Lines of versions before 2 have no hashes. They can stand only in front of the first that has one, and follow each
    other as they stand: a damage to them is not seen. The first line with a hash carries one of all of them.
    """

    def __init__(self, lines: Sequence[bytes]):
        self.entries: list[Entry] = []
        self.of_hash: dict[str, Entry] = {}  # the whole lines, each once
        self.after: dict[str, Entry] = {}  # by the hash of the line before; a later one was written by who knew better
        self.repeated: dict[int, int] = {}
        self.unfinished = len(lines) if lines and torn(lines[-1]) else 0  # the number of a line that was cut short
        end, last, old = 0, "", True
        for number, line in enumerate(lines, 1):
            end += len(line) + 1
            if not line.strip():
                continue
            if record := unsealed(line):
                entry = Entry(number, end, record, record["prev"], record["sha256"], True)
                old = False
            elif old and b'"sha256"' not in line:
                entry = Entry(number, end, parse(line), last, hashlib.sha256(last.encode() + line).hexdigest(), False)
                last = entry.sha256
            else:
                entry = Entry(number, end, None, "", "", True)
            self.entries.append(entry)
            if entry.record is None:
                continue
            if entry.sha256 in self.of_hash:
                self.repeated[number] = self.of_hash[entry.sha256].number
                continue
            self.of_hash[entry.sha256] = self.after[entry.prev] = entry

    @property
    def runs(self) -> list[str]:
        """The runs that begin in the file, in its order."""
        return [entry.record.get("run") for entry in self.of_hash.values() if entry.record.get("type") == "start"]

    def follow(self, sha256: str) -> Iterator[Entry]:
        """The lines after the one with this hash, in order; "" is where a journal begins."""
        while entry := self.after.get(sha256):
            yield entry
            sha256 = entry.sha256

    def before(self, sha256: str) -> list[Entry]:
        """The lines up to the one with this hash, in order, as far back as they are there."""
        found = []
        while entry := self.of_hash.get(sha256):
            found.append(entry)
            sha256 = entry.prev
        return found[::-1]

    def place(self, state: dict[str, Any]) -> str | None:
        """The hash of the last line that a checkpoint's weights contain; None where the journal does not have it."""
        if "journal" in state:
            sha256 = state["journal"]["sha256"]
            return sha256 if sha256 in self.of_hash or sha256 in self.after else None
        offset = state["journal_offset"]  # of old versions
        there = [entry.sha256 for entry in self.entries if entry.end == offset and not entry.sealed]
        return there[0] if there else None if offset else ""

    def faults(self, run: str, head: str, due: int) -> dict[int, str]:
        """What is wrong with the journal of a run that goes on after the line `head` with turn `due`, by line."""
        used = {entry.sha256 for entry in self.before(head)}
        found = {number: f"repeats line {other}" for number, other in self.repeated.items()}
        lost: dict[str, str] = {}  # why the line with this hash is not used
        for entry in self.entries:
            if entry.record is None:
                found[entry.number] = "is half-written" if entry.number == self.unfinished else "is damaged"
            elif entry.number not in found:
                before, start = self.of_hash.get(entry.prev), entry.record.get("type") == "start"
                if before is not None and before.number > entry.number:
                    found[entry.number] = f"belongs behind line {before.number}"
                if entry.sha256 in used:
                    continue
                if start and entry.record.get("run") != run:
                    lost[entry.sha256] = "is of another run"
                elif entry.prev in lost:
                    lost[entry.sha256] = lost[entry.prev]
                elif entry.turn >= due or (entry.sealed and before is None and not start):
                    lost[entry.sha256] = "does not follow from what is whole"
                elif entry.sealed and entry.prev in used:
                    lost[entry.sha256] = "is not what the run went on with"
                if entry.sha256 in lost:
                    found[entry.number] = lost[entry.sha256]
        return found


def told(faults: dict[int, str]) -> str:
    """`line 3 is damaged; lines 5 to 7 are of another run`."""
    texts = []
    for what, group in groupby(sorted(faults), key=faults.__getitem__):
        numbers = list(group)
        one = len(numbers) == 1
        lines = f"line {numbers[0]}" if one else f"lines {numbers[0]} to {numbers[-1]}"
        texts.append(f"{lines} {what if one else re.sub('^is ', 'are ', what).replace('does not', 'do not')}")
    return "; ".join(texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else "")


# ------------------------------------------------------------------------------------------------------------- draws


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn's random draws: a session that was stopped goes on as if it had not been."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{turn}".encode()).digest()[:7], "big")


def now() -> str:
    return datetime.now(UTC).isoformat()
