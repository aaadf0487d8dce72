"""A run's life on disk: its beginning, turns, undo, checkpoints."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_ppo.checkpoint import Damaged, checkpoints, load_checkpoint, remove_folder, save_checkpoint
from lora_ppo.journal import Journal, now
from lora_ppo.policy import Policy
from lora_ppo.recovery import Recovery
from lora_ppo.settings import ConfigError, Settings, save_yaml
from lora_ppo.turns import STEP_SETTINGS, Turn


def is_right(line: dict[str, Any]) -> bool:
    """Whether a log line is of a right choice. Lines of earlier versions say it by the reward's sign alone."""
    return line.get("right", line["reward"] > 0)


class Run(Recovery):
    """A policy in training and its life on disk: turns, steps, undo, checkpoints, journal and log.

    Every finished turn is in the journal before it is acknowledged; a checkpoint names the journal's last line that is
    in it. So after a crash the newest whole checkpoint, and the turns after it replayed, give the state that was.
    A disk that refuses costs a notice, never the session.
    """

    def __init__(self, policy: Policy, config: Settings, notice: Callable[[str], None]):
        super().__init__(policy, config, notice)
        self.no_quiz: list[str] = []  # why the tries at a quiz on the last question failed
        self.resume()

    def resume(self) -> None:
        """Puts the policy where `config.resume` says, and starts what comes: the old run goes on, or a new one."""
        config = self.config
        there = checkpoints(self.folder) or self.journal.size
        if config.resume == "auto" and there:
            if not self.recover():
                self.start_journal()
        else:
            fresh = config.resume in ("auto", "none")
            if not fresh:
                try:
                    self.turn = load_checkpoint(Path(config.resume), self.policy, self.notice).get("turn", 0)
                except Damaged as error:
                    expected = "expected auto, none, or the folder of a whole checkpoint"
                    raise ConfigError(f"resume={config.resume}: {error}; {expected}") from None
            if there:
                self.disk.move_on()
                self.journal = Journal(self.folder / "journal.jsonl")
            self.start_journal(self.origin() if fresh else None)
        self.policy.configure(config)
        if self.saved_step < 0:
            self.save()  # what the journal starts from
        settings = {name: getattr(config, name) for name in STEP_SETTINGS}
        if config.learner != "simulated":
            self.simulation = None  # a person ends it
        self.record({"type": "settings", "settings": settings, "faults": sorted(self.faults)})
        self.safe_step = self.policy.step
        self.settle()
        with self.surviving("write the settings"):
            save_yaml(config, self.folder / "effective_config.yaml")

    def start_journal(self, origin: dict[str, Any] | None = None) -> None:
        """The line with which a run begins, or goes on after a gap. The next line takes it to disk."""
        self.anchored = self.anchored or origin is not None
        self.journal.add({"type": "start", "run": self.id, "turn": self.turn, "from": origin})
        self.settle()

    def finish_turn(self, turn: Turn, line: dict[str, Any]) -> dict[str, Any]:
        """Makes a turn durable, and what was learned from it; returns its log line, complete.

        `outcome` in `line` is `taken`, `undone` (beyond the trust region), `skipped` (with `why`) or `pending`.
        """
        outcome = line["outcome"]
        if outcome == "skipped":
            self.undo_snapshot = None
        self.turn = turn.number + 1
        line = {"timestamp": now(), "step": self.policy.step, "turn": turn.number} | line | {"reward": turn.reward}
        self.unsafe = True
        self.record({"type": "turn"} | asdict(turn) | {"outcome": outcome, "log": line})
        if outcome != "pending":
            self.taken_turns = len(self.pending)
            self.pending.clear()
        self.settle()
        self.write_log(line)
        if outcome in ("taken", "undone") and self.policy.step % self.config.save_every == 0:
            self.save()
        return line

    def abandon(self, number: int, again: bool = False) -> None:
        """Ends turn `number` if it was not finished: it has no reward, and the next one has another number.

        With `again` the session ends, and the next one begins with this turn.
        """
        if self.turn == number:
            self.pending = [turn for turn in self.pending if turn.number != number]
            if again:
                return
            self.turn = number + 1
            self.record({"type": "passed", "number": number})
            self.settle()

    def undo(self) -> bool:
        """Undoes the last step, exactly, in memory and on disk; False if there is none."""
        step = self.policy.step
        turns = self.undo_in_memory()
        if not turns:
            return False
        line = {"timestamp": now(), "step": step, "undo": turns}
        self.unsafe = True
        self.record({"type": "undo", "log": line})
        self.settle()
        self.write_log(line)
        with self.surviving("replace the checkpoint that holds the undone step"):
            stale = [p for p in self.disk.usable() if int(p.name[5:]) > self.policy.step]
            if stale and self.save():
                for folder in stale:
                    remove_folder(folder)
        return True

    def record(self, record: dict[str, Any]) -> None:
        """Makes a line of the journal durable."""
        self.journal.add(record | ({"simulation": dict(self.simulation)} if self.simulation else {}))
        with self.surviving("write the journal"):
            self.disk.write(self.journal.flush)

    def write_log(self, line: dict[str, Any]) -> None:
        self.remember(line)
        self.log.add(line)
        with self.surviving("write the log"):
            self.disk.write(self.log.flush)

    def save(self) -> bool:
        """Writes a checkpoint and removes those beyond keep_checkpoints, oldest first."""
        folder, saved = self.folder / f"step_{self.policy.step}", False
        with self.surviving("save a checkpoint"):
            state = self.covered | {"unlogged": [json.loads(line) for line in self.log.unwritten]}
            state["rng"] = {"seed": self.config.seed, "turn": self.covered["turn"]}  # every draw follows from these
            self.disk.save(folder, lambda: save_checkpoint(folder, self.policy, state, self.result()))
            self.saved_step, self.anchored, saved = self.policy.step, True, True
        with contextlib.suppress(OSError):  # `record` has said so; a checkpoint may be taken where a journal isn't
            self.journal.flush()
        if (saved and not self.pending) or (self.anchored and not self.journal.unwritten):
            self.safe_step, self.unsafe = self.policy.step, False
        if saved:
            with self.surviving("save the settings, or remove old checkpoints"):
                save_yaml(self.config, self.folder / "effective_config.yaml")
                self.disk.prune(self.config.keep_checkpoints)
        return saved

    def result(self) -> str:
        """How the run went, in a sentence, for the model card."""
        right = [is_right(line) for line in self.lines]
        return f"{sum(right)} of {len(right)} quizzes were answered right." if right else "No quiz was answered yet."

    def history(self) -> list[dict[str, Any]]:
        """The log lines of this run's turns, in order, without those undone."""
        return list(self.lines)
