"""The benchmark of the voice: its arms, going on where it was stopped, its tables."""

import json
import sys

import pytest
from support.bench import programs_here

import evaluate
import train
from lora_ppo.watching import distinct
from tools import train_reward_model
from tools.bench import runs
from tools.bench import voice as bench_voice

SPLITS = ("train", "test")
PROGRAMS = {"train.py": train, "evaluate.py": evaluate, "train_reward_model.py": train_reward_model}


@pytest.fixture
def bench(llama, tmp_path, monkeypatch, capsys):
    """`bench(...)` runs it with two steps on a tiny model, all programs in this process; gives status and output."""
    calls = []

    monkeypatch.setattr(runs, "call", programs_here(monkeypatch, capsys, PROGRAMS, calls))
    monkeypatch.chdir(tmp_path)
    small = tmp_path / "data"  # of each topic a few
    small.mkdir()
    for split, every in (("train", 6), ("test", 4)):
        lines = (bench_voice.DATA / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (small / f"{split}.jsonl").write_text("".join(lines[::every]), encoding="utf-8")
    monkeypatch.setattr(bench_voice, "DATA", small)

    def bench(*arguments, **changes):
        tiny = {"model_name": llama, "dtype": "float32", "samples_per_epoch": 8, "batch_size": 4, "device": "cpu"}
        tiny |= {"mini_batch_size": 4, "max_new_tokens": 4, "eval_samples": 6, "eval_every": 1}
        role = bench_voice.ROOT / "prompts/voice/tutor.yaml"
        tiny |= {"prompts": role} | changes
        words = ["--folder", str(tmp_path / "runs"), "--seeds", "0", "--samples", "10", *arguments]
        words += ["--set", *(f"{name}={value}" for name, value in tiny.items())]
        words += ["--reward-set", f"model_name={llama}", "device=cpu", "dtype=float32", "lora_r=1", "max_new_tokens=2"]
        words += [f"prompts={role}", f"better_prompts={role}", "own_replies=2"]
        monkeypatch.setattr(sys, "argv", ["voice.py", *words])
        calls.clear()
        status = bench_voice.main()
        output = capsys.readouterr()
        return status, output.out + output.err, list(calls)

    return bench


def cells(output: str, title: str) -> list[list[str]]:
    """The rows of the table whose title begins so."""
    rows = [line for line in output.splitlines() if line.startswith(f"| {title}")]
    assert all(row.count("|") == len(bench_voice.HEADINGS) + 1 for row in rows)
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


PLACE = {name: place for place, name in enumerate(bench_voice.HEADINGS)}


def test_every_arm_is_run_once_and_the_table_tells_what_is_there_and_what_is_not(bench, tmp_path):
    status, output, calls = bench("--arms", "rank1", "rank4", "control")
    assert status == 0, output
    assert calls == ["train_reward_model.py", *["train.py", "evaluate.py"] * 3]
    one, random, four = (cells(output, title)[0] for title in ("rank 1 on o", "the same", "rank 4"))
    sizes = [int(found[PLACE["parameters"]].replace(",", "")) for found in (one, random, four)]
    assert sizes[2] == 4 * sizes[0] == 4 * sizes[1]
    assert "rank 1 on o, v, up, down less rank 4" in output
    assert "of 15 held-out pairs (computers" in output
    assert "demands on rank 1, seed 0: +0.0 points in the voice, at least +40: NO" in output
    assert "missing: " not in output
    the_figures_are_those_of_the_answers(tmp_path / "runs/rank1_0")
    assert bench("--arms", "rank1")[2] == []
    the_adapters_are_plain_ones(bench("--check")[1])
    (tmp_path / "runs/rank1_0/evaluation.json").unlink()
    status, output, calls = bench("--table")
    assert (status, calls, len(cells(output, "rank 4"))) == (0, [], 1)
    assert "missing: rank1, seed 0: at step 2 of 2" in output
    assert "missing: all, seed 0: not begun" in output
    assert bench("--arms", "rank1")[2] == ["evaluate.py"]
    log = (tmp_path / "runs/bench.log").read_text().splitlines()
    assert "rank1_0: begins, at step 2 of 2" in log[-2]
    assert log[-1].endswith("rank1_0: finished")
    with (tmp_path / "data/train.jsonl").open("a") as file:
        file.write("\n")
    status, output, calls = bench("--arms", "rank1")
    assert (status, calls, "was made with train pairs=" in output) == (2, [], True)


def the_adapters_are_plain_ones(output):
    assert "greedy replies of epoch_1 are the same in plain PEFT" in output
    assert int(output.split(" of 12 ")[0]) >= 11  # a random model's best two may be as good as one
    assert float(output.split("differ by at most ")[1]) < 1e-4


def the_figures_are_those_of_the_answers(folder):
    """Facts and different pairs of words, of base and adapter, from what they said."""
    found, record = bench_voice.figures(folder), json.loads((folder / "evaluation.json").read_text())
    base, adapter = record["models"]
    assert [sum(pair[i] for pair in found["kept"]) for i in (0, 1)] == [adapter["facts_stated"], base["facts_stated"]]
    assert [sum(pair[i] for pair in found["right"]) for i in (0, 1)] == [adapter["correct"], base["correct"]]
    said = [[row[name]["answer"] for row in record["answers"]] for name in (adapter["folder"], "base")]
    assert found["distinct"] == [distinct(texts, 2) for texts in said]


def test_a_run_that_fails_is_told_of_and_one_that_stop_if_ended_is_measured_where_it_ended(bench, tmp_path):
    (tmp_path / "runs/rank4_0").mkdir(parents=True)
    (tmp_path / "runs/rank4_0/settings.json").write_text('{"lora_r": 2}')
    status, output, _ = bench("--arms", "rank4", "rank1", stop_if="distinct_2>0.01")
    assert status == 1
    assert "rank4_0 was made with" in output
    assert cells(output, "rank 1 on o")[0][PLACE["steps"]] == "1"


def test_settings_are_chosen_on_training_topics(bench, tmp_path):
    status, output, _ = bench("--validation", "--arms", "rank1", "--name", "faster", learning_rate=0.1)
    assert status == 0, output
    paths = [folder / f"{split}.jsonl" for folder in (tmp_path / "runs/data", tmp_path / "data") for split in SPLITS]
    train_rows, test_rows, all_rows, held_out = (
        [json.loads(line)["prompt"] for line in path.read_text(encoding="utf-8").splitlines()] for path in paths
    )
    assert (sorted([*train_rows, *test_rows]), len(test_rows)) == (sorted(all_rows), 10)
    assert set(held_out).isdisjoint(all_rows)
    asked = {row["question"] for row in json.loads((tmp_path / "runs/faster_0/evaluation.json").read_text())["answers"]}
    assert asked == set(test_rows)
    assert cells(output, "faster")[0][PLACE["steps"]] == "2"
    assert "missing: " not in output
    assert "of 10 held-out pairs (cities and countries" in output
