"""Both outcomes, computed while the quiz is read, against the plain step: the same bits, and no trace of the other."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from support.session import SETTINGS, same, turns, weights
from support.tiny import randomize_adapter, tiny_config

import lora_ppo_demo as demo
from lora_ppo.forward import collate
from lora_ppo.loading import load_policy
from lora_ppo.quiz import Quiz
from lora_ppo.run import Run
from lora_ppo.step import Foresight, ppo_step
from lora_ppo.terminal import SimulatedLearner, Terminal

PROMPTS, RESPONSES = [[5, 6, 7, 8], [9, 10]], [[11, 12, 13], [14, 15, 16, 17, 18]]


def fresh(llama, **settings):
    """A policy after one step, and a batch of two answers."""
    policy, _ = load_policy(tiny_config(llama, **settings))
    randomize_adapter(policy)
    batch = collate(PROMPTS, RESPONSES, policy.pad_id, policy.device)
    ppo_step(policy, batch, [1.0, -1.0])
    return policy, batch


def state(policy) -> dict:
    return {name: tensor.clone() for name, tensor in policy.tensors().items()}


@pytest.mark.parametrize("reward", [1.0, -1.0])
@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("settings", [{}, {"ppo_epochs": 3, "adaptive_kl": True, "entropy_coef": 0.1}])
def test_the_outcome_is_that_of_the_plain_step_bit_for_bit(llama, reward, ready, settings):
    policy, batch = fresh(llama, **settings)
    plain, _ = fresh(llama, **settings)
    foresight = Foresight(policy, batch, earlier=[1.0])
    if ready:
        foresight.wait()
        assert set(foresight.outcomes) == {1.0, -1.0}
    metrics = foresight.take(reward)
    assert metrics == ppo_step(plain, batch, [1.0, reward])
    assert same(state(policy), state(plain))
    assert (policy.step, policy.kl_coef) == (plain.step, plain.kl_coef)


def test_the_two_outcomes_differ(llama):
    policy, batch = fresh(llama)
    foresight = Foresight(policy, batch, [1.0])
    foresight.wait()
    (_, good), (_, bad) = foresight.outcomes[1.0], foresight.outcomes[-1.0]
    assert not same(good.tensors, bad.tensors)


@pytest.mark.parametrize("ready", [True, False])
def test_what_is_discarded_leaves_no_trace(llama, ready):
    policy, batch = fresh(llama)
    before, step = state(policy), policy.step
    foresight = Foresight(policy, batch, [1.0])
    if ready:
        foresight.wait()
    foresight.discard()
    assert same(state(policy), before)
    assert policy.step == step
    assert all(p.grad is None for p in policy.parameters.values())


def test_a_step_beyond_the_trust_region_is_undone_here_too(llama):
    policy, batch = fresh(llama)
    before = state(policy)
    policy.config.target_kl = 1e-12
    metrics = Foresight(policy, batch, [1.0]).take(1.0)
    assert metrics["undone"]
    assert same(state(policy), before)


def test_trouble_while_computing_falls_back_on_the_plain_step(llama, monkeypatch):
    policy, batch = fresh(llama)
    plain, _ = fresh(llama)
    real = ppo_step

    def fail_in_the_thread(*arguments):
        if threading.current_thread() is not threading.main_thread():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments)

    monkeypatch.setattr("lora_ppo.step.ppo_step", fail_in_the_thread)
    assert Foresight(policy, batch, [1.0]).take(-1.0) == ppo_step(plain, batch, [1.0, -1.0])
    assert same(state(policy), state(plain))


def without_times(path: str) -> list[dict]:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines()]
    for line in lines:
        for record in (line, line.get("log", {})):
            for name in ("timestamp", "seconds", "run", "prev", "sha256"):
                record.pop(name, None)
    return lines


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_session_with_it_is_the_session_without(play, tmp_path, monkeypatch, batch_size):
    lines = [*turns(2), "a question to skip", "s", *turns(2, first=2), "/undo", *turns(1, first=4)]
    found = {}
    for precompute in (True, False):
        folder = tmp_path / str(precompute)
        folder.mkdir()
        monkeypatch.chdir(folder)
        status, _, run = play(lines, precompute=precompute, batch_size=batch_size)
        assert status == 0
        found[precompute] = weights(run)
    assert same(found[True], found[False])
    for name in ("logs/run.log", "checkpoints/journal.jsonl"):
        assert without_times(tmp_path / "True" / name) == without_times(tmp_path / "False" / name)


def test_both_outcomes_are_ready_before_a_slow_reader_chooses(play, monkeypatch):
    real, ready = Terminal.choose, []

    def read_slowly(terminal, quiz, answer):
        for thread in threading.enumerate():
            if thread.name == "foresight":
                thread.join(30)
        ready.append(not any(thread.name == "foresight" for thread in threading.enumerate()))
        return real(terminal, quiz, answer)

    monkeypatch.setattr(Terminal, "choose", read_slowly)
    monkeypatch.setattr("lora_ppo_demo.ppo_step", None)  # nothing is left to compute
    status, _, run = play(turns(2))
    assert (status, ready, run.policy.step) == (0, [True, True], 2)


def test_ctrl_c_at_the_quiz_leaves_the_policy_as_it_was(play, monkeypatch):
    _, _, run = play(turns(1))
    wanted = weights(run)

    def interrupted(terminal, quiz, answer):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with monkeypatch.context() as patch:
        patch.setattr(Terminal, "choose", interrupted)
        status, output, run = play(["a question"])
    assert status == 0
    assert "Interrupted." in output
    assert same(weights(run), wanted)
    assert not any(thread.name == "foresight" for thread in threading.enumerate())


def test_the_simulated_learner_has_the_policy_to_itself(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert SETTINGS
    monkeypatch.setattr("lora_ppo.turns.Foresight", None)
    config = tiny_config(llama, checkpoint_dir="c", log_dir="l", max_new_tokens=6)
    policy, config = load_policy(config)
    run = Run(policy, config, print)
    monkeypatch.setattr(demo, "make_quiz", lambda *_, **__: Quiz("Which?", tuple("abcd"), 0))
    demo.take_turn("What?", policy, run, SimulatedLearner(policy, ["What?"], 1))
    run.close()
    assert policy.step == 1
