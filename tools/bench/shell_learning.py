"""Does a small model learn to use a shell? PPO, GRPO and a control with random rewards, from one warm start.

    make smollm2 && python tools/bench/shell_learning.py           what is missing of all arms and seeds, then the table
    python tools/bench/shell_learning.py --arms ppo --seeds 0      one arm and seed; goes on where it was stopped
    python tools/bench/shell_learning.py --table                   the table of what is there, and what is missing
    python tools/bench/shell_learning.py --arms ppo --seeds 0 --folder runs/faster --set learning_rate=0.001

SmolLM2-135M-Instruct under `configs/os_smollm2.yaml`, entries of level 1. First the warm start is made, once, on the
training entries; every arm goes on from it. Episodes are played by a server in a process of its own. Base, warm start
and adapter then get the same held-out entries under the same seeds. A run is a folder under `runs/shell`:
ARM_SEED/train.log has its steps, cost.json seconds and memory, evaluation.json what they answered; bench.log has
everything that the programs say.

With --validation a third of the training entries takes the place of the held-out ones, for the warm start, too, and
the folder is `runs/shell_validation`: settings are never chosen on the held-out entries.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from evaluate import percent  # noqa: E402
from lora_ppo.checkpoint import sha256  # noqa: E402
from lora_ppo.settings import ConfigError, parse  # noqa: E402
from lora_ppo.terminal import program  # noqa: E402
from tasks.os_interaction import split  # noqa: E402
from tasks.os_interaction.entries import OWN, read_entries  # noqa: E402
from tools.bench import runs  # noqa: E402
from tools.bench.runs import cost_of, difference, minutes, say, state, steps_of  # noqa: E402
from tools.bench.shell import start  # noqa: E402
from train import TrainConfig  # noqa: E402

PRESET = ROOT / "configs/os_smollm2.yaml"
ARMS = {  # what the table calls it, its own settings
    "ppo": ("PPO, value head", []),
    "grpo": ("GRPO", ["algorithm=grpo", "group_size=8", "samples_per_epoch=28"]),
    "control": ("PPO, random rewards", ["control=random"]),
}
ALIKE = (
    "task model_name device load_in_4bit dtype temperature top_p max_new_tokens test_share entries entry_levels server "
    "max_rounds output_length command_seconds judge sandbox image opening record_dir"
).split()


# ---------------------------------------------------------------------------------------------------------- the runs


def entries(root: Path, validation: bool) -> Path:
    """The folder of entries. With `validation` it is made of the training entries of the preset alone."""
    if not validation:
        return OWN
    config = parse(TrainConfig, ["--config", str(PRESET)])
    names = {entry.name for entry in split(read_entries(OWN), config.test_share, config.entry_levels)["train"]}
    folder = root / "entries"
    folder.mkdir(parents=True, exist_ok=True)
    rows = json.loads((OWN / "entries.json").read_text(encoding="utf-8"))
    chosen = {name: row for name, row in rows.items() if name in names}
    (folder / "entries.json").write_text(json.dumps(chosen), encoding="utf-8")
    return folder


def common(place: Path) -> list[str]:
    """Settings of all programs."""
    return ["--config", str(PRESET), f"entries={place}"]


def warm_start(root: Path, place: Path, words: Sequence[str], log: Path) -> Path:
    """The checkpoint that all arms begin with; makes it if it is not there.

    Raises ConfigError where the program fails, and where the one that is there has other settings or entries.
    """
    digests = {file.name: sha256(file) for file in sorted(place.glob("*.json"))}
    runs.same_settings(root, {"warm_set": list(words), **digests})
    folder = root / "warm"
    if not folder.exists():
        say(log, "warm start: begins")
        program = [sys.executable, str(ROOT / "tools/warm_start.py"), *common(place)]
        runs.call([*program, f"warm_dir={folder}", *words], log=log)
        say(log, "warm start: finished")
    return folder


def run_all(arguments: argparse.Namespace, root: Path) -> list[str]:
    """Every run that is missing, one after the other; returns which failed."""
    log, place, failed = root / "bench.log", entries(root, arguments.validation), []
    config = parse(TrainConfig, [*common(place), *arguments.set])
    there = len(split(read_entries(place), config.test_share, config.entry_levels)["test"])
    warm = warm_start(root, place, arguments.warm_set, log)
    server, url = start(*common(place), "--", *arguments.set)
    try:
        for seed in arguments.seeds:
            for arm in arguments.arms:
                folder = root / f"{arm}_{seed}"
                words = [*common(place), *ARMS[arm][1], f"seed={seed}", f"output_dir={folder}", f"server={url}"]
                asked = ["seed=0", f"num_samples={min(arguments.samples, there)}"]
                try:
                    runs.run([*words, *arguments.set], ALIKE, asked, log, start=str(warm))
                except ConfigError as error:
                    say(log, f"{folder.name}: failed: {error}")
                    failed.append(folder.name)
    finally:
        server.terminate()
        server.wait()
    return failed


# --------------------------------------------------------------------------------------------------------- the table


def figures(folder: Path) -> dict[str, Any] | None:
    """What a finished run came to; None for one that is not. Pairs are the adapter's and the warm start's verdict."""
    if not (folder / "evaluation.json").exists():
        return None
    record = json.loads((folder / "evaluation.json").read_text())
    steps = steps_of(folder)
    answers = [list(row.values())[2:] for row in record["answers"]]  # question, base, warm start, adapter
    known = [[one["verdict"] for one in both] for both in answers]
    return {
        "models": record["models"],
        "right": [(here == "correct", there == "correct") for there, here in known if "unknown" not in (there, here)],
        "steps": len(steps),
        "episodes": sum(line.get("answers", 0) for line in steps),
        "seconds": sum(line["seconds"] for line in steps),
        "kl": fmean(line["kl"] for line in [line for line in steps if "kl" in line][-4:]),
        **cost_of(folder),
    }


HEADINGS = (
    "arm, seed",
    "correct: base, warm start, adapter",
    "adapter less warm start (95 %, paired)",
    "finished",
    "rounds",
    "invalid action",
    "tokens",
    "KL at the end (nats an episode)",
    "steps",
    "episodes",
    "minutes in steps",
    "minutes in all",
    "peak MB",
)


def row(name: str, found: dict[str, Any]) -> str:
    """A run's line of the table."""

    def ended(reason: str) -> str:
        shares = (model["reasons"].get(reason, {"share": 0.0})["share"] for model in found["models"])
        return ", ".join(percent(share) for share in shares)

    cells = [
        name,
        ", ".join(percent(model["accuracy"]) for model in found["models"]),
        difference(found["right"]),
        *(ended(reason) for reason in ("finished", "rounds", "invalid action")),
        ", ".join(f"{model['mean_tokens']:.0f}" for model in found["models"]),
        f"{found['kl']:.1f}",
        str(found["steps"]),
        str(found["episodes"]),
        f"{found['seconds'] / 60:.1f}",
        f"{found['wall_seconds'] / 60:.1f}",
        f"{found['peak_mb']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(root: Path, seeds: Sequence[int]) -> list[str]:
    """A row for each run that is there, what they say together, and what is missing."""
    rows = [f"| {' | '.join(HEADINGS)} |", "| --- " * len(HEADINGS) + "|"]
    made: dict[str, dict[int, dict[str, Any]]] = {}
    missing = []
    for arm, (name, _) in ARMS.items():
        made[arm] = {seed: found for seed in seeds if (found := figures(root / f"{arm}_{seed}"))}
        rows += [row(f"{name}, {seed}", found) for seed, found in made[arm].items()]
        missing += [f"missing: {arm}, seed {s}: {state(root / f'{arm}_{s}')}" for s in seeds if s not in made[arm]]
    rows += [""]
    for arm, found in made.items():
        if found:
            gain = difference([pair for one in found.values() for pair in one["right"]])
            rows.append(
                f"{ARMS[arm][0]}, {len(found)} seeds: {gain} to the warm start, {minutes(list(found.values()))}"
            )
    return [*rows, *missing]


# ----------------------------------------------------------------------------------------------------------- program


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what is run [all]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each [0 1 2]")
    parser.add_argument("--samples", type=int, default=200, help="held-out entries that are played, at most [200]")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of train.py")
    parser.add_argument("--warm-set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of warm_start.py")
    parser.add_argument("--folder", default="", help="where the runs are [runs/shell, or runs/shell_validation]")
    parser.add_argument("--validation", action="store_true", help="measure on training entries that no step sees")
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser.parse_args()


@program
def main() -> int:
    """The program. Exit status: 0; 1 if a run failed; 2 for what can't be used; 130 after Ctrl-C."""
    arguments = parse_arguments()
    folder = "runs/shell_validation" if arguments.validation else "runs/shell"
    root = Path(arguments.folder or ROOT / folder).resolve()
    failed = [] if arguments.table else run_all(arguments, root)
    print("\n".join(table(root, arguments.seeds)))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
