"""Models that answer the same held-out samples under the same seeds, and what can be said of the difference."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lora_ppo.chat import Message
from lora_ppo.episodes import Episode, Outcome, Task, at_once, judge, play
from lora_ppo.files import replace_file
from lora_ppo.journal import turn_seed
from lora_ppo.policy import Policy
from lora_ppo.settings import ConfigError
from lora_ppo.statistics import (
    RESAMPLES,
    bootstrap_interval,
    mcnemar_exact,
    newcombe_interval,
    pass_at_k,
    wilson_interval,
)
from lora_ppo.training import chunks

METHODS = {
    "accuracy": "Wilson score interval, 95 %",
    "pass@k": "unbiased estimator of Chen et al. 2021, bootstrap over samples, 95 %",
    "accuracy difference": "Newcombe's interval for paired proportions (1998, method 10), 95 %",
    "p": "exact McNemar test, two-sided",
    "reward difference": f"paired bootstrap, percentiles of {RESAMPLES} resamples, 95 %",
}


@dataclass(frozen=True)
class Answer:
    """What a model said to a sample: the question, its last reply, the tokens of all its replies, the outcome."""

    question: str
    text: str
    tokens: int
    outcome: Outcome
    cut_off: bool = False


@dataclass(frozen=True)
class Result:
    """A model's answers. `folder` is its adapter or merged model, `step` the PPO steps that trained it, if known.

    `more` are further answers to the same samples, a list for each time that they were asked again.
    """

    name: str
    folder: str
    step: int | None
    answers: list[Answer]
    more: Sequence[list[Answer]] = ()


class Unjudged:
    """An episode whose outcome comes later: judging then draws the same random numbers for every model."""

    def __init__(self, episode: Episode):
        self.episode, self.question = episode, ""

    @staticmethod
    def resets(episodes: Sequence["Unjudged"]) -> list[list[Message]]:
        openings = at_once([unjudged.episode for unjudged in episodes], "reset")
        for unjudged, messages in zip(episodes, openings, strict=True):
            unjudged.question = messages[-1]["content"]
        return openings

    @staticmethod
    def steps(episodes: Sequence["Unjudged"], replies: Sequence[str]) -> list[str | None]:
        return at_once([unjudged.episode for unjudged in episodes], "step", replies)

    def outcome(self) -> None:
        return None


def held_out(task: Task, count: int, seed: int) -> list[Any]:
    """`count` samples of the test split, drawn from `seed`. Raises ConfigError where it has fewer."""
    samples = list(task.samples("test"))
    if count > len(samples):
        raise ConfigError(f"num_samples={count}: the test split has {len(samples)} samples, ask for no more")
    return random.Random(seed).sample(samples, count)


def answer_all(
    policy: Policy,
    task: Task,
    samples: Sequence[Any],
    adapter: bool,
    seed: int,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """The policy's tries at `samples`, `batch_size` at a time, with its adapter on or off.

    Every batch, and its judging, draws from a generator of its own, seeded from `seed`: two models that are asked the
    same get the same random numbers. `done` is told how many samples are answered.
    """
    import torch

    answers = []
    for number, asked in enumerate(chunks(samples, batch_size)):
        torch.manual_seed(turn_seed(seed, number))
        episodes = [Unjudged(task.episode(sample)) for sample in asked]
        trajectories = play(policy, episodes, adapter)
        texts = [t.replies[-1] if t.replies else "" for t in trajectories]
        torch.manual_seed(turn_seed(seed, -1 - number))
        outcomes = judge([unjudged.episode for unjudged in episodes])
        for episode, text, t, outcome in zip(episodes, texts, trajectories, outcomes, strict=True):
            answers.append(Answer(episode.question, text, t.length, t.outcome or outcome, t.cut_off))
        done(len(answers))
    return answers


def verdicts(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """The share of all answers that each verdict has, where some have none that counts."""
    counts = Counter(answer.outcome.verdict for answer in answers)
    if not counts["unknown"]:
        return {}
    names = ("correct", "incorrect", "unknown")
    return {name: {"samples": counts[name], "share": counts[name] / len(answers)} for name in names}


def figures(result: Result) -> dict[str, Any]:
    """A model's figures over the samples whose outcome is known; facts are counted where the task states them."""
    known = [answer for answer in result.answers if answer.outcome.verdict != "unknown"]
    right = sum(answer.outcome.verdict == "correct" for answer in known)
    stated = [a.outcome.details["states_fact"] for a in result.answers if "states_fact" in a.outcome.details]
    strict = [a.outcome.details["strict"] for a in known if "strict" in a.outcome.details]
    return {
        "name": result.name,
        "folder": result.folder,
        "step": result.step,
        "samples": len(known),
        "unknown": len(result.answers) - len(known),
        "correct": right,
        "verdicts": verdicts(result.answers),
        "accuracy": right / len(known) if known else None,
        "accuracy_interval": wilson_interval(right, len(known)),
        "strict_accuracy": sum(strict) / len(strict) if strict else None,
        "strict_interval": wilson_interval(sum(strict), len(strict)) if strict else None,
        "by_level": accuracies(known, lambda answer: [answer.outcome.details.get("level")]),
        "by_skill": accuracies(known, lambda answer: answer.outcome.details.get("skills", [])),
        "reasons": reasons(result.answers),
        "pass_at": passed(result),
        "cut_off_share": fmean(answer.cut_off for answer in result.answers),
        "facts": len(stated),
        "facts_stated": sum(stated),
        "facts_stated_share": sum(stated) / len(stated) if stated else None,
        "facts_stated_interval": wilson_interval(sum(stated), len(stated)) if stated else None,
        "mean_reward": fmean(answer.outcome.reward for answer in known) if known else None,
        "mean_tokens": fmean(answer.tokens for answer in result.answers),
        "most_tokens": max(answer.tokens for answer in result.answers),
    }


