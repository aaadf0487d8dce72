"""Exercises 0 to 3, in parts, and their mistakes: chosen_logprobs, policy_loss, value_loss, entropy."""

from collections.abc import Callable

import torch
from torch import Tensor

from exercises.mistakes import DETACHED, MEANS, cleaned, mistake, same, summed, unmasked
from lora_ppo import ppo


def chosen_logprobs(
    logits: Tensor,
    input_ids: Tensor,
    temperature: float,
    *,
    read: Callable = lambda x: x.float(),
    shift: Callable = lambda ids: ids[:, 1:],
    scale: Callable = lambda x, temperature: x / temperature,
    normalize: Callable = lambda x: x.log_softmax(-1),
    pick: Callable = lambda x, ids: x.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
    finish: Callable = same,
) -> Tensor:
    return finish(pick(normalize(scale(read(logits), temperature)), shift(input_ids)))


CHOSEN_LOGPROBS = (
    mistake(
        "Not shifted: logits[:, t] is about input_ids[:, t + 1], and you look up input_ids[:, t], which was just read.",
        shift=lambda ids: ids[:, :-1],
    ),
    mistake("Shifted by two: the token after the next is looked up.", shift=lambda ids: torch.roll(ids, -2, 1)[:, :-1]),
    mistake(
        "Shifted the other way: logits[:, t] is matched with the token before the one that was just read.",
        shift=lambda ids: torch.roll(ids, 1, 1)[:, :-1],
    ),
    mistake(
        "Shifted once too often: the last logits are cut off, and with them the last token.",
        read=lambda x: x[:, :-1].float(),
        shift=lambda ids: ids[:, 1:-1],
    ),
    mistake(
        "Shifted on the wrong side: the first logits are cut off, those that are about the first token.",
        read=lambda x: x[:, 1:].float(),
        shift=lambda ids: ids[:, 2:],
    ),
    mistake("The temperature is forgotten.", scale=lambda x, temperature: x),
    mistake("Multiplied by the temperature: softmax(logits / temperature) divides.", scale=lambda x, t: x * t),
    mistake("No logarithm: these are the probabilities.", finish=lambda x: x.exp()),
    mistake("The sign: this is the cross-entropy, -log p.", finish=lambda x: -x),
    mistake("The logits themselves, not normalized: log_softmax is missing.", normalize=same),
    mistake(
        "Softmax over the positions: it goes over the vocabulary, the last dimension.",
        normalize=lambda x: x.log_softmax(1),
    ),
    mistake(
        "log(softmax(x)) underflows to -inf for unlikely tokens: log_softmax does not.",
        normalize=lambda x: x.softmax(-1).log(),
    ),
    mistake("The most likely token is looked up, not the one that was chosen.", pick=lambda x, ids: x.max(-1).values),
    mistake("Averaged over the vocabulary, not looked up.", pick=lambda x, ids: x.mean(-1)),
    mistake("Half precision is kept: make the logits float32 before the softmax.", read=same),
    mistake("Summed over the answer: a log-probability for each token is wanted.", finish=lambda x: x.sum(-1)),
    mistake("In bits: divided by log 2.", finish=lambda x: x / torch.tensor(2.0).log()),
    mistake(DETACHED + " The new log-probabilities need one; only the old ones have none.", finish=torch.detach),
)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cliprange: float,
    *,
    weigh: Callable = lambda a, mask: a,
    compare: Callable = lambda new, old: new - old,
    clean: Callable = cleaned,
    spread: Callable = lambda d, mask: d,
    ratio: Callable = torch.exp,
    clip: Callable = lambda r, e: r.clamp(1 - e, 1 + e),
    sign: float = -1.0,
    pick: Callable = torch.maximum,
    mean: Callable = ppo.masked_mean,
    share: Callable = lambda plain, clipped, r, e, mask: ppo.masked_mean((clipped > plain).float(), mask),
    finish: Callable = same,
) -> tuple[Tensor, Tensor]:
    mask, advantages = response_mask, weigh(advantages, response_mask)
    r = ratio(spread(clean(compare(logprobs, old_logprobs), mask), mask))
    plain, clipped = sign * r * advantages, sign * clip(r, cliprange) * advantages
    return finish(mean(pick(plain, clipped), mask)), share(plain, clipped, r, cliprange, mask)


def one_sided(plain: Tensor, clipped: Tensor, r: Tensor, e: float, mask: Tensor) -> Tensor:
    return ppo.masked_mean(((r - 1).abs() > e).float(), mask)


