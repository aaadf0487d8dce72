"""The PPO step against a naive one, and all that can go wrong in it."""

import math
from types import SimpleNamespace

import pytest
import torch
from support import oracle
from support.steps import NAN, make_batch, make_policy, naive_rows
from torch.testing import assert_close

from lora_ppo import ppo
from lora_ppo.forward import Batch, token_logprobs_and_values
from lora_ppo.policy import VALUE_STEP
from lora_ppo.step import StepSkipped, ppo_step


def bits(policy):
    """Every tensor that training changes, as bytes: NaN equals NaN and 0 differs from -0."""
    return {name: tensor.numpy().tobytes() for name, tensor in policy.tensors().items()}


def trained_once(**overrides):
    """A policy whose optimizer has already seen a step, so that restoring has something to restore."""
    policy = make_policy(**overrides)
    ppo_step(policy, make_batch(), [1.0, -1.0, 1.0])
    return policy


def spy_on_policy_loss(monkeypatch):
    """Records the arguments of every call of ppo.policy_loss."""
    calls, original = [], ppo.policy_loss

    def spy(logprobs, old_logprobs, advantages, mask, cliprange):
        calls.append(SimpleNamespace(logprobs=logprobs.detach(), old=old_logprobs, advantages=advantages, mask=mask))
        return original(logprobs, old_logprobs, advantages, mask, cliprange)

    monkeypatch.setattr(ppo, "policy_loss", spy)
    return calls


def naive_loss(policy, batch, scores):
    """The whole loss of a first epoch, from one forward pass a row and the oracle's advantages."""
    c, rows = policy.config, list(naive_rows(policy, batch))
    mask = [row.mask for row in rows]
    lp = [[row.logp[t, token] for t, token in enumerate(row.tokens)] for row in rows]
    ref = [[row.ref[t, token].item() for t, token in enumerate(row.tokens)] for row in rows]
    old = [[x.item() for x in row] for row in lp]
    old_values = [row.values.tolist() for row in rows]
    rewards = oracle.token_rewards(scores, old, ref, mask, policy.kl_coef)
    advantages, returns = oracle.advantages_and_returns(rewards, old_values, mask, c.gamma, c.lam)
    if len(scores) >= 8:
        advantages = oracle.standardized(advantages, mask)
    where, loss = oracle.tokens(mask), 0.0
    for b, t in where:
        logp, value = rows[b].logp[t], rows[b].values[t]
        loss = loss - (lp[b][t] - old[b][t]).exp() * advantages[b][t]
        loss = loss + c.vf_coef * 0.5 * (value - returns[b][t]) ** 2
        loss = loss - c.entropy_coef * -(logp.exp() * logp).sum()
    return loss / len(where)


def catch_gradients(policy, monkeypatch):
    """Puts a recorder in the optimizer's place: the gradients by name, and no step."""
    caught = {}

    def step():
        caught.update({name: p.grad.clone() for name, p in policy.parameters.items()})

    monkeypatch.setattr(policy.optimizer, "step", step)
    return caught


@pytest.mark.parametrize("n", [1, 3, 8])
def test_gradient_of_a_step_is_that_of_a_naive_loss(n, monkeypatch):
    settings_ = {"gamma": 0.97, "lam": 0.9, "kl_coef": 0.2, "vf_coef": 0.3, "entropy_coef": 0.05}
    policy, batch = make_policy(**settings_, max_grad_norm=1e9), make_batch(n)
    scores = [[1.0, -1.0, 1.0][i % 3] for i in range(n)]
    loss = naive_loss(policy, batch, scores)
    gradients = torch.autograd.grad(loss, list(policy.parameters.values()))
    caught = catch_gradients(policy, monkeypatch)
    metrics = ppo_step(policy, batch, scores)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert max(g.abs().max() for g in gradients) > 0.05  # there is something to compare
    for (name, actual), expected in zip(caught.items(), gradients, strict=True):
        assert_close(actual, expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_a_first_step_moves_adapters_by_their_rate_and_the_value_head_by_its_own():
    """AdamW's first step is the rate times the gradient's sign: values move by a rate that no setting makes hasty."""
    policy = make_policy(learning_rate=3e-3)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    ppo_step(policy, make_batch(), [1.0, -1.0, 1.0])
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in policy.parameters.items()}
    for name, distance in moved.items():
        rate = VALUE_STEP / 32 if name.startswith("value_head") else 3e-3
        assert distance == pytest.approx(rate, rel=0.01), name


