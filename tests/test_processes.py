"""Several processes give what one gives."""

import os
import subprocess
import sys

import pytest
import torch
from support.echo import EchoTask
from support.training import ROOT, assert_close, gradient, loaded, same

import train
from lora_ppo import training
from lora_ppo.checkpoint import load_checkpoint
from lora_ppo.episodes import Outcome, play
from lora_ppo.settings import ConfigError


def test_processes_must_divide_the_batch():
    with pytest.raises(ConfigError, match=r"mini_batch_size=16 .* 3 processes"):
        train.check(train.TrainConfig(), processes=3)
    config = train.TrainConfig(algorithm="grpo", group_size=16)
    with pytest.raises(ConfigError, match=r"batch_size=16 .* group_size=16 times the 2 processes"):
        train.check(config, processes=2)


def launch(preset: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """`accelerate launch` with a preset, in two processes."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "configs" / "accelerate" / preset), "--main_process_port", "0"]
    command += ["--num_processes", "2"]
    environment = (
        os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"} | environment
    )
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize(("algorithm", "preset"), [("ppo", "cpu.yaml"), ("grpo", "cpu.yaml"), ("ppo", "fsdp.yaml")])
def test_two_processes_give_the_gradient_of_one_with_the_joint_batch(llama, accelerator, tmp_path, algorithm, preset):
    """Answers of different lengths, one left out: whitening, the token mean and all metrics are of the joint batch."""
    sharded = preset == "fsdp.yaml"
    changes = {"algorithm": algorithm, "batch_size": 12, "mini_batch_size": 4, "gradient_accumulation_steps": 3}
    changes |= {"group_size": 2, "entropy_coef": 0.01, "gradient_checkpointing": sharded}
    policy, config = loaded(llama, **changes)
    torch.manual_seed(0)
    trajectories = play(policy, [EchoTask(turns=lambda number: 1 + number % 3).episode(i) for i in range(12)])
    rewards = [1.0, -1.0, 0.5, 0.5, -1.0, 1.0, 1.0, 0.25, 1.0, -1.0, -1.0, 1.0]
    for trajectory, reward in zip(trajectories, rewards, strict=True):
        trajectory.outcome = Outcome("correct" if reward > 0 else "incorrect", reward)
    trajectories[5].outcome = Outcome("unknown", 0.0)
    torch.save((str(llama), changes, [vars(t) for t in trajectories]), tmp_path / "given.pt")
    result = launch(preset, str(ROOT / "tests" / "support" / "two_processes.py"), str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    theirs = [torch.load(tmp_path / f"rank_{rank}.pt") for rank in (0, 1)]
    for rank in (0, 1):
        torch.manual_seed(rank)
        assert play(policy, [EchoTask(turns=1 + rank).episode(1)])[0].response == theirs[rank]["played"]
    wanted = gradient(policy, config, accelerator, trajectories)
    assert same(theirs[0]["gradient"], theirs[1]["gradient"])
    assert_close(theirs[0]["gradient"], wanted, tolerance=1e-6)
    assert theirs[0]["metrics"] == theirs[1]["metrics"]
    metrics = training.learn(policy, accelerator, config, trajectories)
    for name in ("reward", "accuracy", "kl", "length", "left_out", "loss", "entropy", "grad_norm"):
        assert theirs[0]["metrics"][name] == pytest.approx(metrics[name], rel=1e-4), name
    if sharded:
        layers = sum(p.numel() for n, p in policy.model.named_parameters() if ".layers." in n and "lora" not in n)
        assert [rank["base"] for rank in theirs] == [layers / 2] * 2
        load_checkpoint(tmp_path / "step_1", policy)
        assert same(policy.tensors(), theirs[0]["tensors"])
    else:
        for rank in theirs:
            assert [(outcome, kept) for outcome, _, kept in rank["skipped"]] == [("skipped", True)] * 3
            assert all("out of memory" in why for _, why, _ in rank["skipped"])
