"""Measures, on facts of the tables, which signal tells a model's sound quizzes from others, and what they are worth.

Once for each model: what comes out is kept in the user's cache. Only training facts are asked, so that the test split
can still tell whether the choice was a good one.
"""

import contextlib
from collections.abc import Callable, Sequence

from lora_ppo.gate import Gate, measured_file, write_gate
from lora_ppo.generate import replies
from lora_ppo.policy import Policy
from lora_ppo.quiz import LETTERS, bare
from lora_ppo.quizmaster import (
    ANSWERS,
    Draft,
    agree,
    alike,
    answer_request,
    quiz_request,
    solved_quiz,
    with_wrong_options,
)
from tasks.facts import Fact
from tasks.quiz import split_samples

QUESTIONS = 60
AT_ONCE = 2  # questions, ANSWERS replies to each
QUIZZES_AT_ONCE = 16
LEAST = 5  # answers that agree, for a quiz to be worth writing
LEADS = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0)  # nats
SOUND = 0.85  # share of the quizzes that must be, by the rule of succession


def says(text: str, fact: Fact) -> bool:
    """Whether a short answer is the fact's, perhaps with words around it ("Leonardo da Vinci" for "Leonardo")."""
    return f" {bare(fact.answer)} " in f" {bare(text)} "


def sound(options: Sequence[str], fact: Fact) -> bool:
    """Whether the first option is the fact's answer, and no other one is."""
    return says(options[0], fact) and not any(
        says(option, fact) or alike(option, fact.answer) for option in options[1:]
    )


def drafts(
    policy: Policy, asked: Sequence[tuple[str, Fact]], done: Callable[[int], None] = lambda count: None
) -> list[Draft | None]:
    """What the model makes of questions on facts, before any gate. `done` is told after how many."""
    made: list[Draft | None] = []
    for some in (asked[i : i + AT_ONCE] for i in range(0, len(asked), AT_ONCE)):
        written = replies(policy, [answer_request(policy, question) for question, _ in some for _ in range(ANSWERS)])
        for i, (question, _) in enumerate(some):
            draft = agree(policy, question, written[i * ANSWERS : (i + 1) * ANSWERS])
            if draft and draft.agreement >= LEAST:
                draft = with_wrong_options(policy, draft)
            made.append(draft)
        done(len(made))
    return made


def by_agreement(made: Sequence[Draft | None], facts: Sequence[Fact]) -> Gate:
    """The agreement and lead that let most quizzes through; a gate that is shut if none keeps `good_enough` ones."""
    best = Gate(asked=len(facts))
    for agreement in range(LEAST, ANSWERS + 1):
        for lead in LEADS:
            shown = [
                (options, fact)
                for draft, fact in zip(made, facts, strict=True)
                if draft and draft.agreement >= agreement and len(options := draft.options(lead)) == len(LETTERS)
            ]
            right = sum(sound(options, fact) for options, fact in shown)
            if good_enough(right, len(shown)) and (len(shown), right) >= (best.shown, best.right):
                best = Gate("agreement", agreement, lead, right, len(shown), len(facts))
    return best


def good_enough(right: int, shown: int) -> bool:
    """Whether SOUND of the quizzes are right. A share of 1 is soon reached by chance: one of each kind is added."""
    return (right + 1) / (shown + 2) >= SOUND


def by_options(policy: Policy, asked: Sequence[tuple[str, Fact]]) -> Gate:
    """The gate for quizzes that the model writes whole and confirms among their options; shut if it does so badly."""
    shown, right = 0, 0
    for some in (asked[i : i + QUIZZES_AT_ONCE] for i in range(0, len(asked), QUIZZES_AT_ONCE)):
        written = replies(policy, [quiz_request(policy, question) for question, _ in some])
        for (question, fact), ids in zip(some, written, strict=True):
            if quiz := solved_quiz(policy, question, ids, why=[]):
                wrong = [option for i, option in enumerate(quiz.options) if i != quiz.key]
                shown, right = shown + 1, right + sound([quiz.options[quiz.key], *wrong], fact)
    return Gate("options", 0, 0.0, right, shown, len(asked)) if good_enough(right, shown) else Gate(asked=len(asked))


def measure(policy: Policy, done: Callable[[int], None] = lambda count: None) -> Gate:
    """The gate for this very model, measured on QUESTIONS training facts, always the same; kept in the cache."""
    import torch

    asked = [(sample.question, sample.fact) for sample in split_samples("train")[:QUESTIONS]]
    with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(0)
        facts = [fact for _, fact in asked]
        gate = max(by_agreement(drafts(policy, asked, done), facts), by_options(policy, asked), key=lambda g: g.shown)
    with contextlib.suppress(OSError):  # measured again the next time
        write_gate(measured_file(policy), gate)
    return gate


def ensure_gate(
    policy: Policy, notice: Callable[[str], None], done: Callable[[int], None] = lambda count: None
) -> None:
    """Measures the policy's gate if nobody did yet."""
    if not policy.quiz_gate.asked:
        notice(
            f"Measuring, once for this model, what its quizzes are worth: {QUESTIONS} questions, a minute or two ..."
        )
        policy.quiz_gate = measure(policy, done)
        notice(f"Its quizzes: {policy.quiz_gate.worth()}.")
