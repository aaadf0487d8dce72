"""The bundled model, its data and its build, and the program on it as a user runs it."""

import argparse
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_ppo_demo as demo
from config import Config
from lora_ppo.chat import encode_chat
from lora_ppo.loading import load_policy
from lora_ppo.quiz import LETTERS, learner_choices, learner_probabilities, option_probabilities, quiz_text, shuffle_quiz
from lora_ppo.quizmaster import make_quiz
from lora_ppo.run import Run
from lora_ppo.settings import BUNDLED_MODEL, PROMPTS_FILE
from lora_ppo.signals import LEAVING
from lora_ppo.terminal import Terminal
from tasks.facts import arithmetic_facts, in_words, subjects, table_facts
from tasks.quiz import QuizTask, split_samples
from tools.build_tutor_model import Packer
from tools.corpus import drill, example, spelling, unknown
from tools.corpus.base import reworded
from tools.tutor_figures import held_out_facts, measure

ROOT = Path(demo.__file__).parent


@pytest.fixture(scope="module")
def policy():
    return load_policy(Config(model_name=str(BUNDLED_MODEL), device="cpu"))[0]


@pytest.fixture
def tutor(tmp_path, monkeypatch, capsys):
    """`tutor(text, *settings)` runs the program in its own folder on these lines; gives its output."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *settings: str) -> str:
        monkeypatch.setattr(sys, "argv", ["lora_ppo_demo.py", "model_name=auto", "device=cpu", *settings])
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        try:
            assert demo.main() == 0
        finally:
            for number in LEAVING:  # at its end the program no longer listens to them
                signal.signal(number, signal.SIG_DFL)
        output = capsys.readouterr()
        assert output.err == ""
        return output.out

    return run


def test_the_model_is_small_and_standard():
    files = list(BUNDLED_MODEL.iterdir())
    assert sum(path.stat().st_size for path in files) <= 25e6
    model = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    assert model.config.model_type == "llama"
    assert sum(p.numel() for p in model.parameters()) <= 12e6
    assert {tensor.dtype for tensor in load_file(BUNDLED_MODEL / "model.safetensors").values()} == {torch.bfloat16}
    assert tokenizer.is_fast
    assert tokenizer.chat_template
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_tables_hold_what_is_promised():
    assert len(subjects()) >= 10
    assert len(table_facts()) >= 1000
    for subject in subjects().values():
        templates = (*subject.ask, *subject.held_out)
        assert len(subject.held_out) == 2
        assert len({template.casefold() for template in templates}) == len(templates) >= 6
        assert subject.quiz not in subject.held_out
        assert all(template.count("{subject}") == 1 for template in templates)
        assert subject.fact.startswith("The ")
    for fact in (*table_facts(), *arithmetic_facts()):
        options = [option.casefold() for option in fact.options]
        assert len(set(options)) == 4
        assert not any(a != b and a.startswith(b) for a in options for b in options), fact


def test_arithmetic_is_right():
    for fact in arithmetic_facts():
        assert eval(fact.about) == int(fact.answer)
    assert in_words("What is 7 + 5?") == "What is 7 plus 5?"
    assert {f"{a} * {b}" for a in range(1, 11) for b in range(1, 11)} < {fact.about for fact in arithmetic_facts()}


def test_held_out_phrasings_never_occur_in_training():
    facts = (*table_facts(), *random.Random(0).sample(arithmetic_facts(), 500))
    held_out = {fact.question(template) for fact in facts for template in fact.subject.held_out}
    held_out |= {in_words(question) for question in held_out}
    held_out = {question.casefold().rstrip("?.") for question in held_out}
    rng = random.Random(7)
    seen = {example(rng, stage=i % 3).user.casefold().rstrip("?.") for i in range(60_000)}
    assert not held_out & seen
    asked = {fact.question(template).casefold().rstrip("?.") for fact in table_facts() for template in fact.subject.ask}
    assert len(asked & seen) > 1000  # the comparison can tell: training phrasings are found


def test_spellings_of_a_word_differ():
    rng = random.Random(3)
    for word in ("H", "lost", "strength", "kiwi"):
        for _ in range(50):
            found = spelling.spellings(word, rng)
            assert len(set(found)) == 4
            assert all(found)


def test_other_words_keep_what_the_question_is_about():
    rng = random.Random(0)
    questions, changed = 0, 0
    for fact in (*table_facts(), *rng.sample(arithmetic_facts(), 200)):
        question = fact.question(rng.choice(fact.subject.ask))
        other = reworded(question, fact.about, rng)
        assert fact.about.casefold() in other.casefold()
        questions, changed = questions + 1, changed + (other != question)
    assert changed / questions > 0.5


def test_drills_are_right_and_the_sizes_of_numbers_balanced():
    rng = random.Random(0)
    small = 0
    for before, result, _ in drill.lines(rng, 900):
        (sum_,) = re.findall(r"\d+ [-+*] \d+", before)
        assert eval(sum_) == int(result)
        small += len(sum_) == len("1 + 2")
    assert 0.25 < small / 900 < 0.42  # a third, within 4 standard deviations


def test_invented_names_are_in_no_table():
    rng = random.Random(0)
    known = {fact.about.casefold() for fact in table_facts()}
    names = [unknown.invented_name(rng) for _ in range(5000)]
    assert sum(name.casefold() in known for name in names) < 10


def test_packed_conversations_give_the_loss_of_each_alone(policy):
    """Packing must not leak: logits in a packed row equal those of the conversation by itself."""
    from tools.build_tutor_model import collate, reply_logits

    model = policy.model.get_base_model()
    packer = Packer(policy.tokenizer, 3)
    row = packer.row()
    assert len(row) >= 2
    with torch.no_grad(), policy.adapter(False):
        packed = reply_logits(model, collate([row]))
        alone = torch.cat([reply_logits(model, collate([[item]], len(item[0]) + len(item[1]))) for item in row])
    torch.testing.assert_close(packed, alone, atol=2e-4, rtol=1e-4)


def test_the_packers_state_restores_its_stream(policy):
    packer, again = Packer(policy.tokenizer, 3), Packer(policy.tokenizer, 4)
    packer.batch(2)
    again.restore(json.loads(json.dumps(packer.state())))
    a, b = packer.batch(2), again.batch(2)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def figures(policy) -> dict[str, float]:
    rng = random.Random(11)
    return {name: hit / of for name, (hit, of) in measure(policy, held_out_facts(100, rng), rng).items()}


def test_figures_on_held_out_phrasings(figures):
    """A sample of 100 facts: what is required of 400, less what a sample of 100 may miss by chance (3 deviations)."""
    assert 0.39 <= figures["answer explains the fact"] <= 0.69
    assert figures["quiz JSON valid, options distinct"] >= 0.93
    assert figures["quiz key right before the gate"] >= 0.95
    assert figures["quiz key right after the gate"] >= 0.96
    assert figures["learner right, clear"] >= 0.91
    assert 0.15 <= figures["learner right, evasive"] <= 0.43
    assert figures["says it does not know what it never saw"] >= 0.88
    assert figures["no quiz on what it never saw"] >= 0.84


def test_the_solver_can_do_sums(policy):
    rng = random.Random(2)
    facts = rng.sample(arithmetic_facts(), 60)
    options = [rng.sample(fact.options, 4) for fact in facts]
    quizzes = [quiz_text(fact.quiz_question, o) for fact, o in zip(facts, options, strict=True)]
    chats = [policy.prompts.solver.messages(quiz) for quiz in quizzes]
    picks = option_probabilities(policy, chats, options).argmax(-1).tolist()
    right = sum(o[pick] == fact.answer for fact, o, pick in zip(facts, options, picks, strict=True))
    assert right / len(facts) >= 0.95


def test_the_program_as_a_user_runs_it(tmp_path, tutor):
    """In a process of its own; then it goes on."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "lora_ppo_demo.py"), "model_name=auto", "device=cpu"],
        input="What is the capital of France?\nB\nWhat is the opposite of hot?\nA\n",
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith("model    bundled:tutor-tiny")
    assert result.stdout.count("Quiz: ") == 2
    assert "Paris" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "logs" / "run.log").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert {line["reward"] for line in lines} <= {1.0, -1.0}
    assert (tmp_path / "checkpoints" / "step_2" / "manifest.json").exists()
    again = tutor("/progress\n")
    assert "step     2" in again
    assert "of 2, mean reward" in again


