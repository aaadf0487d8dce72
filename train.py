"""Trains the policy on a task, unattended: PPO or GRPO, in batches, in one process or in many.

    python train.py --config configs/quiz.yaml                             train
    python train.py --config configs/quiz.yaml resume_from=latest          go on where it stopped
    accelerate launch --config_file configs/accelerate/cpu.yaml train.py --config configs/quiz.yaml device=cpu
    python train.py --help                                                 every setting

Each step plays batch_size episodes of the task (lora_ppo/episodes.py), of one reply or of several, turns their rewards
into advantages and takes minibatch updates on them (lora_ppo/training.py); a step that leaves the trust region is
undone. Here are the settings and the order of things; the run itself is lora_ppo/trainer.py. A step follows from the
weights, the settings and its number, so that a run which was stopped goes on as if it had not been.

Left out on purpose: asynchronous rollouts, an inference server.
"""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import tasks
from config import Config
from lora_ppo.checkpoint import all_checkpoints, find_checkpoint
from lora_ppo.episodes import Task
from lora_ppo.functions import load_functions, replaced
from lora_ppo.loading import load_policy
from lora_ppo.policy import Policy
from lora_ppo.processes import shard
from lora_ppo.settings import ConfigError, Settings, from_command_line, save_yaml, setting
from lora_ppo.streams import run_program
from lora_ppo.terminal import clean, program
from lora_ppo.trainer import Training, writing
from lora_ppo.training import prepare
from lora_ppo.watching import bands

# ---------------------------------------------------------------------------------------------------------- settings

TUTOR_SETTINGS = {f.name: f for f in fields(Config)}


def shared(name: str, group: str = "") -> Any:
    """The tutor's setting of this name, with its default and its help."""
    f = TUTOR_SETTINGS[name]
    return setting(f.default_factory() if f.default is MISSING else f.default, f.metadata["help"], group)


TASK_MODULES = tasks.found()
TASKS: dict[str, Callable[[Any], Callable[[Policy], Task]]] = {n: m.prepare for n, m in TASK_MODULES.items()}


@dataclass
class TrainSettings(Settings):
    task: str = setting("quiz", "what earns the reward", group="what is learned, and how long")
    algorithm: str = setting("ppo", "ppo, or grpo (group_size answers per prompt, no value head)")
    output_dir: str = setting("runs/train", "where log, checkpoints and report are written")
    num_epochs: int = setting(1, "epochs")
    samples_per_epoch: int = setting(
        0, "prompts per epoch, in whole steps; 0: about every training sample of the task once"
    )
    eval_every: int = setting(0, "steps between evaluations on the test split; 0: one after each epoch")
    eval_samples: int = setting(100, "test samples that an evaluation answers")
    save_every: int = setting(50, "steps between checkpoints within an epoch")
    keep_checkpoints: int = setting(2, "checkpoints step_N that are kept; every epoch_N is")
    resume_from: str = setting("", "latest (of output_dir), or the folder of a checkpoint; empty: a fresh start")
    functions: str = setting("", "module or .py file whose functions replace those of lora_ppo/ppo.py (see exercises/)")
    baseline: str = setting(
        "auto",
        "folder of a run that the report draws beside this one; auto: with functions, the library's own, which is made "
        "first in output_dir/library; none",
    )
    report_to: str = setting("none", "tracker: none, tensorboard, wandb or trackio")
    test_share: float = setting(0.2, "share of the samples that a task keeps for its test split", split=True)
    stop_if: list[str] = setting(
        [],
        "ends training where held-out replies leave a band: conditions such as length>2, length<0.5, distinct_2<0.8, "
        "in units of the value at the start",
    )
    control: str = setting("none", "none, or random: the reward is a coin, and nothing must be learned")
    seed: int = shared("seed")
    model_name: str = shared("model_name", "model")
    load_in_4bit: str = shared("load_in_4bit")
    bf16_copy: str = shared("bf16_copy")
    device: str = shared("device")
    dtype: str = shared("dtype")
    prompts: str = shared("prompts")
    lora_r: int = shared("lora_r")
    lora_alpha: float = shared("lora_alpha")
    lora_dropout: float = shared("lora_dropout")
    target_modules: list[str] = shared("target_modules")
    gradient_checkpointing: bool = setting(False, "compute activations again in the backward pass: less memory")
    temperature: float = shared("temperature", "generation")
    quiz_temperature: float = shared("quiz_temperature")
    top_p: float = shared("top_p")
    max_new_tokens: int = shared("max_new_tokens")
    quiz_tries: int = shared("quiz_tries")
    learning_rate: float | None = shared("learning_rate", "the update")
    lr_schedule: str = setting("constant", "constant, or linear: down to 0 behind the run's last step")
    optimizer: str = setting("adamw", "adamw; on CUDA also adamw_8bit, paged_adamw_8bit (bitsandbytes)")
    batch_size: int = setting(16, "answers per step, on all processes together")
    mini_batch_size: int = setting(16, "answers in one forward and backward pass, on all processes together")
    gradient_accumulation_steps: int = setting(1, "passes that make one optimizer step")
    ppo_epochs: int = shared("ppo_epochs")
    group_size: int = setting(8, "answers to one prompt (grpo)")
    normalize_groups: bool = setting(False, "divide advantages by their group's standard deviation (grpo)")
    cliprange: float = shared("cliprange")
    cliprange_value: float = shared("cliprange_value")
    vf_coef: float = shared("vf_coef")
    entropy_coef: float = shared("entropy_coef")
    gamma: float = shared("gamma")
    lam: float = shared("lam")
    kl_coef: float = shared("kl_coef")
    adaptive_kl: bool = shared("adaptive_kl")
    kl_target: float = shared("kl_target")
    kl_horizon: int = shared("kl_horizon")
    target_kl: float = shared("target_kl")
    max_grad_norm: float = shared("max_grad_norm")

    @property
    def baseline_folder(self) -> Path | None:
        """The folder of the run that the report draws beside this one."""
        if self.baseline == "auto":
            return Path(self.output_dir) / "library" if self.functions else None
        return None if self.baseline == "none" else Path(self.baseline)

    @property
    def prompts_per_step(self) -> int:
        return self.batch_size // (self.group_size if self.algorithm == "grpo" else 1)


