"""The decode loop against transformers' generate."""

from dataclasses import replace

import pytest
import torch
from support.decoding import QUESTIONS, prompts
from support.tiny import CHATML, PROMPTS, randomize_adapter, save_tiny, tiny_config, tiny_policy, tiny_tokenizer
from tokenizers import AddedToken
from transformers import GenerationConfig, LlamaForCausalLM

from lora_ppo import decode
from lora_ppo.caches import BEGINNING, sees_all, takes
from lora_ppo.chat import encode_chat
from lora_ppo.forward import collate, token_logprobs_and_values
from lora_ppo.generate import Request, generate, plain_reply, replies
from lora_ppo.loading import load_policy
from lora_ppo.policy import Policy
from lora_ppo.quizmaster import QuizGrammar
from lora_ppo.step import ppo_step


def greedy(policy, prompt: list[int], adapter: bool) -> list[int]:
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=24, eos_token_id=policy.stop_ids, pad_token_id=policy.pad_id
    )
    ids = torch.tensor([prompt])
    with torch.no_grad(), policy.adapter(adapter):
        output = policy.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return output[0, len(prompt) :].tolist()


def test_greedy_decoding_is_that_of_generate(policy):
    """A nucleus of the top token alone is greedy; three prompts of unequal length, the middle one by the base model."""
    policy.config.top_p = 1e-9
    requests = [Request(prompt, 1.0, adapter=i != 1) for i, prompt in enumerate(prompts(policy))]
    replies = decode.decode(policy, requests, seeds=[0, 1, 2])
    for i, (prompt, reply) in enumerate(zip(prompts(policy), replies, strict=True)):
        assert reply.ids == greedy(policy, prompt, adapter=i != 1)
    assert replies[1].ids != greedy(policy, prompts(policy)[1], adapter=True)  # the row gate can be told


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_sampled_replies_are_those_of_generate(policy, top_p):
    policy.config.top_p = top_p
    temperatures, seeds = (1.0, 0.5, 2.0), (5, 6, 7)
    requests = [Request(p, t, adapter=t != 0.5) for p, t in zip(prompts(policy), temperatures, strict=True)]
    replies = decode.decode(policy, requests, seeds)
    assert [reply.ids for reply in replies] == [plain_reply(policy, r, s) for r, s in zip(requests, seeds, strict=True)]


def test_recorded_logprobs_are_those_of_a_forward_pass(policy):
    policy.config.temperature = 0.7
    policy.config.top_p = 0.8
    requests = [Request(prompt, 0.7) for prompt in prompts(policy)]
    replies = decode.decode(policy, requests, seeds=[1, 2, 3])
    batch = collate(prompts(policy), [reply.ids for reply in replies], policy.pad_id, policy.device)
    with torch.no_grad():
        logprobs, _, _ = token_logprobs_and_values(policy, batch)
    for row, mask, reply in zip(logprobs, batch.response_mask, replies, strict=True):
        torch.testing.assert_close(torch.tensor(reply.logprobs), row[mask], atol=1e-4, rtol=0)


def test_a_reply_under_a_grammar_is_that_of_generate_and_its_logprobs_are_the_models(policy):
    """The nucleus is one of what the grammar allows; the log-probabilities are those without a grammar."""
    prompt, policy.config.temperature, policy.config.top_p = prompts(policy)[0], 1.0, 0.3
    once, again = (Request(prompt, 1.0, adapter=False, grammar=QuizGrammar(policy, len(prompt))) for _ in range(2))
    (reply,) = decode.decode(policy, [once], [3])
    assert reply.ids == plain_reply(policy, again, 3)
    batch = collate([prompt], [reply.ids], policy.pad_id, policy.device)
    with torch.no_grad():
        logprobs, _, _ = token_logprobs_and_values(policy, batch, adapter=False)
    torch.testing.assert_close(torch.tensor([reply.logprobs]), logprobs, atol=1e-4, rtol=0)