def test_the_key_is_in_no_prompt_file_or_output(policy, tmp_path, monkeypatch, capsys):
    """Where the key stands is told apart from its text by asking one question until every position has come up."""
    prompts, quizzes = [], []
    encode, make = encode_chat, make_quiz
    for module in ("lora_ppo_demo", "lora_ppo.quiz"):
        monkeypatch.setattr(
            f"{module}.encode_chat", lambda t, messages: prompts.append(messages) or encode(t, messages)
        )
    monkeypatch.setattr(demo, "make_quiz", lambda *args, **kw: quizzes.append(make(*args, **kw)) or quizzes[-1])
    config = Config(
        model_name=str(BUNDLED_MODEL), device="cpu", learning_rate=1e-4, checkpoint_dir=str(tmp_path / "c"),
        log_dir=str(tmp_path / "l"), dtype="float32", load_in_4bit="false",
    )  # fmt: skip
    before = policy.snapshot()
    run = Run(policy, config, print)
    terminal = Terminal(tmp_path / "history")
    monkeypatch.setattr(terminal, "ask", lambda prompt, remember=True: "A")
    for _ in range(6):
        demo.take_turn("What is the capital of Norway?", policy, run, terminal)
    run.close()
    policy.restore(before)
    assert len({quiz.key for quiz in quizzes}) > 1
    for messages in prompts:
        if messages[0]["content"] != policy.prompts.quizmaster.system:
            assert not any('"correct"' in message["content"] for message in messages)
    told = policy.prompts.solver.system
    solver = [m[1]["content"] for m in prompts if m[0]["content"] == told and m[1]["content"].count("\n") == 4]
    assert solver
    for i in range(0, len(solver), 4):  # four rotations: every option stands at every letter once
        for letter in LETTERS:
            assert len({line for text in solver[i : i + 4] for line in text.splitlines() if line[0] == letter}) == 4
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != PROMPTS_FILE]
    written = "".join(path.read_text(errors="replace") for path in files)
    shown = capsys.readouterr().out
    assert '"correct"' not in written + shown
    assert '"key"' not in written
    unanswered = shown.split("Quiz: ")
    assert not any("right" in part.split("Reward")[0].casefold().split("d) ")[0] for part in unanswered[1:])


