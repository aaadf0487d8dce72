"""Which samples are held out. Each alone decides it: a file that grows moves none (but for one in which none did)."""

import hashlib
from collections.abc import Iterable


def held_out(key: str, test_share: float) -> bool:
    """Whether what has this key is held out; so is a `test_share` of all keys there could be."""
    return digest(key) < test_share * 2**32


def held_out_of(keys: Iterable[str], test_share: float) -> set[str]:
    """The keys that are held out, about a `test_share`; one at least."""
    keys = set(keys)
    return {key for key in keys if held_out(key, test_share)} or {min(keys, key=lambda key: (digest(key), key))}


def digest(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
