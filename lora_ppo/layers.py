"""Layers of the base model made quicker, or made to keep less for the backward pass.

A CPU's products (`speed_up_products`), a GPU's with 4-bit weights (`copy_weights`), and activations that are made again
when gradients are taken (`spare_activations`).
"""

import functools
import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_ppo.settings import ConfigError

MANY = 8  # tokens of a pass from which a copy pays; decoding 16 replies of a 4 B model takes 0.7 of the time with it


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


def row_blocks(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of a single row, with a block of rows of W for each thread: MKL takes one for all of them."""
    (rows, inputs), threads = weight.shape, torch.get_num_threads()
    if rows % threads:
        return product(x, weight)
    blocks = weight.view(threads, rows // threads, inputs)
    return torch.bmm(blocks, x.t().expand(threads, inputs, 1)).view(1, rows)


def speed_up_products(model) -> None:
    """Makes the frozen float32 linear layers of a model on an x86 CPU quick.

    There oneDNN takes 10 to 30 % less time than MKL, which torch asks in float32 (but not in 16 bits); a single row, as
    in decoding, takes little more than half of it in blocks (`row_blocks`).
    """
    if not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"):
        return

    def quick_forward(layer):
        def forward(x: Tensor) -> Tensor:
            if layer.weight.requires_grad:
                return torch.nn.functional.linear(x, layer.weight, layer.bias)
            if x.requires_grad and torch.is_grad_enabled():
                return FrozenProduct.apply(x, layer.weight, layer.bias)
            if x.numel() != x.shape[-1]:
                return product(x, layer.weight, layer.bias)
            result = row_blocks(x.reshape(1, -1), layer.weight).view(*x.shape[:-1], -1)
            return result if layer.bias is None else result + layer.bias

        return forward

    for module in model.modules():
        on_cpu = type(module) is torch.nn.Linear and module.weight.device.type == "cpu"
        if on_cpu and module.weight.dtype == torch.float32:
            module.forward = quick_forward(module)


def copy_weights(model, wanted: str) -> bool:
    """Keeps a copy in 16 bits of a model's 4-bit weights, for passes over `MANY` tokens or more; says whether it does.

    In long passes bitsandbytes makes that copy of each weight, once more in the backward pass, and throws it away:
    there the numbers are the same, in shorter ones up to rounding. The shortest read the 4-bit weights, a quarter of
    the size.
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
            if is_gated(part):
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


def is_gated(mlp) -> bool:
    """Whether a module is an MLP of the usual kind, which `LeanLayer.mlp` takes apart: it does the same to a token."""
    parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")]
    if None in parts:
        return False
    gate, up, down, act = parts
    with torch.no_grad():
        dtype = getattr(gate, "compute_dtype", gate.weight.dtype)  # of weights in 4 bits
        x = torch.linspace(-1, 1, gate.in_features, dtype=dtype, device=gate.weight.device).view(1, 1, -1)
        return torch.equal(mlp(x), down(act(gate(x)) * up(x)))


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
