"""PPO against hand-computed numbers, against an independent oracle, and on a tiny model."""

import copy
import math
from types import SimpleNamespace

import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from config import Config
from lora_ppo import ppo
from lora_ppo.forward import Batch, collate, token_logprobs_and_values
from lora_ppo.policy import VALUE_STEP, Policy
from lora_ppo.step import StepSkipped, ppo_step

NAN = math.nan
SEEDS = range(25)


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def same(actual, expected, rtol=1e-12, atol=1e-12):
    """Asserts that a float64 tensor is what plain Python computed."""
    assert_close(actual, f64(expected), rtol=rtol, atol=atol)


# ------------------------------------------------------------------------------------------------ hand-computed cases


def test_compute_rewards_by_hand():
    mask = torch.tensor([[True, True, False, True], [True, True, False, False]])
    logprobs = f64([[-1.0, -2.0, NAN, -0.5], [-0.2, -0.4, NAN, NAN]])
    ref = f64([[-1.5, -1.0, NAN, -1.0], [-0.1, -0.6, 0.0, NAN]])
    # row 0: -0.1 * 0.5, -0.1 * -1, environment, -0.1 * 0.5 + 1; row 1: -0.1 * -0.1, -0.1 * 0.2 - 1, padding
    expected = [[-0.05, 0.1, 0.0, 0.95], [0.01, -1.02, 0.0, 0.0]]
    same(ppo.compute_rewards(f64([1.0, -1.0]), logprobs, ref, mask, 0.1), expected)


def test_gae_by_hand():
    mask = torch.tensor([[True, False, True, False], [True, True, True, False]])
    rewards = f64([[1.0, NAN, 2.0, NAN], [0.0, 0.0, 1.0, NAN]])
    values = f64([[2.0, NAN, 4.0, NAN], [0.5, 0.25, 0.75, NAN]])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # row 0, from the end: delta 2 - 4 = -2; delta 1 + 0.5 * 4 - 2 = 1, A = 1 + 0.25 * -2 = 0.5
    # row 1: delta 1 - 0.75 = 0.25; delta 0.375 - 0.25 = 0.125, A = 0.125 + 0.25 * 0.25 = 0.1875;
    #        delta 0.125 - 0.5 = -0.375, A = -0.375 + 0.25 * 0.1875 = -0.328125
    same(advantages, [[0.5, 0.0, -2.0, 0.0], [-0.328125, 0.1875, 0.25, 0.0]])
    same(returns, [[2.5, 0.0, 2.0, 0.0], [0.171875, 0.4375, 1.0, 0.0]])  # A + V


def test_policy_loss_by_hand():
    mask = torch.tensor([[True, False, True, True, True, True, False]])
    logprobs = torch.log(f64([[1.5, NAN, 0.5, 1.1, 1.5, 0.5, NAN]]))
    advantages = f64([[1.0, NAN, 1.0, 1.0, -1.0, -1.0, NAN]])
    # min(r A, clip(r) A): min(1.5, 1.2), min(0.5, 0.8), 1.1, min(-1.5, -1.2), min(-0.5, -0.8)
    #                    = 1.2 + 0.5 + 1.1 - 1.5 - 0.8 = 0.5, over 5 tokens; the clip acts on the first and the last
    loss, clip_fraction = ppo.policy_loss(logprobs, torch.zeros_like(logprobs), advantages, mask, 0.2)
    same(loss, -0.1)
    assert clip_fraction.item() == pytest.approx(0.4, rel=1e-7)


def test_value_loss_by_hand():
    mask = torch.tensor([[True, False, True, True, False]])
    values, old = f64([[1.0, NAN, 2.0, 0.5, NAN]]), f64([[1.0, NAN, 1.5, 1.5, 0.0]])
    returns = f64([[2.0, NAN, 1.0, 0.5, 3.0]])
    # max of plain and clipped: (1 - 2)^2 = 1; (2 - 1)^2 over (1.7 - 1)^2 = 1; (1.3 - 0.5)^2 over 0 = 0.64
    loss, clip_fraction = ppo.value_loss(values, old, returns, mask, 0.2)
    same(loss, 0.44)  # 0.5 * 2.64 / 3
    assert clip_fraction.item() == pytest.approx(1 / 3, rel=1e-7)


