"""Adapters from elsewhere: what is accepted acts as PEFT has it and leaves the base model alone; the rest is named."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from support.tiny import tiny_policy
from transformers import AutoModelForCausalLM

from lora_ppo.adapters import attach, attached, probe_logits, read_adapter
from lora_ppo.checkpoint import Damaged, load_checkpoint, save_checkpoint, sha256
from lora_ppo.policy import gated_forward
from lora_ppo.settings import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT says of its own choices

PLAIN = {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}

QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def train_elsewhere(model: Path, folder: Path, config, strength: float = 0.2) -> Path:
    """An adapter as PEFT saves it, with an effect, on a base model of its own."""
    torch.manual_seed(0)
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * strength)
    peft.save_pretrained(folder)
    return folder


def peft_logits(policy, model: Path, adapter: Path) -> torch.Tensor:
    """The probes' logits as PEFT has them, on a base model of its own."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    own, policy.model = policy.model, PeftModel.from_pretrained(base, adapter).eval()
    try:
        return probe_logits(policy, adapter=True)
    finally:
        policy.model = own


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2}},
        {"alpha_pattern": {r"layers\.0\..*q_proj": 32}},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 1}, "use_rslora": True},
        {"layers_to_transform": [1]},
        {"target_modules": r".*layers\.1.*(up|down)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["gate_proj", "o_proj"], "exclude_modules": r".*layers\.0.*"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
        {"target_modules": ["lm_head", "q_proj"]},
    ],
)
@pytest.mark.parametrize("own", [["q_proj"], ["q_proj", "v_proj", "gate_proj"]])
def test_plain_lora_acts_as_in_peft_and_leaves_no_trace(settings, own, llama, tmp_path):
    folder = train_elsewhere(llama, tmp_path / "adapter", LoraConfig(**PLAIN | settings))
    policy = tiny_policy(llama, target_modules=own)
    base = probe_logits(policy, adapter=False)
    read_adapter(folder)
    wanted = peft_logits(policy, llama, folder)
    with attached(policy, folder, "other"):
        torch.testing.assert_close(probe_logits(policy, adapter=True), wanted, rtol=1e-4, atol=1e-4)
        assert (wanted - base).abs().max() > 0.1
        assert torch.equal(probe_logits(policy, adapter=False), base)
    for adapter in (False, True):  # the policy's own is fresh
        assert torch.equal(probe_logits(policy, adapter), base)
    assert list(policy.model.peft_config) == ["default"]


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_rslora": True}, {"target_modules": "all-linear"}, {"target_modules": ["lm_head", "q_proj"]}],
)
def test_rounding_to_16_bits_refuses_no_plain_lora(settings, llama, tmp_path):
    """Rounding grows from layer to layer, so each is proved by itself."""
    folder = train_elsewhere(llama, tmp_path / "adapter", LoraConfig(**PLAIN | settings), strength=0.5)
    policy = tiny_policy(llama, dtype="bfloat16")
    with attached(policy, folder, "other"):
        assert not torch.equal(probe_logits(policy, adapter=True), probe_logits(policy, adapter=False))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"bias": "all"}, "bias=all"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save=['embed_tokens']"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices=[1, 2]"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication="),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=[1]"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "expected lora_A and lora_B of linear layers alone"),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(settings, named, llama, tmp_path):
    folder = train_elsewhere(llama, tmp_path / "adapter", LoraConfig(**PLAIN | settings, task_type="CAUSAL_LM"))
    policy = tiny_policy(llama)
    base = probe_logits(policy, adapter=False)
    with pytest.raises(ConfigError) as refused:
        attach(policy, folder, "other")
    assert named in str(refused.value)
    assert str(refused.value).startswith(f"adapter={folder}")
    assert "\n" not in str(refused.value)
    for adapter in (False, True):
        assert torch.equal(probe_logits(policy, adapter), base)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_a_start_that_takes_a_part_of_the_base_weights_is_refused(start, llama, tmp_path):
    folder = train_elsewhere(llama, tmp_path / "adapter", LoraConfig(**PLAIN))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    with pytest.raises(ConfigError, match=f"init_lora_weights={start}"):
        read_adapter(folder)


