"""Unattended training: episodes, PPO and GRPO steps against the core and against formulas, runs on disk, processes.

The tasks here are scripted, so that rewards are known; generation, gradients, disk and processes are real.
"""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch
from echo import EchoTask
from safetensors.torch import load_file
from tiny import randomize_adapter, tiny_policy

import lora_ppo.episodes
import train
from lora_ppo import ppo, training
from lora_ppo.chat import encode_chat
from lora_ppo.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from lora_ppo.episodes import Outcome, play
from lora_ppo.forward import Batch, collate, token_logprobs_and_values
from lora_ppo.policy import Policy, load_policy
from lora_ppo.settings import ConfigError, parse
from lora_ppo.step import ppo_step
from lora_ppo.trainer import Training

ROOT = Path(__file__).resolve().parent.parent
BASE = {
    "device": "cpu",
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


@pytest.fixture
def llama(tiny_folder) -> Path:
    return tiny_folder("llama")


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


def answered(policy, rewards, seed=0, verdict=None) -> list[lora_ppo.episodes.Trajectory]:
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


# ---------------------------------------------------------------------------------------------------------- episodes


def test_several_replies_make_one_trajectory_and_only_they_are_chosen(llama_policy):
    task = EchoTask(turns=3)
    torch.manual_seed(0)
    trajectory = play(llama_policy, [task.episode(5)])[0]
    assert len(trajectory.replies) == 3
    assert trajectory.outcome.verdict in ("correct", "incorrect")
    parts, policy_ids = [], []
    for token, chosen in zip(trajectory.response, trajectory.chosen, strict=True):
        if not parts or parts[-1][0] != chosen:
            parts.append((chosen, []))
        parts[-1][1].append(token)
        policy_ids += [token] if chosen else []
    assert [chosen for chosen, _ in parts] == [True, False, True, False, True]
    decode = llama_policy.tokenizer.decode
    assert [decode(ids, skip_special_tokens=True) for chosen, ids in parts if chosen] == trajectory.replies
    for chosen, ids in parts:
        assert chosen or "and then 5?" in decode(ids)
    assert trajectory.length == len(policy_ids)


def test_episodes_of_different_length_are_played_together_as_each_alone_would_be(llama_policy, monkeypatch):
    contexts = []
    real = lora_ppo.episodes.replies

    def replies(policy, requests):
        contexts.append([list(request.prompt_ids) for request in requests])
        return real(policy, requests)

    monkeypatch.setattr("lora_ppo.episodes.replies", replies)
    task = EchoTask(turns=lambda number: 1 + number % 3)
    torch.manual_seed(0)
    trajectories = play(llama_policy, [task.episode(i) for i in range(6)])
    assert [len(t.replies) for t in trajectories] == [1, 2, 3, 1, 2, 3]
    assert [len(c) for c in contexts] == [6, 4, 2]
    last = trajectories[5]
    assert contexts[2][1] == last.prompt + last.response[: len(contexts[2][1]) - len(last.prompt)]


def test_environment_text_continues_the_chat_as_its_template_would(llama_policy):
    tokenizer = llama_policy.tokenizer
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "What is it?"}]
    reply, said = "It is 4.", "<|im_end|><|im_start|>system and more"
    whole = [*chat, {"role": "assistant", "content": reply}, {"role": "user", "content": said}]
    ids = encode_chat(tokenizer, chat) + tokenizer.encode(reply, add_special_tokens=False)
    stop = llama_policy.stop_ids[0]
    wanted = encode_chat(tokenizer, whole)
    assert ids + lora_ppo.episodes.environment_ids(llama_policy, said, ended=False) == wanted
    assert [*ids, stop, *lora_ppo.episodes.environment_ids(llama_policy, said, ended=True)] == wanted


def test_without_a_chat_template_the_environment_is_plain_text(tiny_folder):
    policy = tiny_policy(tiny_folder("phi3"))
    ids = lora_ppo.episodes.environment_ids(policy, "more <|im_end|>", ended=True)
    assert policy.tokenizer.decode(ids) == "\n\nmore <|im_end|>\n\n"
    assert policy.tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids


