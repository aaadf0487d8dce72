"""The decode loop: several replies in one batch, some by the policy and some by the base model, token by token.

transformers' generate does the same for one kind of reply at a time and spends most of a small model's time around the
model. Here the adapters are gated by row, so that an answer (adapters on) and the quiz on its question (adapters off,
under its grammar) are written side by side; a row that is done leaves the batch. Passes over one token are made by
quicker means where there are any (recording.py).

Every reply is drawn from a generator of its own: it is the same reply whatever is written beside it, and the same that
`generate.plain_reply` draws. A `request` in here is a `generate.Request`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from lora_ppo.caches import place, roomy_cache, round_up, sharded, whole
from lora_ppo.policy import Policy
from lora_ppo.recording import distinct

TOP = 64  # tokens among which the nucleus is looked for first


@dataclass
class Reply:
    """A finished reply: its token ids, and the log-probability of each under softmax(logits / temperature)."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def decode(policy: Policy, requests: Sequence, seeds: Sequence[int]) -> list[Reply]:
    """Samples a reply to each of B requests, with the configured top_p and length, up to its end token.

    `seeds` are those of the replies' generators.
    """
    device = policy.device
    rows = [Row(policy, request, seed) for request, seed in zip(requests, seeds, strict=True)]
    replies = [row.reply for row in rows]
    asked = [(tuple(request.prompt_ids), request.adapter) for request in requests]
    different, which = distinct(asked)  # a prompt with several replies is read once
    adapted = torch.tensor([adapter for _, adapter in different], device=device)
    temperatures = torch.tensor([[request.temperature] for request in requests], device=device)
    gathered, recorder = sharded(policy), policy.recorder
    recorder.able &= not gathered
    with torch.no_grad() if gathered else torch.inference_mode():  # what is gathered in the latter can't be trained on
        logits, cache, real, positions = read_prompts(policy, different)
        length = cache.get_seq_length()
        if len(different) < len(asked):
            each = torch.tensor(which, device=device)
            cache.batch_select_indices(each)
            logits, positions, real, adapted = (x[each] for x in (logits, positions, real, adapted))
        while True:
            scores = logits[: len(rows), -1].float() / temperatures[: len(rows)]
            tokens, logprobs = draw(rows, scores, policy.config.top_p)
            for row, *drawn in zip(rows, tokens, logprobs, strict=True):
                row.take(*drawn)
            going = [i for i, row in enumerate(rows) if not row.done]
            if not going:
                return replies
            count = recorder.rows_for(len(going))
            kept = (going * count)[:count]
            ids, positions = torch.tensor([[tokens[i]] for i in kept], device=device), positions[:, -1:] + 1
            if len(going) < len(rows) or len(kept) != len(real):
                rows, kept = [rows[i] for i in going], torch.tensor(kept, device=device)
                cache.batch_select_indices(kept)
                positions, real, adapted, temperatures = (x[kept] for x in (positions, real, adapted, temperatures))
            length += 1
            logits, _ = recorder.read(ids, positions, real[:, :length], adapted, cache)


def read_prompts(policy: Policy, asked: Sequence[tuple]) -> tuple[Tensor, DynamicCache, Tensor, Tensor]:
    """Reads B prompts, given as (ids, adapter).

    Returns the logits behind each (B, 1, V), a cache with room for the replies, which of its places are real
    (B, P + room), and the positions of the last tokens (B, 1). What several prompts with adapters on begin with is read
    once; the base model remembers how its prompts begin (`Beginnings`). Where either is so, they are read apart.
    """
    room, config = policy.config.max_new_tokens, policy.model.config.get_text_config()
    on, off = ([ids for ids, adapter in asked if adapter is kind] for kind in (True, False))
    begun = {True: beginning(policy, on), False: policy.beginnings.of(off)}
    order, parts = [], []
    for kinds in ((True,), (False,)) if any(begun.values()) else ((True, False),):
        rows = [i for i, (_, adapter) in enumerate(asked) if adapter in kinds]
        if not rows:
            continue
        same = begun[kinds[0]]
        before = len(same)
        ids, real, positions = padded_left(policy, [asked[i][0][before:] for i in rows], room)
        real, positions = pad(real, (before, 0), value=True), positions + before
        adapted = torch.tensor([asked[i][1] for i in rows], device=policy.device)
        cache = roomy_cache(config, real.shape[1])
        if before and kinds == (True,):
            policy.recorder.begin(same, adapted, cache)
        elif before:
            policy.beginnings.put(same, len(rows), cache)
        logits, _ = policy.recorder.read(ids, positions, real[:, :-room], adapted, cache)
        order += rows
        parts.append((logits, cache, real, positions[:, -1:]))
    if len(parts) == 1:
        return parts[0]
    all_logits, caches, reals, lasts = zip(*parts, strict=True)
    back, width = torch.tensor(order, device=policy.device).argsort(), max(real.shape[1] for real in reals)
    tensors = zip(*map(whole, caches), strict=True)
    joined = [torch.cat([pad(x, (0, 0, width - x.shape[2], 0)) for x in own])[back] for own in tensors]
    cache = place(roomy_cache(config, width), joined, width - room)
    real = torch.cat([pad(real, (width - real.shape[1], 0)) for real in reals])
    return torch.cat(all_logits)[back], cache, real[back], torch.cat(lasts)[back]


