"""Requests and their replies, streamed as text, and transformers' own generate as the plain path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_ppo.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Request:
    """A reply to be written: to which prompt, how, and by whom (the policy, or with `adapter` off the base model).

    `on_text` receives the text piece by piece as it is written; `grammar` restricts what may be written.
    """

    prompt_ids: Sequence[int]
    temperature: float
    adapter: bool = True
    grammar: "Callable[[Tensor, Tensor], Tensor] | None" = None
    on_text: Callable[[str], None] | None = None

    def stream(self, policy: Policy) -> "TextStream | None":
        return TextStream(policy, self.on_text) if self.on_text else None


class TextStream:
    """Turns token ids into pieces of text without half characters; transformers' generate can write to it."""

    def __init__(self, policy: Policy, on_text: Callable[[str], None]):
        self.policy, self.on_text = policy, on_text
        self.ids: list[int] = []
        self.written, self.prompt_seen = 0, False

    def put(self, ids: "Tensor") -> None:
        """What generate calls: first with the prompt, then with every token."""
        if self.prompt_seen:
            self.add(ids.flatten().tolist())
        self.prompt_seen = True

    def add(self, ids: list[int]) -> None:
        self.ids += ids
        text = self.policy.text(self.ids)
        if not text.endswith("\ufffd"):
            self.flush(text)

    def end(self) -> None:
        self.flush(self.policy.text(self.ids))

    def flush(self, text: str) -> None:
        if len(text) > self.written:
            self.on_text(text[self.written :])
            self.written = len(text)


def plain_reply(policy: Policy, request: Request, seed: int) -> list[int]:
    """Samples one reply through transformers' generate."""
    import torch
    from transformers import GenerationConfig

    settings = GenerationConfig(  # afresh: a model's own defaults (top_k, repetition_penalty) would change the policy
        do_sample=True,
        temperature=request.temperature,
        top_p=policy.config.top_p,
        top_k=0,
        max_new_tokens=policy.config.max_new_tokens,
        eos_token_id=policy.stop_ids,
        pad_token_id=policy.pad_id,
    )
    ids = torch.tensor([request.prompt_ids], device=policy.device)
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.no_grad(), policy.adapter(request.adapter), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        output = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=settings,
            logits_processor=[request.grammar] if request.grammar else None,
            streamer=request.stream(policy),
        )
    return up_to_stop(output[0, len(request.prompt_ids) :].tolist(), policy.stop_ids)


def up_to_stop(ids: list[int], stop_ids: Sequence[int]) -> list[int]:
    """The ids up to and including the first stop token: what follows is padding."""
    end = next((i + 1 for i, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def replies(policy: Policy, requests: Sequence[Request], seeds: Sequence[int] | None = None) -> list[list[int]]:
    """Samples a reply to each of B requests, with the configured top_p and length, up to its end token.

    Each is drawn from a generator of its own, seeded with `seeds`, or else from torch's global one: what is written
    beside it, and by which of the two ways, makes no difference. Models that the decode loop can't take are left to
    transformers' generate.
    """
    import torch

    from lora_ppo.caches import takes
    from lora_ppo.decode import decode

    seeds = seeds or torch.randint(2**53, (len(requests),)).tolist()
    if takes(policy):
        return [reply.ids for reply in decode(policy, requests, seeds)]
    return [plain_reply(policy, request, seed) for request, seed in zip(requests, seeds, strict=True)]


def generate(policy: Policy, prompt_ids: Sequence[int], temperature: float, **options: Any) -> list[int]:
    """Samples one reply; `Request` tells the options."""
    return replies(policy, [Request(prompt_ids, temperature, **options)])[0]
