"""The whole loop on every supported architecture: tiny random models, loaded from folders as real ones are."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.tiny import randomize_adapter, save_tiny, tiny_policy, tiny_tokenizer
from transformers import AutoModelForCausalLM

from lora_ppo.chat import encode_chat
from lora_ppo.checkpoint import load_checkpoint, save_checkpoint
from lora_ppo.forward import collate, token_logprobs_and_values
from lora_ppo.generate import generate
from lora_ppo.quiz import one_line, option_probabilities, parse_quiz, quiz_text
from lora_ppo.quizmaster import QuizGrammar
from lora_ppo.step import ppo_step

ROOT = Path(__file__).resolve().parent.parent
QUESTION = "What is the capital of France?"
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

pytestmark = pytest.mark.filterwarnings("ignore")  # what the libraries say about their own future


def prompt_of(policy, question: str = QUESTION) -> list[int]:
    return encode_chat(policy.tokenizer, policy.prompts.tutor.messages(question))


def base_logits(folder, ids: list[int]) -> torch.Tensor:
    """What the saved model says without this program: its logits (1, P, V)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits


def policy_logits(policy, ids: list[int], adapter: bool) -> torch.Tensor:
    with torch.no_grad(), policy.adapter(adapter):
        return policy.model(input_ids=torch.tensor([ids])).logits


def sampled_batch(policy, seed: int = 0):
    """One answer that the policy wrote, as a batch of one."""
    torch.manual_seed(seed)
    prompt = prompt_of(policy)
    response = generate(policy, prompt, policy.config.temperature)
    return collate([prompt], [response], policy.pad_id, policy.device)


def answer_logprob(policy, batch) -> float:
    with torch.no_grad():
        return token_logprobs_and_values(policy, batch)[0].sum().item()


# -------------------------------------------------------------------------------------------------- generation, quiz


def test_generation_is_seeded_and_bounded(folder):
    policy = tiny_policy(folder)
    prompt = prompt_of(policy)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(generate(policy, prompt, 1.0))
    assert draws[0] == draws[1] != draws[2]
    assert all(0 < len(draw) <= policy.config.max_new_tokens for draw in draws)
    assert all(token not in policy.stop_ids for draw in draws for token in draw[:-1])


def test_generation_follows_the_distribution_that_is_trained(folder):
    """Cached decoding and the training pass agree: with a tiny top_p every token is the training logits' argmax."""
    policy = tiny_policy(folder, top_p=1e-6, max_new_tokens=40)
    randomize_adapter(policy)
    batch = sampled_batch(policy)
    with torch.no_grad():
        _, _, logits = token_logprobs_and_values(policy, batch)
    assert logits[0].argmax(-1).tolist() == batch.input_ids[0, -logits.shape[1] :].tolist()


def test_padding_has_no_influence(folder):
    """Two answers of different lengths in one batch score as each does alone."""
    policy = tiny_policy(folder)
    randomize_adapter(policy)
    prompts = [prompt_of(policy, "Why?"), prompt_of(policy, f"{QUESTION} {QUESTION}")]
    answers = [policy.tokenizer.encode(text) for text in ("Paris is the capital of France.", "Rome")]
    assert len(answers[0]) > len(answers[1])
    with torch.no_grad():
        together, _, _ = token_logprobs_and_values(policy, collate(prompts, answers, policy.pad_id, policy.device))
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            single = collate([prompt], [answer], policy.pad_id, policy.device)
            alone, _, _ = token_logprobs_and_values(policy, single)
            torch.testing.assert_close(together[row, : len(answer)], alone[0], rtol=1e-4, atol=1e-4)


def test_what_the_adapter_off_writes_does_not_depend_on_the_adapter(folder):
    policy = tiny_policy(folder, max_new_tokens=24)
    prompt = prompt_of(policy)

    def write(adapter: bool) -> list[int]:
        torch.manual_seed(3)
        return generate(policy, prompt, 1.0, adapter=adapter)

    base, fresh = write(False), write(True)
    assert fresh == base  # a fresh adapter has no effect
    randomize_adapter(policy)
    assert write(False) == base
    assert write(True) != base