def test_entropy_by_hand():
    uniform, skewed = [0.0] * 4, [math.log(p) for p in (0.5, 0.25, 0.125, 0.125)]
    mask = torch.tensor([[True, False, True, False]])
    logits = f64([[uniform, [NAN] * 4, skewed, [NAN] * 4]])
    same(ppo.entropy(logits, mask), 1.875 * math.log(2))  # the mean of 2 and 0.5 + 0.5 + 0.375 + 0.375 bits


def test_exact_kl_by_hand():
    p = torch.log(f64([[0.5, 0.5], [0.75, 0.25]]))
    q = torch.log(f64([[0.25, 0.75], [0.5, 0.5]]))
    # 0.5 ln 2 + 0.5 ln(2/3) = 0.5 ln(4/3); 0.75 ln 1.5 + 0.25 ln 0.5
    same(ppo.exact_kl(p, q), [0.5 * math.log(4 / 3), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)])


def test_whiten_by_hand():
    mask = torch.tensor([[True, False, True, False]])
    # mean 2, variance 1 (1e-8 more under the root)
    same(ppo.whiten(f64([[1.0, NAN, 3.0, NAN]]), mask), [[-1.0, 0.0, 1.0, 0.0]], rtol=1e-8)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(6.0, 0.1), (6.6, 0.101), (5.4, 0.099), (9.0, 0.102), (600.0, 0.102), (0.0, 0.098)],  # 0.1 (1 + 10/100 error)
)
def test_adapted_kl_coef_by_hand(kl, expected):
    assert ppo.adapted_kl_coef(0.1, kl, kl_target=6.0, kl_horizon=100, answers=10) == pytest.approx(expected, rel=1e-12)


def test_masked_mean_by_hand():
    same(ppo.masked_mean(f64([[1.0, NAN], [4.0, NAN]]), torch.tensor([[True, False], [True, False]])), 2.5)


# ------------------------------------------------------------------------------ the oracle, and checks that can be fed
#                                                                                 any function that claims to be right


class Case:
    """Random float64 tensors, away from the kinks of both clips; what the mask leaves out is NaN for odd seeds."""

    def __init__(self, seed):
        g = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.b = int(torch.randint(1, 6, (), generator=g))
        self.t = int(torch.randint(1, 13, (), generator=g))
        shape = (self.b, self.t)
        self.mask = torch.rand(shape, generator=g) < 0.6
        self.mask[:, 0] |= ~self.mask.any(-1)  # every answer has a token
        self.gamma, self.lam = (0.5 + 0.49 * torch.rand(2, generator=g, dtype=torch.float64)).tolist()
        self.scores, self.kl_coef, self.epsilon = draw(self.b), 0.13, 0.2
        self.old_logprobs, self.advantages = draw(shape) - 3, draw(shape)
        self.rewards, self.old_values, self.returns = draw(shape), draw(shape), draw(shape)
        ratio = 0.3 + 1.4 * torch.rand(shape, generator=g, dtype=torch.float64)
        self.logprobs = self.old_logprobs + off(ratio, 0.8, 1.2).log()
        shift = off(draw(shape) * 0.4, -0.2, 0.2)
        self.values = self.old_values + shift
        for sign in (1, -1):  # where the plain and the clipped error are equal, value_loss has a kink as well
            kink = (self.values + self.old_values + sign * self.epsilon) / 2
            self.returns = torch.where((self.returns - kink).abs() < 1e-3, kink + 2e-3, self.returns)
        self.logits, self.other_logits = 3 * draw(*shape, 7), 3 * draw(*shape, 7)
        if seed % 2:
            for tensor in (self.logprobs, self.advantages, self.rewards, self.values, self.returns, self.logits):
                tensor[~self.mask] = NAN

    def rows(self, *names):
        return [getattr(self, name).tolist() for name in names]


def off(x, *kinks, distance=1e-3):
    """`x`, moved away from the kinks."""
    for kink in kinks:
        x = torch.where((x - kink).abs() < distance, kink + 2 * distance, x)
    return x


