"""The decode loop: several replies in one batch, some by the policy and some by the base model, token by token.

transformers' generate does the same for one kind of reply at a time and spends most of a small model's time around the
model. Here the adapters are gated by row, so that an answer (adapters on) and the quiz on its question (adapters off,
under its grammar) are written side by side; a row that is done leaves the batch.

Every reply is drawn from a generator of its own: it is the same reply whatever is written beside it, and the same that
`plain_reply` in lora_ppo_demo.py draws through generate.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from lora_ppo_demo import Policy, Request

CACHED_LAYERS = {"full_attention", "sliding_attention"}
TOP = 64  # tokens among which the nucleus is looked for first
FEW_ROWS = 16  # so many rows at most are taken as W x^T; above, x W^T is as fast


@dataclass
class Reply:
    """A finished reply: its token ids, and the log-probability of each under softmax(logits / temperature)."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def takes(policy: "Policy") -> bool:
    """Whether this loop can decode the model: attention alone, with a cache from which rows can be taken out."""
    model = policy.model.get_base_model()
    arguments = inspect.signature(model.forward).parameters
    known = all(name in arguments for name in ("position_ids", "past_key_values", "logits_to_keep"))
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or CACHED_LAYERS)
    return known and layers <= CACHED_LAYERS and not model._is_stateful and not config.is_encoder_decoder


