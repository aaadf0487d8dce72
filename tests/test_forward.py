"""One pass over prompts and responses: padding, positions, what is read once."""

import pytest
import torch
from support import tiny
from support.decoding import prompts
from support.steps import EOS, PAD, PROMPTS, RESPONSES, make_batch, make_policy, naive_rows
from support.tiny import CHATML, randomize_adapter, tiny_config, tiny_tokenizer
from torch.testing import assert_close
from transformers import OPTConfig, OPTForCausalLM

from lora_ppo.caches import BEGINNING, ROUND, common_beginning, round_up, sees_all
from lora_ppo.forward import collate, read_sparingly, token_logprobs_and_values
from lora_ppo.loading import load_policy
from lora_ppo.settings import PROMPTS_FILE
from lora_ppo.step import ppo_step


def test_collate_by_hand():
    batch = collate([[5], [6, 7]], [[8, 9, EOS], [EOS]], EOS, torch.device("cpu"), [[True, False, True], [True]])
    assert batch.input_ids.tolist() == [[EOS, 5, 8, 9, EOS], [6, 7, EOS, EOS, EOS]]
    assert batch.attention_mask.int().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    # the end token counts even where it is the padding token as well; environment text and padding do not
    assert batch.response_mask.int().tolist() == [[1, 0, 1], [1, 0, 0]]


def test_collate_takes_every_response_token_for_chosen_without_a_mask():
    batch = collate([[5], [6]], [[8, EOS], [EOS]], PAD, torch.device("cpu"))
    assert batch.response_mask.tolist() == [[True, True], [True, False]]


def test_some_rows_are_padded_to_the_longest_of_themselves():
    prompts, responses = [[5], [6, 7], [8, 9, 10]], [[1, 2, 3, 4], [5, 6], [7]]
    chosen = [[True] * 4, [False, True], [True]]

    def made(rows):
        given = ([items[i] for i in rows] for items in (prompts, responses))
        return collate(*given, PAD, torch.device("cpu"), [chosen[i] for i in rows])

    whole = made(range(3))
    for rows in ([2, 1], [0], [2], [1, 0], [0, 1, 2]):
        for tensor, wanted in zip(vars(whole.rows(rows)).values(), vars(made(rows)).values(), strict=True):
            assert torch.equal(tensor, wanted)


@pytest.mark.parametrize("adapter", [True, False])
def test_a_padded_batch_gives_what_its_rows_give_alone(adapter):
    policy, batch = make_policy(), make_batch()
    assert not batch.attention_mask[0, 0]  # padded on the left
    assert not batch.attention_mask[0, -1]  # and on the right
    with torch.no_grad():
        logprobs, values, logits = token_logprobs_and_values(policy, batch, adapter=adapter)
        for b, (prompt, response, row) in enumerate(
            zip(PROMPTS, RESPONSES, naive_rows(policy, make_batch()), strict=True)
        ):
            prompt = [(token + 3 * b) % 64 for token in prompt]
            n = len(response)
            alone = collate([prompt], [response], PAD, torch.device("cpu"))
            lp, v, lg = token_logprobs_and_values(policy, alone, adapter=adapter)
            assert_close(logprobs[b, :n], lp[0], rtol=1e-5, atol=1e-5)
            assert_close(values[b, :n], v[0], rtol=1e-5, atol=1e-5)
            assert_close(logits[b, :n], lg[0], rtol=1e-5, atol=1e-5)
            expected = (row.logp if adapter else row.ref)[torch.arange(n), torch.tensor(response)]
            assert_close(logprobs[b, :n], expected, rtol=1e-5, atol=1e-5)


