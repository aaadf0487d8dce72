"""What the files of a model's weights hold, without loading it: which tensors, in which form, and a fingerprint."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIECE, PIECES = 1024, 4096  # bytes of each piece of the weights that a fingerprint reads, and about how many
FULL = ("F64", "F32", "F16", "BF16")  # how safetensors calls numbers that are stored as they are


@dataclass(frozen=True, order=True)
class Stored:
    """A tensor in a safetensors file: from which byte to which it stands there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int


def stored_tensors(files: Sequence[Path]) -> list[Stored]:
    """The tensors of a model's files, by their names; a file of another kind counts as one tensor."""
    found = []
    for path in files:
        if path.suffix != ".safetensors":
            found.append(Stored("", "", (), path, 0, path.stat().st_size))
            continue
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            told = json.loads(file.read(start - 8))
        told.pop("__metadata__", None)
        for name, it in told.items():
            begin, end = it["data_offsets"]
            found.append(Stored(name, it["dtype"], tuple(it["shape"]), path, start + begin, start + end))
    return sorted(found)


def fingerprint(files: Sequence[Path]) -> str:
    """What tells weights from others under the same name: a digest of each tensor's name, form, and pieces all over it.

    The same tensors are the same weights, in whatever order and however many safetensors files. To read 8 GB would take
    seconds at each start. "" without files.
    """
    digest, tensors = hashlib.sha256(), stored_tensors(files)
    step = max(PIECE, sum(it.end - it.begin for it in tensors) // PIECES)
    with contextlib.ExitStack() as stack:
        opened = {path: stack.enter_context(path.open("rb")) for path in files}
        for it in tensors:
            digest.update(f"{it.name} {it.dtype} {it.shape} ".encode())
            for place in range(it.begin, it.end, step):
                opened[it.path].seek(place)
                digest.update(opened[it.path].read(min(PIECE, it.end - place)))
    return digest.hexdigest()[:20] if files else ""


def packed(files: Sequence[Path]) -> str:
    """The kind of numbers of the first matrix that is not stored in full, as that of a quantized model; "" if all are.

    Other numbers are the model's own: masks, places.
    """
    return next((it.dtype for it in stored_tensors(files) if it.name.endswith(".weight") and it.dtype not in FULL), "")


def misfits(files: Sequence[Path], config: Any) -> dict[str, Any]:
    """Which tensors a model of this configuration misses in safetensors files, or can't use.

    In the form of transformers' own report, which has no names of files where it puts the tensors of experts together.
    Nothing of files whose names are all others.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    own = {name: x for name, x in model.state_dict().items() if name not in model.all_tied_weights_keys}
    wanted = {name: tuple(x.shape) for name, x in revert_weight_conversion(model, own).items()}
    there = {it.name: it.shape for it in stored_tensors(files)}
    if not wanted.keys() & there.keys():
        wanted = there = {}
    return {
        "missing_keys": wanted.keys() - there.keys(),
        "unexpected_keys": there.keys() - wanted.keys() - model.all_tied_weights_keys.keys(),
        "mismatched_keys": {(n, there[n], wanted[n]) for n in wanted.keys() & there.keys() if there[n] != wanted[n]},
    }
