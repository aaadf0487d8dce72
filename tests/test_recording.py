"""Recorded passes: they write what the model writes, see what training changes, and are dropped where they stray."""

import pytest
import torch
from support.decoding import prompts
from support.tiny import CHATML, PROMPTS, randomize_adapter, save_tiny, tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

from lora_ppo import decode, recording
from lora_ppo.forward import collate
from lora_ppo.generate import Request
from lora_ppo.layers import FEW_ROWS
from lora_ppo.loading import load_policy
from lora_ppo.policy import Policy
from lora_ppo.quiz import Quiz, learner_probabilities
from lora_ppo.recording import ROOM, SHORT, Graph, RoomyLayer, sees_all
from lora_ppo.step import ppo_step


def test_a_cache_with_room_is_written_in_place():
    torch.manual_seed(0)
    keys, values = torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)
    layer = RoomyLayer(room=5)
    layer.update(keys[:, :, :3], values[:, :, :3])
    where = [x.data_ptr() for x in layer.whole]
    for t in (3, 4):
        seen = layer.update(keys[:, :, t : t + 1], values[:, :, t : t + 1])
        assert torch.equal(torch.stack(seen), torch.stack((keys, values))[..., : t + 1, :])
    assert [x.data_ptr() for x in layer.whole] == where
    layer.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(layer.keys, keys[[2, 0]])
    assert torch.equal(layer.values, values[[2, 0]])
    assert layer.get_seq_length() == 5


def test_a_recorded_pass_writes_the_same(policy):
    """Three rows, gated and padded, that leave the batch one by one; recorded from the first pass on."""
    requests = [Request(prompt, 1.0, adapter=i != 1) for i, prompt in enumerate(prompts(policy))]
    policy.stop_ids = list(range(0, 600, 25))
    plain = decode.decode(policy, requests, seeds=[1, 2, 3])
    assert not policy.recorder.recordings
    policy.recorder.pays = 0
    recorded = decode.decode(policy, requests, seeds=[1, 2, 3])
    assert recorded == plain
    config = policy.model.get_base_model().config.get_text_config()
    assert policy.recorder.able == bool(policy.recorder.recordings) == sees_all(config)
    assert max(policy.recorder.proofs.values(), default=0) == (2 if policy.recorder.able else 0)


