"""The quiz: its grammar, how it is read, its key, and the gate."""

import json
import re
import unicodedata
from collections import Counter
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny import PROMPTS, SPECIAL_TOKENS, drive

from lora_ppo.quiz import JSON_STRING, Quiz, QuizGrammar, flaw, parse_quiz, quiz_json, quiz_text, shuffle_quiz, survives
from tasks.facts import arithmetic_facts, table_facts


def test_a_quiz_is_read_back_as_it_was_written():
    quiz = ("Which city?", 'The "one"', ["é", "b\\c", "d, e"])
    assert parse_quiz(quiz_json(*quiz)) == quiz


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "",
        "[]",
        '"text"',
        '{"question":"q","correct":"a","wrong":["b","c"',
        quiz_json("q", "a", ["b", "c", "a"]),
        quiz_json("q", "Paris", ["paris", "b", "c"]),
        quiz_json("q", "New York", [" New  York ", "b", "c"]),
        quiz_json("q", "a", ["straße", "STRASSE", "c"]),
        quiz_json("q", "a", ["b", "c"]),
        quiz_json("q", "a", ["b", "c", "d", "e"]),
        '{"question":"q","correct":"A","wrong":["\\u0041","b","c"]}',
    ],
)
def test_what_is_no_sound_quiz_is_none(text):
    assert parse_quiz(text) is None


def test_the_key_follows_the_shuffle():
    """Every order occurs, each about equally often, and the key always marks the correct option."""
    seen = Counter()
    for seed in range(2400):
        torch.manual_seed(seed)
        quiz = shuffle_quiz("q", "right", ["x", "y", "z"])
        assert quiz.options[quiz.key] == "right"
        seen[quiz.options] += 1
    assert set(seen) == set(permutations(("right", "x", "y", "z")))
    assert all(50 <= count <= 150 for count in seen.values())  # 100 expected, five standard deviations


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


@pytest.mark.parametrize("text", ['{"a":1}', "[1,2]", '{"question":"q","correct":1,"wrong":["a","b","c"]}', '"q"'])
def test_json_of_another_shape_is_no_quiz(text):
    assert parse_quiz(text) is None


def test_an_option_cannot_forge_another_line():
    text = quiz_json("Which\none?", "x\nC) Paris", ["b", "c", "d"])
    assert parse_quiz(text) == ("Which one?", "x C) Paris", ["b", "c", "d"])


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
    monkeypatch.setattr("lora_ppo.quiz.option_probabilities", solver(lambda four: find(four, "Paris"), calls))
    assert survives(POLICY, QUIZ) is True
    assert sorted(find(four, "Paris") for four in calls) == [0, 1, 2, 3]
    assert all(sorted(line[3:] for line in four) == sorted(QUIZ.options) for four in calls)
    assert all([line[:3] for line in four] == ["A) ", "B) ", "C) ", "D) "] for four in calls)


def find(lines: list[str], option: str) -> int:
    return next(i for i, line in enumerate(lines) if line.endswith(f") {option}"))


@pytest.mark.parametrize("letter", range(4))
def test_a_quiz_does_not_survive_a_solver_that_always_picks_one_letter(monkeypatch, letter):
    monkeypatch.setattr("lora_ppo.quiz.option_probabilities", solver(lambda four: letter, []))
    assert survives(POLICY, QUIZ) is False


@pytest.mark.parametrize(("known", "expected"), [(4, True), (3, True), (2, False), (0, False)])
def test_a_quiz_needs_more_than_half_of_its_four_trials(monkeypatch, known, expected):
    answers = iter([True] * known + [False] * (4 - known))

    def pick(four: list[str]) -> int:
        return find(four, "Paris" if next(answers) else "Rome")

    monkeypatch.setattr("lora_ppo.quiz.option_probabilities", solver(pick, []))
    assert survives(POLICY, QUIZ) is expected


