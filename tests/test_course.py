"""The course's harness, tested by mutation: every mistake is caught and named, what is right passes however written."""

import contextlib
import inspect
import math
import time

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn.functional import cross_entropy

import exercises.ppo as blanks
from exercises import harness, screen
from exercises.cases import FUNCTIONS
from exercises.mistakes import pairs
from lora_ppo import ppo

BY_NAME = {function.name: function for function in FUNCTIONS}


def verdict_on(name: str, tried) -> harness.Verdict:
    return harness.check(BY_NAME[name], tried)


# ------------------------------------------------------------------------------------------------ mistakes are named


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
def test_every_known_mistake_is_caught_and_named(function):
    named = {m.sentence: verdict_on(function.name, harness.made(function, m)) for m in function.mistakes}
    assert {sentence: v.mistake for sentence, v in named.items()} == {sentence: sentence for sentence in named}
    for v in named.values():  # each shows an input, and a result that is another there
        assert v.inputs
        assert not harness.agree(v.got, v.expected)
    assert len(named) == len(function.mistakes) >= 12


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)
def test_the_library_passes_and_so_do_the_parts_with_no_mistake(function):
    assert verdict_on(function.name, getattr(ppo, function.name)).passed
    assert verdict_on(function.name, function.right).passed


# As learners write them, without the harness's own parts.
def no_minus(logprobs, old_logprobs, advantages, response_mask, cliprange):
    r = torch.exp(torch.where(response_mask, logprobs - old_logprobs, 0.0))
    a = torch.where(response_mask, advantages, 0.0)
    one, two = r * a, r.clamp(1 - cliprange, 1 + cliprange) * a
    loss = torch.min(one, two)[response_mask].mean()
    return loss, (two < one)[response_mask].float().mean()


def reinforce(logprobs, old_logprobs, advantages, response_mask, cliprange):
    return -(logprobs * advantages)[response_mask].mean(), torch.tensor(0.0)


def clamp_only(logprobs, old_logprobs, advantages, response_mask, cliprange):
    r = (logprobs - old_logprobs)[response_mask].exp().clamp(1 - cliprange, 1 + cliprange)
    return -(r * advantages[response_mask]).mean(), torch.zeros(())


def times_mask(logprobs, old_logprobs, advantages, response_mask, cliprange):
    r = torch.exp(logprobs - old_logprobs)
    plain, clipped = -r * advantages, -r.clamp(1 - cliprange, 1 + cliprange) * advantages
    share = ((clipped > plain) * response_mask).sum() / response_mask.sum()
    return (torch.max(plain, clipped) * response_mask).sum() / response_mask.sum(), share


def minus_and_sum(logprobs, old_logprobs, advantages, response_mask, cliprange):
    mean, share = no_minus(logprobs, old_logprobs, advantages, response_mask, cliprange)
    return mean * response_mask.sum(), share


def next_nonterminal(rewards, values, response_mask, gamma, lam):
    """What PPO for games does: an environment's text ends the answer."""
    v = torch.where(response_mask, values.detach(), 0.0)
    advantages, last = torch.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[1])):
        end = t == rewards.shape[1] - 1
        after, alive = (0.0, 0.0) if end else (v[:, t + 1], response_mask[:, t + 1].float())
        last = rewards[:, t] + gamma * after * alive - v[:, t] + gamma * lam * alive * last
        last = last * response_mask[:, t]
        advantages[:, t] = last
    return advantages, (advantages + v) * response_mask


def columns_as_tokens(rewards, values, response_mask, gamma, lam):
    """What trainers of language models do: zeros outside the mask, a loop over all columns, zeros again."""
    values, after, last, found = values.detach().masked_fill(~response_mask, 0.0), 0.0, 0.0, []
    for t in reversed(range(rewards.shape[1])):
        last = rewards[:, t] + gamma * after - values[:, t] + gamma * lam * last
        after = values[:, t]
        found.append(last)
    advantages = torch.stack(found[::-1], 1)
    return advantages * response_mask, (advantages + values) * response_mask


