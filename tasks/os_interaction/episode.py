"""An episode at the shell: what the model is told, what its replies mean, what it is shown, and how it is judged.

Unknown is only what the policy can't have caused. Whatever else ends an episode, it is judged as its system stands.
"""

import json
import re
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ppo.chat import Message
from lora_ppo.episodes import Outcome
from lora_ppo.terminal import clean
from tasks.os_interaction.commands import Ran, SandboxFailed, in_short
from tasks.os_interaction.entries import Entry
from tasks.os_interaction.sandbox import Sandbox
from tasks.os_interaction.support import SETTING_UP, checked

RULES = """\
You work on a Linux system, as root. I give you a task; you do it with Bash commands.

In every turn, think first, then end with exactly one action.

To run commands, write them in one block:
Act: bash
```bash
your commands
```

When the task is done, write:
Act: finish

I show you what the commands print. Each block runs in a new shell: files stay, the working directory and variables \
don't. Use no command that waits for input. The task ends when you finish, or after {rounds} turns; then the system is \
checked."""
REWARDS = {"correct": 1.0, "incorrect": -0.5, "unknown": 0.0}
FINISH = "Act: finish"  # the reply that says that the task is done
MOST = 100_000  # bytes of commands
FENCE = re.compile(r"(`{3,})[ \t]*bash")


def bash_reply(commands: str) -> str:
    """The reply that runs commands, whatever they are: its fence is longer than those in them."""
    fence = max(["``", *re.findall("`+", commands)], key=len) + "`"
    return f"Act: bash\n{fence}bash\n{commands}\n{fence}"


@dataclass(frozen=True)
class Rules:
    """How long an episode may go on, what is shown of an output, and what is judged."""

    rounds: int = 5
    seconds: float = 20.0  # a command
    output_length: int = 1000  # characters of an observation
    judge: str = "stands"  # or "finished": only episodes that said so can be correct
    opening: tuple[Message, ...] = ()  # in place of RULES and "OK."
    record: Path | None = None  # the folder where episodes are written

    def messages(self, entry: Entry) -> list[Message]:
        """The chat that opens an episode: rules, "OK.", instruction."""
        rules = {"role": "user", "content": RULES.format(rounds=self.rounds)}
        opening = list(self.opening) or [rules, {"role": "assistant", "content": "OK."}]
        return [*opening, {"role": "user", "content": entry.instruction}]


def action(reply: str) -> str | None:
    """The commands that a reply runs; None where it says that the task is done. Raises ValueError, saying why not."""
    marks, blocks, fence = [], [], ""
    for line in reply.replace("\r\n", "\n").split("\n"):
        text = line.strip(" \t")
        if fence:  # in a block, up to a fence as long as its own
            fence = "" if text == fence else fence
            blocks[-1] += f"{line}\n" if fence else ""
        elif opening := FENCE.fullmatch(text):
            fence = opening[1]
            blocks.append("")
        elif text.startswith("Act:"):
            marks.append(text.removeprefix("Act:").strip(" \t"))
            blocks.clear()  # the commands come after it
    if fence:
        blocks.pop()  # it was never closed
    if len(marks) != 1:
        raise ValueError(f"found {len(marks) or 'no'} actions, expected one")
    if marks[0] == "finish":
        return None
    if marks[0] != "bash":
        raise ValueError(f"found the action {marks[0][:20]!r}, expected bash or finish")
    if len(blocks) != 1 or not blocks[0].strip():
        raise ValueError(f"found {len(blocks) or 'no'} blocks of commands after Act: bash, expected one")
    if "\0" in blocks[0]:
        raise ValueError("found a zero byte in the commands")
    if len(blocks[0].encode()) > MOST:  # characters that can't be encoded are a ValueError, too
        raise ValueError(f"found commands of more than {MOST} bytes")
    return blocks[0]


def observation(ran: Ran) -> str:
    """What the model is shown of a command: never control characters, and how much was left out."""
    text = clean(ran.output).strip("\n")
    if not text.strip() and not ran.left_out:
        return "The output of the OS is empty."
    cut = f"\n[{ran.left_out} more characters left out]" if ran.left_out else ""
    return f"The output of the OS:\n{text}{cut}"