@pytest.mark.parametrize("key", range(4))
def test_a_wrong_key_does_not_survive(monkeypatch, key):
    """The solver knows the answer; the quiz claims another option."""
    monkeypatch.setattr("lora_ppo.quiz.option_probabilities", solver(lambda four: find(four, "Paris"), []))
    quiz = Quiz(QUIZ.question, QUIZ.options, key)
    assert survives(POLICY, quiz) is (key == QUIZ.key)


def test_the_solver_sees_the_options_and_no_key():
    text = quiz_text(QUIZ.question, QUIZ.options)
    assert text == "Which city?\nA) Rome\nB) Madrid\nC) Paris\nD) Berlin"


@pytest.mark.parametrize(
    ("question", "options", "words"),
    [
        ("What animal is a platypus?", ("platypus", "bird", "fish", "cat"), "'platypus' stands in the question"),
        ("Why is the sky blue?", ("purple", "red", "Why is the sky blue?", "black"), "stands in the question"),
        ("Who?", ("....", "...,", "---", "Paris"), "'....' has no letters or digits"),
        ("Who?", ("Paris", "Rome", "?", "Oslo"), "'?' has no letters or digits"),
        ("Who?", ("Caf\u00e9", "cafe", "b", "c"), "two options say the same"),
        ("Who?", ("the dog", "A dog!", "c", "d"), "two options say the same"),
        ("Who?", ("New  York", "new-york", "c", "d"), "two options say the same"),
        ("Who?", ("none of the above", "b", "c", "d"), "is a placeholder"),
        ("Who?", ("Option A", "Option B", "Option C", "Option D"), "is a placeholder"),
        ("Who?", ("<answer>", "b", "c", "d"), "is a placeholder"),
        ("Who?", ("N/A", "b", "c", "d"), "is a placeholder"),
        ("Who?", ("yes", "no", "maybe", "because light is scattered by air in all directions"), "times as long"),
        ("...?", ("a", "b", "c", "d"), "its question has no words"),
    ],
)
def test_a_worthless_quiz_is_none_and_says_why(question, options, words):
    assert words in flaw(question, options)
    why = []
    assert parse_quiz(quiz_json(question, options[0], options[1:]), why) is None
    assert len(why) == 1
    assert words in why[0]


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("What is 2 + 4?", ("6", "4", "5", "7")),
        ("What is 2 - 7?", ("-5", "5", "9", "4")),
        ("What is the chemical symbol of sodium?", ("Na", "N", "S", "No")),
        ("What is the opposite of right?", ("wrong", "correct", "left", "other")),
        ("Which kana is voiced?", ("\u304c", "\u304b", "\u304d", "\u304f")),
        ("What is half of 3?", ("1.5", "1,4", "15", "3/4")),
        ("What does HTTP status code 201 mean?", ("Created", "Not Found", "OK", "Moved Permanently")),
    ],
)
def test_what_people_would_ask_has_no_flaw(question, options):
    assert flaw(question, options) == ""


def test_the_tables_quizzes_have_hardly_a_flaw():
    flawed = [fact for fact in (*table_facts(), *arithmetic_facts()) if flaw(fact.quiz_question, fact.options)]
    assert [fact.about for fact in flawed] == ["diesel engine", "Moog synthesizer"]


PIECES = (
    "Paris",
    "paris",
    "the Paris",
    "P\u00e1ris",
    "...",
    "--",
    "",
    " ",
    "Rome",
    "4",
    "-4",
    "none of these",
    "sky",
    "x" * 60,
)


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=30), min_size=4, max_size=4))
def test_what_passes_is_sound_by_another_measure(options):
    if flaw("Why is the sky blue?", options):
        return

    def letters(text):  # letters and digits alone, by another way than `bare`
        plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()
        return [c for c in plain if c.isalnum() or c == "-"]

    assert all(any(c.isalnum() for c in letters(option)) for option in options)
    assert not {"sky", "blue", "why", "none of these"} & {option.strip().casefold().strip(".") for option in options}
    assert len({option.strip().casefold() for option in options}) == 4
    assert len({"Paris", "paris", "the Paris", "P\u00e1ris"} & set(options)) <= 1
    assert sorted(map(len, options))[-1] <= 3 * max(sorted(map(len, options))[-2], 12)
