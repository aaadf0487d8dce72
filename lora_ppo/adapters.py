"""Adapters from checkpoints and from elsewhere: read, put beside the policy's own, and merged into the base model."""

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ppo.chat import encode_chat
from lora_ppo.checkpoint import Damaged, adapter_config, other_base, prompt_note, tensors_in, verify_checkpoint
from lora_ppo.files import apply_umask, utf8_path
from lora_ppo.gate import write_gate
from lora_ppo.loading import base_name, called, find_prompts, load_policy
from lora_ppo.policy import Policy
from lora_ppo.prompts import Prompts, load_prompts
from lora_ppo.settings import (
    DEFAULT_PROMPTS,
    GATE_FILE,
    PROMPTS_FILE,
    ConfigError,
    Settings,
    split_settings,
)

if TYPE_CHECKING:
    from torch import Tensor


PROBES = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Which planet is the largest?", "The largest planet is Jupiter, and it has dozens of moons."),
    ("How do I repair a clock?", "I do not know how clocks are repaired."),
)
# The largest difference of merged and adapter logits that rounding explains, in units of the largest logit; and of two
# ways to compute a layer, in units of its largest output.
MERGE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
IN_FULL = {"load_in_4bit": "false", "bf16_copy": "false"}  # settings for weights that are merged


