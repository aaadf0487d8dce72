"""Tasks: what earns the reward. One file a task.

    class Task(Protocol): samples(split) -> Sequence[Sample];  episode(sample) -> Episode
    class Episode(Protocol): reset() -> list[Message];  step(reply) -> str | None;  outcome() -> Outcome

The trainer knows nothing else about a task.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lora_ppo.chat import Message


@dataclass(frozen=True)
class Outcome:
    """How an episode ended: the verdict, the reward it earns, why, and what else is worth logging."""

    verdict: Literal["correct", "incorrect", "unknown"]
    reward: float
    why: str = ""
    details: dict[str, Any] = field(default_factory=dict)


class Episode(Protocol):
    """One try at a sample."""

    def reset(self) -> list[Message]:
        """The opening chat messages."""

    def step(self, reply: str) -> str | None:
        """The environment's next message to the policy's reply; None when the episode is over."""

    def outcome(self) -> Outcome:
        """The verdict, once `step` returned None."""


class Task(Protocol):
    """A source of samples and episodes."""

    def samples(self, split: Literal["train", "test"]) -> Sequence[Any]:
        """The samples of a split; "train" and "test" share nothing, and a seed gives the same ones every time."""

    def episode(self, sample: Any) -> Episode:
        """A fresh try at a sample of this task."""