def test_a_reply_does_not_depend_on_what_is_written_beside_it(tiny_folder):
    policy, _ = load_policy(tiny_config(tiny_folder("qwen3"), max_new_tokens=60))
    policy.stop_ids = list(range(0, 600, 15))  # replies end early, at different times
    requests = [Request(prompt, 1.0) for prompt in prompts(policy)]
    prompt = prompts(policy)[0]
    quiz = Request(prompt, 1.0, adapter=False, grammar=QuizGrammar(policy, len(prompt)))
    together = decode.decode(policy, [*requests, quiz], seeds=[1, 2, 3, 4])
    assert len({len(reply.ids) for reply in together}) > 1  # rows left the batch one after the other
    for request, seed, reply in zip(requests, (1, 2, 3), together, strict=False):
        assert decode.decode(policy, [request], [seed])[0].ids == reply.ids
    again = Request(prompt, 1.0, adapter=False, grammar=QuizGrammar(policy, len(prompt)))
    assert decode.decode(policy, [again], [4])[0].ids == together[3].ids


def test_a_prompt_with_several_replies_is_read_once(tiny_folder):
    policy, _ = load_policy(tiny_config(tiny_folder("llama"), max_new_tokens=24))
    randomize_adapter(policy)
    first, second, _ = prompts(policy)
    asked = [Request(first, 1.0), Request(second, 1.0), Request(first, 1.0), Request(first, 1.0, adapter=False)]
    rows, model = [], policy.model.get_base_model()
    hook = model.get_input_embeddings().register_forward_hook(lambda module, given, output: rows.append(len(output)))
    replies = decode.decode(policy, asked, [1, 2, 3, 4])
    hook.remove()
    assert rows[:2] == [3, 4]
    assert replies[0] != replies[2]
    for request, seed, reply in zip(asked, [1, 2, 3, 4], replies, strict=True):
        assert decode.decode(policy, [request], [seed])[0].ids == reply.ids


def test_replies_are_the_same_through_either_path(tiny_folder, monkeypatch):
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    requests = [Request(prompt, 1.0) for prompt in prompts(policy)]
    torch.manual_seed(3)
    fast = replies(policy, requests)
    monkeypatch.setattr("lora_ppo.caches.takes", lambda policy: False)
    torch.manual_seed(3)
    assert replies(policy, requests) == fast


def test_the_text_arrives_piece_by_piece(tiny_folder):
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    pieces = []
    (reply,) = decode.decode(policy, [Request(prompts(policy)[0], 1.0, on_text=pieces.append)], [0])
    assert len(pieces) > 1
    assert "".join(pieces) == policy.tokenizer.decode(reply.ids, skip_special_tokens=True)


@pytest.mark.parametrize("fast", [True, False])
def test_the_token_that_ends_a_reply_is_not_shown_be_it_special_or_not(fast, tmp_path, monkeypatch):
    """Many a model's tokenizer has the template's end token as one that was added, and no more."""
    tokenizer = tiny_tokenizer(CHATML.replace("<|im_end|>", "<|over|>"))
    tokenizer.add_tokens([AddedToken("<|over|>", special=False)])
    tokenizer.save_pretrained(save_tiny("llama", tmp_path, vocab_size=len(tokenizer)))
    policy, pieces = tiny_policy(tmp_path), []
    over, letter = policy.tokenizer.convert_tokens_to_ids(["<|over|>", "a"])
    assert policy.end_id == over

    def three_letters(ids, scores):
        only = torch.full_like(scores, -torch.inf)
        only[:, letter if ids.shape[1] < 6 else over] = 0.0
        return only

    monkeypatch.setattr("lora_ppo.caches.takes", lambda policy: fast)
    (reply,) = replies(policy, [Request([5, 6, 7], 1.0, grammar=three_letters, on_text=pieces.append)])
    assert reply == [letter, letter, letter, over]
    assert "".join(pieces) == policy.text(reply) == "aaa"


def test_times_are_drawn_row_by_row_as_torch_draws_them():
    ours, theirs = ([torch.Generator().manual_seed(seed) for seed in (3, 1, 2)] for _ in range(2))
    for _ in range(2):  # what a generator draws next, too
        right = torch.stack([torch.empty(4096).exponential_(generator=g) for g in theirs])
        torch.testing.assert_close(decode.exponential(ours, right), right, rtol=1e-6, atol=0)