def test_metrics_are_those_of_a_naive_forward():
    policy, batch = make_policy(learning_rate=5e-3), make_batch()
    with torch.no_grad():
        old = list(naive_rows(policy, batch))
    metrics = ppo_step(policy, batch, [1.0, -1.0, 0.5])
    with torch.no_grad():
        new = list(naive_rows(policy, batch))
    kept = [(b, t) for b, row in enumerate(old) for t in oracle.chosen(row.mask)]

    def total(rows, name="logp"):
        return sum(getattr(rows[b], name)[t, rows[b].tokens[t]].item() for b, t in kept)

    kl = sum(oracle.kl_divergence(old[b].logp[t].tolist(), old[b].ref[t].tolist()) for b, t in kept) / 3
    step_kl = sum(oracle.kl_divergence(old[b].logp[t].tolist(), new[b].logp[t].tolist()) for b, t in kept) / len(kept)
    assert metrics["reward"] == pytest.approx(1 / 6)
    assert metrics["kl"] == pytest.approx(kl, rel=1e-4)
    assert metrics["kl_estimate"] == pytest.approx((total(old) - total(old, "ref")) / 3, rel=1e-4)
    assert metrics["step_kl"] == pytest.approx(step_kl, rel=1e-3)
    assert metrics["likelihood_ratio"] == pytest.approx(math.exp(total(new) - total(old)), rel=1e-3)
    assert metrics["value"] == pytest.approx(sum(old[b].values[t].item() for b, t in kept) / len(kept), rel=1e-4)
    entropy = sum(-(old[b].logp[t].exp() * old[b].logp[t]).sum().item() for b, t in kept) / len(kept)
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-5)
    assert step_kl > 1e-4


def test_several_epochs_keep_the_rollout_and_go_further(monkeypatch):
    after = {}
    for epochs in (1, 3):
        policy = make_policy(ppo_epochs=epochs, learning_rate=5e-3, kl_coef=0.0)
        calls = spy_on_policy_loss(monkeypatch)
        after[epochs] = ppo_step(policy, make_batch(), [1.0, -1.0, 1.0])["step_kl"], bits(policy)
        assert len(calls) == epochs
        for call in calls:
            assert torch.equal(call.old, calls[0].logprobs)
            assert torch.equal(call.advantages, calls[0].advantages)
    assert not torch.equal(calls[2].logprobs, calls[0].logprobs)
    assert after[1][1] != after[3][1]
    assert after[3][0] > 2 * after[1][0]


@pytest.mark.parametrize(("reward", "direction"), [(1.0, 1), (-1.0, -1)])
def test_a_reward_moves_the_answer_in_its_direction(reward, direction):
    policy = make_policy(kl_coef=0.0)
    torch.nn.init.zeros_(policy.value_head.weight)
    torch.nn.init.zeros_(policy.value_head.bias)
    metrics = ppo_step(policy, make_batch(1), [reward])
    assert direction * math.log(metrics["likelihood_ratio"]) > 1e-3


@pytest.mark.parametrize(("n", "whitened"), [(1, False), (7, False), (8, True)])
def test_whitening_is_for_batches_of_eight_or_more(n, whitened, monkeypatch):
    policy, calls = make_policy(kl_coef=0.0, lam=0.95), spy_on_policy_loss(monkeypatch)
    torch.nn.init.zeros_(policy.value_head.weight)
    torch.nn.init.zeros_(policy.value_head.bias)
    ppo_step(policy, make_batch(n), [-1.0] * n)
    kept = calls[0].advantages[calls[0].mask]
    if whitened:
        assert kept.mean().item() == pytest.approx(0.0, abs=1e-5)
        assert kept.var(correction=0).item() == pytest.approx(1.0, rel=1e-4)
    else:  # the score discounted by lam per token, and of its sign
        assert kept.max() < 0
        assert kept.min().item() == pytest.approx(-1.0)


