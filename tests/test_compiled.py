"""Compiled layers: they say what the model says, see what training changes, and nobody waits for them."""

import json

import pytest
import torch
from support.decoding import prompts
from support.tiny import ARCHITECTURES, randomize_adapter, tiny_config
from transformers import DynamicCache

from lora_ppo import compiled, decode
from lora_ppo.caches import FixedLayer, roomy_cache
from lora_ppo.forward import collate
from lora_ppo.generate import Request
from lora_ppo.loading import load_policy
from lora_ppo.step import ppo_step


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """Small models are compiled, too, into a folder of the test's own."""
    monkeypatch.setattr(compiled, "WORTH", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.library.cache_clear()
    return tmp_path / "lora-ppo-tutor" / "compiled"


def greedy(policy, length: int) -> Request:
    policy.config.top_p, policy.config.max_new_tokens = 1e-9, length
    policy.stop_ids = [-1]
    return Request(prompts(policy)[0], 1.0)


@pytest.mark.parametrize(
    "architecture", [name for name in ARCHITECTURES if name not in ("mistral", "gemma3", "smollm3")]
)
def test_what_is_compiled_does_what_every_layer_does(architecture, tiny_folder, cache, monkeypatch):
    """Before a compiler sees it: one token behind 5 others, each layer of the model, adapters on by half."""
    monkeypatch.setattr(compiled.Library, "load", lambda library: None)
    policy, _ = load_policy(tiny_config(tiny_folder(architecture)))
    randomize_adapter(policy)
    made = policy.recorder.compiled
    function = compiled.exported(json.loads(made.library.spec))["layer"].module()
    torch.manual_seed(0)
    config, width = policy.model.config, made.layers[0].self_attn.head_dim
    kept = torch.randn(2, 1, config.num_key_value_heads, 24, width)
    hidden, (cos, sin) = torch.randn(1, 1, config.hidden_size), torch.randn(2, 1, 1, width)
    place, mask = torch.tensor([5]), (torch.arange(24) <= 5).view(1, 1, 1, 24)
    for number, layer in enumerate(made.layers):
        cache_ = DynamicCache()
        cache_.layers = [None] * number + [FixedLayer(*kept.clone(), place)]
        given = {"attention_mask": mask, "position_embeddings": (cos, sin), "past_key_values": cache_}
        with torch.no_grad(), policy.adapter(torch.tensor([0.5])):
            right = layer(hidden, **given, use_cache=True)
            written = kept.clone()
            share = torch.full((1, 1), 0.5 * made.scaling)
            result = function(hidden, cos, sin, mask, place, *written, share, made.weights[number])
        torch.testing.assert_close(result, right, atol=1e-5, rtol=1e-5)
        own = cache_.layers[number]
        torch.testing.assert_close(torch.stack([own.keys, own.values]), written, atol=1e-5, rtol=1e-5)


def one_pass(policy, compiled_one: bool, adapter: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and hidden states of one token behind a prompt."""
    prompt, model = prompts(policy)[0], policy.model.get_base_model()
    cache, length, on = roomy_cache(model.config, 64), len(prompt), torch.tensor([adapter])
    real = torch.ones(1, length + 1, dtype=torch.bool)
    with torch.inference_mode():
        policy.recorder.read(torch.tensor([prompt]), torch.arange(length)[None], real[:, :-1], on, cache)
        given = torch.tensor([[7]]), torch.tensor([[length]]), real
        if compiled_one:
            return policy.recorder.compiled.read(*given, adapter, cache)[:2]
        policy.recorder.able, able = False, policy.recorder.able
        result = policy.recorder.read(*given, on, cache)
        policy.recorder.able = able
        return result


@pytest.mark.skipif(not compiled.compiler(), reason="there is no C++ compiler")
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_a_compiled_pass_says_what_the_model_says(dtype, near, tiny_folder, cache):
    policy, _ = load_policy(tiny_config(tiny_folder("llama"), dtype=dtype, learning_rate=0.03))
    randomize_adapter(policy)
    request = greedy(policy, 100)
    (plain,) = decode.decode(policy, [request], [0])  # nobody waits
    assert not policy.recorder.proofs
    library = policy.recorder.compiled.library
    library.thread.join()
    assert library.ready, library.why_not
    assert [path.name for path in cache.iterdir()] == [library.folder.name]

    said = []
    for adapter in (True, False, True):  # the last after a step of training
        ours, right = (one_pass(policy, how, adapter) for how in (True, False))
        for x, y in zip(ours, right, strict=True):
            assert (x - y).abs().max() <= near * y.abs().max()
        said.append(ours[0].float())
        if not adapter:
            ppo_step(policy, collate([request.prompt_ids], [plain.ids], policy.pad_id, policy.device), [1.0])
    assert min((said[i] - said[0]).abs().max() for i in (1, 2)) > 10 * near * said[0].abs().max()

    (fast,) = decode.decode(policy, [request], [0])
    assert policy.recorder.able
    assert policy.recorder.proofs == {(0, 1): 2}
    policy.recorder.able = False
    (slow,) = decode.decode(policy, [request], [0])
    assert dtype == "bfloat16" or fast.ids == slow.ids


@pytest.mark.parametrize("architecture", ["llama", "smollm3"])
def test_what_strays_from_the_model_is_not_used(architecture, tiny_folder, cache, monkeypatch):
    """One layer of the second takes no note of positions: what is compiled for the other is wrong there."""
    monkeypatch.setattr(compiled.Library, "load", lambda library: None)
    policy, _ = load_policy(tiny_config(tiny_folder(architecture)))
    request, made = greedy(policy, 8), policy.recorder.compiled
    plain = decode.decode(policy, [request], [0])
    functions = {name: program.module() for name, program in compiled.exported(json.loads(made.library.spec)).items()}
    made.library.head = lambda given: [functions["head"](given[0], given[1:])]
    made.library.layer = lambda given: [
        (1.01 if architecture == "llama" else 1) * functions["layer"](*given[:8], given[8:])
    ]
    made.library.ready = True
    assert decode.decode(policy, [request], [0]) == plain
    assert not policy.recorder.able
    assert policy.recorder.proofs == {(0, 1): 1}
    if architecture == "smollm3":
        return
    policy.recorder.able = True
    policy.recorder.proofs.clear()
    made.library.layer = lambda given: [functions["layer"](*given[:8], given[8:])]
    assert decode.decode(policy, [request], [0])[0].ids == plain[0].ids
    assert policy.recorder.proofs == {(0, 1): 2}
    assert policy.recorder.able


def test_a_compilation_that_fails_is_told_once_and_replies_are_written(tiny_folder, cache, monkeypatch):
    def fail(spec, folder):
        raise RuntimeError("no room left")

    monkeypatch.setattr(compiled, "compile_apart", fail)
    told = []
    policy, _ = load_policy(tiny_config(tiny_folder("llama")), told.append)
    policy.recorder.compiled.library.thread.join()
    for _ in range(2):
        assert decode.decode(policy, [greedy(policy, 4)], [0])[0].ids
        policy.use_adapter()
    assert [text for text in told if "no room left" in text] == told
    assert len(told) == 1


def test_what_is_broken_on_disk_is_removed_and_compiled_anew_once(tiny_folder, cache, monkeypatch):
    monkeypatch.setattr(compiled, "compile_apart", lambda spec, folder: None)
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    library = policy.recorder.compiled.library
    library.thread.join()
    tries = []

    def again(spec, folder):
        tries.append(folder.exists())
        folder.mkdir(parents=True)
        (folder / "layer.pt2").write_bytes(b"broken")

    again(library.spec, library.folder)
    monkeypatch.setattr(compiled, "compile_apart", again)
    library.load()
    assert tries == [False, False]  # the first is this test's own
    assert library.why_not
    assert not library.ready


def test_no_compiler_is_told_once_and_off_is_off(tiny_folder, cache, monkeypatch):
    told = []
    off, _ = load_policy(tiny_config(tiny_folder("llama"), compile="off"), told.append)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "c++-of-nobody")
    without, config = load_policy(tiny_config(tiny_folder("llama")), told.append)
    assert off.recorder.compiled is without.recorder.compiled is None
    assert config.compile == "off"
    [line] = told
    assert "C++ compiler" in line
    assert not cache.exists()


def test_a_small_model_and_layers_of_several_kinds_are_left_alone(tiny_folder, cache, monkeypatch):
    policy, _ = load_policy(tiny_config(tiny_folder("gemma3")))
    assert policy.recorder.compiled is None
    monkeypatch.setattr(compiled, "WORTH", 10**6)
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    assert policy.recorder.compiled is None
