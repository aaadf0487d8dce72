"""The shell: the model gets a task in a Linux system, runs Bash commands, sees what they print, and is checked.

    python -m tasks.os_interaction.check DIR       which entries the sandbox supports
    python -m tasks.os_interaction play ID         be the model yourself
    python -m tasks.os_interaction.server          serve episodes to train.py and evaluate.py (server=URL)

The entries are in `data/os_interaction`; LifelongAgentBench's and Harbor's are read, too (`entries.py`). Where commands
run is `sandbox.py`, how an episode goes is `episode.py`. docs/shell.md tells more.
"""

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from lora_ppo.chat import Message
from lora_ppo.episodes import Outcome, Task
from lora_ppo.policy import Policy
from lora_ppo.settings import ConfigError, Settings, setting
from lora_ppo.terminal import clean
from tasks.os_interaction.client import RemoteEpisode, Server
from tasks.os_interaction.commands import SandboxFailed
from tasks.os_interaction.entries import OWN, Entry, read_entries, require_text
from tasks.os_interaction.episode import Rules, ShellEpisode
from tasks.os_interaction.limits import Limits
from tasks.os_interaction.probe import sandbox_maker
from tasks.os_interaction.support import left_out

AT_ONCE = 16  # episodes whose commands run at the same time


@dataclass
class TaskSettings(Settings):
    entries: str = setting(
        str(OWN.relative_to(OWN.parent.parent)),
        "folder or file of entries: LifelongAgentBench's JSON or parquet, or Harbor's task folders",
        group="the shell task (os_interaction)",
        split=True,
    )
    entry_levels: list[str] = setting(["1", "2", "3"], "levels of entries; those without a level always take part")
    sandbox: str = setting(
        "namespaces", "where commands run: namespaces (by bubblewrap), docker, or none (docs/shell.md)"
    )
    image: str = setting("", "with sandbox=docker: the image's name")
    i_understand: bool = setting(False, "needed for sandbox=none, where a model's commands run as you")
    server: str = setting("", "URL of tasks.os_interaction.server, which plays the episodes; empty: this process")
    server_token: str = setting("", "file with the server's token; empty: where the server writes it on this machine")
    max_rounds: int = setting(5, "replies that an episode may take")
    command_seconds: float = setting(20.0, "seconds that a command may take")
    output_length: int = setting(1000, "characters of a command's output that the model is shown")
    judge: str = setting("stands", "stands: episodes are judged as they stand; finished: those that said finish")
    record_dir: str = setting("", "folder where every episode is written, for `play --replay FILE`; empty: nowhere")
    opening: str = setting("", "JSON file with the chat that comes before the instruction; empty: the task's own")
    entries_digest: str = setting(
        "", "digest of the entries that there must be; empty: any, and the run writes down theirs", split=True
    )


# Settings that belong to one side, where a server plays the episodes. On the others both sides must agree.
OWN_SIDE = {"server", "server_token", "i_understand", "entry_levels", "entries_digest"}
PLAYED_BY = [one.name for one in fields(TaskSettings) if one.name not in OWN_SIDE]
RANGES = {"max_rounds": (1, 100), "command_seconds": (0.1, 3600), "output_length": (1, 1_000_000)}


def prepare(config: Any) -> Callable[[Policy], Task]:
    """Reads the entries and tries the sandbox, or the server, before any model is loaded. Raises ConfigError."""
    if config.server:
        server = Server(config.server, config.server_token, config.command_seconds)
        at_once = getattr(config, "eval_batch_size", config.batch_size)  # evaluation has its own
        server.agree({name: getattr(config, name) for name in PLAYED_BY}, at_once)
        remote = server.samples()
        pin(config, remote)
        splits = split(remote, config.test_share, config.entry_levels)
        return lambda policy: ShellTask(splits, server.episode)
    entries, make, rules = ready(config)
    splits = split(entries, config.test_share, config.entry_levels)
    return lambda policy: ShellTask(splits, lambda entry: ShellEpisode(entry, make, rules))


def pin(config: Any, entries: Sequence[Any]) -> None:
    """Writes the digest of the entries into the settings: a run with others can't go on. Raises ConfigError.

    What is held out follows from the names and levels of all of them, what an episode earns from their scripts.
    """
    told = sorted([entry.name, entry.level, entry.instruction, entry.key] for entry in entries)
    found = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    if config.entries_digest not in ("", found):
        raise ConfigError(
            f"entries_digest={config.entries_digest}, and the {len(told)} entries here have {found}: set the entries "
            "that it was made of, or leave it out"
        )
    config.entries_digest = found


def ready(config: Any, say: Callable[[str], None] | None = None) -> tuple[list[Entry], Callable, Rules]:
    """The entries that the sandbox supports (`pin`), what makes sandboxes, and the rules. Raises ConfigError."""
    say = say or tell
    rules = rules_of(config)
    entries = read_entries(Path(config.entries).expanduser())
    make = sandbox_maker(config.sandbox, config.image, config.i_understand, Limits(), say)
    entries = supported(entries, make, config.sandbox + config.image, say)
    pin(config, entries)
    return entries, make, rules


