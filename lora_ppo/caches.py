"""One pass behind a cache, which models it can be made with, and caches: with room for more tokens, or remembered."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lora_ppo.chat import encode_chat
from lora_ppo.prompts import ROLES

ROUND = 8  # oneDNN compiles a product for each number of rows, and keeps it: a CPU reads a multiple of so many tokens
BEGINNING = 64  # tokens from which on it pays to read once what prompts begin with
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


def round_up(tokens: int, device: torch.device) -> int:
    """How many tokens of a prompt, or of it and an answer, are read in place of so many."""
    return -(-tokens // ROUND) * ROUND if device.type == "cpu" else tokens


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
            self.place([x.new_zeros(*x.shape[:2], self.room, x.shape[3]) for x in (keys, values)], 0)
        before = self.keys.shape[2]
        self.place(self.whole, before + keys.shape[2])
        self.keys[:, :, before:] = keys
        self.values[:, :, before:] = values
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        self.place([x[indices] for x in self.whole], self.keys.shape[2])


def roomy_cache(config, room: int) -> DynamicCache:
    """A model's cache; layers that keep every token have room for so many."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer(room) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def whole(cache: DynamicCache) -> list[Tensor]:
    """The tensors of a roomy cache, their room included: keys and values, layer by layer."""
    return [tensor for layer in cache.layers for tensor in layer.whole]


def place(cache: DynamicCache, tensors: Sequence[Tensor], length: int) -> DynamicCache:
    """Puts into a roomy cache what `whole` takes out of one; it holds so many tokens."""
    for layer, *pair in zip(cache.layers, tensors[::2], tensors[1::2], strict=True):
        layer.place(pair, length)
    return cache


class FixedLayer(DynamicLayer):
    """A layer of a cache whose keys and values stay where they are: those of a new token are written at `place`."""

    def __init__(self, keys: Tensor, values: Tensor, place: Tensor):
        super().__init__()
        self.keys, self.values, self.place, self.is_initialized = keys, values, place, True

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.place, keys)
        self.values.index_copy_(2, self.place, values)
        return self.keys, self.values


class Beginnings:
    """How the prompts of each role begin, whatever is asked, and what the base model makes of it: its weights stay.

    A pass is cut where the role's beginning ends, whether that is remembered or read: in 16 bits, read apart and read
    together round to different numbers. `kept` has keys and values, layer by layer, once they were needed.
    """

    def __init__(self, policy):
        self.policy = policy
        self.kept: dict[tuple[int, ...], list[Tensor]] = {}
        if steady(policy.model.config.get_text_config()) and takes(policy) and not sharded(policy):
            for role in (getattr(policy.prompts, name) for name in ROLES):
                asked = [tuple(encode_chat(policy.tokenizer, role.messages(text))) for text in "AB"]
                if same := common_beginning(asked):
                    self.kept[asked[0][:same]] = []

    def of(self, prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The one that all of these prompts begin with and go on from; () if there is none."""
        return next((b for b in self.kept if prompts and all(p[: len(b)] == b != p for p in prompts)), ())

    def shared(self, prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """That one, or else what several prompts have in common, where that is long; () if it is not."""
        if (begun := self.of(prompts)) or not sees_all(self.policy.model.config.get_text_config()):
            return begun
        return prompts[0][: common_beginning(prompts)] if prompts else ()

    def put(self, begun: tuple[int, ...], rows: int, cache: DynamicCache) -> None:
        """Puts one of them into an empty cache, for so many rows with the adapters off."""
        if not self.kept[begun]:
            ids = torch.tensor([begun], device=self.policy.device)
            positions, own = torch.arange(len(begun), device=ids.device).unsqueeze(0), DynamicCache()
            with torch.no_grad():
                read(self.policy, ids, positions, None, positions[0, -1:], False, own)
            self.kept[begun] = cached(own)
        tensors = [x.expand(rows, -1, -1, -1) for x in self.kept[begun]]
        for layer, *pair in zip(cache.layers, tensors[::2], tensors[1::2], strict=True):
            layer.update(*pair)


def common_beginning(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens different prompts begin with in common; 0 for fewer than BEGINNING, or a single prompt."""
    first, last = min(prompts), max(prompts)  # in the order of their tokens: all others lie between
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return same if len(prompts) > 1 and same >= BEGINNING else 0
