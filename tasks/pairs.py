"""Preference pairs: JSON lines with `prompt`, `chosen` and `rejected`, text or conversational, as TRL has them.

A line may have a `topic`, and `fact`, words of which a reply that keeps the facts has one at least.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_ppo.chat import Message
from lora_ppo.settings import ConfigError

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Pair:
    """Two replies to a chat, the better one first; `line` is its number in the file."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    topic: str
    line: int

    @property
    def key(self) -> tuple[str, ...]:
        """The same for pairs that differ in case, spaces and order alone."""
        asked, sides = [message["content"] for message in self.messages], [self.chosen, self.rejected]
        asked, sides = ([" ".join(text.casefold().split()) for text in texts] for texts in (asked, sides))
        return (*asked, *sorted(sides))


def read_pairs(setting: str, name: str) -> list[Pair]:
    """The pairs of a file. Raises ConfigError naming the line that is broken, has equal sides, or repeats another."""
    pairs, lines = [], read_objects(setting, name)
    seen: dict[tuple[str, ...], int] = {}
    for number, row in lines:
        try:
            pair = pair_of(row, number)
        except ValueError as error:
            raise ConfigError(f"{setting}={name}, line {number}: {error}") from None
        if (first := seen.setdefault(pair.key, number)) != number:
            raise ConfigError(f"{setting}={name}, line {number}: found the pair of line {first} again, take one out")
        pairs.append(pair)
    return pairs


def read_objects(setting: str, name: str) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of a file with an object in JSON a line. Raises ConfigError naming the line."""
    path, found = Path(name), []
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}={name}: {error.strerror or error}") from None
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            start = line[:40].decode("utf-8", "replace")
            raise ConfigError(f"{setting}={name}, line {number}: found {start!r}, expected an object in JSON")
        found.append((number, row))
    if not found:
        raise ConfigError(f"{setting}={name} is empty: expected an object in JSON a line")
    return found


def pair_of(row: dict[str, Any], number: int) -> Pair:
    """The pair of a line. Raises ValueError saying what was found."""
    prompt, topic = row.get("prompt"), row.get("topic", "")
    messages = [{"role": "user", "content": text(prompt, "prompt")}] if isinstance(prompt, str) else chat(prompt)
    sides = [reply_of(row.get(side), side) for side in ("chosen", "rejected")]
    if " ".join(sides[0].split()) == " ".join(sides[1].split()):
        raise ValueError("chosen and rejected are equal: nothing can be learned from them")
    return Pair(tuple(messages), *sides, topic=text(topic, "topic") if topic else "", line=number)


def reply_of(value: Any, side: str) -> str:
    """A side's reply, from text or from a conversation of one message."""
    if isinstance(value, str):
        return text(value, side)
    messages = chat(value, side)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"found {len(messages)} messages as {side}, expected one of the assistant's")
    return messages[0]["content"]


def chat(value: Any, side: str = "prompt") -> list[Message]:
    """The messages of a conversation. Raises ValueError where it is none."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"found {str(value)[:40]!r} as {side}, expected text or a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(
                f"found {str(message)[:60]!r} in {side}, expected a message with content and a role, one of "
                f"{', '.join(ROLES)}"
            )
        messages.append({"role": message["role"], "content": text(message.get("content"), f"content of {side}")})
    if side == "prompt" and messages[-1]["role"] != "user":
        raise ValueError(f"found a prompt that ends with a message of role {messages[-1]['role']}, expected user")
    return messages


def text(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"found {str(value)[:40]!r} as {what}, expected text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"found half a character (a lone surrogate) in {what}, expected whole ones")
    return unicodedata.normalize("NFC", value.strip())


def apart(train: Sequence[Pair], held_out: Sequence[Pair]) -> None:
    """Raises ConfigError where a pair is in both."""
    known = {pair.key: pair.line for pair in train}
    for pair in held_out:
        if pair.key in known:
            raise ConfigError(
                f"line {pair.line} of held_out is line {known[pair.key]} of pairs, too: take it out of one of them"
            )


# --------------------------------------------------------------------------------------------------------- harder pairs
# A reward model that has only seen replies of two manners tells these apart, and pays a policy for whatever has the
# manner. So each chosen reply can be set beside ones that have it, too, and are worse.


def mismatched(pairs: Sequence[Pair], place: int) -> str:
    """The chosen reply to the next prompt of the topic; "" where there is no other."""
    this, others = pairs[place], [*pairs[place + 1 :], *pairs[:place]]
    return next((p.chosen for p in others if p.topic == this.topic and p.messages != this.messages), "")


def crossed(pairs: Sequence[Pair], place: int) -> str:
    """The first half of the chosen reply's sentences, and the second half of the rejected one's."""
    chosen, rejected = (re.split(r"(?<=[.!?])\s+", side) for side in (pairs[place].chosen, pairs[place].rejected))
    return " ".join(chosen[: (len(chosen) + 1) // 2] + rejected[(len(rejected) + 1) // 2 :])


MADE: dict[str, Callable[[Sequence[Pair], int], str]] = {"mismatched": mismatched, "crossed": crossed}


def harder(pairs: Sequence[Pair], kinds: Sequence[str]) -> list[Pair]:
    """The chosen reply of each pair beside a worse one of each of `kinds`, names of MADE; none that equals it."""
    made = [replace(pair, rejected=MADE[kind](pairs, i)) for kind in kinds for i, pair in enumerate(pairs)]
    return [pair for pair in made if pair.rejected not in ("", pair.chosen)]
