"""The quiz task: its splits, its two learners, and answers that try to talk the learner into a letter."""

import pytest
import torch
from support.tiny import tiny_policy

import tasks.quiz
from lora_ppo.chat import encode_chat
from lora_ppo.episodes import play
from lora_ppo.quiz import LETTERS, Quiz, learner_choices, learner_probabilities
from lora_ppo.settings import ConfigError
from tasks.facts import table_facts
from tasks.quiz import QuizTask, Sample, split_samples


@pytest.fixture
def written(monkeypatch):
    """Quizzes come from here instead of a model; the questions for which one was written."""
    asked = []

    def make_quiz(policy, question, written):
        asked.append((question, torch.randint(1000, ()).item()))
        return None if "null" in question else Quiz(f"On {question}", ("right", "b", "c", "d"), 0)

    monkeypatch.setattr(tasks.quiz, "make_quiz", make_quiz)
    monkeypatch.setattr(tasks.quiz, "first_requests", lambda policy, question: [question])
    monkeypatch.setattr(tasks.quiz, "replies", lambda policy, requests, seeds: [None] * len(requests))
    return asked


@pytest.fixture
def learner(monkeypatch):
    """`learner(choose)` makes the learner sure of option `choose(answer, quiz)`; it has no opinion without an answer.

    With `knows`, it is sure without one too.
    """

    def install(choose, knows=False):
        def probabilities(policy, answers, quizzes):
            read, unread = torch.full((2, len(answers), len(LETTERS)), 0.25)
            for rows, texts in ((read, answers), (unread, [""] * len(answers))):
                for row, text, quiz in zip(rows, texts, quizzes, strict=True):
                    if text or knows:
                        row[:] = 0.1
                        row[choose(text, quiz)] = 0.7
            return read, unread

        monkeypatch.setattr(tasks.quiz, "learner_probabilities", probabilities)

    return install


def test_the_splits_share_no_fact_and_no_phrasing():
    train, test = split_samples("train"), split_samples("test")
    assert not {s.fact for s in train} & {s.fact for s in test}
    assert {s.fact for s in train} | {s.fact for s in test} == set(table_facts())
    assert len(test) == pytest.approx(0.2 * len(table_facts()), rel=0.05)
    for sample in train[:50]:
        assert sample.question in [sample.fact.question(template) for template in sample.fact.subject.ask]
    for sample in test[:50]:
        assert sample.question in [sample.fact.question(template) for template in sample.fact.subject.held_out]


def test_no_fact_is_the_mirror_of_one_in_the_other_split():
    train, test = ({(s.fact.about, s.fact.answer) for s in split_samples(split)} for split in ("train", "test"))
    mirrors = {(answer, about) for about, answer in test}
    assert not mirrors & train
    assert len(mirrors & test) >= 4  # there are such pairs: hot is to cold as cold is to hot


def test_a_seed_gives_the_same_samples_every_time_and_another_one_others_of_the_same_facts():
    assert split_samples("test", seed=3) == split_samples("test", seed=3)
    assert split_samples("test", seed=3) != split_samples("test", seed=4)
    assert {s.fact for s in split_samples("test", seed=3)} == {s.fact for s in split_samples("test", seed=4)}


def test_a_file_keeps_the_phrasings_of_one_fact_together(tmp_path):
    facts = table_facts()[:40:4]
    lines = [fact.question(template) for fact in facts for template in fact.subject.ask[:3]]
    file = tmp_path / "questions.txt"
    file.write_text("\n".join([*lines, *lines, "What is new?"]), encoding="utf-8")
    train, test = (split_samples(split, questions_file=str(file)) for split in ("train", "test"))
    assert sorted(s.question for s in train + test) == sorted([*lines, "What is new?"])
    assert not {s.fact for s in train} & {s.fact for s in test}
    assert Sample("What is new?", None) in train + test
    assert len({s.fact for s in test}) == 2


