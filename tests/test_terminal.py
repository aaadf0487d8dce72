"""What a terminal shows and what counts as a choice."""

import io

import pytest
from rich.console import Console

from lora_ppo.settings import ConfigError
from lora_ppo.terminal import BIDI_CONTROLS, Terminal, clean, parse_choice, read_questions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("\x1b]0;title\x07x", "]0;titlex"),
        ("\x9b31mred", "31mred"),
        ("a\x07\x08\x0b\x0c\x00\x7fb", "ab"),
        ("safe\rforged\r\n", "safeforged\n"),
        ("".join(map(chr, range(0x80, 0xA0))), ""),
        ("".join(map(chr, range(0x20))), "\t\n"),
        ("user\u202eexe.txt\u202c", "userexe.txt"),
        ("\u202a\u202b\u202d\u2066\u2067\u2068\u2069\u200e\u200f\u061c", ""),
    ],
)
def test_clean_removes_what_steers_a_terminal(text, expected):
    assert clean(text) == expected


@pytest.mark.parametrize(
    "text", ["a\nb\tc", "😀 👩‍🔬 🇫🇷 ❤️", "日本語 中文 한국어", "naïve café", "e\u0301", "שלום مرحبا", ""]
)
def test_clean_keeps_what_people_write(text):
    assert clean(text) == text


OPTIONS = ("Paris", "New York", "Bern", "Straße")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((letter, index) for index, letter in enumerate("ABCD")),
        *((letter, index) for index, letter in enumerate("abcd")),
        ("b)", 1),
        ("C.", 2),
        ("  d  ", 3),
        ("paris", 0),
        ("NEW YORK", 1),
        (" Bern ", 2),
        ("STRASSE", 3),
        ("s", "skip"),
        ("S", "skip"),
        *((nonsense, None) for nonsense in ("", " ", "e", "1", ")", "..", "Par", "skip", "Paris or Bern", "A or B")),
    ],
)
def test_choices(text, expected):
    assert parse_choice(text, OPTIONS) == expected


@pytest.mark.parametrize("text", ["ab", "bc", "cd", "abc", "bcd", "abcd", "ABCD"])
def test_several_letters_are_no_choice(text):
    """A slip of the hand must not be scored as the first of its letters."""
    assert parse_choice(text, OPTIONS) is None


@pytest.mark.parametrize("mark", ["\u200f", "\u200e", "\u061c", "\u200b", "\u2060", "\ufeff", "\xad"])
@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("{}b", OPTIONS, 1),
        ("s{}", OPTIONS, "skip"),
        ("New{} York", OPTIONS, 1),
        ("paris", ("x{}", "{}Par{}is", "y", "z"), 1),
        ("{}", OPTIONS, None),
    ],
)
def test_marks_that_nobody_sees_change_no_choice(text, options, expected, mark):
    """Keyboards of right-to-left scripts type them, and pages from which one copies hold them."""
    assert parse_choice(text.format(mark), [option.replace("{}", mark) for option in options]) == expected


@pytest.mark.parametrize("mark", sorted(BIDI_CONTROLS))
def test_marks_of_direction_in_a_file_of_questions_are_dropped(tmp_path, mark):
    path = tmp_path / "questions.txt"
    path.write_text(f"{mark}מה זה {mark}ABC{mark}?\n{mark}\n", encoding="utf-8")
    assert read_questions(str(path)) == ["מה זה ABC?"]


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f", "\x85", "\x9b", "\r"])
def test_a_control_character_in_a_file_of_questions_is_named(tmp_path, character):
    path = tmp_path / "questions.txt"
    path.write_bytes(f"one\ttab\r\ntwo {character}x\n".encode())
    with pytest.raises(ConfigError, match=rf"line 2 holds the control character U\+{ord(character):04X}"):
        read_questions(str(path))


@pytest.mark.parametrize("text", ["می\u200cخواهم", "👩\u200d🔬", "a\u200bb\u00adc\u2060d", "🏴\U000e0067\U000e007f"])
def test_characters_of_no_width_that_scripts_need_are_kept(tmp_path, text):
    path = tmp_path / "questions.txt"
    path.write_text(text, encoding="utf-8")
    assert read_questions(str(path)) == [text]
    assert clean(text) == text


def test_a_letter_comes_before_an_options_text():
    assert parse_choice("b", ("B", "A", "D", "C")) == 1


def test_an_option_that_is_spelled_with_letters_of_the_alphabet_can_be_chosen():
    assert parse_choice("abcd", ("x", "abcd", "y", "z")) == 1


def streamed(text: str, width: int, size: int, prefix: str = "Tutor: ") -> str:
    """What an interactive terminal of `width` columns gets of an answer that arrives in pieces of `size`."""
    terminal = Terminal(None)
    terminal.interactive = True
    terminal.console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    terminal.write(prefix)
    for i in range(0, len(text), size):
        terminal.stream(text[i : i + size])
    terminal.end_stream()
    return terminal.console.file.getvalue()


@pytest.mark.parametrize("size", [1, 3, 100])
def test_words_wrap_as_words_while_an_answer_streams(size):
    text = "The capital of Norway is Oslo, a city by the sea.\nIt has many parks, and ships."
    lines = streamed(text, 20, size).splitlines()
    assert max(map(len, lines)) <= 20 + 1  # a space may hang over the edge
    assert "\n".join(lines).split() == ["Tutor:", *text.split()]
    assert lines[2].endswith("sea.")
    assert lines[3].startswith("It has many parks,")


def test_wide_characters_count_twice_and_a_word_wider_than_the_line_is_left_to_the_terminal():
    assert [line.strip() for line in streamed("日本 日本 日本", 10, 1, "").splitlines()] == ["日本 日本", "日本"]
    assert "x" * 30 in streamed("x" * 30, 10, 1)


def test_what_controls_a_terminal_does_not_stream():
    assert streamed("a\x1b[31mb \u202ec", 80, 1, "").strip() == "a[31mb c"