def sees_all(config) -> bool:
    """Whether a token attends to all that is real before it, in every layer, with a mask of True and False."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return layers == {"full_attention"} and window is None and config._attn_implementation == "sdpa"


def speed_up_few_rows(model) -> None:
    """Makes the model's float32 linear layers on a CPU quick on a handful of rows, which is what decoding gives them.

    There W x^T takes a quarter to three quarters of the time of x W^T, which is how torch writes the same product.
    """
    import torch

    def few_rows_forward(layer):
        def forward(x: "Tensor") -> "Tensor":
            rows = x.reshape(-1, x.shape[-1])
            if not 1 < len(rows) <= FEW_ROWS:
                return torch.nn.functional.linear(x, layer.weight, layer.bias)
            result = torch.mm(layer.weight, rows.t()).t()
            return (result if layer.bias is None else result + layer.bias).reshape(*x.shape[:-1], -1)

        return forward

    for module in model.modules():
        on_cpu = type(module) is torch.nn.Linear and module.weight.device.type == "cpu"
        if on_cpu and module.weight.dtype == torch.float32:
            module.forward = few_rows_forward(module)


def decode(policy: "Policy", requests: Sequence["Request"], seeds: Sequence[int]) -> list[Reply]:
    """Samples a reply to each of B requests, with the configured top_p and length, up to its end token.

    `seeds` are those of the replies' generators.
    """
    import torch
    from transformers import DynamicCache

    model, device = policy.model.get_base_model(), policy.device
    rows = [Row(policy, request, seed) for request, seed in zip(requests, seeds, strict=True)]
    replies = [row.reply for row in rows]
    least = 2 if device.type == "cpu" else 1  # there a row alone, a matrix-vector product, takes longer than two

    def filled(items: list) -> list:
        return items if len(items) >= least else items * least

    batch = filled(list(requests))
    ids, real, positions = padded_left(policy, [request.prompt_ids for request in batch], policy.config.max_new_tokens)
    padded, length = not bool(real.all()), ids.shape[1]
    config = model.config.get_text_config()
    own_mask = sees_all(config)
    adapted = torch.tensor([request.adapter for request in batch], device=device)
    temperatures = torch.tensor([[request.temperature] for request in batch], device=device)
    cache = DynamicCache(config=config)
    mask = real[:, :length].long() if padded else None
    sharded = any(hasattr(parameter, "to_local") for parameter in model.parameters())
    with torch.no_grad() if sharded else torch.inference_mode():  # what is gathered in the latter can't be trained on
        while True:
            with policy.adapter(bool(adapted[0]) if (adapted == adapted[0]).all() else adapted):
                logits = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits[:, -1]
            scores = logits[: len(rows)].float() / temperatures[: len(rows)]
            totals = scores.logsumexp(-1)
            tokens = [row.draw(*given) for row, *given in zip(rows, scores, totals, strict=True)]
            going = [i for i, row in enumerate(rows) if not row.done]
            if not going:
                return replies
            kept = filled(going)
            ids, positions = torch.tensor([[tokens[i]] for i in kept], device=device), positions[:, -1:] + 1
            if len(going) < len(rows):
                rows, kept = [rows[i] for i in going], torch.tensor(kept, device=device)
                cache.batch_select_indices(kept)
                positions, real, adapted, temperatures = (x[kept] for x in (positions, real, adapted, temperatures))
            length += 1
            if padded:  # the model takes time to make its own mask of this one
                mask = real[:, None, None, :length] if own_mask else real[:, :length].long()


def score(policy: "Policy", prompts: Sequence[list[int]], replies: Sequence[Sequence[list[int]]]) -> "Tensor":
    """Log-probability (B, N), at temperature 1, of the base model giving each of N replies to each of B prompts.

    A prompt is read once for all its replies.
    """
    import torch
    from transformers import DynamicCache

    model, count = policy.model.get_base_model(), len(replies[0])
    flat = [reply for those in replies for reply in those]
    longest = max(map(len, flat))
    rows = [reply + [policy.pad_id] * (longest - len(reply)) for reply in flat]
    tokens = torch.tensor(rows, device=policy.device)  # (B N, T)
    ids, real, positions = padded_left(policy, prompts, longest - 1)
    cache = DynamicCache(config=model.config.get_text_config())
    reading = {"past_key_values": cache, "use_cache": True}
    with torch.no_grad(), policy.adapter(False):
        mask = real[:, : ids.shape[1]].long()
        first = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1, **reading).logits
        cache.batch_repeat_interleave(count)
        mask = real.repeat_interleave(count, 0).long()
        after = positions[:, -1:].repeat_interleave(count, 0) + torch.arange(1, longest, device=policy.device)
        rest = model(input_ids=tokens[:, :-1], attention_mask=mask, position_ids=after, **reading).logits
    logp = torch.cat([first.repeat_interleave(count, 0), rest], 1).float().log_softmax(-1)  # (B N, T, V)
    logprobs = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    lengths = torch.tensor([len(reply) for reply in flat], device=policy.device)
    told = torch.arange(longest, device=policy.device) < lengths.unsqueeze(1)
    return logprobs.masked_fill(~told, 0.0).sum(-1).view(len(prompts), count)


def padded_left(policy: "Policy", prompts: Sequence[Sequence[int]], room: int) -> tuple["Tensor", "Tensor", "Tensor"]:
    """The prompts (B, P), which of the P + `room` places of each row are real (B, P + room), and positions (B, P)."""
    import torch

    longest = max(map(len, prompts))
    pad = [longest - len(prompt) for prompt in prompts]
    rows = [[policy.pad_id] * p + list(prompt) for p, prompt in zip(pad, prompts, strict=True)]
    places = torch.arange(longest + room, device=policy.device)
    real = places >= torch.tensor(pad, device=policy.device).unsqueeze(1)
    return torch.tensor(rows, device=policy.device), real, (real[:, :longest].cumsum(-1) - 1).clamp(min=0)


class Row:
    """One reply in the making."""

    def __init__(self, policy: "Policy", request: "Request", seed: int):
        import torch

        self.policy, self.request, self.reply, self.done = policy, request, Reply(), False
        self.generator = torch.Generator(policy.device).manual_seed(seed)
        self.stream = request.stream(policy.tokenizer)

    def draw(self, scores: "Tensor", total: "Tensor") -> int:
        """Samples the next token from its logits / temperature (V,), takes it into the reply; `total`: logsumexp."""
        import torch

        ids, config = self.reply.ids, self.policy.config
        allowed, mass = scores, total
        if self.request.grammar:
            so_far = torch.tensor([[*self.request.prompt_ids, *ids]])
            allowed = self.request.grammar(so_far, scores.unsqueeze(0))[0]
            mass = allowed.logsumexp(-1)
        probabilities = nucleus(allowed, mass, config.top_p).softmax(-1)
        token = int(torch.multinomial(probabilities, 1, generator=self.generator))
        ids.append(token)
        self.reply.logprobs.append((scores[token] - total).item())
        self.done = token in self.policy.stop_ids or len(ids) == config.max_new_tokens
        if self.stream:
            self.stream.add([token])
            if self.done:
                self.stream.end()
        return token


def nucleus(scores: "Tensor", total: "Tensor", top_p: float) -> "Tensor":
    """The scores (V,) of the most probable tokens that have `top_p` of the probability together; the others -inf.

    A token stays where those above it have less than top_p (Holtzman et al. 2020). `total` is the scores' logsumexp.
    The first TOP are sorted alone where they hold that much, as they nearly always do.
    """
    import torch

    if top_p >= 1:
        return scores
    for count in (min(TOP, len(scores)), len(scores)):
        values, tokens = scores.topk(count)
        probabilities = (values - total).exp()
        up_to = probabilities.cumsum(-1)
        if up_to[-1] > top_p:
            break
    kept = up_to - probabilities < top_p
    return torch.full_like(scores, -torch.inf).index_copy(0, tokens[kept], values[kept])
