"""How a quiz is written: its grammar, its key, and the gate."""

import json
import re
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace

import pytest
import torch
from support.tiny import PROMPTS, SPECIAL_TOKENS, drive, randomize_adapter, save_tiny, tiny_policy

from config import Config
from lora_ppo.chat import encode_chat
from lora_ppo.checks import longest_prompt
from lora_ppo.gate import Gate
from lora_ppo.generate import Request, replies
from lora_ppo.loading import load_policy
from lora_ppo.quiz import Quiz, flaw, learner_probabilities, parse_quiz, quiz_json, readable
from lora_ppo.quizmaster import (
    ANSWERS,
    JSON_STRING,
    Draft,
    QuizGrammar,
    agree,
    alike,
    answer_logprobs,
    answer_requests,
    echoes,
    first_requests,
    make_quiz,
    reworded,
    rewording_request,
    solved_quiz,
    survives,
    with_wrong_options,
)


def token_bytes(tokenizer) -> list[bytes]:
    """What each token writes; byte-level BPE spells the bytes that don't print as other characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return [b"" if name in SPECIAL_TOKENS else bytes(byte_of[c] for c in name) for name in names]


def repeater(tokenizer, option: str, long: bool):
    """Picks tokens that spell `option` again as every wrong option, in the longest or the shortest pieces."""
    spelled = token_bytes(tokenizer)
    wanted = json.dumps(option, ensure_ascii=False).encode()

    def choose(written: list[int], allowed: list[int]) -> int:
        done = b"".join(spelled[i] for i in written).partition(b'"wrong":')[2]
        unfinished = re.sub(rb'"(?:[^"\\]|\\.)*"', b"", done).lstrip(b"[,]}")
        rest = wanted[len(unfinished) :] if wanted.startswith(unfinished) else b'"'  # refused: close and begin again

        def preference(token: int) -> tuple[int, int]:
            text = spelled[token]
            if text.startswith(rest):
                return 2, len(text) if long else -len(text)
            if text and rest.startswith(text):
                return 2 if not long else 1, len(text) if long else -len(text)
            return 0, -len(text)

        return max(allowed, key=preference)

    return choose


OPTIONS_TO_REPEAT = [
    *((option, long) for option in ("Paris", "4", "22", "What is it?", "[x],") for long in (True, False)),
    *((option, long) for option in ("a\\b", "wrong") for long in (True, False)),
    ("...", False),
    (":[", False),
    *((option, long) for option in ("é", "日本", 'say "hi"') for long in (True, False)),
    *((option, True) for option in ("...", ":[")),
]


@pytest.mark.parametrize(("option", "long"), OPTIONS_TO_REPEAT)
def test_no_option_repeats_an_earlier_one(llama_policy, option, long):
    """Against scores that always prefer to spell the first option again, the options end up distinct."""
    tokenizer = llama_policy.tokenizer
    beginning = quiz_json("Which?", option, [])[:-2]  # up to the bracket
    prefix = tokenizer.encode(beginning, add_special_tokens=False)
    ids = drive(QuizGrammar(llama_policy, 1), prefix, repeater(tokenizer, option, long), limit=600)
    assert ids[-1] in llama_policy.stop_ids
    quiz = json.loads(tokenizer.decode(ids, skip_special_tokens=True))
    options = [quiz["correct"], *quiz["wrong"]]
    assert quiz["correct"] == option
    assert len(options) == len(set(options)) == 4, options


def test_a_word_is_refused_before_it_is_whole(llama_policy):
    """Refused at its end alone, "Paris" would go on as "Parisian" or worse."""
    tokenizer = llama_policy.tokenizer
    written = tokenizer.encode(quiz_json("Which?", "Paris", [])[:-2] + '"Pari', add_special_tokens=False)
    scores = QuizGrammar(llama_policy, 1)(torch.tensor([[0, *written]]), torch.zeros(1, len(tokenizer)))
    assert not scores[0, tokenizer.convert_tokens_to_ids("s")].isfinite()
    assert scores[0, tokenizer.convert_tokens_to_ids("t")].isfinite()


def test_a_number_of_the_greatest_length_that_repeats_is_thrown_away(llama_policy):
    """There the grammar leaves nothing but its end, so the quiz is refused as a whole."""
    tokenizer, option = llama_policy.tokenizer, "12345678" * 10
    prefix = tokenizer.encode(quiz_json("Which?", option, [])[:-2], add_special_tokens=False)
    ids = drive(QuizGrammar(llama_policy, 1), prefix, repeater(tokenizer, option, True), limit=600)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert json.loads(text)["wrong"] == [option] * 3
    assert parse_quiz(text) is None


@pytest.mark.parametrize("longer", [("1", "12", "123", "1234"), ("Marseille", "Mars", "Mar", "M")])
def test_options_may_begin_alike(llama_policy, longer):
    """Numbers often do; only the whole repetition is refused, and a word that an earlier one goes on from is none."""
    tokenizer = llama_policy.tokenizer
    beginning, _, rest = quiz_json("Which?", longer[0], longer[1:]).partition('["')
    letters = [tokenizer.encode(c, add_special_tokens=False)[0] for c in rest]
    grammar = QuizGrammar(llama_policy, 1)
    written = tokenizer.encode(beginning + '["', add_special_tokens=False)
    for token in letters:
        scores = grammar(torch.tensor([[0, *written]]), torch.zeros(1, len(tokenizer)))
        assert scores[0, token].isfinite(), tokenizer.decode([*written, token])
        written.append(token)
    assert parse_quiz(tokenizer.decode(written)) == ("Which?", longer[0], list(longer[1:]))


@pytest.mark.parametrize("text", ["null", quiz_json("Which?", "a", ["b", "c", "d"])])
@pytest.mark.parametrize("stop_ids", [[1], [2], [1, 2]])
def test_after_the_quiz_only_end_tokens_are_allowed(llama_policy, text, stop_ids):
    """Whichever tokens end the model's replies: the tokenizer's own is 1."""
    llama_policy.stop_ids = stop_ids
    tokenizer = llama_policy.tokenizer
    grammar = QuizGrammar(llama_policy, 1)
    written: list[int] = []
    vocabulary = torch.zeros(1, len(tokenizer))
    for token in tokenizer.encode(text, add_special_tokens=False):
        scores = grammar(torch.tensor([[0, *written]]), vocabulary)
        assert not scores[0, stop_ids].isfinite().any()
        assert scores[0, token].isfinite()
        written.append(token)
    allowed = grammar(torch.tensor([[0, *written]]), vocabulary)[0].isfinite().nonzero().flatten().tolist()
    assert allowed == stop_ids


def test_the_grammar_keeps_the_scores_of_what_it_allows(llama_policy):
    tokenizer = llama_policy.tokenizer
    scores = torch.randn(1, len(tokenizer), generator=torch.Generator().manual_seed(0))
    masked = QuizGrammar(llama_policy, 1)(torch.tensor([[0]]), scores)
    allowed = masked.isfinite()
    assert torch.equal(masked[allowed], scores[allowed])
    texts = {tokenizer.decode([i]) for i in allowed[0].nonzero().flatten().tolist()}
    assert texts == {text for text in tokenizer.batch_decode([[i] for i in range(len(tokenizer))]) if text} & {
        start[:n] for start in ("null", '{"question":"') for n in range(1, len(start) + 1)
    }


def test_no_whitespace_outside_strings(llama_policy):
    """Against scores that prefer whitespace wherever it is allowed."""
    tokenizer = llama_policy.tokenizer
    spelled = token_bytes(tokenizer)

    def choose(written: list[int], allowed: list[int]) -> int:
        return max(allowed, key=lambda i: (spelled[i][:1].isspace(), spelled[i].startswith(b'"'), -len(spelled[i])))

    beginning = tokenizer.encode("{", add_special_tokens=False)
    ids = drive(QuizGrammar(llama_policy, 1), beginning, choose, limit=900)
    assert ids[-1] in llama_policy.stop_ids
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert " " in json.loads(text)["question"]
    assert JSON_STRING.sub("", text) == "{:,:,:[,,]}"


POLICY = SimpleNamespace(prompts=PROMPTS)
QUIZ = Quiz("Which city?", ("Rome", "Madrid", "Paris", "Berlin"), 2)


def solver(pick, calls: list):
    """In place of option_probabilities: `pick(lines)` names the line that is chosen among the four of each quiz."""

    def probabilities(policy, chats, options):
        lines = [messages[-1]["content"].split("\n")[1:] for messages in chats]
        calls.extend(lines)
        return torch.eye(4)[[pick(four) for four in lines]]

    return probabilities


def test_a_quiz_survives_a_solver_that_knows(monkeypatch):
    """And it is asked four times, with the key behind each letter once."""
    calls: list[list[str]] = []
    monkeypatch.setattr("lora_ppo.quizmaster.option_probabilities", solver(lambda four: find(four, "Paris"), calls))
    assert survives(POLICY, QUIZ) is True
    assert sorted(find(four, "Paris") for four in calls) == [0, 1, 2, 3]
    assert all(sorted(line[3:] for line in four) == sorted(QUIZ.options) for four in calls)
    assert all([line[:3] for line in four] == ["A) ", "B) ", "C) ", "D) "] for four in calls)


def find(lines: list[str], option: str) -> int:
    return next(i for i, line in enumerate(lines) if line.endswith(f") {option}"))


@pytest.mark.parametrize("letter", range(4))
def test_a_quiz_does_not_survive_a_solver_that_always_picks_one_letter(monkeypatch, letter):
    monkeypatch.setattr("lora_ppo.quizmaster.option_probabilities", solver(lambda four: letter, []))
    assert survives(POLICY, QUIZ) is False


@pytest.mark.parametrize(("known", "expected"), [(4, True), (3, True), (2, False), (0, False)])
def test_a_quiz_needs_more_than_half_of_its_four_trials(monkeypatch, known, expected):
    answers = iter([True] * known + [False] * (4 - known))

    def pick(four: list[str]) -> int:
        return find(four, "Paris" if next(answers) else "Rome")

    monkeypatch.setattr("lora_ppo.quizmaster.option_probabilities", solver(pick, []))
    assert survives(POLICY, QUIZ) is expected


@pytest.mark.parametrize("key", range(4))
def test_a_wrong_key_does_not_survive(monkeypatch, key):
    """The solver knows the answer; the quiz claims another option."""
    monkeypatch.setattr("lora_ppo.quizmaster.option_probabilities", solver(lambda four: find(four, "Paris"), []))
    quiz = Quiz(QUIZ.question, QUIZ.options, key)
    assert survives(POLICY, quiz) is (key == QUIZ.key)


# --------------------------------------------------------------------------------------------------------- the context


@pytest.fixture(params=["agreement", "options"])
def crowded(request, tmp_path):
    """A policy, and a question that just fits. OPT has no positions beyond its context: what goes there is an error."""
    roles, gate = ("tutor", "quizmaster", "solver"), Gate(request.param, 1, 0.0, right=9, shown=10, asked=40)
    policies = []
    for room in (1024, 0):
        longest = longest_prompt(policies[0], "Why?", (*roles, "learner")) if policies else 0
        folder = save_tiny("opt", tmp_path / f"opt{room}", max_position_embeddings=room or longest + 24)
        policies.append(tiny_policy(folder, target_modules=["q_proj"]))
        policies[-1].quiz_gate = gate
    policy, question = policies[1], "Why?"
    while longest_prompt(policy, f"{question} why", roles) <= policy.context - policy.config.max_new_tokens:
        question += " why"
    return policy, question


def test_nothing_that_a_quiz_asks_goes_beyond_the_context(crowded):
    policy, question = crowded
    for seed in range(3):
        torch.manual_seed(seed)
        make_quiz(policy, question, why=[])
        with_wrong_options(policy, Draft(question, "a key", 9))


def test_a_quiz_that_no_solver_and_no_learner_could_read_whole_is_none(crowded):
    policy, question = crowded
    long = [f"an option that is number {number} and as long as this" for number in range(4)]
    written = policy.tokenizer.encode(quiz_json("Which?", long[0], long[1:]), add_special_tokens=False)
    why: list[str] = []
    assert solved_quiz(policy, question, written, why) is None
    assert why == ["the quiz is too long for the model's context"]
    assert readable(policy, "", Quiz("Which?", tuple(long), 0)) is None


def test_a_learner_reads_as_much_of_an_answer_as_fits(crowded):
    policy, answer = crowded[0], "word " * 40
    quiz = Quiz("?", tuple("abcd"), 0)
    read = readable(policy, answer, quiz)
    assert 0 < len(read) < len(answer)
    assert answer.startswith(read)
    assert readable(policy, "A.", quiz) == "A."
    cut, whole = (learner_probabilities(policy, [text], [quiz])[0] for text in (answer, read))
    assert torch.equal(cut, whole)


# -------------------------------------------------------------------------------------------------------- by agreement


@pytest.fixture
def agreeing(llama_policy):
    """A policy whose gate goes by agreement."""
    llama_policy.quiz_gate = Gate("agreement", agreement=12, lead=1.0, right=9, shown=10, asked=40)
    return llama_policy


def spelled(policy, *texts: str) -> list[list[int]]:
    """The short answers, as replies end: behind the quotation mark that closes them."""
    return [policy.tokenizer.encode(f'{text}","', add_special_tokens=False) for text in texts]


def test_the_key_is_what_most_short_answers_say(llama_policy):
    """However they spell it; echoes of the question, long ones and empty ones count against it."""
    answers = ["Paris"] * 5 + ["paris"] * 3 + ["The Paris"] + ["Lyon"] * 4 + ["France"] + ["?"]
    answers += ["it is the city of Paris"]
    draft = agree(llama_policy, "What is the capital of France?", spelled(llama_policy, *answers))
    assert (draft.key, draft.agreement) == ("Paris", 9)


@pytest.mark.parametrize("answers", [["France"] * 16, ["...", "-"], ["one two three four"], []])
def test_without_a_usable_answer_there_is_no_draft(llama_policy, answers):
    assert agree(llama_policy, "What is the capital of France?", spelled(llama_policy, *answers)) is None


@pytest.mark.parametrize(
    ("answer", "question", "echo"),
    [
        ("Lions", "The young of a lion: what is its name?", True),
        ("protactite", "Which symbol does protactinium have?", True),
        ("a fighter", "What is the past tense of fight?", True),
        ("cub", "The young of a lion: what is its name?", False),
        ("404", "What does HTTP code 404 mean?", True),
        ("404 Not Found", "What does HTTP code 404 mean?", False),
        ("7", "What is 7 + 0?", False),
        ("is it", "What is it?", False),  # short words are in every question
        ("Oslo", "What is the capital of Norway?", False),
    ],
)
def test_an_answer_that_says_a_word_of_the_question_again_is_an_echo(llama_policy, answer, question, echo):
    assert echoes(answer, question) is echo
    draft = agree(llama_policy, question, spelled(llama_policy, answer))
    assert not (echo and draft)


def test_a_key_may_hold_quotation_marks(llama_policy):
    draft = agree(llama_policy, "Which wrestler acts?", spelled(llama_policy, *['Dwayne \\"Rock\\" Johnson'] * 9))
    assert (draft.key, draft.agreement) == ('Dwayne "Rock" Johnson', 9)
    cut_off = llama_policy.tokenizer.encode('Dwayne \\"Rock', add_special_tokens=False)
    assert agree(llama_policy, "Which wrestler acts?", [cut_off]) is None


def test_a_long_question_gets_no_quiz_and_is_told_why(agreeing, monkeypatch):
    monkeypatch.setattr(agreeing, "quiz_gate", Gate("agreement", 1, 0.0, 1, 1, 1))
    why: list[str] = []
    assert make_quiz(agreeing, "Which city? " * 17, why=why) is None
    assert why == ["the question has 204 characters, that of a quiz at most 200"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Vitamin D", "vitamin d from sunlight", True),
        ("Einstein", "Einstien", True),
        ("south", "southwest", True),
        ("Paris", "Paris Agoura", True),
        ("12", "120", False),
        ("7", "-7", False),
        ("Austria", "Australia", True),  # a quiz does without it: better than two that look alike
        ("iron", "Spain", False),
        ("cat", "caterpillar", False),
        ("Mars", "Saturn", False),
    ],
)
def test_options_that_a_person_may_take_for_the_same(one, other, same):
    assert alike(one, other) is alike(other, one) is same


def test_the_options_are_those_that_come_nearest_to_the_key():
    draft = Draft("q", "key", 16, (("far", 30.0), ("near", 3.0), ("too near", 0.5), ("nearer", 2.0), ("middle", 9.0)))
    assert draft.options(1.0) == ["key", "nearer", "near", "middle"]
    assert draft.options(5.0) == ["key", "middle", "far"]


def short_answer(policy, question: str, choose) -> str:
    """What is written under the grammar of a short answer, where `choose` picks among what it allows."""
    request = answer_requests(policy, question)[0]
    prompt = encode_chat(policy.tokenizer, policy.prompts.quizmaster.messages(question))
    prefix = request.prompt_ids[len(prompt) :]
    written = drive(QuizGrammar(policy, 1, question), list(prefix), choose, limit=400)
    assert written[-1] in policy.stop_ids
    return policy.tokenizer.decode(written[len(prefix) :], skip_special_tokens=True)


@pytest.mark.parametrize("echo", ["capital", "Capital", "France", "is"])
def test_a_short_answer_cannot_say_a_word_of_the_question(llama_policy, echo):
    """Against scores that always prefer to spell it; it ends where its string ends, before any wrong option."""
    text = short_answer(
        llama_policy, "What is the Capital of France?", repeater(llama_policy.tokenizer, echo, long=True)
    )
    assert echo not in re.findall(r"\w+", text)
    assert text.count('"') == 1


def test_a_short_answer_may_go_on_from_a_word_of_the_question(llama_policy):
    """As "snowmen" does from "snow"."""
    tokenizer = llama_policy.tokenizer
    wanted = [tokenizer.encode(c, add_special_tokens=False)[0] for c in 'Parisian"']
    request = answer_requests(llama_policy, "What is Paris?")[0]
    prompt = encode_chat(tokenizer, llama_policy.prompts.quizmaster.messages("What is Paris?"))
    written, grammar = list(request.prompt_ids[len(prompt) :]), QuizGrammar(llama_policy, 1, "What is Paris?")
    refused = []
    for token in wanted:
        scores = grammar(torch.tensor([[0, *written]]), torch.zeros(1, len(tokenizer)))
        refused += [] if scores[0, token].isfinite() else [tokenizer.decode([token])]
        written.append(token)
    assert refused == ["s"]  # letter by letter it would have passed the whole word "Paris"


def test_a_rewording_ends_behind_its_question(llama_policy):
    """Whatever it says: quotation marks in it are not its end. One that was cut off is none."""
    tokenizer, said = llama_policy.tokenizer, 'Who said \\"no\\"?"'
    request = rewording_request(llama_policy, "Name who said no.")
    prompt = encode_chat(tokenizer, llama_policy.prompts.quizmaster.messages("Name who said no."))
    wanted = iter(tokenizer.encode(said, add_special_tokens=False))
    prefix = list(request.prompt_ids[len(prompt) :])
    grammar = QuizGrammar(llama_policy, 1, rewording=True)
    written = drive(grammar, prefix, lambda _, allowed: next(wanted, allowed[0]), limit=200)
    assert written[-1] == llama_policy.end_id
    assert tokenizer.decode(written[len(prefix) : -1]) == said
    assert reworded(llama_policy, written[len(prefix) :]) == 'Who said "no"?'
    assert reworded(llama_policy, written[len(prefix) : -2]) == ""


def test_what_is_written_alone_is_what_is_written_beside_an_answer(agreeing):
    """The quiz's short answers are drawn from generators of their own, by the base model."""
    randomize_adapter(agreeing)
    requests = first_requests(agreeing, "Which city?")
    assert len(requests) == ANSWERS // 2 + 1
    assert not any(request.adapter for request in requests)
    alone = replies(agreeing, requests, list(range(len(requests))))
    requests = first_requests(agreeing, "Which city?")  # a grammar serves one reply
    prompt = encode_chat(agreeing.tokenizer, agreeing.prompts.tutor.messages("Which city?"))
    _, *beside = replies(agreeing, [Request(prompt, 1.0), *requests], [99, *range(len(requests))])
    assert alone == beside
    assert len(set(map(tuple, alone))) > 1