@pytest.mark.parametrize("reward", [NAN, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_skipped(reward):
    policy = trained_once()
    before = bits(policy)
    with pytest.raises(StepSkipped, match="reward is not finite"):
        ppo_step(policy, make_batch(), [1.0, reward, -1.0])
    assert bits(policy) == before
    assert policy.step == 1


def test_a_loss_that_is_not_finite_is_skipped(monkeypatch):
    policy = trained_once()
    before = bits(policy)
    monkeypatch.setattr(ppo, "value_loss", lambda values, *rest: (values.sum() * NAN, torch.zeros(())))
    with pytest.raises(StepSkipped, match="loss is not finite"):
        ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])
    assert bits(policy) == before
    assert policy.step == 1


@pytest.mark.parametrize("broken", [NAN, math.inf])
@pytest.mark.parametrize("metric", ["value_loss", "entropy"])
def test_a_metric_whose_coefficient_is_0_never_decides_a_step(metric, broken, monkeypatch):
    """The step is the one that would have been, whatever the metric says."""
    settings = {"vf_coef": 0.0, "entropy_coef": 0.0, "kl_coef": 0.0, "target_kl": 1e6}
    usual, policy = (trained_once(**settings) for _ in range(2))
    ppo_step(usual, make_batch(), [1.0, 1.0, -1.0])
    original = getattr(ppo, metric)

    def spoilt(*arguments):
        result = original(*arguments)
        return result * broken if metric == "entropy" else (result[0] * broken, result[1])

    monkeypatch.setattr(ppo, metric, spoilt)
    assert not math.isfinite(ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])[metric])
    assert bits(policy) == bits(usual)


def test_a_loss_that_breaks_in_a_later_epoch_takes_the_earlier_ones_back(monkeypatch):
    policy, losses, original = trained_once(ppo_epochs=3), [], ppo.value_loss
    before = bits(policy)

    def breaks(*arguments):
        losses.append(bits(policy) != before)
        loss, fraction = original(*arguments)
        return (loss * NAN if len(losses) == 3 else loss), fraction

    monkeypatch.setattr(ppo, "value_loss", breaks)
    with pytest.raises(StepSkipped):
        ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])
    assert losses == [False, True, True]
    assert bits(policy) == before


def test_nan_in_the_value_head_leaves_every_weight_as_it_was():
    policy = trained_once()
    with torch.no_grad():
        policy.value_head.weight[0, 3] = NAN
    before = bits(policy)
    with pytest.raises(StepSkipped):
        ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])
    assert bits(policy) == before


def half_step(policy, monkeypatch, fail):
    """Makes the optimizer alter half of its tensors, slots included, then call `fail`. Returns what it altered."""
    altered = []

    def step():
        tensors = policy.tensors()
        for name in list(tensors)[::2]:
            tensors[name].add_(0.5)
            altered.append(name)
        fail()

    monkeypatch.setattr(policy.optimizer, "step", step)
    return altered


def raising(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), StepSkipped),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), StepSkipped),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (RuntimeError("the size of tensor a (3) must match"), RuntimeError),
    ],
    ids=["cuda memory", "windows memory", "interrupt", "bug"],
)
def test_a_failure_in_the_middle_of_the_step_restores_everything(error, expected, monkeypatch):
    policy = trained_once()
    before = bits(policy)
    altered = half_step(policy, monkeypatch, raising(error))
    with pytest.raises(expected) as caught:
        ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])
    assert type(caught.value) is expected
    assert any("exp_avg" in name for name in altered)
    assert any(name.startswith("parameter.") for name in altered)
    assert bits(policy) == before
    assert policy.step == 1
    assert all(p.grad is None for p in policy.parameters.values())


