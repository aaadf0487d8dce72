"""The session as a person drives it: `main()` with piped lines, a tiny real policy, and quizzes from a queue.

Only the quiz is scripted (a random model can't write a sound one): generation, PPO, disk and terminal are real.
"""

import io
import json
import os
import pty
import signal
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch
from prompt_toolkit.application import create_app_session

import lora_ppo_demo as demo
from lora_ppo.loading import load_policy
from lora_ppo.quiz import Quiz
from lora_ppo.run import Run
from lora_ppo.signals import LEAVING
from lora_ppo.terminal import Terminal
from support.tiny import tiny_config

OPTIONS = ("alpha", "beta", "gamma", "delta")
SETTINGS = {"learning_rate": 1e-2, "save_every": 3, "max_new_tokens": 6, "temperature": 1.0, "target_kl": 1e6}


def scripted_quiz(policy, question, written=None, why=None):
    """A quiz whose key follows from the question's length, so that a script knows it and no file needs to."""
    return Quiz(f"About {question}", OPTIONS, len(question) % 4)


@pytest.fixture
def play(llama, tmp_path, monkeypatch, capsys):
    """`play(lines, **settings)` runs the program on `lines` in its own folder; gives exit status, output and run.

    With `lines=None` standard input is left as it is.
    """
    monkeypatch.setattr(demo, "make_quiz", scripted_quiz)
    monkeypatch.chdir(tmp_path)
    runs = []
    original = Run.__init__

    def remember(run, *arguments):
        runs.append(run)
        original(run, *arguments)

    monkeypatch.setattr(Run, "__init__", remember)

    def play(lines, **settings):
        settings = SETTINGS | {"model_name": str(llama), "device": "cpu", "dtype": "float32", "lora_r": 4} | settings
        monkeypatch.setattr(sys, "argv", ["lora_ppo_demo.py", *(f"{k}={v}" for k, v in settings.items())])
        if lines is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        try:
            status = demo.main()
        finally:
            for number in LEAVING:  # at its end the program no longer listens to them
                signal.signal(number, signal.SIG_DFL)
        output = capsys.readouterr()
        return status, output.out + output.err, runs[-1] if runs else None

    return play


@pytest.fixture
def at_terminal(play, monkeypatch):
    """`at_terminal(script, **settings)` is `play` at a real terminal, with a person who follows the script.

    Its lines are (what is awaited on the screen, what is done then): bytes that are typed, or something to call with
    their end of the terminal. Gives exit status, screen, run, and the terminal's settings before and after.
    """
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")

    def at_terminal(script, **settings):
        master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, 200))
        before, screen = termios.tcgetattr(slave), []

        def person():
            seen = 0
            for awaited, action in [*script, (None, None)]:
                while awaited is None or awaited not in "".join(screen)[seen:]:
                    try:
                        written = os.read(master, 65536)
                    except OSError:  # an end of the line is closed
                        return
                    if not written:
                        return
                    screen.append(written.decode("utf-8", "replace"))
                seen = len("".join(screen))
                action(master) if callable(action) else os.write(master, action)

        with (
            os.fdopen(os.dup(slave), "r") as stdin,
            os.fdopen(os.dup(slave), "w") as stdout,
            create_app_session(),
            monkeypatch.context() as patch,
        ):
            patch.setattr(sys, "stdin", stdin)
            patch.setattr(sys, "stdout", stdout)
            thread = threading.Thread(target=person, daemon=True)
            thread.start()
            status, _, run = play(None, **settings)
            try:
                after = termios.tcgetattr(slave)
            except termios.error:  # it is gone
                after = None
        os.close(slave)
        thread.join(10)
        return status, "".join(screen), run, (before, after)

    return at_terminal


def turns(count: int, first: int = 0) -> list[str]:
    """Lines that ask and answer `count` questions; every other choice is right."""
    lines = []
    for i in range(first, first + count):
        question = f"question {'x' * i}"
        right = len(question) % 4
        lines += [question, "ABCD"[right if i % 2 else (right + 1) % 4]]
    return lines


def weights(run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.policy.tensors().items()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log_lines(folder: Path = Path()) -> list[dict]:
    return [json.loads(line) for line in (folder / "logs" / "run.log").read_text().splitlines()]


def scripted_run(model: Path, folder: Path, count: int, **settings) -> None:
    """A run of `count` turns in `folder`/c and `folder`/l, as the program plays them; a checkpoint after each step."""
    settings = SETTINGS | {"save_every": 1, "keep_checkpoints": 1000} | settings
    config = tiny_config(model, checkpoint_dir=str(folder / "c"), log_dir=str(folder / "l"), **settings)
    policy, config = load_policy(config)
    run, terminal = Run(policy, config, lambda text: None), Terminal(None)
    choices: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "make_quiz", scripted_quiz)
        patch.setattr(Terminal, "ask", lambda *_, **__: choices.pop())
        lines = turns(count)
        for question, choice in zip(lines[::2], lines[1::2], strict=True):
            choices.append(choice)
            demo.take_turn(question, policy, run, terminal)
    run.save()
    run.close()
