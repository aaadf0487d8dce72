"""Recorded passes: they write what the model writes, see what training changes, and are dropped where they stray."""

import torch
from support.decoding import prompts
from support.tiny import randomize_adapter, tiny_config

from lora_ppo import decode, recording
from lora_ppo.caches import RoomyLayer, sees_all
from lora_ppo.forward import collate
from lora_ppo.generate import Request
from lora_ppo.loading import load_policy
from lora_ppo.recording import ROOM, Graph
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
    fit = policy.recorder.able
    assert fit == sees_all(policy.model.get_base_model().config.get_text_config())
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
    token = sum(x[0, :, 0].nbytes for x in policy.recorder.recordings[first].kept)
    monkeypatch.setattr(recording, "spare_memory", lambda _: 3 * second[0] * token / recording.KEPT_SHARE)
    policy.config.max_new_tokens = 24
    decode.decode(policy, [request] * 4, [1, 2, 3, 4])
    decode.decode(policy, [request] * 8, range(8))
    assert list(policy.recorder.recordings)[2:] == [(first[0], 4)]


def test_sharded_layers_are_not_recorded(tiny_folder):
    """What FSDP makes of a weight can be told by its `to_local`; such layers gather it anew for every pass."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    policy.layers[0].get_base_layer().weight.to_local = None
    as_a_graph(policy)
    decode.decode(policy, [Request(prompts(policy)[0], 1.0)], [1])
    assert not policy.recorder.recordings