def test_a_real_cpu_out_of_memory_is_skipped(monkeypatch):
    policy = trained_once()
    half_step(policy, monkeypatch, lambda: torch.empty(1 << 50))
    with pytest.raises(StepSkipped, match="out of memory"):
        ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])


def test_out_of_memory_while_the_snapshot_is_made_is_skipped(monkeypatch):
    policy = trained_once()
    monkeypatch.setattr(policy, "snapshot", raising(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(StepSkipped, match="out of memory"):
        ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()])
def test_a_failure_after_the_step_restores_everything(error, monkeypatch):
    policy = trained_once(adaptive_kl=True, kl_target=0.01, kl_horizon=10)
    before, kl_coef = bits(policy), policy.kl_coef
    seen = []

    def fail(policy, *rest):
        seen.append((bits(policy) != before, policy.kl_coef != kl_coef))
        raise error

    monkeypatch.setattr("lora_ppo.step.trust_region", fail)
    with pytest.raises((StepSkipped, KeyboardInterrupt)):
        ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])
    assert seen == [(True, True)]
    assert bits(policy) == before
    assert policy.kl_coef == kl_coef
    assert policy.step == 1


def test_a_snapshot_that_the_caller_has_serves_as_well(monkeypatch):
    policy = trained_once()
    before = policy.snapshot()
    state = bits(policy)
    monkeypatch.setattr(policy, "snapshot", lambda: pytest.fail("a second copy was made"))
    half_step(policy, monkeypatch, raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        ppo_step(policy, make_batch(), [1.0, 1.0, -1.0], before)
    assert bits(policy) == state


def test_a_policy_that_was_restored_learns_as_if_nothing_had_happened(monkeypatch):
    disturbed, calm = trained_once(), trained_once()
    half_step(disturbed, monkeypatch, raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        ppo_step(disturbed, make_batch(), [1.0, 1.0, -1.0])
    monkeypatch.undo()
    results = [ppo_step(policy, make_batch(), [-1.0, 1.0, -1.0]) for policy in (disturbed, calm)]
    assert results[0] == results[1]
    assert bits(disturbed) == bits(calm)


def test_a_step_outside_the_trust_region_is_undone_and_counts():
    policy = trained_once(adaptive_kl=True, kl_target=0.01, kl_horizon=10)
    policy.config.target_kl = 1e-9
    before, kl_coef = bits(policy), policy.kl_coef
    metrics = ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])
    assert metrics["undone"] is True
    assert metrics["step_kl"] > 1e-9
    assert bits(policy) == before
    assert policy.kl_coef == kl_coef
    assert policy.step == 2


@pytest.mark.parametrize("target_kl", [10.0, 0.0])  # 0: there is none
def test_a_step_inside_the_trust_region_is_kept(target_kl):
    policy = make_policy(target_kl=target_kl)
    before = bits(policy)
    metrics = ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])
    assert "undone" not in metrics
    after = bits(policy)
    assert all(before[name] != after[name] for name in before if "exp_avg" in name)
    assert policy.step == 1


def test_a_step_touches_nothing_but_what_it_declares():
    """The base's weights stay, so the reference stays."""
    policy = trained_once()
    own = {name.replace(".base_layer", ""): p for name, p in policy.model.base_model.model.named_parameters()}
    for name, p in policy.untouched.named_parameters():
        assert torch.equal(p, own[name]), name


def test_adaptive_kl_steers_the_coefficient_of_the_next_step():
    policy = make_policy(adaptive_kl=True, kl_target=1e-3, kl_horizon=30, kl_coef=0.1)
    first = ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])
    assert first["kl_coef"] == 0.1
    assert policy.kl_coef == pytest.approx(0.1 * (1 + 0.2 * 3 / 30), rel=1e-12)  # 3 answers, error at its bound
    assert ppo_step(policy, make_batch(), [1.0, 1.0, -1.0])["kl_coef"] == policy.kl_coef / (1 + 0.2 * 3 / 30)


