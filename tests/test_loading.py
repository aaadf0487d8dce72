"""What is loaded is looked at: weights, precision, code, layers, tokenizer and template, before the first question."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import (
    CHATML,
    CORPUS,
    MIXTURES,
    randomize_adapter,
    save_tiny,
    tiny_config,
    tiny_policy,
    tiny_tokenizer,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lora_ppo.chat import encode_chat
from lora_ppo.checkpoint import load_checkpoint, save_checkpoint
from lora_ppo.forward import collate
from lora_ppo.generate import generate
from lora_ppo.loading import check_quantization, load_base, load_policy, parameters_of, usual_learning_rate
from lora_ppo.settings import ConfigError
from lora_ppo.step import ppo_step

ROOT = Path(__file__).resolve().parent.parent
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUERY = "model.layers.0.self_attn.q_proj.weight"
WORDS = ("lm_head.weight", "model.embed_tokens.weight")

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries say about their own future


@pytest.mark.parametrize(("parameters", "rate"), [(1, 2e-4), (135e6, 2e-4), (735e6, 4.5e-5), (4e9, 1e-5), (32e9, 1e-5)])
def test_the_usual_learning_rate_falls_with_size(parameters, rate):
    """735 million are the geometric mean of the two that were measured."""
    assert usual_learning_rate(parameters) == rate


def test_the_usual_learning_rate_is_taken_where_none_is_set(tiny_folder):
    for name in ("llama", "qwen3"):
        assert load_policy(tiny_config(tiny_folder(name), learning_rate=None))[1].learning_rate == 2e-4
    assert load_policy(tiny_config(tiny_folder("llama"), learning_rate=0.5))[1].learning_rate == 0.5


def refusal(folder, **settings) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(ConfigError) as refused:
        load_policy(tiny_config(folder, **settings))
    text = str(refused.value)
    assert "\n" not in text
    return text


def edit(file: Path, **changes) -> None:
    """Sets fields of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder: Path, change) -> Path:
    """Puts what `change` makes of a model's tensors in their place."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def test_adapters_sit_on_the_wanted_layers_of_both_blocks(folder, request):
    """Phi3 fuses its projections: two of the seven names are left."""
    policy = tiny_policy(folder)
    expected = ["o_proj", "down_proj"] if "phi3" in request.node.name else ALL_TARGETS
    assert policy.targets == expected
    adapted = [name for name in policy.parameters if "lora_A" in name]
    assert len(adapted) == 2 * len(expected)
    assert all(f".{target}." in "".join(adapted) for target in expected)


def test_only_adapters_and_value_head_are_trainable(folder):
    policy = tiny_policy(folder)
    trainable = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert set(policy.parameters) == {*trainable, "value_head.weight", "value_head.bias"}


def test_a_model_without_the_wanted_layers_is_refused_with_a_list_of_its_own(tiny_folder):
    with pytest.raises(ConfigError) as refusal:
        load_policy(tiny_config(tiny_folder("phi3"), target_modules=["nope", "c_attn"]))
    text = str(refusal.value)
    assert "\n" not in text
    assert "target_modules=nope,c_attn" in text
    assert all(name in text for name in ("down_proj", "gate_up_proj", "o_proj", "qkv_proj"))
    assert "lm_head" not in text


def test_a_model_without_linear_layers_is_refused(tmp_path):
    """GPT-2 is built of Conv1D."""
    with pytest.raises(ConfigError, match=r"target_modules=.*linear layers are none"):
        load_policy(tiny_config(save_tiny("gpt2", tmp_path)))


def test_four_bits_on_a_cpu_are_refused_in_one_line(folder):
    with pytest.raises(ConfigError) as refusal:
        load_policy(tiny_config(folder, load_in_4bit="true", device="cpu"))
    assert "\n" not in str(refusal.value)
    assert "load_in_4bit=false" in str(refusal.value)


@pytest.mark.parametrize("name", ["no/such/folder/anywhere", "nobody/no-such-model", "/nonexistent/model"])
def test_a_missing_model_is_named_in_one_line(name):
    with pytest.raises(ConfigError) as refusal:
        load_policy(tiny_config(name))
    assert "\n" not in str(refusal.value)
    assert f"model_name={name}" in str(refusal.value)
    assert ("there is no such folder" in str(refusal.value)) == name.startswith("/")


def test_the_libraries_are_silent_from_the_first_load_on():
    """In a process of its own: loading transformers sets levels once."""
    code = "import logging; from lora_ppo.loading import silence_libraries; silence_libraries(); "
    code += "print(*(logging.getLogger(name).level for name in ('transformers', 'huggingface_hub', 'peft')))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["50", "50", "50"]
    assert result.stderr == ""


def test_a_context_too_small_for_an_answer_is_refused_with_both_numbers(folder):
    with pytest.raises(ConfigError, match=r"max_new_tokens=5000 .* context of \d+ tokens"):
        load_policy(tiny_config(folder, max_new_tokens=5000))


@pytest.mark.parametrize("damage", ["weights", "config", "pickle"])
def test_a_damaged_model_folder_is_refused_in_one_line(damage, tmp_path):
    """A pickle is never opened, even where it is all there is."""
    folder = save_tiny("llama", tmp_path)
    weights = folder / "model.safetensors"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "config":
        (folder / "config.json").write_text('{"model_type": "no-such-architecture"}')
    else:
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    with pytest.raises(ConfigError) as refusal:
        load_policy(tiny_config(folder))
    assert "\n" not in str(refusal.value)
    assert f"model_name={folder} " in str(refusal.value)


# ---------------------------------------------------------------------------------------------------- tensors, weights


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda w: {f"base_model.model.{name}": x for name, x in w.items()}, "no tensor: lm_head.weight, and 20 more"),
        (lambda w: {name: x for name, x in w.items() if name != QUERY}, f"no tensor: {QUERY};"),
        (lambda w: {name: x for name, x in w.items() if name != "lm_head.weight"}, "no tensor: lm_head.weight;"),
        (
            lambda w: {n.replace("layers.1.mlp", "layers.1.mpl"): x for n, x in w.items()},
            "model.layers.1.mlp.down_proj",
        ),
        (
            lambda w: w | {QUERY.replace("weight", "bias"): torch.ones(32)},
            "no place for: model.layers.0.self_attn.q_proj.b",
        ),
        (lambda w: w | {"v_head.weight": torch.ones(3)}, "no place for: v_head.weight;"),
        (lambda w: w | {QUERY: w[QUERY][:16].clone()}, f"another shape than config.json says: {QUERY} ((16, 32), exp"),
        (
            lambda w: w | {n: w[n][:99].clone() for n in ("lm_head.weight", "model.embed_tokens.weight")},
            "and 1 more such",
        ),
        (lambda w: w | {f"{QUERY}_scale": torch.ones(1)}, f"no place for: {QUERY}_scale"),
    ],
)
def test_a_tensor_that_is_missing_unexpected_or_misshapen_is_named(change, named, tmp_path):
    assert named in refusal(rewrite(save_tiny("llama", tmp_path), change))


@pytest.mark.parametrize(
    ("architecture", "place"),
    [
        ("qwen3_moe", "layers.1.mlp.experts.1.gate_proj"),
        ("mixtral", "layers.0.block_sparse_moe.experts.1.w1"),
        ("deepseek_v3", "layers.1.mlp.experts.2.down_proj"),
    ],
)
def test_a_tensor_of_an_expert_is_named_as_the_files_call_it(architecture, place, tmp_path):
    """transformers puts those of all experts together, and where it can't, tells why to its log alone."""
    name = f"model.{place}.weight"
    for change, named in (
        (lambda w: {n: x for n, x in w.items() if n != name}, f"no tensor: {name};"),
        (lambda w: {n.replace(place, f"{place}x"): x for n, x in w.items()}, f"no tensor: {name};"),
        (lambda w: w | {name: w[name][:7].clone()}, f"another shape than config.json says: {name} ((7, "),
    ):
        assert named in refusal(rewrite(save_tiny(architecture, tmp_path), change))