def not_reversed(rewards, values, response_mask, gamma, lam):
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b, row in enumerate(response_mask):
        last = after = 0.0
        for t in row.nonzero().flatten().tolist():
            value = values[b, t].detach()
            last = rewards[b, t] + gamma * after - value + gamma * lam * last
            advantages[b, t], returns[b, t], after = last, last + value, value
    return advantages, returns


def whitened(rewards, values, response_mask, gamma, lam):
    advantages, returns = ppo.gae(rewards, values, response_mask, gamma, lam)
    a = advantages[response_mask]
    return ((advantages - a.mean()) / (a.std() + 1e-8)).masked_fill(~response_mask, 0.0), returns


def filled_and_averaged(logits, response_mask, temperature=1.0):
    logp = (logits.masked_fill(~response_mask[..., None], 0.0) / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean()


def unshifted(logits, input_ids, temperature):
    return torch.log_softmax(logits.float() / temperature, -1).gather(2, input_ids[:, :-1, None])[..., 0]


def half_kept(logits, input_ids, temperature):
    return torch.log_softmax(logits / temperature, -1).gather(2, input_ids[:, 1:, None])[..., 0]


def entropy_of_bits(logits, response_mask, temperature=1.0):
    return Categorical(logits=logits[response_mask].float() / temperature).entropy().mean() / math.log(2)


def gini(logits, response_mask, temperature=1.0):
    p = (logits[response_mask].float() / temperature).softmax(-1)
    return (p * (1 - p)).sum(-1).mean()


def keeps_the_gradient(gradients, optimizer, max_grad_norm):
    losses = gradients()
    losses["grad_norm"] = torch.nn.utils.clip_grad_norm_(
        [p for g in optimizer.param_groups for p in g["params"]], max_grad_norm
    )
    optimizer.step()
    return losses


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("policy_loss", no_minus, "The sign"),
        ("policy_loss", reinforce, "REINFORCE"),
        ("policy_loss", clamp_only, "The clipped ratio alone"),
        ("policy_loss", times_mask, "0 * NaN is NaN"),
        ("policy_loss", minus_and_sum, "Two mistakes at once. The sign"),
        ("gae", next_nonterminal, "as if the answer ended"),
        ("gae", columns_as_tokens, "Environment text is taken for a step of value 0"),
        ("gae", not_reversed, "Forward"),
        ("gae", whitened, "whitened in here, by std()"),
        ("chosen_logprobs", unshifted, "Not shifted"),
        ("entropy", filled_and_averaged, "Padding is averaged, too"),
        ("entropy", entropy_of_bits, "In bits"),
        ("entropy", gini, "p (1 - p)"),
        ("minibatch_update", keeps_the_gradient, "not zeroed"),
    ],
)
def test_mistakes_as_learners_write_them_are_named(name, wrong, words):
    assert words in verdict_on(name, wrong).mistake


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("policy_loss", lambda new, old, a, m, e: tuple(1.1 * x for x in ppo.policy_loss(new, old, a, m, e))),
        ("entropy", lambda x, m, t: ppo.entropy(x, m, t) * 0 + 123.0),
        ("gae", lambda r, v, m, g, lam: tuple(x * 0.5 for x in ppo.gae(r, v, m, g, lam))),
        ("value_loss", lambda v, old, r, m, e: ((v - r)[m].pow(4).mean(), torch.tensor(0.0))),
        ("chosen_logprobs", lambda x, ids, t: ppo.chosen_logprobs(x, ids, t) * x[..., 0].detach() / x[..., 0]),
        ("compute_rewards", lambda s, new, ref, m, k: ppo.compute_rewards(s, new, ref, m, k) + 0.01 * m),
    ],
)
def test_a_mistake_that_nobody_listed_is_caught_and_not_given_a_wrong_name(name, wrong):
    v = verdict_on(name, wrong)
    assert not v.passed
    assert v.mistake == harness.UNKNOWN


