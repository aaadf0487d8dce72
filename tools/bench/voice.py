"""Does a small model take on a voice, through LoRA of rank 1? PPO against a reward adapter on the same base.

    make smollm2 && python tools/bench/voice.py                    what is missing of all arms and seeds
    python tools/bench/voice.py --arms rank1 --seeds 0             one arm and seed
    python tools/bench/voice.py --table                            the tables of what is there, and what is missing
    python tools/bench/voice.py --check                            the adapters in plain PEFT and transformers
    python tools/bench/voice.py --validation --arms rank1 --seeds 0 --name faster --set learning_rate=0.01

SmolLM2-135M-Instruct under `configs/voice_smollm2.yaml`. First the reward adapter is trained, once, on the pairs of
data/voice; then each arm trains on the prompts of the same topics. Base and adapter answer the held-out topics under
the same seeds. A run is a folder under `runs/voice`: ARM_SEED/train.log has its steps and what was watched, cost.json
seconds and memory, evaluation.json what base and adapter answered. What was stopped goes on from its last checkpoint,
what is finished is left alone, and a run that fails does not keep the others from theirs. bench.log has everything
that the programs say.

With --validation the last training topics take the place of the held-out ones, for the reward model, too, and the
folder is `runs/voice_validation`: settings are never chosen on the held-out topics. Runs with other settings (--set)
need a name of their own. Memory is measured by voice_memory.py.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from evaluate import percent  # noqa: E402
from lora_ppo.checkpoint import sha256  # noqa: E402
from lora_ppo.journal import LineFile  # noqa: E402
from lora_ppo.settings import ConfigError, parse  # noqa: E402
from lora_ppo.terminal import program  # noqa: E402
from lora_ppo.watching import distinct  # noqa: E402
from tasks.voice import DATA, load_topics  # noqa: E402
from tasks.voice_rules import keeps  # noqa: E402
from tools.bench import runs  # noqa: E402
from tools.bench.runs import cost_of, difference, minutes, newest, say, state  # noqa: E402
from train import TrainConfig  # noqa: E402

PRESET = ROOT / "configs/voice_smollm2.yaml"
REWARD = ["model_name=smollm2", "own_replies=4", "better_prompts=prompts/voice/tutor.yaml"]
REWARD += ["more_pairs=mismatched", "num_epochs=1"]
ATTENTION, MLP = "q_proj,k_proj,v_proj,o_proj", "gate_proj,up_proj,down_proj"
ARMS = {  # what the table calls it, its own settings
    "rank1": ("rank 1 on o, v, up, down", []),
    "control": ("the same, random rewards", ["control=random"]),
    "rank4": ("rank 4 on o, v, up, down", ["lora_r=4"]),
    "rank16": ("rank 16 on o, v, up, down", ["lora_r=16"]),
    "attention": ("rank 1 on attention", [f"target_modules={ATTENTION}"]),
    "all": ("rank 1 on all linear layers", [f"target_modules={ATTENTION},{MLP}"]),
}
TESTED = (
    "task model_name device load_in_4bit dtype prompts temperature top_p max_new_tokens "
    "reward_model topics topic_order steps_per_topic score_clip test_share"
).split()
LAST_TOPICS = 5  # of those to train on, to measure on with --validation


# ---------------------------------------------------------------------------------------------------------- the runs


def data(root: Path, validation: bool) -> Path:
    """The folder of pairs and prompts. With `validation` it is made of the training pairs alone."""
    if not validation:
        return DATA
    folder = root / "data"
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    tests = list(dict.fromkeys(row["topic"] for row in rows))[-LAST_TOPICS:]
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = [json.dumps(row) + "\n" for row in rows if (row["topic"] in tests) == (split == "test")]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="ascii")
    return folder


def settings_of(arm: str, folder: Path, seed: int, topics: Path, extra: Sequence[str] = ()) -> list[str]:
    """The command line of train.py for a run in `folder`; the reward adapter lies beside it."""
    words = ["--config", str(PRESET), f"reward_model={folder.parent / 'reward'}", f"topics={topics}", *ARMS[arm][1]]
    return [*words, f"seed={seed}", f"output_dir={folder}", *extra]


def train_reward(root: Path, topics: Path, words: Sequence[str], log: Path) -> None:
    """The reward adapter, if it is not there.

    Raises ConfigError where the program fails, and where the adapter that is there has other settings or pairs.
    """
    digests = {f"{split} pairs": sha256(topics / f"{split}.jsonl") for split in ("train", "test")}
    runs.same_settings(root, {"reward_set": [*REWARD, *words], **digests})
    if (root / "reward" / "evaluation.json").exists():
        return
    say(log, "reward model: begins")
    trainer = [sys.executable, str(ROOT / "tools/train_reward_model.py")]
    pairs = [f"pairs={topics / 'train.jsonl'}", f"held_out={topics / 'test.jsonl'}"]
    runs.call([*trainer, *pairs, *REWARD, f"output_dir={root / 'reward'}", *words], log=log)
    say(log, "reward model: finished")


# --------------------------------------------------------------------------------------------------------- the tables


def figures(folder: Path) -> dict[str, Any] | None:
    """What a finished run came to; None for one that is not. Pairs are of the adapter's answer and the base's."""
    from lora_ppo.checkpoint import tensors_in

    if not (folder / "evaluation.json").exists():
        return None
    record = json.loads((folder / "evaluation.json").read_text())
    lines, _ = LineFile(folder / "train.log").read()
    steps, config = [line for line in lines if line["step"] > 0], record["settings"]
    samples = load_topics(config["topics"], config["test_share"])["test"]
    facts = {sample.prompt: sample.fact for sample in samples if sample.fact}
    answers = [(row["question"], *list(row.values())[:0:-1]) for row in record["answers"]]  # question, adapter, base
    file = newest(folder) / "adapter_model.safetensors"
    trained = parse(TrainConfig, ["--config", str(folder / "effective_config.yaml")])
    return {
        "base": record["models"][0],
        "adapter": record["models"][1],
        "right": [tuple(said["verdict"] == "correct" for said in both) for _, *both in answers],
        "kept": [tuple(keeps(said["answer"], facts[q]) for said in both) for q, *both in answers if q in facts],
        "distinct": [distinct([both[i]["answer"] for _, *both in answers], 2) for i in (0, 1)],
        "kl": [line["eval_kl"] for line in lines if "eval_kl" in line][-1],
        "kl_target": trained.kl_target,
        "kl_coef": [line["kl_coef"] for line in steps if "kl_coef" in line][-1],
        "steps": len(steps),
        "seconds": sum(line["seconds"] for line in steps),
        "parameters": sum(tensor.numel() for tensor in tensors_in(file.parent, "adapter_model").values()),
        "bytes": file.stat().st_size,
        **cost_of(folder),
    }


HEADINGS = (
    "arm, seed",
    "in the voice: base, adapter",
    "difference (95 %, paired)",
    "score: base, adapter",
    "KL (nats an answer)",
    "kl_coef at the end",
    "distinct-2: base, adapter",
    "facts kept: base, adapter",
    "difference (95 %, paired)",
    "tokens: base, adapter",
    "cut off: base, adapter",
    "steps",
    "seconds in steps",
    "minutes in all",
    "parameters",
    "bytes",
    "peak MB",
)


def row(name: str, found: dict[str, Any]) -> str:
    """A run's line of the table."""

    def both(key: str, form: str) -> str:
        return ", ".join(f"{found[model][key]:{form}}" for model in ("base", "adapter"))

    cells = [
        name,
        ", ".join(percent(found[model]["accuracy"]) for model in ("base", "adapter")),
        difference(found["right"]),
        both("mean_reward", "+.2f"),
        f"{found['kl']:.1f}",
        f"{found['kl_coef']:.3f}",
        f"{found['distinct'][1]:.3f}, {found['distinct'][0]:.3f}",
        ", ".join(f"{fmean(pair[i] for pair in found['kept']):.1%}" for i in (1, 0)) if found["kept"] else "-",
        difference(found["kept"]),
        both("mean_tokens", ".0f"),
        both("cut_off_share", ".0%"),
        str(found["steps"]),
        f"{found['seconds']:.0f}",
        f"{found['wall_seconds'] / 60:.0f}",
        f"{found['parameters']:,}",
        f"{found['bytes']:,}",
        f"{found['peak_mb']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def demands(found: dict[str, Any]) -> str:
    """What rank 1 has to show on each seed, and whether it does."""
    gain, facts = (fmean(a - b for a, b in found[key]) for key in ("right", "kept"))
    ratio, minutes = found["distinct"][0] / max(found["distinct"][1], 1e-9), found["wall_seconds"] / 60
    told = {
        f"{100 * gain:+.1f} points in the voice, at least +40": gain >= 0.4,
        f"{minutes:.0f} minutes, at most 30": minutes <= 30,
        f"KL {found['kl']:.1f}, within a quarter of {found['kl_target']:g}": 0.75
        <= found["kl"] / found["kl_target"]
        <= 1.25,
        f"distinct-2 {100 * (ratio - 1):+.1f} %, within 10 %": abs(ratio - 1) <= 0.1,
        f"facts {100 * facts:+.1f} points, at least -3": facts >= -0.03,
    }
    return "; ".join(f"{text}: {'yes' if true else 'NO'}" for text, true in told.items())


def table(root: Path, arms: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The reward model's figures, a row for each run that is there, what they say together, and what is missing."""
    rows, missing = [], []
    if (root / "reward" / "evaluation.json").exists():
        reward = json.loads((root / "reward" / "evaluation.json").read_text())
        told = percent(reward["accuracy"], reward["interval"])
        topics = ", ".join(f"{topic} {percent(one['accuracy'])}" for topic, one in reward["by_topic"].items())
        rows += [f"Reward model: {told} of {reward['pairs']} held-out pairs ({topics})", ""]
    else:
        missing.append("reward model: not finished")
    rows += [f"| {' | '.join(HEADINGS)} |", "| --- " * len(HEADINGS) + "|"]
    made: dict[str, dict[int, dict[str, Any]]] = {}
    for arm in arms:
        made[arm] = {seed: found for seed in seeds if (found := figures(root / f"{arm}_{seed}"))}
        rows += [row(f"{title(arm)}, {seed}", found) for seed, found in made[arm].items()]
        missing += [f"{arm}, seed {s}: {state(root / f'{arm}_{s}')}" for s in seeds if s not in made[arm]]
    rows += [""]
    for arm, found in made.items():
        if found:
            rows.append(together(arm, list(found.values())))
    for arm in arms[1:]:
        if both := [seed for seed in made[arms[0]] if seed in made[arm]]:
            ours, theirs = ([pair[0] for seed in both for pair in made[a][seed]["right"]] for a in (arms[0], arm))
            rows.append(f"{title(arms[0])} less {title(arm)}: {difference(list(zip(ours, theirs, strict=True)))}")
    rows += [f"demands on rank 1, seed {seed}: {demands(found)}" for seed, found in made.get("rank1", {}).items()]
    return [*rows, "", *(f"missing: {text}" for text in missing)]


def title(arm: str) -> str:
    return ARMS[arm][0] if arm in ARMS else arm


def together(arm: str, found: Sequence[dict[str, Any]]) -> str:
    """What the seeds of an arm come to."""
    right, kept = ([pair for one in found for pair in one[key]] for key in ("right", "kept"))
    score, kl = (fmean(values) for values in zip(*((o["adapter"]["mean_reward"], o["kl"]) for o in found), strict=True))
    return (
        f"{title(arm)}, {len(found)} seeds: {difference(right)} in the voice, facts {difference(kept)}, "
        f"score {score:+.2f}, KL {kl:.1f}, {minutes(found)} in steps"
    )


# ---------------------------------------------------------------------------------------------------------- the check


def check(root: Path, seed: int, extra: Sequence[str] = ()) -> list[str]:
    """Whether the adapters do in plain PEFT and transformers what they do here; `extra` as for training."""
    import peft
    import torch
    import transformers

    from lora_ppo.adapters import attached
    from lora_ppo.chat import encode_chat
    from lora_ppo.generate import Request, replies
    from lora_ppo.loading import load_policy, source
    from lora_ppo.rewards import RewardModel, load_reward_model

    os.chdir(ROOT)  # the preset's paths are seen from there
    words = settings_of("rank1", root / f"rank1_{seed}", seed, DATA, [*extra, "dtype=float32", "device=cpu"])
    policy, config = load_policy(parse(TrainConfig, words))
    folder = newest(Path(config.output_dir))
    prompts = [sample.prompt for sample in load_topics("", 0.2)["test"]][:12]
    chats = [encode_chat(policy.tokenizer, policy.prompts.tutor.messages(prompt)) for prompt in prompts]
    with attached(policy, folder, "checked"):
        ours = replies(policy, [Request(ids, 1e-4) for ids in chats])  # as good as greedy
    with source(config) as name:
        plain = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        plain = peft.PeftModel.from_pretrained(plain, folder).eval()
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype=torch.float32
        )
        classifier = peft.PeftModel.from_pretrained(classifier, root / "reward").eval()
    theirs = []
    for ids in chats:
        made = plain.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=config.max_new_tokens)
        theirs.append(made[0, len(ids) :].tolist())
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    asked = [
        ([{"role": "user", "content": prompt}], policy.tokenizer.decode(ids, skip_special_tokens=True))
        for prompt, ids in zip(prompts, ours, strict=True)
    ]
    shared = load_reward_model(policy, str(root / "reward")).score(asked)
    alone = RewardModel(classifier, policy.tokenizer).score(asked)
    furthest = max(abs(a - b) for a, b in zip(shared, alone, strict=True))
    return [
        f"{same} of {len(prompts)} greedy replies of {folder.name} are the same in plain PEFT",
        f"scores on the shared base and in plain transformers differ by at most {furthest:.2g}",
    ]


