"""The decode loop: several replies in one batch, some by the policy and some by the base model, token by token.

transformers' generate does the same for one kind of reply at a time and spends most of a small model's time around the
model. Here the adapters are gated by row, so that an answer (adapters on) and the quiz on its question (adapters off,
under its grammar) are written side by side; a row that is done leaves the batch. After a while its passes are recorded,
which saves the time that Python, or on a GPU the launch of kernels, takes for them; so are, on a CPU, the other short
passes that need no gradient.

Every reply is drawn from a generator of its own: it is the same reply whatever is written beside it, and the same that
`plain_reply` in lora_ppo_demo.py draws through generate.

What else is fast, or spares memory, and intricate stands here too: a CPU's products (`speed_up_products`), a GPU's with
4-bit weights (`copy_weights`), what layers keep for the backward pass (`spare_activations`), and batches read without
reading anything twice (`read_sparingly`).
"""

import functools
import inspect
import itertools
import platform
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ppo.settings import ConfigError

if TYPE_CHECKING:
    from lora_ppo_demo import Batch, Policy, Request

Item = TypeVar("Item", bound=Hashable)

CACHED_LAYERS = {"full_attention", "sliding_attention"}
TOP = 64  # tokens among which the nucleus is looked for first
FEW_ROWS = 16  # so many rows at most are taken as W x^T; above, x W^T is as fast
SHORT = 256  # tokens of a pass that a CPU records; with more of them, the time that Python takes does not matter
RECORDING_PAYS = {"cpu": 64, "cuda": 16}  # after so many passes: to record one takes as long as it saves on as many
RARE = 0.01  # of all passes; cases that are no more are not worth the memory of a recording
ROUND = 8  # oneDNN compiles a product for each number of rows, and keeps it: a CPU reads a multiple of so many tokens
MANY = 32  # tokens of a pass; bitsandbytes multiplies fewer with 4-bit weights as they are, and for more unpacks them
ROOM = 256  # a CUDA graph has room for a multiple of so many tokens
KEPT_TOKENS = 4096  # of all rows: a graph's cache is kept, and what it fills is missing elsewhere


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


def steady(config) -> bool:
    """Whether a token's keys and values are the same however many tokens follow, by the same operations."""
    varying = ("dynamic", "longrope", "num_experts_per_tok")
    return sees_all(config) and not any(word in str(config.to_dict()) for word in varying)


class FrozenProduct(torch.autograd.Function):
    """x W^T + b by oneDNN, with a gradient for x alone: (..., I), (O, I), (O) -> (..., O)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(grad, weight.t()), None, None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def scripted_product() -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """`product` for torch.jit.trace, which can't record the operation itself: one of its arguments is a list."""
    return torch.jit.script(product)


def few(rows: int) -> bool:
    """Whether a product of so many rows is taken as W x^T."""
    return torch.is_inference_mode_enabled() and 1 < rows <= FEW_ROWS


def speed_up_products(model) -> None:
    """Makes the frozen float32 linear layers of a model on an x86 CPU quick.

    There oneDNN takes 10 to 30 % less time than MKL, which torch asks in float32 (but not in 16 bits). In decoding,
    where rows are a handful, W x^T takes a quarter to three quarters of the time of x W^T.
    """
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return

    def quick_forward(layer):
        def forward(x: Tensor) -> Tensor:
            if layer.weight.requires_grad:
                return torch.nn.functional.linear(x, layer.weight, layer.bias)
            if x.requires_grad and torch.is_grad_enabled():
                return FrozenProduct.apply(x, layer.weight, layer.bias)
            rows = x.reshape(-1, x.shape[-1])
            if not few(len(rows)):
                return (scripted_product() if torch.jit.is_tracing() else product)(x, layer.weight, layer.bias)
            result = torch.mm(layer.weight, rows.t()).t()  # its gradient would take longer: it lies column by column
            return (result if layer.bias is None else result + layer.bias).reshape(*x.shape[:-1], -1)

        return forward

    for module in model.modules():
        on_cpu = type(module) is torch.nn.Linear and module.weight.device.type == "cpu"
        if on_cpu and module.weight.dtype == torch.float32:
            module.forward = quick_forward(module)


