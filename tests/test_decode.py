"""The decode loop against transformers' generate, on every architecture; the recorded log-probabilities against a
forward pass."""

import copy

import pytest
import torch
from tiny import ARCHITECTURES, CHATML, randomize_adapter, save_tiny, tiny_config, tiny_tokenizer
from transformers import GenerationConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from config import Config
from lora_ppo import decode, recording
from lora_ppo.chat import QUIZMASTER_PROMPT, chat, encode_chat
from lora_ppo.forward import collate, known_beginning, read_sparingly, token_logprobs_and_values
from lora_ppo.generate import Request, generate, plain_reply, replies
from lora_ppo.layers import FEW_ROWS, LeanLayer, made_again, speed_up_products
from lora_ppo.policy import Policy, gradient_dropout, load_policy
from lora_ppo.quiz import Quiz, QuizGrammar, learner_probabilities
from lora_ppo.recording import ROOM, ROUND, SHORT, Graph, RoomyLayer, round_up, sees_all, takes
from lora_ppo.step import ppo_step
from lora_ppo.training import recomputing
from tools.bench_measure import MB, profile

QUESTIONS = ("What is the capital of France?", "Hi", "Which planet is the largest of them all, and why is that?")


@pytest.fixture(params=ARCHITECTURES)
def policy(request, tiny_folder):
    """A policy whose adapters change what is written; replies outgrow the sliding windows of 16 tokens."""
    policy, _ = load_policy(tiny_config(tiny_folder(request.param), max_new_tokens=24))
    randomize_adapter(policy)
    return policy


def prompts(policy) -> list[list[int]]:
    return [encode_chat(policy.tokenizer, chat(QUIZMASTER_PROMPT, question)) for question in QUESTIONS]


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


# ----------------------------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1, 150])
def test_quick_products_and_their_gradients_are_those_of_float64(rows, bias):
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 80, bias=bias).requires_grad_(False)
    exact = copy.deepcopy(layer).double()
    speed_up_products(torch.nn.ModuleList([layer]))
    for shape in ((rows, 48), (1, rows, 48)):
        x = torch.randn(shape, requires_grad=True)
        weights = torch.randn(80, rows).t()  # of the sum below: a gradient that does not lie row by row
        (gradient,) = torch.autograd.grad((layer(x) * weights).sum(), x)
        y = x.detach().double().requires_grad_()
        (wanted,) = torch.autograd.grad((exact(y) * weights).sum(), y)
        torch.testing.assert_close(gradient.double(), wanted, atol=1e-5, rtol=1e-5)
        for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
            with mode():
                torch.testing.assert_close(layer(x).double(), exact(y), atol=1e-5, rtol=1e-5)
                columns = x.detach().mT.contiguous().mT  # that do not lie row by row
                torch.testing.assert_close(layer(columns).double(), exact(y), atol=1e-5, rtol=1e-5)


def test_a_layer_that_is_trained_after_all_keeps_its_gradient_and_16_bits_are_left_to_torch():
    trained, half = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8, dtype=torch.bfloat16)
    speed_up_products(torch.nn.ModuleList([trained, half]))
    trained(torch.ones(40, 8)).sum().backward()
    assert trained.weight.grad.eq(40).all()
    assert "forward" not in vars(half)


def lean_modules(policy) -> list:
    """The modules whose forward keeps less for the backward pass."""

    def is_lean(forward) -> bool:
        return isinstance(getattr(getattr(forward, "func", forward), "__self__", None), LeanLayer)

    return [module for module in policy.model.modules() if is_lean(vars(module).get("forward"))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_that_keep_less_have_the_same_gradients(architecture, tiny_folder, dtype, dropout):
    policy, _ = load_policy(tiny_config(tiny_folder(architecture), dtype=dtype, lora_dropout=dropout))
    randomize_adapter(policy)
    batch = collate(prompts(policy), [[9, 8, 7], [6, 5], [4]], policy.pad_id, policy.device)

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        with gradient_dropout(policy):
            logprobs, _, logits = token_logprobs_and_values(policy, batch)
        loss = logprobs.sum() + logits.square().mean()
        parameters = tuple(policy.parameters.values())
        twice = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for _ in range(2)]
        return [*twice[0], *twice[1]]

    lean, modules = gradients(), lean_modules(policy)
    kinds = {"DecoderLayer", "RMSNorm", "MLP"} - ({"MLP"} if architecture == "phi3" else set())  # its MLP is another
    assert {kind for kind in kinds for module in modules if type(module).__name__.endswith(kind)} == kinds
    assert sum(type(module).__name__.endswith("DecoderLayer") for module in modules) == 2
    for module in modules:
        del module.forward
    for ours, right in zip(lean, gradients(), strict=True):
        assert ours is right or torch.equal(ours, right)


