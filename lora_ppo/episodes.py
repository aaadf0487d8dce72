"""What a task is, and how a policy plays its episodes: chats become trajectories of tokens, of one reply or several.

A file in `tasks/` implements `Task` and `Episode`; training and evaluation know nothing else about it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from lora_ppo.chat import Message, encode_chat, encode_text
from lora_ppo.generate import Request, replies
from lora_ppo.policy import Policy
from lora_ppo.settings import ConfigError


@dataclass(frozen=True)
class Outcome:
    """How an episode ended: the verdict, the reward it earns, why, and what else is worth logging.

    `label` is the verdict in the task's own words, for a report.
    """

    verdict: Literal["correct", "incorrect", "unknown"]
    reward: float
    why: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    label: str = ""


class Episode(Protocol):
    """One try at a sample.

    A class whose episodes are played better together has static methods `resets(episodes)`, `steps(episodes, replies)`
    or `outcomes(episodes)`, too.
    """

    def reset(self) -> list[Message]:
        """The opening chat messages."""

    def step(self, reply: str) -> str | None:
        """The environment's next message to the policy's reply; None when the episode is over."""

    def outcome(self) -> Outcome:
        """The verdict, once `step` returned None or its message left no room in the context for another reply."""


class Task(Protocol):
    """A source of samples and episodes.

    It may have `in_order`, true where the training samples are a course, to be taken as they stand; and `scale`, a
    rewards.RunningScale, where rewards are a model's scores: training normalises them, and watches for what they miss.
    """

    def samples(self, split: Literal["train", "test"]) -> Sequence[Any]:
        """The samples of a split; "train" and "test" share nothing, and a seed gives the same ones every time."""

    def episode(self, sample: Any) -> Episode:
        """A fresh try at a sample of this task."""


@dataclass
class Trajectory:
    """An episode as tokens: the prompt, then the policy's replies and what the environment said between them."""

    prompt: list[int]
    response: list[int]
    chosen: list[bool]  # of the response: True where the policy chose the token
    replies: list[str]
    outcome: Outcome | None = None
    question: str = ""  # the last message of the prompt
    cut_off: bool = False  # whether its last reply ended at max_new_tokens

    @property
    def length(self) -> int:
        """Tokens that the policy wrote."""
        return sum(self.chosen)


def play(policy: Policy, episodes: Sequence[Episode], adapter: bool = True) -> list[Trajectory]:
    """Plays the episodes, all of one task, to their ends.

    One that outgrows the model's context ends with the reply that it has, and is judged: that is the policy's doing.
    Only where the opening leaves no room for a first reply it is unknown.
    """
    tokenizer = policy.tokenizer
    trajectories = []
    for messages in at_once(episodes, "reset"):
        trajectories.append(Trajectory(encode_chat(tokenizer, messages), [], [], [], question=messages[-1]["content"]))
        if room(policy, trajectories[-1]) < 0:
            set_aside(policy, trajectories[-1])
    active = [i for i, trajectory in enumerate(trajectories) if trajectory.outcome is None]
    while active:
        contexts = [trajectories[i].prompt + trajectories[i].response for i in active]
        written = replies(policy, [Request(context, policy.config.temperature, adapter) for context in contexts])
        for i, ids in zip(active, written, strict=True):
            trajectory = trajectories[i]
            trajectory.response += ids
            trajectory.chosen += [True] * len(ids)
            trajectory.cut_off = ids[-1] not in policy.stop_ids
            trajectory.replies.append(policy.text(ids))
        answers = at_once([episodes[i] for i in active], "step", [trajectories[i].replies[-1] for i in active])
        finished = []
        for i, ids, said in zip(active, written, answers, strict=True):
            trajectory = trajectories[i]
            said_ids = [] if said is None else environment_ids(policy, said, ids[-1] in policy.stop_ids)
            if said is None or room(policy, trajectory) < len(said_ids):
                finished.append(i)
            else:
                trajectory.response += said_ids
                trajectory.chosen += [False] * len(said_ids)
        for i, outcome in zip(finished, judge([episodes[i] for i in finished]), strict=True):
            trajectories[i].outcome = outcome
        active = [i for i in active if i not in finished]
    return trajectories


def at_once(episodes: Sequence[Episode], name: str, *columns: Sequence[Any]) -> list[Any]:
    """What each episode's method gives: all at once where their class has it in the plural (`outcomes(episodes)`)."""
    together = getattr(type(episodes[0]), f"{name}s", None) if episodes else None
    if together:
        return together(episodes, *columns)
    return [getattr(episode, name)(*row) for episode, *row in zip(episodes, *columns, strict=True)]


def judge(episodes: Sequence[Episode]) -> list[Outcome]:
    """The outcomes of finished episodes."""
    return at_once(episodes, "outcome")


def room(policy: Policy, trajectory: Trajectory) -> int:
    """Tokens that the model's context has left beside another reply; negative where that does not fit."""
    return policy.context - len(trajectory.prompt) - len(trajectory.response) - policy.config.max_new_tokens


def set_aside(policy: Policy, trajectory: Trajectory) -> None:
    """Ends an episode whose prompt doesn't fit, as unknown. The row that is left of it takes part in nothing."""
    needed = policy.context - room(policy, trajectory)
    why = f"{needed} tokens do not fit into the model's context of {policy.context}"
    trajectory.outcome = Outcome("unknown", 0.0, why)
    trajectory.prompt, trajectory.response, trajectory.chosen = trajectory.prompt[:1], [policy.pad_id], [False]


def environment_ids(policy: Policy, text: str, ended: bool) -> list[int]:
    """The tokens between two replies: the environment's `text` as the next message of the chat.

    They are what the chat template puts after a reply's end token, that token included unless the reply `ended` with
    it. The replies themselves stay the tokens that were sampled; nothing is tokenized a second time.
    """
    tokenizer = policy.tokenizer
    if not tokenizer.chat_template:
        return encode_text(tokenizer, f"\n\n{text}\n\n")
    opening = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    before = encode_chat(tokenizer, opening)
    after = encode_chat(tokenizer, [*opening, {"role": "user", "content": text}])
    same = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), len(before))
    ends = [i for i in range(same) if after[i] in policy.stop_ids]
    if not ends:
        raise ConfigError("this model's chat template ends replies with no stop token: several turns are not possible")
    return after[ends[-1] + ended :]