def test_the_lead_is_the_difference_of_log_probabilities(agreeing):
    """By transformers and PEFT alone, of the begun JSON with each option in it."""
    question, options = "Which city?", ["Paris", "Rome", "Madrid is", 'the "Big" one']
    found = answer_logprobs(agreeing, question, options)
    model, tokenizer = agreeing.model, agreeing.tokenizer
    messages = agreeing.prompts.quizmaster.messages(question)
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for option, logprob in zip(options, found, strict=True):
        text = f'{prompt}{{"question":"{question}","correct":"'
        before = tokenizer(text, add_special_tokens=False).input_ids
        said = json.dumps(option)[1:-1]
        told = tokenizer(f'{said}","wrong":["', add_special_tokens=False).input_ids
        closed = (i for i in range(len(told) + 1) if tokenizer.decode(told[:i]).startswith(f'{said}"'))
        told = told[: next(closed)]
        with torch.no_grad(), model.disable_adapter():
            logits = model(torch.tensor([before + told])).logits[0]
        logprobs = logits[len(before) - 1 : -1].double().log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(told).unsqueeze(1)).sum().item()
        assert logprob == pytest.approx(expected, abs=1e-4)


def test_wrong_options_are_distinct_from_the_key_and_from_each_other(agreeing):
    """Of what a random model writes, three rounds of it."""
    draft = Draft("Which city?", "Paris", 16)
    for seed in range(3):
        torch.manual_seed(seed)
        draft = with_wrong_options(agreeing, draft)
    options = [draft.key, *(option for option, _ in draft.wrong)]
    assert len(options) > 4
    assert not any(alike(one, other) for one, other in combinations(options, 2))
    assert all(len(option.split()) <= 3 for option in options)


