"""Quicker products, and layers that keep less for the backward pass."""

import copy

import pytest
import torch
from support.decoding import prompts
from support.tiny import ARCHITECTURES, randomize_adapter, tiny_config

from config import Config
from lora_ppo.forward import collate, token_logprobs_and_values
from lora_ppo.layers import LeanLayer, is_gated, made_again, speed_up_products
from lora_ppo.loading import load_policy
from lora_ppo.policy import gradient_dropout
from lora_ppo.training import recomputing
from tools.bench.measure import MB, profile


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 17, 150])
def test_quick_products_and_their_gradients_are_those_of_float64(rows, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 80, bias=bias).requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    speed_up_products(torch.nn.ModuleList([layer]))
    for shape in ((rows, 48), (1, rows, 48)):
        x = torch.randn(shape, requires_grad=True)
        weights = torch.randn(80, rows).t()  # of the sum below: a gradient that does not lie row by row
        (gradient,) = torch.autograd.grad((layer(x) * weights).sum(), x)
        y = x.detach().double().requires_grad_()
        (wanted,) = torch.autograd.grad((exact(y) * weights).sum(), y)
        torch.testing.assert_close(gradient.double(), wanted, atol=1e-5, rtol=1e-5)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                torch.testing.assert_close(layer(x).double(), exact(y), atol=1e-5, rtol=1e-5)
                columns = x.detach().mT.contiguous().mT  # that do not lie row by row
                torch.testing.assert_close(layer(columns).double(), exact(y), atol=1e-5, rtol=1e-5)


def test_a_layer_that_is_trained_after_all_keeps_its_gradient_and_16_bits_are_left_to_torch():
    trained, half = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    speed_up_products(torch.nn.ModuleList([trained, half]))
    trained(torch.ones(40, 8)).sum().backward()
    assert trained.weight.grad.eq(40).all()
    assert "forward" not in vars(half)


def lean_modules(policy) -> list:
    """The modules whose forward keeps less for the backward pass."""

    def is_lean(forward) -> bool:
        return isinstance(getattr(getattr(forward, "func", forward), "__self__", None), LeanLayer)

    return [module for module in policy.model.modules() if is_lean(vars(module).get("forward"))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_that_keep_less_have_the_same_gradients(architecture, tiny_folder, dtype, dropout):
    policy, _ = load_policy(tiny_config(tiny_folder(architecture), dtype=dtype, lora_dropout=dropout))
    randomize_adapter(policy)
    batch = collate(prompts(policy), [[9, 8, 7], [6, 5], [4]], policy.pad_id, policy.device)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        with gradient_dropout(policy):
            logprobs, _, logits = token_logprobs_and_values(policy, batch)
        loss = logprobs.sum() + logits.square().mean()
        parameters = tuple(policy.parameters.values())
        twice = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for _ in range(2)]
        return [*twice[0], *twice[1]]

    lean, modules = gradients(), lean_modules(policy)
    kinds = {"DecoderLayer", "RMSNorm", "MLP"} - ({"MLP"} if architecture == "phi3" else set())  # its MLP is another
    assert {kind for kind in kinds for module in modules if type(module).__name__.endswith(kind)} == kinds
    assert sum(type(module).__name__.endswith("DecoderLayer") for module in modules) == 2
    for module in modules:
        del module.forward
    for ours, right in zip(lean, gradients(), strict=True):
        assert ours is right or torch.equal(ours, right)


def test_an_mlp_that_does_more_than_the_usual_is_left_as_it_is(tiny_folder):
    """It has the parts of the usual one, and clamps what they make."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    mlp = policy.model.get_base_model().model.layers[0].mlp
    del mlp.forward
    assert is_gated(mlp)

    class Clamped(type(mlp)):
        def forward(self, x):
            return super().forward(x).clamp(-1e-3, 1e-3)

    mlp.__class__ = Clamped
    assert not is_gated(mlp)
    assert not is_gated(mlp.act_fn)


def test_a_view_of_what_is_made_again_is_the_same_view():
    torch.manual_seed(0)
    a, b = torch.randn(3, 4), torch.randn(2, 5, requires_grad=True)
    wave = a.sin()
    with made_again({wave.untyped_storage().data_ptr(): lambda: made.append(1) or a.sin()}):
        result = wave[1:, 1:].t() @ b
    made: list[int] = []
    result.sum().backward()
    assert made
    torch.testing.assert_close(b.grad, a.sin()[1:, 1:].sum(1, keepdim=True).expand(2, 5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_layers_keep_and_that_recomputed_ones_keep_nothing(dtype):
    """Each token less by two tensors of the MLP's inner width, and what the two norms give; in 16 bits what norms are
    given is kept as it is, not in 32."""
    policy, _ = load_policy(Config(device="cpu", dtype=dtype))
    batch = collate([[300] * 150], [[301] * 257], policy.pad_id, policy.device)
    config = policy.model.config
    size = 2 * config.intermediate_size + 2 * config.hidden_size * (2 if dtype == "bfloat16" else 1)
    spared = config.num_hidden_layers * 406 * size * policy.model.dtype.itemsize / MB  # the last token is not read

    for layer in policy.model.get_base_model().model.layers:  # as FSDP makes them, of which recomputation takes note
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})

    def peaks() -> list[float]:
        """MB of tensors in a forward pass with its graph; without and with gradient checkpointing."""
        found = [profile(lambda: token_logprobs_and_values(policy, batch))["tensors MB"]]
        policy.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        with recomputing(policy):
            found.append(profile(lambda: token_logprobs_and_values(policy, batch))["tensors MB"])
        policy.model.get_base_model().gradient_checkpointing_disable()
        return found

    lean = peaks()
    for module in lean_modules(policy):
        del module.forward
    plain = peaks()
    assert plain[0] - lean[0] == pytest.approx(spared, rel=0.05)
    assert plain[1] == pytest.approx(lean[1], rel=1e-3)
    assert lean[1] < lean[0] / 2