def test_the_nucleus_is_that_of_transformers():
    from transformers import TopPLogitsWarper

    torch.manual_seed(0)
    sharpness = torch.tensor([[0.1], [1.0], [5.0], [20.0]])  # flat ones need more than the tokens looked at first
    logp = (torch.randn(4, 5000) * sharpness).log_softmax(-1)
    for top_p in (0.3, 0.9, 0.999):
        wanted = TopPLogitsWarper(top_p)(None, logp)
        assert torch.equal(decode.nucleus(logp, top_p), wanted)
        for alone, right in zip(logp.split(1), wanted.split(1), strict=True):
            assert torch.equal(decode.nucleus(alone, top_p), right)


def test_an_interruption_leaves_the_adapters_on(tiny_folder):
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))

    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode.decode(policy, [Request(prompts(policy)[0], 1.0, adapter=False, on_text=interrupt)], [0])
    assert policy.gate.share is True


class Unwilling(LlamaForCausalLM):
    """A model without the arguments that the loop needs, as older remote architectures are."""

    def forward(self, input_ids=None, attention_mask=None, **arguments):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **arguments)


def test_a_model_that_the_loop_cannot_take_goes_through_generate(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    model = Unwilling.from_pretrained(folder)
    policy = Policy(model, tiny_tokenizer(CHATML), tiny_config(folder), PROMPTS)
    assert not takes(policy)
    assert generate(policy, prompts(policy)[0], 1.0)


EXAMPLES = (("What is the capital of France?", "Paris"), ("Which planet is the largest?", "Jupiter")) * 2


@pytest.fixture
def shown(policy):
    """The policy under prompts with examples, which are long enough to be remembered."""
    changed = {name: replace(getattr(policy.prompts, name), examples=EXAMPLES) for name in ("tutor", "quizmaster")}
    policy.prompts = replace(policy.prompts, **changed)
    policy.__dict__.pop("beginnings", None)
    return policy


def tokens_read(policy, requests) -> tuple[list[decode.Reply], list[int]]:
    """The replies, and how many tokens each of the longer passes for them took."""
    taken = []
    hook = (
        policy.model.get_base_model()
        .get_decoder()
        .layers[0]
        .register_forward_hook(lambda module, inputs, output: taken.append(inputs[0].shape[0] * inputs[0].shape[1]))
    )
    replies = decode.decode(policy, requests, seeds=range(len(requests)))
    hook.remove()
    return replies, [count for count in taken if count > len(requests)]


def mixed(policy) -> list[Request]:
    """Two answers, adapters on, between three replies of the quizmaster, one of them asked twice."""
    tutor, quiz = (
        [encode_chat(policy.tokenizer, role.messages(question)) for question in QUESTIONS]
        for role in (policy.prompts.tutor, policy.prompts.quizmaster)
    )
    rows = (quiz[0], False), (tutor[1], True), (quiz[2], False), (quiz[0], False), (tutor[2], True)
    return [Request(prompt, 1.0, adapter=adapter) for prompt, adapter in rows]


def test_how_the_base_models_prompts_begin_is_read_once_and_the_replies_are_the_same(shown):
    """Also after a step of training, which changes the answers and nothing that is remembered."""
    steady = sees_all(shown.model.config)
    shown.config.learning_rate = shown.optimizer.param_groups[0]["lr"] = 0.3
    shown.config.target_kl = 1e9
    requests, said = mixed(shown), []
    for _ in range(2):
        ours, first = tokens_read(shown, requests)
        again, after = tokens_read(shown, requests)
        kept, shown.beginnings.kept = shown.beginnings.kept, {}
        plain, many = tokens_read(shown, requests)
        shown.beginnings.kept = kept
        assert (len(kept) > 0) is steady
        assert [reply.ids for reply in ours] == [reply.ids for reply in plain]
        assert again == ours
        if steady:
            assert (len(first), len(after)) == (3 if said else 4, 3)  # adapters on: beginning and rest, then those off
            assert after[:2] == many[:2]
            assert after[2] < many[2] / 4
        for reply, right in zip(ours, plain, strict=True):
            torch.testing.assert_close(torch.tensor(reply.logprobs), torch.tensor(right.logprobs), atol=1e-4, rtol=0)
        said.append([reply.ids for reply in ours])
        batch = collate([requests[1].prompt_ids], [ours[1].ids], shown.pad_id, shown.device)
        ppo_step(shown, batch, [1.0])
    assert [said[0][i] == said[1][i] for i in range(5)] == [True, False, True, True, False]


def test_what_prompts_with_adapters_on_begin_with_is_read_once_and_the_replies_are_those_to_each_alone(shown):
    randomize_adapter(shown)
    tutor = shown.prompts.tutor
    asked = [encode_chat(shown.tokenizer, tutor.messages(question)) for question in QUESTIONS]
    requests = [Request(prompt, 1.0) for prompt in [*asked, asked[0]]]
    together, passes = tokens_read(shown, requests)
    alone = [decode.decode(shown, [request], [seed])[0] for seed, request in enumerate(requests)]
    assert [reply.ids for reply in together] == [reply.ids for reply in alone]
    for reply, right in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(reply.logprobs), torch.tensor(right.logprobs), atol=1e-4, rtol=0)
    if sees_all(shown.model.config):
        assert len(passes) == 2
        assert sum(passes) < 0.6 * sum(map(len, asked))
    else:
        assert len(passes) == 1


