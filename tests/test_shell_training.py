"""Shell tasks from train.py and evaluate.py, and the warm start."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.shell import SMALL
from support.training import BASE
from test_shell_entries import row

import evaluate
from config import Config
from lora_ppo import evaluation
from lora_ppo.chat import encode_chat
from lora_ppo.checkpoint import verify_checkpoint
from lora_ppo.episodes import Outcome
from lora_ppo.loading import load_policy
from lora_ppo.run import Run
from lora_ppo.settings import ConfigError, save_yaml
from tasks.os_interaction import read_opening
from tasks.os_interaction.entries import Entry
from tasks.os_interaction.episode import Rules, ShellEpisode
from tasks.os_interaction.sandbox import Namespaces
from tools import warm_start
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
OPENING = [{"role": "user", "content": "Rules."}, {"role": "assistant", "content": "OK."}]
ENTRY = Entry("x", "Create /x.", "true", "test -f /x", "touch /x; echo yes", ("touch",), "1")


@pytest.fixture
def shell(tmp_path, monkeypatch, sandboxes) -> dict:
    """Settings of a shell task with ten entries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "e.json").write_text(json.dumps({f"e{i}": row(level=str(1 + i % 2)) for i in range(10)}))
    (tmp_path / "o.json").write_text(json.dumps(OPENING))
    return {
        "task": "os_interaction",
        "entries": tmp_path / "e.json",
        "opening": tmp_path / "o.json",
        "record_dir": tmp_path / "recorded",
        "max_rounds": 2,
    }


