"""Shell tasks from train.py and evaluate.py, and the warm start."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.shell import SMALL
from test_shell_entries import row

import evaluate
from lora_ppo.chat import encode_chat
from lora_ppo.checkpoint import verify_checkpoint
from tasks.os_interaction import read_opening
from tasks.os_interaction.entries import Entry
from tasks.os_interaction.episode import Rules, ShellEpisode
from tasks.os_interaction.sandbox import Namespaces
from tools import warm_start

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