@dataclass
class TrainConfig(*(module.TaskSettings for module in reversed(TASK_MODULES.values())), TrainSettings):
    """Training's settings, and those that the tasks bring."""


RANGES = {
    "num_epochs": (1, 1_000_000),
    "samples_per_epoch": (0, 1e9),
    "eval_every": (0, 1e9),
    "eval_samples": (1, 1_000_000),
    "test_share": (0.001, 0.999),
    "mini_batch_size": (1, 4096),
    "gradient_accumulation_steps": (1, 4096),
}
CHOICES = {
    "algorithm": ("ppo", "grpo"),
    "optimizer": ("adamw", "adamw_8bit", "paged_adamw_8bit"),
    "report_to": ("none", "tensorboard", "wandb", "trackio"),
    "control": ("none", "random"),
    "lr_schedule": ("constant", "linear"),
}


def check(config: TrainConfig, processes: int = 1) -> None:
    """Raises ConfigError naming both values where settings are out of range or don't fit each other."""
    for name, (low, high) in RANGES.items():
        if not low <= getattr(config, name) <= high:
            raise ConfigError(f"{name}={getattr(config, name)} is out of range: expected {low:g} to {high:g}")
    for name, allowed in (CHOICES | {"task": tuple(TASKS)}).items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name}={getattr(config, name)} is unknown: expected one of {', '.join(allowed)}")
    one_step = config.mini_batch_size * config.gradient_accumulation_steps
    if config.batch_size % one_step:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by mini_batch_size={config.mini_batch_size} times "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}"
        )
    if config.mini_batch_size % processes:
        raise ConfigError(f"mini_batch_size={config.mini_batch_size} is not divisible by the {processes} processes")
    if config.optimizer != "adamw":
        import torch

        if not (config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())):
            raise ConfigError(f"optimizer={config.optimizer} needs CUDA, and device={config.device}: use adamw")
    if config.algorithm == "grpo":
        if config.group_size < 2:
            raise ConfigError(f"group_size={config.group_size} with algorithm=grpo: a group needs at least 2 answers")
        if config.batch_size % (config.group_size * processes):
            raise ConfigError(
                f"batch_size={config.batch_size} is not divisible by group_size={config.group_size}"
                + (f" times the {processes} processes" if processes > 1 else "")
            )
    if config.samples_per_epoch % config.prompts_per_step:
        raise ConfigError(
            f"samples_per_epoch={config.samples_per_epoch} is not divisible by the {config.prompts_per_step} prompts "
            f"of a step (batch_size={config.batch_size})"
        )
    bands(config.stop_if)
    if config.baseline not in ("auto", "none") and not (Path(config.baseline) / "train.log").is_file():
        raise ConfigError(f"baseline={config.baseline} holds no run (no train.log): expected auto, none, or its folder")
    if config.report_to != "none" and importlib.util.find_spec(config.report_to) is None:
        raise ConfigError(f"report_to={config.report_to} needs a package: pip install {config.report_to}")


