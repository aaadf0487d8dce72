"""A run's life on disk: turns, undo, checkpoints, and what comes back after a crash."""

import contextlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_ppo.checkpoint import Damaged, checkpoints, load_checkpoint, remove_folder, save_checkpoint
from lora_ppo.forward import Batch, collate
from lora_ppo.journal import LineFile, now, turn_seed
from lora_ppo.policy import Policy, Snapshot
from lora_ppo.settings import ConfigError, Settings, save_yaml
from lora_ppo.step import Foresight, StepSkipped, out_of_memory, ppo_step


def is_right(line: dict[str, Any]) -> bool:
    """Whether a log line is of a right choice. Lines of earlier versions say it by the reward's sign alone."""
    return line.get("right", line["reward"] > 0)


def users_folder(folder: str, user: str) -> Path:
    """Where a person's files are: `folder` itself, or with a name one of their own in it."""
    return Path(folder) / "users" / user if user else Path(folder)


@dataclass
class Turn:
    """A finished turn: what was said, and the reward it earned."""

    number: int
    prompt_ids: list[int]
    response_ids: list[int]
    reward: float


# The settings on which the outcome of a PPO step depends; the journal keeps them for replaying steps.
STEP_SETTINGS = (
    "temperature learning_rate batch_size ppo_epochs cliprange cliprange_value vf_coef entropy_coef gamma lam "
    "lora_dropout kl_coef adaptive_kl kl_target kl_horizon target_kl max_grad_norm seed"
).split()