def last_of_each(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    rewards = (-kl_coef * (logprobs - ref_logprobs)).detach().masked_fill(~response_mask, 0.0)
    for b, row in enumerate(response_mask):
        rewards[b, row.nonzero().flatten()[-1]] += scores[b]
    return rewards


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("gae", lambda r, v, m, g, lam: tuple(x + 0.1 * ~m for x in ppo.gae(r, v, m, g, lam)), harness.INSIDE),
        ("entropy", lambda x, m, t: ppo.entropy(x, m, t) * (1 + 0.1 * (~m).sum()), harness.OUTSIDE),
        (
            "policy_loss",
            lambda new, old, a, m, e: (ppo.policy_loss(new, old, a, m, e)[0], torch.tensor(0.5)),
            "The loss and its gradient are right. What the log is told is not: clip_fraction.",
        ),
        (
            "compute_rewards",
            last_of_each,
            "Where an answer is left out, its row False everywhere: It raises IndexError: index -1 is out of bounds",
        ),
    ],
)
def test_of_a_mistake_that_nobody_listed_it_is_said_what_is_right(name, wrong, sentence):
    v = verdict_on(name, wrong)
    assert v.mistake.startswith(sentence)
    if name == "compute_rewards":
        assert v.inputs["response_mask"].tolist() == [[False]]


def test_what_two_mistakes_at_once_are_called_gives_exactly_their_result():
    function = BY_NAME["value_loss"]
    every = {m.sentence: m for m in (*function.mistakes, *pairs(function.mistakes))}
    some = [m for i, m in enumerate(pairs(function.mistakes)) if i % 23 == 0]
    for planted in some:
        named = every[verdict_on("value_loss", harness.made(function, planted)).mistake]
        for case in function.cases:
            a, b = (harness.outcome(function, harness.made(function, m), case) for m in (planted, named))
            assert harness.agree(a, b, function.asides) or harness.has_nan(case), (planted.sentence, named.sentence)


# ------------------------------------------------------------------------------------- what is right passes
def masked_mean_by_where(x, mask):
    return torch.where(mask, x, torch.zeros_like(x)).sum() / mask.count_nonzero()