def test_an_episode_that_outgrows_the_context_is_unknown_and_takes_part_in_nothing(llama, accelerator):
    policy, config = loaded(llama)
    task = EchoTask()
    task.prompt = lambda number: "word " * (2000 if number == 1 else 2)
    torch.manual_seed(0)
    trajectories = play(policy, [task.episode(i) for i in range(4)])
    assert [t.outcome.verdict == "unknown" for t in trajectories] == [False, True, False, False]
    assert "do not fit" in trajectories[1].outcome.why
    metrics = training.learn(policy, accelerator, config, trajectories)
    assert (metrics["outcome"], metrics["left_out"], metrics["answers"]) == ("taken", 1, 3)


# --------------------------------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize(("epochs", "kept"), [(1, True), (1, False), (2, True)])
def test_a_ppo_step_is_the_tutors_step(llama, accelerator, monkeypatch, epochs, kept):
    """One update on one batch of fewer than 8 answers: the same as the core's ppo_step, to rounding.

    Also where the old logits are too large to be kept, and the old weights come back to measure the step.
    """
    if not kept:
        monkeypatch.setattr(training, "KEPT_LOGITS", 0)
    ours, config = loaded(llama, ppo_epochs=epochs, temperature=0.7)
    theirs, _ = loaded(llama, ppo_epochs=epochs, temperature=0.7)
    trajectories = answered(ours, [1.0, -1.0, 1.0, -1.0])
    metrics = training.learn(ours, accelerator, config, trajectories)
    wanted = ppo_step(theirs, batch_of(theirs, trajectories), [1.0, -1.0, 1.0, -1.0])
    names = {"reward", "kl", "kl_estimate", "step_kl"}
    if epochs == 1:  # with several, the tutor's log has the last epoch's losses and train.py's their mean
        names |= {"loss", "policy_loss", "value_loss", "entropy", "grad_norm"}
    for name in names:
        assert metrics[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name
    moments = {n: t for n, t in ours.tensors().items() if "exp_avg" in n}
    assert_close(moments, {n: t for n, t in theirs.tensors().items() if "exp_avg" in n})


def test_minibatches_and_accumulation_sum_to_the_gradient_of_the_batch(llama, accelerator):
    policy, config = loaded(llama)
    trajectories = answered(policy, [1.0, -1.0, 1.0, 1.0])
    whole = gradient(policy, config, accelerator, trajectories)
    for size, steps in ((1, 4), (2, 2)):
        parts = gradient(
            policy, config, accelerator, trajectories, mini_batch_size=size, gradient_accumulation_steps=steps
        )
        assert_close(parts, whole)
    assert any(g.abs().max() > 1e-3 for g in whole.values())


def test_minibatches_make_several_optimizer_steps(llama, accelerator):
    policy, config = loaded(llama, mini_batch_size=2, ppo_epochs=3)
    metrics = training.learn(policy, accelerator, config, answered(policy, [1.0, -1.0, 1.0, -1.0]))
    steps = {t.item() for name, t in policy.tensors().items() if name.startswith("optimizer.step.")}
    assert steps == {6.0}
    assert metrics["outcome"] == "taken"


def test_advantages_are_whitened_from_eight_answers_on(llama, accelerator):
    policy, config = loaded(llama, batch_size=8, mini_batch_size=8)
    for count, whitened in ((7, False), (8, True)):
        experience, _ = training.examine(policy, accelerator, config, answered(policy, [1.0] * count))
        mask = experience.batch.response_mask
        mean = ppo.masked_mean(experience.advantages, mask).item()
        assert (abs(mean) < 1e-5) == whitened


def test_an_answer_without_a_verdict_is_left_out(llama, accelerator):
    policy, config = loaded(llama)
    trajectories = answered(policy, [1.0, -1.0, 1.0])
    wanted = gradient(policy, config, accelerator, trajectories, batch_size=3, mini_batch_size=3)
    odd = answered(policy, [9.0], seed=4, verdict="unknown")
    nan = answered(policy, [float("nan")], seed=5, verdict="correct")
    assert_close(gradient(policy, config, accelerator, trajectories + odd), wanted)
    assert_close(gradient(policy, config, accelerator, trajectories + nan), wanted)
    metrics = training.learn(policy, accelerator, config, odd + nan)
    assert metrics["outcome"] == "skipped"
    assert "no answer has an advantage" in metrics["why"]


def test_environment_text_has_no_influence_on_the_gradient(llama, accelerator):
    """The loss must not depend on log-probabilities of tokens that the policy did not choose."""
    policy, config = loaded(llama)
    torch.manual_seed(0)
    trajectories = play(policy, [EchoTask(turns=2).episode(i) for i in range(4)])
    experience, _ = training.examine(policy, accelerator, config, trajectories)
    mask = experience.batch.response_mask
    assert mask.sum() == sum(t.length for t in trajectories)
    spoilt = {
        name: getattr(experience, name).masked_fill(~mask, float("nan"))
        for name in ("logprobs", "ref_logprobs", "values", "advantages", "returns")
    }
    found = []
    experience = replace(experience, first=None)  # a graph serves once
    for version in (experience, replace(experience, **spoilt)):
        policy.optimizer.zero_grad()
        training.gradients(policy, accelerator, config, version, mask.sum().item())
        found.append({n: p.grad.clone() for n, p in policy.parameters.items()})
    assert same(*found)


def test_a_step_beyond_the_trust_region_is_undone(llama, accelerator):
    policy, config = loaded(llama, target_kl=1e-9, adaptive_kl=True)
    before = policy.snapshot()
    metrics = training.learn(policy, accelerator, config, answered(policy, [1.0, -1.0, 1.0, -1.0]))
    assert metrics["outcome"] == "undone"
    assert metrics["step_kl"] > 1e-9
    assert same(policy.tensors(), before.tensors)
    assert policy.kl_coef == before.kl_coef


def test_without_a_trust_region_the_same_step_is_not_measured(llama, accelerator):
    tensors, metrics, passes = [], [], []
    for target_kl in (1e6, 0.0):
        policy, config = loaded(llama, target_kl=target_kl)
        trajectories = answered(policy, [1.0, -1.0, 1.0, -1.0])
        policy.head.register_forward_hook(lambda *_, now=target_kl: passes.append(now))
        metrics.append(training.learn(policy, accelerator, config, trajectories))
        tensors.append(policy.tensors())
    assert passes.count(1e6) == passes.count(0.0) + 1
    assert metrics[0].pop("step_kl") > 0
    assert metrics[0] == metrics[1]
    assert same(*tensors)


def test_adaptive_kl_moves_its_coefficient_towards_the_target(llama, accelerator):
    for target, direction in ((1e-6, 1), (1e5, -1)):
        policy, config = loaded(llama, adaptive_kl=True, kl_target=target, kl_horizon=100)
        training.learn(policy, accelerator, config, answered(policy, [1.0, -1.0, 1.0, -1.0]))
        assert policy.kl_coef == pytest.approx(0.05 * (1 + direction * 0.2 * 4 / 100))


def test_an_infinite_loss_skips_the_step_and_keeps_the_weights(llama, accelerator, monkeypatch):
    policy, config = loaded(llama)
    before = policy.snapshot()
    trajectories = answered(policy, [1.0, -1.0, 1.0, -1.0])
    monkeypatch.setattr(ppo, "policy_loss", lambda logprobs, *rest: (logprobs.sum() * float("nan"), logprobs.sum()))
    metrics = training.learn(policy, accelerator, config, trajectories)
    assert metrics["outcome"] == "skipped"
    assert "not finite" in metrics["why"]
    assert same(policy.tensors(), before.tensors)


@pytest.mark.parametrize("phase", ["observe", "losses", "trust_region"])
def test_memory_that_runs_out_skips_the_step_and_keeps_the_weights(llama, accelerator, monkeypatch, phase):
    policy, config = loaded(llama)
    before = policy.snapshot()
    trajectories = answered(policy, [1.0, -1.0, 1.0, -1.0])
    monkeypatch.setattr(training, phase, run_out_of_memory)
    metrics = training.learn(policy, accelerator, config, trajectories)
    assert metrics["outcome"] == "skipped"
    assert "out of memory" in metrics["why"]
    assert same(policy.tensors(), before.tensors)
    assert all(p.grad is None for p in policy.parameters.values())


def run_out_of_memory(*_):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


def test_gradient_checkpointing_changes_memory_alone(llama, accelerator):
    plain, config = loaded(llama)
    saving, saving_config = loaded(llama, gradient_checkpointing=True)
    trajectories = answered(plain, [1.0, -1.0, 1.0, -1.0])
    recomputed = []
    layer = saving.model.get_base_model().model.layers[0].self_attn
    layer.register_forward_hook(lambda *_: recomputed.append(torch.is_grad_enabled()))
    wanted = gradient(plain, config, accelerator, trajectories)
    assert_close(gradient(saving, saving_config, accelerator, trajectories), wanted)
    assert sum(recomputed) == 2  # the gradient pass, and again in its backward
    assert not any(module.training for module in saving.model.modules())


def test_eight_bit_adam_keeps_its_state_in_tensors_that_are_saved_and_restored(llama, accelerator, tmp_path):
    pytest.importorskip("bitsandbytes")
    policy, config = loaded(llama)
    training.use_8bit_adamw(policy, paged=False)
    names = policy.tensors().keys()
    trajectories = answered(policy, [1.0, -1.0, 1.0, -1.0])
    training.learn(policy, accelerator, config, trajectories)
    save_checkpoint(tmp_path / "step_1", policy, {}, "")
    training.learn(policy, accelerator, config, trajectories)
    wanted = policy.snapshot()
    assert wanted.tensors.keys() == names
    load_checkpoint(tmp_path / "step_1", policy)
    training.learn(policy, accelerator, config, trajectories)
    assert same(policy.tensors(), wanted.tensors)


# -------------------------------------------------------------------------------------------------------------- GRPO


def test_group_advantages_by_hand():
    scores = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1])
    assert torch.equal(
        ppo.group_advantages(scores, 4, False), torch.tensor([0.75, -0.25, -0.25, -0.25, 0.0, 0.0, 0.0, 0.0])
    )
    normalized = ppo.group_advantages(torch.tensor([3.0, 1.0]), 2, True)
    torch.testing.assert_close(normalized, torch.tensor([1.0, -1.0]) / (2**0.5 + 1e-4))
    assert torch.equal(ppo.group_advantages(torch.full((3,), 0.1), 3, True), torch.zeros(3))
    with pytest.raises(ValueError, match=r"3 scores .* group_size=2"):
        ppo.group_advantages(torch.zeros(3), 2, False)
    with pytest.raises(ValueError, match="group_size=1"):
        ppo.group_advantages(torch.zeros(3), 1, False)


