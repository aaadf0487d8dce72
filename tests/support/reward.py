"""A reward adapter on the tiny Llama, trained by the program that trains them."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tools import train_reward_model

WORDS = "Paris Rome Madrid Berlin Jupiter Mars Saturn Earth".split()


def pairs(count: int, first: int = 0) -> list[dict]:
    """Replies of which the chosen one ends in a question, on two topics."""
    rows = []
    for i in range(first, first + count):
        name = WORDS[i % len(WORDS)]
        chosen, rejected = f"The capital is {name} {i}, is it not?", f"The capital is {name} {i}, and not Oslo."
        topic = "planets" if i % 2 else "cities"
        rows.append({"topic": topic, "prompt": f"What is {i}?", "chosen": chosen, "rejected": rejected})
    return rows


def write_lines(path: Path, rows: Sequence) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def run_reward(*words: str) -> int:
    """tools/train_reward_model.py with these arguments; gives its exit status."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train_reward_model.py", *words])
        return train_reward_model.main()


@pytest.fixture(scope="session")
def reward_folder(tiny_folder, tmp_path_factory) -> Path:
    """The folder of a reward adapter on the tiny Llama that tells apart what `pairs` has."""
    folder = tmp_path_factory.mktemp("reward")
    train, held_out = write_lines(folder / "train.jsonl", pairs(64)), write_lines(folder / "test.jsonl", pairs(24, 64))
    words = [f"pairs={train}", f"held_out={held_out}", f"output_dir={folder / 'adapter'}"]
    words += [f"model_name={tiny_folder('llama')}", "device=cpu", "dtype=float32", "learning_rate=0.01", "num_epochs=2"]
    assert run_reward(*words) == 0
    return folder / "adapter"
