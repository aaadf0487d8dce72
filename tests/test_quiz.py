"""The quiz: its grammar, how it is read, its key, and the gate."""

import unicodedata
from collections import Counter
from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_ppo.quiz import Quiz, flaw, parse_quiz, quiz_json, quiz_text, shuffle_quiz
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


def test_the_right_letter_of_a_turn_is_not_the_same_for_all_questions():
    """Every new run has the same seeds: whoever plays it again would know the letters."""
    keys = []
    for i in range(400):
        torch.manual_seed(0)
        keys.append(shuffle_quiz(f"question {i}", "right", ["x", "y", "z"]).key)
    assert all(70 <= keys.count(letter) <= 130 for letter in range(4))


@pytest.mark.parametrize("text", ['{"a":1}', "[1,2]", '{"question":"q","correct":1,"wrong":["a","b","c"]}', '"q"'])
def test_json_of_another_shape_is_no_quiz(text):
    assert parse_quiz(text) is None


def test_an_option_cannot_forge_another_line():
    text = quiz_json("Which\none?", "x\nC) Paris", ["b", "c", "d"])
    assert parse_quiz(text) == ("Which one?", "x C) Paris", ["b", "c", "d"])


QUIZ = Quiz("Which city?", ("Rome", "Madrid", "Paris", "Berlin"), 2)


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
