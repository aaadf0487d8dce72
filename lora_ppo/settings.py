"""How settings are declared, checked, and read from YAML and the command line.

A program's settings are a dataclass of `setting`s (`config.Config`, `train.TrainConfig`, ...). Lowest to highest: its
defaults, a YAML file (`--config FILE`), the command line (`key=value` or `--key value`). The library takes such an
object as an argument and never imports one.
"""

import difflib
import io
import os
import re
import sys
import textwrap
import tomllib
from collections.abc import Container
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Any

from lora_ppo.files import hidden, replace_file, shown

BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "models" / "tutor-tiny"
# A small model that others trained, which `make smollm2` fetches: what `model_name` calls it, and where it then lies.
SMOLLM2, SMOLLM2_FOLDER = "smollm2", BUNDLED_MODEL.with_name("smollm2-135m")
DEFAULT_PROMPTS = Path(__file__).resolve().parent.parent / "prompts" / "default.yaml"
PROMPTS_FILE = "prompts.yaml"  # in a model's folder, and in every checkpoint
GATE_FILE = "quiz_gate.json"  # in a model's folder: what its quizzes are worth
GPU_MODEL = "Qwen/Qwen3-4B-Instruct-2507"
# `learning_rate=auto`: of models of so many parameters (loading.usual_learning_rate), and of the bundled one.
LEARNING_RATES = (135e6, 2e-4), (4e9, 1e-5)
BUNDLED_LEARNING_RATE = 8e-5


# Settings that name files or folders, or may.
PATHS = (
    "model_name prompts better_prompts checkpoint_dir log_dir resume questions output_dir resume_from adapter "
    "merged_model_path output_file baseline functions problems pairs held_out reward_model topics entries opening "
    "record_dir warm_dir server_token token_file"
).split()


class ConfigError(ValueError):
    """A setting that can't be used. Its message is one line that a person can act on."""


class Settings:
    """The settings of a program, one field each: what the dataclasses of scripts derive from."""


def setting(default: Any, text: str, group: str = "", split: bool = False) -> Any:
    """A dataclass field with one line of help. `group` is the heading of this setting and of those that follow it.

    A `split` setting decides which samples are held out.
    """
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(metadata={"help": text, "group": group, "split": split}, **factory)


def split_settings(config: Settings) -> list[str]:
    """The names of the settings that decide which samples are held out."""
    return [f.name for f in fields(config) if f.metadata.get("split")]


RANGES = {  # name: (lowest, highest, whether the lowest itself is allowed)
    "lora_r": (1, 4096, True),
    "lora_alpha": (0, 65536, False),
    "lora_dropout": (0, 0.99, True),
    "temperature": (0, 10, False),
    "quiz_temperature": (0, 10, False),
    "top_p": (0, 1, False),
    "max_new_tokens": (1, 1_000_000, True),
    "quiz_tries": (1, 100, True),
    "learning_rate": (0, 1, False),
    "batch_size": (1, 4096, True),
    "ppo_epochs": (1, 1000, True),
    "cliprange": (0, 10, False),
    "cliprange_value": (0, 1000, False),
    "vf_coef": (0, 1000, True),
    "entropy_coef": (0, 1000, True),
    "gamma": (0, 1, False),
    "lam": (0, 1, True),
    "kl_coef": (0, 1000, True),
    "kl_target": (0, 1e6, False),
    "kl_horizon": (1, 1e12, True),
    "target_kl": (0, 1e6, True),
    "max_grad_norm": (0, 1e9, False),
    "reward_right": (0, 100, True),
    "reward_wrong": (-100, 0, True),
    "save_every": (1, 1_000_000, True),
    "keep_checkpoints": (2, 1_000_000, True),
    "steps": (1, 1e9, True),
    "seed": (0, 2**63 - 1, True),
}
KINDS = {  # what a person should write for a setting of this type
    str: "text",
    int: "a whole number",
    float: "a number",
    float | None: "a number, or auto",
    bool: "true or false",
    list[str]: "names, separated by commas",
}
OTHER_NAMES = {"lr": "learning_rate", "model": "model_name", "epochs": "num_epochs"}  # that people try first
CHOICES = {
    "load_in_4bit": ("auto", "true", "false"),
    "bf16_copy": ("auto", "true", "false"),
    "dtype": ("auto", "float32", "bfloat16"),
    "compile": ("auto", "off"),
    "learner": ("person", "simulated"),
}


