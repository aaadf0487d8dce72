"""Passes over few tokens, recorded after a while and played from then on: CUDA graphs on a GPU, traces on a CPU.

Here too: the cache with room for tokens to come, which recordings write into.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lora_ppo.layers import few

SHORT = 256  # tokens of a pass that a CPU records; with more of them, the time that Python takes does not matter
RECORDING_PAYS = {"cpu": 64, "cuda": 16}  # after so many passes: to record one takes as long as it saves on as many
RARE = 0.01  # of all passes; cases that are no more are not worth the memory of a recording
ROUND = 8  # oneDNN compiles a product for each number of rows, and keeps it: a CPU reads a multiple of so many tokens
ROOM = 256  # a CUDA graph has room for a multiple of so many tokens
KEPT_TOKENS = 4096  # of all rows: a graph's cache is kept, and what it fills is missing elsewhere
CACHED_LAYERS = {"full_attention", "sliding_attention"}


def takes(policy) -> bool:
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


def sharded(policy) -> bool:
    """Whether the layers gather their weights from several processes when they are called (FSDP)."""
    return hasattr(policy.layers[0].get_base_layer().weight, "to_local")


def read(
    policy,
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

    def __init__(self, policy, on: bool | None):
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

    def __init__(self, policy, given: Sequence[Tensor], kept: Sequence[Tensor]):
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
        with torch.cuda.device(self.policy.device):  # which need not be the current one
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

    def __init__(self, policy):
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
        short = rows * tokens <= SHORT
        if self.kind != "cpu":
            # A graph's tensors are of the mode that they were captured in, and its results are overwritten when it is
            # played again: it is for the decode loop alone, which reads them at once and runs in inference mode.
            short = tokens == 1 and torch.is_inference_mode_enabled()
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


Item = TypeVar("Item", bound=Hashable)


def distinct(items: Sequence[Item]) -> tuple[list[Item], list[int]]:
    """The different ones among `items`, and for each item which of those it is."""
    places = {item: place for place, item in enumerate(dict.fromkeys(items))}
    return list(places), [places[item] for item in items]