def accuracies(answers: Sequence[Answer], kinds: Callable[[Answer], Sequence[str]]) -> dict[str, dict[str, Any]]:
    """How many answers of each kind are right: of a level, of a skill, where the task has them."""
    groups: dict[str, list[Answer]] = {}
    for answer in answers:
        for kind in filter(None, kinds(answer)):
            groups.setdefault(kind, []).append(answer)
    rows = {}
    for kind, some in sorted(groups.items()):
        right = sum(answer.outcome.verdict == "correct" for answer in some)
        rows[kind] = {"samples": len(some), "accuracy": right / len(some)}
        rows[kind] |= {"interval": wilson_interval(right, len(some))}
        rows[kind] |= {"reward": fmean(answer.outcome.reward for answer in some)}
    return rows


def reasons(answers: Sequence[Answer]) -> dict[str, dict[str, Any]]:
    """Why episodes ended, where the task tells: each reason's share of all."""
    told = [answer.outcome.details["reason"] for answer in answers if "reason" in answer.outcome.details]
    return {
        reason: {"samples": told.count(reason), "share": told.count(reason) / len(told)} for reason in sorted({*told})
    }


def passed(result: Result) -> dict[int, dict[str, Any]]:
    """pass@k where samples were answered several times, n: for k = 1, 2, 4, ... and n, over those judged each time."""
    rows = zip(result.answers, *result.more, strict=True)
    verdicts = [[answer.outcome.verdict for answer in row] for row in rows]
    right = [row.count("correct") for row in verdicts if "unknown" not in row]
    n = 1 + len(result.more)
    if n == 1 or not right:
        return {}
    found = {}
    for k in sorted({*(2**i for i in range(n.bit_length())), n}):
        chances = [pass_at_k(n, count, k) for count in right]
        found[k] = {"share": fmean(chances), "interval": bootstrap_interval(chances)}
    return found


def comparison(result: Result, base: Result, seed: int = 0) -> dict[str, Any]:
    """`result` minus `base` over the samples whose outcome both know: in all, in the strict sense, level by level."""
    pairs = [(a.outcome, b.outcome) for a, b in zip(result.answers, base.answers, strict=True)]
    pairs = [(a, b) for a, b in pairs if "unknown" not in (a.verdict, b.verdict)]
    table = [(a.verdict == "correct", b.verdict == "correct") for a, b in pairs]
    levels = [a.details.get("level") for a, _ in pairs]
    strict = [(a.details["strict"], b.details["strict"]) for a, b in pairs if "strict" in a.details]
    rewards = [a.reward - b.reward for a, b in pairs]
    return {
        "samples": len(pairs),
        **paired(table),
        "reward_difference": fmean(rewards) if pairs else None,
        "reward_difference_interval": bootstrap_interval(rewards, seed) if pairs else None,
        "strict": paired(strict) if strict else None,
        "by_level": {
            level: paired([pair for pair, its in zip(table, levels, strict=True) if its == level])
            for level in sorted({level for level in levels if level})
        },
    }


def paired(table: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """What two models got right of the same samples, (this, base) each, and the difference of their shares."""
    both, only_here, only_base = (table.count(cell) for cell in ((True, True), (True, False), (False, True)))
    neither = len(table) - both - only_here - only_base
    return {
        "both_right": both,
        "only_this_right": only_here,
        "only_base_right": only_base,
        "neither_right": neither,
        "accuracy_difference": (only_here - only_base) / len(table) if table else None,
        "accuracy_difference_interval": newcombe_interval(both, only_here, only_base, neither),
        "p": mcnemar_exact(only_here, only_base),
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Writes `record` as ASCII JSON; a reader sees the old file or the new one, whole."""
    replace_file(path, json.dumps(record, indent=1).encode("ascii"))