def check(config: Settings) -> Settings:
    """Returns `config` if every setting is in its range; raises ConfigError naming the first that is not."""
    for name, (low, high, closed) in RANGES.items():
        value = getattr(config, name, None)
        if value is not None and not ((low <= value if closed else low < value) and value <= high):
            bounds = f"{'at least' if closed else 'above'} {low:g} and at most {high:g}"
            raise ConfigError(f"{name}={value} is out of range: expected {bounds}")
    for name, allowed in CHOICES.items():
        if getattr(config, name, allowed[0]) not in allowed:
            raise ConfigError(f"{name}={getattr(config, name)!r} is unknown: expected one of {', '.join(allowed)}")
    if getattr(config, "reward_right", 1.0) == getattr(config, "reward_wrong", -1.0):
        raise ConfigError("reward_right=0 and reward_wrong=0: nothing would be learned, set one of them")
    user = getattr(config, "user", "")
    if user and not re.fullmatch(r"\w[\w .-]*", user):
        raise ConfigError(f"user={user!r} is no name for a folder: use letters, digits, spaces, dots and hyphens")
    if getattr(config, "learner", "") == "simulated" and not config.questions:
        raise ConfigError("learner=simulated needs questions=FILE, a text file with one question per line")
    for name in ("model_name", "device", "checkpoint_dir", "log_dir", "resume"):
        if not getattr(config, name, True):
            raise ConfigError(f"{name} is empty: give it a value, or leave it out for its default")
    if getattr(config, "adaptive_kl", False):
        if not config.kl_coef:
            raise ConfigError("adaptive_kl=true with kl_coef=0: 0 stays 0, whatever it is multiplied by; raise kl_coef")
        if config.kl_horizon <= config.batch_size / 5:  # a step changes it by up to 20 % x batch_size / kl_horizon
            least = config.batch_size // 5 + 1
            raise ConfigError(
                f"kl_horizon={config.kl_horizon} with batch_size={config.batch_size}: one step could take kl_coef "
                f"below 0; set kl_horizon to {least} at least, and to some ten steps' answers for a steady one"
            )
    modules = getattr(config, "target_modules", ["q_proj"])
    if not modules or not all(isinstance(name, str) for name in modules):
        raise ConfigError(f"target_modules={modules}: name at least one linear layer, such as q_proj")
    return config


