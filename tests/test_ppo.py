"""The mathematics of PPO against hand-computed numbers and an independent oracle."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import oracle
from support.steps import NAN
from torch.testing import assert_close

from lora_ppo import ppo

SEEDS = range(25)


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def same(actual, expected, rtol=1e-12, atol=1e-12):
    """Asserts that a float64 tensor is what plain Python computed."""
    assert_close(actual, f64(expected), rtol=rtol, atol=atol)


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


def test_a_sequence_of_adapted_kl_coefs_by_hand():
    """Errors of 10, -10, 50 (clipped to 20), -100 (to -20) and 0 %; a tenth of each acts, as 10 answers of 100 do."""
    price, seen = 0.1, []
    for kl in (6.6, 5.4, 9.0, 0.0, 6.0):
        price = ppo.adapted_kl_coef(price, kl, kl_target=6.0, kl_horizon=100, answers=10)
        seen.append(price)
    assert seen == pytest.approx([0.101, 0.09999, 0.1019898, 0.099950004, 0.099950004], rel=1e-12)


def test_masked_mean_by_hand():
    same(ppo.masked_mean(f64([[1.0, NAN], [4.0, NAN]]), torch.tensor([[True, False], [True, False]])), 2.5)


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


def after_a_prompt(tokens):
    """The ids that a model read and wrote: some last token of the prompt, then `tokens`."""
    return torch.nn.functional.pad(tokens, (1, 0), value=5)


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

    def ours(logits, tokens, temperature):
        return ppo.chosen_logprobs(logits, after_a_prompt(tokens), temperature)

    for function in (ours, CHOSEN_FAULTS[fault]):
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
        gradients.append(torch.autograd.grad(ppo.chosen_logprobs(x, after_a_prompt(tokens), 0.7).sum(), x)[0])
    assert not x.is_contiguous()
    assert torch.equal(*gradients)


def test_logits_of_half_precision_become_float32():
    logits = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    tokens = torch.tensor([[0, 1, 2, 3]])
    logprobs = ppo.chosen_logprobs(logits, after_a_prompt(tokens), 0.7)
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


IMPOSSIBLE = [-math.inf, torch.finfo(torch.float32).min, -1e30]


@pytest.mark.parametrize("low", IMPOSSIBLE)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_tokens_of_probability_zero_leave_every_number_what_it_is_without_them(low, temperature):
    """As padded vocabularies have them: entropy, KL, log-probabilities, and the gradients of all three."""
    generator = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(2, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    mask, tokens = torch.tensor([[True, True, False], [True, False, False]]), torch.tensor([[4, 0, 1, 2], [4, 3, 4, 0]])

    def measured(pad: float | None) -> list[torch.Tensor]:
        rows = [x.clone().requires_grad_() for x in (logits, other)]
        padded = rows if pad is None else [torch.nn.functional.pad(x, (0, 3), value=pad) for x in rows]
        results = [
            ppo.entropy(padded[0], mask, temperature),
            ppo.exact_kl(*padded, temperature),
            ppo.chosen_logprobs(padded[0], tokens, temperature),
        ]
        sum(result.sum() for result in results).backward()
        return [*(x.detach() for x in results), *(x.grad for x in rows)]

    for with_zeros, without in zip(measured(low), measured(None), strict=True):
        assert_close(with_zeros, without, rtol=1e-12, atol=1e-12)


def test_the_gradient_of_padding_is_zero():
    logits = torch.tensor([[[1.0, 2.0, -math.inf]]], requires_grad=True)
    mask = torch.tensor([[True]])
    (ppo.entropy(logits, mask) + ppo.exact_kl(logits, logits.detach() * torch.tensor([1.0, 3.0, 1.0])).sum()).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[..., 2].abs() < 1e-20


def test_what_the_reference_alone_never_writes_is_infinitely_far():
    """And what the policy never writes adds nothing: 0.5 ln 2 + 0.5 ln 2."""
    p, q = torch.tensor([0.0, 0.0, -math.inf]), torch.tensor([0.0, 0.0, 0.0, 0.0])
    assert_close(ppo.exact_kl(torch.nn.functional.pad(p, (0, 1), value=-math.inf), q), torch.tensor(math.log(2)))
    assert ppo.exact_kl(q[:3], p) == math.inf


def test_a_price_of_zero_is_none_even_of_an_infinite_divergence():
    mask = torch.ones(1, 2, dtype=torch.bool)
    ref = torch.tensor([[-math.inf, -1.0]])
    rewards = ppo.compute_rewards(torch.tensor([1.0]), torch.tensor([[-1.0, -1.0]]), ref, mask, 0.0)
    assert rewards.tolist() == [[0.0, 1.0]]