def test_adapters_on_the_experts_of_a_mixture_are_refused(tiny_folder, tmp_path):
    model = tiny_folder("qwen3_moe")
    config = LoraConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ConfigError, match="target_parameters="):
        read_adapter(train_elsewhere(model, tmp_path / "parameters", config))
    folder = train_elsewhere(model, tmp_path / "names", LoraConfig(target_modules=["gate_proj", "up_proj", "q_proj"]))
    with pytest.raises(ConfigError, match=r"target_parameters=|expected linear layers"):
        attach(tiny_policy(model), folder, "other")


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
        LoHaConfig(target_modules=["q_proj"]),
        AdaLoraConfig(target_modules=["q_proj"], total_step=10),
        VeraConfig(target_modules=["q_proj"]),
        PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
)
def test_other_kinds_of_adapters_are_refused_by_name(config, llama, tmp_path):
    torch.manual_seed(0)
    get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=rf"peft_type {config.peft_type.value}: expected LORA"):
        read_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: {name: x for name, x in w.items() if "layers.1" not in name}, "lacks 4 tensors"),
        (
            lambda w: w | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.ones(4, 32)},
            "has, and",
        ),
        (lambda w: w | {"base_model.model.lm_head.weight": torch.ones(4, 32)}, "holds base_model"),
        (lambda w: {name: x[:, :8].clone() for name, x in w.items()}, "does not fit"),
        (lambda w: {name: x * torch.nan for name, x in w.items()}, "logits that are not finite"),
    ],
)
def test_an_adapter_with_other_tensors_than_it_says_is_refused(change, named, llama, tmp_path):
    folder = train_elsewhere(llama, tmp_path / "adapter", LoraConfig(**PLAIN))
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    policy = tiny_policy(llama)
    base = probe_logits(policy, adapter=False)
    with pytest.raises(ConfigError, match=named):
        attach(policy, folder, "other")
    assert torch.equal(probe_logits(policy, adapter=True), base)


@pytest.mark.parametrize(
    "broken",
    [
        {"r": "4"},
        {"lora_alpha": "8"},
        {"lora_alpha": math.inf},
        {"target_modules": "("},
        {"rank_pattern": [1]},
        {"r": 0},
    ],
)
def test_settings_that_make_no_sense_are_one_line(broken, llama, tmp_path):
    folder = train_elsewhere(llama, tmp_path / "adapter", LoraConfig(**PLAIN))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | broken))
    policy = tiny_policy(llama)
    base = probe_logits(policy, adapter=False)
    with pytest.raises(ConfigError) as refused:
        attach(policy, folder, "other")
    assert str(refused.value).startswith(f"adapter={folder}")
    assert "\n" not in str(refused.value)
    assert torch.equal(probe_logits(policy, adapter=True), base)


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"lora_bias": True},
        {"use_dora": True},
        {"target_modules": ["embed_tokens"]},
        {"trainable_token_indices": [1]},
    ],
)
def test_what_the_settings_do_not_tell_the_tensors_do(settings, llama, tmp_path, monkeypatch):
    """Planted: the check of settings is gone."""
    monkeypatch.setattr("lora_ppo.adapters.adapter_config", lambda folder: {})
    config = LoraConfig(**PLAIN | settings, task_type="CAUSAL_LM")
    folder = train_elsewhere(llama, tmp_path / "adapter", config)
    policy = tiny_policy(llama)
    base = probe_logits(policy, adapter=False)
    with pytest.raises(ConfigError, match="expected lora_A and lora_B of linear layers alone"):
        attach(policy, folder, "other")
    assert torch.equal(probe_logits(policy, adapter=True), base)