def check_compute_rewards(function):
    for case in map(Case, SEEDS):
        actual = function(case.scores, case.logprobs, case.old_logprobs, case.mask, case.kl_coef)
        same(actual, oracle.token_rewards(*case.rows("scores", "logprobs", "old_logprobs", "mask"), case.kl_coef))


def check_gae(function):
    for case in map(Case, SEEDS):
        actual = function(case.rewards, case.values, case.mask, case.gamma, case.lam)
        expected = oracle.advantages_and_returns(*case.rows("rewards", "values", "mask"), case.gamma, case.lam)
        for a, e in zip(actual, expected, strict=True):
            same(a, e)


def check_policy_loss(function):
    for case in map(Case, SEEDS):
        loss, fraction = function(case.logprobs, case.old_logprobs, case.advantages, case.mask, case.epsilon)
        rows = case.rows("logprobs", "old_logprobs", "advantages", "mask")
        expected, expected_fraction = oracle.clipped_surrogate_loss(*rows, case.epsilon)
        same(loss, expected)
        assert fraction.item() == pytest.approx(expected_fraction, abs=1e-7)


def check_value_loss(function):
    for case in map(Case, SEEDS):
        loss, fraction = function(case.values, case.old_values, case.returns, case.mask, case.epsilon)
        rows = case.rows("values", "old_values", "returns", "mask")
        expected, expected_fraction = oracle.clipped_value_loss(*rows, case.epsilon)
        same(loss, expected)
        assert fraction.item() == pytest.approx(expected_fraction, abs=1e-7)


def check_entropy(function):
    for case in map(Case, SEEDS):
        same(function(case.logits, case.mask), oracle.mean_entropy(*case.rows("logits", "mask")))
        same(function(case.logits * 0.7, case.mask, 0.7), oracle.mean_entropy(*case.rows("logits", "mask")))


def check_exact_kl(function):
    for case in map(Case, range(0, 20, 2)):  # without NaN
        pairs = zip(case.logits.flatten(0, 1).tolist(), case.other_logits.flatten(0, 1).tolist(), strict=True)
        expected = [oracle.kl_divergence(p, q) for p, q in pairs]
        same(function(case.logits, case.other_logits).flatten(), expected, atol=1e-14)
        same(function(0.7 * case.logits, 0.7 * case.other_logits, 0.7).flatten(), expected, atol=1e-14)


def check_whiten(function):
    for case in map(Case, SEEDS):
        if case.mask.sum() > 1:
            same(function(case.advantages, case.mask), oracle.standardized(*case.rows("advantages", "mask")))


CHECKS = {
    "compute_rewards": check_compute_rewards,
    "gae": check_gae,
    "policy_loss": check_policy_loss,
    "value_loss": check_value_loss,
    "entropy": check_entropy,
    "exact_kl": check_exact_kl,
    "whiten": check_whiten,
}


@pytest.mark.parametrize("name", CHECKS)
def test_agrees_with_the_oracle(name):
    CHECKS[name](getattr(ppo, name))


def check_gradient(function, oracle_function, names):
    """The gradient with respect to the first tensor is the oracle's central finite difference."""
    h = 1e-6
    for case in map(Case, range(0, 24, 2)):  # without NaN
        first, *others = (getattr(case, name) for name in names)
        first = first.clone().requires_grad_()
        function(first, *others, case.mask, case.epsilon)[0].backward()
        rows = case.rows(*names, "mask")
        for b in range(case.b):
            for t in range(case.t):
                ends = []
                for side in (h, -h):
                    moved = copy.deepcopy(rows)
                    moved[0][b][t] += side
                    ends.append(oracle_function(*moved, case.epsilon)[0])
                slope = (ends[0] - ends[1]) / (2 * h)
                assert first.grad[b, t].item() == pytest.approx(slope, rel=1e-6, abs=1e-9)


def check_policy_gradient(function):
    check_gradient(function, oracle.clipped_surrogate_loss, ("logprobs", "old_logprobs", "advantages"))


def check_value_gradient(function):
    check_gradient(function, oracle.clipped_value_loss, ("values", "old_values", "returns"))


def test_gradient_of_policy_loss_is_the_finite_difference():
    check_policy_gradient(ppo.policy_loss)


def test_gradient_of_value_loss_is_the_finite_difference():
    check_value_gradient(ppo.value_loss)


