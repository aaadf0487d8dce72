"""The exercises: fill in the eight functions, then run `python -m exercises`.

Chapter by chapter, README.md says why each is there, works an example by hand, and has a hint, folded away. Each
function raises NotImplementedError until you have written it, so that nothing trains on a placeholder. Begin the
names of your own helpers with an underscore: `functions=exercises.ppo` wants these eight functions and no others.

Shapes: B answers, T response tokens, V vocabulary. `response_mask` (B, T) is True exactly where the policy chose the
token, its end-of-sequence token included. Where it is False there is padding, or text that an environment wrote between
two of the policy's turns; what stands there in other tensors, be it NaN, must have no influence. An answer whose score
is not known is left out: its row is False everywhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# ------------------------------------------------------------------------------- exercise 0: log-probabilities


def chosen_logprobs(logits: Tensor, input_ids: Tensor, temperature: float) -> Tensor:
    """The log-probability of each token that was written: (B, T, V), (B, T + 1) -> (B, T), in float32 at least.

    In words: softmax turns the logits, divided by the temperature, into probabilities; take the logarithm of the one
    that belongs to the token that came next.

        logp[b, t] = log softmax(logits[b, t] / temperature)[input_ids[b, t + 1]]

    `input_ids` are the last token of the prompt and the T tokens of the answer. logits[:, t] is what the model computed
    after reading input_ids[:, t]. The result has a gradient.

    The factors of a text's probability in Ziegler et al. 2019, section 2, https://arxiv.org/abs/1909.08593.
    """
    raise NotImplementedError("exercise 0: chosen_logprobs")


# ------------------------------------------------------------------------------------- exercise 1: policy loss


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped loss, and the share of tokens where the clip is active: four times (B, T) -> two scalars.

    In words: how many times as likely is each token now as when it was sampled? Times its advantage, that is to grow,
    but a token that has moved by more than cliprange in the wanted direction gets no more gradient.

        r = exp(logprobs - old_logprobs)
        loss = mean over response tokens of  max(-r A, -clip(r, 1 - cliprange, 1 + cliprange) A)

    The clip is active at a token where the second of the two is the larger one. Only the loss has a gradient.

    Schulman et al. 2017, equation 7, https://arxiv.org/abs/1707.06347 (there to be maximized, with min).
    """
    raise NotImplementedError("exercise 1: policy_loss")


# -------------------------------------------------------------------------------------- exercise 2: value loss


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the values, clipped, and the share of tokens where the clip acts.

    Four (B, T) -> two scalars.

    In words: values are to come close to the returns. The same with the value held within cliprange_value of the
    rollout's; of both errors the larger counts.

        near = clip(values, old_values - cliprange_value, old_values + cliprange_value)
        loss = 0.5 * mean over response tokens of  max((values - returns)^2, (near - returns)^2)

    The clip is active at a token where the second of the two is the larger one.

    Schulman et al. 2017, equation 9 (the squared error); the clip is that of OpenAI's baselines (ppo2).
    """
    raise NotImplementedError("exercise 2: value_loss")


# ----------------------------------------------------------------------------------------- exercise 3: entropy


def entropy(logits: Tensor, response_mask: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean entropy in nats of softmax(logits / temperature) over the response tokens: (B, T, V) -> a scalar.

    In words: the surprise -log p of a token, weighed by how often it comes, summed over the vocabulary. 0 if one token
    is certain, log V if all are equally likely.

        H[b, t] = - sum over k of  p_k log p_k,    p = softmax(logits[b, t] / temperature)

    It has a gradient: the bonus of Schulman et al. 2017, equation 9, needs one (Williams 1992).
    """
    raise NotImplementedError("exercise 3: entropy")


# -------------------------------------------------------------------------- exercise 4: rewards and advantages


def compute_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """A reward for each token: (B,), three times (B, T) -> (B, T), 0 outside the mask, without a gradient.

    In words: each token pays for being likelier than it is to the reference policy; the answer's score comes with its
    last token (the last one where the mask is True). An answer that is left out has no token: its row stays 0.

        reward[b, t] = -kl_coef * (logprobs[b, t] - ref_logprobs[b, t])  +  scores[b] if t is the last token

    Ziegler et al. 2019, equation 2, https://arxiv.org/abs/1909.08593.
    """
    raise NotImplementedError("exercise 4: compute_rewards")


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns, both (B, T), 0 outside the mask, without a gradient: generalized advantage estimation.

    In words: delta is by how much a step went better than its value said. A token's advantage is its own delta, and
    gamma * lam times the advantage of the token after it.

        delta[t] = reward[t] + gamma * value[t'] - value[t]
        advantage[t] = delta[t] + gamma * lam * advantage[t']        returns = advantages + values

    t' is the policy's next token: environment text between the two is passed over. After the last token, value and
    advantage are 0.

    Schulman et al. 2016, equations 11 to 16, https://arxiv.org/abs/1506.02438.
    """
    raise NotImplementedError("exercise 4: gae")


# -------------------------------------------------------------------------------- exercise 5: minibatch update


def ppo_losses(
    logprobs: Tensor,
    values: Tensor,
    logits: Tensor,
    old_logprobs: Tensor,
    old_values: Tensor,
    advantages: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    config: Any,
) -> dict[str, Tensor]:
    """The loss of a minibatch and its parts: `loss`, `policy_loss`, `value_loss`, `entropy`, `clip_fraction`.

    `clip_fraction` is that of the policy loss.

    In words: the policy loss, vf_coef times the value loss, and a bonus of entropy_coef times the entropy (a bonus
    makes a loss smaller).

        loss = policy_loss + vf_coef * value_loss - entropy_coef * entropy

    logprobs, values (B, T) and logits (B, T, V) are those of the policy as it is now; old_logprobs and old_values were
    kept when the answers were sampled. `config` has cliprange, cliprange_value, vf_coef, entropy_coef and temperature.

    Schulman et al. 2017, equation 9 (there to be maximized).
    """
    raise NotImplementedError("exercise 5: ppo_losses")


def minibatch_update(
    gradients: Callable[[], dict[str, Any]], optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> dict[str, Any]:
    """One step of the optimizer on one minibatch; returns the losses, and with them `grad_norm`.

    In words: forget the last gradient, compute this one, scale it down if it is too long, step.

        norm = |gradients of all parameters together|,     gradient *= min(1, max_grad_norm / norm)

    `gradients()` runs the policy on the minibatch, calls backward() and returns the losses as a dictionary of tensors
    or numbers. backward() ADDS to the `grad` of each parameter; one that has no part in the loss has None there. The
    parameters are in optimizer.param_groups, a list of {"params": [...]}. `grad_norm`, a tensor, is the norm before
    scaling.

    Pascanu et al. 2013, section 3.2, https://arxiv.org/abs/1211.5063.
    """
    raise NotImplementedError("exercise 5: minibatch_update")
