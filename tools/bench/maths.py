"""Does RL raise a small model's arithmetic? GRPO, PPO, a control with random rewards, and TRL's GRPOTrainer.

    make smollm2 && python tools/bench/maths.py                    every arm and seed that is missing, then the table
    python tools/bench/maths.py --arms grpo --seeds 0              one arm and seed; goes on where it was stopped
    python tools/bench/maths.py --table                            the table of what is there
    python tools/bench/maths.py --validation --arms grpo --seeds 0 --set learning_rate=1e-4      to choose settings by

SmolLM2-135M-Instruct, levels 1 to 3 of `tasks/arithmetic.py`, few-shot prompts, samples at temperature 1. All arms
start from the same adapters, see the same problems in the same order, and get the same reward for as many answers;
`evaluate.py` then asks base and adapter the same held-out problems under the same seeds. A run is a folder under
`runs/maths`: ARM_SEED/train.log has its steps, cost.json seconds and memory, evaluation.json what base and adapter
answered. Seconds are those of training steps, without evaluations; memory is the process' largest.

With --validation the problems to measure on are training problems that no step sees, and the folder is
`runs/maths_validation`: settings are never chosen on the test split.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from evaluate import percent, points  # noqa: E402
from lora_ppo.settings import parse  # noqa: E402
from lora_ppo.terminal import program  # noqa: E402
from tasks.arithmetic import held_out, sums  # noqa: E402
from tools.bench import runs  # noqa: E402
from tools.bench.runs import cost_of, difference, minutes  # noqa: E402
from train import TrainConfig  # noqa: E402

GRPO = ["samples_per_epoch=224", "normalize_groups=true"]
ARMS = {  # what the table calls it, its preset, its own settings
    "grpo": ("GRPO", "grpo_maths", GRPO),
    "ppo": ("PPO, value head", "ppo_maths", ["samples_per_epoch=1792"]),
    "control": ("GRPO, random rewards", "grpo_maths", [*GRPO, "control=random"]),
    "trl": ("TRL's GRPOTrainer", "grpo_maths", GRPO),
}
COMMON = [  # 28 steps of 64 answers
    *("model_name=smollm2", "device=cpu", "learning_rate=0.0002", "eval_samples=240", "eval_every=7"),
    "target_modules=q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
]
TESTED = (
    "task problems test_share model_name device load_in_4bit dtype prompts temperature top_p max_new_tokens"
).split()
PASSES = 4  # that make one step of TRL's: in one, the activations of 64 answers take more than 16 GB
EVALUATION = ["levels=1,2,3", "seed=0"]  # the same for every run, whatever it was trained on


def settings_of(arm: str, seed: int, folder: Path, extra: Sequence[str]) -> list[str]:
    """The command line of train.py for a run."""
    _, preset, own = ARMS[arm]
    words = ["--config", str(ROOT / f"configs/{preset}.yaml"), *COMMON, *own]
    return [*words, f"seed={seed}", f"output_dir={folder}", *extra]


def validation_problems(root: Path) -> tuple[str, int]:
    """Writes the training split, part of it held out by other numbers, as a folder of problems.

    Returns the folder's name, and how many problems are held out.
    """
    config = parse(TrainConfig, settings_of("grpo", 0, root, []))
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    seen: set[str] = set()
    for one in sums("train", 0, config.levels, config.test_share):
        unseen = held_out((-1, *one.numbers), 0.3)  # -1 is in no problem: another draw than that of the test split
        if not (unseen and one.question in seen):
            row = {"question": one.question, "answer": str(one.value), "level": one.level}
            rows["test" if unseen else "train"].append(row)
        seen.add(one.question)
    levels = [[row for row in rows["test"] if row["level"] == level] for level in dict.fromkeys(config.levels)]
    rows["test"] = [row for same in zip(*levels, strict=False) for row in same]  # as many of each
    folder = root / "problems"
    folder.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="ascii")
    return str(folder), len(rows["test"])


# ---------------------------------------------------------------------------------------------------------- the runs


def run_one(arm: str, seed: int, root: Path, extra: Sequence[str], samples: int) -> None:
    """Trains and evaluates a run, or what is left of it. Raises ConfigError."""
    words = settings_of(arm, seed, root / f"{arm}_{seed}", extra)

    trainer = [str(Path(__file__).resolve()), "--trl-run"] if arm == "trl" else []
    runs.run(words, TESTED, [*EVALUATION, f"num_samples={samples}"], trainer=trainer)


def train_with_trl(words: Sequence[str]) -> None:
    """GRPOTrainer under the settings of train.py: the same prompts in the same order, reward, LoRA and schedule.

    Its log lines have the same names as ours. Raises ConfigError.
    """
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from lora_ppo.journal import LineFile
    from lora_ppo.loading import find_prompts, load_base, silence_libraries
    from lora_ppo.trainer import shuffled
    from tasks import maths, verify

    config = parse(TrainConfig, [word for word in words if not word.startswith("resume_from=")])
    silence_libraries()
    model, tokenizer = load_base(config)
    problems = maths.load_problems(config.problems, config.seed, config.levels, config.test_share)["train"]
    steps = config.num_epochs * config.samples_per_epoch // config.prompts_per_step
    laps = [shuffled(config.seed, lap, len(problems)) for lap in range(config.num_epochs + 1)]
    chosen = [problems[i] for lap in laps for i in lap][: steps * config.prompts_per_step]
    role, folder = find_prompts(config).maths, Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    log = LineFile(folder / "train.log")

    class Log(TrainerCallback):
        """A line a step."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = time.perf_counter() - self.started

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "reward" in logs:
                line = {"step": state.global_step, "accuracy": logs["reward"], "entropy": logs.get("entropy")}
                line |= {
                    "length": logs.get("completions/mean_length"),
                    "cut_off": logs.get("completions/clipped_ratio"),
                }
                flat = logs.get("frac_reward_zero_std", 0.0) * config.prompts_per_step
                log.append(line | {"equal_groups": round(flat), "seconds": round(self.seconds, 3)})

    arguments = GRPOConfig(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=config.batch_size // PASSES,
        gradient_accumulation_steps=PASSES,
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens,
        max_steps=steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_schedule,
        max_grad_norm=config.max_grad_norm,
        loss_type="dapo",  # a mean over a step's tokens, in however many passes
        beta=config.kl_coef,
        epsilon=config.cliprange,
        scale_rewards="group" if config.normalize_groups else "none",
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=0,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=config.device == "cpu",
        seed=config.seed,
        save_steps=config.save_every,
        save_total_limit=1,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    tokenizer.padding_side, model.generation_config.use_cache = "left", True
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=list(config.target_modules),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)  # as policy.py: the same adapters to start from
    trainer = GRPOTrainer(
        model=get_peft_model(model, lora),
        processing_class=tokenizer,
        reward_funcs=lambda completions, gold, **_: [
            float(verify.check(said[0]["content"], right).lenient)
            for said, right in zip(completions, gold, strict=True)
        ],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": role.messages(one.question), "gold": one.gold} for one in chosen]),
        callbacks=[Log()],
    )
    whole = [path.parent for path in (folder / "trainer").glob("checkpoint-*/trainer_state.json")]  # written last
    saved = sorted(whole, key=lambda path: int(path.name.partition("-")[2]))
    done = int(saved[-1].name.partition("-")[2]) if saved else 0
    kept = [line for line in log.read()[0] if line["step"] <= done]
    log.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="ascii")
    trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
    trainer.save_model(str(folder / "trainer/trained"))
    (folder / "trainer/trained").rename(folder / f"epoch_{config.num_epochs}")  # whole, or not there