def copy_weights(model, wanted: str) -> bool:
    """Keeps a copy in 16 bits of a model's 4-bit weights, for passes over `MANY` tokens or more; says whether it does.

    In such a pass bitsandbytes makes that copy of each weight, once more in the backward pass, and throws it away: the
    numbers are the same. Short passes, those of decoding, read the 4-bit weights, which are a quarter of the size.
    `wanted`: true, false, or auto, where it takes at most half of the memory that is free. Raises ConfigError where
    there is too little.
    """
    kind = "bitsandbytes.nn.modules", "Linear4bit"  # PEFT has one of that name, too
    layers = [module for module in model.modules() if (type(module).__module__, type(module).__name__) == kind]
    if wanted == "false" or not layers:
        return False
    size = sum(layer.weight.quant_state.shape.numel() * layer.compute_dtype.itemsize for layer in layers)
    free, _ = torch.cuda.mem_get_info(layers[0].weight.device)
    if wanted == "auto" and size > free / 2:
        return False
    if size > free:
        raise ConfigError(
            f"bf16_copy=true: the copy takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: set bf16_copy=auto"
        )
    for layer in layers:
        layer.forward = copied_forward(layer)
    return True


def copied_forward(layer) -> Callable[[Tensor], Tensor]:
    """The forward of a bitsandbytes Linear4bit, with a copy of its weight for `MANY` tokens or more."""
    from bitsandbytes.functional import dequantize_4bit

    plain, dtype, bias = layer.forward, layer.compute_dtype, layer.bias
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    bias = bias if bias is None else bias.to(dtype)

    def forward(x: Tensor) -> Tensor:
        if x.numel() // x.shape[-1] < MANY:
            return plain(x)
        return torch.nn.functional.linear(x.to(dtype), weight, bias).to(x.dtype)

    return forward


GATED = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"  # the whole of what most models' MLPs do