def test_a_view_of_what_is_made_again_is_the_same_view():
    torch.manual_seed(0)
    a, b = torch.randn(3, 4), torch.randn(2, 5, requires_grad=True)
    wave = a.sin()
    with made_again({wave.untyped_storage().data_ptr(): lambda: made.append(1) or a.sin()}):
        result = wave[1:, 1:].t() @ b
    made: list[int] = []
    result.sum().backward()
    assert made
    torch.testing.assert_close(b.grad, a.sin()[1:, 1:].sum(1, keepdim=True).expand(2, 5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_layers_keep_and_that_recomputed_ones_keep_nothing(dtype):
    """Each token less by two tensors of the MLP's inner width, and what the two norms give; in 16 bits what norms are
    given is kept as it is, not in 32."""
    policy, _ = load_policy(Config(device="cpu", dtype=dtype))
    batch = collate([[300] * 150], [[301] * 257], policy.pad_id, policy.device)
    config = policy.model.config
    size = 2 * config.intermediate_size + 2 * config.hidden_size * (2 if dtype == "bfloat16" else 1)
    spared = config.num_hidden_layers * 406 * size * policy.model.dtype.itemsize / MB  # the last token is not read

    for layer in policy.model.get_base_model().model.layers:  # as FSDP makes them, of which recomputation takes note
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})

    def peaks() -> list[float]:
        """MB of tensors in a forward pass with its graph; without and with gradient checkpointing."""
        found = [profile(lambda: token_logprobs_and_values(policy, batch))["tensors MB"]]
        policy.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        with recomputing(policy):
            found.append(profile(lambda: token_logprobs_and_values(policy, batch))["tensors MB"])
        policy.model.get_base_model().gradient_checkpointing_disable()
        return found

    lean = peaks()
    for module in lean_modules(policy):
        del module.forward
    plain = peaks()
    assert plain[0] - lean[0] == pytest.approx(spared, rel=0.05)
    assert plain[1] == pytest.approx(lean[1], rel=1e-3)
    assert lean[1] < lean[0] / 2


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


# ------------------------------------------------------------------------------------------- prompts with many answers

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
def test_a_prompt_with_several_answers_is_read_once(policy, adapter, monkeypatch):
    """Answers and prompts of unequal length, one prompt a single token, groups that do not lie together."""
    asked = [*prompts(policy)[:2], [9]]
    batch = collate([asked[i % 3] for i in range(8)], ANSWERS, policy.pad_id, policy.device)
    shared, few = measured(policy, batch, adapter)
    monkeypatch.setattr("lora_ppo.forward.read_sparingly", lambda *_: None)
    plain, many = measured(policy, batch, adapter)
    longest = max(map(len, asked))
    assert (few, many) == (3 * (longest - 1) + 8 * 6, 8 * round_up(longest + 5))
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
    config = OPTConfig(vocab_size=len(tokenizer), num_attention_heads=4, max_position_embeddings=29, **shape)
    OPTForCausalLM(config).eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy, _ = load_policy(tiny_config(tmp_path))
    randomize_adapter(policy)
    prompt, answer = list(range(20, 40)), list(range(50, 59))
    batch = collate([prompt], [answer], policy.pad_id, policy.device)
    logprobs, _, _ = token_logprobs_and_values(policy, batch)
    logits = policy.model(input_ids=batch.input_ids).logits[0, 19:-1].log_softmax(-1)
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


