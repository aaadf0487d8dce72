"""One of two processes: takes its share of given trajectories, and saves the gradient and the metrics of a step."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from echo import EchoTask
from test_train import gradient, loaded

import update
from tasks.episodes import Trajectory, play


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    llama, changes, given = torch.load(folder / "given.pt", weights_only=False)
    policy, config = loaded(llama, **changes)
    trajectories = [Trajectory(**fields) for fields in given]
    rank, group = accelerator.process_index, config.group_size if config.algorithm == "grpo" else 1
    mine = [t for part in update.chunks(trajectories, group)[rank::2] for t in part]
    play(policy, [EchoTask(turns=1 + rank).episode(1)])  # not the same number of passes on each
    found = gradient(policy, config, accelerator, mine)
    metrics = update.learn(policy, accelerator, config, mine)
    torch.save((found, metrics), folder / f"rank_{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
