"""The policy: base model, gated LoRA adapters, float32 value head, and the optimizer that trains the last two.

The reference policy is the same model with the adapters off: there is no second model.
"""

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lora_ppo.chat import reply_end
from lora_ppo.prompts import Prompts
from lora_ppo.settings import ConfigError, Settings

if TYPE_CHECKING:  # torch takes seconds to import: it is imported where it is used
    from torch import Tensor


# About the most that a step moves a value: AdamW moves each of the head's H weights by up to its rate. A value as quick
# as the policy would let right answers count for nothing before the policy is sure of them; one wrong verdict then
# weighs more than many right ones.
VALUE_STEP = 0.02


class Policy:
    """Base model, LoRA adapters, float32 value head, and the AdamW that trains the last two.

    `prompts` is what the model is told in each role. `tensors()` is everything that training changes, except the two
    numbers `step` and `kl_coef`.
    """

    def __init__(
        self,
        model,
        tokenizer,
        config: Settings,
        prompts: Prompts,
        notice: Callable[[str], None] = lambda text: None,
    ):
        import torch
        from peft import LoraConfig, get_peft_model

        from lora_ppo.layers import spare_activations, speed_up_products

        targets = lora_targets(model, config)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        torch.manual_seed(config.seed)
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        speed_up_products(model)
        spare_activations(model)
        try:
            self.model = get_peft_model(model, lora).eval()
        except ValueError as error:  # there are linear layers that it does not take, such as Mamba's out_proj
            reason = " ".join(str(error).split())
            raise ConfigError(f"target_modules={','.join(targets)} can't be adapted: {reason}") from None
        self.tokenizer, self.config, self.prompts, self.targets = tokenizer, config, prompts, targets
        self.notice = notice
        self.head = model.get_output_embeddings()
        self.device, self.vocabulary = self.head.weight.device, self.head.out_features
        self.value_head = torch.nn.Linear(self.head.in_features, 1).to(self.device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self.gate = AdapterGate()
        self.use_adapter()
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.parameters |= {f"value_head.{n}": p for n, p in self.value_head.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.groups(), weight_decay=0.0, fused=True)
        for p in self.parameters.values():  # AdamW's slots exist from the start: a state always has the same tensors
            slots = {"step": torch.zeros((), dtype=torch.float32, device=p.device)}
            self.optimizer.state[p] = slots | {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        self.step, self.kl_coef = 0, config.kl_coef
        self.fingerprint = ""  # of the base model's weights, if they were loaded from files
        self.reading = ""  # a fingerprint of its config.json and tokenizer

    def groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains, and at what rates: the adapters, the value head."""
        head = list(self.value_head.parameters())
        adapters = [p for name, p in self.parameters.items() if not name.startswith("value_head.")]
        return [
            {"params": adapters, "lr": self.config.learning_rate},
            {"params": head, "lr": VALUE_STEP / self.value_head.in_features},
        ]

    def use_adapter(self, name: str = "default") -> list:
        """Makes `name`, its own or one that was loaded, the adapter under the gate; returns all LoRA layers.

        Some may have another adapter alone, which a reward model brings: there the base layer is called.
        """
        from peft.tuners.lora import LoraLayer

        from lora_ppo.recording import Recorder

        self.model.set_adapter(name)
        self.layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        for layer in self.layers:
            layer.forward = gated_forward(layer, name, self.gate)
        self.recorder = Recorder(self, name)
        return self.layers

    def configure(self, config: Settings) -> None:
        """Goes on under other settings; the weights stay."""
        import torch

        before, self.config = self.config, config
        for layer in self.layers:
            if "default" in layer.lora_dropout:
                dropout = torch.nn.Dropout(config.lora_dropout).eval() if config.lora_dropout else torch.nn.Identity()
                layer.lora_dropout["default"] = dropout
        self.use_adapter()
        self.optimizer.param_groups[0]["lr"] = config.learning_rate
        if not (config.adaptive_kl and before.adaptive_kl and before.kl_coef == config.kl_coef):
            self.kl_coef = config.kl_coef  # it is not steered, or from another beginning

    @property
    def dropouts(self) -> list:
        return [layer.lora_dropout["default"] for layer in self.layers if "default" in layer.lora_dropout]

    @property
    def context(self) -> int:
        """Tokens that fit into the model's context."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    @cached_property
    def stop_ids(self) -> list[int]:
        """The tokens that end a reply: those that model and tokenizer name, and what the chat template puts there.

        Any of the three may be wrong, as hubs have it, and a reply that does not stop goes on as the user.
        """
        named = self.model.generation_config.eos_token_id
        ids = [*(named if isinstance(named, list) else [named]), self.tokenizer.eos_token_id, reply_end(self.tokenizer)]
        return list(dict.fromkeys(i for i in ids if type(i) is int and 0 <= i < self.vocabulary))

    @cached_property
    def end_id(self) -> int:
        """The one of `stop_ids` that the chat template puts behind a reply."""
        end = reply_end(self.tokenizer)
        return end if end in self.stop_ids else self.stop_ids[0]

    def text(self, ids: Sequence[int]) -> str:
        """What a reply says. The token that ended it is none of it, whether it is called special or not."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids], skip_special_tokens=True)

    @cached_property
    def beginnings(self):
        """How each role's prompts begin, read by the base model once (`caches.Beginnings`)."""
        from lora_ppo.caches import Beginnings

        return Beginnings(self)

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None and pad < self.vocabulary else self.stop_ids[0]  # it has to have an embedding

    @cached_property
    def ll_tokenizer(self):
        """The tokenizer as llguidance takes it; its vocabulary is at least as large as the logits."""
        import llguidance.hf

        size = max(self.vocabulary, len(self.tokenizer))
        return llguidance.hf.from_tokenizer(self.tokenizer, n_vocab=size, eos_token=self.end_id)

    @cached_property
    def quote_tokens(self) -> dict[int, str]:
        """The tokens with a quotation mark in them, and their texts."""
        vocabulary = self.tokenizer.get_vocab().items()
        return {i: self.tokenizer.decode([i]) for token, i in vocabulary if '"' in token and i < self.vocabulary}

    @contextlib.contextmanager
    def adapter(self, on: "bool | Tensor") -> Iterator[None]:
        """In here the adapters are on (the policy) or off (the base model, the reference), or so for each row (B,)."""
        before, self.gate.share = self.gate.share, on if isinstance(on, bool) else on.float().view(-1, 1, 1)
        try:
            yield
        finally:
            self.gate.share = before

    def read(self, **inputs: Any) -> tuple["Tensor", "Tensor"]:
        """What the model makes of its inputs: logits (B, K, V), and the hidden states (B, K, H) under them."""
        hidden: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
        try:
            return self.model(**inputs).logits, hidden[0]
        finally:
            hook.remove()

    def tensors(self) -> dict[str, "Tensor"]:
        """Everything that training changes, by name: adapter, value head, and the optimizer's slots for both."""
        tensors = {f"parameter.{name}": p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optimizer.{slot}.{name}": value for slot, value in self.optimizer.state[p].items()}
        return tensors

    def snapshot(self) -> "Snapshot":
        return Snapshot({name: tensor.clone() for name, tensor in self.tensors().items()}, self.step, self.kl_coef)

    def restore(self, snapshot: "Snapshot") -> None:
        """Puts everything that training changes back to `snapshot`, exactly."""
        for name, tensor in self.tensors().items():
            tensor.copy_(snapshot.tensors[name])
        self.optimizer.zero_grad()
        self.step, self.kl_coef = snapshot.step, snapshot.kl_coef


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything that training changes."""

    tensors: dict[str, "Tensor"]
    step: int
    kl_coef: float


class AdapterGate:
    """What share of the adapters' part gets through: all (True), none (False), or 0 or 1 for each row (B, 1, 1)."""

    def __init__(self):
        self.share: bool | Tensor = True


def gated_forward(layer, name: str, gate: AdapterGate) -> Callable[["Tensor"], "Tensor"]:
    """A LoRA layer's forward with adapter `name`: base(x) + share * scaling * B(A(dropout(x))), in the compute dtype.

    In PEFT's place, which switches adapters for a whole batch only and takes longer to do so than a small model's pass.
    For the same reason the parts are looked up here and not at every call. Raises ConfigError for an adapter on another
    kind of layer, an embedding or the experts of a mixture.
    """
    from torch.nn.functional import linear

    base = layer.base_layer
    if name not in layer.lora_A and name not in layer.lora_embedding_A:  # an adapter on fewer layers than the policy's
        return base.__call__
    if "Linear" not in type(base).__name__:
        raise ConfigError(f"adapter {name} is on a layer of kind {type(base).__name__}: expected linear layers alone")
    down, up, scaling, dropout = (
        parts[name] for parts in (layer.lora_A, layer.lora_B, layer.scaling, layer.lora_dropout)
    )

    def forward(x: "Tensor") -> "Tensor":
        rows = x.flatten(0, -2)
        result = base(rows)
        if gate.share is not False:
            low_rank = linear(dropout(rows), down.weight.to(x.dtype))
            if gate.share is not True:  # of each row; some layers are given all rows' tokens in one (B T, I)
                low_rank = low_rank.unflatten(0, (len(gate.share), -1)) * gate.share
                low_rank = low_rank.to(x.dtype).flatten(0, -2)
            result = result.addmm_(low_rank, up.weight.to(x.dtype).t(), alpha=scaling)
        return result.unflatten(0, x.shape[:-1])

    return forward


@contextlib.contextmanager
def gradient_dropout(policy: Policy) -> Iterator[None]:
    """LoRA dropout acts in here and nowhere else; the base model's own dropout never does."""
    for module in policy.dropouts:
        module.train()
    try:
        yield
    finally:
        for module in policy.dropouts:
            module.eval()


def lora_targets(model, config: Settings) -> list[str]:
    """The names of the linear layers that get adapters: those of `target_modules` that `model` has.

    The default names what most models have; of names that a person chose, each has to be there. Raises ConfigError.
    """
    wanted, head = config.target_modules, model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if "Linear" in type(module).__name__ and module is not head
    }
    if getattr(head, "out_features", None) is None:
        raise ConfigError(f"model_name={config.model_name} has no linear layer that makes logits: name another model")
    experts = {name for name in wanted if is_experts(model, name)}
    found = [name for name in wanted if name in linear and name not in experts]
    default = next(f.default_factory() for f in fields(config) if f.name == "target_modules")
    strange = [name for name in wanted if name not in linear]
    if found and (wanted == default or not (strange or experts)):
        return found
    listed = f"its linear layers are {', '.join(sorted(linear - experts)) or 'none'}"
    if found and strange:
        near = difflib.get_close_matches(strange[0], linear, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"target_modules={','.join(wanted)}: the model has no {strange[0]}; {hint}{listed}")
    if experts:
        raise ConfigError(
            f"target_modules={','.join(wanted)}: PEFT takes {', '.join(sorted(experts))} for the experts, which get no "
            f"adapters here; {listed}"
        )
    raise ConfigError(f"target_modules={','.join(wanted)}: the model has none of these; {listed}")


def is_experts(model, name: str) -> bool:
    """Whether PEFT would take `name` for the experts of a mixture, which are no layers but tensors of many matrices.

    It would for dense layers of that name, too, here and wherever the adapters are loaded.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    lora = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(lora, model, None)
    except ValueError:  # one of several that are fused
        return True
    return name not in lora.target_modules