def by_cross_entropy(logits: Tensor, input_ids: Tensor, temperature: float) -> Tensor:
    flat = cross_entropy((logits.float() / temperature).flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    return -flat.view(input_ids[:, 1:].shape)


def by_logsumexp(logits, input_ids, temperature):
    x = logits.float().div(temperature)
    onehot = torch.nn.functional.one_hot(input_ids[:, 1:], x.shape[-1])
    return (x * onehot).sum(-1) - torch.logsumexp(x, -1)


def by_categorical(logits, input_ids, temperature):
    return Categorical(logits=logits.float() / temperature).log_prob(input_ids[:, 1:])


def chosen_by_loops(logits, input_ids, temperature):
    rows = []
    for b in range(logits.shape[0]):
        logps = [logits[b, t].float().div(temperature).log_softmax(0) for t in range(logits.shape[1])]
        rows.append(torch.stack([logp[input_ids[b, t + 1]] for t, logp in enumerate(logps)]))
    return torch.stack(rows)


def chosen_in_float64(logits, input_ids, temperature):
    return Categorical(logits=logits.double() / temperature).log_prob(input_ids[:, 1:])


def policy_by_indexing(logprobs, old_logprobs, advantages, response_mask, cliprange):
    r = (logprobs[response_mask] - old_logprobs[response_mask].detach()).exp()
    a = advantages[response_mask]
    objective = torch.minimum(r * a, r.clip(1 - cliprange, 1 + cliprange) * a)
    return -objective.mean(), (objective < r * a).float().mean()


def policy_by_sign(logprobs, old_logprobs, advantages, response_mask, cliprange):
    """The clip acts on one side only, the one that the advantage's sign says."""
    total, active = logprobs.new_zeros(()), 0
    for b, t in response_mask.nonzero().tolist():
        r, a = (logprobs[b, t] - old_logprobs[b, t]).exp(), advantages[b, t]
        limit = 1 + cliprange if a > 0 else 1 - cliprange
        over = bool(r > limit) if a > 0 else bool(r < limit)
        total, active = total - (torch.as_tensor(limit) if over else r) * a, active + over
    return total / response_mask.sum(), torch.tensor(active) / response_mask.sum()


def policy_in_place(logprobs, old_logprobs, advantages, response_mask, cliprange):
    r = (logprobs - old_logprobs).masked_fill_(~response_mask, 0.0).exp()
    a = advantages.clone()
    a[~response_mask] = 0.0
    plain, clipped = (-r).mul(a), r.clamp(1 - cliprange, 1 + cliprange).neg().mul(a)
    share = masked_mean_by_where((clipped > plain).float(), response_mask)
    return masked_mean_by_where(torch.stack([plain, clipped]).amax(0), response_mask), share


def value_by_indexing(values, old_values, returns, response_mask, cliprange_value):
    v, old, goal = (x[response_mask] for x in (values, old_values, returns))
    near = old + (v - old).clamp(-cliprange_value, cliprange_value)
    plain, clipped = (v - goal).pow(2), (near - goal).pow(2)
    return torch.max(plain, clipped).mean() / 2, (clipped > plain).float().mean()


def value_by_min_and_max(values, old_values, returns, response_mask, cliprange_value):
    v, old, goal = (x.masked_fill(~response_mask, 0.0) for x in (values, old_values, returns))
    near = torch.minimum(torch.maximum(v, old - cliprange_value), old + cliprange_value)
    plain, clipped = 0.5 * (v - goal).square(), 0.5 * (near - goal).square()
    share = masked_mean_by_where((clipped > plain).float(), response_mask)
    return masked_mean_by_where(torch.where(clipped > plain, clipped, plain), response_mask), share


def entropy_by_categorical(logits, response_mask, temperature=1.0):
    return Categorical(logits=logits[response_mask].float() / temperature).entropy().mean()


def entropy_by_logsumexp(logits, response_mask, temperature=1.0):
    x = logits[response_mask].float() / temperature
    return (torch.logsumexp(x, -1) - (x.softmax(-1) * x).sum(-1)).mean()


def entropy_with_log_p_detached(logits, response_mask, temperature=1.0):
    """Right: the other half of the product rule adds up to nothing."""
    logp = (logits[response_mask].float() / temperature).log_softmax(-1)
    return -(logp.exp() * logp.detach()).sum(-1).mean()


def rewards_by_loops(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    rewards = torch.zeros_like(logprobs)
    with torch.no_grad():
        for b, row in enumerate(response_mask):
            where = row.nonzero().flatten()
            rewards[b, where] = -kl_coef * (logprobs[b, where] - ref_logprobs[b, where])
            rewards[b, where[-1:]] += scores[b]
    return rewards


def rewards_by_flipping(scores, logprobs, ref_logprobs, response_mask, kl_coef):
    last = response_mask.shape[1] - 1 - response_mask.flip(1).int().argmax(1)
    penalty = torch.where(response_mask, kl_coef * (ref_logprobs - logprobs), 0.0).detach()
    penalty[torch.arange(len(last)), last] += scores
    return penalty


def gae_by_sums(rewards, values, response_mask, gamma, lam):
    """Equation 16 as the sum that it is."""
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    with torch.no_grad():
        for b in range(len(rewards)):
            where = response_mask[b].nonzero().flatten()
            r, v = rewards[b, where].double(), values[b, where].double()
            delta = r + gamma * torch.cat([v[1:], torch.zeros(1, dtype=v.dtype)]) - v
            n = torch.arange(len(where))
            weights = torch.where(n >= n[:, None], (gamma * lam) ** (n - n[:, None]).clamp(min=0).double(), 0.0)
            advantages[b, where] = (weights @ delta).float()
            returns[b, where] = (weights @ delta + v).float()
    return advantages, returns


def gae_vectorized(rewards, values, response_mask, gamma, lam):
    """All answers at once; what a gap does not change is carried across it."""
    values = values.detach().masked_fill(~response_mask, 0.0)
    found, advantage, following = [], torch.zeros(len(rewards)), torch.zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        m = response_mask[:, t]
        new = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * advantage
        advantage, following = torch.where(m, new, advantage), torch.where(m, values[:, t], following)
        found.append(new * m)
    advantages = torch.stack(found[::-1], 1)
    return advantages, advantages + values


def losses_with_zero_bonus(
    logprobs, values, logits, old_logprobs, old_values, advantages, returns, response_mask, config
):
    pg, share = policy_by_indexing(logprobs, old_logprobs, advantages, response_mask, config.cliprange)
    vf, _ = value_by_indexing(values, old_values, returns, response_mask, config.cliprange_value)
    h = entropy_by_categorical(logits, response_mask, config.temperature)
    loss = pg + vf * config.vf_coef + h * -config.entropy_coef
    return {"loss": loss, "policy_loss": pg, "value_loss": vf, "entropy": h, "clip_fraction": share, "more": 0}


def update_by_hand(gradients, optimizer, max_grad_norm):
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = None
    losses = gradients()
    trained = [p for p in parameters if p.grad is not None]
    norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in trained))
    if norm > max_grad_norm:
        for p in trained:
            p.grad *= max_grad_norm / norm
    optimizer.step()
    optimizer.zero_grad()
    return {**losses, "grad_norm": norm}


