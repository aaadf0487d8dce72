"""A batch of episodes becomes one step, by PPO and by GRPO."""

from dataclasses import replace

import pytest
import torch
from support.echo import EchoTask
from support.tiny import randomize_adapter
from support.training import answered, assert_close, batch_of, gradient, loaded, run_out_of_memory, same

from lora_ppo import ppo, training
from lora_ppo.checkpoint import load_checkpoint, save_checkpoint
from lora_ppo.episodes import Outcome, play
from lora_ppo.forward import token_logprobs_and_values
from lora_ppo.step import ppo_step


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


@pytest.mark.parametrize("kept", [True, False])
def test_a_step_is_the_same_in_passes_of_any_size(llama, accelerator, monkeypatch, kept):
    if not kept:
        monkeypatch.setattr(training, "KEPT_LOGITS", 0)
    wanted, widths = None, []
    for size in (4, 2, 1):
        policy, config = loaded(llama, mini_batch_size=size, gradient_accumulation_steps=4 // size, ppo_epochs=2)
        trajectories = answered(policy, [1.0, -1.0, 1.0, -1.0])
        assert len({len(one.prompt) + len(one.response) for one in trajectories}) > 2
        read = policy.read
        policy.read = lambda read=read, **given: widths.append(given["input_ids"].shape[1]) or read(**given)
        metrics = training.learn(policy, accelerator, config, trajectories)
        names = [name for name, value in metrics.items() if isinstance(value, float)]
        wanted = wanted or metrics
        assert {"kl", "step_kl", "value", "loss", "grad_norm", "entropy"} <= set(names)
        for name in names:
            assert metrics[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), (size, name)
    assert len(set(widths)) > 1  # none is padded to what the others need


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
    assert metrics["answers"] == 0
    assert not {"reward", "accuracy", "kl", "kl_estimate", "value"} & metrics.keys()  # not 0: of nothing is no mean
    assert "no answer has an advantage" in metrics["why"]


@pytest.mark.parametrize("where", ["snapshot", "step"])
def test_a_step_for_which_memory_runs_out_is_skipped(where, llama, accelerator, monkeypatch):
    """Be it for the copy to go back to, or for the optimizer's first state."""
    policy, config = loaded(llama)
    trajectories, before = answered(policy, [1.0, -1.0]), {n: t.clone() for n, t in policy.tensors().items()}

    def runs_out(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(*((policy, "snapshot") if where == "snapshot" else (policy.optimizer, "step")), runs_out)
    metrics = training.learn(policy, accelerator, config, trajectories)
    assert (metrics["outcome"], metrics["why"].partition(":")[0]) == ("skipped", "out of memory")
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.tensors().items())


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


def test_adaptive_kl_moves_in_proportion_to_how_far_the_target_is(llama, accelerator):
    for error in (0.1, -0.15):
        policy, config = loaded(llama, adaptive_kl=True, kl_horizon=100)
        randomize_adapter(policy)
        trajectories = answered(policy, [1.0, -1.0, 1.0, -1.0])
        before = policy.snapshot()
        kl = training.learn(policy, accelerator, config, trajectories)["kl"]
        policy.restore(before)
        config.kl_target = kl / (1 + error)
        training.learn(policy, accelerator, config, trajectories)
        assert policy.kl_coef == pytest.approx(0.05 * (1 + error * 4 / 100), rel=1e-6)


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


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_the_price_of_a_small_divergence_is_not_lost_in_rounding(llama, size):
    """k3 is about half the square of the difference: e^d - d - 1, each rounded to float32, leaves nothing of it."""
    policy, config = loaded(llama, algorithm="grpo", group_size=2)
    batch = batch_of(policy, answered(policy, [1.0, 0.0]))
    with torch.no_grad():
        logprobs, values, _ = token_logprobs_and_values(policy, batch)
    ref_logprobs = logprobs + size * torch.linspace(-1, 1, logprobs.numel()).view_as(logprobs)
    nothing = torch.zeros_like(logprobs)
    policy.kl_coef = 1.0
    piece = training.Experience(batch, logprobs, ref_logprobs, values, nothing, nothing)
    found = training.losses(policy, config, piece)["loss"].item()
    difference = (ref_logprobs.double() - logprobs.double())[batch.response_mask]
    wanted = (difference**2 / 2 + difference**3 / 6 + difference**4 / 24).mean().item()
    assert found == pytest.approx(wanted, rel=1e-6 / size)


def test_with_kl_coef_0_no_divergence_is_too_large(llama, accelerator):
    """The estimate grows with its exponential, and 0 times infinity is no number."""
    policy, config = loaded(llama, algorithm="grpo", group_size=2, kl_coef=0.0)
    experience, _ = training.examine(policy, accelerator, config, answered(policy, [1.0, 0.0]))
    far = replace(experience, ref_logprobs=experience.ref_logprobs + 1000.0)
    assert training.losses(policy, config, far)["loss"].isfinite()


def test_with_entropy_coef_0_the_entropy_decides_nothing(llama, accelerator, monkeypatch):
    policy, config = loaded(llama, algorithm="grpo", group_size=2, entropy_coef=0.0)
    experience, _ = training.examine(policy, accelerator, config, answered(policy, [1.0, 0.0]))
    usual = training.losses(policy, config, experience)["loss"]
    monkeypatch.setattr(ppo, "entropy", lambda *given: torch.tensor(torch.inf))
    assert torch.equal(training.losses(policy, config, experience)["loss"], usual)


def test_rows_that_take_no_part_have_a_loss_of_0_whatever_stands_on_their_padding(llama, accelerator):
    """A padding token's logit may be -inf."""
    policy, config = loaded(llama, algorithm="grpo", group_size=2)
    experience, _ = training.examine(policy, accelerator, config, answered(policy, [1.0, 0.0]))
    mask = torch.zeros_like(experience.batch.response_mask)
    logprobs = torch.full_like(experience.logprobs, -torch.inf, requires_grad=True)
    first = logprobs, torch.zeros_like(logprobs, requires_grad=True), None
    nothing = replace(experience, batch=replace(experience.batch, response_mask=mask), first=first)
    loss = training.losses(policy, config, nothing)["loss"]
    loss.backward()
    assert loss == 0
    assert not logprobs.grad.any()


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