def test_a_prompt_that_another_goes_on_from_keeps_a_token_of_its_own(tiny_folder):
    policy, _ = load_policy(tiny_config(tiny_folder("llama"), max_new_tokens=6))
    policy.stop_ids = [-1]
    short = [3 + i % 50 for i in range(2 * BEGINNING)]
    requests = [Request(prompt, 1.0) for prompt in (short, [*short, 7, 8])]
    together, passes = tokens_read(policy, requests)
    assert passes[0] == len(short) - 1
    alone = [decode.decode(policy, [request], [seed])[0] for seed, request in enumerate(requests)]
    assert [reply.ids for reply in together] == [reply.ids for reply in alone]


def test_scores_are_the_same_whether_a_beginning_is_remembered_or_read(tiny_folder):
    """To the bit, in 16 bits too: else a policy that is still the reference would seem to have left it."""
    policy, _ = load_policy(tiny_config(tiny_folder("llama"), dtype="bfloat16"))
    quizmaster = replace(policy.prompts.quizmaster, examples=EXAMPLES)
    policy.prompts = replace(policy.prompts, quizmaster=quizmaster)
    policy.__dict__.pop("beginnings", None)
    questions = [f"What is the capital of {place}?" for place in ("France", "Italy", "all of Spain")]
    asked = [encode_chat(policy.tokenizer, quizmaster.messages(question)) for question in questions]
    batch = collate(asked, [[7, 9, 4], [5], [11, 12]], policy.pad_id, policy.device)
    begun, widths = policy.beginnings.of([tuple(prompt) for prompt in asked]), []
    assert min(map(len, asked)) > len(begun) >= BEGINNING
    layer = policy.model.get_base_model().get_decoder().layers[0]
    layer.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].shape[1]))

    def scores(adapter: bool) -> torch.Tensor:
        with torch.no_grad():
            return token_logprobs_and_values(policy, batch, adapter=adapter)[2][batch.response_mask]

    first, again, own = (scores(adapter) for adapter in (False, False, True))  # adapters say nothing yet
    assert torch.equal(first, again)
    assert torch.equal(first, own)
    rest = batch.input_ids.shape[1] - 1 - len(begun)
    assert widths == [len(begun), rest, rest, len(begun), rest]
    randomize_adapter(policy)
    own, policy.beginnings.kept = scores(True), {}
    torch.testing.assert_close(own, scores(True), atol=0.1, rtol=0.1)
    assert not torch.allclose(own, first, atol=0.5, rtol=0)