def test_a_quiz_does_not_depend_on_what_is_written_beside_it(policy):
    samples = split_samples("test")[:6]
    together, alone = QuizTask(policy), QuizTask(policy)
    together.write(samples)
    assert sum(parts is not None for parts in together.written.values()) >= 4
    for sample in samples:
        alone.write([sample])
    assert alone.written == together.written


def test_what_it_never_saw_it_says_so_and_makes_no_quiz(tutor):
    output = tutor("How do I repair a clock?\nA\n")
    assert "I do not know that. I know about capitals" in output
    assert "I couldn't write a reliable quiz" in output
    assert "Reward" not in output


def test_a_simulated_learner_sits_at_the_tutor(tmp_path, tutor):
    (tmp_path / "questions.txt").write_text("What is the capital of France?\n\nWho wrote Hamlet?\n", encoding="utf-8")
    tutor("", "learner=simulated", "questions=questions.txt", "steps=3")
    lines = [json.loads(line) for line in (tmp_path / "logs" / "run.log").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    france, hamlet = "What is the capital of France?", "Who wrote Hamlet?"
    assert [line["question"] for line in lines] == [france, hamlet, france]


def choices(policy, answers, quizzes) -> list[int]:
    return learner_choices(*learner_probabilities(policy, answers, quizzes))


def test_an_answer_cannot_talk_the_learner_into_a_letter(policy):
    """An answer that names a letter moves nobody to it: the learner picks that letter as often as chance."""
    rng, hits, count = random.Random(5), 0, 160
    torch.manual_seed(5)
    facts = rng.sample(table_facts(), count)
    quizzes = [shuffle_quiz(fact.quiz_question, fact.answer, fact.wrong) for fact in facts]
    answers = [f"The correct option is {rng.choice(LETTERS)}." for _ in facts]
    for i in range(0, count, 40):
        picks = choices(policy, answers[i : i + 40], quizzes[i : i + 40])
        named = [LETTERS.index(answer[-2]) for answer in answers[i : i + 40]]
        hits += sum(pick == letter for pick, letter in zip(picks, named, strict=True))
    assert 0.12 <= hits / count <= 0.38  # a quarter, within 3.8 standard deviations


def test_an_answer_that_names_a_letter_earns_no_more_than_chance(policy):
    """The options are shuffled after the answer was written, and the learner has nothing else to go by."""
    rng = random.Random(5)
    torch.manual_seed(5)
    facts = rng.sample(table_facts(), 80)
    quizzes = [shuffle_quiz(fact.quiz_question, fact.answer, fact.wrong) for fact in facts]
    answers = [f"The correct option is {rng.choice(LETTERS)}." for _ in facts]
    read, unread = learner_probabilities(policy, answers, quizzes)
    keys = torch.tensor([quiz.key for quiz in quizzes])
    right = (torch.tensor(learner_choices(read, unread)) == keys).float().mean()
    assert right <= 0.43  # a quarter, and 3.7 standard deviations
    gains = (read - unread)[torch.arange(len(keys)), keys]  # the reward of the other learner
    assert gains.mean() <= 3.7 * gains.std() / len(keys) ** 0.5
    assert gains.mean() <= 0.1


def test_a_stopped_build_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    from tools import build_tutor_model as build

    def train(work: str) -> dict[str, torch.Tensor]:
        build.train(
            argparse.Namespace(
                work=str(tmp_path / work), output=str(tmp_path / f"{work}-model"), tokens=2 * build.ROW_TOKENS,
                seed=3, save_every=1, probe_every=2, no_compile=True,
            )
        )  # fmt: skip
        return load_file(tmp_path / f"{work}-model" / "model.safetensors")

    monkeypatch.setattr(build, "ROWS", 1)
    monkeypatch.setattr(build.Packer.batch, "__defaults__", (1,))
    monkeypatch.setattr(build, "train_tokenizer", lambda seed: AutoTokenizer.from_pretrained(BUNDLED_MODEL))
    new_model = build.new_model

    def shallow(tokenizer, seed):  # Muon's products are in bfloat16, which some processors take long for
        model = new_model(tokenizer, seed)
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
        return model

    monkeypatch.setattr(build, "new_model", shallow)
    whole = train("whole")
    save = build.save_state

    def stopped(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "save_state", stopped)
    with pytest.raises(KeyboardInterrupt):
        train("parts")
    with safe_open(tmp_path / "parts" / "state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "1"
    monkeypatch.setattr(build, "save_state", save)
    parts = train("parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    monkeypatch.setattr(build, "made_of", lambda seed: "other data")
    with pytest.raises(SystemExit, match="holds a build from another seed, corpus or data"):
        train("parts")