# ----------------------------------------------------------------------------------------------------------- the run


def finished(config: TrainConfig, folder: Path, state: dict[str, Any]) -> bool:
    """Whether a checkpoint is the end of its run, as far as can be told without the data, and the report is there."""
    root = Path(config.output_dir)
    if folder.resolve().parent != root.resolve() or not (root / "report.html").exists():
        return False
    if config.samples_per_epoch:
        return state["step"] >= config.num_epochs * (config.samples_per_epoch // config.prompts_per_step)
    return state["config"]["samples_per_epoch"] == 0 and state["epoch"] >= config.num_epochs


def train(config: TrainConfig) -> int:
    """The whole run; settings and data are checked before any model is loaded. Raises ConfigError."""
    check(config, int(os.environ.get("WORLD_SIZE", "1")))
    functions = load_functions(config.functions) if config.functions else {}
    build_task = TASKS[config.task](config)
    main_process = os.environ.get("RANK", "0") == "0"

    def notice(text: str) -> None:
        if main_process:
            print(clean(text), file=sys.stderr, flush=True)

    found = find_checkpoint(config, notice)
    if found and finished(config, *found):
        notice(f"{config.output_dir} is finished: step {found[1]['step']} is its last. Set num_epochs higher to go on.")
        return 0
    with writing(Path(config.output_dir)) if main_process else contextlib.nullcontext():
        if functions and config.baseline == "auto":
            folder = config.baseline_folder
            there = "latest" if all_checkpoints(folder) else ""
            notice(f"First the run of the library's own functions, in {folder}, for comparison.")
            own = replace(config, functions="", baseline="none", output_dir=str(folder), resume_from=there)
            if status := train(own):
                return status
            notice(f"Now the run of {config.functions}.")
        with replaced(functions):
            return begin(config, build_task, found, notice)


def begin(
    config: TrainConfig,
    build_task: Callable[[Policy], Task],
    found: tuple[Path, dict[str, Any]] | None,
    notice: Callable[[str], None],
) -> int:
    """Loads the model, goes on from the checkpoint `found` if there is one, and trains. Returns the exit status."""
    import torch
    from accelerate import Accelerator

    on_cpu = config.device == "cpu" or not torch.cuda.is_available()
    tracker = None if config.report_to == "none" else config.report_to
    accelerator = Accelerator(cpu=on_cpu, log_with=tracker, project_dir=config.output_dir)
    device = config.device
    if accelerator.num_processes > 1 and device in ("auto", "cuda"):
        config = replace(config, device=str(accelerator.device))
    policy, config = load_policy(config, notice)
    prepare(policy, config)
    shard(policy, accelerator)
    training = Training(config, policy, build_task(policy), accelerator)
    if (there := len(training.task.samples("test"))) < config.eval_samples:
        notice(f"eval_samples={config.eval_samples}: the test split has {there} samples; using all of them.")
    if found:
        training.resume(*found)
    if accelerator.is_main_process:
        save_yaml(replace(config, device=device), training.root / "effective_config.yaml")
    if tracker:
        flat = {k: v if isinstance(v, int | float | str) else str(v) for k, v in asdict(config).items()}
        accelerator.init_trackers("train", config=flat)
    status = training.run()
    accelerator.end_training()
    return status


USAGE = """usage: python train.py [--config FILE] [name=value ...]

Trains the policy on a task, unattended. In several processes: accelerate launch train.py [name=value ...]
"""


@program
def main() -> int:
    """The program. Exit status: 0; 1 if the disk kept not all of it; 2 for bad settings or data; 130 after Ctrl-C."""
    config = from_command_line(TrainConfig, USAGE)
    return train(config)


if __name__ == "__main__":
    raise SystemExit(run_program(main))
