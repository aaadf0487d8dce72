"""The mistakes that the harness knows, and how each is made.

Every function of the course is written here once more, in parts that can be exchanged: with none exchanged it gives
what the library gives (a test holds it to that), with one exchanged it makes a known mistake. Two mistakes in different
parts can be made at once.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from lora_ppo import ppo


@dataclass(frozen=True)
class Mistake:
    """A known mistake: its sentence, and the parts of the function that make it."""

    sentence: str
    parts: dict[str, Any] = field(hash=False)


def mistake(sentence: str, **parts: Any) -> Mistake:
    return Mistake(sentence, parts)


def pairs(mistakes: Iterable[Mistake]) -> Iterator[Mistake]:
    """Any two mistakes in different parts, made at once."""
    for a, b in combinations(mistakes, 2):
        if not a.parts.keys() & b.parts.keys():
            yield Mistake(f"Two mistakes at once. {a.sentence} And: {b.sentence}", a.parts | b.parts)


def same(x: Any) -> Any:
    return x


def cleaned(x: Tensor, mask: Tensor) -> Tensor:
    """`x` (B, T, ...) with zeros where the mask (B, T) is False."""
    return x.masked_fill(~mask.view(*mask.shape, *[1] * (x.dim() - 2)), 0.0)


def uncleaned(x: Tensor, mask: Tensor) -> Tensor:
    return x


def unmasked(x: Tensor, mask: Tensor) -> Tensor:
    return x.mean()


def summed(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, 0.0).sum()


def padding_counted(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, 0.0).mean()


def of_sequences(x: Tensor, mask: Tensor) -> Tensor:
    return torch.stack([ppo.masked_mean(row, m) for row, m in zip(x, mask, strict=True)]).mean()


def per_sequence(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(~mask, 0.0).sum() / len(mask)


DETACHED = "The result has no gradient: .detach(), .item(), no_grad or a new tensor cut it off."
MEANS = (
    mistake("The mask is ignored: padding and environment text are averaged, too.", mean=unmasked, clean=uncleaned),
    mistake("A sum, not a mean over the tokens: long batches get larger steps.", mean=summed),
    mistake("Padding is counted: the masked sum is divided by all positions, not by mask.sum().", mean=padding_counted),
    mistake("A mean of each sequence, then of the sequences: tokens of short answers weigh more.", mean=of_sequences),
    mistake("The sum over tokens is divided by the number of sequences, not of tokens.", mean=per_sequence),
)
