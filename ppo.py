"""The mathematics of PPO, as pure functions of tensors. `lora_ppo_demo.py` tells how they are used.

Shapes: B samples, T response tokens, V vocabulary. `response_mask` (B, T) is True exactly where the policy chose the
token, its end-of-sequence token included; padding and what an environment wrote are False, and what stands there, be
it NaN, has no influence.
"""

import torch
from torch import Tensor


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is True; what stands elsewhere, be it NaN, has no influence."""
    return x.masked_fill(~mask, 0.0).sum() / mask.sum()


def exact_kl(logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL(p || q) of two categorical distributions, summed over the vocabulary: (..., V), (..., V) -> (...), in nats.

    Never negative, unlike the sampled estimate log p(token) - log q(token), whose mean over truncated samples can be.
    """
    p, q = logits.log_softmax(-1), other_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0.0)


def compute_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """Reward per token (B, T): -kl_coef * (logprobs - ref_logprobs) on each, and the score (B,) on the last.

    Ziegler et al. 2019, equation 2 (https://arxiv.org/abs/1909.08593).
    """
    rewards = (-kl_coef * (logprobs - ref_logprobs)).masked_fill(~response_mask, 0.0)
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = (positions * response_mask).argmax(-1)  # (B,)
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards).unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and returns, both (B, T), zero outside `response_mask`.

    Schulman et al. 2016, equations 11 to 16 (https://arxiv.org/abs/1506.02438). A token's successor is the policy's
    next token: what the environment wrote between them is passed over. After the last one the value is zero.
    """
    advantages = torch.zeros_like(rewards)
    advantage = torch.zeros_like(rewards[:, 0])  # of the successor
    next_value = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        chosen = response_mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(chosen, delta + gamma * lam * advantage, advantage)
        next_value = torch.where(chosen, values[:, t], next_value)
        advantages[:, t] = torch.where(chosen, advantage, 0.0)
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """`x` shifted and scaled to mean 0 and variance 1 where `mask` is True, 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return ((x - mean) * (variance + 1e-8).rsqrt()).masked_fill(~mask, 0.0)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """PPO's clipped surrogate, as a loss averaged over tokens, and the share of tokens where the clip is active.

    Schulman et al. 2017, equation 7 (https://arxiv.org/abs/1707.06347): -min(r A, clip(r, 1 - e, 1 + e) A).
    """
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(~response_mask, 0.0))
    unclipped = -ratio * advantages
    clipped = -ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    clip_fraction = masked_mean((clipped > unclipped).float(), response_mask)
    return masked_mean(torch.maximum(unclipped, clipped), response_mask), clip_fraction


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the values, clipped around the rollout's, and the share of tokens where the clip acts.

    As in the PPO of OpenAI's baselines: 0.5 * max((v - R)^2, (clip(v, v_old - e, v_old + e) - R)^2).
    """
    values, returns = (x.masked_fill(~response_mask, 0.0) for x in (values, returns))
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    clip_fraction = masked_mean((clipped > plain).float(), response_mask)
    return 0.5 * masked_mean(torch.maximum(plain, clipped), response_mask), clip_fraction


def entropy(logits: Tensor, response_mask: Tensor) -> Tensor:
    """Mean entropy, in nats, of the token distributions (B, T, V) at response positions."""
    logp = logits.masked_fill(~response_mask.unsqueeze(-1), 0.0).log_softmax(-1)
    return masked_mean(-(logp.exp() * logp).sum(-1), response_mask)


def adapted_kl_coef(kl_coef: float, kl: float, kl_target: float, kl_horizon: int, answers: int) -> float:
    """kl_coef, steered in proportion to how far `kl` (nats per answer) is from kl_target.

    Ziegler et al. 2019, section 2.2, with the error clipped to 20 %.
    """
    error = min(max(kl / kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * answers / kl_horizon)
