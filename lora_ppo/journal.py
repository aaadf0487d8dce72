"""Durable lines of JSON, and the seeds from which a turn is drawn again."""

import contextlib
import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_ppo.checkpoint import Damaged


class LineFile:
    """A file of JSON lines to which one is added durably: written, flushed and fsynced, or kept until that works."""

    def __init__(self, path: Path):
        self.path = path
        self.unwritten: list[bytes] = []

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line. Raises OSError if it can't be written now; it is then written before the next one."""
        self.unwritten.append(json.dumps(record).encode("ascii") + b"\n")
        self.flush()

    def flush(self) -> None:
        """Writes what could not be written before. Raises OSError if it still can't be."""
        if not self.unwritten:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = b"".join(self.unwritten)
        with self.path.open("ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) < len(data):
                    raise OSError("no space left for a whole line")
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, start)
                raise
        self.unwritten.clear()

    def read(self, offset: int = 0) -> list[dict[str, Any]]:
        """The records from byte `offset` on. A last line that was not finished is cut off the file and not returned."""
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with contextlib.suppress(OSError):  # in a folder that can't be written to nothing is appended either
                os.truncate(self.path, whole)
        records = []
        for number, line in enumerate(data[:whole].splitlines(keepends=True), 1):
            offset -= len(line)
            if offset < 0:
                try:
                    records.append(json.loads(line))
                except ValueError:
                    raise Damaged(f"{self.path} is damaged in line {number}") from None
        return records

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn's random draws: a session that was stopped goes on as if it had not been."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{turn}".encode()).digest()[:7], "big")


def now() -> str:
    return datetime.now(UTC).isoformat()