@pytest.mark.parametrize(("layers", "named"), [(3, "no tensor: model.layers.2."), (1, "no place for: model.layers.1.")])
def test_another_number_of_layers_than_is_stored_is_refused(layers, named, tmp_path):
    edit(save_tiny("llama", tmp_path) / "config.json", num_hidden_layers=layers)
    assert named in refusal(tmp_path)


def test_a_head_that_is_tied_needs_no_tensor_and_may_have_one(tmp_path):
    folder = save_tiny("qwen3", tmp_path)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    rewrite(folder, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    tiny_policy(folder)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", QUERY])
def test_a_weight_that_is_not_finite_is_named(name, value, tmp_path):
    """One of many, in a row that the first question need not read."""

    def spoil(weights):
        weights[name].view(-1)[-1] = value
        return weights

    assert f"{name} holds {value}" in refusal(rewrite(save_tiny("llama", tmp_path), spoil))


def test_a_buffer_that_is_not_a_number_is_named(tmp_path):
    """DeepSeek keeps there what corrects the choice of experts."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    folder = save_tiny("deepseek_v3", tmp_path)
    assert f"{name} holds nan" in refusal(rewrite(folder, lambda w: w | {name: w[name] * math.nan}))


def test_weights_whose_sum_overflows_are_finite_all_the_same(tmp_path):
    """The sum is only the quick look. Softmax makes of such queries what it makes of any."""
    tiny_policy(rewrite(save_tiny("llama", tmp_path), lambda w: w | {QUERY: torch.full((32, 32), 1e36)}))


def test_a_vocabulary_may_be_padded_with_logits_of_minus_infinity(tmp_path):
    """A quiz, an answer and a step with an entropy bonus: all numbers stay finite, and padding is never written."""
    padding = slice(-8, None)

    def pad(weights):
        weights["lm_head.bias"][padding] = -math.inf
        return weights

    folder = rewrite(save_tiny("phi", tmp_path, vocab_size=700), pad)
    policy = tiny_policy(folder, target_modules=["q_proj", "dense"], entropy_coef=0.1, kl_coef=0.1)
    prompt = encode_chat(policy.tokenizer, policy.prompts.tutor.messages("Why?"))
    response = generate(policy, prompt, 1.0)
    assert max(response) < 692
    randomize_adapter(policy)
    metrics = ppo_step(policy, collate([prompt], [response], policy.pad_id, policy.device), [1.0])
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["kl"] > 0
    assert all(parameter.isfinite().all() for parameter in policy.parameters.values())


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "4 bits, which need CUDA",
        ),
        ({"quant_method": "bitsandbytes", "_load_in_4bit": True}, "4 bits, which need CUDA"),
        ({"load_in_8bit": True}, "stored quantized (bitsandbytes)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "stored quantized (bitsandbytes)"),
        ({"quant_method": "gptq", "bits": 4}, "stored quantized (gptq)"),
        ({"quant_method": "awq", "bits": 4}, "stored quantized (awq)"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "stored quantized (fp8)"),
        ({"quant_method": "mxfp4"}, "stored quantized (mxfp4)"),
        ({"bits": 4}, "stored quantized (an unknown method)"),
    ],
)
@pytest.mark.parametrize("asked", [{}, {"load_in_4bit": "false", "bf16_copy": "false"}, {"load_in_4bit": "true"}])
def test_weights_that_are_stored_quantized_are_refused_on_a_cpu(stored, named, asked, tmp_path):
    edit(save_tiny("llama", tmp_path) / "config.json", quantization_config=stored)
    text = refusal(tmp_path, **asked)
    assert named in text
    assert "name the model that they were made of" in text


@pytest.mark.parametrize(
    ("dtype", "named"),
    [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.uint8, "U8"), (torch.bool, "BOOL")],
)
def test_weights_that_are_packed_and_do_not_say_how_are_refused(dtype, named, tmp_path):
    """As numbers they would be loaded, and the model would answer noise."""
    packed = rewrite(save_tiny("llama", tmp_path), lambda w: w | {QUERY: w[QUERY].to(dtype)})
    assert f"stored quantized ({named})" in refusal(packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_are_taken(dtype, tmp_path):
    tiny_policy(rewrite(save_tiny("llama", tmp_path), lambda w: {name: x.to(dtype) for name, x in w.items()}))


@pytest.mark.parametrize("place", ["compression_config", "text_config"])
def test_a_quantization_is_found_wherever_a_config_has_it(place, tmp_path):
    stored = {"quant_method": "compressed-tensors"}
    value = {"quantization_config": stored} if place == "text_config" else stored
    edit(save_tiny("llama", tmp_path) / "config.json", **{place: value})
    assert "stored quantized (compressed-tensors)" in refusal(tmp_path)


def test_on_cuda_four_stored_bits_stay_four_and_nothing_else_is_taken(llama):
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for asked in ("auto", "true"):
        check_quantization(tiny_config(llama, load_in_4bit=asked, device="cuda"), stored, on_cuda=True)
    with pytest.raises(ConfigError, match=r"load_in_4bit=false, and the weights of model_name=.* are in 4 bits"):
        check_quantization(tiny_config(llama, load_in_4bit="false", device="cuda"), stored, on_cuda=True)
    with pytest.raises(ConfigError, match="gptq"):
        check_quantization(tiny_config(llama, device="cuda"), {"quant_method": "gptq"}, on_cuda=True)


@pytest.mark.parametrize(("hidden", "four_bit"), [(256, "false"), (2048, "true")])
def test_on_cuda_a_model_goes_into_4_bits_from_a_billion_parameters_on(hidden, four_bit, tmp_path):
    """Which its config.json tells: here there are no weights to load."""
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 24}
    LlamaConfig(num_attention_heads=16, num_key_value_heads=16, **sizes).save_pretrained(tmp_path)
    config = tiny_config(tmp_path, device="cuda", dtype="auto")
    with pytest.raises(ConfigError):
        load_base(config)
    assert (config.load_in_4bit, config.dtype) == (four_bit, "bfloat16")


def test_parameters_are_counted_without_weights(folder):
    model, _ = load_base(tiny_config(folder))
    assert parameters_of(tiny_config(folder)) == model.num_parameters()


# --------------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize("known", [True, False])
def test_code_that_comes_with_a_model_is_never_run_nor_asked_about(known, tmp_path, monkeypatch):
    """Neither the model's nor the tokenizer's. Where the libraries know the architecture, theirs serves."""
    folder = save_tiny("llama", tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    classes = ("AutoConfig", "AutoModelForCausalLM")
    edit(folder / "config.json", auto_map=dict.fromkeys(classes, "evil.Evil"))
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    if not known:
        edit(folder / "config.json", model_type="evil", architectures=["Evil"])
    monkeypatch.setattr("sys.stdin", lines := io.StringIO("y\n" * 20))
    if known:
        policy = tiny_policy(folder)
        generate(policy, encode_chat(policy.tokenizer, policy.prompts.tutor.messages("Why?")), 1.0)
    else:
        assert "it needs code of its own, which is never run here" in refusal(folder)
    assert lines.tell() == 0
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
@pytest.mark.parametrize("value", ["somebody/kernel", "kernels-community/flash-attn2", "flash_attention_2"])
def test_which_code_computes_a_layer_is_not_the_models_to_say(key, value, llama, tmp_path):
    """It might be fetched from the hub and run, or be there on its maker's machine alone."""
    folder = save_tiny("llama", tmp_path)
    edit(folder / "config.json", **{key: value})
    policy = tiny_policy(folder)
    assert policy.model.config._attn_implementation == tiny_policy(llama).model.config._attn_implementation


# ----------------------------------------------------------------------------------------------- layers, base models


@pytest.mark.parametrize(
    ("wanted", "named"),
    [
        (["q_proj", "v_porj"], "the model has no v_porj; did you mean v_proj?"),
        (["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_prjo"], "did you mean down_proj?"),
        (["q_proj", "lm_head"], "the model has no lm_head; its linear layers are"),
    ],
)
def test_a_layer_that_is_asked_for_and_not_there_is_named(wanted, named, llama):
    assert named in refusal(llama, target_modules=wanted)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_in_a_mixture_of_experts_linear_layers_alone_get_adapters(architecture, tiny_folder, tmp_path):
    """Answer, step and checkpoint; plain PEFT loads what was trained, and says the same."""
    from peft import PeftModel

    folder, told = tiny_folder(architecture), []
    policy = load_policy(tiny_config(folder), told.append)[0]
    assert [line for line in told if "the experts get none" in line] == told != []
    assert {type(layer.get_base_layer()) for layer in policy.layers} == {torch.nn.Linear}
    prompt = encode_chat(policy.tokenizer, policy.prompts.tutor.messages("Why?"))
    response = generate(policy, prompt, 1.0)
    assert ppo_step(policy, collate([prompt], [response], policy.pad_id, policy.device), [1.0])["step_kl"] > 0
    ids = torch.tensor([prompt])
    with torch.no_grad():
        with policy.adapter(torch.tensor([True, False])):  # as answer and quiz are written side by side
            together = policy.model(input_ids=ids.repeat(2, 1)).logits
        for on, logits in zip((True, False), together, strict=True):
            with policy.adapter(on):
                torch.testing.assert_close(policy.model(input_ids=ids).logits[0], logits, rtol=0, atol=1e-4)
    save_checkpoint(tmp_path / "step_1", policy, {}, "A test.")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "step_1").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, policy.model(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert load_checkpoint(tmp_path / "step_1", tiny_policy(folder, seed=1))["step"] == 1


def test_layers_whose_names_peft_takes_for_experts_are_told_and_can_not_be_asked_for(tiny_folder):
    folder, told = tiny_folder("qwen3_moe"), []
    assert load_policy(tiny_config(folder), told.append)[0].targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert "dense layers with their names (gate_proj, up_proj, down_proj)" in told[0]
    assert "PEFT takes gate_proj for the experts" in refusal(folder, target_modules=["q_proj", "gate_proj"])
    assert "PEFT takes down_proj, gate_proj for the experts" in refusal(
        folder, target_modules=["gate_proj", "down_proj"]
    )


def test_layers_that_peft_does_not_take_are_refused_in_one_line(tmp_path):
    assert "target_modules=in_proj,out_proj can't be adapted" in refusal(
        save_tiny("mamba", tmp_path), target_modules=["in_proj", "out_proj"]
    )


@pytest.mark.parametrize(
    ("architecture", "targets", "named"),
    [
        ("bert", ["query", "value"], "can't read a token (what it makes of a token depends on the next ones)"),
        ("recurrent_gemma", ["gate_proj", "up_proj"], "can't write a reply ("),  # without a layer that attends
        ("falcon_alibi", ["query_key_value"], "can't write a reply ("),  # its second token
    ],
)
def test_models_that_do_not_read_or_write_as_needed_are_refused_at_the_start(architecture, targets, named, tmp_path):
    assert named in refusal(save_tiny(architecture, tmp_path), target_modules=targets)


def test_sizes_come_from_the_weights(tiny_folder):
    """OPT's head may be narrower than its layers."""
    policy = tiny_policy(tiny_folder("opt"), target_modules=["q_proj", "v_proj"])
    assert policy.value_head.in_features == 16
    prompt = encode_chat(policy.tokenizer, policy.prompts.tutor.messages("Why?"))
    response = generate(policy, prompt, 1.0)
    assert ppo_step(policy, collate([prompt], [response], policy.pad_id, policy.device), [1.0])["step_kl"] > 0


@pytest.mark.parametrize("spelling", ["relative", "slash", "link", "copy", "shards", "order"])
def test_the_same_base_model_under_another_name_is_the_same(spelling, tmp_path, monkeypatch):
    folder = save_tiny("llama", tmp_path / "model")
    save_checkpoint(tmp_path / "step_0", tiny_policy(folder), {}, "A test.")
    (tmp_path / "link").symlink_to(folder)
    if spelling in ("copy", "shards", "order"):
        save_tiny("llama", tmp_path / "copy")
    if spelling == "shards":
        model = AutoModelForCausalLM.from_pretrained(folder)
        (tmp_path / "copy" / "model.safetensors").unlink()
        model.save_pretrained(tmp_path / "copy", max_shard_size="30KB")
        assert len([*(tmp_path / "copy").glob("model-*")]) > 1
    if spelling == "order":
        last_first(tmp_path / "copy" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    name = {"relative": "model", "slash": f"{folder}/", "link": "link"}.get(spelling, "copy")
    load_checkpoint(tmp_path / "step_0", tiny_policy(name))


def test_smollm2_is_called_so_where_its_folder_is_a_link(llama, tmp_path, monkeypatch):
    from lora_ppo.loading import base_name

    (tmp_path / "smollm2-135m").symlink_to(llama)
    monkeypatch.setattr("lora_ppo.loading.SMOLLM2_FOLDER", tmp_path / "smollm2-135m")
    assert base_name(tiny_config(tmp_path / "smollm2-135m")) == "smollm2"


def last_first(file: Path) -> None:
    """Writes the tensors of a file again, in the other order, and a note."""
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    told, data = json.loads(raw[8:start]), b""
    del told["__metadata__"]
    for it in sorted(told.values(), key=lambda it: it["data_offsets"], reverse=True):
        begin, end = it["data_offsets"]
        it["data_offsets"], data = [len(data), len(data) + end - begin], data + raw[start + begin : start + end]
    header = json.dumps(told | {"__metadata__": {"format": "pt", "note": "again"}}).encode()
    header += b" " * (-len(header) % 8)
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)


def test_fingerprints_of_earlier_versions_tell_nothing_and_the_name_counts(tmp_path, tiny_folder, llama):
    policy = tiny_policy(llama)
    policy.fingerprint = "0123456789abcdef"
    save_checkpoint(tmp_path / "step_0", policy, {}, "A test.")
    load_checkpoint(tmp_path / "step_0", tiny_policy(llama))
    with pytest.raises(ConfigError, match="was trained with model_name="):
        load_checkpoint(tmp_path / "step_0", tiny_policy(tiny_folder("qwen2")))


@pytest.mark.parametrize("change", ["seed", "number", "names"])
def test_other_weights_under_the_same_name_are_another_base_model(change, tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    save_checkpoint(tmp_path / "step_0", tiny_policy(folder), {}, "A test.")
    if change == "seed":
        save_tiny("llama", folder, seed=1)
    elif change == "names":
        other = QUERY.replace("layers.0", "layers.1")
        rewrite(folder, lambda w: w | {QUERY: w[other], other: w[QUERY]})
    else:
        rewrite(folder, lambda w: w | {QUERY: w[QUERY] + torch.eye(32) * 1e-3})
    with pytest.raises(ConfigError, match=r"was trained on other weights than model_name=.* has now"):
        load_checkpoint(tmp_path / "step_0", tiny_policy(folder))


@pytest.mark.parametrize("change", ["config", "tokenizer", "template", "note"])
def test_the_same_weights_read_in_another_way_are_told_of(change, tmp_path):
    folder, notices = save_tiny("llama", tmp_path / "model"), []
    save_checkpoint(tmp_path / "step_0", tiny_policy(folder), {}, "A test.")
    load_checkpoint(tmp_path / "step_0", tiny_policy(folder), notices.append)
    assert notices == []
    if change in ("config", "note"):
        config = json.loads((folder / "config.json").read_text())
        config |= {"rms_norm_eps": 0.1} if change == "config" else {"transformers_version": "1.0"}
        (folder / "config.json").write_text(json.dumps(config))
    elif change == "template":
        retokenized(folder, tiny_tokenizer(CHATML.replace("\n", " ")))
    else:
        told = json.loads((folder / "tokenizer.json").read_text())
        words = told["model"]["vocab"]
        words["a"], words["W"] = words["W"], words["a"]
        (folder / "tokenizer.json").write_text(json.dumps(told))
    load_checkpoint(tmp_path / "step_0", tiny_policy(folder), notices.append)
    named = [f"another config.json or tokenizer than model_name={folder} has now" in line for line in notices]
    assert named == ([] if change == "note" else [True])


def test_a_folder_with_adapters_is_no_base_model(tmp_path):
    """transformers would load them with their base, and the reference would no longer be the base."""
    folder = save_tiny("llama", tmp_path / "model")
    save_checkpoint(tmp_path / "step_0", tiny_policy(folder), {}, "A test.")
    assert "holds adapters: name their base model" in refusal(tmp_path / "step_0")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "step_0" / name, folder)
    assert "holds adapters: name their base model" in refusal(folder)


def test_a_checkpoint_of_another_model_is_refused_with_both_names(tmp_path, llama, tiny_folder):
    save_checkpoint(tmp_path / "step_0", tiny_policy(llama), {}, "A test.")
    other = tiny_folder("qwen2")
    with pytest.raises(ConfigError, match=rf"was trained with model_name={llama}, now it is {other}: set model_name"):
        load_checkpoint(tmp_path / "step_0", tiny_policy(other))


# ------------------------------------------------------------------------------------------------ tokenizers, templates


def retokenized(folder: Path, tokenizer) -> Path:
    """The folder with another tokenizer."""
    for path in [*folder.glob("tokenizer*"), *folder.glob("*.jinja")]:
        path.unlink()
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_that_puts_a_space_before_every_text_can_write_a_quiz(tmp_path):
    """As those of Llama 2, Mistral and Gemma do."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    space = decoders.Replace("▁", " ")
    backend.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "</s>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    assert tokenizer.tokenize("{")[0].startswith("▁")
    policy = tiny_policy(retokenized(save_tiny("llama", tmp_path, vocab_size=512), tokenizer))
    assert policy.tokenizer.convert_ids_to_tokens(policy.stop_ids) == ["</s>"]


@pytest.mark.parametrize("kind", ["Unigram", "WordLevel"])
def test_a_tokenizer_that_can_not_write_a_quiz_is_refused(kind, tmp_path):
    words = ["<unk>", "</s>", "system", "user", "assistant", "What", "is", "?", "{", "}", "null"]
    if kind == "Unigram":
        backend = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    else:
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    text = refusal(retokenized(save_tiny("llama", tmp_path), tokenizer))
    assert "can't write a quiz under a grammar" in text


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ({"rag": CHATML, "tool_use": CHATML}, "no default"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ raise_exception('no chats here') }}", "no chats here"),
        ("{% for message in messages %}{{ message['role'] }}{% endfor %}", "does not render the messages"),
        ("{% for", "chat template"),
    ],
)
def test_a_template_that_can_not_be_used_is_refused_with_its_reason(template, named, tmp_path):
    text = refusal(retokenized(save_tiny("llama", tmp_path), tiny_tokenizer(template)))
    assert "chat template" in text
    assert named in text


@pytest.mark.parametrize("strange", ["</s>", -1, 10**6, [], [[1]], {"a": 1}, True, 1.0])
def test_an_end_token_that_is_none_is_passed_over(strange, tmp_path):
    folder = save_tiny("llama", tmp_path)
    edit(folder / "generation_config.json", eos_token_id=strange)
    policy = tiny_policy(folder)
    assert policy.tokenizer.convert_ids_to_tokens(policy.stop_ids) == ["<|im_end|>"]


def test_a_model_without_an_end_token_is_refused(tmp_path):
    folder = save_tiny("llama", tmp_path)
    tokenizer = tiny_tokenizer(CHATML.replace("<|im_end|>", ""))
    tokenizer.eos_token = None
    retokenized(folder, tokenizer)
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, eos_token_id=None)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    assert "has no end token: set eos_token_id" in refusal(retokenized(folder, tokenizer))


def test_a_padding_token_beyond_the_embeddings_is_not_used(tmp_path):
    """As `tokenizer.add_special_tokens` leaves it, where the embeddings were not resized."""
    folder, tokenizer = save_tiny("llama", tmp_path), tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    policy = tiny_policy(retokenized(folder, tokenizer))
    assert policy.tokenizer.pad_token_id == policy.vocabulary
    assert policy.pad_id < policy.vocabulary
    batch = collate([[5, 6, 7], [8]], [[9], [10, 11]], policy.pad_id, policy.device)
    ppo_step(policy, batch, [1.0, -1.0])


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    """Its prompts might do without the rest; a question need not."""
    assert "its tokenizer has 485 tokens, its head 480" in refusal(save_tiny("llama", tmp_path, vocab_size=480))


def test_a_text_that_makes_a_token_beyond_the_embeddings_is_none_for_the_model(tmp_path):
    """A character that was added to the vocabulary is text as any other."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("語", special=False)])
    folder = retokenized(save_tiny("llama", tmp_path), tokenizer)
    assert "its tokenizer has 486 tokens, its head 485" in refusal(folder)


def test_the_prompt_of_a_role_that_nobody_asks_may_be_as_long_as_it_likes(tmp_path, llama):
    (tmp_path / "long.yaml").write_text(f"maths:\n  system: {'word ' * 1100}\n")
    tiny_policy(llama, prompts=str(tmp_path / "long.yaml"))


@pytest.mark.parametrize("role", ["tutor", "quizmaster", "solver", "learner"])
def test_every_roles_prompt_has_to_leave_room_in_the_context(role, tmp_path, llama):
    (tmp_path / "long.yaml").write_text(f"{role}:\n  system: {'word ' * 700}\n")
    text = refusal(llama, prompts=str(tmp_path / "long.yaml"))
    assert f"the {role}'s prompt takes" in text
    assert "in a context of 1024 tokens" in text


@pytest.mark.parametrize(
    ("generation", "named", "ends"),
    [
        (["<|pad|>"], "<|im_end|>", ["<|pad|>", "<|im_end|>"]),  # as SmolLM2's first release had it
        (["<|pad|>"], "<|pad|>", ["<|pad|>", "<|im_end|>"]),
        ([], None, ["<|im_end|>"]),
        (["<|im_end|>", "<|pad|>"], "<|im_end|>", ["<|im_end|>", "<|pad|>"]),
    ],
)
def test_a_reply_stops_at_whatever_model_tokenizer_or_template_end_one_with(generation, named, ends, tmp_path):
    folder, tokenizer = save_tiny("llama", tmp_path), tiny_tokenizer()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in generation]
    edit(folder / "generation_config.json", eos_token_id=ids or None)
    edit(folder / "config.json", eos_token_id=None)
    tokenizer.eos_token = named
    policy = tiny_policy(retokenized(folder, tokenizer))
    assert policy.tokenizer.convert_ids_to_tokens(policy.stop_ids) == ends
    assert policy.tokenizer.convert_ids_to_tokens(policy.end_id) == "<|im_end|>"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become a user without a name")
def test_without_a_home_the_cache_is_in_the_folder_for_temporary_files():
    """As in a container under a user id that it does not know."""
    program = "from lora_ppo.files import cache_folder; import os; os.setuid(54321); print(cache_folder())"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": "/tmp"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "/tmp/lora-ppo-tutor-54321", done.stderr