def write_recording(path: Path, episode: "ShellEpisode") -> None:
    """Writes a judged episode as JSON, for `play --replay`. One that the disk does not take is only told of."""
    record = {"name": episode.entry.name, "instruction": episode.entry.instruction, "rounds": episode.shown}
    record |= {"verdict": episode.verdict.verdict, "why": episode.verdict.why}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1), encoding="ascii")
    except OSError as error:
        print(f"{path} can't be written: {error.strerror}", file=sys.stderr)


class ShellEpisode:
    """One try at an entry, in a sandbox of its own, which is gone once the outcome is known."""

    def __init__(self, entry: Entry, make: Callable[[], Sandbox], rules: Rules):
        self.entry, self.make, self.rules = entry, make, rules
        self.sandbox: Sandbox | None = None
        self.rounds, self.reason, self.broken, self.note = 0, "", "", ""
        self.shown: list[dict[str, Any]] = []  # each round's reply and what was answered, for a recording
        self.verdict: Outcome | None = None

    def reset(self) -> list[Message]:
        self.close()
        self.rounds, self.reason, self.broken, self.note, self.shown, self.verdict = 0, "", "", "", [], None
        try:
            self.sandbox = self.make()
            ran = self.sandbox.run(self.entry.start, SETTING_UP)
            if ran.status or ran.timed_out:
                self.broken = f"the start script failed ({in_short(ran)})"
        except SandboxFailed as failed:
            self.broken = f"the sandbox failed: {failed}"
        return self.rules.messages(self.entry)

    def step(self, reply: str) -> str | None:
        if self.broken or self.reason or self.sandbox is None:
            return None
        self.rounds += 1
        said = self.answered(reply)
        self.shown.append({"reply": reply, "said": said})
        if not self.reason and not self.broken and self.rounds >= self.rules.rounds:
            self.reason = "rounds"
        return None if self.reason or self.broken else said

    def answered(self, reply: str) -> str:
        """Carries out a reply; sets `reason` where that ends the episode."""
        try:
            commands = action(reply)
        except ValueError as error:
            self.reason, self.note = "invalid action", str(error)
            return f"No action: {error}."
        if commands is None:
            self.reason = "finished"
            return "Finished."
        try:
            ran = self.sandbox.run(commands, self.rules.seconds, self.rules.output_length)
        except SandboxFailed as failed:
            self.broken = f"the sandbox failed: {failed}"
            return self.broken
        if ran.timed_out:
            self.reason, self.note = "time-out", f"a command took more than {self.rules.seconds:g} s"
        return observation(ran)

    def outcome(self) -> Outcome:
        if self.verdict is None:
            if not self.broken and not self.reason:
                self.reason = "context"  # asked while it could have gone on: its next message found no room
            verdict, why = self.judged()
            details = {"reason": self.reason or "unknown", "rounds": self.rounds, "skills": list(self.entry.skills)}
            details |= {"level": self.entry.level} if self.entry.level else {}
            label = f"{verdict}, {self.reason}" if self.reason else verdict
            self.verdict = Outcome(verdict, REWARDS[verdict], why, details, label)
            self.close()
            if self.rules.record:
                name = re.sub(r"[^\w.-]", "_", self.entry.name)  # whoever wrote the entry chooses no folder
                write_recording(self.rules.record / f"{name}_{uuid.uuid4().hex[:8]}.json", self)
        return self.verdict

    def judged(self) -> tuple[str, str]:
        """The verdict, and why."""
        if self.broken or self.sandbox is None:
            return "unknown", self.broken or "it was never started"
        if self.rules.judge == "finished" and self.reason != "finished":
            return "incorrect", f"it did not finish: {self.reason}" + (f" ({self.note})" if self.note else "")
        try:
            found = checked(self.sandbox, self.entry)
        except SandboxFailed as failed:
            return "unknown", f"the check could not run: {failed}"
        how = f"{self.reason}: {self.note}" if self.note else self.reason
        if found.status == 0 and not found.timed_out:
            return "correct", f"the check passes ({how})"
        return "incorrect", f"the check fails, {in_short(found)} ({how})"

    def close(self) -> None:
        if self.sandbox is not None:
            self.sandbox.close()
            self.sandbox = None