# --------------------------------------------------------------------------------------------------------- the table


def figures(folder: Path) -> dict[str, Any] | None:
    """What a finished run came to; None for one that is not."""
    if not (folder / "evaluation.json").exists():
        return None
    record = json.loads((folder / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (folder / "train.log").read_text().splitlines()]
    steps = [line for line in lines if line["step"] > 0]
    curve = {line["step"]: line["eval_accuracy"] for line in lines if "eval_accuracy" in line}
    late = [share for step, share in curve.items() if step > len(steps) * 2 / 3]
    flat = [line["equal_groups"] for line in steps if "equal_groups" in line]
    base, adapter = record["models"]
    answers = [list(row.values())[1:] for row in record["answers"]]
    return {
        "base": base,
        "adapter": adapter,
        "right": [(there["verdict"] == "correct", here["verdict"] == "correct") for here, there in answers],
        "answers": len(steps) * json.loads((folder / "settings.json").read_text())["batch_size"],
        "seconds": sum(line["seconds"] for line in steps),
        "flat": fmean(flat) if flat else None,
        "worst_late": max(curve.values()) - min(late) if late else None,
        **cost_of(folder),
    }


HEADINGS = (
    "arm, seed",
    "lenient: base, adapter",
    "difference (95 %, paired)",
    "strict: base, adapter",
    "cut off: base, adapter",
    "answers",
    "seconds",
    "peak MB",
    "groups without contrast",
    "last third below the best",
)


def table(root: Path, seeds: Sequence[int]) -> list[str]:
    """The table in Markdown, and what it says of the arms, from what is there."""
    made = {arm: {seed: found for seed in seeds if (found := figures(root / f"{arm}_{seed}"))} for arm in ARMS}
    rows = [
        f"| {' | '.join(HEADINGS)} |",
        "| --- " * len(HEADINGS) + "|",
    ]
    for arm, (name, *_) in ARMS.items():
        for seed, found in made[arm].items():
            base, adapter, versus = found["base"], found["adapter"], found["adapter"]["versus_base"]
            cells = [
                f"{name}, {seed}",
                f"{percent(base['accuracy'])}, {percent(adapter['accuracy'])}",
                points(versus["accuracy_difference"], versus["accuracy_difference_interval"]),
                f"{percent(base['strict_accuracy'])}, {percent(adapter['strict_accuracy'])}",
                f"{percent(base['cut_off_share'])}, {percent(adapter['cut_off_share'])}",
                str(found["answers"]),
                f"{found['seconds']:.0f}",
                f"{found['peak_mb']:.0f}",
                "-" if found["flat"] is None else f"{found['flat']:.1f} of 8",
                "-" if found["worst_late"] is None else f"{100 * found['worst_late']:.1f} points",
            ]
            rows.append(f"| {' | '.join(cells)} |")
    told = [""]
    for arm, (name, *_) in ARMS.items():
        if found := list(made[arm].values()):
            gain = difference([pair for one in found for pair in one["right"]])
            told.append(f"{name}, {len(found)} seeds: {gain} to the base, {minutes(found)}")
    for arm in ("trl", "ppo", "control"):
        both = [seed for seed in made["grpo"] if seed in made[arm]]
        if both:
            ours, theirs = ([made[which][seed] for seed in both] for which in ("grpo", arm))
            rights = [zip(a["right"], b["right"], strict=True) for a, b in zip(ours, theirs, strict=True)]
            less = difference([(a[0], b[0]) for pairs in rights for a, b in pairs])
            ratio = sum(one["seconds"] for one in theirs) / sum(one["seconds"] for one in ours)
            told.append(f"{ARMS['grpo'][0]} less {ARMS[arm][0]}: {less}; seconds {ratio:.2f} times ours")
    return rows + told


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what is run [all]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each [0 1 2]")
    parser.add_argument("--samples", type=int, default=240, help="held-out problems that base and adapter answer [240]")
    parser.add_argument("--validation", action="store_true", help="measure on training problems that no step sees")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of train.py")
    parser.add_argument("--folder", default="", help="where the runs are [runs/maths, or runs/maths_validation]")
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser.parse_args()


@program
def main() -> int:
    """The program. Exit status: 0, or 2 for what can't be used or a run that failed."""
    if sys.argv[1:2] == ["--trl-run"]:
        train_with_trl(sys.argv[2:])
        return 0
    arguments = parse_arguments()
    usual = ROOT / "runs" / ("maths_validation" if arguments.validation else "maths")
    root = Path(arguments.folder or usual).absolute()  # programs are started elsewhere
    if not arguments.table:
        extra, samples = [], arguments.samples
        if arguments.validation:
            problems, there = validation_problems(root)
            extra, samples = [f"problems={problems}"], min(samples, there)
        for seed in arguments.seeds:
            for arm in arguments.arms:
                run_one(arm, seed, root, [*extra, *arguments.set], samples)
    print("\n".join(table(root, arguments.seeds)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
