"""Passes that write replies, by quicker means: CUDA graphs on a GPU, compiled layers on a CPU."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from lora_ppo.caches import FixedLayer, cached, place, read, sees_all, steady, together, whole
from lora_ppo.compiled import CompiledPass

RECORDING_PAYS = 16  # passes: to record one takes as long as it saves on as many
RARE = 0.01  # of all passes; cases that are no more are not worth the memory of a recording
ROOM = 256  # a CUDA graph has room for a multiple of so many tokens
KEPT_SHARE = 0.25  # of a GPU's spare memory: a graph's cache is kept, and what it fills is missing elsewhere


class Graph:
    """`read` of one token of each row as a CUDA graph: its thousands of kernels are started as one.

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
    """Makes a policy's passes behind a cache; those over one token of each row, which write replies, by quicker means.

    On a GPU these are recorded after a while, and played from then on, which saves the launches of the kernels
    (`Graph`). On a CPU that of a single row goes through compiled layers, once there are any (`CompiledPass`). Either
    is used only after it gave the model's own numbers twice, up to rounding.
    """

    def __init__(self, policy, adapter: str):
        model = policy.model.get_base_model()
        config = model.config.get_text_config()
        self.policy, self.kind, self.pays = policy, policy.device.type, RECORDING_PAYS
        self.sees_all = sees_all(config)
        self.able = steady(config) and model._can_compile_fullgraph
        self.compiled = CompiledPass.of(policy, adapter) if self.able else None
        self.recordings: dict[Hashable, Graph] = {}
        self.passes: Counter[Hashable] = Counter()
        self.proofs: Counter[Hashable] = Counter()

    def rows_for(self, count: int) -> int:
        """How many rows a pass over a token each best has, for `count` of them."""
        return 1 << (count - 1).bit_length() if self.able and self.kind == "cuda" else count  # so that few graphs do

    def read(
        self, ids: Tensor, positions: Tensor, real: Tensor, adapted: Tensor, cache: DynamicCache, count: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, K, V) and hidden states (B, K, H) at the last K = `count` of tokens `ids` (B, T).

        They follow what is in `cache`; which tokens of it and them are `real` (B, L), at which `positions` (B, T), and
        which rows are `adapted` (B,).
        """
        rows, tokens = ids.shape
        last, on = torch.arange(tokens - count, tokens, device=ids.device), together(adapted)
        # A graph's tensors are of the mode that they were captured in, and its results are overwritten when it is
        # played again: it is for the decode loop alone, which reads them at once and runs in inference mode.
        single = tokens == 1 and self.sees_all and torch.is_inference_mode_enabled()
        mask = real[:, None, None] if single else None if real.all() else real.long()

        def own() -> tuple[Tensor, Tensor]:
            return read(self.policy, ids, positions, mask, last, on, cache)

        case = self.case(rows, cache) if single and self.able else None
        if case is None:
            return own()
        length = real.shape[1]
        try:
            if self.kind == "cpu":
                played = self.compiled.read(ids, positions, real, on, cache)
            else:
                played = self.play(case, (ids, positions, mask, last, adapted, *whole(cache)))
        except (RuntimeError, TypeError, ValueError):  # not every model bears it
            self.able = False
            self.recordings.clear()  # a graph keeps memory
            return own()
        logits, hidden, *after = played
        if self.proofs[case] < 2:
            played = [logits, hidden, *(x[:, :, :length].clone() for x in after)]  # the model may write in their place
            right = own()
            self.able = all(map(self.same, [*right, *cached(cache)], played))
            self.proofs[case] += 1
            return right
        place(cache, after, length)
        return logits, hidden

    def begin(self, begun: Sequence[int], adapted: Tensor, cache: DynamicCache) -> None:
        """Puts into an empty cache what several rows begin with, all `adapted` (B,) or none: it is read once."""
        real = torch.ones(1, len(begun), dtype=torch.bool, device=adapted.device)
        self.read(torch.tensor([begun], device=adapted.device), real.cumsum(-1) - 1, real, adapted[:1], cache)
        cache.batch_select_indices(torch.zeros(len(adapted), dtype=torch.long, device=adapted.device))

    def case(self, rows: int, cache: DynamicCache) -> tuple[int, int] | None:
        """Which recording to play for such a pass; None where the model itself is to make it."""
        if self.kind == "cpu":
            ready = rows == 1 and self.compiled and self.compiled.library.is_ready(self.policy.notice)
            return (0, 1) if ready else None
        if self.kind != "cuda":
            return None
        room = -(-cache.layers[0].room // ROOM) * ROOM
        case = room, rows
        self.passes[case] += 1
        if self.passes[case] <= max(self.pays, RARE * self.passes.total()):
            return None
        size = rows * room * sum(x.shape[1] * x.shape[3] * x.element_size() for x in cached(cache))
        fits = case in self.recordings or size <= KEPT_SHARE * spare_memory(self.policy.device)
        return case if fits else None

    def play(self, case: tuple[int, int], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What the graph for a case makes of what is given; it is captured first where there is none."""
        room, rows = case
        if case not in self.recordings:
            wider = [graph for (tokens, most), graph in self.recordings.items() if tokens == room and most > rows]
            kept = wider[0].kept if wider else [x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in given[5:]]
            self.recordings[case] = Graph(self.policy, given, kept)
        return self.recordings[case](*given)

    def same(self, right: Tensor, played: Tensor) -> bool:
        """Whether what is played gave what it should; the sums of compiled layers are rounded in another order.

        In 16 bits the model's own logits are 1 to 3 % of their norm from those in 32, compiled layers' 1 to 2 %.
        """
        if self.kind == "cpu":
            return bool((right - played).norm() <= (1e-4 if right.dtype == torch.float32 else 0.1) * right.norm())
        return bool((right - played).abs().max() <= 0.02 * right.abs().max())


def spare_memory(device: torch.device) -> float:
    """The bytes of a GPU that are free, or that torch keeps ready; infinite where there is no GPU to fill."""
    if device.type != "cuda":
        return math.inf
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


Item = TypeVar("Item", bound=Hashable)


def distinct(items: Sequence[Item]) -> tuple[list[Item], list[int]]:
    """The different ones among `items`, and for each item which of those it is."""
    places = {item: place for place, item in enumerate(dict.fromkeys(items))}
    return list(places), [places[item] for item in items]