@pytest.mark.parametrize("which", [[0], [0, 1, 2], [2, 0, 2, 0, 0, 2]], ids=["alone", "unequal", "shared"])
def test_how_a_role_begins_is_read_once_by_the_base_model(policy, which, monkeypatch):
    """Where layers see all tokens, that is; the policy changes, and reads it every time."""
    asked = [prompts(policy)[i] for i in which]
    batch = collate(asked, ANSWERS[: len(which)], policy.pad_id, policy.device)
    begins = next((b for b in policy.beginnings if tuple(asked[0][: len(b)]) == b), ())
    assert bool(begins) == sees_all(policy.model.get_base_model().config.get_text_config())
    runs = [measured(policy, batch, adapter=False) for _ in range(2)]
    trained = measured(policy, batch, adapter=True)
    monkeypatch.setattr("lora_ppo.forward.read_sparingly", lambda *_: None)
    plain, many = measured(policy, batch, adapter=False)
    for run, _ in runs:
        for ours, theirs in zip(run, plain, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    (longest, width), spared = (max(map(len, x)) for x in (asked, ANSWERS[: len(which)])), len(begins)
    if len(which) == 6:
        rest = 2 * (longest - 1 - spared) + 6 * width
    else:
        tokens = longest + width - 1
        rest = len(which) * (tokens - spared if spared else round_up(tokens))
    assert [taken for _, taken in runs] == [rest + spared, rest]
    assert trained[1] == (2 * (longest - 1) + 6 * width if len(which) == 6 else many)


def test_a_beginning_is_known_only_to_prompts_that_go_on_from_it(tiny_folder):
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    begins, *others = policy.beginnings
    with policy.adapter(False):
        assert known_beginning(policy, [(*begins, 5), (*begins, 6, 7)]) == begins
        for other in ((5,), begins, (*begins[:-1], 5, 5), (5, *begins)):
            assert known_beginning(policy, [(*begins, 5), other]) == ()
    assert policy.beginnings[begins]
    assert others
    assert not any(policy.beginnings[other] for other in others)
    assert known_beginning(policy, [(*begins, 5)]) == ()  # the policy reads
    assert load_policy(tiny_config(tiny_folder("llama"), dtype="bfloat16"))[0].beginnings == {}


# ---------------------------------------------------------------------------------------------------------- the batch


def test_a_reply_does_not_depend_on_what_is_written_beside_it(tiny_folder):
    policy, _ = load_policy(tiny_config(tiny_folder("qwen3"), max_new_tokens=60))
    policy.model.generation_config.eos_token_id = list(range(0, 600, 15))  # replies end early, at different times
    requests = [Request(prompt, 1.0) for prompt in prompts(policy)]
    prompt = prompts(policy)[0]
    quiz = Request(prompt, 1.0, adapter=False, grammar=QuizGrammar(policy, len(prompt)))
    together = decode.decode(policy, [*requests, quiz], seeds=[1, 2, 3, 4])
    assert len({len(reply.ids) for reply in together}) > 1  # rows left the batch one after the other
    for request, seed, reply in zip(requests, (1, 2, 3), together, strict=False):
        assert decode.decode(policy, [request], [seed])[0].ids == reply.ids
    again = Request(prompt, 1.0, adapter=False, grammar=QuizGrammar(policy, len(prompt)))
    assert decode.decode(policy, [again], [4])[0].ids == together[3].ids


def test_a_recorded_pass_writes_the_same(policy):
    """Three rows, gated and padded, that leave the batch one by one; recorded from the first pass on."""
    requests = [Request(prompt, 1.0, adapter=i != 1) for i, prompt in enumerate(prompts(policy))]
    policy.model.generation_config.eos_token_id = list(range(0, 600, 25))
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
    policy.model.generation_config.eos_token_id = -1
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
    policy.model.generation_config.eos_token_id = list(range(0, 600, 25))
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
    policy.model.generation_config.eos_token_id = -1
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
    policy.model.generation_config.eos_token_id = -1
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
    policy.model.generation_config.eos_token_id = -1
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
    policy.model.generation_config.eos_token_id = -1
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
    monkeypatch.setattr("lora_ppo.recording.takes", lambda policy: False)
    torch.manual_seed(3)
    assert replies(policy, requests) == fast


def test_the_text_arrives_piece_by_piece(tiny_folder):
    policy, _ = load_policy(tiny_config(tiny_folder("llama")))
    pieces = []
    (reply,) = decode.decode(policy, [Request(prompts(policy)[0], 1.0, on_text=pieces.append)], [0])
    assert len(pieces) > 1
    assert "".join(pieces) == policy.tokenizer.decode(reply.ids, skip_special_tokens=True)


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


class Untraceable(LlamaForCausalLM):
    """A model whose code asks for numbers while it runs."""

    def forward(self, input_ids=None, attention_mask=None, **arguments):
        if torch.jit.is_tracing():
            raise RuntimeError("data-dependent control flow")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **arguments)


def test_a_model_that_cannot_be_recorded_goes_on_without(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    policy = Policy(LlamaForCausalLM.from_pretrained(folder), tiny_tokenizer(CHATML), tiny_config(folder))
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


class Unwilling(LlamaForCausalLM):
    """A model without the arguments that the loop needs, as older remote architectures are."""

    def forward(self, input_ids=None, attention_mask=None, **arguments):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **arguments)


def test_a_model_that_the_loop_cannot_take_goes_through_generate(tmp_path):
    folder = save_tiny("llama", tmp_path / "model")
    model = Unwilling.from_pretrained(folder)
    policy = Policy(model, tiny_tokenizer(CHATML), tiny_config(folder))
    assert not takes(policy)
    assert generate(policy, prompts(policy)[0], 1.0)
