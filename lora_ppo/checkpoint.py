"""Checkpoints: folders that are written whole or not at all, and verified when they are read."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import indent
from typing import Any

from lora_ppo.files import apply_umask, utf8_path
from lora_ppo.loading import base_name
from lora_ppo.policy import Policy
from lora_ppo.prompts import Prompts, load_prompts
from lora_ppo.settings import DEFAULT_PROMPTS, PROMPTS_FILE, ConfigError, Settings, split_settings

PARTS = ("adapter_model", "value_head", "optimizer")  # files of tensors
CHECKPOINT_FILES = {*(f"{name}.safetensors" for name in PARTS), "state.json"}

# What an adapter_config.json may say and be plain LoRA; anything else that is set is more than low-rank parts.
PLAIN = set(
    "peft_type peft_version auto_mapping task_type base_model_name_or_path revision inference_mode r lora_alpha "
    "lora_dropout target_modules exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern "
    "use_rslora fan_in_fan_out init_lora_weights eva_config loftq_config megatron_core qalora_group_size "
    "runtime_config".split()
)
SCALING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
HARMLESS_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others take a part of the base weights away


class Damaged(Exception):
    """A checkpoint that can't be used; the message says what is wrong with it."""


def save_checkpoint(
    folder: Path, policy: Policy, state: dict[str, Any], result: str, extra: dict[str, str] | None = None
):
    """Writes a checkpoint: all of it becomes visible at once, under `folder`, or nothing does.

    `state` is what the caller wants back; `result` is a sentence for the model card; `extra` are further text files by
    name. Raises OSError, and leaves what stood at `folder` in place, where the disk refuses.
    """
    from safetensors.torch import save_file

    new, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("new", "old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        slots = {n.removeprefix("optimizer."): t for n, t in policy.tensors().items() if n.startswith("optimizer.")}
        with utf8_path(new) as place:
            policy.model.save_pretrained(
                place, safe_serialization=True, save_embedding_layers=False, selected_adapters=["default"]
            )
            save_file(policy.value_head.state_dict(), place / "value_head.safetensors")
            save_file(slots, place / "optimizer.safetensors")
        config = policy.config
        kept = {"step": policy.step, "kl_coef": policy.kl_coef} | identity(policy)
        kept |= {"base_reading": policy.reading}
        state = kept | {"config": asdict(config)} | state
        texts = {"state.json": json.dumps(state, indent=1), "README.md": model_card(policy, result)}
        texts |= {PROMPTS_FILE: policy.prompts.as_yaml()} | (extra or {})
        for name, text in texts.items():
            (new / name).write_text(text, encoding="utf-8", errors="backslashreplace")
        apply_umask(new)
        files = {p.name: {"sha256": sha256(p), "bytes": p.stat().st_size} for p in sorted(new.iterdir())}
        (new / "manifest.json").write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
        for path in (*new.iterdir(), new):
            fsync(path)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        new.rename(folder)
        fsync(folder.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def model_card(policy: Policy, result: str) -> str:
    """The README.md of a checkpoint. The tutor's task is the quiz and its algorithm PPO; others name theirs."""
    config = policy.config
    task, algorithm = getattr(config, "task", "quiz"), getattr(config, "algorithm", "ppo")
    return (
        f"---\nbase_model: {base_name(config)}\nlibrary_name: peft\ntags: [lora, {algorithm}]\n---\n"
        f"# LoRA adapters after {policy.step} {algorithm.upper()} step{'' if policy.step == 1 else 's'}\n\n"
        f"Rank {config.lora_r} on {', '.join(policy.targets)} of `{base_name(config)}`; task: `{task}`. {result}\n\n"
        "`adapter_model.safetensors` loads in PEFT and vLLM as it is. `value_head.safetensors` and\n"
        "`optimizer.safetensors` are needed only to train on.\n"
        f"{prompt_note(config, policy.prompts)}"
    )


def prompt_note(config: Settings, prompts: Prompts) -> str:
    """What a model card says of the tutor's prompts: adapters of the quiz talk nonsense under others."""
    if getattr(config, "task", "quiz") not in ("quiz", "voice"):
        return ""
    system, *turns = prompts.tutor.messages("")[:-1]
    note = "\nThey were trained under this system message; use it, or expect nonsense:\n\n"
    note += indent(f"{system['content']}\n", "    ")
    if turns:
        note += "\nAfter it came these messages, and then the question:\n\n"
        note += "".join(indent(f"{turn['role']}: {turn['content']}\n", "    ") for turn in turns)
    return f"{note}\n`{PROMPTS_FILE}` holds what every role was told.\n"


def other_prompts(folder: Path, policy: Policy) -> str:
    """A line for whoever goes on from a checkpoint under other prompts than those that it was trained under, or ""."""
    if not (folder / PROMPTS_FILE).is_file():
        return ""
    differing = policy.prompts.differing(load_prompts(folder / PROMPTS_FILE, DEFAULT_PROMPTS))
    if not differing:
        return ""
    return (
        f"{folder} was trained under other prompts of {', '.join(differing)}: set prompts={folder / PROMPTS_FILE} to "
        "keep to them."
    )


def adapter_config(folder: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a PEFT folder. Raises ConfigError for anything but plain LoRA, by the setting."""
    told = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if told["peft_type"] != "LORA":
        raise ConfigError(f"adapter={folder} has peft_type {told['peft_type']}: expected LORA")
    if more := beyond_plain(told):
        name, value = min(more.items())
        raise ConfigError(f"adapter={folder} has {name}={str(value)[:60]}: expected plain LoRA on linear layers")
    return told


def beyond_plain(told: dict[str, Any]) -> dict[str, Any]:
    """What an adapter's config asks for beyond plain LoRA."""
    more = {
        name: value for name, value in told.items() if name not in PLAIN and value not in (None, False, [], {}, "none")
    }
    start = told.get("init_lora_weights")
    return more if start in HARMLESS_STARTS else more | {"init_lora_weights": start}


def other_base(state: dict[str, Any], policy: Policy) -> str:
    """How the base model of a checkpoint differs from the policy's, and what to do; "" if it does not.

    Weights make a base model, by whatever name they are called: a folder's can be spelt in many ways, and what a name
    on the hub means can change.
    """
    then, now = state.get("base_model"), base_name(policy.config)
    prints = state.get("base_fingerprint"), policy.fingerprint
    comparable = all(prints) and len(str(prints[0])) == len(prints[1])  # earlier versions' were shorter, of whole files
    if comparable and prints[0] == prints[1]:
        return ""
    if not comparable and then and Path(then).resolve() == Path(now).resolve():
        return ""
    if then != now:
        return f"with model_name={then}, now it is {now}: set model_name back"
    return f"on other weights than model_name={now} has now ({prints[0]}, now {prints[1]}): put those back"


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The `state.json` of a whole checkpoint. Raises Damaged if a file is missing, cut short or altered."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        if lacking := CHECKPOINT_FILES - files.keys():
            raise Damaged(f"its manifest.json does not list {', '.join(sorted(lacking))}")
        for name, expected in files.items():
            path = folder / Path(name).name
            size = path.stat().st_size
            if size != expected["bytes"]:
                raise Damaged(f"{name} has {size} bytes, expected {expected['bytes']}")
            if sha256(path) != expected["sha256"]:
                raise Damaged(f"{name} is not what was written")
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Damaged(f"{Path(error.filename).name} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"unreadable: {error}") from None


def identity(policy: Policy) -> dict[str, Any]:
    """What a checkpoint and the policy that it is loaded into must have in common."""
    config = policy.config
    same = {"base_model": base_name(config), "base_fingerprint": policy.fingerprint, "target_modules": policy.targets}
    return same | {"lora_r": config.lora_r, "lora_alpha": config.lora_alpha}


def tensors_in(folder: Path, name: str) -> dict[str, Any]:
    """The tensors of one of a checkpoint's safetensors files."""
    from safetensors.torch import load_file

    with utf8_path(folder) as place:
        return load_file(place / f"{name}.safetensors")


def load_checkpoint(folder: Path, policy: Policy, notice: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Verifies a checkpoint, puts it into `policy`, and returns its state.

    Raises Damaged, or ConfigError where it belongs to another base model, rank or set of layers.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = verify_checkpoint(folder)
    new_run = "start a new run with resume=none" if hasattr(policy.config, "resume") else "name another output_dir"
    if difference := other_base(state, policy):
        raise ConfigError(f"{folder} was trained {difference}, or {new_run}")
    for name, value in identity(policy).items():
        if name.startswith("base_"):
            continue
        if state.get(name) != value:
            raise ConfigError(
                f"{folder} was trained with {name}={state.get(name)}, now it is {value}: set {name} back, or {new_run}"
            )
    told, ours = adapter_config(folder), policy.model.peft_config["default"].to_dict()
    adapter, head, optimizer = (tensors_in(folder, name) for name in PARTS)
    if different := [name for name in SCALING if told.get(name) != ours[name]]:
        raise ConfigError(
            f"{folder} has {different[0]}={told.get(different[0])}, expected {ours[different[0]]}: {new_run}"
        )
    expected = get_peft_model_state_dict(policy.model, save_embedding_layers=False)
    if strange := adapter.keys() ^ expected.keys() or {n for n, x in expected.items() if adapter[n].shape != x.shape}:
        raise Damaged(f"its adapter has other tensors than this policy's, such as {min(strange)}")
    own_head = policy.value_head.state_dict()
    if {name: x.shape for name, x in head.items()} != {name: x.shape for name, x in own_head.items()}:
        raise Damaged("its value head has other tensors than this policy's")
    slots = {f"optimizer.{name}": tensor for name, tensor in optimizer.items()}
    own = {name: tensor for name, tensor in policy.tensors().items() if name.startswith("optimizer.")}
    if {name: x.shape for name, x in slots.items()} != {name: x.shape for name, x in own.items()}:
        raise ConfigError(f"{folder} holds the state of another optimizer: set optimizer back, or {new_run}")
    for name, tensor in (adapter | head | optimizer).items():
        if not tensor.isfinite().all():
            raise Damaged(f"its {name} is not finite")
    set_peft_model_state_dict(policy.model, adapter)
    policy.value_head.load_state_dict(head)
    for name, tensor in own.items():
        tensor.copy_(slots[name])
    policy.step, policy.kl_coef = state["step"], state["kl_coef"]
    steering = {name: state["config"][name] for name in ("kl_coef", "adaptive_kl") if name in state["config"]}
    policy.config = replace(policy.config, **steering)  # what brought kl_coef there, until `configure` says otherwise
    if state.get("base_reading", "") not in ("", policy.reading):
        model = base_name(policy.config)
        notice(f"{folder} was trained with another config.json or tokenizer than model_name={model} has now.")
    if line := other_prompts(folder, policy):
        notice(line)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """What a checkpoint's `state.json` says, whether the rest is whole or not; {} where it says nothing."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        state = json.loads((folder / "state.json").read_bytes())
        if isinstance(state, dict) and isinstance(state.get("journal", {}), dict):
            return state
    return {}


def disk_is_full(error: BaseException) -> bool:
    """Whether that is what an error says; safetensors' have no errno."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"os error {number})" in str(error) for number in full)


def remove_folder(folder: Path) -> None:
    """Removes a checkpoint, all of it at once for whoever looks."""
    gone = folder.with_name(f".{folder.name}.gone")
    folder.rename(gone)
    shutil.rmtree(gone)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints `step_N` of a run, newest first."""
    found = [(int(m[1]), p) for p in run.glob("step_*") if (m := re.fullmatch(r"step_(\d+)", p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Forces a file, or where the system can a folder, to disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def all_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every epoch_N and step_N that says its step, the newest first."""
    found = []
    for folder in (*root.glob("epoch_*"), *root.glob("step_*")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found.append((int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"]), folder))
    return sorted(found, key=lambda pair: (pair[0], pair[1].name), reverse=True)


# What decides which samples a step gets, or belongs to it: a run can't go on under another value.
COURSE = (
    "task control algorithm batch_size group_size samples_per_epoch seed test_share topic_order steps_per_topic levels "
    "entry_levels"
).split()


def find_checkpoint(config: Settings, notice: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The whole checkpoint that `resume_from` means, with its state; None for a fresh start. Raises ConfigError."""
    root = Path(config.output_dir)
    there = all_checkpoints(root)
    if not config.resume_from:
        if there or (root / "train.log").exists():
            raise ConfigError(f"output_dir={root} holds a run: set resume_from=latest, or another output_dir")
        return None
    latest = config.resume_from == "latest"
    reasons = []
    for folder in [path for _, path in there] if latest else [Path(config.resume_from)]:
        try:
            state = verify_checkpoint(folder)
            break
        except Damaged as error:
            reasons.append(f"{folder.name}: {error}")
            if latest:
                notice(f"{folder.name} can't be used ({error}); trying the one before it.")
    else:
        raise ConfigError(
            f"resume_from={config.resume_from}: no whole checkpoint in {root if latest else config.resume_from} "
            f"({'; '.join(reasons) or 'none at all'})"
        )
    if not latest and (there or (root / "train.log").exists()):
        inside = folder.resolve().parent == root.resolve()
        if not inside or there[0][0] > state["step"]:
            newest = f"step {there[0][0]}" if there else "no checkpoint yet"
            raise ConfigError(
                f"resume_from={folder} is at step {state['step']}, and output_dir={root} holds a run ({newest}): "
                "set resume_from=latest, or another output_dir"
            )
    course = COURSE if state["step"] else ()  # at step 0, as after a warm start, no sample was taken yet
    for name in (*course, *split_settings(config)):
        now = getattr(config, name)
        before = state["config"].get(name, now)  # an older checkpoint knows fewer settings
        if before == now or (name == "samples_per_epoch" and 0 < before < (now or math.inf)):
            continue  # an epoch may become longer: which samples a step gets stays as it was
        raise ConfigError(
            f"{folder} was trained with {name}={before}, now it is {now}: set {name} back, or start a new run in "
            "another output_dir"
        )
    return folder, state
