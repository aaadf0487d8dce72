"""Adapters from checkpoints and from elsewhere: read, put beside the policy's own, and merged into the base model."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ppo.chat import Prompts, encode_chat, load_prompts
from lora_ppo.checkpoint import Damaged, prompt_note, verify_checkpoint
from lora_ppo.loading import base_name, find_prompts, load_policy
from lora_ppo.policy import Policy
from lora_ppo.settings import BUNDLED_MODEL, DEFAULT_PROMPTS, PROMPTS_FILE, ConfigError, Settings, split_settings

if TYPE_CHECKING:
    from torch import Tensor


PROBES = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Which planet is the largest?", "The largest planet is Jupiter, and it has dozens of moons."),
    ("How do I repair a clock?", "I do not know how clocks are repaired."),
)
# The largest difference of merged and adapter logits that rounding explains, in units of the largest logit.
MERGE_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
IN_FULL = {"load_in_4bit": "false", "bf16_copy": "false"}  # settings for weights that are merged


def read_adapter(folder: Path) -> dict[str, Any]:
    """The `state.json` of a whole checkpoint; {} for a plain PEFT folder. Raises ConfigError for anything else."""
    if not folder.is_dir():
        raise ConfigError(f"adapter={folder}: there is no such folder; expected a checkpoint, a PEFT folder, or none")
    try:
        ours = any((folder / name).exists() for name in ("manifest.json", "state.json"))
        state = verify_checkpoint(folder) if ours else {}
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
    except Damaged as error:
        raise ConfigError(f"adapter={folder} is damaged: {error}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"adapter={folder} has no usable adapter_config.json ({type(error).__name__})") from None
    if kind != "LORA" or not (folder / "adapter_model.safetensors").exists():
        raise ConfigError(f"adapter={folder}: expected peft_type LORA (found {kind}) and an adapter_model.safetensors")
    return state


def suited(config: Settings, folder: Path, state: dict[str, Any]) -> None:
    """Raises ConfigError if the adapter belongs to another base model, or if training saw what is held out here."""
    if state and state["base_model"] != base_name(config):
        raise ConfigError(
            f"adapter={folder} was trained on model_name={state['base_model']}, now it is {base_name(config)}: "
            "set model_name to the former"
        )
    trained = state.get("config", {})
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
        config = replace(config, model_name=str(BUNDLED_MODEL) if name == f"bundled:{BUNDLED_MODEL.name}" else name)
    told = next((folder / PROMPTS_FILE for folder in folders if (folder / PROMPTS_FILE).is_file()), None)
    if told and not config.prompts and find_prompts(config).differing(load_prompts(told, DEFAULT_PROMPTS)):
        notice(f"prompts={told}: the roles are told what they were told in training.")
        config = replace(config, prompts=str(told))
    return replace(config, lora_r=1)  # the adapters come from their folders: the policy's own one is idle


def attach(policy: Policy, folder: Path, name: str) -> None:
    """Puts the adapter of `folder` beside the policy's own and makes it the active one. Raises ConfigError."""
    from safetensors import SafetensorError

    try:
        result = policy.model.load_adapter(str(folder), adapter_name=name, torch_device=str(policy.device))
        missing = result.missing_keys
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"adapter={folder} does not fit model_name={base_name(policy.config)}: {reason}") from None
    if missing:
        raise ConfigError(f"adapter={folder} lacks {len(missing)} tensors, such as {missing[0]}")
    added = policy.model.peft_config[name]
    if added.use_dora or added.lora_bias:
        raise ConfigError(f"adapter={folder} uses DoRA or biases: expected plain LoRA")
    policy.use_adapter(name)
    policy.model.eval()


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
    suited(config, folder, state)
    base = probe_logits(policy, adapter=False)
    attach(policy, folder, "trained")
    wanted = probe_logits(policy, adapter=True)
    new = out.with_name(f".{out.name}.new")
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        policy.model.merge_and_unload(adapter_names=["trained"]).save_pretrained(new)
        policy.tokenizer.save_pretrained(new)
        (new / "README.md").write_text(merged_card(config, policy.prompts, folder, state), encoding="utf-8")
        (new / PROMPTS_FILE).write_text(policy.prompts.as_yaml(), encoding="utf-8")
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


def check_empty(folder: Path) -> None:
    """Raises ConfigError unless `folder` is empty or can be made."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"merged_model_path={folder} is a file: name a new folder")
    entries = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if entries:
        raise ConfigError(
            f"merged_model_path={folder} is not empty ({len(entries)} entries, such as {entries[0]}): name a new "
            "folder; to evaluate a model that is there, use mode=evaluate and use_merged_model=true"
        )