def test_the_model_is_told_where_padding_is_and_counts_positions_without_it():
    """Rotary positions are relative and would not notice; a model with absolute ones would."""
    policy, batch, seen = make_policy(), make_batch(), {}
    inner = policy.model.base_model.model.model
    hook = inner.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    token_logprobs_and_values(policy, batch)
    hook.remove()
    told, real = seen["attention_mask"].bool(), batch.attention_mask[:, :-1]
    assert torch.equal(told[:, : real.shape[1]], real)
    assert not told[:, real.shape[1] :].any()
    for positions, row in zip(seen["position_ids"], real, strict=True):
        assert positions[: len(row)][row].tolist() == list(range(int(row.sum())))


def test_logits_exist_for_response_positions_only():
    policy, batch, seen = make_policy(), make_batch(), []
    hook = policy.head.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0].shape, output.shape))
    )
    ppo_step(policy, batch, [1.0, -1.0, 1.0])
    hook.remove()
    b, t = batch.response_mask.shape
    assert batch.input_ids.shape[1] > t + 1
    assert seen == [((b, t, 32), (b, t, 64))] * 3  # reference, gradient pass, trust region
    assert token_logprobs_and_values(policy, batch)[2].shape == (b, t, 64)


ANSWERS = [[7, 9, 4], [5], [11, 12, 13, 14, 15, 16], [3, 4], [8, 8, 8], [20], [1], [2, 1]]


