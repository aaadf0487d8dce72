"""Whether a reply is in the voice of data/voice, by rules: short, to the reader, with one everyday image.

Apart from any reward model: what a policy learns from one is measured by these.
"""

import re
from collections.abc import Sequence

MOST_WORDS = 45
MOST_WORDS_A_SENTENCE = 26
READER = re.compile(r"\byou(?:r|rs|rself|rselves)?\b", re.IGNORECASE)
NO_IMAGE = "to|this|that|these|those|it|him|her|them|us|me|other|others|each|what|how|so"  # behind "like"
IMAGE = re.compile(
    r"(?<!\bwould )(?<!\bif you )(?<!\bdo you )(?<!\bas you )(?<!\bwhat you )(?<!\bwe )(?<!\bthey )(?<!\bI )"
    rf"\blike (?!(?:{NO_IMAGE})\b)"
    r"(?!\w+(?:, \w+)*,? (?:and|or)\b)"  # "metals like tin and iron" are examples
    r"|\bas if\b|\bas (?!long|soon|far|well|much|many)\w+ as\b|\bjust as (?!(?:much|many|well|long|soon|often|fast)\b)"
    r"|\bthe way (?:an?|the|one|you|your|coffee|people)\b|\b(?:think of|imagine|picture (?:an?|the|how|your))\b",
    re.IGNORECASE,
)
ENDS = re.compile(r"[.!?][\"')]*(?:\s+|$)")


def images(reply: str) -> int:
    """How many comparisons a reply makes."""
    return len(IMAGE.findall(reply))


def in_voice(reply: str) -> bool:
    """Whether a reply is in the voice. One that was cut off in a sentence is not."""
    sentences = [words for words in map(str.split, ENDS.split(reply.strip())) if words]
    ended = bool(re.search(r"[.!?][\"')]*$", reply.strip()))
    short = sum(map(len, sentences)) <= MOST_WORDS and max(map(len, sentences), default=0) <= MOST_WORDS_A_SENTENCE
    return ended and short and bool(READER.search(reply)) and images(reply) == 1


def keeps(reply: str, fact: Sequence[str]) -> bool:
    """Whether a reply has one of a fact's words in it, or a word that begins so."""
    return any(re.search(rf"\b{re.escape(word)}", reply, re.IGNORECASE) for word in fact)