def scripted(monkeypatch, policy, answers: list[str], wrong: dict[str, float]) -> list[int]:
    """The model says these short answers, and finds these wrong options, a few in each round; how often it is asked.

    Every other answer is one to the question in its own words, "Which town?"
    """
    rounds, halves = [], [[*spelled(policy, *answers[::2]), *spelled(policy, "Which town?")]]
    halves.append(spelled(policy, *answers[1::2]))

    def say(policy, requests):
        question = ("Which city?", "Which town?")[2 - len(halves)]
        assert requests[0].prompt_ids == answer_requests(policy, question)[0].prompt_ids
        return halves.pop(0)

    def more(policy, draft):
        found = list(wrong.items())[2 * len(rounds) : 2 * len(rounds) + 2]
        rounds.append(len(found))
        return replace(draft, wrong=(*draft.wrong, *found))

    monkeypatch.setattr("lora_ppo.quizmaster.with_wrong_options", more)
    monkeypatch.setattr("lora_ppo.quizmaster.replies", say)
    return rounds


WRONG = {"Rome": 5.0, "Oslo": 0.5, "Bern": 9.0, "Lima": 7.0}


@pytest.mark.parametrize("agreement", [11, 12, 16])
def test_a_quiz_is_made_from_so_much_agreement_on(monkeypatch, agreeing, agreement):
    rounds, why = scripted(monkeypatch, agreeing, ["Paris"] * agreement + ["Rome"] * (16 - agreement), WRONG), []
    quiz = make_quiz(agreeing, "Which city?", why=why)
    if agreement < 12:
        assert quiz is None
        assert rounds == []
        assert why == ["only 11 of 16 short answers agree, on 'Paris'; 12 of 16 must"]
    else:
        assert quiz.question == "Which city?"
        assert quiz.options[quiz.key] == "Paris"
        assert sorted(quiz.options) == ["Bern", "Lima", "Paris", "Rome"]  # Oslo is too near
        assert rounds == [2, 2]
        assert why == []