def test_a_quiz_written_under_the_grammar_is_json(folder):
    """Left free, random weights write null or a quiz; begun as an object, always a quiz."""
    policy = tiny_policy(folder, max_new_tokens=700)
    prompt = encode_chat(policy.tokenizer, policy.prompts.quizmaster.messages(QUESTION))
    for begun in ("", '{"question":"'):
        beginning = policy.tokenizer.encode(begun, add_special_tokens=False)
        torch.manual_seed(1)
        grammar = QuizGrammar(policy, len(prompt))
        ids = beginning + generate(policy, prompt + beginning, 1.0, adapter=False, grammar=grammar)
        assert ids[-1] in policy.stop_ids
        text = policy.tokenizer.decode(ids, skip_special_tokens=True)
        quiz = json.loads(text)
        if not begun and quiz is None:
            continue
        assert list(quiz) == ["question", "correct", "wrong"]
        assert 1 <= len(quiz["question"]) <= 200
        assert len(quiz["wrong"]) == 3
        assert all(1 <= len(option) <= 80 for option in (quiz["correct"], *quiz["wrong"]))
        question, correct, *wrong = (one_line(part) for part in (quiz["question"], quiz["correct"], *quiz["wrong"]))
        assert parse_quiz(text) in (None, (question, correct, wrong))


def test_a_quiz_that_is_cut_short_is_the_beginning_of_one(folder):
    """At max_new_tokens a quiz may be unfinished; what there is, a fresh grammar accepts, and it parses as none."""
    policy = tiny_policy(folder, max_new_tokens=12)
    prompt = encode_chat(policy.tokenizer, policy.prompts.quizmaster.messages(QUESTION))
    beginning = policy.tokenizer.encode('{"question":"', add_special_tokens=False)
    torch.manual_seed(0)
    ids = generate(policy, prompt + beginning, 1.0, adapter=False, grammar=QuizGrammar(policy, len(prompt)))
    matcher = QuizGrammar(policy, 0).matcher
    assert matcher.validate_tokens(beginning + ids) == len(beginning + ids)
    if ids[-1] not in policy.stop_ids:
        assert parse_quiz(policy.tokenizer.decode(beginning + ids)) is None


def test_option_probabilities_are_the_base_models(folder):
    """Against the plain model, one unpadded reply at a time: its tokens' probabilities multiplied, renormalized."""
    policy = tiny_policy(folder, temperature=0.3)
    randomize_adapter(policy)
    options = [("Paris", "Rome", "Madrid", "Berlin"), ("4", "42", "a longer option", "5")]
    chats = [policy.prompts.solver.messages(quiz_text(QUESTION, four)) for four in options]
    probabilities = option_probabilities(policy, chats, options)
    assert probabilities.shape == (2, 4)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2))
    for row, (messages, four) in enumerate(zip(chats, options, strict=True)):
        prompt = encode_chat(policy.tokenizer, messages)
        scores = []
        for option in four:
            reply = [*policy.tokenizer.encode(option, add_special_tokens=False), policy.stop_ids[0]]
            logp = base_logits(folder, prompt + reply)[0].log_softmax(-1)
            scores.append(sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(reply)))
        expected = torch.tensor(scores, dtype=torch.float64).softmax(-1).float()
        torch.testing.assert_close(probabilities[row], expected, rtol=2e-3, atol=1e-5)