def beginning(policy: Policy, prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What several different prompts begin with, and go on from; () where it is not worth a pass of its own."""
    if len(prompts) < 2 or sharded(policy):
        return ()
    return policy.beginnings.shared(prompts)[: min(map(len, prompts)) - 1]


def padded_left(policy: Policy, prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Tensor, Tensor]:
    """The prompts (B, P), which of the P + `room` places of each row are real (B, P + room), and positions (B, P)."""
    longest = round_up(max(map(len, prompts)), policy.device)
    missing = [longest - len(prompt) for prompt in prompts]
    rows = [[policy.pad_id] * n + list(prompt) for n, prompt in zip(missing, prompts, strict=True)]
    places = torch.arange(longest + room, device=policy.device)
    real = places >= torch.tensor(missing, device=policy.device).unsqueeze(1)
    return torch.tensor(rows, device=policy.device), real, (real[:, :longest].cumsum(-1) - 1).clamp(min=0)


class Row:
    """One reply in the making."""

    def __init__(self, policy: Policy, request, seed: int):
        self.policy, self.request, self.reply, self.done = policy, request, Reply(), False
        self.generator = torch.Generator(policy.device).manual_seed(seed)
        self.stream = request.stream(policy)

    def allowed(self, scores: Tensor) -> Tensor:
        """The scores (1, V) of what may come next; the others -inf."""
        if not self.request.grammar:
            return scores
        return self.request.grammar(torch.tensor([[*self.request.prompt_ids, *self.reply.ids]]), scores)

    def take(self, token: int, logprob: float) -> None:
        """Takes the next token into the reply."""
        ids = self.reply.ids
        ids.append(token)
        self.reply.logprobs.append(logprob)
        self.done = token in self.policy.stop_ids or len(ids) == self.policy.config.max_new_tokens
        if self.stream:
            self.stream.add([token])
            if self.done:
                self.stream.end()


def draw(rows: Sequence[Row], scores: Tensor, top_p: float) -> tuple[list[int], list[float]]:
    """Samples each row's next token from its logits / temperature (B, V), and says how probable they are (log p)."""
    allowed = logp = scores.log_softmax(-1)
    if any(row.request.grammar for row in rows):
        allowed = torch.cat([row.allowed(own) for row, own in zip(rows, scores.split(1), strict=True)]).log_softmax(-1)
    probabilities = nucleus(allowed, top_p).softmax(-1)
    # As torch.multinomial draws one of V: the first to finish, in times that are exponential, with these as speeds.
    times = exponential([row.generator for row in rows], scores)
    tokens = (probabilities / times).argmax(-1, keepdim=True)
    return tokens.flatten().tolist(), logp.gather(-1, tokens).flatten().tolist()


def exponential(generators: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Times (B, V) as `like`: each row's are what `exponential_` draws of its generator.

    A CPU draws them one by one, as -log(1 - u) of a uniform u in 64 bits; all rows' logarithms together take it half
    the time.
    """
    if like.device.type != "cpu":
        times = torch.empty_like(like)
        for row, generator in zip(times, generators, strict=True):
            row.exponential_(generator=generator)
        return times
    uniform = torch.empty_like(like, dtype=torch.float64)
    for row, generator in zip(uniform, generators, strict=True):
        row.uniform_(generator=generator)
    return uniform.neg_().log1p_().neg_().to(like.dtype)


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """Log-probabilities (B, V) of the most probable tokens that have `top_p` together; those of the others are -inf.

    A token stays where those above it have less than top_p (Holtzman et al. 2020). The first TOP are sorted alone where
    they hold that much in every row, as they nearly always do.
    """
    if top_p >= 1:
        return logp
    for count in sorted({min(count, logp.shape[1]) for count in (TOP, TOP**2, logp.shape[1])}):
        values, tokens = logp.topk(count)
        probabilities = values.exp()
        up_to = probabilities.cumsum(-1)
        if (up_to[:, -1] > top_p).all():
            break
    kept = up_to - probabilities < top_p
    return torch.full_like(logp, -torch.inf).scatter(1, tokens, values.masked_fill(~kept, -torch.inf))
