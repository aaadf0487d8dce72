"""Several processes, each with its own share of a batch: sums over them, and a base model sharded over them (FSDP).

Every process holds the adapters. The frozen base model is whole on every process, or its layers are sharded.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from lora_ppo.policy import Policy
from lora_ppo.settings import ConfigError
from lora_ppo.step import OUT_OF_MEMORY, StepSkipped, out_of_memory

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

Result = TypeVar("Result")


def total(accelerator: "Accelerator", *numbers: float) -> list[float]:
    """Each number, summed over the processes."""
    if accelerator.num_processes == 1:
        return list(numbers)
    import torch

    return accelerator.reduce(torch.tensor(numbers, dtype=torch.float64, device=accelerator.device), "sum").tolist()


def everywhere(policy: Policy, accelerator: "Accelerator", work: Callable[[], Result]) -> Result:
    """What `work` returns: each process does its own, in as many forward passes as it needs.

    Memory that runs out on one process raises StepSkipped on all. With sharded weights it ends the run: the others are
    waiting for a layer by then.
    """
    result, failed = None, False
    try:
        with in_step(policy, accelerator):
            result = work()
    except Exception as error:
        if not out_of_memory(error) or sharded(accelerator):
            raise
        failed = True
    if total(accelerator, failed)[0]:
        raise StepSkipped(f"{OUT_OF_MEMORY}, or a smaller batch_size and mini_batch_size")
    return result


def whiten_jointly(accelerator: "Accelerator", x: "Tensor", mask: "Tensor") -> "Tensor":
    """ppo.whiten over the tokens of all processes; returns this process's share."""
    import torch

    from lora_ppo import ppo

    if accelerator.num_processes == 1:
        return ppo.whiten(x, mask)
    mine = x[mask]
    counts = accelerator.gather(torch.tensor([len(mine)], device=x.device))
    joint = torch.zeros(len(counts), int(counts.max()), device=x.device)
    joint[accelerator.process_index, : len(mine)] = mine
    joint = accelerator.reduce(joint, "sum")
    white = ppo.whiten(joint, torch.arange(joint.shape[1], device=x.device) < counts.unsqueeze(1))
    return torch.zeros_like(x).masked_scatter(mask, white[accelerator.process_index, : len(mine)])


def align(policy: Policy, accelerator: "Accelerator") -> None:
    """Every process starts from the main one's weights."""
    if accelerator.num_processes > 1:
        import torch.distributed

        for tensor in policy.tensors().values():
            torch.distributed.broadcast(tensor, 0)


def sharded(accelerator: "Accelerator") -> bool:
    """Whether accelerate was told to shard the model (FSDP)."""
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard(policy: Policy, accelerator: "Accelerator") -> None:
    """Spreads the base model's layers over the processes, where accelerate was told to; raises ConfigError.

    Adapters, value head and embeddings stay whole on every process: all that training changes is as it is without.
    """
    if not sharded(accelerator):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if policy.config.load_in_4bit == "true":
        raise ConfigError("load_in_4bit=true can't be sharded (FSDP): set load_in_4bit=false")
    decoder, kinds = body(policy), policy.model.get_base_model()._no_split_modules or ()
    layers = [module for module in decoder.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ConfigError(f"model_name={policy.config.model_name} names no layers to shard (FSDP): use multi_gpu.yaml")
    mesh = init_device_mesh(policy.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=set(policy.parameters.values()))
    fully_shard(decoder, mesh=mesh, ignored_params=set(decoder.parameters()))


def body(policy: Policy):
    """The base model less its head: every forward pass goes through it."""
    return policy.model.get_base_model().get_decoder()


@contextlib.contextmanager
def in_step(policy: Policy, accelerator: "Accelerator") -> Iterator[None]:
    """Lets processes make different numbers of forward passes over sharded layers, which all must gather at once.

    Before each pass a process asks who else makes one; whoever is done makes empty ones until nobody does.
    """
    if not sharded(accelerator):
        yield
        return
    import torch

    def announce(*_: Any) -> None:
        total(accelerator, 1)

    hook = body(policy).register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    token = torch.full((1, 1), policy.pad_id, device=policy.device)
    while total(accelerator, 0)[0]:
        with torch.no_grad():
            policy.model(input_ids=token)