def test_gradients_are_scaled_to_max_grad_norm(monkeypatch):
    policy = make_policy(max_grad_norm=0.01)
    caught = catch_gradients(policy, monkeypatch)
    metrics = ppo_step(policy, make_batch(), [1.0, -1.0, 1.0])
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in caught.values()))
    assert metrics["grad_norm"] > 0.1  # before scaling
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_padding_has_no_influence_on_the_step():
    """Other tokens in the padding, and other padding, give the same loss and the same weights."""
    batch, results = make_batch(), []
    scrambled = Batch(torch.where(batch.attention_mask, batch.input_ids, 33), batch.attention_mask, batch.response_mask)
    for each in (batch, scrambled):
        policy = make_policy()
        results.append((ppo_step(policy, each, [1.0, -1.0, 1.0]), bits(policy)))
    assert results[0] == results[1]


def test_the_reference_is_the_untouched_base():
    policy, batch = trained_once(), make_batch()
    for row, logits in zip(
        naive_rows(policy, batch), token_logprobs_and_values(policy, batch, adapter=False)[2], strict=True
    ):
        logp = (logits[: len(row.tokens)] / policy.config.temperature).log_softmax(-1)
        assert_close(logp, row.ref, rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_the_gradient_pass_alone(monkeypatch):
    policy, batch = make_policy(lora_dropout=0.3, cliprange=1e-4), make_batch()
    with torch.no_grad():
        rollout, values, logits = token_logprobs_and_values(policy, batch)
        reference = token_logprobs_and_values(policy, batch, adapter=False)
        again = token_logprobs_and_values(policy, batch)
    assert torch.equal(rollout, again[0])
    calls = spy_on_policy_loss(monkeypatch)
    metrics = ppo_step(policy, batch, [1.0, -1.0, 1.0])
    assert torch.equal(calls[0].old, rollout)
    assert (calls[0].logprobs - rollout).abs().max() > 1e-2
    assert metrics["clip_fraction"] > 0.1
    mask, temperature = batch.response_mask, policy.config.temperature
    kl = ppo.exact_kl(logits, reference[2], temperature).masked_fill(~mask, 0.0).sum(-1).mean().item()
    assert metrics["kl"] == pytest.approx(kl, rel=1e-6)
    assert metrics["value"] == pytest.approx(values[mask].mean().item(), rel=1e-5)
    with torch.no_grad():
        after, _, new_logits = token_logprobs_and_values(policy, batch)
    step_kl = ppo.exact_kl(logits, new_logits, temperature)[mask].mean().item()
    assert metrics["step_kl"] == pytest.approx(step_kl, rel=1e-5)
    assert metrics["likelihood_ratio"] == pytest.approx((after - rollout)[mask].sum().exp().item(), rel=1e-4)
    assert not any(module.training for module in policy.model.modules())


def test_without_dropout_the_first_ratio_is_exactly_one(monkeypatch):
    policy, calls = make_policy(cliprange=1e-9), spy_on_policy_loss(monkeypatch)
    metrics = ppo_step(policy, make_batch(), [1.0, -1.0, 1.0])
    assert torch.equal(calls[0].old, calls[0].logprobs)
    assert metrics["clip_fraction"] == 0.0


def test_dropout_is_off_again_after_a_failure(monkeypatch):
    policy = make_policy(lora_dropout=0.3)

    def fail(policy, batch, adapter=True):
        if torch.is_grad_enabled():
            assert all(module.training for module in policy.dropouts)
            raise KeyboardInterrupt
        return original(policy, batch, adapter)

    original = token_logprobs_and_values
    monkeypatch.setattr("lora_ppo.step.token_logprobs_and_values", fail)
    with pytest.raises(KeyboardInterrupt):
        ppo_step(policy, make_batch(), [1.0, -1.0, 1.0])
    assert policy.dropouts
    assert not any(module.training for module in policy.model.modules())
