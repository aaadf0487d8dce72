"""The mathematics of PPO, as pure functions of tensors. `lora_ppo_demo.py` tells how they are used.

Shapes: B samples, T response tokens, V vocabulary. `response_mask` (B, T) is True exactly where the policy chose the
token, its end-of-sequence token included; padding and what an environment wrote are False, and what stands there, be
it NaN, has no influence.
"""

from collections.abc import Callable

import torch
from torch import Tensor

PIECE = {"cpu": 2**18, "cuda": 2**26}  # elements of a tensor as wide as the vocabulary that are worked on at a time
LEAST_LOGP = -60.0  # e^-60 counts for nothing, and is above float32's subnormals, which take a CPU ten times as long


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is True; what stands elsewhere, be it NaN, has no influence."""
    return x.masked_fill(~mask, 0.0).sum() / mask.sum()


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """The rows of `x` (..., V), a few at a time, as views (n, V): few enough for a processor's cache."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.split(max(1, PIECE.get(x.device.type, PIECE["cuda"]) // x.shape[-1]))


def by_pieces(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of the rows of tensors (..., V), as (...), without another tensor of that size in between."""
    results = [function(*rows) for rows in zip(*map(pieces, tensors), strict=True)]
    return torch.cat(results).view(tensors[0].shape[:-1])


class ChosenLogprobs(torch.autograd.Function):
    """Log-probabilities of the chosen `tokens` (...) under softmax(logits / temperature), and those of all: (..., V).

    Both in float32 at least. Forward and backward make one tensor as wide as the vocabulary each; torch's own
    operations make ten.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logp = torch.empty(logits.shape, dtype=dtype, device=logits.device)
        for rows, result in zip(pieces(logits), pieces(logp), strict=True):
            torch.log_softmax(rows.to(dtype) / temperature, -1, out=result)
        tokens = tokens.unsqueeze(-1)
        ctx.save_for_backward(logp, tokens)
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return logp.gather(-1, tokens).squeeze(-1), logp

    @staticmethod
    def backward(ctx, chosen_grad: Tensor | None, grad: Tensor | None) -> tuple[Tensor, None, None]:
        # The gradient of log softmax at token k, with respect to the logits, is onehot(k) - softmax.
        logp, tokens = ctx.saved_tensors
        result = torch.empty(logp.shape, dtype=ctx.dtype, device=logp.device)
        chosen_grad = torch.zeros_like(logp[..., 0]) if chosen_grad is None else chosen_grad
        weight = chosen_grad if grad is None else chosen_grad + grad.sum(-1)
        split = pieces(logp)
        columns = [x.reshape(-1, 1).split(len(split[0])) for x in (tokens, chosen_grad, weight)]
        more = [None] * len(split) if grad is None else pieces(grad)
        for rows, out, k, chosen, all_of_row, given in zip(split, pieces(result), *columns, more, strict=True):
            piece = probabilities(rows).mul_(-all_of_row).scatter_add_(-1, k, chosen)
            if given is not None:
                piece += given
            torch.div(piece, ctx.temperature, out=out)
        return result, None, None


def chosen_logprobs(logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(B, T, V), (B, T) -> log softmax(logits / temperature): of the tokens (B, T), and of all (B, T, V)."""
    return ChosenLogprobs.apply(logits, tokens, temperature)


def probabilities(logp: Tensor) -> Tensor:
    """exp of log-probabilities; one below e^-60 counts as that."""
    return logp.clamp(min=LEAST_LOGP).exp_()


def exact_kl(logp: Tensor, other_logp: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities log p, log q, summed over the vocabulary: (..., V), (..., V) -> (...), in nats.

    Never negative, unlike the sampled estimate log p(token) - log q(token), whose mean over truncated samples can be.
    """
    return by_pieces(lambda p, q: (probabilities(p) * (p - q)).sum(-1).clamp(min=0.0), logp, other_logp)


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
    rows = []
    for reward, value, chosen in zip(rewards.tolist(), values.tolist(), response_mask.tolist(), strict=True):
        row = [0.0] * len(reward)
        advantage = next_value = 0.0  # of the successor
        for t in reversed(range(len(reward))):  # in plain numbers: tensor operations take ten times as long
            if chosen[t]:
                delta = reward[t] + gamma * next_value - value[t]
                advantage, next_value = delta + gamma * lam * advantage, value[t]
                row[t] = advantage
        rows.append(row)
    advantages = torch.tensor(rows, dtype=rewards.dtype, device=rewards.device)
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

    def of_rows(logits: Tensor, real: Tensor) -> Tensor:
        logp = logits.masked_fill(~real, 0.0).log_softmax(-1)
        return -(probabilities(logp) * logp).sum(-1)

    return masked_mean(by_pieces(of_rows, logits, response_mask.unsqueeze(-1).expand_as(logits)), response_mask)


def adapted_kl_coef(kl_coef: float, kl: float, kl_target: float, kl_horizon: int, answers: int) -> float:
    """kl_coef, steered in proportion to how far `kl` (nats per answer) is from kl_target.

    Ziegler et al. 2019, section 2.2, with the error clipped to 20 %.
    """
    error = min(max(kl / kl_target - 1.0, -0.2), 0.2)
    return kl_coef * (1.0 + error * answers / kl_horizon)
