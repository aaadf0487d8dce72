"""The benchmark of learning: what it measures, its control, its verdicts."""

import json
import sys
from pathlib import Path

import pytest

import tasks.quiz
from lora_ppo.quiz import Quiz
from lora_ppo.statistics import newcombe_interval
from tools.bench import learning as bench_learning


@pytest.fixture
def bench(llama, tmp_path, monkeypatch, capsys):
    """`bench(...)` runs the benchmark with three steps on a tiny model; gives exit status, output, JSON."""
    quiz = Quiz("Which?", ("alpha", "beta", "gamma", "delta"), 0)
    monkeypatch.setattr(tasks.quiz, "make_quiz", lambda policy, question, written: quiz)
    monkeypatch.chdir(tmp_path)

    def bench(*arguments):
        words = ["--steps", "3", "--every", "2", "--seeds", "2", "--samples", "8"]
        words += ["--set", f"model_name={llama}", "max_new_tokens=6", "temperature=1.0", "learning_rate=1e-2"]
        monkeypatch.setattr(sys, "argv", ["bench_learning.py", *words, *arguments])
        status = bench_learning.main()
        output = capsys.readouterr()
        file = Path("bench_learning.json")
        return status, output.out + output.err, json.loads(file.read_text()) if file.exists() else None

    return bench


def test_the_benchmark_measures_before_between_and_after(bench):
    status, output, record = bench()
    assert status == 0
    assert [run["seed"] for run in record["runs"]["ours"]] == [0, 1]
    for run in record["runs"]["ours"]:
        assert [point["step"] for point in run["points"]] == [0, 2, 3]
        assert all(len(point["right"]) == 8 for point in run["points"])
        assert set(run["points"][-1]["seconds"]) == {"sampling", "judging", "steps"}
        assert run["points"][0]["seconds"]["steps"] == 0 < run["points"][-1]["seconds"]["steps"]
    for i, row in enumerate(record["summary"]["ours"]):
        right = [sum(run["points"][i]["right"]) / 8 for run in record["runs"]["ours"]]
        assert row["accuracy"] == pytest.approx(sum(right) / 2)
        assert (row["worst"], row["best"]) == (min(right), max(right))
    assert "3 answers" in output


def test_the_control_gives_the_bases_rewards_in_another_order(bench, monkeypatch):
    given, earned = [], []
    original_step, original_prepare = bench_learning.Ours.step, bench_learning.prepare

    def step(trainer, prompt, response, reward):
        given.append(reward)
        original_step(trainer, prompt, response, reward)

    def prepare(*arguments):
        material = original_prepare(*arguments)
        earned.append(material.rewards)
        return material

    monkeypatch.setattr(bench_learning.Ours, "step", step)
    monkeypatch.setattr(bench_learning, "prepare", prepare)
    status, output, record = bench("--control")
    assert status == 0
    assert given == [reward for rewards in earned for reward in rewards]
    assert {row["seed"] for row in record["control"]} == {"0", "1", "all"}
    assert output.count("control, seed") == 6


def test_shuffled_rewards_are_those_the_base_earned(llama, monkeypatch):
    """Rewards of +1 and -1 keep their numbers, and their places are drawn from the seed."""
    from config import Config

    monkeypatch.setattr(tasks.quiz, "make_quiz", lambda policy, question, written: Quiz("Which?", tuple("abcd"), 0))
    seen = {}
    original = tasks.quiz.QuizTask.outcomes

    def outcomes(task, samples, answers):
        found = original(task, samples, answers)
        seen.update({sample: outcome.reward for sample, outcome in zip(samples, found, strict=True)})
        return found

    monkeypatch.setattr(tasks.quiz.QuizTask, "outcomes", outcomes)
    config = Config(model_name=str(llama), device="cpu", dtype="float32", max_new_tokens=4)
    material = bench_learning.prepare(config, "reader", 24, 4, control=True)
    assert sorted(material.rewards) == sorted(seen[sample] for sample in material.train)
    assert not {sample.fact for sample in material.train} & {sample.fact for sample in material.test}


def test_settings_are_chosen_on_facts_of_the_training_split(llama, monkeypatch):
    from config import Config

    monkeypatch.setattr(tasks.quiz, "make_quiz", lambda policy, question, written: Quiz("Which?", tuple("abcd"), 0))
    config = Config(model_name=str(llama), device="cpu", dtype="float32", max_new_tokens=4)
    material = bench_learning.prepare(config, "reader", 24, 40, validation=True)
    held_out = {sample.fact for sample in material.task.samples("test")}
    assert not {sample.fact for sample in material.test} & held_out
    assert not {sample.fact for sample in material.test} & {sample.fact for sample in material.train}
    assert len(material.test) == 40


def test_trl_must_be_there_and_be_the_version_that_is_compared(bench, tmp_path, monkeypatch):
    assert "holds no trl: pip install --no-deps --target" in bench("--trl", str(tmp_path))[1]
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("__version__ = '0.12.0'\nPPOTrainer = None\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    status, output, record = bench("--trl", str(tmp_path))
    sys.modules.pop("trl", None)  # for good: monkeypatch would put it back
    assert (status, record) == (2, None)
    assert "holds trl 0.12.0, expected 0.11.4" in output


def test_verdicts_compare_sample_by_sample():
    """Two seeds of three samples; both are right on three, ours alone on two, TRL's alone on one."""

    def run(*right):
        points = [
            {"step": step, "right": hits, "states_fact": 0, "mean_tokens": 9.0, "most_tokens": 9, "kl": 0.1}
            for step, hits in enumerate(right)
        ]
        return {"seed": 0, "points": [point | {"seconds": {"steps": 1.0}} for point in points]}

    none = [False] * 3
    runs = {
        "ours": [run(none, [True, True, True]), run(none, [True, True, False])],
        "trl": [run(none, [True, False, True]), run(none, [True, False, True])],
    }
    summaries = {arm: bench_learning.summary(runs[arm]) for arm in runs}
    low, high = (f"{100 * bound:+.1f}" for bound in newcombe_interval(3, 2, 1, 0))
    assert f"+16.7 points ({low} to {high}) after 1" in " ".join(bench_learning.verdicts(summaries, runs))