RIGHT = {
    "chosen_logprobs": (by_cross_entropy, by_logsumexp, by_categorical, chosen_by_loops, chosen_in_float64),
    "policy_loss": (policy_by_indexing, policy_by_sign, policy_in_place),
    "value_loss": (value_by_indexing, value_by_min_and_max),
    "entropy": (entropy_by_categorical, entropy_by_logsumexp, entropy_with_log_p_detached),
    "compute_rewards": (rewards_by_loops, rewards_by_flipping),
    "gae": (gae_by_sums, gae_vectorized),
    "ppo_losses": (losses_with_zero_bonus,),
    "minibatch_update": (update_by_hand,),
}


@pytest.mark.parametrize(("name", "variant"), [(name, f) for name, some in RIGHT.items() for f in some])
def test_what_is_right_passes_however_it_is_written(name, variant):
    assert verdict_on(name, variant) == harness.Verdict(BY_NAME[name].exercise, name)


# --------------------------------------------------------------------------------- functions that misbehave
def endless(logits, response_mask, temperature=1.0):
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def overwrites(logits, response_mask, temperature=1.0):
    result = ppo.entropy(logits, response_mask, temperature)
    with torch.no_grad():
        logits[~response_mask] = 0.0
        logits -= 1.0
    return result


def calls_backward(logits, response_mask, temperature=1.0):
    result = ppo.entropy(logits, response_mask, temperature)
    result.backward()
    return result


def divides_by_nothing(logits, response_mask, temperature=1.0):
    return 1 / 0


@pytest.mark.parametrize(
    ("tried", "words"),
    [
        (lambda x, m, t: 0.5, "entropy is a Python float; expected a tensor"),
        (lambda x, m, t: ppo.entropy(x, m, t).item(), "Python float"),
        (lambda x, m, t: None, "returns None"),
        (lambda x, m, t: ppo.entropy(x, m, t).detach(), "no gradient"),
        (lambda x, m, t: ppo.entropy(x, m, t).reshape(1), "entropy has shape (1,); expected ()"),
        (lambda x, m, t: ppo.entropy(x, m, t).double(), "entropy is float64; expected float32"),
        (lambda x, m: ppo.entropy(x, m), "It raises TypeError"),
        (divides_by_nothing, "It raises ZeroDivisionError: division by zero (line "),
        (overwrites, "changes its input logits"),
        (calls_backward, "leaves it to its caller."),
        (endless, "does not come back"),
        (lambda x, m, t: exit(), "It raises SystemExit"),
    ],
)
def test_a_function_that_misbehaves_gets_one_clear_line(tried, words, monkeypatch):
    monkeypatch.setattr(harness, "SECONDS", 1.0)
    mistake = verdict_on("entropy", tried).mistake
    assert words in mistake
    assert "\n" not in mistake


