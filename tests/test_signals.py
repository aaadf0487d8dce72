"""The program at a real terminal, told to leave: by signals in every state of a session, by a terminal that is gone."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.session import log_lines, same, weights

import lora_ppo.run
import lora_ppo_demo as demo
from lora_ppo.checkpoint import checkpoints, save_checkpoint
from lora_ppo.generate import replies
from lora_ppo.loading import load_policy
from lora_ppo.signals import LEAVING, asked_to_leave, leave_on_signals
from lora_ppo.step import ppo_step

ROOT = Path(__file__).resolve().parent.parent
TURN = [("You:", b"even\r"), ("Your choice", b"A\r")]  # len("even") % 4 == 0: the key is A


def send(number: int):
    """Something that sends this process a signal, and gives it the time to arrive."""

    def deliver(master=None):
        os.kill(os.getpid(), number)
        time.sleep(0.02)

    return deliver


def left_like_ctrl_d(status, run, settings, steps):
    """A session that ended well: the terminal as it was, everything saved, nothing left behind."""
    before, after = settings
    assert status == 0
    assert after == before
    assert run.policy.step == run.saved_step == steps
    assert checkpoints(Path("checkpoints"))[0].name == f"step_{steps}"
    assert not list(Path("checkpoints").glob(".step_*"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", LEAVING)
@pytest.mark.parametrize("state", ["prompt", "quiz"])
def test_a_signal_to_leave_at_a_prompt_is_ctrl_d(at_terminal, play, number, state):
    script = [*TURN, ("You:", send(number))] if state == "prompt" else [*TURN, TURN[0], ("Your choice", send(number))]
    status, screen, run, settings = at_terminal(script)
    left_like_ctrl_d(status, run, settings, steps=1)
    assert "Saved step 1" in screen
    assert run.turn == 1 + (state == "quiz")
    wanted = weights(run)
    _, _, again = play([])
    assert same(weights(again), wanted)
    assert again.turn == run.turn


@pytest.mark.parametrize("state", ["prompt", "quiz"])
def test_the_key_of_sigquit_leaves_a_prompt_too(at_terminal, state):
    """An editor of lines gets the key itself, and no signal comes."""
    script = [*TURN, ("You:", b"\x1c")] if state == "prompt" else [*TURN, TURN[0], ("Your choice", b"\x1c")]
    status, screen, run, settings = at_terminal(script)
    left_like_ctrl_d(status, run, settings, steps=1)
    assert "Saved step 1" in screen


def test_ctrl_c_at_the_prompt_saves_also_after_an_answer_that_was_interrupted(at_terminal, monkeypatch):
    """The second one is no haste: the weights are whole."""
    real, patch = demo.replies, pytest.MonkeyPatch()

    def first_time(policy, requests):
        patch.setattr(demo, "replies", real)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    def begin(master):
        patch.setattr(demo, "replies", first_time)
        os.write(master, b"another question\r")

    try:
        script = [*TURN, ("You:", begin), ("Interrupted.", lambda master: None), ("You:", b"\x03")]
        status, screen, run, settings = at_terminal(script, save_every=100)
    finally:
        patch.undo()
    left_like_ctrl_d(status, run, settings, steps=1)
    assert "Saved step 1" in screen


def test_a_signal_that_was_deferred_is_not_forgotten_where_something_is_raised():
    def runs_out():
        signal.raise_signal(signal.SIGTERM)
        raise MemoryError

    try:
        with leave_on_signals():
            with pytest.raises(MemoryError), demo.interrupts_deferred():
                runs_out()
            assert asked_to_leave == [signal.SIGTERM]
    finally:
        for number in LEAVING:  # at its end the program no longer listens to them
            signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", LEAVING)
def test_a_signal_to_leave_while_it_answers_is_ctrl_d(at_terminal, monkeypatch, number):
    def interrupted(policy, requests):
        requests[0].on_text("Well, ")
        send(number)()
        raise AssertionError("the signal did not arrive")

    monkeypatch.setattr(demo, "replies", interrupted)
    status, screen, run, settings = at_terminal([("You:", b"even\r")])
    left_like_ctrl_d(status, run, settings, steps=0)
    assert "Well, " in screen
    assert "Traceback" not in screen


def test_a_signal_to_leave_while_the_model_loads(at_terminal, monkeypatch):
    def load(config, notice):
        send(signal.SIGTERM)()
        raise AssertionError("the signal did not arrive")

    monkeypatch.setattr(demo, "load_policy", load)
    status, screen, run, (before, after) = at_terminal([])
    assert (status, run) == (0, None)
    assert after == before
    assert screen.rindex("\x1b[?25h") > screen.rindex("\x1b[?25l")  # the cursor is shown again


def test_a_signal_that_a_library_swallows_while_the_model_loads_is_not_forgotten(at_terminal, monkeypatch):
    def load(config, notice):
        try:
            send(signal.SIGTERM)()
        except BaseException:
            return load_policy(config, notice)

    monkeypatch.setattr(demo, "load_policy", load)
    status, _, run, settings = at_terminal([("You:", b"even\r")])
    left_like_ctrl_d(status, run, settings, steps=0)
    assert run.turn == 0


@pytest.mark.parametrize("told", [True, False])
def test_what_a_library_makes_of_a_signal_while_it_loads_is_no_error(told, play, monkeypatch):
    """An import that is broken off may end in any exception; without a signal that is an error."""

    def load(config, notice):
        with contextlib.suppress(KeyboardInterrupt):
            if told:
                send(signal.SIGTERM)()
        raise RecursionError("maximum recursion depth exceeded")

    monkeypatch.setattr(demo, "load_policy", load)
    with contextlib.nullcontext() if told else pytest.raises(RecursionError):
        status, output, run = play([])
        assert (status, run) == (0, None)
        assert "recursion" not in output


def test_a_signal_that_gets_lost_while_it_answers_ends_the_session_at_the_quiz(at_terminal, monkeypatch):
    def answer(policy, requests):
        with contextlib.suppress(KeyboardInterrupt):
            send(signal.SIGTERM)()
        return replies(policy, requests)

    monkeypatch.setattr(demo, "replies", answer)
    status, _, run, settings = at_terminal([("You:", b"even\r")])
    left_like_ctrl_d(status, run, settings, steps=0)
    assert run.turn == 1


@pytest.mark.parametrize("number", LEAVING)
@pytest.mark.parametrize("count", [1, 3])
def test_a_signal_to_leave_in_a_step_waits_until_the_turn_is_whole(at_terminal, play, monkeypatch, number, count):
    def step(*arguments):
        for _ in range(count):
            send(number)()
        return ppo_step(*arguments)

    monkeypatch.setattr(demo, "ppo_step", step)
    status, screen, run, settings = at_terminal(TURN, precompute=False)
    left_like_ctrl_d(status, run, settings, steps=1)
    assert "Right. Reward +1." in screen
    assert len(log_lines()) == 1
    monkeypatch.setattr(demo, "ppo_step", ppo_step)
    _, _, again = play([])
    assert same(weights(again), weights(run))


@pytest.mark.parametrize("last", [[("You:", b"/save\r")], [("You:", b"\x04")], [("You:", send(signal.SIGHUP))]])
def test_a_signal_to_leave_in_a_save_does_not_spoil_it(at_terminal, play, monkeypatch, last):
    """Asked for, after Ctrl-D, or after a first signal: the shell of a window that closes sends a second one."""

    def save(*arguments):
        if arguments[1].step:
            send(signal.SIGHUP)()
        return save_checkpoint(*arguments)

    monkeypatch.setattr(lora_ppo.run, "save_checkpoint", save)
    status, _, run, settings = at_terminal([*TURN, *last])
    left_like_ctrl_d(status, run, settings, steps=1)
    monkeypatch.setattr(lora_ppo.run, "save_checkpoint", save_checkpoint)
    _, output, again = play([])
    assert "Replaying" not in output
    assert same(weights(again), weights(run))


@pytest.mark.parametrize("state", ["prompt", "answer"])
def test_a_terminal_that_is_gone_is_ctrl_d(at_terminal, play, monkeypatch, state):
    """Its window was closed: reading ends, writing fails, SIGHUP comes, from the system and from the shell."""

    def close(master):
        os.close(master)
        send(signal.SIGHUP)()
        send(signal.SIGHUP)()

    def answer(policy, requests):
        requests[0].on_text("Well, ")
        time.sleep(10)
        raise AssertionError("the signal did not arrive")

    def second_answer(master):
        monkeypatch.setattr(demo, "replies", answer)
        os.write(master, b"even\r")

    last = [("You:", close)] if state == "prompt" else [("You:", second_answer), ("Well,", close)]
    status, _, run, _ = at_terminal([*TURN, *last])
    assert status == 0
    assert run.policy.step == run.saved_step == 1
    _, output, again = play([])
    assert "Replaying" not in output
    assert same(weights(again), weights(run))


def test_a_signal_that_is_ignored_stays_so(monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with leave_on_signals():
            send(signal.SIGHUP)()
            with demo.interrupts_deferred():
                send(signal.SIGHUP)()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("delay", [0.0, 0.7, 2.0])
def test_a_program_that_is_told_to_leave_while_it_loads_its_libraries_leaves(llama, tmp_path, delay):
    command, pipe = [sys.executable, ROOT / "lora_ppo_demo.py", f"model_name={llama}", "device=cpu"], subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe) as program:
        caught, status = 0, Path(f"/proc/{program.pid}/status")
        while not caught & 1 << signal.SIGTERM - 1:  # until it listens
            time.sleep(0.01)
            caught = int(status.read_text().split("SigCgt:")[1].split()[0], 16)
        time.sleep(delay)
        program.send_signal(signal.SIGTERM)
        _, errors = program.communicate(timeout=60)
    assert (program.returncode, errors) == (0, b"")


def test_a_signal_while_torch_is_being_loaded_raises_nothing_into_its_code(tmp_path):
    (tmp_path / "torch.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\nprint('went on')\n")
    code = "from lora_ppo.signals import leave_on_signals\nwith leave_on_signals():\n    import torch"
    path = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