def spare_activations(model) -> None:
    """Makes a model's layers keep less for the backward pass.

    What their norms give and, in gated MLPs, what the activation gives and its product with the other half, are made
    again when gradients are taken: a pass or two over each, and no matrix product.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            LeanLayer(layer)


class LeanLayer:
    """The forward of a layer, and of what is in it, that `spare_activations` puts in place of theirs."""

    def __init__(self, layer):
        self.layer = layer
        self.makers: dict[int, Callable[[], Tensor]] | None = None  # None: this pass keeps what it does
        self.made: list[Tensor] = []
        layer.forward = self.forward
        for part in layer.modules():
            if is_gated(type(part)):
                part.forward = functools.partial(self.mlp, part, part.forward)
            elif type(part).__name__.endswith("RMSNorm"):
                part.forward = functools.partial(self.norm, part.forward)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = type(self.layer).forward  # FSDP gives the layer another class
        if not torch.is_grad_enabled() or self.layer.gradient_checkpointing:  # that keeps nothing
            return plain(self.layer, *args, **kwargs)
        self.makers = {}
        try:
            with made_again(self.makers):
                return plain(self.layer, *args, **kwargs)
        finally:
            self.makers = None
            self.made.clear()

    def spare(self, made: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that need not be kept, for `make` makes it again."""
        self.makers[made.untyped_storage().data_ptr()] = make
        self.made.append(made)
        return made

    def mlp(self, mlp, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.makers is None:
            return plain(x)
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        active = self.spare(mlp.act_fn(gate), lambda: mlp.act_fn(gate))
        return mlp.down_proj(self.spare(active * up, lambda: mlp.act_fn(gate) * up))

    def norm(self, plain: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.makers is None:
            return plain(x)
        return self.spare(plain(x) if x.dtype == torch.float32 else KeepsInput.apply(x, plain), lambda: plain(x))


class KeepsInput(torch.autograd.Function):
    """A function of x that keeps nothing but x for its gradient. A norm keeps x in 32 bits, where it is in 16."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function = function
        return function(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(ctx.function(x), x, grad)[0], None


@functools.cache
def is_gated(kind: type[torch.nn.Module]) -> bool:
    """Whether modules of a kind are MLPs that do `GATED` and nothing else."""
    try:
        return GATED in inspect.getsource(kind.forward)
    except (OSError, TypeError):  # no source
        return False


def made_again(makers: dict[int, Callable[[], Tensor]]) -> torch.autograd.graph.saved_tensors_hooks:
    """In here autograd does not keep the tensors whose storage, by its address, has a maker: it makes them again.

    Views of such a tensor, too. Its storage has to live as long as this context: an address may be given anew.
    """

    def pack(x: Tensor) -> Tensor | tuple:
        make = makers.get(x.untyped_storage().data_ptr())
        return (make, x.size(), x.stride(), x.storage_offset()) if make else x

    def unpack(kept: Tensor | tuple) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        make, *view = kept
        with torch.no_grad():
            return make().as_strided(*view)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def decode(policy: "Policy", requests: Sequence["Request"], seeds: Sequence[int]) -> list[Reply]:
    """Samples a reply to each of B requests, with the configured top_p and length, up to its end token.

    `seeds` are those of the replies' generators.
    """
    model, device = policy.model.get_base_model(), policy.device
    rows = [Row(policy, request, seed) for request, seed in zip(requests, seeds, strict=True)]
    replies = [row.reply for row in rows]
    asked = [(tuple(request.prompt_ids), request.adapter) for request in requests]
    different, which = distinct(asked)  # a prompt with several replies is read once
    ids, real, positions = padded_left(policy, [prompt for prompt, _ in different], policy.config.max_new_tokens)
    length = ids.shape[1]
    adapted = torch.tensor([adapter for _, adapter in different], device=device)
    temperatures = torch.tensor([[request.temperature] for request in requests], device=device)
    cache, recorder = roomy_cache(model.config.get_text_config(), real.shape[1]), policy.recorder
    gathered = sharded(policy)
    recorder.able &= not gathered
    with torch.no_grad() if gathered else torch.inference_mode():  # what is gathered in the latter can't be trained on
        logits, _ = recorder.read(ids, positions, real[:, :length], adapted, cache)
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


def read(
    policy: "Policy",
    ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    last: Tensor,
    on: bool | Tensor,
    cache: DynamicCache,
) -> tuple[Tensor, Tensor]:
    """`Policy.read` of `ids` (B, T) behind what is in `cache`, at the places `last`; `on` as for `Policy.adapter`."""
    with policy.adapter(on):
        return policy.read(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last,
        )


def round_up(tokens: int) -> int:
    """How many tokens a CPU reads in place of so many."""
    return -(-tokens // ROUND) * ROUND


def attended(real: Tensor, t: int) -> Tensor:
    """Which of L places (B, L) the last t of them attend to, (B, 1, t, L): the real ones up to their own."""
    length = real.shape[1]
    upto = torch.ones(t, length, dtype=torch.bool, device=real.device).tril(length - t) if t > 1 else True
    return real[:, None, None] & upto


def distinct(items: Sequence[Item]) -> tuple[list[Item], list[int]]:
    """The different ones among `items`, and for each item which of those it is."""
    places = {item: place for place, item in enumerate(dict.fromkeys(items))}
    return list(places), [places[item] for item in items]


def together(adapted: Tensor) -> bool | Tensor:
    """Which rows have the adapters on (B,): one truth where it is the same for all, which takes less time."""
    return bool(adapted[0]) if (adapted == adapted[0]).all() else adapted


def cached(cache: DynamicCache) -> list[Tensor]:
    """The tensors of a cache: keys and values, layer by layer."""
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, with room for those of later tokens: they are written behind the ones before.

    DynamicLayer makes new tensors for every token, and to be given the memory takes longer than to fill it.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def place(self, whole: Sequence[Tensor], length: int) -> None:
        """Keeps keys and values in tensors `whole` (B, H, room, D), which hold those of `length` tokens."""
        self.whole, self.is_initialized = whole, True
        self.keys, self.values = (x[:, :, :length] for x in whole)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.place([x.new_empty(*x.shape[:2], self.room, x.shape[3]) for x in (keys, values)], 0)
        before = self.keys.shape[2]
        self.place(self.whole, before + keys.shape[2])
        self.keys[:, :, before:] = keys
        self.values[:, :, before:] = values
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.place([x[indices] for x in self.whole], self.keys.shape[2])


def roomy_cache(config, room: int) -> DynamicCache:
    """A model's cache; layers that keep every token have room for so many, and for what `round_up` adds to them."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room + ROUND) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def whole(cache: DynamicCache) -> list[Tensor]:
    """The tensors of a roomy cache, their room included: keys and values, layer by layer."""
    return [tensor for layer in cache.layers for tensor in layer.whole]


def place(cache: DynamicCache, tensors: Sequence[Tensor], length: int) -> DynamicCache:
    """Puts into a roomy cache what `whole` takes out of one; it holds so many tokens."""
    for layer, *pair in zip(cache.layers, tensors[::2], tensors[1::2], strict=True):
        layer.place(pair, length)
    return cache


class OnePass(torch.nn.Module):
    """`read` as a function of tensors alone, the cache's among them.

    The tokens have their keys and values written into those, `kept`, which are given back. `on`: whether the adapters
    are on, if that is the same for all rows; None: `adapted` (B,) says it of each.
    """

    def __init__(self, policy: "Policy", on: bool | None):
        super().__init__()
        self.policy, self.model, self.on = policy, policy.model.get_base_model(), on

    def forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor, last: Tensor, adapted: Tensor, *kept: Tensor
    ) -> tuple[Tensor, ...]:
        cache = roomy_cache(self.model.config.get_text_config(), room=0)
        place(cache, kept, mask.shape[-1] - ids.shape[1])
        on = adapted if self.on is None else self.on
        return *read(self.policy, ids, positions, mask, last, on, cache), *kept


class FixedLayer(DynamicLayer):
    """A layer of a cache whose keys and values stay where they are: those of a new token are written at `place`."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor):
        super().__init__()
        self.keys, self.values, self.place, self.is_initialized = keys, values, place, True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values


class Graph:
    """`OnePass` over one token of each row as a CUDA graph: its thousands of kernels are started as one.

    A graph reads and writes where it was captured. So its tensors are its own; only those of the cache, `kept`, with
    room for more tokens and perhaps more rows, it may share with graphs of more rows. It returns them, and given those
    again it has nothing to copy.
    """

    def __init__(self, policy: "Policy", given: Sequence[Tensor], kept: Sequence[Tensor]):
        ids, positions, mask, last, adapted, *_ = given
        self.policy, self.kept = policy, [x[: len(ids)] for x in kept]
        self.ids, self.positions, self.last, self.adapted = map(torch.clone, (ids, positions, last, adapted))
        self.mask = mask.new_zeros(*mask.shape[:-1], kept[0].shape[2])
        self.place = torch.zeros(1, dtype=torch.long, device=policy.device)
        self.cache = DynamicCache()
        self.cache.layers = [
            FixedLayer(*pair, self.place) for pair in zip(self.kept[::2], self.kept[1::2], strict=True)
        ]
        self.put(*given)
        self.play = self.captured() if policy.device.type == "cuda" else self.run

    def run(self) -> None:
        self.result = read(self.policy, self.ids, self.positions, self.mask, self.last, self.adapted, self.cache)

    def captured(self) -> Callable[[], None]:
        """What plays a capture of `run`, which has to be warm before."""
        aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.run()
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.run()
        return graph.replay

    def put(self, ids: Tensor, positions: Tensor, mask: Tensor, last: Tensor, adapted: Tensor, *before: Tensor) -> None:
        """Copies what is given to where the graph reads it."""
        length = mask.shape[-1] - 1  # of what is in the cache
        if before[0].data_ptr() != self.kept[0].data_ptr():
            for own, x in zip(self.kept, before, strict=True):
                own[:, :, :length] = x[:, :, :length]
        for own, x in ((self.ids, ids), (self.positions, positions), (self.adapted, adapted)):
            own.copy_(x)
        self.mask.zero_()
        self.mask[..., : length + 1] = mask
        self.place.fill_(length)

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        self.put(*given)
        self.play()
        return *self.result, *self.kept


class Recorder:
    """Makes a policy's passes that need no gradient; after a while it records them, and plays them from then on.

    On a GPU it records those over one token of each row, which saves the launches of the kernels (`Graph`). On a CPU it
    records all that are `SHORT`, which saves the Python around the operations, a large part of a small model's time.
    There it is torch.jit.trace, which is deprecated, but all that replaces it needs a C++ compiler. A recording is
    played only after it gave the model's own numbers twice: on a CPU bit for bit, on a GPU up to the rounding of 16
    bits.
    """

    def __init__(self, policy: "Policy"):
        model = policy.model.get_base_model()
        config = model.config.get_text_config()
        self.policy, self.kind = policy, policy.device.type
        self.pays = RECORDING_PAYS.get(self.kind)  # None: never
        self.sees_all = sees_all(config)
        self.able = self.pays is not None and steady(config) and model._can_compile_fullgraph
        # Frozen, a recording has fewer calls to make, but keeps what it casts weights to: their values of that day.
        self.uncast = len({p.dtype for p in policy.model.parameters()}) == 1
        self.shapes: list[tuple[int, int]] = []  # of a cache's tensors: heads, size of a head
        self.recordings: dict[Hashable, Callable] = {}
        self.passes: Counter[Hashable] = Counter()
        self.proofs: Counter[Hashable] = Counter()

    def rows_for(self, count: int) -> int:
        """How many rows a pass over a token each best has, for `count` of them."""
        if self.kind == "cpu":
            return max(count, 2)  # a row alone, a matrix-vector product, takes longer than two
        return 1 << (count - 1).bit_length() if self.able else count  # so that few graphs do

    def covers(self, rows: int, tokens: int) -> bool:
        """Whether a pass over so many tokens of each row is of those that are recorded."""
        short = rows * tokens <= SHORT if self.kind == "cpu" else tokens == 1
        return short and self.sees_all and not torch.is_grad_enabled()

    def read(
        self, ids: Tensor, positions: Tensor, real: Tensor, adapted: Tensor, cache: DynamicCache, count: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, K, V) and hidden states (B, K, H) at the last K = `count` of tokens `ids` (B, T).

        They follow what is in `cache`; which tokens of it and them are `real` (B, L), at which `positions` (B, T), and
        which rows are `adapted` (B,).
        """
        rows, tokens = ids.shape
        last, on = torch.arange(tokens - count, tokens, device=ids.device), together(adapted)
        length, covered = real.shape[1], self.covers(rows, tokens)
        if covered and tokens > 1:  # on a CPU; what is added on the right, none of the others sees
            extra = round_up(tokens) - tokens
            ids, positions, real = (torch.nn.functional.pad(x, (0, extra)) for x in (ids, positions, real))
            tokens += extra
        mask: Tensor | None = attended(real, tokens) if covered else real.long()
        if not covered and real.all():  # of (B, L), too, the model would make its own
            mask = None

        def own() -> tuple[Tensor, Tensor]:
            result = read(self.policy, ids, positions, mask, last, on, cache)
            if real.shape[1] > length:
                place(cache, whole(cache), length)
            return result

        case = self.case(rows, tokens, count, on, cache) if covered and self.able else None
        self.passes[case] += 1
        often = self.passes[case] > max(self.pays or 0, RARE * self.passes.total())
        kept = self.kept(cache, rows) if case and often else []
        if not kept:
            result = own()
            self.shapes = self.shapes or [x.shape[1::2] for x in cached(cache)]
            return result
        given = (ids, positions, mask, last, adapted, *kept)
        try:
            if case not in self.recordings:
                self.recordings[case] = self.record(given, case)
            with torch.jit.optimized_execution(False):
                logits, hidden, *after = self.recordings[case](*given)
        except (RuntimeError, TypeError, ValueError):  # not every model bears it
            self.able = False
            self.recordings.clear()  # a graph keeps memory
            return own()
        if self.proofs[case] < 2:
            played = [logits, hidden, *(x[:, :, :length].clone() for x in after)]  # the model may write in their place
            right = own()
            self.able = all(map(self.same, [*right, *cached(cache)], played))
            self.proofs[case] += 1
            return right
        place(cache, after, length)
        return logits, hidden

    def kept(self, cache: DynamicCache, rows: int) -> list[Tensor]:
        """The tensors of a roomy cache, new ones where it is empty; none as long as their shapes are not known."""
        if cache.layers[0].is_initialized:
            return whole(cache)
        room, like = cache.layers[0].room, self.policy.head.weight
        return [like.new_empty(rows, heads, room, size) for heads, size in self.shapes]

    def case(self, rows: int, tokens: int, count: int, on: bool | Tensor, cache: DynamicCache) -> Hashable | None:
        """Which recording to play for such a pass; None where the model itself is to make it."""
        if self.kind == "cpu":  # a single token's attention is other operations, and so are the products of few rows
            return tokens == 1, few(rows * tokens), few(rows * count), on if isinstance(on, bool) else None
        room = -(-cache.layers[0].room // ROOM) * ROOM
        return (room, rows) if room * rows <= KEPT_TOKENS else None

    def record(self, given: tuple[Tensor, ...], case: Hashable) -> Callable:
        """A recording of the pass over what is given."""
        if self.kind != "cpu":
            room, rows = case
            wider = [graph for (tokens, most), graph in self.recordings.items() if tokens == room and most > rows]
            kept = wider[0].kept if wider else [x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in given[5:]]
            return Graph(self.policy, given, kept)
        recording = torch.jit.trace(OnePass(self.policy, on=case[-1]).eval(), given, check_trace=False)
        return torch.jit.freeze(recording, optimize_numerics=False) if self.uncast else recording

    def same(self, right: Tensor, played: Tensor) -> bool:
        """Whether a recording gave what it should."""
        if self.kind == "cpu":
            return torch.equal(right, played)
        return bool((right - played).abs().max() <= 0.02 * right.abs().max())


def read_sparingly(policy: "Policy", batch: "Batch") -> tuple[Tensor, Tensor] | None:
    """`Policy.read` on the response positions of a batch, (B, T, V) and (B, T, H), with nothing read twice.

    A prompt that several rows share is read once, forward and backward: gradients reach it through the cache. How the
    base model's prompts begin is not read at all, once it was. None where fewer than half of the prompts could be
    spared, there is no such beginning, and the pass is none to be recorded, or the model is none for it.
    """
    model, (count, t), training = policy.model.get_base_model(), batch.response_mask.shape, torch.is_grad_enabled()
    covered = policy.recorder.covers(count, batch.input_ids.shape[1] - 1)
    if count == 1 and policy.gate.share is not False and not covered:  # no need to look at the tokens
        return None
    if sharded(policy) or not takes(policy):
        return None
    ids, real, positions = (x[:, :-1] for x in (batch.input_ids, batch.attention_mask, batch.positions))
    last = ids.shape[1] - t  # where the prompts' last tokens are
    rows = zip(ids[:, :last].tolist(), real[:, :last].tolist(), strict=True)
    different, which = distinct([tuple(itertools.compress(*row)) for row in rows])
    known = known_beginning(policy, different)
    shared = last > 0 and 2 * len(different) <= count
    if not (known or shared or covered) or (training and model.is_activation_checkpointing):
        return None  # layers that are recomputed fill no cache
    readers = [which.index(i) for i in range(len(different))] if shared else list(range(count))
    adapted = torch.full((count,), policy.gate.share, device=policy.device)
    config = model.config.get_text_config()
    cache = DynamicCache(config=config) if training else roomy_cache(config, ids.shape[1])
    if known:
        beginning = [x.expand(len(readers), -1, -1, -1) for x in policy.beginnings[known]]
        for layer, *pair in zip(cache.layers, beginning[::2], beginning[1::2], strict=True):
            layer.update(*pair)
    start, real = len(known), real & (positions >= len(known))
    real[:, :start] = True  # the cache's places
    if shared:
        one = ids[readers, start:last], positions[readers, start:last], real[readers, :last], adapted[: len(readers)]
        policy.recorder.read(*one, cache)
        cache.batch_select_indices(torch.tensor(which, device=policy.device))
        start = last
    return policy.recorder.read(ids[:, start:], positions[:, start:], real, adapted, cache, t)


def rounded_up(policy: "Policy", batch: "Batch") -> dict[str, Tensor | None]:
    """The inputs of a pass over a batch but its last token; on a CPU with padding on the right, `round_up`."""
    ids, real, positions = (x[:, :-1] for x in (batch.input_ids, batch.attention_mask, batch.positions))
    tokens, padded = ids.shape[1], not real.all()
    if policy.device.type == "cpu":  # what is added on the right, none of the others sees
        extra = max(min(round_up(tokens), policy.context) - tokens, 0)
        ids, real = (torch.nn.functional.pad(x, (0, extra)) for x in (ids, real))
        positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, extra + 1)], 1)
    return {"input_ids": ids, "attention_mask": real.long() if padded else None, "position_ids": positions}


