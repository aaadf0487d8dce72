"""One of two processes: takes its share of given trajectories, and saves the gradient and the metrics of a step.

Then memory runs out in the second process alone, in one phase of a step after the other: what became of these is saved.
With sharded weights there is a checkpoint instead, as memory that runs out ends the run.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from lora_ppo import training
from lora_ppo.checkpoint import load_checkpoint, save_checkpoint
from lora_ppo.episodes import Trajectory, play
from lora_ppo.processes import everywhere, shard, sharded, total
from support.echo import EchoTask
from support.training import gradient, loaded, run_out_of_memory, same


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    llama, changes, given = torch.load(folder / "given.pt", weights_only=False)
    policy, config = loaded(llama, **changes)
    shard(policy, accelerator)
    trajectories = [Trajectory(**fields) for fields in given]
    rank, group = accelerator.process_index, config.group_size if config.algorithm == "grpo" else 1
    mine = [t for part in training.chunks(trajectories, group)[rank::2] for t in part]
    episodes = [EchoTask(turns=1 + rank).episode(1)]  # not the same number of passes on each
    torch.manual_seed(rank)
    played = everywhere(policy, accelerator, lambda: play(policy, episodes))
    found = gradient(policy, config, accelerator, mine)
    metrics = training.learn(policy, accelerator, config, mine)
    result = {"gradient": found, "metrics": metrics, "played": played[0].response, "tensors": policy.snapshot().tensors}
    if sharded(accelerator):
        result["base"] = sum(p.to_local().numel() for p in policy.model.parameters() if hasattr(p, "to_local"))
        if accelerator.is_main_process:
            save_checkpoint(folder / "step_1", policy, {}, "")
        total(accelerator, 0)
        load_checkpoint(folder / "step_1", policy)
        assert same(policy.tensors(), result["tensors"])
    else:
        result["skipped"] = [run_out(policy, accelerator, config, mine, phase) for phase in PHASES]
    torch.save(result, folder / f"rank_{rank}.pt")


PHASES = ("observe", "losses", "trust_region")


def run_out(policy, accelerator, config, trajectories, phase: str) -> tuple[str, str, bool]:
    """Outcome of a step in whose `phase` the second process has no memory left, why, and whether the weights stayed."""
    real, before = getattr(training, phase), policy.snapshot()
    if not accelerator.is_main_process:
        setattr(training, phase, run_out_of_memory)
    metrics = training.learn(policy, accelerator, config, trajectories)
    setattr(training, phase, real)
    return metrics["outcome"], metrics.get("why", ""), same(policy.tensors(), before.tensors)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