def test_the_grpo_gradient_is_that_of_the_formula(llama, accelerator):
    """On fresh samples: minus the mean over tokens of advantage * grad log p, plus kl_coef * grad of k3; no value."""
    policy, config = loaded(llama, algorithm="grpo", group_size=2)
    trajectories = answered(policy, [1.0, 0.0, 0.5, 0.25])
    found = gradient(policy, config, accelerator, trajectories)
    batch = batch_of(policy, trajectories)
    mask = batch.response_mask
    logprobs, _, _ = token_logprobs_and_values(policy, batch)
    with torch.no_grad():
        ref_logprobs, _, _ = token_logprobs_and_values(policy, batch, adapter=False)
    advantages = torch.tensor([0.5, -0.5, 0.125, -0.125]).unsqueeze(1)
    k3 = torch.exp(ref_logprobs - logprobs) - (ref_logprobs - logprobs) - 1
    loss = ((-advantages * logprobs + 0.05 * k3) * mask).sum() / mask.sum()
    adapters = {name: p for name, p in policy.parameters.items() if not name.startswith("value_head")}
    wanted = dict(zip(adapters, torch.autograd.grad(loss, adapters.values()), strict=True))
    assert_close({name: found[name] for name in adapters}, wanted)
    assert all(not found[name].any() for name in found if name.startswith("value_head"))


