"""Trajectories with given rewards, and a step on them, for the tests of training."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train
from lora_ppo import training
from lora_ppo.episodes import Outcome, Trajectory, play
from lora_ppo.forward import Batch, collate
from lora_ppo.loading import load_policy
from lora_ppo.policy import Policy
from support.echo import EchoTask
from support.tiny import randomize_adapter

ROOT = Path(__file__).resolve().parents[2]
BASE = {
    "device": "cpu",
    "dtype": "float32",
    "lora_r": 4,
    "lora_alpha": 8,
    "max_new_tokens": 6,
    "learning_rate": 1e-2,
    "kl_coef": 0.05,
    "target_kl": 1e6,
    "temperature": 1.0,
    "top_p": 1.0,
    "batch_size": 4,
    "mini_batch_size": 4,
    "max_grad_norm": 1e6,
}


@pytest.fixture(scope="module")
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def settings(llama, **changes) -> train.TrainConfig:
    config = train.TrainConfig(model_name=str(llama), **(BASE | changes))
    train.check(config)
    return config


def loaded(llama, **changes) -> tuple[Policy, train.TrainConfig]:
    """A policy whose adapters already have an effect, and its settings."""
    policy, config = load_policy(settings(llama, **changes))
    training.prepare(policy, config)
    randomize_adapter(policy)
    return policy, config


def answered(policy, rewards, seed=0, verdict=None) -> list[Trajectory]:
    """One sampled answer a reward."""
    torch.manual_seed(seed)
    trajectories = play(policy, [EchoTask().episode(i) for i in range(len(rewards))])
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        trajectory.outcome = Outcome(verdict or ("correct" if reward > 0 else "incorrect"), reward)
    return trajectories


def batch_of(policy, trajectories) -> Batch:
    prompts, responses = [t.prompt for t in trajectories], [t.response for t in trajectories]
    return collate(prompts, responses, policy.pad_id, policy.device, [t.chosen for t in trajectories])


def gradient(policy, config, accelerator, trajectories, **changes) -> dict[str, torch.Tensor]:
    """The gradient of the first optimizer step on `trajectories`."""
    found = {}

    def note():
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in policy.parameters.items()}
        found.update(found or grads)

    policy.optimizer.step = note
    try:
        metrics = training.learn(policy, accelerator, replace(config, **changes), trajectories)
    finally:
        del policy.optimizer.step
    assert metrics["outcome"] == "taken", metrics
    return found


def assert_close(a, b, tolerance=2e-6):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_out_of_memory(*_):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
