"""Loads the base model that the settings name, in the precision and on the device that they name, as a policy."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_ppo.chat import encode
from lora_ppo.checks import check_loaded, check_policy, check_weights
from lora_ppo.files import utf8_path
from lora_ppo.gate import read_gate
from lora_ppo.gguf import unpacked
from lora_ppo.policy import Policy, is_experts
from lora_ppo.prompts import Prompts, load_prompts
from lora_ppo.settings import (
    BUNDLED_LEARNING_RATE,
    BUNDLED_MODEL,
    DEFAULT_PROMPTS,
    GPU_MODEL,
    LEARNING_RATES,
    PROMPTS_FILE,
    SMOLLM2,
    SMOLLM2_FOLDER,
    ConfigError,
    Settings,
)
from lora_ppo.stored import fingerprint, misfits, packed

QUANTIZATION = ("quantization_config", "compression_config")  # as config.json calls it, and called it
WORTH_4_BITS = 1e9  # parameters: a smaller model loses much of what it knows by them, and spares little memory
NOTES = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "architectures", "use_cache")  # of no effect


def load_policy(config: Settings, notice: Callable[[str], None] = lambda text: None) -> tuple[Policy, Settings]:
    """Loads the base model named by `config` and puts fresh adapters on it.

    Returns the policy and the configuration with every `auto` resolved. `notice` is told what a person should know.
    Raises ConfigError with one line if the model, or the prompts, can't be loaded.
    """
    import torch

    from lora_ppo.compiled import compilable, compiler
    from lora_ppo.layers import copy_weights

    silence_libraries()
    config = replace(config, model_name=os.path.expanduser(called(config.model_name)))
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
        bundled = is_bundled(config.model_name)
        config.learning_rate = BUNDLED_LEARNING_RATE if bundled else usual_learning_rate(model.num_parameters())
    if getattr(config, "compile", "off") == "auto" and compilable(model) and not compiler():
        notice("There is no C++ compiler (g++ or clang++): answers are written by slower passes. See compile=off.")
        config.compile = "off"
    policy = Policy(model, tokenizer, config, prompts, notice)
    policy.fingerprint = fingerprint(weight_files(config))
    if any(type(module).__name__.endswith("Experts") for module in model.modules()):
        spared = [name for name in config.target_modules if is_experts(model, name)]
        others = f", nor do dense layers with their names ({', '.join(spared)})" if spared else ""
        notice(f"Adapters go on {', '.join(policy.targets)}: the experts get none{others}.")
    policy.quiz_gate = read_gate(own_folder(config), policy)
    copied = copy_weights(model, config.bf16_copy)
    if config.bf16_copy == "true" and not copied:
        notice("bf16_copy=true changes nothing: the weights are not in 4 bits.")
    config.bf16_copy = "true" if copied else "false"
    check_policy(policy)
    policy.reading = reading_print(config, policy)
    return policy, config


def usual_learning_rate(parameters: int) -> float:
    """A rate for a model of so many parameters: on the line through LEARNING_RATES, both axes logarithmic; two digits.

    Smaller and larger models get the rates of its ends.
    """
    (small, fast), (large, slow) = LEARNING_RATES
    share = math.log(min(max(parameters, small), large) / small) / math.log(large / small)
    return float(f"{fast * (slow / fast) ** share:.1e}")


def load_base(config: Settings, classifier: bool = False):
    """The base model and its tokenizer; resolves `load_in_4bit` and `dtype` in place. Raises ConfigError.

    A `classifier` has a fresh head with one output in place of the one that makes logits.

    No code that comes with a model is run, whatever its files ask for.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import find_adapter_config_file

    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    on_cuda = config.device.startswith("cuda")
    try:
        stored = stored_quantization(config)
        if stored:
            check_quantization(config, stored, on_cuda)
        if config.load_in_4bit == "auto":
            config.load_in_4bit = "true" if stored or (on_cuda and parameters_of(config) >= WORTH_4_BITS) else "false"
        four_bit = config.load_in_4bit == "true"
        if four_bit and not on_cuda:
            raise ConfigError(f"load_in_4bit=true needs CUDA, and device is {config.device}: set load_in_4bit=false")
        if config.dtype == "auto":
            halved = on_cuda or (config.device.startswith("cpu") and multiplies_bfloat16())
            config.dtype = "bfloat16" if four_bit or (halved and not is_bundled(config.model_name)) else "float32"
        options: dict[str, Any] = {"dtype": getattr(torch, config.dtype)}
        if four_bit:
            options["device_map"] = {"": config.device}
        if four_bit and not stored:
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        # Tensors of another shape are told with the others that don't fit, by name.
        options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
        with source(config) as name:
            if find_adapter_config_file(name):  # transformers would load their base model with them
                raise ConfigError(
                    f"model_name={config.model_name} holds adapters: name their base model, or merge them into it with "
                    "evaluate.py --mode merge"
                )
            outputs = {"num_labels": 1} if classifier else {}
            told = AutoConfig.from_pretrained(name, trust_remote_code=False, **outputs)
            # Which code computes attention is not the model's to choose: it may name a kernel on the hub.
            told._attn_implementation = told._experts_implementation = None
            options |= {"config": told, "trust_remote_code": False}
            try:
                model, found = kind.from_pretrained(name, **options)
            except RuntimeError as error:
                files = weight_files(config)
                if "conversion" in str(error) and all(path.suffix == ".safetensors" for path in files):
                    check_loaded(misfits(files, told), config.model_name)
                raise
            if classifier:  # the head that is missing is to be trained; the other one is not needed
                found = found | {"missing_keys": set(found["missing_keys"]) - {"score.weight"}}
                found["unexpected_keys"] = {key for key in found["unexpected_keys"] if not key.startswith("lm_head.")}
            if found["mismatched_keys"]:  # of experts put together, it may be one that is missing
                check_loaded(misfits(weight_files(config), told), config.model_name)
            check_loaded(found, config.model_name)
            if not stored and (dtype := packed(weight_files(config))):
                raise quantized(config, dtype)
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        check_weights(model, config.model_name)
        return (model if four_bit else model.to(config.device)), tokenizer
    except ConfigError:
        raise
    except Exception as error:  # hub, files, architecture: the libraries raise anything from OSError to KeyError
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it needs code of its own, which is never run here"
        raise ConfigError(
            f"model_name={config.model_name} can't be loaded ({reason}): "
            "check the name and the network, name a local folder, or use model_name=auto"
        ) from error