def test_an_option_ends_as_the_template_ends_a_reply_and_its_special_tokens_stay_text(tmp_path, monkeypatch):
    """Hubs list several end tokens, and the first is often not the one that ends a turn of a chat."""
    folder = save_tiny("llama", tmp_path)
    pad, end = tiny_tokenizer().convert_tokens_to_ids(["<|pad|>", "<|im_end|>"])
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [pad, end]}))
    policy = tiny_policy(folder)
    assert policy.stop_ids == [pad, end]
    seen, real = [], collate
    monkeypatch.setattr("lora_ppo.quiz.collate", lambda *given: seen.append(given[1]) or real(*given))
    options = ("Paris", "Ro<|im_end|>me", "Madrid", "Berlin")
    option_probabilities(policy, [policy.prompts.solver.messages(quiz_text(QUESTION, options))], [options])
    for reply, option in zip(seen[0], options, strict=True):
        assert reply[-1] == end
        assert end not in reply[:-1]
        assert policy.tokenizer.decode(reply[:-1]) == option


# --------------------------------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize("reward", [1.0, -1.0])
def test_a_step_moves_the_answer_the_way_of_its_reward(folder, reward):
    policy = tiny_policy(folder)
    batch = sampled_batch(policy)
    before = answer_logprob(policy, batch)
    metrics = ppo_step(policy, batch, [reward])
    change = answer_logprob(policy, batch) - before
    assert change * reward > 1e-3
    assert metrics["likelihood_ratio"] == pytest.approx(torch.tensor(change).exp().item(), rel=1e-3)
    assert metrics["step_kl"] > 0
    assert metrics["kl"] == pytest.approx(0.0, abs=1e-5)  # the first step starts at the reference
    assert "undone" not in metrics
    assert policy.step == 1


def test_the_reference_stays_the_base_model_bit_for_bit(folder):
    policy = tiny_policy(folder)
    prompt = prompt_of(policy)
    expected = base_logits(folder, prompt)
    assert torch.equal(policy_logits(policy, prompt, adapter=False), expected)
    ppo_step(policy, sampled_batch(policy), [1.0])
    assert torch.equal(policy_logits(policy, prompt, adapter=False), expected)
    assert not torch.equal(policy_logits(policy, prompt, adapter=True), expected)


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_comes_back_bit_for_bit(folder, tmp_path):
    """Into a policy of another seed, with the next step the same to the bit."""
    policy = tiny_policy(folder, seed=0)
    batch = sampled_batch(policy)
    ppo_step(policy, batch, [1.0])
    save_checkpoint(tmp_path / "step_1", policy, {"note": "kept"}, "No quiz was answered yet.")
    other = tiny_policy(folder, seed=1)
    saved = policy.snapshot().tensors
    assert any(not torch.equal(tensor, saved[name]) for name, tensor in other.tensors().items())
    assert load_checkpoint(tmp_path / "step_1", other)["note"] == "kept"
    assert other.step == 1
    assert saved.keys() == other.tensors().keys()
    for name, tensor in other.tensors().items():
        assert torch.equal(tensor, saved[name]), name
    assert ppo_step(policy, batch, [-1.0]) == ppo_step(other, batch, [-1.0])
    for name, tensor in other.tensors().items():
        assert torch.equal(tensor, policy.tensors()[name]), name


def test_plain_peft_loads_the_checkpoint(folder, tmp_path):
    policy = tiny_policy(folder)
    ppo_step(policy, sampled_batch(policy), [1.0])
    save_checkpoint(tmp_path / "step_1", policy, {}, "No quiz was answered yet.")
    keys = list(load_file(tmp_path / "step_1" / "adapter_model.safetensors"))
    assert len(keys) == len(policy.parameters) - 2  # all but the value head's weight and bias
    assert all(".lora_A." in key or ".lora_B." in key for key in keys)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "step_1").eval()
    prompt = prompt_of(policy)
    with torch.no_grad():
        logits = loaded(input_ids=torch.tensor([prompt])).logits
    torch.testing.assert_close(logits, policy_logits(policy, prompt, adapter=True), rtol=0, atol=1e-6)
    assert (logits - base_logits(folder, prompt)).abs().max() > 1e-4