def test_two_results_where_one_is_returned():
    one = verdict_on("policy_loss", lambda *given: ppo.policy_loss(*given)[0])
    assert one.mistake == "It returns 1 result; expected 2 results: loss, clip_fraction."
    lacks = verdict_on("ppo_losses", lambda *given: {"loss": ppo.ppo_losses(*given)["loss"]})
    assert lacks.mistake == "What it returns lacks policy_loss, value_loss, entropy, clip_fraction."
    named = verdict_on(
        "policy_loss", lambda *given: dict(zip(("loss", "clip_fraction"), ppo.policy_loss(*given), strict=True))
    )
    assert named.mistake == "It returns 1 result; expected 2 results: loss, clip_fraction."
    assert "is a Python dict" in verdict_on("entropy", lambda *given: {"entropy": ppo.entropy(*given)}).mistake
    tuple_ = verdict_on("ppo_losses", lambda *given: tuple(ppo.ppo_losses(*given).values()))
    assert tuple_.mistake.startswith("It returns 5 results; expected a dictionary of loss, policy_loss")


def answer_by_answer(logprobs, old_logprobs, advantages, response_mask, cliprange):
    """NaN where an answer is left out: the mean of no numbers, times 0."""
    loss, share = ppo.policy_loss(logprobs, old_logprobs, advantages, response_mask, cliprange)
    empty = sum(logprobs[b][response_mask[b]].mean() * 0 * response_mask[b].sum() for b in range(len(logprobs)))
    return loss + empty, share


@pytest.mark.parametrize(
    ("name", "tried"),
    [
        ("policy_loss", answer_by_answer),
        ("minibatch_update", lambda *given: {k: v.detach() for k, v in ppo.minibatch_update(*given).items()}),
        ("minibatch_update", lambda *given: {k: ppo.minibatch_update(*given)[k] for k in ("loss", "grad_norm")}),
    ],
)
def test_what_would_fail_in_training_alone_fails_here(name, tried):
    assert not verdict_on(name, tried).passed


def test_a_parameter_without_a_gradient_is_no_surprise():
    def every_gradient(gradients, optimizer, max_grad_norm):
        optimizer.zero_grad()
        losses = gradients()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.sqrt(sum(p.grad.pow(2).sum() for p in parameters))
        return losses | {"grad_norm": norm}

    assert "'NoneType' object has no attribute 'pow'" in verdict_on("minibatch_update", every_gradient).mistake


# ----------------------------------------------------------------------------- the smallest input, the screen
def test_the_smallest_input_is_one_answer_of_as_few_tokens_as_show_the_mistake():
    v = verdict_on("policy_loss", no_minus)
    assert v.inputs["logprobs"].shape == (1, 1)
    v = verdict_on("gae", next_nonterminal)
    assert v.inputs["response_mask"].tolist() == [[True, False, True]]  # nothing shorter has a gap
    v = verdict_on("policy_loss", times_mask)
    assert v.inputs["response_mask"].numel() == 2
    assert torch.isnan(torch.stack([v.inputs[n] for n in ("logprobs", "old_logprobs", "advantages")])).sum() == 1


def test_what_is_shown_fits_80_columns_and_has_expected_and_got():
    for name, wrong in (
        *(("policy_loss", no_minus), ("gae", next_nonterminal), ("chosen_logprobs", unshifted)),
        *(("chosen_logprobs", half_kept), ("minibatch_update", keeps_the_gradient)),
    ):
        text = screen.explained(verdict_on(name, wrong)).plain
        assert max(map(len, text.splitlines())) <= 80
        assert "expected  " in text
        assert "got       " in text
        assert "Mistake: " in text
        assert ("(bfloat16)  " in text) == (wrong is half_kept)
    assert screen.text_of(torch.tensor([[-0.0, -0.5]])) == "[[0, -0.5]]"