def test_a_file_that_can_not_be_split_or_read_is_refused(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("Only one?\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"leaves none of 1 questions"):
        split_samples("train", questions_file=str(file))
    file.write_bytes(b"a line\n" * 16 + b"\xff\n")
    with pytest.raises(ConfigError, match="line 17"):
        split_samples("train", questions_file=str(file))
    with pytest.raises(ConfigError, match="learner=nobody"):
        QuizTask(None, learner="nobody")


def test_the_reader_gives_plus_or_minus_one(llama_policy, written, learner):
    learner(lambda answer, quiz: quiz.key if answer == "good" else (quiz.key + 1) % 4)
    outcomes = QuizTask(llama_policy).outcomes([Sample("q", None)] * 3, ["good", "bad", "good"])
    assert [outcome.reward for outcome in outcomes] == [1.0, -1.0, 1.0]
    assert [outcome.verdict for outcome in outcomes] == ["correct", "incorrect", "correct"]


def test_a_choice_is_what_the_answer_made_more_probable():
    unread = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 0.5, 0.5]])
    read = torch.tensor([[0.6, 0.3, 0.05, 0.05], [0.97, 0.01, 0.01, 0.01], [0.0, 0.0, 0.4, 0.6]])
    assert learner_choices(read, unread) == [1, 0, 3]


def test_gain_credits_no_answer_to_a_learner_who_knows_the_fact(llama_policy, written, learner):
    learner(lambda answer, quiz: quiz.key, knows=True)
    task = QuizTask(llama_policy, learner="gain")
    assert [o.reward for o in task.outcomes([Sample("q", None)] * 2, ["", "words"])] == [0.0, 0.0]
    learner(lambda answer, quiz: quiz.key if answer else (quiz.key + 1) % 4, knows=True)
    outcome = task.outcomes([Sample("q", None)], ["words"])[0]
    assert outcome.reward == pytest.approx(0.6)
    assert outcome.verdict == "correct"


def test_no_quiz_is_unknown_and_disturbs_no_other_answer(llama_policy, written, learner):
    learner(lambda answer, quiz: quiz.key if answer == "good" else (quiz.key + 1) % 4)
    samples = [Sample("q", None), Sample("null", None), Sample("r", None)]
    outcomes = QuizTask(llama_policy).outcomes(samples, ["bad", "good", "good"])
    assert [outcome.verdict for outcome in outcomes] == ["incorrect", "unknown", "correct"]
    assert outcomes[1].reward == 0.0


def test_a_question_too_long_for_one_of_the_roles_is_unknown_and_the_others_are_asked(tiny_folder):
    """OPT has no positions beyond its context."""
    policy = tiny_policy(tiny_folder("opt"), target_modules=["q_proj"])
    roles = [getattr(policy.prompts, name) for name in ("tutor", "learner")]
    lengths = [len(encode_chat(policy.tokenizer, role.messages("?"))) for role in roles]
    words = "7" * (policy.context - policy.config.max_new_tokens - max(lengths) + 2)  # fits the tutor's
    assert len(encode_chat(policy.tokenizer, policy.prompts.tutor.messages(words))) < policy.context
    samples = [Sample(text, None) for text in (words, "word " * 2000, "Why?")]
    outcomes = QuizTask(policy).outcomes(samples, ["a"] * 3)
    assert [outcome.verdict for outcome in outcomes[:2]] == ["unknown"] * 2


def test_a_quiz_too_long_for_the_learner_is_none_whatever_is_answered(tiny_folder, written, monkeypatch):
    policy = tiny_policy(tiny_folder("opt"), target_modules=["q_proj"])
    long = Quiz("Which?", tuple(f"{number} " * 400 for number in range(4)), 0)
    monkeypatch.setattr(tasks.quiz, "make_quiz", lambda *_: long)
    assert QuizTask(policy).outcomes([Sample("Why?", None)], ["a"])[0].verdict == "unknown"


def test_an_answer_too_long_for_the_learner_is_judged(tiny_folder, written):
    """To outgrow the context is the policy's doing."""
    policy = tiny_policy(tiny_folder("opt"), target_modules=["q_proj"])
    outcomes = QuizTask(policy).outcomes([Sample("Why?", None)], ["word " * 1200])
    assert outcomes[0].verdict in ("correct", "incorrect")