def test_masked_nan_does_not_reach_the_gradient_of_policy_loss():
    for case in map(Case, range(1, 20, 2)):
        logprobs = case.logprobs.clone().requires_grad_()
        ppo.policy_loss(logprobs, case.old_logprobs, case.advantages, case.mask, case.epsilon)[0].backward()
        assert logprobs.grad.isfinite().all()
        assert not logprobs.grad[~case.mask].any()


def test_masked_nan_does_not_reach_the_gradient_of_value_loss():
    case = Case(3)
    values = case.values.clone().requires_grad_()
    ppo.value_loss(values, case.old_values, case.returns, case.mask, case.epsilon)[0].backward()
    assert values.grad[case.mask].any()
    assert not values.grad[~case.mask].any()  # NaN counts as True


def test_masked_nan_does_not_reach_the_gradient_of_entropy():
    case = Case(3)
    logits = case.logits.clone().requires_grad_()
    ppo.entropy(logits, case.mask).backward()
    assert not logits.grad[~case.mask].any()


# ------------------------------------------------------------------------------------------------------- planted faults


def gae_leaking(rewards, values, mask, gamma, lam):
    """The successor's value is taken from the next column, whoever wrote it."""
    rewards, values = rewards.nan_to_num(), values.nan_to_num()
    advantages, advantage = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(mask[:, t], delta + gamma * lam * advantage, advantage)
        advantages[:, t] = advantage * mask[:, t]
    return advantages, (advantages + values) * mask


def gae_without_bootstrap(rewards, values, mask, gamma, lam):
    """The value of the successor is forgotten."""
    zero = torch.zeros_like(values)
    advantages, _ = ppo.gae(rewards - values, zero, mask, gamma, lam)
    return advantages, torch.where(mask, advantages + values, 0.0)


def reward_in_last_column(scores, logprobs, ref_logprobs, mask, kl_coef):
    rewards = ppo.compute_rewards(torch.zeros_like(scores), logprobs, ref_logprobs, mask, kl_coef)
    rewards[:, -1] += scores
    return rewards


def surrogate(pick, mean=ppo.masked_mean):
    """A policy loss with another way to choose between the two terms, or another mean."""

    def loss(logprobs, old_logprobs, advantages, mask, e):
        ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0).exp()
        a, b = ratio * advantages, ratio.clamp(1 - e, 1 + e) * advantages
        return -mean(pick(a, b), mask), ppo.policy_loss(logprobs, old_logprobs, advantages, mask, e)[1]

    return loss


def unmasked(x, mask):
    return x.masked_fill(~mask, 0.0).mean()


def mean_of_row_means(x, mask):
    return (x.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)).mean()


def squared_error(pick, factor=0.5, mean=ppo.masked_mean):
    """A value loss with another way to choose between the two terms, another factor or another mean."""

    def loss(values, old_values, returns, mask, e):
        near = old_values + (values - old_values).clamp(-e, e)
        plain, clipped = (values - returns) ** 2, (near - returns) ** 2
        return factor * mean(pick(plain, clipped), mask), ppo.value_loss(values, old_values, returns, mask, e)[1]

    return loss


def sample_variance_whiten(x, mask):
    kept = x[mask]
    return ((x - kept.mean()) / (kept.var() + 1e-8).sqrt()).masked_fill(~mask, 0.0)


