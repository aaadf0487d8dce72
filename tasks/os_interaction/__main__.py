"""Be the model yourself, or look at an episode again.

    python -m tasks.os_interaction play ID [--entries DIR] [--record FILE]     an entry, in the sandbox that models get
    python -m tasks.os_interaction play --replay FILE                          an episode that was recorded
    python -m tasks.os_interaction play --list                                 the entries there are

At the prompt, a line is a command, and `finish` (or Ctrl-D) says that the task is done. train.py and evaluate.py record
episodes with record_dir=DIR.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_ppo.settings import ConfigError
from lora_ppo.streams import run_program
from lora_ppo.terminal import clean, program
from tasks.os_interaction.entries import OWN, read_entries
from tasks.os_interaction.episode import FINISH, Rules, ShellEpisode, action, bash_reply, write_recording
from tasks.os_interaction.probe import KINDS, sandbox_maker

COLOURS = {"instruction": "bold", "commands": "cyan", "output": "dim", "correct": "green", "incorrect": "red"}


def show(text: str, kind: str = "output") -> None:
    """Prints text of anybody's, in the colour of its kind, and never as control codes or markup."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    console.print(clean(text).rstrip("\n"), style=COLOURS.get(kind) or None)


def show_reply(reply: str) -> None:
    """A reply: what it says, and its commands as they are typed."""
    try:
        commands = action(reply)
    except ValueError as error:
        show(f"{reply}\n({error})")
        return
    show(
        "# finish" if commands is None else "\n".join(f"# {line}" for line in commands.strip().splitlines()), "commands"
    )


def replay(file: str) -> None:
    """Shows a recorded episode. Raises ConfigError."""
    try:
        record: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
        show(f"{record['name']}: {record['instruction']}", "instruction")
        for one in record["rounds"]:
            show_reply(one["reply"])
            show(one["said"])
        show(f"{record['verdict']}: {record['why']}", record["verdict"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: {error!r}; expected a file that --record or record_dir wrote") from None


def play(words: argparse.Namespace) -> None:
    """Plays an entry with a person in the model's place. Raises ConfigError."""
    entries = {entry.name: entry for entry in read_entries(words.entries)}
    if words.list:
        for entry in entries.values():
            show(f"{entry.name}\t{entry.level}\t{entry.instruction}")
        return
    if words.name not in entries:
        raise ConfigError(f"there is no entry {words.name!r}: --list shows them")
    make = sandbox_maker(words.sandbox, words.image, words.i_understand)
    episode = ShellEpisode(entries[words.name], make, Rules(rounds=words.rounds))
    show(episode.reset()[-1]["content"], "instruction")
    said: str | None = ""
    while said is not None and not episode.broken:
        try:
            line = input("# ")
            line.encode()
        except EOFError:
            line = "finish"
        except UnicodeError:
            show("found bytes that are not UTF-8, expected text")
            continue
        if line.strip():
            finished = line.strip() == "finish"
            said = episode.step(FINISH if finished else bash_reply(line))
            if episode.shown and not finished:
                show(episode.shown[-1]["said"])
    outcome = episode.outcome()
    show(f"{outcome.verdict}: {outcome.why}", outcome.verdict)
    if words.record:
        write_recording(Path(words.record), episode)


@program
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.os_interaction", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["play"])
    parser.add_argument("name", nargs="?", default="", help="an entry's name")
    parser.add_argument("--entries", default=str(OWN), help="folder or file of entries")
    parser.add_argument("--list", action="store_true", help="show the entries")
    parser.add_argument("--replay", metavar="FILE", help="show a recorded episode")
    parser.add_argument("--record", metavar="FILE", help="write the episode")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--sandbox", choices=KINDS, default="namespaces")
    parser.add_argument("--image", default="", help="with --sandbox docker")
    parser.add_argument("--i-understand", action="store_true", help="with --sandbox none")
    words = parser.parse_args(arguments)
    replay(words.replay) if words.replay else play(words)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_program(main))
