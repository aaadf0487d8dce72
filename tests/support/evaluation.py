"""What the tests of evaluation and of the learning benchmark share."""

import json
import sys
from pathlib import Path

import pytest
import torch

import evaluate
import train
from lora_ppo.episodes import Outcome


class Letters:
    """A stand-in task: an answer with an even number of characters is right; the reward shows the random numbers."""

    turns = 1

    def __init__(self, policy):
        self.policy = policy

    def samples(self, split):
        return [f"{split} question {i}" for i in range(12)]

    def episode(self, sample):
        return LettersEpisode(self, sample)


class LettersEpisode:
    def __init__(self, task, sample):
        self.task, self.sample, self.replies = task, sample, []

    def reset(self):
        return self.task.policy.prompts.tutor.messages(self.sample)

    def step(self, reply):
        self.replies.append(reply)
        return None if len(self.replies) == self.task.turns else "And what else?"

    def outcome(self):
        verdict = "correct" if len(self.replies[-1]) % 2 == 0 else "incorrect"
        return Outcome("unknown" if self.sample.endswith(" 0") else verdict, torch.rand(()).item())


@pytest.fixture
def run(llama, tmp_path, monkeypatch, capsys):
    """`run("--adapter", folder, ...)` runs the program on the stand-in task; gives exit status, output, JSON."""
    monkeypatch.setitem(train.TASKS, "letters", lambda config: Letters)
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        settings = {"task": "letters", "model_name": llama, "device": "cpu", "temperature": 1.0, "top_p": 1.0}
        settings |= {"dtype": "float32", "max_new_tokens": 6, "num_samples": 10, "eval_batch_size": 4}
        words = [f"{name}={value}" for name, value in settings.items()]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *words, *map(str, arguments)])
        status = evaluate.main()
        output = capsys.readouterr()
        file = Path("evaluation.json")
        return status, output.out + output.err, json.loads(file.read_bytes().decode("ascii")) if file.exists() else None

    return run