FAULTS = {
    "rewards: score in the last column": (check_compute_rewards, reward_in_last_column),
    "rewards: KL sign flipped": (
        check_compute_rewards,
        lambda s, lp, ref, m, c: ppo.compute_rewards(s, lp, ref, m, -c),
    ),
    "rewards: score on every token": (
        check_compute_rewards,
        lambda s, lp, ref, m, c: ppo.compute_rewards(0 * s, lp, ref, m, c) + s[:, None] * m,
    ),
    "gae: lam forgotten": (check_gae, lambda r, v, m, gamma, lam: ppo.gae(r, v, m, gamma, 1.0)),
    "gae: gamma forgotten": (check_gae, lambda r, v, m, gamma, lam: ppo.gae(r, v, m, 1.0, lam)),
    "gae: gamma and lam swapped": (check_gae, lambda r, v, m, gamma, lam: ppo.gae(r, v, m, lam, gamma)),
    "gae: next value from padding": (check_gae, gae_leaking),
    "gae: successor's value forgotten": (check_gae, gae_without_bootstrap),
    "gae: sign flipped": (check_gae, lambda *a: tuple(-x for x in ppo.gae(*a))),
    "policy: sign of the advantage": (check_policy_loss, lambda lp, o, a, m, e: ppo.policy_loss(lp, o, -a, m, e)),
    "policy: ratio inverted": (check_policy_loss, lambda lp, o, a, m, e: ppo.policy_loss(o, lp, a, m, e)),
    "policy: max for min": (check_policy_loss, surrogate(torch.maximum)),
    "policy: no clip": (check_policy_loss, surrogate(lambda a, b: a)),
    "policy: clip alone": (check_policy_loss, surrogate(lambda a, b: b)),
    "policy: mean over padding": (check_policy_loss, surrogate(torch.minimum, unmasked)),
    "policy: mean of the rows' means": (check_policy_loss, surrogate(torch.minimum, mean_of_row_means)),
    "policy gradient: clip alone": (check_policy_gradient, surrogate(lambda a, b: b)),
    "policy gradient: ratio detached": (
        check_policy_gradient,
        lambda lp, o, a, m, e: ppo.policy_loss(lp.detach() + 0 * lp, o, a, m, e),
    ),
    "value: min for max": (check_value_loss, squared_error(torch.minimum)),
    "value: no clip": (check_value_loss, squared_error(lambda a, b: a)),
    "value: no half": (check_value_loss, squared_error(torch.maximum, factor=1.0)),
    "value: mean over padding": (check_value_loss, squared_error(torch.maximum, mean=unmasked)),
    "value gradient: no half": (check_value_gradient, squared_error(torch.maximum, factor=1.0)),
    "value gradient: clip alone": (check_value_gradient, squared_error(lambda a, b: b)),
    "entropy: sign flipped": (check_entropy, lambda logits, m, t=1.0: -ppo.entropy(logits, m, t)),
    "entropy: in bits": (check_entropy, lambda logits, m, t=1.0: ppo.entropy(logits, m, t) / math.log(2)),
    "entropy: without temperature": (check_entropy, lambda logits, m, t=1.0: ppo.entropy(logits, m)),
    "entropy: over padding": (
        check_entropy,
        lambda logits, m, t=1.0: ppo.entropy(logits.nan_to_num(), torch.ones_like(m), t),
    ),
    "kl: arguments swapped": (check_exact_kl, lambda p, q, t=1.0: ppo.exact_kl(q, p, t)),
    "kl: mean over the vocabulary": (check_exact_kl, lambda p, q, t=1.0: ppo.exact_kl(p, q, t) / p.shape[-1]),
    "kl: without temperature": (check_exact_kl, lambda p, q, t=1.0: ppo.exact_kl(p, q)),
    "whiten: sample variance": (check_whiten, sample_variance_whiten),
    "whiten: over padding": (check_whiten, lambda x, m: ppo.whiten(x.nan_to_num(), torch.ones_like(m))),
    "whiten: mean kept": (check_whiten, lambda x, m: ppo.whiten(x, m) + ppo.masked_mean(x, m) * m),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_checks_find_planted_faults(fault):
    check, function = FAULTS[fault]
    with pytest.raises(AssertionError):
        check(function)


def test_the_stand_ins_for_faults_are_right_where_nothing_is_planted():
    check_policy_loss(surrogate(torch.minimum))
    check_value_loss(squared_error(torch.maximum))
    check_policy_gradient(surrogate(torch.minimum))
    check_value_gradient(squared_error(torch.maximum))


# ----------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("seed", range(8))
def test_gae_passes_over_environment_text(seed):
    case = Case(seed)
    advantages, returns = ppo.gae(case.rewards, case.values, case.mask, case.gamma, case.lam)
    for b in range(case.b):
        keep = case.mask[b]
        rewards, values = case.rewards[b : b + 1, keep], case.values[b : b + 1, keep]
        alone = ppo.gae(rewards, values, torch.ones_like(rewards, dtype=torch.bool), case.gamma, case.lam)
        assert torch.equal(advantages[b : b + 1, keep], alone[0])
        assert torch.equal(returns[b : b + 1, keep], alone[1])


def test_gae_with_lam_one_returns_what_was_earned():
    """At gamma = lam = 1 the return of a token is the sum of the rewards from it on, whatever the values say."""
    case = Case(4)
    returns = ppo.gae(case.rewards, case.values, case.mask, 1.0, 1.0)[1]
    earned = case.rewards.masked_fill(~case.mask, 0.0).flip(-1).cumsum(-1).flip(-1)
    assert_close(returns, earned * case.mask, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(-80, 80), st.floats(-80, 80)), min_size=1, max_size=9))
