"""Measures, on facts of the tables, which signal tells a model's sound quizzes from others, and what they are worth.

Once for each model: what comes out is kept in the user's cache. Only training facts are asked, so that the test split
can still tell whether the choice was a good one.
"""

import contextlib
from collections.abc import Callable, Sequence
from statistics import fmean

from lora_ppo.checks import longest_prompt
from lora_ppo.gate import Gate, measured_file, write_gate
from lora_ppo.generate import replies
from lora_ppo.policy import Policy
from lora_ppo.quiz import LETTERS, bare
from lora_ppo.quizmaster import (
    ANSWERS,
    Draft,
    agree,
    alike,
    answer_requests,
    quiz_request,
    reworded,
    rewording_request,
    solved_quiz,
    with_wrong_options,
)
from tasks.facts import Fact
from tasks.questions import split_samples

QUESTIONS = 60
AT_ONCE = 4  # questions, ANSWERS / 2 replies to each
QUIZZES_AT_ONCE = 16
LEAST = 6  # answers that agree, for a quiz to be worth writing
LEAD = 1.0  # nats between the key and a wrong option: what comes nearer may be right as well
SOUND, FEWEST = 0.88, 5  # share of the quizzes that must be sound; of fewer nothing can be said
EXPECTED = 0.94  # the share by the curve, which is surer of itself than what comes: SOUND with room
PRIOR_SD = 10.0


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
        asked_as = [question for question, _ in some]
        rewordings = replies(policy, [rewording_request(policy, question) for question in asked_as])
        in_own_words = [reworded(policy, ids) or question for ids, question in zip(rewordings, asked_as, strict=True)]
        written: list[list[list[int]]] = [[] for _ in some]
        for questions in (asked_as, in_own_words):
            half = replies(policy, [request for question in questions for request in answer_requests(policy, question)])
            for i, own in enumerate(written):
                own += half[i * ANSWERS // 2 : (i + 1) * ANSWERS // 2]
        for i, (question, _) in enumerate(some):
            draft = agree(policy, question, written[i])
            if draft and draft.agreement >= LEAST:
                draft = with_wrong_options(policy, draft)
            made.append(draft)
        done(len(made))
    return made


def by_agreement(made: Sequence[Draft | None], facts: Sequence[Fact]) -> Gate:
    """The gate for quizzes whose key is agreed on: the lowest agreement from which EXPECTED of them are sound.

    Few of so few questions make a quiz; but each of them says how often a key is right at its agreement, and a logistic
    curve goes through all. The gate is shut if no agreement is enough.
    """
    keys, quizzes, others_wrong = [], [], []
    for draft, fact in ((draft, fact) for draft, fact in zip(made, facts, strict=True) if draft):
        key_right, options = says(draft.key, fact), draft.options(LEAD)
        keys.append((draft.agreement, key_right))
        if len(options) == len(LETTERS):
            quizzes.append((draft.agreement, sound(options, fact)))
            others_wrong += [quizzes[-1][1]] if key_right else []
    expected = logistic_fit(keys)
    for agreement in sorted({agreed for agreed, _ in quizzes}):
        shown = [(agreed, right) for agreed, right in quizzes if agreed >= agreement]
        if len(shown) < FEWEST or not others_wrong:
            break
        if fmean(expected(agreed) for agreed, _ in shown) * fmean(others_wrong) >= EXPECTED:
            return Gate("agreement", agreement, LEAD, sum(right for _, right in shown), len(shown), len(facts))
    return Gate(asked=len(facts))


def logistic_fit(pairs: Sequence[tuple[int, bool]]) -> Callable[[int], float]:
    """P(right | agreement), by logistic regression; a weak normal prior keeps it finite where all are of one kind."""
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import expit

    x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
    x = x / ANSWERS

    def loss(weights):
        score = weights[0] + weights[1] * x
        return np.logaddexp(0, np.where(y > 0, -score, score)).sum() + (weights**2).sum() / (2 * PRIOR_SD**2)

    weights = minimize(loss, np.zeros(2)).x
    return lambda agreement: float(expit(weights[0] + weights[1] * agreement / ANSWERS))


def by_options(policy: Policy, asked: Sequence[tuple[str, Fact]]) -> Gate:
    """The gate for quizzes that the model writes whole, at once, and confirms among their options.

    It is shut if SOUND of them are not sound.
    """
    shown, right = 0, 0
    for some in (asked[i : i + QUIZZES_AT_ONCE] for i in range(0, len(asked), QUIZZES_AT_ONCE)):
        written = replies(policy, [quiz_request(policy, question) for question, _ in some])
        for (question, fact), ids in zip(some, written, strict=True):
            if quiz := solved_quiz(policy, question, ids, why=[]):
                wrong = [option for i, option in enumerate(quiz.options) if i != quiz.key]
                shown, right = shown + 1, right + sound([quiz.options[quiz.key], *wrong], fact)
    enough = shown >= FEWEST and right >= SOUND * shown
    return Gate("options", 0, 0.0, right, shown, len(asked)) if enough else Gate(asked=len(asked))


def measure(policy: Policy, done: Callable[[int], None] = lambda count: None) -> Gate:
    """The gate for this very model, measured on QUESTIONS training facts, always the same; kept in the cache."""
    import torch

    room = policy.context - policy.config.max_new_tokens
    asked = [(sample.question, sample.fact) for sample in split_samples("train")[:QUESTIONS]]
    asked = [it for it in asked if longest_prompt(policy, it[0], ("quizmaster", "solver")) <= room]
    with torch.random.fork_rng([policy.device] if policy.device.type == "cuda" else []):
        torch.manual_seed(0)
        facts = [fact for _, fact in asked]
        gate = by_agreement(drafts(policy, asked, done), facts)
        gate = gate if gate.signal else by_options(policy, asked)
    with contextlib.suppress(OSError):  # measured again the next time
        write_gate(measured_file(policy), gate)
    return gate


def ensure_gate(
    policy: Policy, notice: Callable[[str], None], done: Callable[[int], None] = lambda count: None
) -> None:
    """Measures the policy's gate if nobody did yet."""
    if not policy.quiz_gate.asked:
        notice(f"Measuring what this model's quizzes are worth: {QUESTIONS} questions, once, some minutes on a CPU ...")
        policy.quiz_gate = measure(policy, done)
        notice(f"Its quizzes: {policy.quiz_gate.worth()}.")