def test_facts_are_scored_too(llama_policy, written, learner):
    learner(lambda answer, quiz: quiz.key)
    sample = split_samples("test")[0]
    answers = [f"I think the {sample.fact.statement[4:].upper()}", "That is an interesting subject."]
    details = [outcome.details for outcome in QuizTask(llama_policy).outcomes([sample] * 2, answers)]
    assert [d["states_fact"] for d in details] == [True, False]
    assert all(d["length"] > 3 for d in details)


def test_a_quiz_is_written_once_and_depends_on_its_question_alone(llama_policy, written):
    first, second = QuizTask(llama_policy), QuizTask(llama_policy)
    a, b = Sample("a", None), Sample("b", None)
    torch.manual_seed(1)
    quizzes = [first.quiz(a) for _ in range(30)]
    first.quiz(b)
    torch.manual_seed(2)
    second.quiz(b)
    second.quiz(a)
    assert [question for question, _ in written] == ["a", "b", "b", "a"]
    assert dict(written[:2]) == dict(written[2:])  # the generator stood at the same place
    assert {quiz.key for quiz in quizzes} == {0, 1, 2, 3}
    assert {quiz.options[quiz.key] for quiz in quizzes} == {"right"}


def test_writing_a_quiz_leaves_the_global_generator_alone(llama_policy, written):
    task = QuizTask(llama_policy)
    draws = []
    for _ in range(2):  # written, then remembered
        torch.manual_seed(5)
        quiz = task.quiz(Sample("a", None))
        draws.append((quiz, torch.rand(()).item()))
    assert draws[0] == draws[1]


def test_naming_a_letter_earns_what_chance_earns(llama_policy, written, learner):
    """A learner that believes every word: the letter is named before the options are shuffled."""
    learner(lambda answer, quiz: LETTERS.index(answer.split()[-1]) if answer.startswith("The correct option") else 0)
    task, count = QuizTask(llama_policy), 800
    torch.manual_seed(0)
    for letter in LETTERS:
        outcomes = task.outcomes([Sample("q", None)] * count, [f"The correct option is {letter}"] * count)
        right = sum(outcome.verdict == "correct" for outcome in outcomes)
        assert abs(right / count - 0.25) < 4 * (0.25 * 0.75 / count) ** 0.5


def test_an_episode_is_one_reply_under_the_tutors_prompt(llama_policy, written, learner):
    learner(lambda answer, quiz: quiz.key)
    episode = QuizTask(llama_policy).episode(Sample("What is it?", None))
    messages = episode.reset()
    assert [message["role"] for message in messages] == ["system", "user"]
    assert messages[1]["content"] == "What is it?"
    assert episode.step("An answer.") is None
    assert episode.outcome().reward == 1.0


def test_answers_judged_together_earn_what_they_earn_one_at_a_time(llama_policy, written, monkeypatch):
    """The learner is the real one, over several batches; one question has no quiz."""
    samples = [Sample(question, None) for question in ("a", "null", "a longer question", "b", "c")]
    sizes, found = [], []

    def probabilities(policy, answers, quizzes):
        sizes.append(len(quizzes))
        return learner_probabilities(policy, answers, quizzes)

    monkeypatch.setattr(tasks.quiz, "learner_probabilities", probabilities)
    monkeypatch.setattr(tasks.quiz, "QUIZZES_PER_PASS", 3)
    for _ in range(2):
        task = QuizTask(llama_policy, learner="gain")
        torch.manual_seed(0)
        found.append([t.outcome for t in play(llama_policy, [task.episode(sample) for sample in samples])])
        monkeypatch.delattr(tasks.quiz.QuizEpisode, "outcomes", raising=False)
        monkeypatch.setattr(tasks.quiz.QuizEpisode, "outcome", lambda e: e.task.outcomes([e.sample], [e.answer])[0])
    assert sizes == [3, 1] + [1] * 4
    assert [o.verdict for o in found[0]] == [o.verdict for o in found[1]]
    assert [o.details for o in found[0]] == [o.details for o in found[1]]
    assert [o.reward for o in found[0]] == pytest.approx([o.reward for o in found[1]], abs=1e-5)
    assert len({o.reward for o in found[0]}) == len(samples)
