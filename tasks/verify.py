"""Whether a reply states the right number: `check(reply, gold)`. Pure; docs/maths.md has its decisions in a table.

The number that counts is the one behind `####`; else in the last `\\boxed{}`; else behind the last "the answer is";
else the last one. *Lenient*: that number equals the gold one, in whatever notation. *Strict*: the reply has, too, the
form that was asked for. Its last line, and no other, is `#### ` and a plain number.

Numbers are exact fractions: 0.75, 3/4 and 75% are the same, 0.33 and 1/3 are not. A reply that hedges ("5 or 7") states
nothing: listing numbers must not pay.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

# ------------------------------------------------------------------------------------------------------------ verdict


@dataclass(frozen=True)
class Verdict:
    """What `check` says of a reply; `found` is the number that it states, as it stands there ("" for none)."""

    strict: bool
    lenient: bool
    found: str


def check(reply: str, gold: str) -> Verdict:
    """The verdict on a reply. Raises ValueError where `gold` is no number."""
    wanted = number(gold)
    if wanted is None:
        raise ValueError(f"{gold!r} is no number")
    own = before_the_next(reply.strip())
    found = answer(own)
    lenient = found is not None and found.equals(wanted)
    in_form = own == reply.strip() and own.count("####") == 1 and re.search(FORM, own) is not None
    return Verdict(lenient and in_form, lenient, found.text if found else "")


# The last line of a reply in the form that is asked for.
FORM = r"(?:^|\n) *#### -?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?\Z"
# The policy goes on to a problem of its own: evaluations that stop at such words would never have seen it.
NEXT = re.compile(r"\n[ \t*#_]*(?:question|problem|q|user|human)(?: *\d+)? *[*_]*:", re.IGNORECASE)
# Before them stands a number, other than that of a step ("Step 1:", "1."); else the reply has yet to begin.
COUNTED = re.compile(
    r"^[ \t*_]*(?:(?:step|part|problem|question) *\d+|1[.):][ \t]+[^\W\d])|(\d)", re.IGNORECASE | re.MULTILINE
)


def before_the_next(reply: str) -> str:
    """The reply without a next problem that the policy asks itself."""
    number = next((match for match in COUNTED.finditer(reply) if match[1]), None)
    following = number and NEXT.search(reply, number.end())
    return reply[: following.start()] if following else reply


# ------------------------------------------------------------------------------------------------------------ numbers


@dataclass(frozen=True)
class Number:
    """A number: what it is worth, `percent` apart, and how it was written."""

    value: Fraction
    percent: bool
    text: str

    def equals(self, other: "Number") -> bool:
        """75% is 75, as whoever asks for a percentage wants it, and 0.75; two percentages are equal if they are one."""
        if self.percent == other.percent:
            return self.value == other.value
        percent, plain = (self, other) if self.percent else (other, self)
        return plain.value in (percent.value, percent.value / 100)


def number(text: str) -> Number | None:
    """The number that a text is, units and currency aside; None where it is none, or more than one."""
    tokens = [token for token in read(normalized(text)) if token.kind not in ("word", ".")]
    return tokens[0].number if len(tokens) == 1 else None


# Letters that may stick to a number: units, powers of ten, ordinals, hours. With any other it is a name (12a, B12, 2x).
UNITS = (
    "km kmh kph mph m cm mm kg g mg lb lbs oz l ml cl h hr hrs min mins s sec secs ms mi ft in yd c p gb mb kb w kw "
    "k bn st nd rd th am pm hour hours minute minutes second seconds day days week weeks year years cent cents usd eur"
).split()
SCALES = {"hundred": 2, "k": 3, "thousand": 3, "million": 6, "bn": 9, "billion": 9, "trillion": 12}
SENTENCE = 300  # characters behind "the answer is" in which its number stands
LONGEST = 60  # characters of a number, and powers of ten: what is longer is no answer to a problem

DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
TOKENS = re.compile(
    rf"""
    # A date, a time or ratio, a version, a root, π, digits in threes behind mere spaces: no number.
    (?P<date> (?: [0-9]{{4}}([-/.])[0-9]{{1,2}}\2[0-9]{{1,2}}
              | [0-9]{{1,2}}([-/.])[0-9]{{1,2}}\3(?:[0-9]{{4}} | [0-9]{{2}}) ) (?! [\w%] | [ ]*[-=+*/×÷^] )
            | [0-9]+(?::[0-9]+)+ | [0-9]+(?:\.[0-9]+){{2,}} | √[ {{]{{0,3}}[0-9.]+ | π(?:[ ]?/[ ]?[0-9]+)?
            | [-$€£¥]{{0,3}}[0-9]{{1,3}}(?:[ ][0-9]{{3}})+(?![\w/]) )
    # A number. A sign counts where nothing stands before it that could be subtracted from.
  | (?P<number> (?:(?<![\w)\]%.])(?P<sign>[-+]))? (?:[$€£¥][ ]?(?P<minus>-)?)?
        (?:(?P<whole>[0-9]+)[ ](?=[0-9]+/[1-9]))? (?P<digits> {DIGITS}(?:\.[0-9]+)? | \.[0-9]+ )
        (?:[ ]?/[ ]?(?P<below>{DIGITS}(?:\.[0-9]+)?)(?![0-9]|\.[0-9]|[ ]?/[ ]?[0-9]))?
        (?:[eE](?P<e>[-+]?[0-9]+)\b | [ ]?[×x*][ ]?10\^\(?(?P<power>[-+]?[0-9]+)\)?)?
        (?P<percent>[ ]?% | [ ](?:percent|per[ ]cent)\b)? )
    (?P<letters>[^\W0-9]\w* | [$€£¥](?![ ]?[0-9]) | [ ]?(?:√[ {{]{{0,3}}[0-9.]+ | π))?
  | (?P<word> [^\W0-9]\w*(?:['’]\w+)* )
  | (?P<mark> [-=+*/×÷^,;.!?] )
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Token:
    """A piece of text: its kind is `number`, `other` (digits that are none), `word`, or the mark itself."""

    kind: str
    text: str
    number: Number | None = None

    @property
    def has_digits(self) -> bool:
        return self.kind in ("number", "other")


def normalized(text: str) -> str:
    """The text with one sign for each thing: LaTeX, emphasis, and the many minus signs, digits and spaces undone."""
    text = re.sub(UNIT_IN_LATEX + r" *(?:[²³]|\^\{?[23]\}?)", r"\1", text)  # square metres
    text = re.sub(r"(?<=[A-Za-z])(?:[²³]|\^\{?[23]\}?|\$\^\{?[23]\}?\$|\\\(\^\{?[23]\}?\\\))", "", text)
    text = re.sub("[⁻⁺]?[⁰¹²³⁴-⁹]+", lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub(r"(?<=\w)(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub(
        r"(?<=[0-9])(?:[\u00a0\u2009\u202f'’]|\\,)(?=[0-9]{3}(?![0-9]))", ",", text
    )  # 1 200, the space a narrow one
    text = unicodedata.normalize("NFKC", text).translate(SIGNS)
    text = re.sub(r"\\sqrt *(?:\[[^][{}]*\])? *(?:\{([^{}]*)\})?", r"√\1", text)
    text = re.sub(r"(?<!-)(?=\\[cdt]?frac)", " ", text)  # a whole number may stand before it, or its own minus
    text = re.sub(r"\\[cdt]?frac *(?:\{([^{}]*)\}|([0-9])) *(?:\{([^{}]*)\}|([0-9]))", r"\1\2/\3\4 ", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox) *\{([^{}]*)\}", r" \1 ", text)
    for written, meant in LATEX.items():
        text = text.replace(written, meant)
    text = re.sub(r"\^\{([-+]?[0-9]+)\}", r"^\1", text)
    text = re.sub(r"(?<=[0-9)])( ?)\*\*\1(?=[0-9(])", "^", text)  # 2**3 is a power, **3** is emphasis
    text = re.sub(r"\*\*+|__+|[`~]+|(?<![^\W_])_|_(?![^\W_])", " ", text)
    for said, meant in SAID.items():
        text = re.sub(said, meant, text, flags=re.IGNORECASE)
    return re.sub(r"(=|:|#|\bis|\{|\() *- +(?=[$€£¥]?[.0-9])", r"\1 -", text)


UNIT_IN_LATEX = r"(\\(?:text|mathrm|mathbf|textbf|mbox) *\{[^{}]*[A-Za-z] *\})"
SIGNS = {ord(c): "-" for c in "−–‒‐﹣"} | {ord(c): "*" for c in "·⋅∙"} | {ord("⁄"): "/"}
LATEX = {"{,}": ",", "\\%": "%", "\\$": "$", "\\times": "×", "\\cdot": "*", "\\div": "÷", "\\!": ""}
LATEX |= {f"\\{c}": " " for c in ",;: ()[]"} | {"\\left": " ", "\\right": " "}
SAID = {
    r"\\?\bpi\b": "π",
    r"\bdivided by\b": "÷",
    r"\bmultiplied by\b": "×",
    r"(?<=[0-9)])\((?=[.0-9])": "×(",  # 3(4)
    r"\b(?:(?:is|are) +)?equal(?:s| +to)\b": "=",
    r"(?<![0-9)] )\b(?:minus|negative) +(?=[$€£¥]?[.0-9])": "-",  # behind a number it subtracts
}


def read(text: str) -> list[Token]:
    """The tokens of a normalized text; spaces and brackets are none."""
    return [token(match) for match in TOKENS.finditer(text)]


def token(match: re.Match) -> Token:
    if match["date"]:
        return Token("other", match["date"])
    if match["word"]:
        return Token("word", match["word"].casefold())
    if match["mark"]:
        return Token(match["mark"], match["mark"])
    letters = (match["letters"] or "").casefold()
    next_word = re.compile(r"[ ]*(\w*)").match(match.string, match.end("number"))[1]
    worth = value(match, SCALES.get(next_word.casefold().removesuffix("s"), 0))
    if worth is None or (letters and letters not in (*UNITS, *"$€£¥")):
        return Token("other", match[0])
    text = match["number"].strip()
    return Token("number", text, Number(worth, match["percent"] is not None, text))


def value(match: re.Match, scale: int) -> Fraction | None:
    """What a number is worth, times ten to the `scale`; None where it is too long, or divided by nothing."""
    power = int(match["e"] or match["power"] or 0) if len(match["e"] or match["power"] or "") < 5 else LONGEST + 1
    below = Fraction((match["below"] or "1").replace(",", "")) if len(match["below"] or "") <= LONGEST else 0
    if len(match["digits"]) > LONGEST or abs(power) > LONGEST or not below:
        return None
    whole = Fraction(match["whole"] or 0) if len(match["whole"] or "") <= LONGEST else 0
    size = (whole + Fraction(match["digits"].replace(",", "")) / below) * Fraction(10) ** (power + scale)
    return -size if (match["sign"] == "-") != (match["minus"] is not None) else size


# ------------------------------------------------------------------------------------------------------------ answers

ANSWER = re.compile(
    r"(?<!\bto )\banswers?\b(?:[^.!?\n:=]|\.[0-9]){0,60}?(?::|=|\b(?:is|are|was|be)\b)\s*[:=]?\s*", re.IGNORECASE
)
LIST_ITEM = re.compile(r"\s*[0-9]{1,2}[.)] +[^\W\d]")
OPERATORS = {*"-+*/×÷^", "times", "plus", "minus", "of", "x"}
ALTERNATIVES = {*",;/-", "or", "and", "to"}
HEDGES = {"either", "both", "between", "maybe", "perhaps", "possibly", "probably", "also"}


def answer(reply: str) -> Number | None:
    """The number that a reply states as its answer, or None."""
    text = normalized(reply)
    # 1. Behind ####, the form that is asked for. Two different numbers there are no final answer; a heading, words or
    #    an item of a list that more text follows, is none at all.
    lines = [mark for mark in re.finditer(r"####+([^\n#]*)", text) if mark[1].strip()]
    last = [mark for mark in lines[-1:] if not text[mark.end() :].strip()]
    numbers = [m for m in lines if begins_with_number(m[1]) and (m in last or not LIST_ITEM.match(m[1]))]
    if final := [mark[1] for mark in numbers or last]:
        found = [stated(line) for line in final]
        return found[-1] if all(n and found[-1] and n.equals(found[-1]) for n in found) else None
    # 2. In the last box, whatever stands there.
    if (box := boxed(text)) is not None:
        return stated(box)
    # 3. Behind the last "answer is" that is followed by a number in its sentence: prose may correct itself. "Answer:"
    #    is a heading where words or a list follow it, and more numbers these.
    for mark in reversed(list(ANSWER.finditer(text))):
        sentence = re.split(r"\n|[.!?](?=\s|$)", text[mark.end() : mark.end() + SENTENCE], maxsplit=1)[0]
        if not re.search("[0-9]", sentence) or not any(token.has_digits for token in read(sentence)):
            continue
        listed = "\n" in mark[0] and LIST_ITEM.match(text, mark.end())
        headed = mark[0].rstrip()[-1] in ":=" and (listed or not begins_with_number(sentence))
        if not (headed and re.compile("[0-9]").search(text, mark.end() + len(sentence))):
            return stated(sentence)
    # 4. The last number there is.
    return next((token.number for token in reversed(read(text)) if token.number), None)


def boxed(text: str) -> str | None:
    """What stands in the last `\\boxed{}`; None without one, or where it is never closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start, depth = start + len("\\boxed{"), 1
    for i, character in enumerate(text[start:], start):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[start:i]
    return None


def stated(text: str) -> Number | None:
    """The number of a statement: the one it begins with, worked out if it is a calculation; else its last one.

    None where it begins with alternatives that differ (5 or 7, 5 to 7, 5, 7), with a sum that is not worked out, or
    with digits that are no number.
    """
    tokens = read(text)
    i = beginning(tokens)
    if i is None:
        return next((token.number for token in reversed(tokens) if token.number), None)
    found, i = worked_out(tokens, i)
    while found and i < len(tokens) and tokens[i].text in ALTERNATIVES and (i := beginning(tokens, i)) is not None:
        other, i = worked_out(tokens, i)
        found = found if other and other.equals(found) else None
    return found


def begins_with_number(text: str) -> bool:
    return beginning(read(text)) is not None


def beginning(tokens: Sequence[Token], i: int = 0) -> int | None:
    """Where the digits are with which a statement begins at `i`; None where it begins with words.

    Words of a hedge count for nothing (either 5), nor do a name (x = 5) and two words behind "or" (or else 5).
    """
    spare = 0
    while i < len(tokens) and not tokens[i].has_digits:
        named = i + 1 < len(tokens) and tokens[i + 1].text == "="
        if tokens[i].text == "or":
            spare = 2
        elif tokens[i].kind == "word" and not named and tokens[i].text not in HEDGES | ALTERNATIVES:
            spare -= 1
        if spare < 0 or tokens[i].text in {*".!?"}:
            return None
        i += 1
    return i if i < len(tokens) else None


def worked_out(tokens: Sequence[Token], i: int) -> tuple[Number | None, int]:
    """The number at `i`, or of the sides of a calculation (20 - 5 = 15, 15 = 20 - 5) the last that is one number; and
    what comes behind."""
    result, side = None, tokens[i].number
    while True:
        part = tokens[i].number is not None and (tokens[i].number.percent or "/" in tokens[i].text)
        of = i + 1  # 10 % of 50, 3/4 of 12, 4 packs of 6 = 24; but 6 bags of 10, 7 out of 10
        i += 1
        unit = i + 3  # up to three words (3 square feet)
        while (
            i < min(len(tokens), unit) and tokens[i].kind == "word" and tokens[i].text not in OPERATORS | ALTERNATIVES
        ):
            i += 1
        following = tokens[i : i + 2]
        signed = bool(following) and following[0].kind == "number" and following[0].text[0] in "+-"  # 20 -5
        if signed:
            side = None
        elif len(following) == 2 and following[0].text == "=" and following[1].has_digits:
            i += 1
            result, side = side or result, following[1].number
        elif (
            len(following) == 2
            and following[1].has_digits
            and following[0].text in OPERATORS
            and (
                following[0].text != "of"
                or (part and i == of)
                or "=" in [token.text for token in tokens[i + 2 : i + 6]]
            )
        ):
            i += 1
            side = None
        else:
            return side or result, i
