"""The benchmark of mathematics: its arms, going on where it was stopped, its table."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.bench import programs_here

import evaluate
import train
from lora_ppo.journal import LineFile
from lora_ppo.settings import ConfigError
from tools.bench import maths as bench_maths
from tools.bench import runs

PROGRAMS = {"train.py": train, "evaluate.py": evaluate, "maths.py": bench_maths}


@pytest.fixture
def bench(llama, tmp_path, monkeypatch, capsys):
    """`bench(...)` runs it with two steps on a tiny model, all programs in this process; gives status and output."""
    calls = []

    monkeypatch.setattr(runs, "call", programs_here(monkeypatch, capsys, PROGRAMS, calls))
    monkeypatch.chdir(tmp_path)

    def bench(*arguments, **changes):
        tiny = {"model_name": llama, "dtype": "float32", "samples_per_epoch": 4, "batch_size": 4, "group_size": 2}
        tiny |= {"mini_batch_size": 4, "max_new_tokens": 4, "eval_samples": 6, "eval_every": 1, "lora_r": 4} | changes
        words = ["--folder", str(tmp_path / "runs"), "--seeds", "0", "--samples", "12", *arguments]
        words += ["--set", *(f"{name}={value}" for name, value in tiny.items())]
        monkeypatch.setattr(sys, "argv", ["maths.py", *words])
        calls.clear()
        status = bench_maths.main()
        output = capsys.readouterr()
        return status, output.out + output.err, list(calls)

    return bench


def test_every_arm_is_run_once_and_the_table_tells_what_is_there(bench, tmp_path):
    status, output, calls = bench("--arms", "grpo", "trl")
    assert status == 0, output
    assert calls == ["train.py", "evaluate.py", "maths.py", "evaluate.py"]
    rows = [line for line in output.splitlines() if line.startswith(("| GRPO, 0", "| TRL"))]
    assert len(rows) == 2
    assert all(row.count("|") == len(bench_maths.HEADINGS) + 1 for row in rows)
    assert "GRPO less TRL's GRPOTrainer" in output
    logs = {arm: (tmp_path / "runs" / f"{arm}_0" / "train.log").read_text().splitlines() for arm in ("grpo", "trl")}
    ours, theirs = ([json.loads(line) for line in lines if '"step": 0' not in line] for lines in logs.values())
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == [1, 2]
    assert all({"accuracy", "seconds", "equal_groups"} <= set(line) for line in ours + theirs)
    first, second = (json.loads((tmp_path / f"runs/{arm}_0/evaluation.json").read_text()) for arm in ("grpo", "trl"))
    assert first["models"][0]["accuracy"] == second["models"][0]["accuracy"]  # the same base, problems and seeds
    assert [row["question"] for row in first["answers"]] == [row["question"] for row in second["answers"]]
    assert bench("--arms", "grpo", "trl")[2] == []
    (tmp_path / "runs/grpo_0/evaluation.json").unlink()
    assert bench("--arms", "grpo", "trl")[2] == ["evaluate.py"]
    assert bench("--table")[1].count("| GRPO, 0") == 1


def test_settings_are_chosen_on_training_problems(bench, tmp_path):
    """No number of the test split is in the problems of --validation, and none of its held-out ones in its training."""
    status, output, _ = bench("--validation", "--arms", "grpo", "--samples", "1000")
    assert status == 0, output
    rows = {
        split: [json.loads(line) for line in (tmp_path / f"runs/problems/{split}.jsonl").read_text().splitlines()]
        for split in ("train", "test")
    }
    numbers = {split: {digits(row["question"]) for row in found} for split, found in rows.items()}
    assert not numbers["train"] & numbers["test"]
    tested = {tuple(sorted(one.numbers)) for one in bench_maths.sums("test", 0, ["1", "2", "3"], 0.3)}
    assert not tested & (numbers["train"] | numbers["test"])
    assert len({row["question"] for row in rows["test"]}) == len(rows["test"]) > 60
    record = json.loads((tmp_path / "runs/grpo_0/evaluation.json").read_text())
    assert len(record["answers"]) == len(rows["test"])  # no more are asked than there are


def digits(question: str) -> tuple[int, ...]:
    return tuple(sorted(int(word) for word in question.replace("?", " ").replace(".", " ").split() if word.isdigit()))


def test_a_program_that_fails_is_named_and_what_it_took_is_noted(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.py ended with status 2"):
        runs.call([sys.executable, str(runs.ROOT / "train.py"), "no_such=1"], tmp_path)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert 1 < cost["peak_mb"] < 10_000
    assert cost["wall_seconds"] > 0
    runs.call([sys.executable, "-c", "bytearray(200_000_000)"], tmp_path)
    more = json.loads((tmp_path / "cost.json").read_text())
    assert more["peak_mb"] >= max(180, cost["peak_mb"])
    assert more["wall_seconds"] > cost["wall_seconds"]
    assert os.listdir(tmp_path) == ["cost.json"]


def test_ctrl_c_is_waited_for_and_what_it_cost_is_noted(tmp_path):
    """Both get it, as at a terminal; the program ends after its step."""
    program = "import signal, time; signal.signal(2, lambda *_: None); print('there', flush=True); time.sleep(1.5)"
    bench = (
        f"import sys; from pathlib import Path; from tools.bench import runs; folder = Path({str(tmp_path)!r})\n"
        f"runs.call([sys.executable, '-c', {program!r}], folder, folder / 'log')"
    )
    process = subprocess.Popen([sys.executable, "-c", bench], cwd=runs.ROOT, start_new_session=True)
    until = time.monotonic() + 60
    while not (tmp_path / "log").exists() or "there" not in (tmp_path / "log").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    assert json.loads((tmp_path / "cost.json").read_text())["wall_seconds"] > 1


def test_a_run_of_trl_that_was_killed_goes_on_as_if_it_had_not_been(bench, tmp_path, monkeypatch):
    changes = {"samples_per_epoch": 8, "save_every": 1}
    assert bench("--arms", "trl", **changes)[0] == 0
    (tmp_path / "runs").rename(tmp_path / "whole")
    append = LineFile.append

    def killed(log, line):
        append(log, line)  # its checkpoint would be next
        if line["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LineFile, "append", killed)
        assert bench("--arms", "trl", **changes)[0] == 2  # its program ended with 130
    (tmp_path / "runs/trl_0/trainer/checkpoint-3").mkdir()  # and was begun
    status, output, calls = bench("--arms", "trl", **changes)
    assert (status, calls) == (0, ["maths.py", "evaluate.py"]), output
    whole, resumed = (LineFile(tmp_path / root / "trl_0/train.log").read()[0] for root in ("whole", "runs"))
    assert [line["step"] for line in resumed] == [1, 2, 3, 4]
    for line in (*whole, *resumed):
        del line["seconds"]
    assert resumed == whole
    weights = [(tmp_path / root / "trl_0/epoch_1/adapter_model.safetensors").read_bytes() for root in ("whole", "runs")]
    assert weights[0] == weights[1]


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(bench, tmp_path):
    (tmp_path / "runs/grpo_0").mkdir(parents=True)
    (tmp_path / "runs/grpo_0/effective_config.yaml").write_text("seed: 0\n")
    status, output, calls = bench("--arms", "grpo")
    assert (status, calls) == (0, ["train.py", "evaluate.py"]), output
    assert LineFile(tmp_path / "runs/grpo_0/train.log").read()[0][0].keys() > {"timestamp", "eval_accuracy"}


def test_other_settings_are_not_mixed_with_what_a_folder_has(bench):
    assert bench("--arms", "grpo")[0] == 0
    status, output, calls = bench("--arms", "grpo", learning_rate=0.01)
    assert (status, calls) == (2, [])
    assert "was made with learning_rate=0.0002, now it is 0.01: name another --folder" in output


def test_a_run_whose_cost_was_never_noted_is_in_the_table(bench, tmp_path):
    assert bench("--arms", "grpo")[0] == 0
    (tmp_path / "runs/grpo_0/cost.json").unlink()
    status, output, _ = bench("--table")
    assert status == 0
    assert "| GRPO, 0 |" in output