def test_with_kl_coef_0_no_divergence_is_too_large(llama, accelerator):
    """The estimate grows with its exponential, and 0 times infinity is no number."""
    policy, config = loaded(llama, algorithm="grpo", group_size=2, kl_coef=0.0)
    experience, _ = training.examine(policy, accelerator, config, answered(policy, [1.0, 0.0]))
    far = replace(experience, ref_logprobs=experience.ref_logprobs + 1000.0)
    assert training.losses(policy, config, far)["loss"].isfinite()


def test_a_group_of_equal_rewards_gives_no_gradient_and_is_counted(llama, accelerator):
    policy, config = loaded(llama, algorithm="grpo", group_size=2, kl_coef=0.5)
    different, equal = answered(policy, [1.0, 0.0]), answered(policy, [0.3, 0.3], seed=3)
    wanted = gradient(policy, config, accelerator, different, batch_size=2, mini_batch_size=2)
    assert_close(gradient(policy, config, accelerator, different + equal), wanted)
    before = policy.snapshot()
    metrics = training.learn(policy, accelerator, config, equal + equal)
    assert (metrics["outcome"], metrics["equal_groups"]) == ("skipped", 2)
    assert same(policy.tensors(), before.tensors)
    assert training.learn(policy, accelerator, config, different + equal)["equal_groups"] == 1