POLICY_LOSS = (
    mistake(
        "The sign: this is the objective, which grows. A loss is minimized: put a minus before it.", finish=torch.neg
    ),
    mistake("The minus is missing before the ratio: with max, that is the wrong bound of the wrong thing.", sign=1.0),
    mistake(
        "min for max: of two losses, which have the minus, PPO takes the larger (of objectives the smaller).",
        pick=torch.minimum,
    ),
    mistake("The ratio is inverted: old / new, where new / old is wanted.", compare=lambda new, old: old - new),
    mistake(
        "The ratio is detached, and the loss has no gradient: only old_logprobs come without one.",
        compare=lambda new, old: new.detach() - old,
    ),
    mistake("No exp: a difference of log-probabilities is the logarithm of the ratio.", ratio=same),
    mistake(
        "The ratio of log-probabilities: new / old. Their difference, through exp, is the ratio.",
        compare=lambda new, old: new / old,
        ratio=same,
    ),
    mistake("1 + log ratio in place of the ratio: the same near 1, and wrong far from it.", ratio=lambda d: 1 + d),
    mistake("No clip: far from the old policy the ratio still has a gradient.", clip=lambda r, e: r),
    mistake(
        "The clipped ratio alone: without the max, what went too far the wrong way has no gradient back.",
        pick=lambda plain, clipped: clipped,
    ),
    mistake("Clipped above only: 1 - cliprange is missing.", clip=lambda r, e: r.clamp(max=1 + e)),
    mistake("Clipped below only: 1 + cliprange is missing.", clip=lambda r, e: r.clamp(min=1 - e)),
    mistake("Clipped to -cliprange ... cliprange: the ratio lives around 1.", clip=lambda r, e: r.clamp(-e, e)),
    mistake("The log ratio is clipped, not the ratio.", clip=lambda r, e: r.log().clamp(-e, e).exp()),
    mistake(
        "The mean of the two losses, where the larger is wanted.", pick=lambda plain, clipped: (plain + clipped) / 2
    ),
    mistake(
        "This is REINFORCE: -logprobs * advantages, without the ratio to the old policy.",
        compare=lambda new, old: new,
        ratio=same,
        clip=lambda r, e: r,
    ),
    mistake("The old log-probabilities are left out: the ratio is exp(logprobs).", compare=lambda new, old: new),
    mistake(
        "The old log-probabilities are not used: with logprobs.detach() in their place the ratio is always 1.",
        compare=lambda new, old: new - new.detach(),
    ),
    mistake(
        "One ratio for the whole sequence: PPO has a ratio for each token.",
        spread=lambda d, mask: d.sum(-1, keepdim=True).expand_as(d),
    ),
    mistake("The advantages lose their sign.", weigh=lambda a, mask: a.abs()),
    mistake(
        "The advantages are whitened in here: that is done before, and not in small batches.",
        weigh=lambda a, mask: ppo.whiten(a, mask) if mask.sum() > 1 else a * 0.0,
    ),
    *MEANS,
    mistake("The mask is left out of the mean: the advantages in the padding are averaged, too.", mean=unmasked),
    mistake(
        "clip_fraction counts every ratio outside the range, also where no clip is active: compare the two losses.",
        share=one_sided,
    ),
    mistake(
        "clip_fraction ignores the mask.", share=lambda plain, clipped, r, e, mask: (clipped > plain).float().mean()
    ),
    mistake(
        "clip_fraction counts places where the two losses are equal: there nothing is clipped. It is > and not >=.",
        share=lambda plain, clipped, r, e, mask: ppo.masked_mean((clipped >= plain).float(), mask),
    ),
    mistake(
        "clip_fraction counts places where the two losses are equal, as in the padding, too. It is > and not >=.",
        share=lambda plain, clipped, r, e, mask: (clipped >= plain).float().sum() / mask.sum(),
    ),
    mistake(
        "clip_fraction is a count, not a share.",
        share=lambda plain, clipped, r, e, mask: summed((clipped > plain).float(), mask),
    ),
    mistake(
        "clip_fraction is the share that is not clipped.",
        share=lambda plain, clipped, r, e, mask: ppo.masked_mean((clipped <= plain).float(), mask),
    ),
)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    *,
    clean: Callable = cleaned,
    trained: Callable = same,
    target: Callable = lambda returns, old: returns,
    clip: Callable = lambda v, old, target, e: torch.clamp(v, old - e, old + e),
    error: Callable = torch.square,
    pick: Callable = torch.maximum,
    half: float = 0.5,
    mean: Callable = ppo.masked_mean,
    share: Callable = lambda plain, clipped, v, old, e, mask: ppo.masked_mean((clipped > plain).float(), mask),
    finish: Callable = same,
) -> tuple[Tensor, Tensor]:
    mask = response_mask
    values, old, returns = (clean(x, mask) for x in (values, old_values, returns))
    values, goal = trained(values), target(returns, old)
    plain, clipped = error(values - goal), error(clip(values, old, goal, cliprange_value) - goal)
    return finish(half * mean(pick(plain, clipped), mask)), share(plain, clipped, values, old, cliprange_value, mask)


