"""Questions whose answers a model half knows, and a learner by rules: what a real model is trained on in `learning.py`.

A fact is half known where some of the model's answers state it and others don't: there is something to reinforce. The
quiz is the table's own. The learner picks the option that the answer names, and guesses where it names none or several.
Which facts those are is the same for all seeds, and kept in `runs/`: to find them takes as long as to train on them.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from lora_ppo.chat import encode_chat
from lora_ppo.episodes import Outcome
from lora_ppo.gate import measured_file
from lora_ppo.generate import Request, replies
from lora_ppo.policy import Policy
from lora_ppo.quiz import LETTERS, bare
from tasks.quiz import QuizTask, Sample

TRIES = 8  # answers by which a fact is known, half known or unknown
QUESTIONS_PER_PASS = 4


def named(answer: str, options: Sequence[str]) -> list[int]:
    """Which of the options the answer names, as whole words."""
    return [i for i, option in enumerate(options) if f" {bare(option)} " in f" {bare(answer)} "]


class RuleTask(QuizTask):
    """The quiz task with the tables' own quizzes, on half-known facts alone, and a learner by rules."""

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self.file = Path("runs") / f"half_known_{measured_file(policy).stem}_{policy.config.temperature:g}.json"
        if self.file.exists():
            self.written = json.loads(self.file.read_text(encoding="utf-8"))

    def write(self, samples: Sequence[Sample]) -> None:
        """A question's quiz counts as written where the base model half knows the fact."""
        new = [sample for sample in dict.fromkeys(samples) if sample.question not in self.written]
        for some in [new[i : i + QUESTIONS_PER_PASS] for i in range(0, len(new), QUESTIONS_PER_PASS)]:
            chats = [self.policy.prompts.tutor.messages(sample.question) for sample in some]
            prompts = [encode_chat(self.policy.tokenizer, chat) for chat in chats]
            asked = [Request(p, self.policy.config.temperature, adapter=False) for p in prompts for _ in range(TRIES)]
            texts = self.policy.tokenizer.batch_decode(replies(self.policy, asked, range(len(asked))))
            for i, sample in enumerate(some):
                fact, answers = sample.fact, texts[i * TRIES : (i + 1) * TRIES]
                stated = sum(named(text, fact.options) == [0] for text in answers)
                quiz = (fact.quiz_question, fact.answer, fact.wrong)
                self.written[sample.question] = quiz if 0 < stated < TRIES else None
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(self.written), encoding="utf-8")

    def outcomes(self, samples: Sequence[Sample], answers: Sequence[str]) -> list[Outcome]:
        """+1 or -1 by the learner's choice, and whether the answer names the fact's answer and no other option."""
        import torch

        outcomes = []
        for sample, answer in zip(samples, answers, strict=True):
            quiz = self.quiz(sample)
            options = named(answer, quiz.options)
            choice = options[0] if len(options) == 1 else torch.randint(len(LETTERS), ()).item()
            right = choice == quiz.key
            details = {"length": len(answer), "states_fact": options == [quiz.key]}
            why = f"the learner {'read' if len(options) == 1 else 'guessed'} {LETTERS[choice]}"
            outcomes.append(Outcome("correct" if right else "incorrect", 1.0 if right else -1.0, why, details))
        return outcomes
