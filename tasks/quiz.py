"""The tutor's own task, without a person: a question, the policy's answer, a quiz on the question, a simulated learner.

The quiz is the core's, and the question alone decides it. Two learners, both the frozen base model in a learner's role:
`reader` reads the answer and takes the quiz, and its choice counts, +1 or -1; with `gain` the reward is
P(key | answer) - P(key | no answer), so that a learner who knows the fact anyway credits no empty answer.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

from lora_ppo.chat import Message
from lora_ppo.checks import longest_prompt
from lora_ppo.episodes import Outcome, Task
from lora_ppo.generate import replies
from lora_ppo.loading import is_bundled
from lora_ppo.policy import Policy
from lora_ppo.quiz import LETTERS, Quiz, learner_choices, learner_probabilities, readable, shuffle_quiz
from lora_ppo.quizmaster import first_requests, make_quiz
from lora_ppo.settings import ConfigError, Settings, setting
from tasks.questions import Sample, split_samples, states
from tasks.quiz_gate import ensure_gate

LEARNERS = ("reader", "gain")
QUIZZES_PER_PASS = 16
QUIZ_ROLES = ("quizmaster", "solver", "learner")


@dataclass
class TaskSettings(Settings):
    questions: str = setting(
        "", "text file of questions, one per line; empty: the bundled fact tables", group="the quiz task", split=True
    )
    quiz_learner: str = setting("auto", "reader, gain, or auto: reader for the bundled model, gain for any other")


def prepare(config: Any) -> Callable[[Policy], Task]:
    """Checks the questions now, before any model is loaded; what it returns builds the task. Raises ConfigError."""
    if config.quiz_learner not in ("auto", *LEARNERS):
        raise ConfigError(f"quiz_learner={config.quiz_learner} is unknown: expected one of auto, {', '.join(LEARNERS)}")
    split_samples("train", config.seed, config.questions, config.test_share)

    def build(policy: Policy) -> Task:
        ensure_gate(policy, lambda text: print(text, file=sys.stderr, flush=True))
        default = "reader" if is_bundled(policy.config.model_name) else "gain"
        learner = default if config.quiz_learner == "auto" else config.quiz_learner
        return QuizTask(policy, config.seed, learner, config.questions, config.test_share)

    return build


class QuizTask:
    """Questions, answers, and what a simulated learner makes of them.

    A quiz is written once for each question, from a generator seeded with the question: what is asked before, or after
    a restart, makes no difference to it. Its options are shuffled afresh each time, after the answer was written.
    """

    def __init__(
        self,
        policy: Policy,
        seed: int = 0,
        learner: Literal["reader", "gain"] = "reader",
        questions_file: str = "",
        test_share: float = 0.2,
    ):
        if learner not in LEARNERS:
            raise ConfigError(f"learner={learner} is unknown: expected one of {', '.join(LEARNERS)}")
        self.policy, self.seed, self.learner = policy, seed, learner
        self.splits = {name: split_samples(name, seed, questions_file, test_share) for name in ("train", "test")}
        self.written: dict[str, tuple[str, str, tuple[str, ...]] | None] = {}

    def samples(self, split: Literal["train", "test"]) -> tuple[Sample, ...]:
        return self.splits[split]

    def episode(self, sample: Sample) -> "QuizEpisode":
        return QuizEpisode(self, sample)

    def quiz(self, sample: Sample) -> Quiz | None:
        """The quiz on the sample's question, its options in an order drawn from torch's generator; None without one."""
        self.write([sample])
        parts = self.written[sample.question]
        return shuffle_quiz(*parts) if parts else None

    def write(self, samples: Sequence[Sample]) -> None:
        """Writes the quizzes that are not written yet, the first tries of several side by side."""
        import torch

        new = [q for q in dict.fromkeys(sample.question for sample in samples) if q not in self.written]
        device, room = self.policy.device, self.policy.context - self.policy.config.max_new_tokens
        for question in [q for q in new if longest_prompt(self.policy, q, QUIZ_ROLES) > room]:
            self.written[question] = None  # nobody can be asked it whole
            new.remove(question)
        for some in [new[i : i + QUIZZES_PER_PASS] for i in range(0, len(new), QUIZZES_PER_PASS)]:
            digests = [hashlib.sha256(f"{self.seed}/{question}".encode()).digest()[:6] for question in some]
            seeds = [int.from_bytes(digest, "big") for digest in digests]
            requests = [first_requests(self.policy, question) for question in some]
            numbers = [seed + i for seed, own in zip(seeds, requests, strict=True) for i in range(len(own))]
            first_replies = iter(replies(self.policy, list(chain(*requests)), numbers) if numbers else [])
            for question, seed, own in zip(some, seeds, requests, strict=True):
                with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                    torch.manual_seed(seed)
                    quiz = make_quiz(self.policy, question, [next(first_replies) for _ in own])
                self.written[question] = None
                if quiz and readable(self.policy, "", quiz) is not None:
                    correct = quiz.options[quiz.key]
                    wrong = tuple(option for option in quiz.options if option != correct)
                    self.written[question] = (quiz.question, correct, wrong)

    def outcomes(self, samples: Sequence[Sample], answers: Sequence[str]) -> list[Outcome]:
        """What the learner makes of each answer; `unknown`, with reward 0, where no quiz can be made."""
        self.write(samples)
        quizzes = [self.quiz(sample) for sample in samples]
        taken = [(answer, quiz) for answer, quiz in zip(answers, quizzes, strict=True) if quiz]
        judged = self.judge(taken)
        outcomes = []
        for sample, answer, quiz in zip(samples, answers, quizzes, strict=True):
            details = {"length": len(self.policy.tokenizer.encode(answer, add_special_tokens=False))}
            if sample.fact:
                details["states_fact"] = states(answer, sample.fact)
            if quiz is None:
                why = "no sound quiz could be made on this question"
                outcomes.append(Outcome("unknown", 0.0, why, details, label="no quiz"))
            else:
                verdict, reward, why = next(judged)
                label = "learner chose right" if verdict == "correct" else "learner chose wrong"
                outcomes.append(Outcome(verdict, reward, why, details, label))
        return outcomes

    def judge(self, taken: Sequence[tuple[str, Quiz]]) -> Iterator[tuple[str, float, str]]:
        """Verdict, reward and reason of each answer, by what the learner makes of the quiz with it and without."""
        for part in [taken[i : i + QUIZZES_PER_PASS] for i in range(0, len(taken), QUIZZES_PER_PASS)]:
            answers, quizzes = zip(*part, strict=True)
            read, unread = learner_probabilities(self.policy, answers, quizzes)
            for i, choice in enumerate(learner_choices(read, unread)):
                key = quizzes[i].key
                before, after = unread[i, key].item(), read[i, key].item()
                right = choice == key
                reward = after - before if self.learner == "gain" else 1.0 if right else -1.0
                why = f"the learner chose {LETTERS[choice]}, {'rightly' if right else 'wrongly'}; "
                why += f"P(key) {before:.2f} without the answer, {after:.2f} with it"
                yield "correct" if right else "incorrect", reward, why


class QuizEpisode:
    """One answer to one question, under the prompt that the tutor itself has."""

    def __init__(self, task: QuizTask, sample: Sample):
        self.task, self.sample, self.answer = task, sample, ""

    def reset(self) -> list[Message]:
        return self.task.policy.prompts.tutor.messages(self.sample.question)

    def step(self, reply: str) -> None:
        self.answer = reply

    def outcome(self) -> Outcome:
        return self.outcomes([self])[0]

    @staticmethod
    def outcomes(episodes: Sequence["QuizEpisode"]) -> list[Outcome]:
        """The verdicts on episodes of one task, judged in batches."""
        return episodes[0].task.outcomes([e.sample for e in episodes], [e.answer for e in episodes])
