"""Exercise 4, in parts, and its mistakes: compute_rewards, gae."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from exercises.mistakes import cleaned, mistake, same
from lora_ppo import ppo


def last_chosen(mask: Tensor) -> Tensor:
    """(B,): the last column that is True."""
    return (torch.arange(mask.shape[1]) * mask).argmax(-1)


def at(columns: Callable[[Tensor], Tensor]) -> Callable:
    """Puts the scores (B,) into these columns (B,)."""
    return lambda rewards, scores, mask: rewards.scatter_add(1, columns(mask).unsqueeze(1), scores.unsqueeze(1))


at_the_last = at(last_chosen)


def compute_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    response_mask: Tensor,
    kl_coef: float,
    *,
    sign: float = -1.0,
    price: Callable = same,
    estimate: Callable = lambda new, ref: new - ref,
    clean: Callable = lambda x, mask: x.masked_fill(~mask, 0.0),
    place: Callable = at_the_last,
    finish: Callable = torch.detach,
) -> Tensor:
    penalties = sign * price(kl_coef) * estimate(logprobs, ref_logprobs)
    return finish(place(clean(penalties, response_mask), scores, response_mask))


def overwrite(rewards: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
    return rewards.scatter(1, last_chosen(mask).unsqueeze(1), scores.unsqueeze(1))


COMPUTE_REWARDS = (
    mistake("The sign of the penalty: moving away from the reference is paid for, not rewarded.", sign=1.0),
    mistake("The penalty is forgotten.", price=lambda kl_coef: 0.0),
    mistake("kl_coef is forgotten: the penalty is taken whole.", price=lambda kl_coef: 1.0),
    mistake("logprobs in place of the log-ratio: the reference's are not subtracted.", estimate=lambda new, ref: new),
    mistake(
        "The penalty is squared: a token that the policy likes less than the reference is paid for, too.",
        estimate=lambda new, ref: (new - ref) ** 2,
    ),
    mistake(
        "The penalty is the absolute difference: the log-ratio has a sign.", estimate=lambda new, ref: (new - ref).abs()
    ),
    mistake("The ratio, through exp: the penalty is the log-ratio.", estimate=lambda new, ref: (new - ref).exp()),
    mistake(
        "The score at every token: it comes once, with the last.", place=lambda r, s, mask: r + s.unsqueeze(1) * mask
    ),
    mistake(
        "The score is spread over the tokens: it comes once, with the last.",
        place=lambda r, s, mask: r + s.unsqueeze(1) * mask / mask.sum(-1, keepdim=True),
    ),
    mistake(
        "The score in the last column, which is padding where an answer is short.",
        place=at(lambda mask: torch.full((len(mask),), mask.shape[1] - 1)),
    ),
    mistake("The score at the first token.", place=at(lambda mask: mask.int().argmax(-1))),
    mistake(
        "The score at column mask.sum() - 1: with environment text inside the answer that is not its last token.",
        place=at(lambda mask: (mask.sum(-1) - 1).clamp(min=0)),
    ),
    mistake(
        "The score before the first gap: the last token is the last one that is True.",
        place=at(lambda mask: mask.int().cumprod(-1).sum(-1).sub(1).clamp(min=0)),
    ),
    mistake("The score one past the end.", place=at(lambda mask: (last_chosen(mask) + 1).clamp(max=mask.shape[1] - 1))),
    mistake("The score overwrites the last token's penalty: it is added.", place=overwrite),
    mistake("The score is forgotten.", place=lambda r, s, mask: r),
    mistake(
        "The whole penalty at the last token: each token pays its own.",
        clean=lambda x, mask: overwrite(torch.zeros_like(x), x.masked_fill(~mask, 0.0).sum(-1), mask),
    ),
    mistake("The mask is ignored: padding and environment text pay a penalty, too.", clean=lambda x, mask: x),
    mistake("A gradient flows through the rewards: detach them. What was earned is a number.", finish=same),
)


def chosen(row: Tensor) -> list[int]:
    """The policy's tokens, by their columns."""
    return row.nonzero().flatten().tolist()


def every_column(row: Tensor) -> list[int]:
    return list(range(len(row)))


def successors(values: Tensor, where: list[int]) -> list[Any]:
    """The value of each token's successor, the policy's next token; 0 after the last."""
    return [*(values[i] for i in where[1:]), 0.0][: len(where)]


def next_columns(values: Tensor, where: list[int]) -> list[Any]:
    return [values[i + 1] if i + 1 < len(values) and i != where[-1] else 0.0 for i in where]


def backwards(deltas: list[Tensor], where: list[int], decay: float) -> list[Tensor]:
    """A_t = delta_t + decay A_t+1."""
    found, advantage = [], 0.0
    for delta in reversed(deltas):
        advantage = delta + decay * advantage
        found.append(advantage)
    return found[::-1]


def forwards(deltas: list[Tensor], where: list[int], decay: float) -> list[Tensor]:
    return backwards(deltas[::-1], where, decay)[::-1]


def cut_at_gaps(deltas: list[Tensor], where: list[int], decay: float) -> list[Tensor]:
    found = list(deltas)
    for i in reversed(range(len(where) - 1)):
        found[i] = deltas[i] + (decay * found[i + 1] if where[i + 1] == where[i] + 1 else 0.0)
    return found


def decay_in_gaps(deltas: list[Tensor], where: list[int], decay: float) -> list[Tensor]:
    found = list(deltas)
    for i in reversed(range(len(where) - 1)):
        found[i] = deltas[i] + decay ** (where[i + 1] - where[i]) * found[i + 1]
    return found