def test_training_plays_learns_and_records(train_py, shell, tmp_path):
    status, output = train_py(**shell, output_dir="run", samples_per_epoch=4, eval_samples=2, num_epochs=1)
    assert status == 0, output
    assert "10 of 10 entries are supported" in output
    lines = [json.loads(line) for line in (tmp_path / "run" / "train.log").read_text().splitlines()]
    assert [line["outcome"] for line in lines[1:]] == ["taken"]
    assert lines[1]["reward"] == -0.5
    assert (tmp_path / "run" / "epoch_1" / "adapter_model.safetensors").is_file()
    more = {"samples_per_epoch": 4, "eval_samples": 2, "num_epochs": 2, "resume_from": "latest"}
    status, output = train_py(**shell, **more, output_dir="run", entry_levels="1")
    assert (status, "was trained with entry_levels=['1', '2', '3'], now it is ['1']" in output) == (2, True), output
    there = shell["entries"].read_text()
    shell["entries"].write_text(there.replace("Create", "Make", 1))  # under the same name
    status, output = train_py(**shell, **more, output_dir="run")
    assert (status, "was trained with entries_digest=" in output) == (2, True), output
    recording = next((tmp_path / "recorded").glob("*.json"))
    done = subprocess.run(
        [sys.executable, "-m", "tasks.os_interaction", "play", "--replay", str(recording)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Create /x." in done.stdout
    assert "incorrect: the check fails" in " ".join(done.stdout.split())


def test_evaluation_tells_levels_skills_and_how_episodes_ended(llama, shell, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = {"model_name": llama, "device": "cpu", "num_samples": 2, "max_new_tokens": 6, "samples_per_problem": 2}
    arguments = [f"{name}={value}" for name, value in (shell | words).items()]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    assert evaluate.main() == 0
    output = capsys.readouterr().out
    assert "how episodes ended" in output
    (model,) = json.loads((tmp_path / "evaluation.json").read_text())["models"]
    assert model["reasons"] == {"invalid action": {"samples": 2, "share": 1.0}}
    assert set(model["by_level"]) == {"1", "2"}
    assert model["by_skill"]["touch"]["samples"] == 2


def test_samples_without_an_outcome_are_told_of_each_model(capsys):
    base, trained = (
        evaluation.Result(name, "", None, [evaluation.Answer("q", "a", 1, Outcome(verdict, 0.0))])
        for name, verdict in (("base", "correct"), ("epoch_1", "unknown"))
    )
    evaluate.show(evaluate.report(evaluate.EvaluateConfig(), [base, trained]))
    output = capsys.readouterr().out
    assert "epoch_1: 1 more samples had no outcome" in output
    assert output.count("no outcome") == 1


def test_the_warm_start_shows_the_tokens_of_an_episode(llama_policy, sandboxes, tmp_path):
    (tmp_path / "o.json").write_text(json.dumps(OPENING))
    rules = Rules(opening=read_opening(tmp_path / "o.json"))
    found = warm_start.conversation(llama_policy, ShellEpisode(ENTRY, lambda: Namespaces(SMALL), rules))
    first, last = warm_start.truthful_replies(ENTRY.truth)
    assert first == "Act: bash\n```bash\ntouch /x; echo yes\n```"
    chat = [*OPENING, {"role": "user", "content": "Create /x."}, {"role": "assistant", "content": first}]
    chat += [{"role": "user", "content": "The output of the OS:\nyes"}, {"role": "assistant", "content": last}]
    tokenizer = llama_policy.tokenizer
    text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
    assert tokenizer.decode(found["input_ids"]) == text
    chosen = [i for i, own in zip(found["input_ids"], found["completion_mask"], strict=True) if own]
    assert tokenizer.decode(chosen) == f"{first}<|im_end|>{last}<|im_end|>"
    opening = encode_chat(tokenizer, chat[:3])
    assert found["input_ids"][: len(opening)] == opening
    assert not any(found["completion_mask"][: len(opening)])


def test_the_warm_start_lowers_the_loss_and_training_goes_on_from_it(
    llama, train_py, shell, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("trl")
    given = {"model_name": llama, "device": "cpu", "lora_r": 4, "warm_dir": "warm", "warm_epochs": 2, "lora_alpha": 8}
    given |= {"warm_learning_rate": 1e-2, "warm_batch_size": 4}
    monkeypatch.setattr(sys, "argv", ["warm_start.py", *(f"{k}={v}" for k, v in (shell | given).items())])
    assert warm_start.main() == 0
    losses = capsys.readouterr().err.partition("loss by epoch: ")[2].partition(";")[0].split(", ")
    assert float(losses[1]) < float(losses[0]) - 0.1
    assert verify_checkpoint(tmp_path / "warm")["step"] == 0
    status, output = train_py(**shell, output_dir="run", resume_from="warm", samples_per_epoch=4, eval_samples=2)
    assert status == 0, output
    assert "Resuming from warm at step 0" in output
    policy, config = load_policy(Config(model_name=str(llama), device="cpu", lora_r=4, lora_alpha=8, resume="warm"))
    run = Run(policy, config, print)  # the tutor goes on from it, too
    warm = load_file("warm/adapter_model.safetensors")
    saved = load_file(run.folder / "step_0/adapter_model.safetensors")
    run.close()
    assert warm.keys() == saved.keys()
    assert all(torch.equal(warm[name], saved[name]) for name in warm)


def test_the_warm_start_leaves_out_by_name_what_does_not_go_right(llama_policy, sandboxes):
    entries = {
        "harbor": replace(ENTRY, files={"solution": b""}),
        "broken": replace(ENTRY, start="exit 3"),
        "slow": replace(ENTRY, truth="sleep 9"),
        "wrong": replace(ENTRY, truth="echo no"),
        "long": replace(ENTRY, truth="touch /x; seq 9999"),
        "right": replace(ENTRY, truth="cat >/x <<'END'\n```\nEND", check="test $(wc -l </x) = 1"),
    }
    rules = Rules(seconds=2, output_length=1_000_000)
    episodes = [
        ShellEpisode(replace(entry, name=name), lambda: Namespaces(SMALL), rules) for name, entry in entries.items()
    ]
    said: list[str] = []
    assert len(warm_start.conversations(llama_policy, episodes, said.append)) == 1
    reasons = ("a file that no model can see", "start script failed", "more than 2 s", "the check fails")
    for line, name, why in zip(said, [*entries][:-1], (*reasons, "the context has"), strict=True):
        assert line.startswith(f"left out: {name}: ")
        assert why in line
    once = [ShellEpisode(ENTRY, lambda: Namespaces(SMALL), Rules(rounds=1))]
    with pytest.raises(ConfigError, match="no ground truth can be shown"):
        warm_start.conversations(llama_policy, once, said.append)
    assert said[-1] == "left out: x: it ended with its truth: rounds"


@pytest.mark.parametrize("word", ["warm_epochs=0", "warm_batch_size=0", "warm_learning_rate=0"])
def test_the_warm_start_names_a_setting_that_is_out_of_range(word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["warm_start.py", "task=os_interaction", word])
    assert warm_start.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {word} is out of range: expected ")


@pytest.fixture
def script(llama, shell, tmp_path):
    """`script(name, *words)` begins a script of the repository's in another folder, with a server on a free port."""
    pytest.importorskip("uvicorn")
    given = BASE | shell | {"model_name": str(llama), "samples_per_epoch": 4, "eval_samples": 2}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    save_yaml(TrainConfig(**given), tmp_path / "c.yaml")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "another folder"
    folder.mkdir()
    environment = os.environ | {"PORT": str(port), "PYTHON": Path(sys.executable).name, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"

    def begin(name, *words):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen([ROOT / "scripts" / name, *words], cwd=folder, env=environment, **pipes)
        process.port = port
        return process

    return begin


def no_server_left(port: int) -> bool:
    said = subprocess.run(["ps", "axo", "args"], capture_output=True, text=True).stdout
    return f"port={port}" not in said and f"127.0.0.1:{port}" not in said


def test_the_scripts_stop_go_on_and_evaluate_from_another_folder(script, tmp_path):
    run = tmp_path / "another folder" / "my run"
    training = script("train_os.sh", "../c.yaml", "my run", "500", "4")
    until = time.monotonic() + 200
    while not (run / "train.log").exists():
        assert training.poll() is None, training.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.1)
    training.send_signal(signal.SIGTERM)
    output = training.communicate(timeout=100)[0]
    assert training.returncode == 130, output
    assert "To go on: " in output
    assert no_server_left(training.port)
    training = script("train_os.sh", "../c.yaml", "my run", "3", "4", "resume_from=what/it/began/from")
    output = training.communicate(timeout=300)[0]
    assert training.returncode == 0, output
    assert "Resuming from" in output
    report = tmp_path / "evaluation.json"

    def evaluated(*words):
        evaluating = script("evaluate_os.sh", "../c.yaml", "my run/epoch_3", *words, f"output_file={report}")
        output = evaluating.communicate(timeout=300)[0]
        assert evaluating.returncode == 0, output
        return [model["name"] for model in json.loads(report.read_text())["models"]]

    assert evaluated("evaluate", "2") == ["base", "epoch_3"]
    assert evaluated("both", "2", f"merged_model_path={tmp_path}/m") == ["base", "epoch_3", "merged"]
    assert no_server_left(training.port)


def test_training_waits_for_a_server_that_was_killed_and_finishes_every_epoch(llama, shell, tmp_path):
    given = BASE | shell | {"model_name": str(llama), "samples_per_epoch": 4, "eval_samples": 2, "num_epochs": 30}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given |= {"output_dir": "run", "record_dir": ""}
    words = [f"{name}={value}" for name, value in given.items()]
    server = [sys.executable, "-m", "tasks.os_interaction.server", f"port={port}"]
    server += [f"{name}={shell[name]}" for name in ("entries", "opening", "max_rounds")]
    log = (tmp_path / "server.log").open("w")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

    def serving() -> subprocess.Popen:
        process, until = subprocess.Popen(server, cwd=ROOT, stderr=log), time.monotonic() + 60
        while (tmp_path / "server.log").read_text().count(" serves ") < len(started) + 1:
            assert time.monotonic() < until, (tmp_path / "server.log").read_text()
            time.sleep(0.05)
        started.append(process)
        return process

    started: list[subprocess.Popen] = []
    serving()
    program = [sys.executable, ROOT / "train.py", *words, f"server=http://127.0.0.1:{port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    training, until = subprocess.Popen(program, cwd=tmp_path, env=environment, **pipes), time.monotonic() + 200
    try:
        for epoch in (2, 5):
            while not (tmp_path / f"run/epoch_{epoch}").exists():
                assert training.poll() is None, training.stdout.read()
                assert time.monotonic() < until
                time.sleep(0.02)
            started[-1].kill()
            started[-1].wait()
            time.sleep(1)
            serving()
        output = training.communicate(timeout=300)[0]
    finally:
        for process in (training, *started):
            process.kill()
            process.wait()
        log.close()
    assert training.returncode == 0, output
    assert output.count("is gone: waiting until it is back") == output.count(f"{port} is back\n") == 2
    lines = [json.loads(line) for line in (tmp_path / "run/train.log").read_text().splitlines()]
    assert [line["step"] for line in lines if line["step"]] == [*range(1, 31)]
    assert all((tmp_path / f"run/epoch_{epoch}/state.json").exists() for epoch in (2, 5, 30))
