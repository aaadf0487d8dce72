"""The mathematics of PPO, as pure functions of tensors. `step.py` tells how they are used.

Shapes: B samples, T response tokens, V vocabulary. `response_mask` (B, T) is True exactly where the policy chose the
token, its end-of-sequence token included; padding and what an environment wrote are False, and what stands there, be
it NaN, has no influence.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

PIECE = {"cpu": 2**17, "cuda": 2**24}  # elements of a tensor as wide as the vocabulary that are worked on at a time
LEAST_LOGP = -60.0  # e^-60 counts for nothing, and is above float32's subnormals, which take a CPU ten times as long
NEVER = -1e4  # below it are tokens that a vocabulary is padded with, by logits of -inf or the lowest number there is


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is True; what stands elsewhere, be it NaN, has no influence."""
    return x.masked_fill(~mask, 0.0).sum() / mask.sum()


def pieces(wide: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of tensors (..., V) as (n, V), of those (...) as (n, 1): few enough at a time for a processor's cache.

    `wide` is (..., V). The pieces are views where the tensors are contiguous. On a CPU a thread takes whole rows of a
    softmax, so there is one for each.
    """
    size = max(torch.get_num_threads(), PIECE.get(wide.device.type, PIECE["cuda"]) // wide.shape[-1])
    columns = [x.reshape(-1, x.shape[-1] if x.dim() == wide.dim() else 1) for x in (wide, *tensors)]
    return zip(*(x.split(size) for x in columns), strict=True)


def by_pieces(function: Callable[..., Tensor], wide: Tensor, *tensors: Tensor) -> Tensor:
    """`function` of such pieces, (n,) each, as (...), without another tensor as wide as the vocabulary in between."""
    return torch.cat([function(*rows) for rows in pieces(wide, *tensors)]).view(wide.shape[:-1])


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) over the last dimension, in float32 at least."""
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(-1)


class ChosenLogprobs(torch.autograd.Function):
    """`chosen_logprobs`. Only the gradient of the logits is as wide as the vocabulary; torch's own operations keep the
    log-probabilities of all tokens besides, in float32, and make ten such tensors."""

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(logits, tokens)
        ctx.temperature = temperature
        return by_pieces(lambda rows, k: log_softmax(rows, temperature).gather(-1, k).squeeze(-1), logits, tokens)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        # The gradient of log softmax at token k, with respect to the logits, is onehot(k) - softmax.
        logits, tokens = ctx.saved_tensors
        result = torch.empty_like(logits, memory_format=torch.contiguous_format)  # to be written piece by piece
        for rows, out, k, given in pieces(logits, result, tokens, grad):
            piece = probabilities(log_softmax(rows, ctx.temperature)).mul_(-given).scatter_add_(-1, k, given)
            torch.div(piece, ctx.temperature, out=out)
        return result, None, None


def chosen_logprobs(logits: Tensor, input_ids: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) of the tokens that were written: (B, T, V), (B, T + 1) -> (B, T).

    In float32 at least. What the model computed after reading input_ids[:, t] is logits[:, t]: it is about the token
    that comes next, input_ids[:, t + 1].
    """
    return ChosenLogprobs.apply(logits, input_ids[:, 1:], temperature)


def probabilities(logp: Tensor) -> Tensor:
    """exp of the log-probabilities (..., V) of all; one below e^-60 counts as that."""
    return logp.clamp(min=LEAST_LOGP).softmax(-1)  # quicker than exp, and the same: they add up to 1


def exact_kl(logits: Tensor, other_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) in nats, each a softmax(logits / temperature) over the vocabulary: (..., V), (..., V) -> (...).

    Never negative, unlike the sampled estimate log p(token) - log q(token), whose mean over truncated samples can be.
    Where p is 0 (logits of -inf), as in a padded vocabulary, nothing is added; where q alone is, it is infinite.
    """

    def of_rows(logits: Tensor, other_logits: Tensor) -> Tensor:
        p, q = log_softmax(logits, temperature), log_softmax(other_logits, temperature)
        # What p never writes adds nothing, whatever q says of it. Left at -inf, 0 * inf would be NaN, its gradient too.
        return (probabilities(p) * (p - q).masked_fill(p < NEVER, 0.0)).sum(-1).clamp(min=0.0)

    return by_pieces(of_rows, logits, other_logits)


def compute_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """Reward per token (B, T): -kl_coef * (logprobs - ref_logprobs) on each, and the score (B,) on the last.

    Ziegler et al. 2019, equation 2 (https://arxiv.org/abs/1909.08593). What was earned is a number: it has no gradient.
    """
    logprobs = logprobs.detach()
    ratios = logprobs - ref_logprobs if kl_coef else torch.zeros_like(logprobs)  # a price of 0 is none, of infinity too
    rewards = (-kl_coef * ratios).masked_fill(~response_mask, 0.0)
    # argmax gives the first of equal maxima, and positions differ: the last token that the policy chose.
    positions = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = (positions * response_mask).argmax(-1)  # (B,)
    return rewards.scatter_add(1, last.unsqueeze(1), scores.to(rewards).unsqueeze(1))


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and returns, both (B, T), zero outside `response_mask`.

    Schulman et al. 2016, equations 11 to 16 (https://arxiv.org/abs/1506.02438). A token's successor is the policy's
    next token: what the environment wrote between them is passed over. After the last one the value is zero. Both are
    targets: they have no gradient.
    """
    rows = []
    for reward, value, chosen in zip(rewards.tolist(), values.tolist(), response_mask.tolist(), strict=True):
        row = [0.0] * len(reward)
        advantage = next_value = 0.0  # of the successor
        for t in reversed(range(len(reward))):  # in plain numbers: tensor operations take ten times as long
            if chosen[t]:
                # delta_t = r_t + gamma V(s_t+1) - V(s_t); A_t = delta_t + gamma lam A_t+1
                delta = reward[t] + gamma * next_value - value[t]
                advantage, next_value = delta + gamma * lam * advantage, value[t]
                row[t] = advantage
        rows.append(row)
    advantages = torch.tensor(rows, dtype=rewards.dtype, device=rewards.device)
    return advantages, torch.where(response_mask, advantages + values.detach(), 0.0)


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
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(~response_mask, 0.0))  # r = new / old probability, (B, T)
    # The larger loss of the two: a clipped ratio has no gradient, so nothing is gained by moving further that way.
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
    # A value is free within cliprange_value of the rollout's; further away only the way back has a gradient.
    near = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    clip_fraction = masked_mean((clipped > plain).float(), response_mask)
    return 0.5 * masked_mean(torch.maximum(plain, clipped), response_mask), clip_fraction


def entropy(logits: Tensor, response_mask: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean entropy, in nats, of softmax(logits / temperature) at response positions; logits (B, T, V)."""

    def of_rows(logits: Tensor, real: Tensor) -> Tensor:
        logp = log_softmax(logits.masked_fill(~real, 0.0), temperature).clamp(min=NEVER)  # 0 log 0 is 0, and no NaN
        return -(probabilities(logp) * logp).sum(-1)

    return masked_mean(by_pieces(of_rows, logits, response_mask), response_mask)


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
    """PPO's loss and its parts, each a mean over the response tokens; all but logits (B, T, V) is (B, T).

    loss = policy_loss + vf_coef * value_loss - entropy_coef * entropy (Schulman et al. 2017, equation 9). logprobs,
    values and logits are the present policy's, with their graph; old_logprobs and old_values were kept at the rollout.
    `config` has cliprange, cliprange_value, vf_coef, entropy_coef and temperature. Without an entropy bonus the entropy
    is measured alone.
    """
    pg_loss, clip_fraction = policy_loss(logprobs, old_logprobs, advantages, response_mask, config.cliprange)
    vf_loss, _ = value_loss(values, old_values, returns, response_mask, config.cliprange_value)
    mean_entropy = entropy(logits if config.entropy_coef else logits.detach(), response_mask, config.temperature)
    loss = pg_loss
    if config.vf_coef:  # times 0, a metric that is not finite would still decide the step
        loss = loss + config.vf_coef * vf_loss
    if config.entropy_coef:
        loss = loss - config.entropy_coef * mean_entropy
    parts = {"loss": loss, "policy_loss": pg_loss, "value_loss": vf_loss, "entropy": mean_entropy}
    return parts | {"clip_fraction": clip_fraction}


def minibatch_update(
    gradients: Callable[[], dict[str, Any]], optimizer: torch.optim.Optimizer, max_grad_norm: float
) -> dict[str, Any]:
    """One optimizer step on one minibatch; returns its losses, and `grad_norm`, the gradient's norm before clipping.

    `gradients()` runs the policy on the minibatch and returns the losses. It adds their gradient to what stands in the
    parameters' `grad`. The norm is that of the gradients of all parameters together (Pascanu et al. 2013, section 3.2,
    https://arxiv.org/abs/1211.5063).
    """
    optimizer.zero_grad()
    losses = gradients()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    optimizer.step()
    return losses | {"grad_norm": grad_norm}


def adapted_kl_coef(kl_coef: float, kl: float, kl_target: float, kl_horizon: int, answers: int) -> float:
    """kl_coef, steered in proportion to how far `kl` (nats per answer) is from kl_target.

    Ziegler et al. 2019, section 2.2, with the error clipped to 20 %.
    """
    error = min(max(kl / kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * answers / kl_horizon)


def group_advantages(scores: "Tensor", group_size: int, normalize: bool) -> "Tensor":
    """GRPO's advantages (B,): scores (B,) less the mean of their group, `group_size` neighbours; 0 where all are equal.

    Shao et al. 2024, section 4.1 (https://arxiv.org/abs/2402.03300). `normalize` divides by the group's standard
    deviation, as there; without it easy and hard prompts keep their weight (Liu et al. 2025,
    https://arxiv.org/abs/2503.20783). Raises ValueError if the scores are not whole groups of at least 2.
    """
    if group_size < 2 or len(scores) % group_size:
        raise ValueError(f"{len(scores)} scores are not whole groups of group_size={group_size}, at least 2")
    groups = scores.view(-1, group_size)
    advantages = groups - groups.mean(-1, keepdim=True)
    if normalize:
        advantages = advantages / (groups.std(-1, keepdim=True) + 1e-4)
    equal = (groups == groups[:, :1]).all(-1, keepdim=True)
    return advantages.masked_fill(equal, 0.0).flatten()
