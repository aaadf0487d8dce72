"""The benchmark of learning on shell tasks: one warm start, a server of its own, its arms, its table."""

import json
import sys
from pathlib import Path

import pytest
from support.bench import programs_here
from test_shell_entries import row

import evaluate
import train
from tasks.os_interaction import split
from tasks.os_interaction.entries import read_entries
from tools import warm_start
from tools.bench import runs
from tools.bench import shell_learning as bench_shell

PROGRAMS = {"train.py": train, "evaluate.py": evaluate, "warm_start.py": warm_start}


@pytest.fixture
def bench(llama, tmp_path, monkeypatch, capsys, sandboxes):
    """`bench(...)` runs it with a tiny model, all programs but the server in this process; gives status and output."""
    pytest.importorskip("trl")
    pytest.importorskip("fastapi")
    calls = []

    monkeypatch.setattr(runs, "call", programs_here(monkeypatch, capsys, PROGRAMS, calls))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own = tmp_path / "own"
    own.mkdir()
    (own / "entries.json").write_text(json.dumps({f"e{i}": row(level="1") for i in range(10)}))
    monkeypatch.setattr(bench_shell, "OWN", own)

    def bench(*arguments, **changes):
        tiny = {"model_name": llama, "dtype": "float32", "device": "cpu", "max_rounds": 2, "max_new_tokens": 4}
        words = ["--folder", str(tmp_path / "runs"), "--seeds", "0", "--samples", "3", *arguments]
        words += ["--warm-set", *(f"{name}={value}" for name, value in tiny.items()), "warm_epochs=1", "lora_r=4"]
        tiny |= {"lora_r": 4, "samples_per_epoch": 8, "batch_size": 8, "mini_batch_size": 8, "num_epochs": 1}
        tiny["gradient_accumulation_steps"] = 1
        words += ["--set", *(f"{name}={value}" for name, value in (tiny | {"eval_samples": 2} | changes).items())]
        monkeypatch.setattr(sys, "argv", ["shell_learning.py", *words])
        calls.clear()
        status = bench_shell.main()
        output = capsys.readouterr()
        return status, output.out + output.err, list(calls)

    return bench


def test_every_arm_goes_on_from_one_warm_start_and_is_measured_beside_it(bench, tmp_path):
    status, output, calls = bench("--arms", "ppo", "grpo")
    assert status == 0, output
    assert calls == ["warm_start.py", *["train.py", "evaluate.py"] * 2]
    rows = [line for line in output.splitlines() if line.startswith(("| PPO, value head, 0", "| GRPO, 0"))]
    assert [line.count("|") for line in rows] == [len(bench_shell.HEADINGS) + 1] * 2
    assert "missing: control, seed 0: not begun" in output
    assert "GRPO, 1 seeds: +0.0 points" in output
    models = json.loads((tmp_path / "runs/ppo_0/evaluation.json").read_text())["models"]
    assert [Path(model["folder"] or "base").name for model in models] == ["base", "warm", "epoch_1"]
    assert [model["step"] for model in models] == [None, 0, 1]
    found = bench_shell.figures(tmp_path / "runs/ppo_0")
    assert (found["steps"], found["episodes"], len(found["right"])) == (1, 8, 3)
    assert bench("--arms", "ppo", "grpo")[2] == []
    (tmp_path / "runs/grpo_0/evaluation.json").unlink()
    assert bench("--arms", "grpo")[2] == ["evaluate.py"]
    status, output, _ = bench("--arms", "ppo", learning_rate=0.5)
    assert (status, "ppo_0 was made with learning_rate=" in output) == (1, True)


def test_settings_are_chosen_on_training_entries(bench, tmp_path):
    status, output, _ = bench("--validation", "--arms", "control")
    assert status == 0, output
    names = [{entry.name for entry in read_entries(tmp_path / place)} for place in ("own", "runs/entries")]
    assert names[1] == {entry.name for entry in split(read_entries(tmp_path / "own"), 0.3, ["1"])["train"]}
    assert len(names[1]) < len(names[0])
    record = json.loads((tmp_path / "runs/control_0/evaluation.json").read_text())
    assert record["settings"]["entries"] == str(tmp_path / "runs/entries")