def parameters_of(config: Settings) -> int:
    """How many parameters the base model has, by its config.json: no weights are read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with source(config) as name, torch.device("meta"):
        told = AutoConfig.from_pretrained(name, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(told, trust_remote_code=False).num_parameters()


def stored_quantization(config: Settings) -> dict[str, Any]:
    """The `quantization_config` that the model's own config.json has; {} for weights that are stored in full."""
    from transformers import PreTrainedConfig

    if Path(config.model_name).is_file():
        return {}  # a GGUF file is unpacked
    with source(config) as name:
        stored, _ = PreTrainedConfig.get_config_dict(name)
    parts = (stored, stored.get("text_config") or {})
    return next((q for part in parts for key in QUANTIZATION if (q := part.get(key))), {})


def check_quantization(config: Settings, stored: dict[str, Any], on_cuda: bool) -> None:
    """Raises ConfigError for weights that are stored in a form that is not trained on here.

    bitsandbytes' 4 bits are, on CUDA. On a CPU they train wrongly in silence; of other forms nothing is known.
    """
    four_bit = stored.get("load_in_4bit") or stored.get("_load_in_4bit")
    method = stored.get("quant_method") or ("bitsandbytes" if "load_in_8bit" in stored else "an unknown method")
    instead = "name the model that they were made of"
    if not four_bit or method != "bitsandbytes":
        raise quantized(config, method)
    if not on_cuda:
        raise ConfigError(
            f"model_name={config.model_name}: its weights are stored in 4 bits, which need CUDA, and device is "
            f"{config.device}: {instead}"
        )
    if config.load_in_4bit == "false":
        raise ConfigError(
            f"load_in_4bit=false, and the weights of model_name={config.model_name} are in 4 bits: {instead}"
        )


def quantized(config: Settings, method: str) -> ConfigError:
    return ConfigError(
        f"model_name={config.model_name}: its weights are stored quantized ({method}), expected in full or in "
        "bitsandbytes' 4 bits: name the model that they were made of"
    )


def weight_files(config: Settings) -> list[Path]:
    """The files that hold the base model's weights; none where that is not known."""
    if Path(config.model_name).is_file():
        return [Path(config.model_name)]
    from transformers.utils import cached_file

    with source(config) as name, contextlib.suppress(OSError, ValueError, KeyError):
        folder = Path(cached_file(name, "config.json", local_files_only=True)).parent.resolve()  # a link may be gone
        if (folder / "model.safetensors").is_file():
            return [folder / "model.safetensors"]
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return [folder / file for file in sorted(set(index["weight_map"].values()))]
    return []


def reading_print(config: Settings, policy: Policy) -> str:
    """What tells a way to read weights from others: a digest of config.json, vocabulary, chat template, some ids."""
    from transformers import PreTrainedConfig

    said, tokenizer = {}, policy.tokenizer
    if not Path(config.model_name).is_file():  # a GGUF file is one thing
        with source(config) as name:
            said = PreTrainedConfig.get_config_dict(name)[0]
    texts = {name: value for name, value in said.items() if name not in NOTES}
    ids = encode(tokenizer, "What is 2 + 2?\n\nOù est 北京?")
    read = [texts, tokenizer.get_vocab(), tokenizer.chat_template, ids]  # a rendered chat may tell the date
    return hashlib.sha256(json.dumps(read, sort_keys=True, default=str).encode()).hexdigest()[:16]


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
        with utf8_path(path) as place:
            yield str(place)
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
    own = os.path.join(own_folder(config), PROMPTS_FILE)
    if os.path.isfile(own):
        files.append(own)
    return load_prompts(*files, DEFAULT_PROMPTS)


def own_folder(config: Settings) -> str:
    """The folder in which files of this program may lie beside the model's."""
    return str(SMOLLM2_FOLDER) if base_name(config) == SMOLLM2 else config.model_name


def is_bundled(model_name: str) -> bool:
    return Path(model_name).resolve() == BUNDLED_MODEL


BUNDLED_NAME = f"bundled:{BUNDLED_MODEL.name}"


def base_name(config: Settings) -> str:
    """What a checkpoint calls its base model: the same wherever this program is installed."""
    known = {BUNDLED_MODEL: BUNDLED_NAME, SMOLLM2_FOLDER.resolve(): SMOLLM2}
    return known.get(Path(config.model_name).resolve(), config.model_name)


def called(name: str) -> str:
    """The model_name of a base model that a checkpoint calls `name`."""
    return str(BUNDLED_MODEL) if name == BUNDLED_NAME else name


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
