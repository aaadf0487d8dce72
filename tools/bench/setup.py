"""What the tables of speed.py share: models of real shapes, how a policy of one is loaded, what a table is."""

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import Config
from lora_ppo.loading import load_policy
from lora_ppo.policy import Policy
from lora_ppo.settings import BUNDLED_MODEL
from tools.bench.measure import trim
from tools.bench.processes import Child, NotRun

BATCHES = {  # of table 4
    "tiny": {"batch_size": 16, "group_size": 8, "new_tokens": 64},
    "0.5b": {"batch_size": 8, "group_size": 4, "new_tokens": 32},
}


def shape(kind: str, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, **more):
    """A kind of transformer and the sizes that its configuration names."""
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "intermediate_size": intermediate}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary}
    return kind, sizes | {"tie_word_embeddings": True} | more


SHAPES = {
    "0.5b": shape("qwen2", 896, 24, 14, 2, 4864, 151936),
    "1.5b": shape("qwen2", 1536, 28, 12, 2, 8960, 151936),
    "4b": shape("qwen3", 2560, 36, 32, 8, 9728, 151936, head_dim=128),
    "7b": shape("mistral", 4096, 32, 32, 8, 14336, 32000, tie_word_embeddings=False, sliding_window=None),
}
IN_4_BITS = ("4b", "7b")


@dataclass
class Table:
    """Rows under one heading. A row's keys are column headings, units included; `runs` is for JSON alone."""

    number: int
    title: str
    note: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    not_run: list[dict[str, str]] = field(default_factory=list)

    @contextlib.contextmanager
    def attempt(self, **labels: Any) -> Iterator[None]:
        """What fails in here is noted as not run, with the reason, and the benchmark goes on."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, NotRun | ImportError):
                traceback.print_exc()
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.not_run.append({name: str(value) for name, value in labels.items()} | {"why": reason})


@dataclass
class Bench:
    """What is measured, and how."""

    models: list[str]
    device: str
    dtype: str
    repeats: int
    workspace: Path
    trl: str = ""
    trl_latest: str = ""
    agilerl: str = ""
    turns: int = 1000
    prompt_tokens: int = 150
    response_tokens: int = 256
    question_tokens: int = 60
    new_tokens: int = 128
    batches: dict[str, dict[str, int]] = field(default_factory=lambda: BATCHES)

    def folder(self, name: str) -> Path:
        """The folder of a model; random weights are written there first. Raises NotRun for NF4 without CUDA."""
        if name in IN_4_BITS and self.device != "cuda":
            raise NotRun("NF4 needs CUDA, and there is none here")
        if name not in SHAPES:
            return BUNDLED_MODEL if name == "tiny" else Path(name)
        folder = self.workspace / name
        if not folder.exists():
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

            kind, shape = SHAPES[name]
            tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
            special = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
            torch.manual_seed(0)
            with torch.device(self.device):
                config = AutoConfig.for_model(kind, **shape, **special)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        return folder

    def policy(self, name: str, **settings: Any) -> Policy:
        """A model as the tutor loads it, with fresh adapters, and a trust region that undoes no step.

        It decodes as one that has done so for a while: the first, untimed round records its pass.
        """
        trim()
        four_bit = "true" if name in IN_4_BITS else "false"
        config = Config(
            model_name=str(self.folder(name)),
            device=self.device,
            dtype="bfloat16" if name in IN_4_BITS else self.dtype,
            load_in_4bit=four_bit,
            target_kl=1e6,
            **settings,
        )
        policy = load_policy(config)[0]
        policy.recorder.pays = 0
        if policy.recorder.compiled:
            policy.recorder.compiled.library.thread.join()
        return policy

    def child(self, trainer: str, policy: Policy, extra: dict[str, Any], python: str = "", **how: int) -> Child:
        """A trainer of tools/bench/processes.py with the model and the settings of `policy`."""
        config, kept = policy.config, "device dtype lora_r lora_alpha target_modules learning_rate kl_coef".split()
        settings = {"folder": config.model_name, "output": str(self.workspace / trainer), "trl_latest": self.trl_latest}
        settings |= {name: getattr(config, name) for name in kept} | extra
        return Child(trainer, settings, python or sys.executable, **how)


@contextlib.contextmanager
def peft_layers(policy: Policy) -> Iterator[None]:
    """In here all layers are torch's and PEFT's own, as other programs have them, without this project's forward."""
    own = {layer: vars(layer).pop("forward") for layer in policy.model.modules() if "forward" in vars(layer)}
    try:
        yield
    finally:
        for layer, forward in own.items():
            layer.forward = forward


def each_model(bench: Bench, table: Table, measure: Callable[[Bench, Table, str], None]) -> Table:
    """Adds the rows of every model to a table."""
    for name in bench.models:
        with table.attempt(model=name):
            measure(bench, table, name)
    return table