def test_where_too_few_agree_the_rewording_is_not_asked(monkeypatch, agreeing):
    halves = [*spelled(agreeing, *["Paris"] * 3, "Oslo", "Rome", "Bern", "Lima", "Riga"), *spelled(agreeing, "Where?")]
    why = []
    monkeypatch.setattr("lora_ppo.quizmaster.replies", lambda *_: pytest.fail("nothing has to be written"))
    assert make_quiz(agreeing, "Which city?", halves, why) is None
    assert why == ["only 3 of 8 short answers agree, on 'Paris'; 12 of 16 must"]


def test_too_few_wrong_options_are_no_quiz(monkeypatch, agreeing):
    rounds, why = scripted(monkeypatch, agreeing, ["Paris"] * 16, {"Rome": 5.0, "Oslo": 0.5, "Bern": 9.0}), []
    assert make_quiz(agreeing, "Which city?", why=why) is None
    assert rounds == [2, 1, 0]
    assert why == ["for 'Paris' the model found 2 wrong options that it holds wrong; 3 are needed"]


@pytest.mark.parametrize(("gate", "words"), [(Gate(), "not measured yet"), (Gate(asked=60), "told from guesses")])
def test_behind_a_shut_gate_no_quiz_is_made(monkeypatch, llama_policy, gate, words):
    monkeypatch.setattr("lora_ppo.quizmaster.replies", lambda *_: pytest.fail("nothing has to be written"))
    llama_policy.quiz_gate, why = gate, []
    assert first_requests(llama_policy, "Which city?") == []
    assert make_quiz(llama_policy, "Which city?", why=why) is None
    assert words in why[0]


def test_smollm2_makes_sound_quizzes_and_knows_when_not_to(smollm2):
    """A plain question, and one that has no answer. Nobody trained this model here."""
    policy = load_policy(Config(model_name="smollm2", device="cpu"))[0]
    policy.quiz_gate = Gate("agreement", agreement=12, lead=1.0, right=9, shown=10, asked=40)
    question = "Which planet is known as the red planet?"
    torch.manual_seed(0)
    quiz = make_quiz(policy, question)
    assert quiz.question == question
    assert quiz.options[quiz.key] == "Mars"
    assert flaw(question, quiz.options) == ""
    why: list[str] = []
    assert make_quiz(policy, "What should I cook tonight?", why=why) is None
    assert "short answers agree" in why[0]