def test_every_blank_fails_and_says_in_its_docstring_what_is_wanted():
    for name in BY_NAME:
        blank = getattr(blanks, name)
        assert verdict_on(name, blank).mistake == harness.BLANK
        with pytest.raises(NotImplementedError):
            blank(*[None] * len(inspect.signature(blank).parameters))
        assert inspect.signature(blank) == inspect.signature(getattr(ppo, name)), name
        for word in ("In words:", " = ", "et al. 20"):
            assert word in blank.__doc__, f"{name} lacks {word!r}"


@pytest.mark.parametrize("decorated", [lambda function: function, torch.enable_grad()])
def test_an_exercise_is_checked_by_itself(decorated):
    """ppo_losses that calls policy_loss of its own file, which is wrong or a blank, is right nevertheless."""
    space = {"policy_loss": no_minus, "value_loss": blanks.value_loss, "entropy": gini}
    exec(inspect.getsource(ppo.ppo_losses), vars(blanks) | space | {"Any": object}, space)
    space["ppo_losses"].__globals__.update(space)
    assert verdict_on("ppo_losses", decorated(space["ppo_losses"])).passed
    assert space["ppo_losses"].__globals__["policy_loss"] is no_minus  # put back


# ------------------------------------------------------------------------- the chapters' examples, by hand
ROW = torch.ones(1, 3, dtype=torch.bool)


def near(tensor: Tensor, *expected: float) -> bool:
    return tensor.flatten().tolist() == pytest.approx(expected, abs=6e-4)


def test_the_examples_of_the_chapters_are_what_the_library_gives():
    logits = torch.tensor([[[0.0, 2, 0, 0], [0, 0, 3, 1], [0, 0, 0, 1]]])
    ids = torch.tensor([[0, 1, 2, 3]])
    assert near(ppo.chosen_logprobs(logits, ids, 1.0), -0.341, -0.211, -0.744)
    assert near(ppo.chosen_logprobs(logits, ids, 0.5)[:, :1], -0.0535)

    new, old = torch.tensor([[-0.5, -1.5, -0.5]]), torch.full((1, 3), -1.0)
    pg, share = ppo.policy_loss(new, old, torch.tensor([[1.0, 1.0, -1.0]]), ROW, 0.2)
    assert near(torch.stack([pg, share]), -0.0527, 1 / 3)

    values, old_values = torch.tensor([[0.5, 0.0, 1.0]]), torch.tensor([[0.0, 0.1, 0.9]])
    vf, share = ppo.value_loss(values, old_values, torch.ones(1, 3), ROW, 0.2)
    assert near(torch.stack([vf, share]), 0.2733, 1 / 3)

    logits = torch.tensor([[[0.0, 0, 0, 0], [0, 2, 0, 0], [0, 10, 0, 0]]])
    each = [ppo.entropy(logits[:, i : i + 1], ROW[:, :1]) for i in range(3)]
    h = ppo.entropy(logits, ROW)
    assert near(torch.stack([*each, h]), 1.386, 0.918, 0.0015, 0.769)

    new, ref = torch.tensor([[-0.3, -0.2, -0.7]]), torch.tensor([[-0.5, -0.2, -0.4]])
    rewards = ppo.compute_rewards(torch.ones(1), new, ref, ROW, 0.5)
    assert near(rewards, -0.1, 0.0, 1.15)
    advantages, returns = ppo.gae(rewards, torch.tensor([[0.2, 0.4, 0.6]]), ROW, 1.0, 0.5)
    assert near(advantages, 0.3375, 0.475, 0.55)
    assert near(returns, 0.5375, 0.875, 1.15)

    assert near(pg + 0.1 * vf - 0.01 * h, -0.033)
    w = torch.ones(2, requires_grad=True)

    def gradients():
        (torch.tensor([3.0, 4.0]) * w).sum().backward()
        return {}

    norm = ppo.minibatch_update(gradients, torch.optim.SGD([w], lr=0.1), 1.0)["grad_norm"]
    assert near(torch.cat([w.detach(), norm.view(1)]), 0.94, 0.92, 5.0)