def test_few_rows_many_rows_and_prompts_are_recorded_each_for_itself(tiny_folder):
    """As when held-out facts are answered between two steps of training: neither spoils what is there for the other."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama"), max_new_tokens=6))
    requests = [Request(prompts(policy)[0], 1.0)] * (FEW_ROWS + 4)
    seeds = range(1, len(requests) + 1)
    plain = decode.decode(policy, requests, seeds)
    policy.recorder.pays = 0
    assert decode.decode(policy, requests[:1], [1])[0].ids == plain[0].ids
    for _ in range(2):
        assert decode.decode(policy, requests, seeds) == plain
    assert policy.recorder.able
    assert len(policy.recorder.recordings) == 3  # the prompt, read once; tokens of few rows; of many
    assert set(policy.recorder.proofs.values()) == {2}


def test_recorded_passes_without_a_gradient_teach_and_judge_the_same(tiny_folder):
    """Bit for bit: a step's reference and measure, several answers to a prompt, the learner's reads, a long answer."""

    def taught(pays: int) -> tuple[list, Policy]:
        policy, _ = load_policy(tiny_config(tiny_folder("llama"), learning_rate=0.01, target_kl=1e9))
        policy.recorder.pays, said = pays, []
        quiz = Quiz("What is the capital of France?", ("Brussels", "Lyon", "Lisbon", "Paris"), 3)
        first, second, _ = prompts(policy)
        for asked, told in (
            ([first], [[7, 9, 4]]),
            ([second], [[5, 6] * 12]),
            ([first, second], [[8], [9, 10, 11]]),
            ([first] * 3, [[1, 2], [3], [4, 5, 6]]),
            ([first], [[7, 8, 9] * (SHORT // 3)]),
        ):
            batch = collate(asked, told, policy.pad_id, policy.device)
            said.append(ppo_step(policy, batch, [1.0, -1.0, 1.0][: len(asked)]))
            said += [x.tolist() for x in learner_probabilities(policy, ["Paris is its capital."], [quiz])]
        return [said, {name: x.tolist() for name, x in policy.tensors().items()}], policy

    plain, policy = taught(pays=1000)
    assert not policy.recorder.recordings
    recorded, policy = taught(pays=0)
    assert policy.recorder.able
    cases = {(one, on) for one, _, _, on in policy.recorder.recordings}
    assert cases == {(False, True), (False, False)}
    assert min(policy.recorder.passes[case] for case in policy.recorder.recordings) > 4  # proven, then played
    assert recorded == plain
    assert not policy.recorder.covers(1, 1)  # with a gradient
    with torch.no_grad():
        covered = [policy.recorder.covers(*shape) for shape in ((2, SHORT // 2), (1, SHORT + 1))]
    assert covered == [True, False]


def test_passes_of_a_rare_kind_are_not_recorded(tiny_folder):
    """A recording keeps its memory, however seldom it is played."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama"), max_new_tokens=24))
    policy.stop_ids = [-1]
    policy.recorder.pays = 2
    request = Request(prompts(policy)[0], 1.0)
    policy.recorder.passes["others"] = 10_000
    plain = decode.decode(policy, [request], [1])
    assert not policy.recorder.recordings
    policy.recorder.passes["others"] = 0
    assert decode.decode(policy, [request], [1]) == plain
    assert policy.recorder.recordings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recording_sees_what_training_changes(tiny_folder, dtype):
    """Weights after a step, then another adapter: neither is that of the recording's first pass."""
    settings = {"max_new_tokens": 24, "learning_rate": 0.3, "target_kl": 1e9}
    policy, _ = load_policy(tiny_config(tiny_folder("llama"), dtype=dtype, **settings))
    randomize_adapter(policy)
    policy.recorder.pays = 0
    request = Request(prompts(policy)[0], 1.0)
    before = decode.decode(policy, [request], [1])[0]
    batch = collate([request.prompt_ids], [before.ids], policy.pad_id, policy.device)
    ppo_step(policy, batch, [1.0])
    after = decode.decode(policy, [request], [1])[0]
    assert policy.recorder.recordings
    assert policy.recorder.able
    policy.recorder.able = False
    assert decode.decode(policy, [request], [1])[0] == after != before
    policy.recorder.able = True
    policy.model.add_adapter("other", policy.model.peft_config["default"])
    policy.use_adapter("other")
    policy.recorder.pays = 0
    other = decode.decode(policy, [request], [1])[0]
    policy.recorder.able = False
    assert decode.decode(policy, [request], [1])[0] == other != after


def as_a_graph(policy) -> None:
    """What a GPU captures and plays, from the first pass on: here it is run where it would be played."""
    policy.recorder.kind, policy.recorder.pays = "cuda", 0


def test_a_pass_in_fixed_tensors_writes_the_same(policy):
    """Three rows, gated and padded, that leave the batch one by one."""
    requests = [Request(prompt, 1.0, adapter=i != 1) for i, prompt in enumerate(prompts(policy))]
    policy.stop_ids = list(range(0, 600, 25))
    plain = decode.decode(policy, requests, seeds=[1, 2, 3])
    assert len({len(reply.ids) for reply in plain}) > 1
    as_a_graph(policy)
    policy.recorder.able = fit = sees_all(policy.model.get_base_model().config.get_text_config())
    played = decode.decode(policy, requests, seeds=[1, 2, 3])
    assert [reply.ids for reply in played] == [reply.ids for reply in plain]
    for reply, right in zip(played, plain, strict=True):
        torch.testing.assert_close(torch.tensor(reply.logprobs), torch.tensor(right.logprobs), atol=1e-4, rtol=0)
    recorder = policy.recorder
    assert recorder.able is fit
    assert len(recorder.recordings) > 1 or not fit
    assert {rows for _, rows in recorder.recordings} <= {1, 2, 4}
    assert len({recording.kept[0].data_ptr() for recording in recorder.recordings.values()}) <= 1  # the cache is shared


