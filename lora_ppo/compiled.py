"""A reply's passes over one token on a CPU, the layers and the head compiled ahead of time.

torch.export writes down what one decoder layer does with one token, and AOTInductor makes a C++ library of it. The
weights are arguments: one library serves all layers, whatever training has made of the adapters since. A process of
its own compiles, once for each kind of model, and keeps the result on disk. Nobody waits for it: until it is there,
and where it can't be had, the layers run as they are.

A product is the sum of each row of the weights times the input, with all threads at work: as fast as memory gives the
weights. What torch calls for a matrix times a vector takes one thread in float32, and in bfloat16 longer still.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ppo.caches import FixedLayer, read, whole
from lora_ppo.files import cache_folder

WORTH = 50_000_000  # parameters: a smaller model has answered many times before a compiler is done
ROOT = Path(__file__).resolve().parents[1]


# -------------------------------------------------------------------------------------------- where replies are written


def compilable(model) -> bool:
    """Whether a model's passes over one token are worth a compilation."""
    return model.device.type == "cpu" and sum(p.numel() for p in model.parameters()) >= WORTH


def compiler() -> str | None:
    """The C++ compiler that torch finds."""
    return next(filter(shutil.which, [os.environ.get("CXX", "g++"), "clang++"]), None)


class CompiledPass:
    """Passes over one token of one row, through the compiled layers and head of a policy's model."""

    def __init__(self, policy, adapter: str):
        self.policy, self.head, model = policy, policy.head, policy.model.get_base_model()
        self.layers = [m for m in model.get_decoder().modules() if isinstance(m, GradientCheckpointingLayer)]
        weights = [named_weights(layer, adapter) for layer in self.layers]
        self.weights = [[*own.values()] for own in weights]
        shapes = [{name: [list(x.shape), kind(x)] for name, x in own.items()} for own in weights]
        scalings = {layer.scaling[adapter] for layer in policy.layers if adapter in layer.scaling}
        if any(own != shapes[0] for own in shapes) or len({*map(type, self.layers)}) != 1 or len(scalings) != 1:
            raise ValueError("layers of several kinds")
        [self.scaling] = scalings
        spec = {
            "layer": [type(self.layers[0]).__module__, type(self.layers[0]).__qualname__],
            "config": model.config.get_text_config().to_json_string(use_diff=False),
            "dtype": kind(self.head.weight),
            "weights": shapes[0],
            "head": [*self.head.weight.shape, self.head.bias is not None],
        }
        self.library = library(json.dumps(spec))

    @classmethod
    def of(cls, policy, adapter: str) -> "CompiledPass | None":
        """Those of a policy and an adapter; None where they are not wanted, or layers are of several kinds."""
        wanted = getattr(policy.config, "compile", "off") == "auto" and compilable(policy.model)
        with contextlib.suppress(AttributeError, ValueError):
            return cls(policy, adapter) if wanted else None

    def read(self, ids: Tensor, positions: Tensor, real: Tensor, on: bool, cache: DynamicCache) -> tuple[Tensor, ...]:
        """What `caches.read` says of `ids` (1, 1), and the tensors of the roomy cache, which it writes into."""
        length, room = real.shape[1], cache.layers[0].room
        mask = torch.nn.functional.pad(real, (0, room - length))[:, None, None]
        place, share = torch.tensor([length - 1]), torch.full((1, 1), self.scaling * on)

        def layer(number: int, hidden: Tensor, **given: Any) -> Tensor:
            kept, turns = cache.layers[number].whole, given["position_embeddings"]
            return self.library.layer([hidden, *turns, mask, place, *kept, share, *self.weights[number]])[0]

        def head(hidden: Tensor) -> Tensor:
            return self.library.head([hidden, *self.head.parameters()])[0]

        modules = [*self.layers, self.head]
        plain = [vars(module).get("forward") for module in modules]
        for number, module in enumerate(self.layers):
            module.forward = partial(layer, number)
        self.head.forward = head
        try:
            return *read(self.policy, ids, positions, mask, torch.tensor([0]), on, cache), *whole(cache)
        finally:
            for module, forward in zip(modules, plain, strict=True):
                del module.forward
                if forward:
                    module.forward = forward