def parse(schema: type[Settings], arguments: list[str], values: dict[str, Any] | None = None) -> Settings:
    """The configuration from `--config FILE`, `key=value` and `--key value` arguments, checked. Raises ConfigError.

    `~` is expanded in every path. `values` are settings that are read already; they stand above all others.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    file, pairs = split_arguments(schema, arguments)
    config = OmegaConf.structured(schema)
    if file is not None:
        pairs = [*read_yaml(file).items(), *pairs]
    for name, value in [*pairs, *(values or {}).items()]:
        known_name(schema, name)
        try:
            OmegaConf.update(config, name, typed(name, hidden(value), config[name]))
        except (OmegaConfBaseException, YAMLError, ValueError):
            kind = next(f.type for f in fields(schema) if f.name == name)
            raise ConfigError(f"{name}={value!r} does not fit: expected {KINDS[kind]}") from None
    config = OmegaConf.to_object(config)
    for f in fields(schema):
        value = shown(getattr(config, f.name))
        setattr(config, f.name, expanded(f.name, value) if f.name in PATHS else value)
    return check(config)


def read_yaml(file: str) -> dict[str, Any]:
    """The settings in a YAML file, by name. Raises ConfigError."""
    from omegaconf import OmegaConf

    try:
        text = Path(os.path.expanduser(file)).read_bytes().decode("utf-8-sig", "surrogateescape")
        loaded = OmegaConf.load(io.StringIO(hidden(text)))
    except OSError as error:
        raise ConfigError(f"--config {file}: {error.strerror or error}") from None
    except Exception as error:  # whatever the YAML parser raises
        raise ConfigError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(loaded):
        raise ConfigError(f"--config {file}: expected lines of the form `name: value`")
    return {str(name): shown(value) for name, value in OmegaConf.to_container(loaded).items()}


def expanded(name: str, value: str | list[str]) -> str | list[str]:
    """A path with its `~` expanded, or several. Raises ConfigError where no file can have that name."""
    if isinstance(value, list):
        return [expanded(name, item) for item in value]
    try:
        os.fsencode(value)
    except UnicodeEncodeError:
        raise ConfigError(f"{name}={value!r}: no file can have this name") from None
    if "\0" in value:
        raise ConfigError(f"{name}={value!r}: no file can have this name")
    return os.path.expanduser(value)


def typed(name: str, value: Any, current: Any) -> Any:
    """A value from YAML or the command line as setting `name` takes it; `current` tells text from lists."""
    import yaml

    if name in CHOICES:  # YAML reads `off` as false
        return "off" if value is False and "off" in CHOICES[name] else str(value).lower()
    if value == "auto" and not isinstance(current, str):
        return None
    if not isinstance(value, str):
        return value
    if isinstance(current, str) and name in PATHS:
        return value
    if value == hidden("???") or "\n" in value:
        raise ValueError("OmegaConf would take this for more than a value")
    if isinstance(current, str):
        return value
    if hasattr(current, "append") and not value.startswith("["):
        return [part.strip() for part in value.split(",") if part.strip()]
    return yaml.safe_load(value)


def split_arguments(schema: type[Settings], arguments: list[str]) -> tuple[str | None, list[tuple[str, str]]]:
    """The value of `--config` (None without) and the (name, value) pairs of the other arguments, in order.

    What is true or false may be given as `--some-name` alone, which is true.
    """
    file, pairs, rest = None, [], list(arguments)
    flags = {f.name for f in fields(schema) if f.type is bool}
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name.replace("-", "_") in flags:
            name = name.replace("-", "_")
        if not equals:
            if not word.startswith("--"):
                raise ConfigError(f"{word!r} is no setting: write name=value or --name value (see --help)")
            if name != "config":
                known_name(schema, name)
            if name in flags and (not rest or "=" in rest[0] or rest[0].startswith("--")):
                value = "true"
            elif not rest:
                raise ConfigError(f"--{name} needs a value")
            else:
                value = rest.pop(0)
        if name == "config":
            file = value
        else:
            pairs.append((name, value))
    return file, pairs


def known_name(schema: type[Settings], name: str) -> None:
    """Raises ConfigError with the nearest setting if `schema` has none called `name`."""
    names = [f.name for f in fields(schema)]
    if name not in names:
        near = (
            [OTHER_NAMES[name]]
            if OTHER_NAMES.get(name) in names
            else difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        )
        raise ConfigError(
            f"there is no setting {name!r}" + (f": did you mean {near[0]!r}?" if near else "; see --help")
        )


def help_text(schema: type[Settings], usage: str, only: Container[str] | None = None) -> str:
    """`usage`, then the settings, or `only` some, in their groups, each with its default; 80 columns wide."""
    lines = [usage.strip(), "", "settings (name=value or --name value; --config FILE reads them from YAML):"]
    shown = [f for f in fields(schema) if only is None or f.name in only]
    width = max(len(f.name) for f in shown) + 4  # of the column of names
    group = heading = ""
    for f in fields(schema):
        group = f.metadata["group"] or group
        if f not in shown:
            continue
        if group != heading:
            lines += ["", f"{group}:"]
            heading = group
        default = f.default_factory() if callable(f.default_factory) else f.default
        value = "auto" if default is None else ",".join(default) if isinstance(default, list) else default
        lines += textwrap.wrap(
            f"{f.metadata['help']} [{value}]",
            width=80,
            initial_indent=f"  {f.name}".ljust(width),
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def version() -> str:
    """The project's name and version, as pyproject.toml has them."""
    project = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text("utf-8"))["project"]
    return f"{project['name']} {project['version']}"


def save_yaml(config: Settings, path: Path) -> None:
    """Writes the effective configuration as YAML that `--config` reads back."""
    from omegaconf import OmegaConf

    plain = replace(config, **{f.name: hidden(getattr(config, f.name)) for f in fields(config)})
    text = shown(OmegaConf.to_yaml(OmegaConf.structured(plain)))
    replace_file(path, text.encode("utf-8", "surrogateescape"))


def from_command_line(schema: type[Settings], usage: str) -> Settings:
    """`parse(sys.argv)`. Prints and exits for --help, for --version, and, with one line, for what can't be used."""
    arguments = sys.argv[1:]
    if "--version" in arguments:
        print(version())
        raise SystemExit(0)
    if "-h" in arguments or "--help" in arguments:
        print(help_text(schema, usage))
        raise SystemExit(0)
    try:
        return parse(schema, arguments)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
