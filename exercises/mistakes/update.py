"""Exercise 5, in parts, and its mistakes: ppo_losses, minibatch_update."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from exercises.mistakes import mistake, same
from lora_ppo import ppo


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
    *,
    policy: Callable = lambda pi, new, old: pi(new, old),
    old: Callable = lambda old, new: old,
    around: Callable = lambda old, new: old,
    trained: Callable = same,
    credit: Callable = lambda advantages, returns: advantages,
    goal: Callable = lambda advantages, returns: returns,
    ranges: Callable = lambda config: (config.cliprange, config.cliprange_value),
    heat: Callable = lambda config: config.temperature,
    bonus: Callable = same,
    share: Callable = lambda policy, value: policy,
    weigh: Callable = lambda pg, vf, ent, config: pg + config.vf_coef * vf - config.entropy_coef * ent,
) -> dict[str, Tensor]:
    mask, (e, e_value) = response_mask, ranges(config)
    pg, clip_fraction = ppo.policy_loss(logprobs, old(old_logprobs, logprobs), credit(advantages, returns), mask, e)
    target = goal(advantages, returns)
    vf, of_values = ppo.value_loss(trained(values), around(old_values, values), target, mask, e_value)
    ent = bonus(ppo.entropy(logits, mask, heat(config)))
    loss = weigh(pg, vf, ent, config)
    fraction = share(clip_fraction, of_values)
    return {"loss": loss, "policy_loss": pg, "value_loss": vf, "entropy": ent, "clip_fraction": fraction}


PPO_LOSSES = (
    mistake(
        "The old log-probabilities are recomputed: the ratio is always 1. Use those of the rollout.",
        old=lambda old, new: new.detach(),
    ),
    mistake(
        "The values are clipped around themselves: the range lies around the rollout's.",
        around=lambda old, new: new.detach(),
    ),
    mistake(
        "The entropy bonus is added: a loss is minimized, so a bonus is subtracted.",
        weigh=lambda pg, vf, ent, c: pg + c.vf_coef * vf + c.entropy_coef * ent,
    ),
    mistake("The entropy bonus is forgotten.", weigh=lambda pg, vf, ent, c: pg + c.vf_coef * vf),
    mistake("The entropy bonus has no gradient: it is detached.", bonus=torch.detach),
    mistake(
        "entropy_coef is forgotten: the entropy counts whole.", weigh=lambda pg, vf, ent, c: pg + c.vf_coef * vf - ent
    ),
    mistake(
        "vf_coef is forgotten: the value loss counts whole.",
        weigh=lambda pg, vf, ent, c: pg + vf - c.entropy_coef * ent,
    ),
    mistake(
        "The value loss is forgotten: the value head learns nothing.",
        weigh=lambda pg, vf, ent, c: pg - c.entropy_coef * ent,
    ),
    mistake(
        "The value loss is subtracted: errors are to become smaller.",
        weigh=lambda pg, vf, ent, c: pg - c.vf_coef * vf - c.entropy_coef * ent,
    ),
    mistake("The value loss has no gradient: values are detached.", trained=torch.detach),
    mistake(
        "vf_coef weighs the policy loss: it weighs the value loss.",
        weigh=lambda pg, vf, ent, c: c.vf_coef * pg + vf - c.entropy_coef * ent,
    ),
    mistake(
        "Returns for advantages: the policy is credited without a baseline.", credit=lambda advantages, returns: returns
    ),
    mistake(
        "Advantages for returns: the value head learns the wrong target.", goal=lambda advantages, returns: advantages
    ),
    mistake("cliprange and cliprange_value are swapped.", ranges=lambda c: (c.cliprange_value, c.cliprange)),
    mistake("clip_fraction is the value loss's: the policy loss's is wanted.", share=lambda policy, value: value),
    mistake("The temperature of the entropy is forgotten.", heat=lambda c: 1.0),
    mistake("The policy loss is forgotten.", weigh=lambda pg, vf, ent, c: c.vf_coef * vf - c.entropy_coef * ent),
)


def minibatch_update(
    gradients: Callable[[], dict[str, Any]],
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float,
    *,
    order: tuple[str, ...] = ("zero", "gradients", "clip", "step"),
    clip: Callable = clip_grad_norm_,
    told: Callable = lambda before, after: before,
) -> dict[str, Any]:
    parameters, losses, norms = (
        [p for group in optimizer.param_groups for p in group["params"]],
        {},
        [torch.tensor(0.0)] * 2,
    )
    for what in order:
        if what == "zero":
            optimizer.zero_grad()
        elif what == "gradients":
            losses = gradients()
        elif what == "clip":
            before = norm(parameters)
            clip(parameters, max_grad_norm)
            norms = before, norm(parameters)
        elif what == "measure":
            norms = [norm(parameters)] * 2
        else:
            optimizer.step()
    return losses | {"grad_norm": told(*norms)}


def norm(parameters: list[Tensor]) -> Tensor:
    """Of the gradients of all parameters together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_each(parameters: list[Tensor], max_grad_norm: float) -> None:
    for p in parameters:
        clip_grad_norm_(p, max_grad_norm)


def normalize_always(parameters: list[Tensor], max_grad_norm: float) -> None:
    scale = max_grad_norm / norm(parameters)
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(scale)


MINIBATCH_UPDATE = (
    mistake("The optimizer does not step: the weights stay as they are.", order=("zero", "gradients", "clip")),
    mistake("The gradient is not zeroed: the last minibatch's is still in it.", order=("gradients", "clip", "step")),
    mistake(
        "The gradient is zeroed after it was computed: nothing is left of it.",
        order=("gradients", "zero", "clip", "step"),
    ),
    mistake(
        "The step comes before the gradient: it takes the last minibatch's.",
        order=("step", "zero", "gradients", "clip"),
    ),
    mistake(
        "The gradient is not clipped, or only after the step, when it is too late.",
        order=("zero", "gradients", "measure", "step"),
    ),
    mistake(
        "The gradient is computed twice, and counts double.", order=("zero", "gradients", "gradients", "clip", "step")
    ),
    mistake("The optimizer steps twice.", order=("zero", "gradients", "clip", "step", "step")),
    mistake("Each element is clipped: it is the norm of the whole gradient that is.", clip=clip_grad_value_),
    mistake("Each parameter is clipped by itself: it is the norm of all gradients together.", clip=clip_each),
    mistake("Gradients that are small enough are scaled up: clipping only makes smaller.", clip=normalize_always),
    mistake("grad_norm is that after clipping: before it tells more.", told=lambda before, after: after),
    mistake("grad_norm is squared.", told=lambda before, after: before**2),
)