def tell(text: str) -> None:
    """Prints a line; of several processes the main one alone does."""
    if os.environ.get("RANK", "0") == "0":
        print(clean(text), file=sys.stderr, flush=True)


def rules_of(config: Any) -> Rules:
    """The rules that the settings make. Raises ConfigError."""
    for name, (low, high) in RANGES.items():
        if not low <= getattr(config, name) <= high:
            raise ConfigError(f"{name}={getattr(config, name):g} is out of range: expected {low:g} to {high:g}")
    if config.judge not in ("stands", "finished"):
        raise ConfigError(f"judge={config.judge} is unknown: expected one of stands, finished")
    opening = read_opening(Path(config.opening).expanduser()) if config.opening else ()
    record = Path(config.record_dir).expanduser() if config.record_dir else None
    return Rules(config.max_rounds, config.command_seconds, config.output_length, config.judge, opening, record)


def read_opening(path: Path) -> tuple[Message, ...]:
    """The messages of a file in LifelongAgentBench's form, or a list of them. Raises ConfigError."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        rows = list(rows["value"].values()) if isinstance(rows, dict) else rows
        roles = {"user": "user", "agent": "assistant", "assistant": "assistant"}
        found = tuple({"role": roles[row["role"]], "content": str(row["content"])} for row in rows)
        for message in found:
            require_text(message["content"], f"opening={path}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"opening={path}: {error!r}; expected a list of messages, each with role and content"
        ) from None
    if [message["role"] for message in found] != ["user", "assistant"] * (len(found) // 2) or not found:
        raise ConfigError(f"opening={path}: expected messages of user and assistant in turn, the assistant's last")
    return found


def supported(entries: Sequence[Entry], make: Callable, kind: str, say: Callable[[str], None]) -> list[Entry]:
    """The entries that hold in this sandbox; the others are named. Raises ConfigError where none is left."""
    try:
        reasons = left_out(entries, make, kind)
    except SandboxFailed as failed:
        raise ConfigError(f"sandbox={kind} does not work here: {failed}") from None
    say(f"{len(entries) - len(reasons)} of {len(entries)} entries are supported")
    for name, why in list(reasons.items())[:10]:
        say(f"left out: {name}: {why}")
    if len(reasons) > 10:
        say(f"left out: {len(reasons) - 10} more (python -m tasks.os_interaction.check names all)")
    kept = [entry for entry in entries if entry.name not in reasons]
    if not kept:
        raise ConfigError("entries: the sandbox supports none of them")
    return kept


def split(entries: Sequence[Any], share: float, levels: Sequence[str]) -> dict[str, list[Any]]:
    """The entries of both splits: of each level a share, always the same, is held out. Raises ConfigError."""
    splits: dict[str, list[Any]] = {"train": [], "test": []}
    for level in sorted({entry.level for entry in entries}):
        if level and level not in levels:
            continue
        some = sorted((entry for entry in entries if entry.level == level), key=lambda entry: entry.name)
        random.Random("os_interaction").shuffle(some)
        count = min(len(some), max(1, round(share * len(some)))) if len(some) > 1 else 0
        splits["test"] += some[:count]
        splits["train"] += some[count:]
    for name, change in (("test", "raise"), ("train", "lower")):
        if not splits[name]:
            raise ConfigError(f"entries, entry_levels and test_share={share:g} leave none to {name} on: {change} it")
    return splits


class ShellTask:
    """Entries, and a system of its own for each try at one."""

    def __init__(self, splits: dict[str, list[Any]], episode: Callable[[Any], Any]):
        self.splits, self.make_episode = splits, episode

    def samples(self, split: Literal["train", "test"]) -> Sequence[Any]:
        return self.splits[split]

    def episode(self, sample: Any) -> "AtOnce":
        return AtOnce(self.make_episode(sample))


class AtOnce:
    """An episode that can be played beside others of its kind: what takes long is done for all at the same time."""

    def __init__(self, episode: Any):
        self.episode = episode

    def reset(self) -> list[Message]:
        return self.episode.reset()

    def step(self, reply: str) -> str | None:
        return self.episode.step(reply)

    def outcome(self) -> Outcome:
        return self.episode.outcome()

    @staticmethod
    def resets(episodes: Sequence["AtOnce"]) -> list[list[Message]]:
        return together(AtOnce.reset, episodes)

    @staticmethod
    def steps(episodes: Sequence["AtOnce"], replies: Sequence[str]) -> list[str | None]:
        return together(AtOnce.step, episodes, replies)

    @staticmethod
    def outcomes(episodes: Sequence["AtOnce"]) -> list[Outcome]:
        return together(AtOnce.outcome, episodes)


def together(method: Callable, episodes: Sequence[AtOnce], *columns: Sequence[Any]) -> list[Any]:
    """What a method gives for each episode. After Ctrl-C, or an error in one, none begins and none waits any more."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        return list(pool.map(method, episodes, *columns))
    except BaseException:
        for one in episodes:
            if isinstance(one.episode, RemoteEpisode):
                one.episode.abandoned.set()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