def test_a_graph_sees_what_training_changes_and_reads_only_what_it_is_given(tiny_folder):
    """A second reply, to a shorter prompt: of the first one, nothing that is still there may count."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama"), max_new_tokens=24, learning_rate=0.3, target_kl=1e9))
    randomize_adapter(policy)
    policy.stop_ids = [-1]
    requests = [Request(prompt, 1.0) for prompt in sorted(prompts(policy), key=len, reverse=True)]
    as_a_graph(policy)
    first = decode.decode(policy, requests[:1], [1])[0]
    batch = collate([requests[0].prompt_ids], [first.ids], policy.pad_id, policy.device)
    ppo_step(policy, batch, [1.0])
    played = [decode.decode(policy, [request], [1])[0] for request in requests]
    assert policy.recorder.able
    [graph] = policy.recorder.recordings.values()
    assert graph.place.item() == len(requests[-1].prompt_ids) + 22  # the last token that it read, the last but one
    policy.recorder.able = False
    plain = [decode.decode(policy, [request], [1])[0] for request in requests]
    assert [reply.ids for reply in played] == [reply.ids for reply in plain]
    assert plain[0].ids != first.ids


def test_a_graph_that_strays_from_the_model_is_not_played(tiny_folder, monkeypatch):
    """Three rows, for which it would take four, go on as three."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama"), max_new_tokens=24))
    policy.stop_ids = [-1]
    requests = [Request(prompt, 1.0) for prompt in prompts(policy)]
    plain = decode.decode(policy, requests, [1, 2, 3])

    class Stray(Graph):
        def __call__(self, *given):
            logits, *cache = super().__call__(*given)
            return 1.1 * logits, *cache

    monkeypatch.setattr(recording, "Graph", Stray)
    as_a_graph(policy)
    played = decode.decode(policy, requests, [1, 2, 3])
    assert not policy.recorder.able
    assert [reply.ids for reply in played] == [reply.ids for reply in plain]


def test_replies_of_other_lengths_have_graphs_with_other_room_and_many_rows_none(tiny_folder, monkeypatch):
    policy, _ = load_policy(tiny_config(tiny_folder("llama"), max_new_tokens=24))
    policy.stop_ids = [-1]
    request = Request(prompts(policy)[0], 1.0)
    as_a_graph(policy)
    decode.decode(policy, [request, request], [1, 2])
    policy.config.max_new_tokens = 24 + ROOM
    decode.decode(policy, [request], [1])
    [first, second] = policy.recorder.recordings
    assert policy.recorder.able
    assert second == (first[0] + ROOM, 1)
    monkeypatch.setattr(recording, "KEPT_TOKENS", 3 * second[0])
    policy.config.max_new_tokens = 24
    decode.decode(policy, [request] * 4, [1, 2, 3, 4])
    decode.decode(policy, [request] * 8, range(8))
    assert list(policy.recorder.recordings)[2:] == [(first[0], 4)]


@pytest.mark.parametrize("strays", ["logits", "cache"])
def test_a_recording_that_strays_from_the_model_is_not_played(tiny_folder, monkeypatch, strays):
    """From the second pass on, in what it says or in what it writes for the later ones."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama"), max_new_tokens=24))
    policy.stop_ids = [-1]
    request, freeze = Request(prompts(policy)[0], 1.0), torch.jit.freeze
    length = len(request.prompt_ids) + 1  # the second pass over a single token

    def stray(recording, **options):
        recording = freeze(recording, **options)

        def play(*later):
            logits, *cache = recording(*later)
            if later[0].shape[1] == 1 and later[2].shape[-1] > length:
                (logits if strays == "logits" else cache[-1][:, :, length]).add_(1e-3)
            return logits, *cache

        return play

    plain = decode.decode(policy, [request], [1])
    monkeypatch.setattr(torch.jit, "freeze", stray)
    policy.recorder.pays = 0
    assert decode.decode(policy, [request], [1]) == plain
    assert not policy.recorder.able
    assert policy.recorder.proofs[True, True, True, True] == 2


class Untraceable(LlamaForCausalLM):
    """A model whose code asks for numbers while it runs."""

    def forward(self, input_ids=None, attention_mask=None, **arguments):
        if torch.jit.is_tracing():
            raise RuntimeError("data-dependent control flow")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **arguments)


def test_a_model_that_cannot_be_recorded_goes_on_without(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    policy = Policy(LlamaForCausalLM.from_pretrained(folder), tiny_tokenizer(CHATML), tiny_config(folder), PROMPTS)
    requests = [Request(prompt, 1.0) for prompt in prompts(policy)]
    plain = decode.decode(policy, requests, [1, 2, 3])
    policy.model.get_base_model().__class__ = Untraceable
    policy.recorder.pays = 0
    assert decode.decode(policy, requests, [1, 2, 3]) == plain
    assert not policy.recorder.able


def test_sharded_layers_are_not_recorded(tiny_folder):
    """What FSDP makes of a weight can be told by its `to_local`; such layers gather it anew for every pass."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    policy.layers[0].get_base_layer().weight.to_local = None
    policy.recorder.pays = 0
    decode.decode(policy, [Request(prompts(policy)[0], 1.0)], [1])
    assert not policy.recorder.recordings