def gae(
    rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float,
    lam: float,
    *,
    clean: Callable = lambda values, mask: values,
    steps: Callable = chosen,
    following: Callable = successors,
    discount: Callable = same,
    delta: Callable = lambda r, v, following, gamma: r + gamma * following - v,
    decay: Callable = lambda gamma, lam: gamma * lam,
    accumulate: Callable = backwards,
    advantage: Callable = lambda a, v: a,
    target: Callable = lambda a, v, r, following, gamma: a + v,
    white: Callable = lambda x, mask: x,
    tidy: Callable = lambda x, mask: x,
    swap: bool = False,
    finish: Callable = torch.detach,
) -> tuple[Tensor, Tensor]:
    values, advantages, returns = clean(values, response_mask), torch.zeros_like(rewards), torch.zeros_like(rewards)
    for b, row in enumerate(response_mask):
        where = steps(row)
        nexts = following(values[b], where)
        deltas = [delta(rewards[b, i], values[b, i], n, discount(gamma)) for i, n in zip(where, nexts, strict=True)]
        for i, n, a in zip(where, nexts, accumulate(deltas, where, decay(gamma, lam)), strict=True):
            advantages[b, i] = advantage(a, values[b, i])
            returns[b, i] = target(a, values[b, i], rewards[b, i], n, gamma)
    result = finish(tidy(white(advantages, response_mask), response_mask)), finish(tidy(returns, response_mask))
    return result[::-1] if swap else result


GAE = (
    mistake("lambda is forgotten: the sum decays by gamma alone.", decay=lambda gamma, lam: gamma),
    mistake("gamma is forgotten in the sum: it decays by gamma times lambda.", decay=lambda gamma, lam: lam),
    mistake("gamma is forgotten in delta: the successor's value is discounted.", discount=lambda gamma: 1.0),
    mistake("gamma is forgotten everywhere.", decay=lambda gamma, lam: lam, discount=lambda gamma: 1.0),
    mistake(
        "Not bootstrapped: delta is r - V(s), without the successor's value.",
        following=lambda v, where: [0.0] * len(where),
    ),
    mistake(
        "Bootstrapped past the end: the last token's successor gets its own value; after the end it is 0.",
        following=lambda v, where: [v[i] for i in [*where[1:], *where[-1:]]],
    ),
    mistake(
        "Bootstrapped past the end: the value in the padding after the last token is used; it is 0.",
        following=lambda v, where: [v[i] if i < len(v) else 0.0 for i in [*where[1:], *(i + 1 for i in where[-1:])]],
    ),
    mistake(
        "The next column's value is taken. After the last token it is 0, at a gap that of the policy's next token.",
        following=lambda v, where: [v[i + 1] if i + 1 < len(v) else 0.0 for i in where],
    ),
    mistake(
        "Forward: a token's successor is then the one before it. Begin with the last token.",
        following=lambda v, where: [0.0, *(v[i] for i in where)][: len(where)],
        accumulate=forwards,
    ),
    mistake("In reverse order: a token is credited with what came before it, not after.", accumulate=forwards),
    mistake("Not summed: these are the deltas, GAE with lambda 0.", accumulate=lambda deltas, where, decay: deltas),
    mistake(
        "The mask is ignored: padding and environment text are steps like any other.",
        steps=every_column,
    ),
    mistake(
        "The mask acts on the results alone: padding and environment text are steps like any other.",
        steps=every_column,
        tidy=cleaned,
    ),
    mistake(
        "Environment text is taken for a step of value 0. It is none: the successor is the policy's next token.",
        steps=every_column,
        clean=cleaned,
        tidy=cleaned,
    ),
    mistake(
        "Environment text is taken for a step of value 0, and outside the mask the results are not 0.",
        steps=every_column,
        clean=cleaned,
    ),
    mistake(
        "At a gap the successor is taken to be the environment's text: it is the policy's next token.",
        following=next_columns,
    ),
    mistake(
        "At a gap the sum starts anew: what comes after the environment's text is not credited to what came before.",
        accumulate=cut_at_gaps,
    ),
    mistake(
        "At a gap the sum starts anew, and the value there counts as 0, as if the answer ended.",
        accumulate=cut_at_gaps,
        following=lambda v, where: [v[i + 1] if i + 1 in where else 0.0 for i in where],
    ),
    mistake("Every column of a gap discounts: the environment's text takes no step.", accumulate=decay_in_gaps),
    mistake(
        "No baseline: V(s) is not subtracted in delta.", delta=lambda r, v, following, gamma: r + gamma * following
    ),
    mistake(
        "The values' signs are swapped: delta is r + gamma V(s') - V(s).",
        delta=lambda r, v, following, gamma: r - gamma * following + v,
    ),
    mistake(
        "delta is V(s) - r - gamma V(s'): its sign is wrong.",
        delta=lambda r, v, following, gamma: v - r - gamma * following,
    ),
    mistake("Returns for advantages: V(s) is added to the first result, too.", advantage=lambda a, v: a + v),
    mistake("The returns are the advantages: V(s) is not added.", target=lambda a, v, r, following, gamma: a),
    mistake("The returns are advantages - values: they are added.", target=lambda a, v, r, following, gamma: a - v),
    mistake(
        "The returns are r + gamma V(s'), one step's: advantages + values are wanted.",
        target=lambda a, v, r, following, gamma: r + gamma * following,
    ),
    mistake("Advantages and returns are swapped.", swap=True),
    mistake("The advantages are whitened in here: that is done after, and not in small batches.", white=ppo.whiten),
    mistake(
        "The advantages are whitened in here, by std(): that is done after, and not in small batches.",
        white=lambda x, mask: cleaned((x - x[mask].mean()) / x[mask].std(), mask),
    ),
    mistake("Values are not detached: a gradient flows through the targets.", finish=same),
)