def read_adapter(folder: Path) -> dict[str, Any]:
    """The `state.json` of a whole checkpoint; {} for a plain PEFT folder. Raises ConfigError for anything else."""
    if not folder.is_dir():
        raise ConfigError(f"adapter={folder}: there is no such folder; expected a checkpoint, a PEFT folder, or none")
    try:
        ours = any((folder / name).exists() for name in ("manifest.json", "state.json"))
        state = verify_checkpoint(folder) if ours else {}
        adapter_config(folder)
    except ConfigError:
        raise
    except Damaged as error:
        raise ConfigError(f"adapter={folder} is damaged: {error}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"adapter={folder} has no usable adapter_config.json ({type(error).__name__})") from None
    if not (folder / "adapter_model.safetensors").exists():
        raise ConfigError(f"adapter={folder} has no adapter_model.safetensors")
    return state


def suited(policy: Policy, folder: Path, state: dict[str, Any]) -> None:
    """Raises ConfigError if the adapter belongs to another base model, or if training saw what is held out here."""
    if state and (difference := other_base(state, policy)):
        raise ConfigError(f"adapter={folder} was trained {difference}")
    config, trained = policy.config, state.get("config", {})
    for name in split_settings(config):
        here, there = getattr(config, name), trained.get(name)
        if "task" in trained and config.mode != "merge" and there is not None and there != here:
            raise ConfigError(
                f"adapter={folder} was trained with {name}={there}, now it is {here}: other samples would be held out, "
                f"and some of them it was trained on; set {name}={there}"
            )


def base_settings(
    config: Settings, folders: Sequence[Path], states: Sequence[dict[str, Any]], notice: Callable[[str], None]
) -> Settings:
    """`config` with what the first adapter was trained on, where that is left open: base model and prompts."""
    name = next((state["base_model"] for state in states if state), None)
    if config.model_name == "auto" and name:
        config = replace(config, model_name=called(name))
    told = next((folder / PROMPTS_FILE for folder in folders if (folder / PROMPTS_FILE).is_file()), None)
    if told and not config.prompts and find_prompts(config).differing(load_prompts(told, DEFAULT_PROMPTS)):
        notice(f"prompts={told}: the roles are told what they were told in training.")
        config = replace(config, prompts=str(told))
    return replace(config, lora_r=1)  # the adapters come from their folders: the policy's own one is idle


def attach(policy: Policy, folder: Path, name: str) -> "Tensor":
    """Puts the adapter of `folder` beside the policy's own and makes it the active one. Raises ConfigError.

    What is accepted is proved on the probes: with the adapter on, every layer makes what PEFT's own makes, and with it
    off the logits are those of the base model, to the bit. Returns the latter (N, V).
    """
    base = probe_logits(policy, adapter=False)
    try:
        adapter_config(folder)
        # A layer that is saved whole would take the place of the base's own.
        tensors = tensors_in(folder, "adapter_model")
        head = policy.head.weight.cpu()  # PEFT saves a head with its adapters: the base's own is no other

        def plain(key: str) -> bool:
            own_head = key.endswith(".base_layer.weight") and tensors[key].to(head.dtype).equal(head)
            return own_head or key.endswith((".lora_A.weight", ".lora_B.weight"))

        if more := [key for key in tensors if not plain(key)]:
            raise ConfigError(f"adapter={folder} holds {more[0]}: expected lora_A and lora_B of linear layers alone")
        with utf8_path(folder) as place:
            result = policy.model.load_adapter(str(place), adapter_name=name, torch_device=str(policy.device))
        policy.model.eval()
        for keys, what in ((result.missing_keys, "lacks"), (result.unexpected_keys, "has, and nothing takes,")):
            if keys:
                raise ConfigError(f"adapter={folder} {what} {len(keys)} tensors, such as {keys[0]}")
        layers = policy.use_adapter(name)
        prove(policy, folder, base, layers)
        return base
    except ConfigError as error:
        detach(policy, name)
        raise ConfigError(f"adapter={folder}: {error}" if str(folder) not in str(error) else str(error)) from None
    except Exception as error:  # PEFT, safetensors, what they make of a broken file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        detach(policy, name)
        raise ConfigError(f"adapter={folder} does not fit model_name={base_name(policy.config)}: {reason}") from None


def prove(policy: Policy, folder: Path, base: "Tensor", layers: Sequence) -> None:
    """Raises ConfigError unless the adapter on `layers` acts as PEFT has it, and not at all when it is off."""
    import torch

    gated = [layer.forward for layer in layers]
    furthest = 0.0  # in units of a layer's largest output

    def compared(layer, forward: Callable) -> Callable:
        """PEFT's forward of a layer, which compares with the policy's own."""

        def both(x: "Tensor") -> "Tensor":
            nonlocal furthest
            wanted = type(layer).forward(layer, x)
            difference, scale = (forward(x) - wanted).abs().max().item(), wanted.abs().max().item()
            furthest = max(furthest, difference / (scale or 1.0))
            return wanted

        return both

    try:
        for layer, forward in zip(layers, gated, strict=True):
            layer.forward = compared(layer, forward)
        wanted = probe_logits(policy, adapter=True)
    finally:
        for layer, forward in zip(layers, gated, strict=True):
            layer.forward = forward
    found = probe_logits(policy, adapter=True)
    if not (wanted.isfinite().all() and found.isfinite().all()):
        raise ConfigError(f"adapter={folder} makes logits that are not finite")
    if not torch.equal(probe_logits(policy, adapter=False), base):
        raise ConfigError(f"adapter={folder} changes the base model, also when it is off: expected plain LoRA")
    if furthest > MERGE_TOLERANCE[policy.config.dtype]:
        raise ConfigError(
            f"adapter={folder} does more than low-rank updates of linear layers: with these alone, the output of one "
            f"differs from PEFT's by {furthest:.2g} of its size"
        )


def detach(policy: Policy, name: str) -> None:
    """Takes an adapter off again; the policy's own is the active one."""
    policy.use_adapter()
    if name in policy.model.peft_config:
        policy.model.delete_adapter(name)


@contextlib.contextmanager
def attached(policy: Policy, folder: Path, name: str) -> Iterator[None]:
    """In here the adapter of `folder` is the active one. Raises ConfigError if it can't be, or leaves a trace."""
    import torch

    base = attach(policy, folder, name)
    try:
        yield
    finally:
        detach(policy, name)
    if not torch.equal(probe_logits(policy, adapter=False), base):
        raise ConfigError(f"adapter={folder} changed the base model for good: what was measured after it is wrong")


def probe_logits(policy: Policy, adapter: bool) -> "Tensor":
    """The logits (N, V) of every response token of the probes, at temperature 1."""
    import torch

    tokenizer = policy.tokenizer
    logits = []
    for question, text in PROBES:
        prompt = encode_chat(tokenizer, policy.prompts.tutor.messages(question))
        ids = torch.tensor([[*prompt, *tokenizer.encode(text, add_special_tokens=False)]], device=policy.device)
        with torch.no_grad(), policy.adapter(adapter):
            logits.append(policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float())
    return torch.cat(logits)


def merge(config: Settings, notice: Callable[[str], None]) -> dict[str, float]:
    """Writes base model plus the one `adapter` as a standalone model to `merged_model_path`, and checks it.

    The base is loaded in bfloat16 or float32, whatever training used: weights in 4 bits can't take an adapter in
    without loss. Returns `difference`, the largest between the logits of the merged model, read back from disk, and of
    the adapter, and `effect`, the largest between adapter and base. Raises ConfigError, and writes nothing, if the
    first is more than rounding explains.
    """
    folder, out = Path(config.adapter[0]), Path(config.merged_model_path)
    state = read_adapter(folder)
    in_4bit = state.get("config", {}).get("load_in_4bit") == "true" or config.load_in_4bit == "true"
    config = replace(base_settings(config, [folder], [state], notice), **IN_FULL)
    if in_4bit and config.dtype == "auto":
        config.dtype = "bfloat16"
    policy, config = load_policy(config, notice)
    suited(policy, folder, state)
    base = attach(policy, folder, "trained")
    wanted = probe_logits(policy, adapter=True)
    new = out.with_name(f".{out.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        with utf8_path(new) as place:
            policy.model.merge_and_unload(adapter_names=["trained"]).save_pretrained(place)
            policy.tokenizer.save_pretrained(place)
        card = merged_card(config, policy.prompts, folder, state)
        (new / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        (new / PROMPTS_FILE).write_text(policy.prompts.as_yaml(), encoding="utf-8")
        if policy.quiz_gate.signal == "options":  # trained to write and to solve quizzes, as its prompts have it
            write_gate(new / GATE_FILE, policy.quiz_gate)
        apply_umask(new)
        del policy
        found = probe_logits(load_policy(replace(config, model_name=str(new)), notice)[0], adapter=False)
        difference, effect = (found - wanted).abs().max().item(), (wanted - base).abs().max().item()
        allowed = MERGE_TOLERANCE[config.dtype] * wanted.abs().max().item()
        if not difference <= allowed or difference > effect / 4 > 0:  # NaN included
            raise ConfigError(
                f"merging failed and nothing was written: merged and adapter logits differ by {difference:.3g}, where "
                f"rounding to {config.dtype} explains {allowed:.3g} and the adapter itself makes {effect:.3g}"
                + ("" if config.dtype == "float32" else ": try dtype=float32")
            )
        check_empty(out)
        if out.exists():
            out.rmdir()
        new.rename(out)
    except OSError as error:
        raise ConfigError(f"merged_model_path={out} can't be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)
    notice(f"wrote {out} ({config.dtype}); largest difference of merged and adapter logits: {difference:.3g}")
    notice(f"for comparison, largest difference of adapter and base logits: {effect:.3g}")
    if difference > 0.1 * effect > 0:
        notice(f"warning: rounding to {config.dtype} is more than a tenth of the adapter's effect: use dtype=float32")
    return {"difference": difference, "effect": effect}


def merged_card(config: Settings, prompts: Prompts, folder: Path, state: dict[str, Any]) -> str:
    """The README.md of a merged model."""
    algorithm = state.get("config", {}).get("algorithm", "ppo")
    steps = f" after {state['step']} {algorithm.upper()} steps" if "step" in state else ""
    return (
        f"---\nbase_model: {base_name(config)}\nlibrary_name: transformers\ntags: [lora, {algorithm}, merged]\n---\n"
        f"# {base_name(config)} with `{folder.name}` merged in\n\n"
        f"The LoRA adapters of `{folder.name}`{steps}, added to the base model's weights in {config.dtype}.\n"
        f"{prompt_note(config, prompts)}"
    )


def check_empty(folder: Path, setting: str = "merged_model_path") -> None:
    """Raises ConfigError, naming the setting, unless `folder` is empty or can be made."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{setting}={folder} is a file: name a new folder")
    entries = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if entries:
        found = f"{setting}={folder} is not empty ({len(entries)} entries, such as {entries[0]}): name a new folder"
        if setting == "merged_model_path":
            found += "; to evaluate a model that is there, use mode=evaluate and use_merged_model=true"
        raise ConfigError(found)
