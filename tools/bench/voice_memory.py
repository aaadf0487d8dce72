"""The memory of a PPO step towards a voice: PPO alone, with a reward adapter on its base, with a second model; TRL's.

    python tools/bench/voice.py --arms rank1 --seeds 0             first: the reward adapter that it trains
    python tools/bench/voice_memory.py --trl DIR
    python tools/bench/voice_memory.py --kinds alone shared        without TRL

    pip install --no-deps --target DIR trl==0.11.4 tyro docstring-parser typeguard        for --trl

SmolLM2-135M-Instruct under `configs/voice_smollm2.yaml`, one step on each of two topics, each row in processes of its
own: the median of their peaks, with the lowest and the highest. TRL's PPOTrainer takes the same steps on the same
prompts; its reward model is the same adapter, merged into a base of its own, as it knows none on the policy's.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lora_ppo.settings import ConfigError, parse  # noqa: E402
from lora_ppo.terminal import program  # noqa: E402
from tasks.voice import DATA  # noqa: E402
from tools.bench import runs  # noqa: E402
from tools.bench.voice import settings_of  # noqa: E402
from train import TrainConfig  # noqa: E402

KINDS = {
    "alone": "PPO alone: every score is 0",
    "shared": "a reward adapter on the policy's base",
    "second": "a second model",
    "trl": "TRL 0.11.4 PPOTrainer, a second model",
}


def measure(root: Path, kinds: Sequence[str], repeats: int, trl: str, extra: Sequence[str]) -> list[str]:
    """The table in Markdown. What was measured stands in memory.json and isn't again. Raises ConfigError."""
    file = root / "memory.json"
    runs.same_settings(root / "memory", {"set": list(extra)})
    peaks: dict[str, list[float]] = json.loads(file.read_text()) if file.exists() else {}
    for kind in kinds:
        while len(peaks.setdefault(kind, [])) < repeats:
            folder = root / f"memory_{kind}" / str(len(peaks[kind]))
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "cost.json").unlink(missing_ok=True)
            program = [sys.executable, str(Path(__file__).resolve()), "--child", kind, str(folder), trl, *extra]
            runs.call(program, folder, root / "bench.log")
            peaks[kind].append(json.loads((folder / "cost.json").read_text())["peak_mb"])
            file.write_text(json.dumps(peaks))
    adapter = sum(path.stat().st_size for path in (root / "reward").glob("adapter_model.safetensors")) / 1e6
    rows = [f"The reward adapter and its head: {adapter:.1f} MB on disk", "", "| reward | peak MB | to PPO alone |"]
    rows += ["| --- | --- | --- |"]
    for kind in (kind for kind in KINDS if peaks.get(kind)):
        middle, span = median(peaks[kind]), f"{min(peaks[kind]):.0f} to {max(peaks[kind]):.0f}"
        more = f"{middle - median(peaks['alone']):+.0f}" if peaks.get("alone") else "-"
        rows.append(f"| {KINDS[kind]} | {middle:.0f} ({span}) | {more} |")
    return rows


def child(kind: str, folder: Path, trl: str, extra: Sequence[str]) -> int:
    """Two steps of rank 1 with one kind of reward, in this process."""
    root = folder.parents[1]
    words = settings_of("rank1", root / "rank1_0", 0, DATA, [f"output_dir={folder / 'run'}", *extra])
    words += ["topic_order=sequence", "steps_per_topic=1", "eval_samples=8", "eval_every=100", "save_every=100"]
    words += [f"samples_per_epoch={2 * parse(TrainConfig, words).batch_size}"]
    if kind in ("second", "trl"):
        words.append(f"reward_model={merged(root, words)}")
    return trl_steps(parse(TrainConfig, words), trl) if kind == "trl" else our_steps(parse(TrainConfig, words), kind)


