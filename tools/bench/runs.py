"""Runs of train.py that a benchmark makes, measures and goes on with: each a folder, ARM_SEED.

train.log has a run's steps, settings.json what it was begun with, cost.json seconds and memory, evaluation.json what
the models answered. What was stopped goes on from its last checkpoint, what is finished is left alone.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from evaluate import points  # noqa: E402
from lora_ppo.checkpoint import all_checkpoints  # noqa: E402
from lora_ppo.evaluation import paired, write_json  # noqa: E402
from lora_ppo.journal import LineFile, now  # noqa: E402
from lora_ppo.settings import ConfigError, parse  # noqa: E402
from train import TrainConfig  # noqa: E402


def run(
    words: Sequence[str],
    alike: Sequence[str],
    asked: Sequence[str],
    log: Path | None = None,
    trainer: Sequence[str] = (),
    start: str = "",
) -> None:
    """Trains under the settings `words` and evaluates, or does what is left of it.

    `alike` are names of settings that evaluation takes from training, `asked` more settings of evaluate.py.
    `trainer` is another program than train.py, which goes on by itself. `start` is a checkpoint to begin with, which
    is evaluated, too. Raises ConfigError where a program fails, and where the folder holds a run with other settings.
    """
    # 1. What is there.
    config = parse(TrainConfig, [*words, *([f"resume_from={start}"] if start else [])])
    folder = Path(config.output_dir)
    same_settings(folder, asdict(config) | {"asked": list(asked)})
    if (folder / "evaluation.json").exists():
        return
    if log:
        say(log, f"{folder.name}: begins, {state(folder)}")

    # 2. Training. The report is train.py's last; a run that stop_if ended has one, too.
    last = folder / f"epoch_{config.num_epochs}"
    if not (last if trainer else folder / "report.html").exists():
        command = trainer or [str(ROOT / "train.py")]
        going_on = [] if trainer else to_go_on(folder, start)
        call([sys.executable, *command, *words, *going_on], folder, log)

    # 3. Evaluation.
    adapters = [*([start] if start else []), str(last if last.exists() else newest(folder))]
    values = {name: getattr(config, name) for name in alike}
    tested = [f"{name}={','.join(v) if isinstance(v, list) else v}" for name, v in values.items()]
    tested += [*asked, f"output_file={folder / 'evaluation.json'}"]
    call([sys.executable, str(ROOT / "evaluate.py"), "--adapter", *adapters, *tested], log=log)
    if log:
        say(log, f"{folder.name}: finished")


def to_go_on(folder: Path, start: str = "") -> list[str]:
    """What train.py needs to be told to go on in `folder`: `start` where it was stopped before its first checkpoint."""
    if all_checkpoints(folder):
        return ["resume_from=latest"]
    return [f"resume_from={start}"] if start else []


def newest(folder: Path) -> Path:
    """The last checkpoint of a run, which may have ended before its last step. Raises ConfigError without any."""
    found = all_checkpoints(folder)
    if not found:
        raise ConfigError(f"{folder} has no checkpoint")
    return found[0][1]


def same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Notes in `folder` what was asked for. Raises ConfigError where it holds what was made with other settings."""
    file = folder / "settings.json"
    before = json.loads(file.read_text()) if file.exists() else settings
    for name in settings:
        if name not in ("output_dir", "server") and before.get(name, settings[name]) != settings[name]:
            was = f"{name}={before[name]}"
            raise ConfigError(f"{folder} was made with {was}, now it is {settings[name]}: name another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, settings)


def call(command: list[str], folder: Path | None = None, log: Path | None = None) -> None:
    """Runs a program of this project; notes in `folder` its seconds and the most memory that it took, in MB.

    What it says goes to the end of `log`. Ctrl-C reaches it, too: it is waited for, noted, and then KeyboardInterrupt
    raised. Raises ConfigError where it fails.
    """
    started = time.perf_counter()
    with log.open("ab") if log else contextlib.nullcontext() as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    interrupted, status = False, None
    while status is None:
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            interrupted = True
    process.returncode = os.waitstatus_to_exitcode(status)
    if folder and folder.is_dir():
        file = folder / "cost.json"
        cost = json.loads(file.read_text()) if file.exists() else {"wall_seconds": 0.0, "peak_mb": 0.0}
        peak = usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, kilobytes elsewhere
        cost = {
            "wall_seconds": cost["wall_seconds"] + time.perf_counter() - started,
            "peak_mb": max(cost["peak_mb"], peak),
        }
        write_json(file, cost)
    if interrupted:
        raise KeyboardInterrupt
    if process.returncode:
        raise ConfigError(f"{Path(command[1]).name} ended with status {process.returncode}; the same command goes on")


def say(log: Path, text: str) -> None:
    """A line with the time, for whoever watches, and in the log."""
    line = f"{now()[:19]} {text}"
    print(line, file=sys.stderr, flush=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def cost_of(folder: Path) -> dict[str, float]:
    """Seconds and memory that `call` noted; nan where it was killed before it could."""
    file = folder / "cost.json"
    return json.loads(file.read_text()) if file.exists() else {"wall_seconds": math.nan, "peak_mb": math.nan}


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """A run's log lines of steps."""
    return [line for line in LineFile(folder / "train.log").read()[0] if line["step"] > 0]


def state(folder: Path) -> str:
    """How far a run is that is not finished."""
    steps = steps_of(folder)
    if not steps:
        return "not begun"
    config = parse(TrainConfig, ["--config", str(folder / "effective_config.yaml")])
    last = config.num_epochs * config.samples_per_epoch // config.prompts_per_step
    seconds = fmean(line["seconds"] for line in steps)
    left = f"about {(last - steps[-1]['step']) * seconds / 60:.0f} minutes of steps left"
    return f"at step {steps[-1]['step']} of {last}, {seconds:.1f} seconds a step, {left}"


def difference(pairs: Sequence[tuple[bool, bool]]) -> str:
    """In points with its interval, of what is true of the first of each pair less what is true of the second."""
    share = paired(pairs)
    return points(share["accuracy_difference"], share["accuracy_difference_interval"]) if pairs else "-"


def minutes(found: Sequence[dict[str, Any]]) -> str:
    return f"{fmean(one['seconds'] for one in found) / 60:.1f} minutes a seed"
