"""Questions on the facts of the tables, or of a person's file, and how they are split for training and for the test."""

import random
from dataclasses import dataclass
from functools import cache
from typing import Literal

from lora_ppo.settings import ConfigError
from lora_ppo.terminal import read_questions
from tasks.facts import Fact, table_facts
from tasks.heldout import held_out_of


@dataclass(frozen=True)
class Sample:
    """A question, and the fact of the tables that answers it, if it is one of theirs."""

    question: str
    fact: Fact | None


@cache
def known_questions() -> dict[str, Fact]:
    """Every phrasing of every fact of the tables, casefolded, and the fact."""
    return {
        fact.question(template).casefold(): fact
        for fact in table_facts()
        for template in (*fact.subject.ask, *fact.subject.held_out)
    }


def states(answer: str, fact: Fact) -> bool:
    """Whether the answer states the fact, in the words of its table's template (with or without "The")."""
    return fact.statement[4:].casefold() in answer.casefold()


def split_samples(
    split: Literal["train", "test"], seed: int = 0, questions_file: str = "", test_share: float = 0.2
) -> tuple[Sample, ...]:
    """The samples of a split, in an order drawn from `seed`; no fact of one split, nor its mirror, is in the other.

    Which facts are held out is the same with every seed. Without a file: every fact of the tables once, in a phrasing
    of its `ask` (train) or `held_out` (test). With one: its questions, where the phrasings of one fact stay together;
    about a `test_share` of them is held out, and stays so when others are added.
    Raises ConfigError where the file can't be used or is too short to be split.
    """
    rng = random.Random(f"quiz/{seed}")
    samples = []
    if questions_file:
        for question in dict.fromkeys(read_questions(questions_file)):
            samples.append(Sample(question, known_questions().get(question.casefold())))
    else:
        for fact in table_facts():
            asked, held_out = rng.choice(fact.subject.ask), rng.choice(fact.subject.held_out)
            samples.append(Sample(fact.question(asked if split == "train" else held_out), fact))
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        about = (sample.fact.about, sample.fact.answer) if sample.fact else (sample.question,)
        groups.setdefault("\n".join(sorted(map(str.casefold, about))), []).append(
            sample
        )  # hot is to cold as cold to hot
    kept = list(groups)
    random.Random("quiz").shuffle(kept)
    tests = held_out_of(kept, test_share) if questions_file else set(kept[: max(1, round(test_share * len(kept)))])
    if len(tests) == len(kept):
        raise ConfigError(
            f"questions={questions_file or 'the tables'} with test_share={test_share:g} leaves none of {len(kept)} "
            "questions to train on: write more, or lower test_share"
        )
    chosen = [sample for group in kept if (group in tests) == (split == "test") for sample in groups[group]]
    rng.shuffle(chosen)
    return tuple(chosen)