def test_exact_kl_is_never_negative(pairs):
    for dtype in (torch.float64, torch.float32):
        p, q = torch.tensor(pairs, dtype=dtype).T
        assert ppo.exact_kl(p, q).item() >= 0.0
        assert ppo.exact_kl(p, p.clone()).item() == 0.0


def test_exact_kl_of_nearly_equal_logits_is_not_negative():
    """In float32 the sum over the vocabulary cancels: rounding alone would make about half of these negative."""
    p = torch.randn(500, 1000, generator=torch.Generator().manual_seed(0))
    kl = ppo.exact_kl(p, p + 1e-6)
    assert (kl >= 0).all()
    assert kl.max() < 1e-5


def test_exact_kl_agrees_with_torch_distributions():
    case = Case(6)
    p, q = (torch.distributions.Categorical(logits=x) for x in (case.logits, case.other_logits))
    kl = ppo.exact_kl(case.logits, case.other_logits)
    assert_close(kl, torch.distributions.kl_divergence(p, q), rtol=1e-10, atol=0)
    assert kl.min() > 0.01


def chosen_by_torch(logits, tokens, temperature):
    return (logits / temperature).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


CHOSEN_FAULTS = {
    "none": chosen_by_torch,
    "temperature is left out": lambda x, k, t: chosen_by_torch(x, k, 1.0),
    "the gradient goes to the chosen token alone": lambda x, k, t: (
        (x / t - (x / t).logsumexp(-1, keepdim=True).detach()).gather(-1, k.unsqueeze(-1)).squeeze(-1)
    ),
}


@pytest.mark.parametrize("fault", CHOSEN_FAULTS)
@pytest.mark.parametrize("piece", [1, 2**18])  # a row at a time; all at once
def test_chosen_logprobs_and_their_gradient_are_those_of_torch(monkeypatch, piece, fault):
    monkeypatch.setattr(ppo, "PIECE", {"cpu": piece, "cuda": piece})
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    tokens = torch.randint(7, (2, 3), generator=generator)
    weights, results = torch.randn(2, 3, generator=generator), []
    for function in (ppo.chosen_logprobs, CHOSEN_FAULTS[fault]):
        x = logits.clone().requires_grad_()
        made = function(x, tokens, 0.3)
        (weights * made).sum().backward()
        results.append(torch.cat([made.flatten(), x.grad.flatten()]))
    assert torch.allclose(*results, rtol=1e-12, atol=1e-12) == (fault == "none")


@pytest.mark.parametrize("least", [ppo.LEAST_LOGP, -5.0])
def test_what_is_next_to_impossible_counts_for_nothing(monkeypatch, least):
    """Log-probabilities of -200 to 0, against float64's exp; with -5 they would count."""
    monkeypatch.setattr(ppo, "LEAST_LOGP", least)
    logits = 40 * torch.randn(2, 4, 3000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p, q = logits.log_softmax(-1)
    assert (p < -150).any()
    ours = ppo.exact_kl(p.float(), q.float()), ppo.entropy(p.float(), torch.ones(4, dtype=torch.bool))
    right = (p.exp() * (p - q)).sum(-1), -(p.exp() * p).sum(-1).mean()
    agree = all(torch.allclose(a.double(), b, rtol=1e-5) for a, b in zip(ours, right, strict=True))
    assert agree == (least == -60)
    smallest = ppo.probabilities(p.float()).min()
    assert smallest > torch.finfo(torch.float32).tiny  # no subnormal number


def test_logits_that_do_not_lie_row_by_row_have_the_same_gradient():
    logits, tokens = (
        torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[0, 1, 2], [3, 4, 5]]),
    )
    gradients = []
    for x in (logits, logits.mT.contiguous().mT):
        x = x.requires_grad_()
        gradients.append(torch.autograd.grad(ppo.chosen_logprobs(x, tokens, 0.7).sum(), x)[0])
    assert not x.is_contiguous()
    assert torch.equal(*gradients)