def test_what_neither_tells_the_probe_finds(llama, tmp_path, monkeypatch):
    """Planted: a gate that forgets the scale; a base model that changes with the adapter, or while it is on."""
    folder = train_elsewhere(llama, tmp_path / "adapter", LoraConfig(**PLAIN))
    policy = tiny_policy(llama)
    use, load = policy.use_adapter, policy.model.load_adapter

    def unscaled(name="default"):
        layers = use(name)
        for layer in layers:
            scaling = dict(layer.scaling)
            layer.scaling[name] = 1.0
            layer.forward = gated_forward(layer, name, policy.gate)
            layer.scaling.update(scaling)
        return layers

    def spoiling(*given, **options):
        result = load(*given, **options)
        policy.head.weight.data[0] += 1.0
        return result

    with monkeypatch.context() as planted:
        planted.setattr(policy, "use_adapter", unscaled)
        with pytest.raises(ConfigError, match="differs from PEFT's by"):
            attach(policy, folder, "other")
    with attached(policy, folder, "other"):
        pass
    with pytest.raises(ConfigError, match="changed the base model for good"), attached(policy, folder, "other"):
        policy.head.weight.data[1] += 1.0
    monkeypatch.setattr(policy.model, "load_adapter", spoiling)
    with pytest.raises(ConfigError, match="changes the base model, also when it is off"):
        attach(policy, folder, "other")


@pytest.mark.parametrize(
    ("settings", "error", "named"),
    [
        ({"use_dora": True}, ConfigError, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, ConfigError, "modules_to_save="),
        ({"use_rslora": True}, ConfigError, "use_rslora=True, expected False"),
        ({"alpha_pattern": {"q_proj": 3}}, ConfigError, "alpha_pattern="),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, Damaged, "other tensors than this policy's"),
    ],
)
def test_a_checkpoint_whose_adapter_is_from_elsewhere_is_refused(settings, error, named, llama, tmp_path):
    """Its manifest fits; what it holds does not."""
    policy = tiny_policy(llama, target_modules=["q_proj", "v_proj"])
    save_checkpoint(tmp_path / "step_0", policy, {}, "A test.")
    folder = train_elsewhere(llama, tmp_path / "adapter", LoraConfig(**PLAIN | settings, task_type="CAUSAL_LM"))
    replace_files(tmp_path / "step_0", *folder.glob("adapter_*"))
    with pytest.raises(error, match=named):
        load_checkpoint(tmp_path / "step_0", policy)


@pytest.mark.parametrize("head", [{"weight": (1, 16), "bias": (1,)}, {"weight": (1, 32)}, {"v": (1, 32)}])
def test_a_checkpoint_with_another_value_head_is_damaged_and_leaves_no_trace(head, llama, tmp_path):
    policy, other = (tiny_policy(llama, seed=seed) for seed in (0, 1))
    save_checkpoint(tmp_path / "step_0", policy, {}, "A test.")
    save_file({name: torch.ones(shape) for name, shape in head.items()}, tmp_path / "value_head.safetensors")
    replace_files(tmp_path / "step_0", tmp_path / "value_head.safetensors")
    before = other.snapshot().tensors
    with pytest.raises(Damaged, match="its value head has other tensors"):
        load_checkpoint(tmp_path / "step_0", other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.tensors().items())


@pytest.mark.parametrize("part", ["adapter_model", "value_head", "optimizer"])
def test_a_checkpoint_that_is_not_finite_is_damaged(part, llama_policy, tmp_path):
    save_checkpoint(tmp_path / "step_0", llama_policy, {}, "A test.")
    tensors = load_file(tmp_path / "step_0" / f"{part}.safetensors")
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    save_file(tensors, tmp_path / f"{part}.safetensors")
    replace_files(tmp_path / "step_0", tmp_path / f"{part}.safetensors")
    with pytest.raises(Damaged, match="is not finite"):
        load_checkpoint(tmp_path / "step_0", llama_policy)


def replace_files(checkpoint: Path, *files: Path) -> None:
    """Puts files into a checkpoint, and what its manifest says of them."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for file in files:
        path = checkpoint / file.name
        path.write_bytes(file.read_bytes())
        manifest["files"][file.name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