def named_weights(layer: torch.nn.Module, adapter: str) -> dict[str, Tensor]:
    """The weights of a layer by their names in the base model; those of its adapters are called `down` and `up`."""
    names = {".base_layer.": ".", f".lora_A.{adapter}.weight": ".down", f".lora_B.{adapter}.weight": ".up"}
    found = {}
    for name, parameter in layer.named_parameters():
        for old, new in names.items():
            name = name.replace(old, new)
        if ".lora_" not in name:
            found[name] = parameter.detach()
    return found


def kind(x: Tensor) -> str:
    """The name of a tensor's dtype."""
    return str(x.dtype).removeprefix("torch.")


@functools.cache
def library(spec: str) -> "Library":
    """The one of a spec, in JSON."""
    return Library(spec)


class Library:
    """The compiled functions `layer` and `head`, once they are `ready`; `why_not` says why they will never be."""

    def __init__(self, spec: str):
        self.spec, self.ready, self.why_not = spec, False, ""
        self.thread = threading.Thread(target=self.load, name="compile", daemon=True)
        self.thread.start()

    def load(self) -> None:
        """Loads what was compiled; where there is nothing, or it can't be loaded, has it compiled first."""
        made_of = [self.spec, torch.__version__, dict(torch.cpu.get_capabilities())]
        made_of.append(Path(__file__).read_text(encoding="utf-8"))
        name = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:24]
        self.folder = cache_folder() / "compiled" / name
        try:
            if self.folder.exists():
                with contextlib.suppress(Exception):
                    self.open()
                    return
                shutil.rmtree(self.folder)
            compile_apart(self.spec, self.folder)
            self.open()
        except Exception as error:  # no compiler, no room on the disk, a model that can't be exported
            self.why_not = " ".join(str(error).split())[:200] or type(error).__name__

    def open(self) -> None:
        """Loads the packages in the folder. Raises whatever the loader does where one is broken or missing."""
        packages = (str(self.folder / f"{part}.pt2") for part in ("layer", "head"))
        self.layer, self.head = (torch._inductor.aoti_load_package(p).loader.boxed_run for p in packages)
        self.ready = True

    def is_ready(self, notice: Callable[[str], None]) -> bool:
        """Whether it can be called; where it never will be, `notice` is told so, once."""
        if self.why_not:
            notice(
                f"Compiling the model's layers failed ({self.why_not}). Answers are written without; see compile=off."
            )
            self.why_not = ""
        return self.ready


def compile_apart(spec: str, folder: Path) -> None:
    """Has a process write layer.pt2 and head.pt2 into a new `folder`. Raises RuntimeError with the reason."""
    command = [sys.executable, "-m", "lora_ppo.compiled", str(folder)]
    how = {"capture_output": True, "text": True, "start_new_session": True}  # Ctrl-C is not for it
    done = subprocess.run(command, cwd=ROOT, input=spec, **how)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it ended without a word"])[-1])


# --------------------------------------------------------------------------------------- in the process that compiles


def product(x: Tensor, weight: Tensor) -> Tensor:
    """W x in float32: (1, I), (O, I) -> (1, O)."""
    return (weight.float() * x.float()).sum(-1).unsqueeze(0)