def test_logits_of_half_precision_become_float32():
    logits = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    tokens = torch.tensor([[0, 1, 2, 3]])
    logprobs = ppo.chosen_logprobs(logits, tokens, 0.7)
    assert logprobs.dtype == torch.float32
    assert_close(logprobs, chosen_by_torch(logits.float(), tokens, 0.7), rtol=1e-6, atol=1e-6)
    logprobs.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_with_ratio_one_the_policy_gradient_is_reinforce():
    """On a fresh sample the clip does nothing: the gradient is -A / tokens."""
    case = Case(2)
    logprobs = case.logprobs.clone().requires_grad_()
    loss, clip_fraction = ppo.policy_loss(logprobs, logprobs.detach(), case.advantages, case.mask, case.epsilon)
    loss.backward()
    assert_close(logprobs.grad, -case.advantages * case.mask / case.mask.sum(), rtol=1e-12, atol=0)
    assert clip_fraction == 0


# --------------------------------------------------------------------------------------------------------- a tiny model

PAD, EOS = 0, 1
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14], [20]]
RESPONSES = [[30, 31, 32, EOS], [40, EOS], [50, 51, 52, 53, 54, EOS]]
CHOSEN = [[True] * 4, [True] * 2, [True, True, False, False, True, True]]


def make_policy(**overrides):
    """A random two-layer Llama with adapters that already differ from the base, and `untouched`, a copy of the base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
            pad_token_id=PAD, bos_token_id=2, eos_token_id=EOS, tie_word_embeddings=False, **shape,
        )
    ).eval()  # fmt: skip
    untouched = copy.deepcopy(base)
    options = {"lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-3, "temperature": 0.7, "target_kl": 100.0}
    tokenizer = SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS)
    policy = Policy(base, tokenizer, Config(**(options | overrides)))
    policy.untouched = untouched
    policy.beginnings = {}  # no tokenizer, no roles
    g = torch.Generator().manual_seed(11)
    for name, p in policy.parameters.items():
        if "lora_B" in name or "value_head" in name:
            p.data.copy_(0.2 * torch.randn(p.shape, generator=g))
    return policy


def make_batch(n=3):
    """`n` answers of unequal lengths, one in three of them with environment text in the middle."""
    rows = [i % 3 for i in range(n)]
    prompts = [[(token + 3 * i) % 64 for token in PROMPTS[row]] for i, row in enumerate(rows)]
    return collate(prompts, [RESPONSES[row] for row in rows], PAD, torch.device("cpu"), [CHOSEN[row] for row in rows])


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


def naive_forward(policy, model, ids, p):
    """One row without padding, all logits: (T, V) log-probabilities and (T,) values before each response token."""
    hidden = model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    scaled = (hidden @ model.lm_head.weight.T) / policy.config.temperature
    logp = scaled - scaled.exp().sum(-1, keepdim=True).log()
    values = hidden.detach() @ policy.value_head.weight[0] + policy.value_head.bias  # the head alone learns from them
    return logp[p - 1 : -1], values[p - 1 : -1]


def naive_rows(policy, batch):
    """The batch taken apart: for each row the (T, V) log-probabilities, reference's too, values, tokens and mask."""
    t = batch.response_mask.shape[1]
    for ids, real, mask in zip(batch.input_ids, batch.attention_mask, batch.response_mask, strict=True):
        p, length = int(real[:-t].sum()), int(real[-t:].sum())
        row = ids[real].tolist()
        logp, values = naive_forward(policy, policy.model.base_model.model, row, p)
        with torch.no_grad():
            ref, _ = naive_forward(policy, policy.untouched, row, p)
        yield SimpleNamespace(logp=logp, ref=ref, values=values, tokens=row[p:], mask=mask[:length].tolist())


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


