"""One forward pass over prompts and responses: log-probabilities, values and logits, with nothing read twice."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_ppo.policy import Policy

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left, responses on the right: the last T columns are the responses."""

    input_ids: "Tensor"  # (B, P + T)
    attention_mask: "Tensor"  # (B, P + T), True on what is no padding
    response_mask: "Tensor"  # (B, T)

    @property
    def positions(self) -> "Tensor":
        """How many real tokens stand before each (B, P + T); 0 on the padding at the left."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def rows(self, rows: Sequence[int]) -> "Batch":
        """The batch of some rows, without the columns that are padding in all of them."""
        ids, real, mask = (x[rows] for x in (self.input_ids, self.attention_mask, self.response_mask))
        prompt, response = real.any(0).split([real.shape[1] - mask.shape[1], mask.shape[1]])
        first, t = len(prompt) - int(prompt.sum()), max(int(response.sum()), 1)
        end = len(prompt) + t
        return Batch(ids[:, first:end], real[:, first:end], mask[:, :t])


def collate(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    pad_id: int,
    device: "torch.device",
    chosen: Sequence[Sequence[bool]] | None = None,
) -> Batch:
    """One batch from B prompts and responses; `chosen` marks the response tokens that the policy chose (None: all)."""
    import torch

    chosen = chosen or [[True] * len(response) for response in responses]
    p, t = max(map(len, prompts)), max(map(len, responses))
    rows = zip(prompts, responses, strict=True)
    ids = [[pad_id] * (p - len(a)) + list(a) + list(b) + [pad_id] * (t - len(b)) for a, b in rows]
    rows = zip(prompts, responses, strict=True)
    real = [[False] * (p - len(a)) + [True] * (len(a) + len(b)) + [False] * (t - len(b)) for a, b in rows]
    mask = [list(c) + [False] * (t - len(c)) for c in chosen]
    return Batch(*(torch.tensor(x, device=device) for x in (ids, real, mask)))


def token_logprobs_and_values(
    policy: Policy, batch: Batch, adapter: bool = True, temperature: float | None = None
) -> tuple["Tensor", "Tensor", "Tensor"]:
    """Log-probabilities (B, T) of the response tokens, values (B, T), and the model's logits (B, T, V).

    The log-probabilities are float32 and of softmax(logits / temperature), by default the configured one. Column t is
    what was known before response token t was written. Logits exist for response positions only, in the model's dtype.
    """
    import torch

    from lora_ppo import ppo

    width, t = batch.input_ids.shape[1], batch.response_mask.shape[1]
    with policy.adapter(adapter):
        logits, hidden = read_sparingly(policy, batch) or policy.read(
            **rounded_up(policy, batch),
            use_cache=False,
            logits_to_keep=torch.arange(width - t - 1, width - 1, device=policy.device),
        )
    logprobs = ppo.chosen_logprobs(logits, batch.input_ids[:, -t - 1 :], temperature or policy.config.temperature)
    # The value loss trains the head alone. Through the adapters its gradient, the largest one where a policy that is
    # sure of its answers meets a wrong one, would shake the policy.
    values = policy.value_head(hidden.detach().float()).squeeze(-1)  # (B, T)
    return logprobs, values, logits


def read_sparingly(policy: Policy, batch: Batch) -> "tuple[Tensor, Tensor] | None":
    """`Policy.read` on the response positions of a batch, (B, T, V) and (B, T, H), with nothing read twice.

    A prompt that several rows share is read once, forward and backward: gradients reach it through the cache. So is
    what all prompts begin with, where that is long, as examples are; the base model remembers how a role's prompts
    begin. None where fewer than half of the prompts could be spared and there is no such beginning, or the model is
    none for it.
    """
    import torch
    from transformers import DynamicCache

    from lora_ppo.caches import sharded, takes
    from lora_ppo.recording import distinct

    model, (count, t), training = policy.model.get_base_model(), batch.response_mask.shape, torch.is_grad_enabled()
    if count == 1 or sharded(policy) or not takes(policy):
        return None
    ids, real, positions = (x[:, :-1] for x in (batch.input_ids, batch.attention_mask, batch.positions))
    last = ids.shape[1] - t  # where the prompts' last tokens are
    rows = zip(ids[:, :last].tolist(), real[:, :last].tolist(), strict=True)
    different, which = distinct([tuple(itertools.compress(*row)) for row in rows])
    config = model.config.get_text_config()
    begun = policy.beginnings.shared(different)
    shared = last > 0 and 2 * len(different) <= count
    if not (begun or shared) or (training and model.is_activation_checkpointing):
        return None  # layers that are recomputed fill no cache
    readers = [which.index(i) for i in range(len(different))] if shared else list(range(count))
    adapted = torch.full((count,), policy.gate.share, device=policy.device)
    cache = DynamicCache(config=config)
    if begun in policy.beginnings.kept and policy.gate.share is False and not training:
        policy.beginnings.put(begun, len(readers), cache)
    elif begun:
        policy.recorder.begin(begun, adapted[: len(readers)], cache)
    start, real = len(begun), real & (positions >= len(begun))
    real[:, :start] = True  # the cache's places
    if shared:
        one = ids[readers, start:last], positions[readers, start:last], real[readers, :last], adapted[: len(readers)]
        policy.recorder.read(*one, cache)
        cache.batch_select_indices(torch.tensor(which, device=policy.device))
        start = last
    return policy.recorder.read(ids[:, start:], positions[:, start:], real, adapted, cache, t)


def rounded_up(policy: Policy, batch: Batch) -> "dict[str, Tensor | None]":
    """The inputs of a pass over a batch but its last token; on a CPU padded on the right (`round_up`)."""
    import torch

    from lora_ppo.caches import round_up

    ids, real, positions = (x[:, :-1] for x in (batch.input_ids, batch.attention_mask, batch.positions))
    tokens, padded = ids.shape[1], not real.all()
    extra = max(min(round_up(tokens, policy.device), policy.context) - tokens, 0)
    if extra:  # what is added on the right, none of the others sees
        ids, real = (torch.nn.functional.pad(x, (0, extra)) for x in (ids, real))
        positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, extra + 1)], 1)
    return {"input_ids": ids, "attention_mask": real.long() if padded else None, "position_ids": positions}
