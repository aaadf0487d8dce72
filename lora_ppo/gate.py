"""The gate of a model's quizzes: which signal tells a sound quiz from an unsound one on it, and how well, as measured.

It stands in the model's own folder, or in the user's cache once it was measured there (`tasks/quiz_gate.py`).
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_ppo.files import cache_folder, replace_file
from lora_ppo.policy import Policy
from lora_ppo.prompts import load_prompts
from lora_ppo.settings import DEFAULT_PROMPTS, GATE_FILE, PROMPTS_FILE, ConfigError

FORMAT = 3  # of what was measured; with another number every model is measured anew


@dataclass(frozen=True)
class Gate:
    """What a quiz must show before a person sees it, and how sound the quizzes were for which this was measured.

    `signal` is "agreement" (so many of the model's short answers agree, and the key is `lead` nats more likely than any
    other option), "options" (the model, shown the options, picks the key), or "" (this model makes no quizzes).
    """

    signal: str = ""
    agreement: int = 0
    lead: float = 0.0
    right: int = 0  # quizzes whose key was right,
    shown: int = 0  # of so many that got through,
    asked: int = 0  # on so many questions; 0: never measured

    def worth(self) -> str:
        """What a person should expect of these quizzes, in a few words."""
        if not self.asked:
            return "none: how good this model's are was not measured yet"
        if not self.signal:
            return "none: this model's answers can't be told from guesses"
        right, often = round(10 * self.right / self.shown), round(10 * self.shown / self.asked)
        # A model agrees with itself on a misreading, too: measured is on questions in their usual words.
        plainly = " where plainly asked" if self.signal == "agreement" else ""
        return f"about {right} of 10 keys right{plainly}, a quiz on {often or 'fewer than 1'} of 10 questions"


def read_gate(folder: str | os.PathLike, policy: Policy) -> Gate:
    """The gate in the model's folder, else the one that was measured on this very model, else one that is shut.

    The folder's is that of its own prompts: under others it says nothing.

    Raises ConfigError where the folder's file is broken; what is broken in the cache is measured again.
    """
    own, prompts = Path(folder) / GATE_FILE, Path(folder) / PROMPTS_FILE
    its = load_prompts(*([prompts] if prompts.is_file() else []), DEFAULT_PROMPTS)
    if own.is_file() and not {"quizmaster", "solver"} & set(policy.prompts.differing(its)):
        try:
            return parse_gate(own)
        except (OSError, ValueError, TypeError) as error:
            fields = ", ".join(Gate.__dataclass_fields__)
            raise ConfigError(f"{own}: found {error}, expected a JSON object with {fields}; remove it") from None
    try:
        return parse_gate(measured_file(policy))
    except (OSError, ValueError, TypeError):
        return Gate()


def parse_gate(path: Path) -> Gate:
    gate = Gate(**json.loads(path.read_text(encoding="utf-8")))
    if gate.signal not in ("agreement", "options", "") or not 0 <= gate.right <= gate.shown <= gate.asked:
        raise ValueError("figures that can't be")
    if gate.signal and not gate.shown:
        raise ValueError("a signal without quizzes")
    return gate


def write_gate(path: Path, gate: Gate) -> None:
    """Writes the gate; a reader sees the old file or the new one, whole. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(asdict(gate)).encode("ascii"))


def measured_file(policy: Policy) -> Path:
    """Where what was measured on this model is kept: its weights, precision, prompts and sampling are in the name."""
    config = policy.config
    weights = policy.fingerprint or config.model_name, config.dtype, config.load_in_4bit
    sampling = config.top_p, config.quiz_temperature, config.max_new_tokens
    digest = hashlib.sha256(repr((FORMAT, weights, policy.prompts, sampling)).encode())
    return cache_folder() / "quizzes" / f"{digest.hexdigest()[:24]}.json"