VALUE_LOSS = (
    mistake("The factor 0.5 is missing.", half=1.0),
    mistake("The sign: the error is to become smaller.", half=-0.5),
    mistake("No clip: a value may move as far as it likes from the rollout's.", clip=lambda v, old, target, e: v),
    mistake(
        "The clipped value alone: once it is out of range, nothing pulls it back.", pick=lambda plain, clipped: clipped
    ),
    mistake("min for max: of the two errors the larger counts.", pick=torch.minimum),
    mistake("The mean of the two errors, where the larger counts.", pick=lambda plain, clipped: (plain + clipped) / 2),
    mistake("The absolute error, not its square.", error=torch.abs),
    mistake("The error itself, not its square: wrong either way cancels out.", error=same),
    mistake(
        "Clipped to -cliprange_value ... cliprange_value: the range lies around the old values.",
        clip=lambda v, old, target, e: v.clamp(-e, e),
    ),
    mistake(
        "Clipped as a ratio, old values times 1 - e ... 1 + e: values are not probabilities.",
        clip=lambda v, old, target, e: torch.minimum(torch.maximum(v, old * (1 - e)), old * (1 + e)),
    ),
    mistake("Clipped above only.", clip=lambda v, old, target, e: torch.minimum(v, old + e)),
    mistake("Clipped below only.", clip=lambda v, old, target, e: torch.maximum(v, old - e)),
    mistake("The target is the old value: it is the return.", target=lambda returns, old: old),
    mistake(
        "The target is return - old value, the advantage: it is the return.", target=lambda returns, old: returns - old
    ),
    mistake("Values are detached: nothing is learned.", trained=torch.detach),
    *MEANS,
    mistake(
        "clip_fraction counts every value outside the range, also where the clip is not active.",
        share=lambda plain, clipped, v, old, e, mask: ppo.masked_mean(((v - old).abs() > e).float(), mask),
    ),
    mistake(
        "clip_fraction ignores the mask.",
        share=lambda plain, clipped, v, old, e, mask: (clipped > plain).float().mean(),
    ),
    mistake(
        "clip_fraction counts places where the two errors are equal: there nothing is clipped. It is > and not >=.",
        share=lambda plain, clipped, v, old, e, mask: ppo.masked_mean((clipped >= plain).float(), mask),
    ),
    mistake(
        "clip_fraction counts places where the two errors are equal, as in the padding, too. It is > and not >=.",
        share=lambda plain, clipped, v, old, e, mask: (clipped >= plain).float().sum() / mask.sum(),
    ),
)


def entropy(
    logits: Tensor,
    response_mask: Tensor,
    temperature: float,
    *,
    clean: Callable = cleaned,
    scale: Callable = lambda x, temperature: x / temperature,
    normalize: Callable = lambda x: x.log_softmax(-1),
    weigh: Callable = lambda logp: logp.exp(),
    surprise: Callable = torch.neg,
    gather: Callable = lambda x: x.sum(-1),
    mean: Callable = ppo.masked_mean,
    finish: Callable = same,
) -> Tensor:
    logp = normalize(scale(clean(logits.float(), response_mask), temperature))
    return finish(mean(gather(weigh(logp) * surprise(logp)), response_mask))


ENTROPY = (
    mistake("The sign: entropy is never negative.", finish=torch.neg),
    mistake(
        "In bits: the logarithm is the natural one, and the unit nats.", finish=lambda x: x / torch.tensor(2.0).log()
    ),
    mistake(DETACHED + " A bonus without a gradient does nothing.", finish=torch.detach),
    mistake("p (1 - p) in place of -p log p: that is the Gini impurity.", surprise=lambda logp: 1 - logp.exp()),
    mistake("A mean over the vocabulary: the expectation is a sum.", gather=lambda x: x.mean(-1)),
    mistake("-log p is not weighed by p: an expectation weighs.", weigh=torch.ones_like),
    mistake(
        "p is detached: of its gradient nothing is left, since p times the gradient of log p adds up to 0.",
        weigh=lambda logp: logp.exp().detach(),
    ),
    mistake("The largest term only, not the sum over the vocabulary.", gather=lambda x: x.max(-1).values),
    mistake(
        "The surprise of the most likely token: entropy sums over all tokens.",
        weigh=torch.ones_like,
        gather=lambda x: x.min(-1).values,
    ),
    mistake("The temperature is forgotten.", scale=lambda x, temperature: x),
    mistake("Multiplied by the temperature: softmax(logits / temperature) divides.", scale=lambda x, t: x * t),
    mistake(
        "Softmax over the positions: it goes over the vocabulary, the last dimension.",
        normalize=lambda x: x.log_softmax(1),
    ),
    mistake(
        "0 times log 0 is NaN: log(softmax(x)) underflows where log_softmax does not.",
        normalize=lambda x: x.softmax(-1).log(),
        weigh=lambda logp: logp.exp(),
    ),
    mistake("The logits are taken for log-probabilities: log_softmax is missing.", normalize=same),
    mistake("exp of the entropy: that is the perplexity.", finish=torch.exp),
    mistake(
        "Divided by log V, the largest entropy there is: nats are wanted.",
        gather=lambda x: x.sum(-1) / torch.tensor(float(x.shape[-1])).log(),
    ),
    *MEANS,
    mistake("Padding is averaged, too: logits that are filled with 0 have the entropy log V.", mean=unmasked),
)