# ----------------------------------------------------------------------------------------------------------- program


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="what is run [all]")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each [0 1 2]")
    parser.add_argument("--samples", type=int, default=60, help="held-out prompts that base and adapter answer [60]")
    parser.add_argument("--name", default="", help="what the runs of one arm are called, for other settings [the arm]")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of train.py")
    parser.add_argument("--reward-set", nargs="*", default=[], metavar="NAME=VALUE", help="of train_reward_model.py")
    parser.add_argument("--folder", default="", help="where the runs are [runs/voice, runs/voice_validation]")
    parser.add_argument("--validation", action="store_true", help="measure on training topics that no step sees")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--check", action="store_true", help="the adapters of rank 1, first seed, in plain libraries")
    arguments = parser.parse_args()
    if arguments.name and len(arguments.arms) != 1:
        parser.error("--name is of one arm: name it with --arms")
    return arguments


def run_all(arguments: argparse.Namespace, root: Path) -> list[str]:
    """Every run that is missing, one after the other; returns which failed."""
    log, topics, failed = root / "bench.log", data(root, arguments.validation), []
    train_reward(root, topics, arguments.reward_set, log)
    for seed in arguments.seeds:
        for arm in arguments.arms:
            name = f"{arguments.name or arm}_{seed}"
            try:
                words = settings_of(arm, root / name, seed, topics, arguments.set)
                runs.run(words, TESTED, ["seed=0", f"num_samples={arguments.samples}"], log)
            except ConfigError as error:
                say(log, f"{name}: failed: {error}")
                failed.append(name)
    return failed


@program
def main() -> int:
    """The program. Exit status: 0; 1 if a run failed; 2 for what can't be used; 130 after Ctrl-C."""
    arguments = parse_arguments()
    folder = "runs/voice_validation" if arguments.validation else "runs/voice"
    root = Path(arguments.folder or ROOT / folder).resolve()
    if arguments.check:
        print("\n".join(check(root, arguments.seeds[0], arguments.set)))
        return 0
    failed = [] if arguments.table else run_all(arguments, root)
    others = {path.parent.name.rpartition("_")[0] for path in root.glob("*_*/train.log")} - set(ARMS)
    arms = [] if arguments.name else arguments.arms
    print("\n".join(table(root, [*arms, *sorted(others)], arguments.seeds)))
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
