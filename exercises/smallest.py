"""The smallest input on which a function differs: without what is not needed, with numbers as round as can be."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def smallest(
    inputs: dict[str, Any], dims: dict[str, str], fails: Callable[[dict[str, Any]], bool], seconds: float
) -> dict[str, Any]:
    """Inputs that still fail when no answer, token or word can be left out, with numbers as round as can be.

    After `seconds` it is those that were found by then.
    """
    shrinking, end = True, time.monotonic() + seconds
    while shrinking:
        shrinking = False
        for candidate in (*smaller(inputs, dims), *rounder(inputs)):
            if time.monotonic() > end:
                return inputs
            if fails(candidate):
                inputs, shrinking = candidate, True
                break
    return inputs


def smaller(inputs: dict[str, Any], dims: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The inputs less one answer, one token, or the vocabulary's last word."""
    sizes = {d: n for name, ds in dims.items() for d, n in zip(ds, inputs[name].shape, strict=True)}
    for dim in "BTV":
        for place in range(sizes.get(dim, 0) if sizes.get(dim, 0) > (2 if dim == "V" else 1) else 0):
            if dim == "V" and (
                place < sizes["V"] - 1 or ("input_ids" in inputs and inputs["input_ids"].max() == place)
            ):
                continue
            found = dict(inputs)
            for name, ds in dims.items():
                for d in (dim, "S") if dim == "T" else (dim,):
                    if d in ds:
                        axis = ds.index(d)
                        kept = [i for i in range(inputs[name].shape[axis]) if i != place + (d == "S")]
                        found[name] = inputs[name].index_select(axis, torch.tensor(kept))
            if "response_mask" not in found or empty(found["response_mask"]) <= empty(inputs["response_mask"]):
                yield found


def empty(mask: Tensor) -> int:
    """How many answers have no token."""
    return int((~mask.any(-1)).sum())


def rounder(inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The inputs with zeros for NaN; with a number at a time that is whole."""
    for name, x in inputs.items():
        if isinstance(x, Tensor) and x.is_floating_point():
            if x.isnan().any():
                yield inputs | {name: x.nan_to_num(0.0)}
            if x.numel() <= 6 and not torch.equal(whole := x.round(), x) and not x.isnan().any():
                yield inputs | {name: whole}
