"""Whether a reply is in the voice of data/voice, by rules: short, to the reader, with one everyday image.

Apart from any reward model: what a policy learns from one is measured by these.
"""

import re
from collections.abc import Sequence

MOST_WORDS = 45
MOST_WORDS_A_SENTENCE = 26
READER = re.compile(r"\byou(?:r|rs|rself|rselves)?\b", re.IGNORECASE)
CLAUSE = r"(?:(?<=[.!?;:,(]\s)|^)"  # where one begins
LIKING = re.compile(  # "like" as a verb, or before an example: "cats like the sun", "most plants like light"
    rf"{CLAUSE}(?:(?:and|but|if|when|because|most|many|some|all|few|young|old|other)\s+)*"
    r"(?:[a-z]+s|people|children|men|women)\s+(?:really |also |all )?like\b"
    r"|\b(?:would|may|might|could|don't|doesn't|not|if you|do you|as you|what you|we|they|I|really|always)\s+like\b"
    r"|\b(?:things|places|kinds|others|countries|people|animals|materials|surfaces|metals|organs|bacteria)\s+like\b"
    r"|\blike (?:to|this|that|these|those of|it|him|her|them|us|me|other|others|each|what|how|so|I|we|he|she|they)\b"
    r"|\blike you (?:need|want|should|are|have|can|could|would|might|may|must|know|said|say|do)\b"
    r"|\blike (?-i:[A-Z])"  # "planets like Mars"
    r"|\blike \w+(?:, \w+)*,? (?:and|or)\b",  # "metals like tin and iron"
    re.IGNORECASE,
)
IMAGE = re.compile(
    r"\blike\b|\bas (?:if|though)\b|\bas (?!long|soon|far|well|much|many)\w+ as (?!possible|before|ever)\b"
    r"|\bjust as (?!(?:much|many|well|long|soon|often|fast)\b)|\b(?:is|are) similar to (?:an?|the)\b"
    r"|(?<=[\w,] )(?<!makes )(?<!on )(?<!along )the (?:same )?way (?!(?:to|of|that|in|out|into|from|back)\b)\w+"
    rf"|{CLAUSE}(?:and |now |just )?(?:think (?:of|about)|imagine|picture) (?:an?|the|two|your|how|one|some)\b",
    re.IGNORECASE,
)
ENDS = re.compile(r"[.!?…][\"')”’]*(?:\s+|$)")


def images(reply: str) -> int:
    """How many comparisons a reply makes."""
    return len(IMAGE.findall(LIKING.sub("", reply)))


def in_voice(reply: str) -> bool:
    """Whether a reply is in the voice. One that was cut off in a sentence is not."""
    sentences = [words for words in map(str.split, ENDS.split(reply.strip())) if words]
    ended = bool(re.search(r"[.!?…][\"')”’]*$", reply.strip()))
    short = sum(map(len, sentences)) <= MOST_WORDS and max(map(len, sentences), default=0) <= MOST_WORDS_A_SENTENCE
    return ended and short and bool(READER.search(reply)) and images(reply) == 1


def keeps(reply: str, fact: Sequence[str]) -> bool:
    """Whether a reply has one of a fact's words in it, or a word that begins so."""
    return any(re.search(rf"\b{re.escape(word)}", reply, re.IGNORECASE) for word in fact)