def measured(policy, batch, adapter: bool = True) -> tuple[list[torch.Tensor], int]:
    """What a forward pass says of the real response tokens, the gradient of it all; and the tokens that it took."""
    taken, mask = [], batch.response_mask
    layer = policy.model.get_base_model().get_decoder().layers[0]
    hook = layer.register_forward_hook(lambda module, inputs, output: taken.append(inputs[0][..., 0].numel()))
    policy.optimizer.zero_grad()
    torch.nn.init.constant_(policy.value_head.weight, 0.1)
    logprobs, values, logits = token_logprobs_and_values(policy, batch, adapter=adapter)
    (logprobs[mask].sum() + values[mask].sum()).backward()
    hook.remove()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters.values()]
    return [x.detach()[mask] for x in (logprobs, values, logits)] + gradients, sum(taken)


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("answers", [1, 4])
def test_what_long_prompts_begin_with_is_read_once(policy, adapter, answers, monkeypatch):
    """Prompts of unequal length after the same examples, one of them a token longer; one answer to each, or several."""
    begun = [(7 * i + i * i) % 64 for i in range(BEGINNING)]
    asked = [begun + ends for ends in ([1, 2, 3], [9], [4, 5, 6, 7, 8], [1, 3])]
    rows = asked if answers == 1 else [asked[i % 2] for i in range(8)]
    batch = collate(rows, ANSWERS[: len(rows)], policy.pad_id, policy.device)
    shared, few = measured(policy, batch, adapter)
    monkeypatch.setattr("lora_ppo.forward.read_sparingly", lambda *_: None)
    plain, many = measured(policy, batch, adapter)
    if sees_all(policy.model.config):  # a sliding window forgets how the prompts began
        assert few < many / 2
    for ours, theirs in zip(shared, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert max(x.abs().max() for x in plain[3:]) > 0.1


def test_how_prompts_begin_by_hand():
    long = tuple(range(BEGINNING))
    assert common_beginning([(*long, 1, 2), (*long, 3), (*long, 1, 5, 6)]) == BEGINNING
    assert common_beginning([(*long, 1, 2, 3), (*long, 1, 2)]) == BEGINNING + 2
    assert common_beginning([(*long[1:], 1, 2), (*long[1:], 3, 4)]) == 0
    assert common_beginning([(*long, 1)]) == 0


@pytest.mark.parametrize("adapter", [True, False])
def test_a_prompt_with_several_answers_is_read_once(policy, adapter, monkeypatch):
    """Answers and prompts of unequal length, one prompt a single token, groups that do not lie together."""
    asked = [*prompts(policy)[:2], [9]]
    batch = collate([asked[i % 3] for i in range(8)], ANSWERS, policy.pad_id, policy.device)
    shared, few = measured(policy, batch, adapter)
    monkeypatch.setattr("lora_ppo.forward.read_sparingly", lambda *_: None)
    plain, many = measured(policy, batch, adapter)
    longest = max(map(len, asked))
    assert (few, many) == (3 * (longest - 1) + 8 * 6, 8 * round_up(longest + 5, policy.device))
    for ours, theirs in zip(shared, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert max(x.abs().max() for x in plain[3:]) > 0.1


@pytest.mark.parametrize("training", [True, False])
def test_passes_of_many_lengths_ask_for_products_of_few(tiny_folder, training):
    """oneDNN compiles one for each number of rows, and keeps it."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    rows, layer = set(), policy.layers[0].get_base_layer()
    hook = layer.register_forward_hook(lambda module, inputs, output: rows.add(inputs[0][..., 0].numel()))
    for length in range(2, 3 * ROUND):
        batch = collate([[5] * length], [[6, 7]], policy.pad_id, policy.device)
        with torch.set_grad_enabled(training):
            logprobs, _, _ = token_logprobs_and_values(policy, batch)
        assert logprobs.shape == (1, 2)
    hook.remove()
    assert rows == {ROUND, 2 * ROUND, 3 * ROUND}


def test_what_fills_the_context_is_read_without_padding_beyond_it(tmp_path):
    """A model with learned positions has none for that."""
    tokenizer = tiny_tokenizer(CHATML)
    shape = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2}
    config = OPTConfig(vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=300, **shape)
    OPTForCausalLM(config).eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / PROMPTS_FILE).write_text(tiny.PROMPTS.as_yaml(), encoding="utf-8")
    policy, _ = load_policy(tiny_config(tmp_path))
    randomize_adapter(policy)
    prompt, answer = list(range(20, 311)), list(range(50, 59))
    batch = collate([prompt], [answer], policy.pad_id, policy.device)
    logprobs, _, _ = token_logprobs_and_values(policy, batch)
    logits = policy.model(input_ids=batch.input_ids).logits[0, 290:-1].log_softmax(-1)
    torch.testing.assert_close(logprobs[0], logits[range(9), answer], atol=1e-5, rtol=1e-5)


def test_prompts_are_read_as_they_are_where_few_rows_share_them_and_in_layers_of_other_kinds(tiny_folder):
    """Layers that are recomputed fill no cache; those that gather their weights must all make the same passes."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    first, second, third = prompts(policy)
    for asked, shared in (([first, first, second], False), ([first, first, second, third], False), ([first] * 2, True)):
        batch = collate(asked, ANSWERS[: len(asked)], policy.pad_id, policy.device)
        assert (read_sparingly(policy, batch) is not None) is shared
    policy.model.get_base_model().gradient_checkpointing_enable()
    assert read_sparingly(policy, batch) is None
    policy.model.get_base_model().gradient_checkpointing_disable()
    assert read_sparingly(policy, batch) is not None
    policy.layers[0].get_base_layer().weight.to_local = None
    assert read_sparingly(policy, batch) is None


def test_padding_that_is_a_real_token_elsewhere_makes_no_two_prompts_one(tiny_folder):
    """[pad] 5 and a real pad token before 5 look the same in the ids alone."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    randomize_adapter(policy)
    asked = [[5, 6], [5, 6], [policy.pad_id, 5, 6], [policy.pad_id, 5, 6]]
    answers = ANSWERS[2:4] * 2
    batch = collate(asked, answers, policy.pad_id, policy.device)
    assert read_sparingly(policy, batch) is not None
    logprobs, _, _ = token_logprobs_and_values(policy, batch)
    for row, prompt, answer in zip(logprobs, asked, answers, strict=True):
        alone, _, _ = token_logprobs_and_values(policy, collate([prompt], [answer], policy.pad_id, policy.device))
        torch.testing.assert_close(row[: len(answer)], alone[0], atol=1e-5, rtol=1e-5)