class Run:
    """A policy in training and its life on disk: turns, steps, undo, checkpoints, journal and log.

    Every finished turn is in the journal before it is acknowledged; a checkpoint says up to where the journal is in it.
    So after a crash the newest whole checkpoint, and the turns after it replayed, give the state that was.
    `notice` is told what a person should know; a disk that refuses costs a notice, never the session.
    """

    def __init__(self, policy: Policy, config: Settings, notice: Callable[[str], None]):
        self.policy, self.config, self.notice = policy, config, notice
        self.root = users_folder(config.checkpoint_dir, config.user)
        self.log = LineFile(users_folder(config.log_dir, config.user) / "run.log")
        self.turn = 0  # the number of the turn to come
        self.pending: list[Turn] = []  # answered, waiting for batch_size of them
        self.undo_snapshot: Snapshot | None = None
        self.taken_turns = 0  # by the step that the snapshot precedes
        self.saved_step = -1
        self.no_quiz: list[str] = []  # why the tries at a quiz on the last question failed
        self.covered = 0  # bytes of the journal that the policy's weights contain
        self.lock = None
        with self.surviving("open the checkpoint folder"):
            self.take_lock()
        self.folder = self.newest_run()
        self.journal = LineFile(self.folder / "journal.jsonl")
        self.resume()

    def take_lock(self) -> None:
        """Keeps a second tutor out of the same folder. Raises ConfigError if there is one."""
        import filelock

        self.root.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.root / ".lock")
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise ConfigError(
                f"another tutor is using {self.root}: stop it, or set checkpoint_dir to another folder"
            ) from None

    def newest_run(self) -> Path:
        """The first run lives in checkpoint_dir itself, later ones in `run_2`, `run_3`, ... beneath it."""
        numbers = [int(m[1]) for p in self.root.glob("run_*") if (m := re.fullmatch(r"run_(\d+)", p.name))]
        return self.root / f"run_{max(numbers)}" if numbers else self.root

    def begin_new_run(self) -> None:
        """Moves on to a folder where no run has been, so that no earlier one is touched."""
        if checkpoints(self.folder) or self.journal.size:
            number = int(self.folder.name[4:]) + 1 if self.folder != self.root else 2
            self.folder = self.root / f"run_{number}"
            self.journal = LineFile(self.folder / "journal.jsonl")

    def resume(self) -> None:
        """Puts the policy where `config.resume` says, and starts what comes: the old run goes on, or a new one."""
        if self.config.resume == "auto":
            if checkpoints(self.folder) or self.journal.size:
                self.resume_newest()
        else:
            if self.config.resume != "none":
                try:
                    self.turn = load_checkpoint(Path(self.config.resume), self.policy, self.notice).get("turn", 0)
                except Damaged as error:
                    expected = "expected auto, none, or the folder of a whole checkpoint"
                    raise ConfigError(f"resume={self.config.resume}: {error}; {expected}") from None
            self.begin_new_run()
        self.policy.configure(self.config)
        if not checkpoints(self.folder):
            self.save()  # what the journal starts from
        settings = {name: getattr(self.config, name) for name in STEP_SETTINGS}
        self.record({"type": "settings", "settings": settings})

    def resume_newest(self) -> None:
        """Loads the newest whole checkpoint from which the journal can be replayed, and replays it."""
        with self.surviving("clear up after a crash"):
            for hidden in self.folder.glob(".step_*"):  # what a crash in the middle of a save left
                if hidden.suffix == ".old" and not (whole := self.folder / hidden.stem[1:]).exists():
                    hidden.rename(whole)
                shutil.rmtree(hidden, ignore_errors=True)
        reasons = []
        for folder in checkpoints(self.folder):
            try:
                state = load_checkpoint(folder, self.policy, self.notice)
                self.turn, self.covered = state["turn"], state["journal_offset"]
                self.saved_step = self.policy.step
                then = {name: value for name, value in state["config"].items() if name in STEP_SETTINGS}
                self.policy.configure(replace(self.config, **then))
                self.replay(state["journal_offset"])
                break
            except Damaged as error:
                reasons.append(f"{folder.name}: {error}")
                self.notice(f"{folder.name} can't be used ({error}); trying the one before it.")
        else:
            raise ConfigError(
                f"{self.folder} holds no whole checkpoint ({'; '.join(reasons) or 'none at all'}): "
                "set resume=none for a new run beside it"
            )

    def replay(self, offset: int) -> None:
        """Replays the journal's turns from byte `offset` on, each under the settings it was taken with."""
        size = self.journal.size
        records = self.journal.read(offset)
        if self.journal.size < max(size, offset):
            self.notice(
                "The journal's last line was half-written and has been dropped; that turn had not been confirmed."
            )
        if self.journal.size < offset:
            raise Damaged("the journal is shorter than the checkpoint says")
        self.pending.clear()
        self.undo_snapshot = None
        turns = sum(record["type"] == "turn" for record in records)
        if turns:
            self.notice(f"Replaying {turns} turn{'s' * (turns > 1)} from the journal.")
        for record in records:
            if record["type"] == "settings":
                self.policy.configure(replace(self.config, **record["settings"]))
            elif record["type"] == "undo":
                if not self.undo_in_memory():
                    raise Damaged("its last step was undone later")
            elif record["type"] == "passed":
                self.turn = record["number"] + 1
            else:
                turn = Turn(**{name: record[name] for name in ("number", "prompt_ids", "response_ids", "reward")})
                self.pending.append(turn)
                self.turn = turn.number + 1
                if record["outcome"] != "pending":
                    self.replay_step(record["outcome"])
        self.settle()
        self.complete_log([record["log"] for record in records if "log" in record])

    def replay_step(self, outcome: str) -> None:
        """What a turn's step did, done again: `taken` steps are computed, the others left no trace in the weights."""
        self.undo_snapshot = None if outcome == "skipped" else self.policy.snapshot()
        if outcome == "taken":
            try:
                ppo_step(self.policy, *self.step_inputs())
            except StepSkipped as skipped:
                raise ConfigError(f"a step of {self.journal.path} can't be replayed: {skipped}") from None
        elif outcome == "undone":
            self.policy.step += 1
        self.taken_turns = len(self.pending)
        self.pending.clear()

    def complete_log(self, lines: list[dict[str, Any]]) -> None:
        """Adds the lines that a crash kept from the log. Not their time tells them apart: a clock may stand still."""
        with self.surviving("complete the log"):
            there = Counter(map(json.dumps, self.log.read()))
            for line in map(json.dumps, lines):
                if there[line]:
                    there[line] -= 1
                else:
                    self.log.append(json.loads(line))

    def batch(self, turns: Sequence[Turn]) -> Batch:
        prompts, responses = ([getattr(turn, name) for turn in turns] for name in ("prompt_ids", "response_ids"))
        return collate(prompts, responses, self.policy.pad_id, self.policy.device)

    def foresee(self, turn: Turn) -> Foresight | None:
        """Begins to compute both outcomes of a turn whose reward is not known yet, if it is to lead to a step."""
        config = self.config
        if not config.precompute or config.lora_dropout or len(self.pending) + 1 < config.batch_size:
            return None
        try:
            earlier, rewards = [turn.reward for turn in self.pending], (config.reward_right, config.reward_wrong)
            return Foresight(self.policy, self.batch([*self.pending, turn]), earlier, rewards)
        except (MemoryError, RuntimeError):  # no memory for it: the plain step will do
            return None

    def collect(self, turn: Turn, before: Snapshot | None = None) -> bool:
        """Adds a turn to those that wait for their step; says whether they are batch_size now.

        Then `undo_snapshot`, which is `before` if there is one, is what /undo goes back to. Where there is no memory
        for it, the step finds out.
        """
        self.pending.append(turn)
        if len(self.pending) < self.config.batch_size:
            return False
        self.undo_snapshot = before
        try:
            self.undo_snapshot = before or self.policy.snapshot()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
        return True

    def step_inputs(self) -> tuple[Batch, list[float], Snapshot | None]:
        """What `ppo_step` takes: the waiting turns as a batch, their rewards, the snapshot. Seeds dropout's draws."""
        import torch

        torch.manual_seed(turn_seed(self.policy.config.seed, self.pending[-1].number) ^ 1)
        return self.batch(self.pending), [turn.reward for turn in self.pending], self.undo_snapshot

    def finish_turn(self, turn: Turn, line: dict[str, Any]) -> dict[str, Any]:
        """Makes a turn durable, and what was learned from it; returns its log line, complete.

        `outcome` in `line` is `taken`, `undone` (beyond the trust region), `skipped` (with `why`) or `pending`.
        """
        outcome = line["outcome"]
        if outcome == "skipped":
            self.undo_snapshot = None
        self.turn = turn.number + 1
        line = {"timestamp": now(), "step": self.policy.step, "turn": turn.number} | line | {"reward": turn.reward}
        self.record({"type": "turn"} | asdict(turn) | {"outcome": outcome, "log": line})
        if outcome != "pending":
            self.taken_turns = len(self.pending)
            self.pending.clear()
        self.settle()
        with self.surviving("write the log"):
            self.log.append(line)
        if outcome in ("taken", "undone") and self.policy.step % self.config.save_every == 0:
            self.save()
        return line

    def abandon(self, number: int) -> None:
        """Ends turn `number` if it was not finished: it has no reward, and the next one has another number."""
        if self.turn == number:
            self.pending = [turn for turn in self.pending if turn.number != number]
            self.turn = number + 1
            self.record({"type": "passed", "number": number})
            self.settle()

    def undo_in_memory(self) -> int:
        """Undoes the last waiting turn, or else the last step, in memory; returns how many turns that were."""
        if self.pending:
            self.pending.pop()
            return 1
        if self.undo_snapshot is None:
            return 0
        self.policy.restore(self.undo_snapshot)
        self.policy.configure(self.policy.config)  # settings that changed since then stay changed
        self.undo_snapshot = None
        return self.taken_turns

    def undo(self) -> bool:
        """Undoes the last step, exactly, in memory and on disk; False if there is none."""
        step = self.policy.step
        turns = self.undo_in_memory()
        if not turns:
            return False
        line = {"timestamp": now(), "step": step, "undo": turns}
        self.record({"type": "undo", "log": line})
        self.settle()
        with self.surviving("write the log"):
            self.log.append(line)
        with self.surviving("replace the checkpoint that holds the undone step"):
            stale = [p for p in checkpoints(self.folder) if int(p.name[5:]) > self.policy.step]
            if stale and self.save():
                for folder in stale:
                    remove_folder(folder)
        return True

    def settle(self) -> None:
        """Notes that the weights contain the journal up to here, unless turns are waiting for their step."""
        if not self.pending:
            self.covered = self.journal.size

    def save(self) -> bool:
        """Writes a checkpoint and removes those beyond keep_checkpoints, oldest first."""
        with self.surviving("save a checkpoint"):
            state = {"turn": self.turn, "journal_offset": self.covered, "log_offset": self.log.size}
            state["rng"] = {"seed": self.config.seed, "turn": self.turn}  # every turn's generator is seeded from these
            self.journal.flush()
            save_checkpoint(self.folder / f"step_{self.policy.step}", self.policy, state, self.result())
            self.saved_step = self.policy.step
            save_yaml(self.config, self.folder / "effective_config.yaml")
            for folder in checkpoints(self.folder)[self.config.keep_checkpoints :]:
                remove_folder(folder)
            return True
        return False

    def result(self) -> str:
        """How the run went, in a sentence, for the model card."""
        right = [is_right(line) for line in self.history()]
        return f"{sum(right)} of {len(right)} quizzes were answered right." if right else "No quiz was answered yet."

    def history(self) -> list[dict[str, Any]]:
        """The log lines of this run's turns, in order, without those undone."""
        lines: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, Damaged):
            for line in [*self.log.read(), *map(json.loads, self.log.unwritten)]:
                if line.get("undo"):
                    del lines[-line["undo"] :]
                else:
                    if lines and line["turn"] <= lines[-1]["turn"]:  # a new run begins
                        lines.clear()
                    lines.append(line)
        return lines

    def record(self, record: dict[str, Any]) -> None:
        with self.surviving("write the journal"):
            self.journal.append(record)

    @contextlib.contextmanager
    def surviving(self, task: str) -> Iterator[None]:
        """The disk's refusals become notices in here."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, SafetensorError, Damaged) as error:
            self.notice(f"Could not {task} ({error}). The session goes on; what can't be written is kept in memory.")

    def close(self) -> None:
        if self.lock:
            self.lock.release()
