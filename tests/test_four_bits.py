"""Weights in 4 bits, and their copy in 16, against the weights as their format defines them.

The program takes 4-bit weights with CUDA alone; the layers here are bitsandbytes' own, on a CPU. There they are right
if they are not packed anew for some processors' instructions, and if each row of a weight is of whole blocks, of 64.
"""

import pytest
import torch
from support.tiny import CHATML, randomize_adapter, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_ppo import decode, layers
from lora_ppo.chat import encode_chat
from lora_ppo.forward import collate
from lora_ppo.generate import Request
from lora_ppo.layers import MANY, copy_weights
from lora_ppo.loading import load_policy
from lora_ppo.settings import ConfigError
from lora_ppo.step import ppo_step

Linear4bit = pytest.importorskip("bitsandbytes.nn").Linear4bit

# The quantiles of NormalFloat, as Dettmers et al. 2023 give them (https://arxiv.org/abs/2305.14314, appendix E).
NF4 = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Some of its layers have a bias."""
    tokenizer = tiny_tokenizer(CHATML)
    model = tiny_model("qwen2", tokenizer, hidden_size=64, intermediate_size=128)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    """A tiny model in NF4, doubly quantized, with bf16 compute: what `load_policy` asks for."""
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": "cpu"}
    )
    for layer in four_bit_layers(model).values():
        layer.support_avx512bf16_for_cpu = False  # not packed anew
    return model


@pytest.fixture
def memory(monkeypatch):
    """Sets how many bytes of the GPU are free."""

    def is_free(size):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (size, 2**40))

    is_free(2**40)
    return is_free


def four_bit_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def loaded(model, monkeypatch, config):
    """The policy that `load_policy` makes of a model."""
    monkeypatch.setattr("lora_ppo.loading.load_base", lambda config: (model, tiny_tokenizer(CHATML)))
    return load_policy(config)[0]


def dequantized(layer):
    """A weight from its packed bytes: two codes in each, the first in the higher half; 64 weights share a scale, and
    256 scales, themselves codes of 8 bits around an offset, share theirs."""
    state = layer.weight.quant_state
    packed = layer.weight.data.flatten().to(torch.long)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
    scales = state.state2.code[state.absmax.long()]
    scales = scales * state.state2.absmax.repeat_interleave(256)[: len(scales)] + state.offset
    values = torch.tensor(NF4)[codes] * scales.repeat_interleave(64)
    return values.view(state.shape).to(torch.bfloat16)


@pytest.mark.parametrize("copy", ["true", "false"])
def test_a_turn_in_4_bits_is_that_of_the_same_model_in_16(model, folder, memory, monkeypatch, copy):
    """The answer, the log-probabilities of its tokens, and the step on it, to the last bit."""
    monkeypatch.setattr(layers, "MANY", 1)  # decoding, too, reads the copy
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, layer in four_bit_layers(model).items():
        twin.get_submodule(name).weight.data = dequantized(layer)
    outcomes = []
    for base in (model, twin):
        policy = loaded(base, monkeypatch, tiny_config(folder, ppo_epochs=2, kl_coef=0.1, bf16_copy=copy))
        randomize_adapter(policy)
        policy.recorder.pays = 0
        prompt = encode_chat(policy.tokenizer, policy.prompts.quizmaster.messages("What is the capital of France?"))
        answer, quiz = decode.decode(policy, [Request(prompt, 1.0), Request(prompt, 1.0, adapter=False)], [1, 2])
        metrics = ppo_step(policy, collate([prompt], [answer.ids], policy.pad_id, policy.device), [1.0])
        outcomes.append((answer, quiz, metrics, policy.tensors()))
    (*ours, our_tensors), (*theirs, their_tensors) = outcomes
    assert ours == theirs
    assert ours[2]["grad_norm"] > 0.1
    assert all(torch.equal(our_tensors[name], tensor) for name, tensor in their_tensors.items())


def test_long_passes_read_the_copy_and_short_ones_the_4_bit_weights(model, memory):
    layer = model.model.layers[0].self_attn.q_proj
    weight, bias = dequantized(layer), layer.bias.detach().to(torch.bfloat16)
    assert copy_weights(model, "true")
    layer.weight.data.fill_(0x77)  # the code of zero, twice
    for rows in (2, MANY - 1, MANY):
        x = torch.randn(
            rows, 64, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(rows), requires_grad=True
        )
        y = layer(x)
        long = rows >= MANY
        assert torch.equal(y, torch.nn.functional.linear(x, weight, bias) if long else bias.expand_as(y))
        if long:
            y.sum().backward()
            assert torch.equal(x.grad, torch.ones_like(y) @ weight)


def test_what_is_given_in_32_bits_comes_back_in_32(model, memory):
    layer = model.model.layers[0].mlp.up_proj
    copy_weights(model, "true")
    x = torch.randn(MANY, 64)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, (x.bfloat16() @ dequantized(layer).t()).float())


def test_the_copy_is_kept_where_memory_allows(model, memory):
    size = sum(2 * layer.in_features * layer.out_features for layer in four_bit_layers(model).values())

    def copied(wanted):
        kept = copy_weights(model, wanted)
        assert kept == any("forward" in vars(layer) for layer in four_bit_layers(model).values())
        return kept

    assert not copied("false")
    memory(2 * size - 1)
    assert not copied("auto")
    memory(size - 1)
    with pytest.raises(ConfigError, match=r"^bf16_copy=true: the copy takes .* GB are free: set bf16_copy=auto$"):
        copied("true")
    memory(2 * size)
    assert copied("auto")
    memory(size)
    assert copied("true")


@pytest.mark.parametrize("free", [0, 2**40])
def test_what_auto_came_to_stands_in_the_settings(model, folder, memory, monkeypatch, free):
    memory(free)
    assert loaded(model, monkeypatch, tiny_config(folder)).config.bf16_copy == ("true" if free else "false")


@pytest.mark.parametrize(("wanted", "said"), [("true", 1), ("auto", 0), ("false", 0)])
def test_a_model_in_16_bits_has_no_copy_and_who_wants_one_is_told(folder, wanted, said):
    notices = []
    _, config = load_policy(tiny_config(folder, dtype="bfloat16", bf16_copy=wanted), notices.append)
    assert config.bf16_copy == "false"
    assert notices == ["bf16_copy=true changes nothing: the weights are not in 4 bits."] * said