def known_beginning(policy: "Policy", prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The one of `Policy.beginnings` that all the prompts go on from, if it is the base model that reads; else ().

    Its keys and values stand there then.
    """
    begins = policy.beginnings if policy.gate.share is False else ()
    known = next((b for b in begins if b and all(p[: len(b)] == b and len(p) > len(b) for p in prompts)), ())
    if known and not policy.beginnings[known]:
        model = policy.model.get_base_model()
        cache = DynamicCache(config=model.config.get_text_config())
        with torch.no_grad():
            model(torch.tensor([known], device=policy.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        policy.beginnings[known] = cached(cache)
    return known


def sharded(policy: "Policy") -> bool:
    """Whether the layers gather their weights from several processes when they are called (FSDP)."""
    return hasattr(policy.layers[0].get_base_layer().weight, "to_local")


def padded_left(policy: "Policy", prompts: Sequence[Sequence[int]], room: int) -> tuple[Tensor, Tensor, Tensor]:
    """The prompts (B, P), which of the P + `room` places of each row are real (B, P + room), and positions (B, P)."""
    longest = max(map(len, prompts))
    pad = [longest - len(prompt) for prompt in prompts]
    rows = [[policy.pad_id] * p + list(prompt) for p, prompt in zip(pad, prompts, strict=True)]
    places = torch.arange(longest + room, device=policy.device)
    real = places >= torch.tensor(pad, device=policy.device).unsqueeze(1)
    return torch.tensor(rows, device=policy.device), real, (real[:, :longest].cumsum(-1) - 1).clamp(min=0)


class Row:
    """One reply in the making."""

    def __init__(self, policy: "Policy", request: "Request", seed: int):
        self.policy, self.request, self.reply, self.done = policy, request, Reply(), False
        self.generator = torch.Generator(policy.device).manual_seed(seed)
        self.stream = request.stream(policy.tokenizer)

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