# -------------------------------------------------------------------------------------------- collating and the forward


def test_collate_by_hand():
    batch = collate([[5], [6, 7]], [[8, 9, EOS], [EOS]], EOS, torch.device("cpu"), [[True, False, True], [True]])
    assert batch.input_ids.tolist() == [[EOS, 5, 8, 9, EOS], [6, 7, EOS, EOS, EOS]]
    assert batch.attention_mask.int().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    # the end token counts even where it is the padding token as well; environment text and padding do not
    assert batch.response_mask.int().tolist() == [[1, 0, 1], [1, 0, 0]]


def test_collate_takes_every_response_token_for_chosen_without_a_mask():
    batch = collate([[5], [6]], [[8, EOS], [EOS]], PAD, torch.device("cpu"))
    assert batch.response_mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("adapter", [True, False])
def test_a_padded_batch_gives_what_its_rows_give_alone(adapter):
    policy, batch = make_policy(), make_batch()
    assert not batch.attention_mask[0, 0]  # padded on the left
    assert not batch.attention_mask[0, -1]  # and on the right
    with torch.no_grad():
        logprobs, values, logits = token_logprobs_and_values(policy, batch, adapter=adapter)
        for b, (prompt, response, row) in enumerate(
            zip(PROMPTS, RESPONSES, naive_rows(policy, make_batch()), strict=True)
        ):
            prompt = [(token + 3 * b) % 64 for token in prompt]
            n = len(response)
            alone = collate([prompt], [response], PAD, torch.device("cpu"))
            lp, v, lg = token_logprobs_and_values(policy, alone, adapter=adapter)
            assert_close(logprobs[b, :n], lp[0], rtol=1e-5, atol=1e-5)
            assert_close(values[b, :n], v[0], rtol=1e-5, atol=1e-5)
            assert_close(logits[b, :n], lg[0], rtol=1e-5, atol=1e-5)
            expected = (row.logp if adapter else row.ref)[torch.arange(n), torch.tensor(response)]
            assert_close(logprobs[b, :n], expected, rtol=1e-5, atol=1e-5)


def test_the_model_is_told_where_padding_is_and_counts_positions_without_it():
    """Rotary positions are relative and would not notice; a model with absolute ones would."""
    policy, batch, seen = make_policy(), make_batch(), {}
    inner = policy.model.base_model.model.model
    hook = inner.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    token_logprobs_and_values(policy, batch)
    hook.remove()
    told, real = seen["attention_mask"].bool(), batch.attention_mask[:, :-1]
    assert torch.equal(told[:, : real.shape[1]], real)
    assert not told[:, real.shape[1] :].any()
    for positions, row in zip(seen["position_ids"], real, strict=True):
        assert positions[: len(row)][row].tolist() == list(range(int(row.sum())))


def test_padding_has_no_influence_on_the_step():
    """Other tokens in the padding, and other padding, give the same loss and the same weights."""
    batch, results = make_batch(), []
    scrambled = Batch(torch.where(batch.attention_mask, batch.input_ids, 33), batch.attention_mask, batch.response_mask)
    for each in (batch, scrambled):
        policy = make_policy()
        results.append((ppo_step(policy, each, [1.0, -1.0, 1.0]), bits(policy)))
    assert results[0] == results[1]


def test_logits_exist_for_response_positions_only():
    policy, batch, seen = make_policy(), make_batch(), []
    hook = policy.head.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].shape, output.shape))
    )
    ppo_step(policy, batch, [1.0, -1.0, 1.0])
    hook.remove()
    b, t = batch.response_mask.shape
    assert batch.input_ids.shape[1] > t + 1
    assert seen == [((b, t, 32), (b, t, 64))] * 3  # reference, gradient pass, trust region
    assert token_logprobs_and_values(policy, batch)[2].shape == (b, t, 64)


def test_the_reference_is_the_untouched_base():
    policy, batch = trained_once(), make_batch()
    for row, logits in zip(
        naive_rows(policy, batch), token_logprobs_and_values(policy, batch, adapter=False)[2], strict=True
    ):
        logp = (logits[: len(row.tokens)] / policy.config.temperature).log_softmax(-1)
        assert_close(logp, row.ref, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- dropout


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
