"""Loads the base model that the settings name, in the precision and on the device that they name, as a policy."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_ppo.chat import Prompts, load_prompts
from lora_ppo.gguf import unpacked
from lora_ppo.policy import Policy
from lora_ppo.settings import (
    BUNDLED_LEARNING_RATE,
    BUNDLED_MODEL,
    DEFAULT_PROMPTS,
    GPU_MODEL,
    LEARNING_RATE,
    PROMPTS_FILE,
    SMOLLM2,
    SMOLLM2_FOLDER,
    ConfigError,
    Settings,
)


def load_policy(config: Settings, notice: Callable[[str], None] = lambda text: None) -> tuple[Policy, Settings]:
    """Loads the base model named by `config` and puts fresh adapters on it.

    Returns the policy and the configuration with every `auto` resolved. `notice` is told what a person should know.
    Raises ConfigError with one line if the model, or the prompts, can't be loaded.
    """
    import torch

    from lora_ppo.compiled import compilable, compiler
    from lora_ppo.layers import copy_weights

    silence_libraries()
    config = replace(config, model_name=os.path.expanduser(config.model_name))
    if config.device == "auto":
        mps = torch.backends.mps.is_available()
        config.device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        torch.empty(0, device=config.device)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"device={config.device} can't be used ({reason}): try device=auto") from None
    on_cuda = config.device.startswith("cuda")
    chosen, four_bit, dtype = config.model_name, config.load_in_4bit, config.dtype
    if chosen == "auto":
        config.model_name = GPU_MODEL if on_cuda else str(BUNDLED_MODEL)
    prompts = find_prompts(config)
    try:
        model, tokenizer = load_base(config)
    except ConfigError as error:
        if chosen != "auto" or not on_cuda:
            raise
        notice(f"{str(error).partition(': check')[0]}. Going on with the bundled model.")
        config.model_name, config.load_in_4bit, config.dtype = str(BUNDLED_MODEL), four_bit, dtype  # as they were asked
        prompts = find_prompts(config)
        model, tokenizer = load_base(config)
    if config.learning_rate is None:
        config.learning_rate = BUNDLED_LEARNING_RATE if is_bundled(config.model_name) else LEARNING_RATE
    if getattr(config, "compile", "off") == "auto" and compilable(model) and not compiler():
        notice("There is no C++ compiler (g++ or clang++): answers are written by slower passes. See compile=off.")
        config.compile = "off"
    policy = Policy(model, tokenizer, config, prompts, notice)
    copied = copy_weights(model, config.bf16_copy)
    if config.bf16_copy == "true" and not copied:
        notice("bf16_copy=true changes nothing: the weights are not in 4 bits.")
    config.bf16_copy = "true" if copied else "false"
    if config.max_new_tokens >= policy.context:
        raise ConfigError(
            f"max_new_tokens={config.max_new_tokens} leaves no room in a context of {policy.context} tokens"
        )
    return policy, config


def load_base(config: Settings):
    """The base model and its tokenizer; resolves `load_in_4bit` and `dtype` in place. Raises ConfigError."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    on_cuda = config.device.startswith("cuda")
    if config.load_in_4bit == "auto":
        config.load_in_4bit = "true" if on_cuda and not is_bundled(config.model_name) else "false"
    four_bit = config.load_in_4bit == "true"
    if four_bit and not on_cuda:
        raise ConfigError(f"load_in_4bit=true needs CUDA, and device is {config.device}: set load_in_4bit=false")
    if config.dtype == "auto":
        halved = on_cuda or (config.device.startswith("cpu") and multiplies_bfloat16())
        config.dtype = "bfloat16" if four_bit or (halved and not is_bundled(config.model_name)) else "float32"
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
    if four_bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options["device_map"] = {"": config.device}
    try:
        with source(config) as name:
            model = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(name)
            return (model if four_bit else model.to(config.device)), tokenizer
    except ConfigError:
        raise
    except Exception as error:  # hub, files, architecture: the libraries raise anything from OSError to KeyError
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"model_name={config.model_name} can't be loaded ({reason}): "
            "check the name and the network, name a local folder, or use model_name=auto"
        ) from error


@contextlib.contextmanager
def source(config: Settings) -> Iterator[str]:
    """The folder, or the name on the hub, from which transformers loads the model. Raises ConfigError."""
    name, path = config.model_name, Path(config.model_name)
    if base_name(config) == SMOLLM2:
        if not SMOLLM2_FOLDER.is_dir():
            raise ConfigError(f"model_name={name}: SmolLM2 is not here yet; fetch it with `make smollm2`")
        yield str(SMOLLM2_FOLDER)
    elif path.is_file():
        with unpacked(path, config.dtype) as folder:
            yield str(folder)
    elif path.is_dir():
        yield str(path)
    elif path.suffix == ".gguf" or name.startswith((".", "/")):
        kind = "file" if path.suffix == ".gguf" else "folder"
        raise ConfigError(f"model_name={name}: there is no such {kind}")
    else:
        yield name


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions of its own for products in bfloat16; without them float32 is quicker."""
    import torch

    abilities = torch.cpu.get_capabilities()
    return any(abilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16"))  # x86, x86, Arm


def find_prompts(config: Settings) -> Prompts:
    """Each role's prompts, from the first of these that has them: the setting, the model folder's own, the default."""
    files = [config.prompts] if config.prompts else []
    folder = SMOLLM2_FOLDER if base_name(config) == SMOLLM2 else config.model_name
    own = os.path.join(folder, PROMPTS_FILE)
    if os.path.isfile(own):
        files.append(own)
    return load_prompts(*files, DEFAULT_PROMPTS)


def is_bundled(model_name: str) -> bool:
    return Path(model_name).resolve() == BUNDLED_MODEL


def base_name(config: Settings) -> str:
    """What a checkpoint calls its base model: the same wherever this program is installed."""
    known = {BUNDLED_MODEL: f"bundled:{BUNDLED_MODEL.name}", SMOLLM2_FOLDER: SMOLLM2}
    return known.get(Path(config.model_name).resolve(), config.model_name)


def silence_libraries() -> None:
    """Keeps what transformers, peft and bitsandbytes print while loading off the terminal."""
    import logging
    import warnings

    from transformers.utils import logging as transformers_logging  # first: loading it resets the level of the hub's

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    for name in ("transformers", "peft", "bitsandbytes", "accelerate", "huggingface_hub", "torch"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