class AsFunction(torch.nn.Module):
    """A module as a function of its weights, which are given in the order of `names`, and of `share`."""

    def __init__(self, module: torch.nn.Module, names: list[str]):
        super().__init__()
        self.inner, self.names = [module], names  # in a list: its own weights are not exported
        for part in module.modules():
            if type(part) is torch.nn.Linear:
                part.forward = partial(self.linear, part)

    def linear(self, layer: torch.nn.Linear, x: Tensor) -> Tensor:
        """What a linear layer makes of one token, with `share` of its adapter: (1, 1, I) -> (1, 1, O)."""
        row = x.flatten(0, -2)
        result = product(row, layer.weight)
        if layer.bias is not None:
            result = result + layer.bias.float()
        if hasattr(layer, "down"):
            down, up = layer.down.to(x.dtype), layer.up.to(x.dtype)
            result = result + self.share * product(product(row, down).to(x.dtype), up)
        return result.to(x.dtype).unflatten(0, x.shape[:-1])

    def call(self, weights: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return torch.func.functional_call(self.inner[0], dict(zip(self.names, weights, strict=True)), args, kwargs)


class OneLayer(AsFunction):
    def forward(self, hidden, cos, sin, mask, place, keys, values, share, weights):
        self.share, cache = share, DynamicCache()
        cache.layers = [FixedLayer(keys, values, place)]
        given = {"attention_mask": mask, "position_embeddings": (cos, sin), "past_key_values": cache, "use_cache": True}
        return self.call(weights, hidden, **given)


class Head(AsFunction):
    def forward(self, hidden, weights):
        return self.call(weights, hidden)


def exported(spec: dict[str, Any]) -> dict[str, torch.export.ExportedProgram]:
    """What is compiled for a spec, by its name."""
    dtype, (module, name), (outputs, inputs, biased) = getattr(torch, spec["dtype"]), spec["layer"], spec["head"]
    config = AutoConfig.for_model(**json.loads(spec["config"]))
    config._attn_implementation = "sdpa"
    layer = getattr(importlib.import_module(module), name)(config, layer_idx=0).to(dtype).eval()
    head = torch.nn.Linear(inputs, outputs, bias=biased, dtype=dtype)
    for path, (shape, its) in spec["weights"].items():
        owner, _, last = path.rpartition(".")
        if last in ("down", "up"):
            weight = torch.nn.Parameter(torch.zeros(shape, dtype=getattr(torch, its)))
            layer.get_submodule(owner).register_parameter(last, weight)
    width, room = layer.self_attn.head_dim, torch.export.Dim("room", min=16)
    hidden, cos, sin = (torch.zeros(1, 1, n, dtype=dtype) for n in (inputs, width, width))
    keys, values = (torch.zeros(1, config.num_key_value_heads, 64, width, dtype=dtype) for _ in range(2))
    mask, place, share = torch.ones(1, 1, 1, 64, dtype=torch.bool), torch.tensor([5]), torch.ones(1, 1)
    weights = [layer.get_parameter(path) for path in spec["weights"]]
    given = hidden, cos, sin, mask, place, keys, values, share, weights
    sizes = None, None, None, {3: room}, None, {2: room}, {2: room}, None, [None] * len(weights)
    layer, head = OneLayer(layer, [*spec["weights"]]), Head(head, [name for name, _ in head.named_parameters()])
    with torch.no_grad():
        return {
            "layer": torch.export.export(layer, given, dynamic_shapes=sizes, strict=False),
            "head": torch.export.export(head, (hidden, [*head.inner[0].parameters()]), strict=False),
        }


# What a product reads is worked out before it, not once for each row of the weights.
OPTIONS = {"realize_reads_threshold": 1, "cpp.enable_floating_point_contract_flag": "fast"}


def main() -> None:
    """Compiles the spec that is read into the folder that the argument names. It goes on if who asked is gone."""
    os.nice(10)
    torch.set_num_threads(os.cpu_count() or 1)  # how many there are when it runs is another matter
    folder = Path(sys.argv[1])
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{place}/work"
        made = Path(place) / "made"
        made.mkdir()
        for name, program in exported(json.load(sys.stdin)).items():
            target = str(made / f"{name}.pt2")
            torch._inductor.aoti_compile_and_package(program, package_path=target, inductor_configs=OPTIONS)
        with contextlib.suppress(OSError):  # another tutor was first
            made.rename(folder)


if __name__ == "__main__":
    main()