def our_steps(config: TrainConfig, kind: str) -> int:
    """Two steps of train.py."""
    import shutil

    import train
    from lora_ppo.rewards import RewardModel
    from tasks import voice

    class Nothing(RewardModel):
        def score(self, chats: Sequence[Any]) -> list[float]:
            return [0.0] * len(chats)

    if kind == "alone":
        voice.load_reward_model = lambda policy, name: Nothing(None, policy.tokenizer)
    shutil.rmtree(config.output_dir, ignore_errors=True)
    return train.train(config)


def trl_steps(config: TrainConfig, trl: str) -> int:
    """Two steps of TRL's PPOTrainer on the same prompts. Raises ConfigError without its folder."""
    import torch

    from lora_ppo.chat import encode_chat
    from lora_ppo.loading import load_policy
    from lora_ppo.rewards import load_classifier
    from tasks.voice import prepare
    from tools.bench.learning import Trl, find_trl, trl_settings

    find_trl(trl)
    prepare(config)  # checks settings
    policy, config = load_policy(config)
    reward = load_classifier(config.reward_model, policy.device)
    sizes = {"batch_size": config.batch_size, "mini_batch_size": config.mini_batch_size}
    trainer = Trl(policy, config.seed, trl_settings(config) | sizes)
    samples = course_of(config)
    for some in (samples[: config.batch_size], samples[config.batch_size :]):
        asked = [policy.prompts.tutor.messages(sample.prompt) for sample in some]
        prompts = [torch.tensor(encode_chat(policy.tokenizer, messages)) for messages in asked]
        said = trainer.sample(prompts, batch_size=config.batch_size)
        texts = [policy.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]
        chats = [([{"role": "user", "content": sample.prompt}], text) for sample, text in zip(some, texts, strict=True)]
        trainer.trainer.step(prompts, said, [torch.tensor(score) for score in reward.score(chats)])
    return 0


def course_of(config: TrainConfig) -> list[Any]:
    """The prompts of the two steps."""
    from tasks.voice import course, load_topics

    samples = load_topics(config.topics, config.test_share)["train"]
    return course(samples, config.batch_size, config.seed)[: config.samples_per_epoch]


def merged(root: Path, words: Sequence[str]) -> Path:
    """The reward adapter merged into a base, as a classifier of its own; made in a process of its own."""
    folder = root / "reward_merged"
    if not folder.exists():
        program = [sys.executable, str(Path(__file__).resolve()), "--merge", str(root), *words]
        runs.call(program, log=root / "bench.log")
    return folder


def merge(root: Path, words: Sequence[str]) -> int:
    import peft

    from lora_ppo.loading import load_base

    config = parse(TrainConfig, words)
    config.device = "cpu"
    model, tokenizer = load_base(config, classifier=True)
    model = peft.PeftModel.from_pretrained(model, root / "reward").merge_and_unload()
    model.save_pretrained(root / "reward_merged")
    tokenizer.save_pretrained(root / "reward_merged")
    return 0


@program
def main() -> int:
    """The program. Exit status: 0, or 2 for what can't be used or a run that failed."""
    if sys.argv[1:2] == ["--child"]:
        return child(sys.argv[2], Path(sys.argv[3]), sys.argv[4], sys.argv[5:])
    if sys.argv[1:2] == ["--merge"]:
        return merge(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="rows of the table [all]")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each [3]")
    parser.add_argument("--trl", default="", metavar="DIR", help="where trl 0.11.4 is")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of train.py")
    parser.add_argument("--folder", default="", help="where the reward adapter is [runs/voice]")
    arguments = parser.parse_args()
    root = Path(arguments.folder or ROOT / "runs/voice").resolve()
    kinds = [kind for kind in arguments.kinds if kind != "trl" or arguments.trl]
    if not (root / "reward" / "evaluation.json").exists():
        raise ConfigError(f"{root / 'reward'} holds no reward adapter: train it with tools/bench/voice.py")
    print("\n".join(measure(root, kinds, arguments.repeats, arguments.trl, arguments.set)))
    if len(kinds) < len(arguments.kinds):
        print("missing: TRL; no --trl DIR was given")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
