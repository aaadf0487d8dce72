"""The maths task: problems of every source, what is held out, what a reply earns, and refusals."""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.training import ROOT

import train
from lora_ppo.settings import ConfigError, parse
from tasks import arithmetic, maths, verify
from tasks.arithmetic import LEVELS, sums

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"
SAMPLE = ROOT / "data" / "gsm8k_sample.jsonl"


def load(problems, levels=("1", "2", "3"), test_share=0.3, seed=0):
    return maths.load_problems(str(problems), seed, list(levels), test_share)


def write(path: Path, *rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("levels", [["1"], ["3"], ["1", "2", "3"], list(LEVELS)])
def test_the_splits_share_no_numbers_and_the_test_split_no_question_twice(levels):
    train_split, tests = sums("train", 0, levels, 0.3), sums("test", 0, levels, 0.3)
    numbers = [{tuple(sorted(one.numbers)) for one in split} for split in (train_split, tests)]
    assert not numbers[0] & numbers[1]
    assert len({one.question for one in tests}) == len(tests) >= 30
    for split in (train_split, tests):
        counts = Counter(one.level for one in split)
        assert set(counts) == set(levels)
        assert len(set(counts.values())) == 1  # 9000 is divided evenly by 1, 3 and 5


def test_a_level_that_is_named_twice_comes_twice_as_often():
    for split in ("train", "test"):
        counts = Counter(one.level for one in sums(split, 0, ["1", "2", "2"], 0.3))
        assert counts["2"] == 2 * counts["1"] > 0


def test_a_seed_gives_the_same_problems_and_another_one_others_with_the_same_numbers_held_out():
    first, again, other = (sums("test", seed, ["2"], 0.3) for seed in (1, 1, 2))
    assert first == again != other
    trained = {tuple(sorted(one.numbers)) for one in sums("train", 1, ["2"], 0.3)}
    assert not trained & {tuple(sorted(one.numbers)) for one in other}


@pytest.mark.parametrize("level", LEVELS)
def test_every_answer_is_right_and_in_its_range(level):
    """Computed anew from the question's own text."""
    words = {"buys": "+", "morning": "+", "both": "+", "gave": "-", "takes": "-", "already": "-", "each": "*"}
    for one in sums("train", 3, [level], 0.2)[:2000]:
        text = one.question
        if level == "5":
            a, b = (int(word) for word in text.replace(":", " ").split() if word.isdigit())
            sign = next(sign for word, sign in (words | {"Each": "*"}).items() if word in text.replace(":", "").split())
            text = f"{a} {sign} {b}"
        else:
            for form in ("What is ", "?", "Calculate ", " = "):
                text = text.replace(form, "")
            text = text.removesuffix(".")
        assert eval(text, {"__builtins__": {}}) == one.value, one
        assert 0 <= one.value <= {"1": 20, "2": 99, "3": 100, "4": 200, "5": 100}[level]
        assert set(one.numbers) == {
            int("".join(c for c in w if c.isdigit())) for w in text.split() if w.strip("()").isdigit()
        }


# --------------------------------------------------------------------------------------------------------------- files


def test_the_sample_is_fifty_problems_to_test_on_and_none_to_train_on():
    splits = load(SAMPLE)
    assert (len(splits["train"]), len(splits["test"])) == (0, 50)
    assert all(verify.number(problem.gold) for problem in splits["test"])
    assert "MIT License" in (ROOT / "data" / "gsm8k_sample.LICENSE").read_text()
    with pytest.raises(ConfigError, match="none to train on"):
        maths.MathsTask(None, splits).samples("train")


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not here")
def test_all_of_gsm8k_has_gold_numbers_that_its_own_answers_earn():
    splits = load(GSM8K)
    assert (len(splits["train"]), len(splits["test"])) == (7473, 1319)
    for split, problems in splits.items():
        rows = [json.loads(line) for line in (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for problem, row in zip(problems, rows, strict=True):
            worked = maths.MARKS.sub("", row["answer"])
            assert "<<" not in worked
            assert verify.check(worked, problem.gold).lenient
            assert verify.number(problem.gold).value.denominator == 1
            assert int(row["answer"].split("#### ")[1].replace(",", "")) == verify.number(problem.gold).value


def test_a_file_is_split_the_same_way_every_time(tmp_path):
    rows = [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(40)]
    file = write(tmp_path / "mine.jsonl", *rows)
    splits = load(file)
    keys = {name: {problem.key for problem in split} for name, split in splits.items()}
    assert not keys["train"] & keys["test"]
    assert len(keys["test"]) == 9  # about 0.3 of 40
    assert len(splits["train"]) + len(splits["test"]) == 40
    assert load(file) == splits
    assert {p.gold for p in splits["train"] + splits["test"]} == {str(i) for i in range(1, 41)}


def test_levels_and_marks_of_a_file(tmp_path):
    rows = [{"question": "a", "answer": "48/2 = <<48/2=24>>24\n#### 24", "level": 7, "split": "train"}]
    rows += [{"question": "b", "answer": "<<1+1=2>>2", "split": "test"}]
    splits = load(write(tmp_path / "mine.jsonl", *rows))
    assert splits["train"] == [maths.Problem("a", "24", "7")]
    assert splits["test"] == [maths.Problem("b", "2")]


GOOD = {"question": "What is 1 + 1?", "answer": "2"}
BROKEN = {
    "empty": ((), ("mine.jsonl is empty",)),
    "blank": (("", "  "), ("mine.jsonl is empty",)),
    "no JSON": ((GOOD, "{"), ("line 2", "found '{'", "an object in JSON")),
    "a list": ((GOOD, "[1]"), ("line 2", "an object with question and answer")),
    "deep": (("[" * 100_000,), ("line 1", "an object in JSON")),
    "no question": (({"answer": 1},), ("line 1", "the question", "expected text")),
    "a blank question": (({"question": " ", "answer": 1},), ("line 1", "the question")),
    "no answer": ((GOOD, "", {"question": "x"}), ("line 3", "as the answer")),
    "a truth": (({"question": "x", "answer": True},), ("line 1", "'True' as the answer")),
    "no number": (({"question": "x", "answer": "twelve"},), ("line 1", "no number as the answer ('twelve')")),
    "two numbers": (({"question": "x", "answer": "#### 5 or 7"},), ("line 1", "('5 or 7')")),
    "not a number": (({"question": "x", "answer": float("nan")},), ("line 1", "('nan')")),
    "a split of its own": (({**GOOD, "split": "dev"},), ("line 1", "'dev' as the split", "train or test")),
    "split or not": (({**GOOD, "split": "train"}, {"question": "x", "answer": 1}), ("line 2", "found no split")),
    "both splits": (
        ({**GOOD, "split": "train"}, {**GOOD, "split": "test"}),
        ("line 2 of mine.jsonl repeats", "another split"),
    ),
    "again": ((GOOD, "", {"question": "what is  1 + 1? ", "answer": 2}), ("line 3", "the problem of line 1: take")),
    "tested on twice": (({**GOOD, "split": "test"}, {**GOOD, "split": "test"}), ("line 2", "the problem of line 1: ")),
    "two answers": (({**GOOD, "split": "train"}, {**GOOD, "split": "train", "answer": 3}), ("line 2", "says 3 for 2")),
    "one alone": ((GOOD,), ("leaves none to train on",)),
}


@pytest.mark.parametrize(("rows", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_with_its_line(tmp_path, rows, words):
    file = write(tmp_path / "mine.jsonl", *rows)
    with pytest.raises(ConfigError) as caught:
        load(file)
    message = str(caught.value)
    assert message.startswith(f"problems={file}")
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\xff\n")
    with pytest.raises(ConfigError, match=r"line 2: found bytes that are no UTF-8"):
        load(file)


def test_a_folder_with_a_problem_in_both_files_or_without_one_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", {"question": "x", "answer": 1}, GOOD)
    with pytest.raises(ConfigError, match=r"test\.jsonl: No such file"):
        load(tmp_path)
    write(tmp_path / "test.jsonl", {"question": "y", "answer": 1}, "", {"question": "WHAT is  1 + 1?", "answer": 2})
    with pytest.raises(ConfigError, match=r"line 3 of test\.jsonl is line 2 of train\.jsonl, too"):
        load(tmp_path)
    write(tmp_path / "test.jsonl", {"question": "y", "answer": "1,000"})
    assert load(tmp_path)["test"] == [maths.Problem("y", "1,000")]
    write(tmp_path / "train.jsonl", GOOD, GOOD)  # a problem may be trained on more than once
    assert len(load(tmp_path)["train"]) == 2
    write(tmp_path / "test.jsonl", {"question": "y", "answer": "1,000"}, {"question": "Y", "answer": 1000})
    with pytest.raises(ConfigError, match=r"line 2 of test\.jsonl repeats the problem of line 1"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("problems", "words"),
    [
        ("nowhere", ("there is no such folder", "arithmetic")),
        ("nowhere.jsonl", ("No such file",)),
        ("gsm8k", ("tried openai/gsm8k on the hub", "set problems=DIR")),
        ("somebody/sums", ("tried somebody/sums on the hub", "set problems=DIR")),
        ("reasoning_gym:no_such", ("no_such",)),
    ],
)
def test_what_can_not_be_had_is_said_in_one_line(problems, words):
    with pytest.raises(ConfigError) as caught:
        load(problems)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_levels_and_shares_that_leave_nothing_are_refused():
    with pytest.raises(ConfigError, match="levels=1,6 is unknown: expected some of 1, 2, 3, 4, 5"):
        load("arithmetic", levels=["1", "6"])
    with pytest.raises(ConfigError, match="levels= is unknown"):
        load("arithmetic", levels=[])
    with pytest.raises(ConfigError, match="test_share=1e-05 leaves a level without test problems"):
        load("arithmetic", levels=["3"], test_share=0.00001)
    with pytest.raises(ConfigError, match=r"test_share=0\.99999 leaves a level without train problems"):
        load("arithmetic", levels=["3"], test_share=0.99999)


def test_reasoning_gym_asks_and_we_judge():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is an extra: pip install reasoning-gym==0.1.25")
    splits = load("reasoning_gym:chain_sum")
    assert not {p.key for p in splits["train"]} & {p.key for p in splits["test"]}
    assert len(splits["test"]) > 300
    assert len(splits["train"]) > 1000
    assert load("reasoning_gym:chain_sum", seed=5) == splits  # the seed decides nothing about what is held out
    problem = splits["test"][0]
    assert verify.check(f"#### {problem.gold}", problem.gold).strict
    with pytest.raises(ConfigError, match="problem 1: found no number as the answer"):
        load("reasoning_gym:letter_jumble")


# ---------------------------------------------------------------------------------------------------- replies, rewards


def task(format_reward=0.0):
    problem = maths.Problem("What is 6 * 7?", "42", "3")
    prompts = SimpleNamespace(maths=SimpleNamespace(messages=lambda text: [{"role": "user", "content": text}]))
    return maths.MathsTask(SimpleNamespace(prompts=prompts), {"train": [problem], "test": [problem]}, format_reward)


@pytest.mark.parametrize(
    ("reply", "verdict", "reward", "strict"),
    [
        ("6 * 7 = 42\n#### 42", "correct", 1.25, True),
        ("It is 42.", "correct", 1.0, False),
        ("#### 43", "incorrect", 0.0, False),
        ("", "incorrect", 0.0, False),
    ],
)
def test_a_right_reply_earns_one_and_its_form_what_is_set(reply, verdict, reward, strict):
    for format_reward in (0.0, 0.25):
        mine = task(format_reward)
        episode = mine.episode(mine.samples("test")[0])
        assert episode.reset()[-1]["content"] == "What is 6 * 7?"
        assert episode.step(reply) is None
        outcome = episode.outcome()
        assert outcome.verdict == verdict
        assert outcome.reward == (reward if format_reward else float(int(reward)))
        assert outcome.details == {"strict": strict, "level": "3"}


@given(st.text(max_size=80))
@settings(max_examples=100, deadline=None)
def test_whatever_is_replied_is_judged(reply):
    episode = task().episode(task().samples("test")[0])
    episode.step(reply)
    assert episode.outcome().verdict in ("correct", "incorrect")


# -------------------------------------------------------------------------------------------------- as a user runs it


@pytest.fixture
def run(train_py):
    """`run(**settings)` trains a tiny model on sums; gives exit status and output."""
    return partial(train_py, task="maths", samples_per_epoch=4, eval_samples=6)


def test_train_runs_on_sums_and_logs_what_maths_is_watched_by(run):
    status, output = run(output_dir="out", algorithm="grpo", group_size=2, max_new_tokens=4)
    assert status == 0, output
    lines = [json.loads(line) for line in Path("out/train.log").read_text().splitlines()]
    assert {"eval_strict", "eval_cut_off", "eval_accuracy"} <= set(lines[0])
    assert {"strict", "cut_off", "accuracy", "kl", "equal_groups"} <= set(lines[1])
    assert 0 <= lines[1]["cut_off"] <= 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"problems": "mine.jsonl"}, "mine.jsonl, line 2: found no number"),
        ({"problems": "gsm8k"}, "set problems=DIR"),
        ({"levels": "7"}, "levels=7 is unknown"),
        ({"format_reward": "-1"}, "format_reward=-1 is out of range"),
        ({"control": "coin"}, "control=coin is unknown"),
        ({"lr_schedule": "cosine"}, "lr_schedule=cosine is unknown"),
    ],
)
def test_bad_input_gets_one_line_before_any_model_is_loaded(run, monkeypatch, changes, words):
    write(Path("mine.jsonl"), GOOD, {"question": "x", "answer": "?"})
    monkeypatch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    status, output = run(output_dir="out", **changes)
    assert (status, output.count("\n")) == (2, 1)
    assert words in output
    assert not Path("out").exists()


def test_a_prompt_that_leaves_no_room_for_a_reply_is_refused_when_the_model_is_loaded(run):
    status, output = run(output_dir="out", max_new_tokens=1000)
    assert (status, output.count("\n")) == (2, 1)
    assert "max_new_tokens=1000 leaves no room in a context of 1024 tokens: the maths's prompt takes" in output


def test_a_run_can_not_go_on_with_other_problems(run):
    assert run(output_dir="out")[0] == 0
    write(Path("mine.jsonl"), *({"question": f"What is {i}?", "answer": i} for i in range(9)))
    status, output = run(output_dir="out", resume_from="latest", problems="mine.jsonl", num_epochs=2)
    assert status == 2
    assert "was trained with problems=arithmetic, now it is mine.jsonl" in output
    status, output = run(output_dir="out", resume_from="latest", levels="2", num_epochs=2)
    assert status == 2
    assert "was trained with levels=" in output


def test_the_maths_presets_are_valid_and_read_their_problems():
    for path in (ROOT / "configs").glob("*maths*.yaml"):
        config = parse(train.TrainConfig, ["--config", str(path)])
        train.check(config)
        maths.prepare(config)
    config = parse(train.TrainConfig, ["--config", str(ROOT / "configs/ppo_gsm8k.yaml"), "device=cuda"])
    train.check(config)
    assert arithmetic.TRAINING > 1000