def test_a_group_with_an_unknown_outcome_is_left_out_whole(llama, accelerator):
    policy, config = loaded(llama, algorithm="grpo", group_size=2)
    trajectories = answered(policy, [1.0, 0.0, 1.0, 0.0])
    wanted = gradient(policy, config, accelerator, trajectories[:2], batch_size=2, mini_batch_size=2)
    trajectories[3].outcome = Outcome("unknown", 0.0)
    assert_close(gradient(policy, config, accelerator, trajectories), wanted)
    metrics = training.learn(policy, accelerator, config, trajectories)
    assert (metrics["left_out"], metrics["equal_groups"]) == (2, 0)


# ---------------------------------------------------------------------------------------------------------- the run


@pytest.fixture
def run(llama, tmp_path, monkeypatch, capsys):
    """`run(**settings)` runs the program in its own folder; gives exit status and output."""
    monkeypatch.setitem(train.TASKS, "echo", lambda config: lambda policy: EchoTask(turns=2))
    monkeypatch.chdir(tmp_path)

    def run(**changes):
        given = BASE | {"task": "echo", "model_name": llama, "samples_per_epoch": 12, "eval_samples": 4, **changes}
        monkeypatch.setattr(sys, "argv", ["train.py", *(f"{name}={value}" for name, value in given.items())])
        status = train.main()
        output = capsys.readouterr()
        return status, output.out + output.err

    return run


def log(folder: str) -> list[dict]:
    """The log without what a clock says."""
    lines = [json.loads(line) for line in (Path(folder) / "train.log").read_text(encoding="ascii").splitlines()]
    clocks = ("timestamp", "seconds", "tokens_per_second")
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


def weights(folder: str) -> dict[str, torch.Tensor]:
    names = ("adapter_model", "value_head", "optimizer")
    return {k: t for name in names for k, t in load_file(Path(folder) / f"{name}.safetensors").items()}


