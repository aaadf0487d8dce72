"""A run's turns in memory: those that wait for their step, what undoing goes back to, and how they are taken again."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_ppo.forward import Batch, collate
from lora_ppo.journal import Entry, turn_seed
from lora_ppo.policy import Policy, Snapshot
from lora_ppo.settings import ConfigError, Settings
from lora_ppo.step import Foresight, StepSkipped, out_of_memory, ppo_step


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


class Unrepeatable(Exception):
    """A line of the journal that can't be done again; the message says which and why."""


class UndoneLater(Unrepeatable):
    """It undoes a step that the checkpoint holds: an earlier one is needed."""


class Turns:
    """A policy in training: its turns, steps and undo."""

    def __init__(self, policy: Policy, config: Settings):
        self.policy, self.config = policy, config
        self.turn = 0  # the number of the turn to come
        self.pending: list[Turn] = []  # answered, waiting for batch_size of them
        self.undo_snapshot: Snapshot | None = None
        self.undo_config = config  # that was in force when it was taken
        self.taken_turns = 0  # by the step that the snapshot precedes
        self.simulation: dict[str, Any] | None = None  # where a simulated learner is (terminal.SimulatedLearner)

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
        self.undo_snapshot, self.undo_config = before, self.policy.config
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

    def undo_in_memory(self) -> int:
        """Undoes the last waiting turn, or else the last step, in memory; returns how many turns that were."""
        if self.pending:
            self.pending.pop()
            return 1
        if self.undo_snapshot is None:
            return 0
        now, self.policy.config = self.policy.config, self.undo_config
        self.policy.restore(self.undo_snapshot)
        self.policy.configure(now)  # settings that changed since then stay changed
        self.undo_snapshot = None
        return self.taken_turns

    def replay(self, entries: Iterable[Entry], early: bool = False) -> Iterator[Entry]:
        """Does the journal's lines again, each turn under the settings it was taken with; yields each that is done.

        `early` allows for turns before the one that is due, at the beginning alone: checkpoints of old versions counted
        turns in that still waited for their step. Raises Unrepeatable.
        """
        for entry in entries:
            try:
                if entry.turn >= 0:
                    if entry.turn != self.turn and not (early and entry.turn < self.turn):
                        raise Unrepeatable(f"is of turn {entry.turn}, where turn {self.turn} is due")
                    early = False
                self.redo(entry.record)
            except Unrepeatable as error:
                raise type(error)(f"line {entry.number} {error}") from None
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
                if out_of_memory(error) or isinstance(error, ConfigError):
                    raise
                raise Unrepeatable(f"line {entry.number} can't be done again ({error})") from None
            self.simulation = entry.record.get("simulation")
            yield entry

    def redo(self, record: dict[str, Any]) -> None:
        """Does again what a line of the journal stands for."""
        kind = record["type"]
        if kind == "settings":
            then = {name: value for name, value in record["settings"].items() if name in STEP_SETTINGS}
            self.policy.configure(replace(self.config, **then))
        elif kind == "undo":
            if not self.undo_in_memory():
                raise UndoneLater("undoes a step that is in the checkpoint")
        elif kind == "passed":
            self.turn = record["number"] + 1
        elif kind == "turn":
            turn = Turn(**{name: record[name] for name in ("number", "prompt_ids", "response_ids", "reward")})
            self.pending.append(turn)
            try:
                if record["outcome"] != "pending":
                    self.redo_step(record["outcome"])
            except BaseException:
                self.pending.remove(turn)
                self.undo_snapshot = None
                raise
            self.turn = turn.number + 1
        elif kind != "start":
            raise Unrepeatable(f"is of type {kind!r}, which is unknown")

    def redo_step(self, outcome: str) -> None:
        """What a turn's step did: `taken` steps are computed, the others left no trace in the weights."""
        self.undo_snapshot = None if outcome == "skipped" else self.policy.snapshot()
        self.undo_config = self.policy.config
        if outcome == "taken":
            try:
                ppo_step(self.policy, *self.step_inputs())
            except StepSkipped as skipped:
                raise ConfigError(f"a step of the journal can't be taken again: {skipped}") from None
        elif outcome == "undone":
            self.policy.step += 1
        self.taken_turns = len(self.pending)
        self.pending.clear()
