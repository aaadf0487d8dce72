"""A voice: a reward model scores replies, topic by topic. Measured apart from it, by rules (tasks/voice_rules.py).

The reward is the score less the mean of all scores so far, in units of their standard deviation, clipped; `correct` is
a reply that is in the voice by the rules. Prompts come in the order of their topics, so many steps on each, or mixed.
Held out are whole topics.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_ppo.chat import Message
from lora_ppo.episodes import Outcome, Task
from lora_ppo.policy import Policy
from lora_ppo.rewards import RewardModel, RunningScale, check_reward_model, load_reward_model
from lora_ppo.settings import ConfigError, Settings, setting
from lora_ppo.trainer import shuffled
from tasks.pairs import read_objects, text
from tasks.voice_rules import in_voice, keeps

DATA = Path(__file__).resolve().parents[1] / "data" / "voice"


@dataclass
class TaskSettings(Settings):
    reward_model: str = setting(
        "",
        "folder of a reward adapter on the same base (tools/train_reward_model.py), or a sequence classifier with one "
        "output, by folder or name",
        group="the voice task",
    )
    topics: str = setting(
        "",
        "folder with train.jsonl and test.jsonl, objects with topic, prompt and, if known, fact; or a YAML file, "
        "topic: prompts, of which a test_share of the topics is held out; empty: data/voice",
        split=True,
    )
    topic_order: str = setting(
        "sequence", "sequence: steps_per_topic steps on each, in order; mixed: all topics at once"
    )
    steps_per_topic: int = setting(50, "steps on each topic (topic_order=sequence)")
    score_clip: float = setting(5.0, "how far a normalised score may be from 0")


@dataclass(frozen=True)
class Sample:
    """A prompt of a topic, and words of which a reply that keeps the facts has one."""

    topic: str
    prompt: str
    fact: tuple[str, ...] = ()


def prepare(config: Any) -> Callable[[Policy], Task]:
    """Reads the topics now, before any model is loaded; what it returns builds the task. Raises ConfigError."""
    if config.topic_order not in ("sequence", "mixed"):
        raise ConfigError(f"topic_order={config.topic_order} is unknown: expected sequence or mixed")
    if config.steps_per_topic < 1:
        raise ConfigError(f"steps_per_topic={config.steps_per_topic} is out of range: expected at least 1")
    if not config.score_clip > 0:
        raise ConfigError(f"score_clip={config.score_clip:g} is out of range: expected above 0")
    check_reward_model(config.reward_model)
    splits = load_topics(config.topics, config.test_share)
    in_order = config.topic_order == "sequence"
    if in_order:
        splits["train"] = course(splits["train"], config.steps_per_topic * config.prompts_per_step, config.seed)

    def build(policy: Policy) -> Task:
        return VoiceTask(policy, load_reward_model(policy, config.reward_model), splits, in_order, config.score_clip)

    return build


# ---------------------------------------------------------------------------------------------------------- the task


class VoiceTask:
    """Prompts under the tutor's role, and a reward model's scores of the replies.

    `scale` is what training normalises them with; `in_order` says that the training samples are a course, to be taken
    as they stand.
    """

    def __init__(
        self,
        policy: Policy,
        reward: RewardModel,
        splits: dict[str, Sequence[Sample]],
        in_order: bool = False,
        score_clip: float = 5.0,
    ):
        self.policy, self.reward, self.splits, self.in_order = policy, reward, splits, in_order
        self.scale = RunningScale(score_clip, reward.identity)

    def samples(self, split: Literal["train", "test"]) -> Sequence[Sample]:
        return self.splits[split]

    def episode(self, sample: Sample) -> "VoiceEpisode":
        return VoiceEpisode(self, sample)

    def score(self, prompts: Sequence[str], replies: Sequence[str]) -> list[float]:
        """The reward model's scores of replies to prompts, as text, under its own template.

        White space around a reply is left out, as it was in the pairs.
        """
        asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
        return self.reward.score(list(zip(asked, map(str.strip, replies), strict=True)))


class VoiceEpisode:
    """One reply to one prompt."""

    def __init__(self, task: VoiceTask, sample: Sample):
        self.task, self.sample, self.reply = task, sample, ""

    def reset(self) -> list[Message]:
        return self.task.policy.prompts.tutor.messages(self.sample.prompt)

    def step(self, reply: str) -> None:
        self.reply = reply

    def outcome(self) -> Outcome:
        return self.outcomes([self])[0]

    @staticmethod
    def outcomes(episodes: Sequence["VoiceEpisode"]) -> list[Outcome]:
        """The verdicts on episodes of one task, scored in batches."""
        scores = episodes[0].task.score([e.sample.prompt for e in episodes], [e.reply for e in episodes])
        found = []
        for episode, score in zip(episodes, scores, strict=True):
            sample, right = episode.sample, in_voice(episode.reply)
            if not math.isfinite(score):  # nothing to learn from, and nothing for the mean of all scores
                found.append(Outcome("unknown", 0.0, f"the reward model's score is {score}", {"level": sample.topic}))
                continue
            details = {"level": sample.topic} | (
                {"states_fact": keeps(episode.reply, sample.fact)} if sample.fact else {}
            )
            label = f"{'in the voice' if right else 'not in the voice'}, score {score:+.2f}"
            found.append(Outcome("correct" if right else "incorrect", score, label, details, label))
        return found


# ------------------------------------------------------------------------------------------------------------ topics


def course(samples: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` prompts of each topic, topic by topic: shuffled passes over those that it has."""
    chosen: list[Sample] = []
    for topic in dict.fromkeys(sample.topic for sample in samples):
        own = [sample for sample in samples if sample.topic == topic]
        laps = range(-(-count // len(own)))
        chosen += [own[i] for lap in laps for i in shuffled(seed, lap, len(own))][:count]
    return chosen


def load_topics(name: str, test_share: float) -> dict[str, Sequence[Sample]]:
    """The samples of both splits, which share no topic. Raises ConfigError."""
    path = Path(name) if name else DATA
    if path.is_dir():
        splits = {split: read_samples(path / f"{split}.jsonl") for split in ("train", "test")}
    else:
        splits = split_topics(name, read_topics(name, path), test_share)
    for what, key in (("topic", lambda s: s.topic), ("prompt", lambda s: " ".join(s.prompt.casefold().split()))):
        if shared := set(map(key, splits["train"])) & set(map(key, splits["test"])):
            raise ConfigError(
                f"topics={name or path}: the {what} {min(shared)!r} is in both splits: take it out of one of them"
            )
    return splits | {"test": by_turns(splits["test"])}


def by_turns(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with their topics taking turns: the first few are of many."""
    places: Counter[str] = Counter()
    numbered = []
    for sample in samples:
        numbered.append((places[sample.topic], sample))
        places[sample.topic] += 1
    return [sample for _, sample in sorted(numbered, key=lambda pair: pair[0])]


def read_samples(file: Path) -> list[Sample]:
    """The samples of a file of JSON lines. Raises ConfigError naming the line."""
    found = []
    for number, row in read_objects("topics", str(file)):
        try:
            fact = row.get("fact") or []
            words = [fact] if isinstance(fact, str) else fact
            if not isinstance(words, list):
                raise ValueError(f"found {str(fact)[:40]!r} as fact, expected words")
            fact = tuple(text(word, "fact") for word in words)
            found.append(Sample(text(row.get("topic"), "topic"), text(row.get("prompt"), "prompt"), fact))
        except ValueError as error:
            raise ConfigError(f"topics={file}, line {number}: {error}") from None
    return found


def read_topics(name: str, path: Path) -> list[Sample]:
    """The samples of a YAML file, topic: prompts. Raises ConfigError."""
    import yaml

    expected = "expected `topic:` and below it a list of prompts"
    try:
        content = path.read_text(encoding="utf-8")
        node = yaml.compose(content, yaml.SafeLoader)
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        loaded = yaml.safe_load(content)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"topics={name}: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"topics={name}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(loaded, dict) or not loaded:
        raise ConfigError(f"topics={name}: found {str(loaded)[:40]!r}, {expected}")
    if twice := [str(key) for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"topics={name}: the topic {twice[0]} stands twice, expected its prompts in one place")
    found = []
    for topic, prompts in loaded.items():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ConfigError(f"topics={name}: found {str(prompts)[:40]!r} under {topic}, {expected}")
        try:
            found += [Sample(text(str(topic), "topic"), text(prompt, "prompt")) for prompt in prompts]
        except ValueError as error:
            raise ConfigError(f"topics={name}: {error}") from None
    return found


def split_topics(name: str, samples: Sequence[Sample], test_share: float) -> dict[str, Sequence[Sample]]:
    """The last topics of a file are held out, a test_share of them. Raises ConfigError."""
    topics = list(dict.fromkeys(sample.topic for sample in samples))
    tests = topics[len(topics) - max(1, round(test_share * len(topics))) :]
    if len(tests) == len(topics):
        raise ConfigError(f"topics={name} with test_share={test_share:g} leaves no topic to train on: write more")
    return {
        "train": [sample for sample in samples if sample.topic not in tests],
        "test": [sample for sample in samples if sample.topic in tests],
    }
