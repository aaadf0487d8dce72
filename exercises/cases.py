"""What the functions are tried on: small inputs first, then every trap that training has.

Ratios far from 1, both signs of the advantage, ragged masks, environment text inside an answer, NaN wherever the mask
is False, one token, one answer, an answer that is left out. Numbers are round, so that they can be followed by hand;
none lies on the edge of a clip range, where a gradient may be either side's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from exercises.mistakes import Mistake, losses, returns, update

MASKS = (  # (B, T): one token, one answer, answers of two lengths, environment text inside, both and more
    ("1",),
    ("111",),
    ("1110", "1000"),
    ("1011", "1111"),
    ("110011010", "101111100", "100000000", "111111111"),
    ("0111100", "1111111"),
)
LEFT_OUT = ("0000", "1011")  # an answer whose score is not known: it takes part in nothing
VOCABULARY = 5


@dataclass(frozen=True)
class Function:
    """A function of the course: its inputs and their dimensions (B, T, V; S is T + 1), and what it returns.

    `trained` are the inputs whose gradient is looked at: that of `loss`, one of the results; or, where this is empty,
    there must be none. `call` gives the results by name, if they are not returned in this order.
    """

    name: str
    exercise: int
    dims: dict[str, str]
    results: tuple[str, ...]
    trained: tuple[str, ...]
    loss: str
    cases: list[dict[str, Any]]
    right: Callable  # the function in parts, which made wrong is a mistake
    mistakes: tuple[Mistake, ...]
    asides: tuple[str, ...] = ()  # results that only the log needs
    call: Callable[[Callable, dict[str, Any]], Any] = lambda function, inputs: function(*inputs.values())


class Numbers:
    """Round random numbers, the same every time."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """Multiples of 0.1 in low ... high."""
        whole = torch.randint(round(low * 10), round(high * 10) + 1, shape, generator=self.generator)
        return whole.float() / 10

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(VOCABULARY, shape, generator=self.generator)


def mask_of(rows: tuple[str, ...]) -> Tensor:
    return torch.tensor([[letter == "1" for letter in row] for row in rows])


def each_mask() -> list[tuple[Numbers, Tensor, bool]]:
    """Random numbers, a mask, whether NaN stands where it is False: every mask without, and those with gaps with."""
    found = [(Numbers(seed), mask_of(rows), False) for seed, rows in enumerate((*MASKS, *MASKS[3:]))]
    found += [(Numbers(seed), mask_of(rows), True) for seed, rows in enumerate(MASKS[2:])]
    return [*found, (Numbers(20), mask_of(LEFT_OUT), False), (Numbers(21), mask_of(LEFT_OUT), True)]


def hidden(x: Tensor, mask: Tensor, nan: bool) -> Tensor:
    """`x`, with NaN wherever the mask is False, if it is to be so."""
    where = mask if x.dim() == mask.dim() else mask.unsqueeze(-1)
    return torch.where(where, x, torch.nan) if nan else x


def chosen_logprobs_cases() -> list[dict[str, Any]]:
    cases = []
    for seed, (b, t, temperature) in enumerate([(1, 1, 1.0), (1, 3, 1.0), (1, 3, 0.5), (2, 4, 0.7), (3, 6, 2.0)]):
        numbers = Numbers(seed)
        logits = numbers.between(-3, 3, b, t, VOCABULARY)
        cases.append({"logits": logits, "input_ids": numbers.ids(b, t + 1), "temperature": temperature})
    numbers = Numbers(9)
    far = numbers.between(-3, 3, 1, 3, VOCABULARY) * 100.0  # e^-300 is no number of float32
    cases.append({"logits": far, "input_ids": numbers.ids(1, 4), "temperature": 0.5})
    half = numbers.between(-3, 3, 2, 3, VOCABULARY).bfloat16()
    cases.append({"logits": half, "input_ids": numbers.ids(2, 4), "temperature": 0.7})
    return cases


def policy_loss_cases() -> list[dict[str, Any]]:
    cases = []
    for numbers, mask, nan in each_mask():
        old = numbers.between(-4, -0.5, *mask.shape)
        new = old + numbers.between(-1.2, 1.2, *mask.shape)  # ratios of 0.3 to 3.3
        new = torch.where(new >= 0, torch.tensor(-0.1), new)
        advantages = numbers.between(-2, 2, *mask.shape)
        advantages = torch.where(advantages == 0, torch.tensor(1.5), advantages)
        names = ("logprobs", "old_logprobs", "advantages")
        tensors = (hidden(x, mask, nan) for x in (new, old, advantages))
        cases.append(dict(zip(names, tensors, strict=True)) | {"response_mask": mask, "cliprange": 0.25})
    return cases


def value_loss_cases() -> list[dict[str, Any]]:
    cases = []
    for numbers, mask, nan in each_mask():
        old = numbers.between(-1, 1, *mask.shape)
        new = old + numbers.between(-1, 1, *mask.shape)
        goal = numbers.between(-2, 2, *mask.shape)
        names = ("values", "old_values", "returns")
        tensors = (hidden(x, mask, nan) for x in (new, old, goal))
        cases.append(dict(zip(names, tensors, strict=True)) | {"response_mask": mask, "cliprange_value": 0.25})
    return cases


def entropy_cases() -> list[dict[str, Any]]:
    cases = []
    for place, (numbers, mask, nan) in enumerate(each_mask()):
        logits = hidden(numbers.between(-2, 2, *mask.shape, VOCABULARY), mask, nan)
        cases.append({"logits": logits, "response_mask": mask, "temperature": (1.0, 0.7, 2.0)[place % 3]})
    far = Numbers(9).between(-3, 3, 1, 3, VOCABULARY) * 100.0
    return [*cases, {"logits": far, "response_mask": mask_of(("111",)), "temperature": 1.0}]


def compute_rewards_cases() -> list[dict[str, Any]]:
    cases = []
    for numbers, mask, nan in each_mask():
        ref = numbers.between(-4, -0.5, *mask.shape)
        new = ref + numbers.between(-1, 1, *mask.shape)
        scores = torch.where(numbers.between(0, 1, len(mask)) < 0.5, -1.0, 1.0) * mask.any(-1)
        tensors = {"logprobs": hidden(new, mask, nan), "ref_logprobs": hidden(ref, mask, nan)}
        cases.append({"scores": scores} | tensors | {"response_mask": mask, "kl_coef": 0.3})
    return cases


def gae_cases() -> list[dict[str, Any]]:
    cases = []
    constants = ((0.9, 0.8), (0.9, 0.8), (0.9, 0.8), (1.0, 1.0), (0.5, 1.0), (1.0, 0.0))
    for place, (numbers, mask, nan) in enumerate(each_mask()):
        gamma, lam = constants[place % len(constants)] if place >= len(MASKS) else (0.9, 0.8)
        values, rewards = (numbers.between(-2, 2, *mask.shape) for _ in range(2))
        rewards = torch.where(mask, rewards, 0.0)
        cases.append({"rewards": rewards, "values": hidden(values, mask, nan), "response_mask": mask})
        cases[-1] |= {"gamma": gamma, "lam": lam}
    return cases


def ppo_losses_cases() -> list[dict[str, Any]]:
    cases = []
    for policy, value, ent in zip(policy_loss_cases(), value_loss_cases(), entropy_cases(), strict=False):
        constants = {"cliprange": 0.25, "cliprange_value": 0.35, "vf_coef": 0.2, "entropy_coef": 0.05}
        case = {"logprobs": policy["logprobs"], "values": value["values"], "logits": ent["logits"]}
        case |= {"old_logprobs": policy["old_logprobs"], "old_values": value["old_values"]}
        case |= {"advantages": policy["advantages"], "returns": value["returns"]}
        config = SimpleNamespace(**constants, temperature=0.7)
        cases.append(case | {"response_mask": policy["response_mask"], "config": config})
    cases[1]["config"].entropy_coef = 0.0
    return cases


def minibatch_update_cases() -> list[dict[str, Any]]:
    """Two parameters and the gradient that stood in them before; that of the loss has a norm below and above.

    A third parameter has no part in the loss, and so no gradient: as a value head has under GRPO.
    """
    cases = []
    for optimizer in ("SGD", "AdamW"):
        for slope in ([0.3, -0.4], [6.0, -8.0]):
            given = {"weight": torch.tensor([1.0, 2.0]), "bias": torch.tensor([0.5]), "grad before": torch.tensor(0.7)}
            given |= {"loss": "(slope * weight).sum() + 2 * bias", "slope": torch.tensor(slope)}
            given |= {"optimizer": f"{optimizer}, lr 0.1, of the bias 0.05", "max_grad_norm": 3.0}
            cases.append(given)
    return cases


def call_minibatch_update(function: Callable, inputs: dict[str, Any]) -> dict[str, Any]:
    """The losses that `function` returns, and the two parameters as it leaves them.

    `inputs` says in words which loss it is, and the optimizer's rates.
    """
    weight, bias = (inputs[name].clone().requires_grad_() for name in ("weight", "bias"))
    for p in (weight, bias):
        p.grad = torch.full_like(p, inputs["grad before"].item())
    kind = getattr(torch.optim, inputs["optimizer"].partition(",")[0])
    apart = torch.ones(1, requires_grad=True)
    optimizer = kind([{"params": [weight, apart]}, {"params": [bias], "lr": 0.05}], lr=0.1, weight_decay=0.0)

    def gradients() -> dict[str, Any]:
        loss = (inputs["slope"] * weight).sum() + 2.0 * bias.sum()
        loss.backward()
        return {"loss": loss.detach(), "entropy": 1.5}  # a tensor and a number: training gives either

    result = function(gradients, optimizer, inputs["max_grad_norm"])
    after = {"weight afterwards": weight.detach().clone(), "bias afterwards": bias.detach().clone()}
    if not isinstance(result, dict):
        return result
    if isinstance(result.get("entropy"), float):
        result = result | {"entropy": torch.tensor(result["entropy"])}
    return result | after


def in_tokens(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "BT")


FUNCTIONS = (
    Function(
        *("chosen_logprobs", 0, {"logits": "BTV", "input_ids": "BS"}, ("logprobs",), ("logits",), "logprobs"),
        *(chosen_logprobs_cases(), losses.chosen_logprobs, losses.CHOSEN_LOGPROBS),
    ),
    Function(
        *("policy_loss", 1, in_tokens("logprobs old_logprobs advantages response_mask")),
        *(("loss", "clip_fraction"), ("logprobs",), "loss"),
        *(policy_loss_cases(), losses.policy_loss, losses.POLICY_LOSS, ("clip_fraction",)),
    ),
    Function(
        *("value_loss", 2, in_tokens("values old_values returns response_mask")),
        *(("loss", "clip_fraction"), ("values",), "loss"),
        *(value_loss_cases(), losses.value_loss, losses.VALUE_LOSS, ("clip_fraction",)),
    ),
    Function(
        *("entropy", 3, {"logits": "BTV", "response_mask": "BT"}, ("entropy",), ("logits",), "entropy"),
        *(entropy_cases(), losses.entropy, losses.ENTROPY),
    ),
    Function(
        *("compute_rewards", 4, {"scores": "B"} | in_tokens("logprobs ref_logprobs response_mask")),
        *(("rewards",), ("logprobs",), ""),
        *(compute_rewards_cases(), returns.compute_rewards, returns.COMPUTE_REWARDS),
    ),
    Function(
        *("gae", 4, in_tokens("rewards values response_mask"), ("advantages", "returns"), ("values",), ""),
        *(gae_cases(), returns.gae, returns.GAE),
    ),
    Function(
        *(
            "ppo_losses",
            5,
            {"logits": "BTV"} | in_tokens("logprobs values old_logprobs old_values advantages returns response_mask"),
        ),
        *(("loss", "policy_loss", "value_loss", "entropy", "clip_fraction"), ("logprobs", "values", "logits"), "loss"),
        *(ppo_losses_cases(), update.ppo_losses, update.PPO_LOSSES),
        ("policy_loss", "value_loss", "entropy", "clip_fraction"),
    ),
    Function(
        *("minibatch_update", 5, {}, ("loss", "entropy", "grad_norm", "weight afterwards", "bias afterwards"), (), ""),
        *(minibatch_update_cases(), update.minibatch_update, update.MINIBATCH_UPDATE),
        call=call_minibatch_update,
    ),
)
