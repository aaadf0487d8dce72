"""Says which entries the sandbox supports, by running all start scripts, checks and ground truths once.

    python -m tasks.os_interaction.check DIR [--again] [--sandbox docker --image NAME]

Those that don't hold are listed by name, with the reason; the last line counts. The result is kept: training and
evaluation leave the same ones out. Exit status: 0, or 2 where the sandbox or the entries can't be used.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence

from lora_ppo.settings import ConfigError
from lora_ppo.streams import run_program
from lora_ppo.terminal import clean, program
from tasks.os_interaction.commands import SandboxFailed
from tasks.os_interaction.entries import read_entries
from tasks.os_interaction.probe import KINDS, sandbox_maker
from tasks.os_interaction.support import left_out


@program
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tasks.os_interaction.check", description=__doc__.split("\n")[0])
    parser.add_argument("entries", help="folder or file of entries")
    parser.add_argument("--again", action="store_true", help="run them all, whatever was found before")
    parser.add_argument("--sandbox", choices=KINDS, default="namespaces")
    parser.add_argument("--image", default="", help="with --sandbox docker")
    parser.add_argument("--i-understand", action="store_true", help="with --sandbox none")
    words = parser.parse_args(arguments)
    try:
        entries = read_entries(words.entries)
        make = sandbox_maker(words.sandbox, words.image, words.i_understand, say=lambda text: print(text, flush=True))
        with told(len(entries)) as done:
            reasons = left_out(entries, make, words.sandbox + words.image, done, words.again)
    except SandboxFailed as error:
        raise ConfigError(str(error)) from None
    for name, why in reasons.items():
        print(f"left out: {clean(f'{name}: {why}')}")
    wrong = sum(why.startswith("the untouched start") for why in reasons.values())
    print(f"{wrong} untouched starts pass")
    print(f"{len(entries) - len(reasons)} of {len(entries)} entries are supported")
    return 0


@contextlib.contextmanager
def told(count: int):
    """What tells at a terminal how far it is."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    yield lambda done: print(f"\r{done} of {count}", end="" if done < count else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