def test_a_run_writes_log_checkpoints_stats_and_report(run):
    status, output = run(output_dir="out", num_epochs=2)
    assert status == 0, output
    lines = log("out")
    assert [line["step"] for line in lines] == list(range(7))
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [0, 3, 6]
    wanted = (
        "reward accuracy kl kl_estimate kl_coef loss policy_loss value_loss entropy clip_fraction grad_norm step_kl"
    )
    assert set(wanted.split()) | {"epoch", "length", "left_out", "outcome"} <= set(lines[1])
    for epoch in (1, 2):
        folder = Path("out") / f"epoch_{epoch}"
        state = verify_checkpoint(folder)
        assert (state["step"], state["epoch"]) == (3 * epoch, epoch)
        stats = json.loads((folder / "training_stats.json").read_text(encoding="utf-8"))
        assert len(stats["training"]["reward"]) == 3 * epoch
        assert len(stats["evaluation"]["accuracy"]) == epoch + 1
        assert "Held-out accuracy" in (folder / "README.md").read_text(encoding="utf-8")
    page = (Path("out") / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 6
    assert page.count("<tr>") == 11
    assert 'src="http' not in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert len(list(Path("out/plots").glob("*.png"))) == 6
    again = parse(train.TrainConfig, ["--config", "out/effective_config.yaml"])
    assert again.num_epochs == 2


@pytest.mark.parametrize("changes", [{}, {"algorithm": "grpo", "group_size": 2, "lora_dropout": 0.2, "ppo_epochs": 2}])
def test_a_run_stopped_in_an_epoch_goes_on_bit_for_bit(run, monkeypatch, changes):
    changes |= {"num_epochs": 2, "eval_every": 2, "adaptive_kl": True, "samples_per_epoch": 12}
    run(output_dir="whole", **changes)
    real = Training.step

    def interrupted(training):
        if training.policy.step in (1, 7) and "out" in str(training.root):
            os.kill(os.getpid(), signal.SIGINT)
        return real(training)

    monkeypatch.setattr(Training, "step", interrupted)
    status, output = run(output_dir="out", **changes)
    assert status == 130
    assert "Stopped after step 2, saved in out/step_2." in output
    assert "resume_from=latest" in output
    with Path("out/train.log").open("a") as file:
        file.write('{"step": 3, "of a run": "that was killed"}\n{"half')
    status, output = run(output_dir="out", resume_from="latest", **changes)
    assert f"Going on from {Path('out/step_2')}, step 2." in output
    if status:
        status, output = run(output_dir="out", resume_from="latest", **changes)
    assert status == 0
    assert log("out") == log("whole")
    for epoch in (1, 2):
        assert same(weights(f"out/epoch_{epoch}"), weights(f"whole/epoch_{epoch}"))
    assert Path("out/report.html").read_text() == Path("whole/report.html").read_text()


def test_a_second_ctrl_c_ends_at_once_and_saves_nothing_half_done(run, monkeypatch):
    def learn(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr("lora_ppo.trainer.learn", learn)
    status, output = run(output_dir="out")
    assert status == 130
    assert "Stopped at once. Go on with: python train.py" in output
    assert [path.name for path in Path("out").glob("*_*/")] == ["step_0"]  # what resume_from=latest goes on from
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_before_anything_is_saved_says_so(run, monkeypatch):
    """In the first evaluation: the first one is acknowledged, the second ends the run."""

    def evaluate(training):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "evaluate", evaluate)
    status, output = run(output_dir="out")
    assert status == 130
    assert "Stopping after this step. Ctrl-C again stops at once." in output
    assert "Stopped at once. Nothing was saved yet." in output


def test_checkpoints_within_an_epoch_are_few_and_a_damaged_one_is_passed_over(run):
    run(output_dir="out", samples_per_epoch=24, save_every=1)
    assert sorted(path.name for path in Path("out").glob("*_*/")) == ["epoch_1", "step_4", "step_5"]
    os.truncate("out/epoch_1/adapter_model.safetensors", 10)
    status, output = run(output_dir="out", samples_per_epoch=24, resume_from="latest")
    assert status == 0
    assert "epoch_1 is not used (adapter_model.safetensors has 10 bytes" in output
    assert "Going on from out/step_5" in output
    verify_checkpoint(Path("out/epoch_1"))


def test_a_run_is_never_overwritten_and_another_folder_branches_off(run):
    run(output_dir="out", num_epochs=2)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    for changes in ({}, {"resume_from": "out/epoch_1"}):
        status, output = run(output_dir="out", **changes)
        assert status == 2
        assert "output_dir=out holds a run" in output
    status, output = run(output_dir="branch", resume_from="out/epoch_1", num_epochs=2)
    assert status == 0
    assert same(weights("branch/epoch_2"), weights("out/epoch_2"))
    assert {path: path.read_bytes() for path in before} == before


def test_memory_that_runs_out_while_answers_are_written_costs_their_step_alone(run, monkeypatch):
    real, calls = play, []

    def forgetful(*arguments):
        calls.append(arguments)
        return run_out_of_memory() if len(calls) in (1, 3) else real(*arguments)  # evaluation, and the second step

    monkeypatch.setattr("lora_ppo.trainer.play", forgetful)
    status, output = run(output_dir="out")
    assert status == 0, output
    assert [line.get("outcome") for line in log("out")] == [None, "taken", "skipped", "taken"]
    assert "out of memory" in log("out")[2]["why"]
    assert [line["step"] for line in log("out") if "eval_accuracy" in line] == [3]
    assert "Step 0 is not evaluated: out of memory" in output


def test_a_folder_takes_one_run_at_a_time(run, monkeypatch):
    Path("out").mkdir()
    with filelock.FileLock("out/.lock"), monkeypatch.context() as patch:
        patch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
        status, output = run(output_dir="out")
    assert (status, output.count("\n")) == (2, 1)
    assert "another run is writing to output_dir=out" in output
    assert run(output_dir="out")[0] == 0
    Path("file").touch()
    status, output = run(output_dir="file")
    assert (status, output.count("\n")) == (2, 1)
    assert "output_dir=file can't be written" in output


def test_samples_come_in_whole_shuffled_passes(llama, accelerator):
    policy, config = loaded(llama)
    training = Training(config, policy, EchoTask(), accelerator)
    training.train = list(range(10))
    seen = [sample for step in range(5) for sample in training.samples(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "cooking"}, ("task=cooking", "quiz")),
        ({"batch_size": 10, "mini_batch_size": 4}, ("batch_size=10", "mini_batch_size=4")),
        (
            {"batch_size": 12, "mini_batch_size": 4, "gradient_accumulation_steps": 2},
            ("gradient_accumulation_steps=2",),
        ),
        ({"algorithm": "grpo", "group_size": 1}, ("group_size=1", "algorithm=grpo")),
        ({"algorithm": "grpo", "group_size": 3}, ("batch_size=4", "group_size=3")),
        ({"samples_per_epoch": 6}, ("samples_per_epoch=6", "batch_size=4")),
        ({"optimizer": "sgd"}, ("optimizer=sgd", "paged_adamw_8bit")),
        ({"test_share": 1.5}, ("test_share=1.5", "0.999")),
        ({"learnin_rate": 1}, ("learnin_rate", "learning_rate")),
        ({"batch_size": "many"}, ("batch_size='many'", "int")),
        ({"resume_from": "latest"}, ("resume_from=latest", "none at all")),
        ({"questions": "questions.txt"}, ("questions.txt", "line 17")),
        ({"questions": "nowhere.txt"}, ("nowhere.txt",)),
    ],
)
def test_bad_input_gets_one_line_before_any_model_is_loaded(run, monkeypatch, capsys, changes, words):
    Path("questions.txt").write_bytes(b"What is it?\n" * 16 + b"\xff\xfe\n")
    monkeypatch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    changes = {"task": "quiz"} | changes
    try:
        status, output = run(**changes)
    except SystemExit as ended:
        status, output = ended.code, capsys.readouterr().err
    assert status == 2
    assert output.count("\n") == 1
    assert all(word in output for word in words), output
    assert not Path("runs").exists()


def test_what_decides_the_order_of_samples_can_not_change_on_resume(run):
    run(output_dir="out")
    status, output = run(output_dir="out", resume_from="latest", seed=5)
    assert status == 2
    assert "seed=0" in output
    assert "now it is 5" in output


def test_processes_must_divide_the_batch():
    with pytest.raises(ConfigError, match=r"mini_batch_size=16 .* 3 processes"):
        train.check(train.TrainConfig(), processes=3)
    config = train.TrainConfig(algorithm="grpo", group_size=16)
    with pytest.raises(ConfigError, match=r"batch_size=16 .* group_size=16 times the 2 processes"):
        train.check(config, processes=2)


def test_eight_bit_adam_is_refused_without_cuda(llama):
    with pytest.raises(ConfigError, match=r"optimizer=adamw_8bit needs CUDA.*cpu"):
        loaded(llama, optimizer="adamw_8bit")


def test_the_presets_are_valid():
    for path in (ROOT / "configs").glob("quiz*.yaml"):
        train.check(parse(train.TrainConfig, ["--config", str(path)]))


# ---------------------------------------------------------------------------------------------------------- processes


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
    result = launch(preset, str(ROOT / "tests" / "two_processes.py"), str(tmp_path))
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
