"""How speed.py measures: seconds, passes, tensors as wide as the vocabulary, memory, and the machine's limits.

Nothing here knows this project: the same functions measure every trainer, each in whatever process it runs.
"""

import contextlib
import gc
import json
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

MB = 1e6


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Arm:
    """One of several ways of doing the same work. `run` is timed; it is given what `prepare`, untimed, returned.

    What `finish`, untimed, makes of `run`'s result is kept in `results`.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    finish: Callable[[Any], Any] = lambda result: result
    seconds: list[float] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.seconds)


def race(arms: Sequence[Arm], repeats: int) -> None:
    """Runs all arms by turns, `repeats` times after one untimed round; every other round goes backwards."""
    for number in range(-1, repeats):
        for arm in arms if number % 2 else reversed(arms):
            given = arm.prepare()
            synchronize()
            started = time.perf_counter()
            result = arm.run(given)
            synchronize()
            taken, result = time.perf_counter() - started, arm.finish(result)
            if number >= 0:
                arm.seconds.append(taken)
                arm.results.append(result)


def timing(arm: Arm, ours: Arm | None = None) -> dict[str, Any]:
    """The columns that every timed row has; the ratio is of medians, to `ours`."""
    columns = {"seconds": arm.median, "fastest": min(arm.seconds), "slowest": max(arm.seconds)}
    return columns | ({"ratio": arm.median / ours.median} if ours else {}) | {"runs": arm.seconds}


# -------------------------------------------------------------------------------------------------- what a step makes


def count(model, run: Callable[[], Any], response_tokens: int) -> dict[str, float]:
    """What `run` does with `model`: sequences taken forward and backward, and tensors as wide as the vocabulary.

    Counted are new tensors (not views) whose last dimension is the vocabulary, with a row for each token of a response.
    """
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    vocabulary = model.get_output_embeddings().weight.shape[0]
    found = {"forward passes": 0, "backward passes": 0, "vocabulary tensors": 0, "their MB": 0.0}

    def forward(module, inputs, output) -> None:
        rows = len(output)
        found["forward passes"] += rows
        if output.requires_grad:
            output.register_hook(lambda gradient: backward(rows))

    def backward(rows: int) -> None:
        found["backward passes"] += rows

    class Tensors(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            output = function(*arguments, **(options or {}))
            given = {id_of(x) for x in tree_leaves((arguments, options)) if hasattr(x, "untyped_storage")}
            for x in tree_leaves(output):
                wide = hasattr(x, "untyped_storage") and x.dim() > 1 and x.shape[-1] == vocabulary
                if wide and x.numel() >= response_tokens * vocabulary and id_of(x) not in given:
                    found["vocabulary tensors"] += 1
                    found["their MB"] += x.numel() * x.element_size() / MB
            return output

    def id_of(tensor) -> int:
        return tensor.untyped_storage()._cdata

    last = [module for name, module in model.named_modules() if name.rpartition(".")[2] == "norm"][-1]
    hook = last.register_forward_hook(forward)
    try:
        with Tensors():
            run()
    finally:
        hook.remove()
    return found


# ------------------------------------------------------------------------------------------------------------- memory


def trim() -> None:
    """Gives freed memory back to the system, so that what is measured next starts from what is in use."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)


def on_gpu() -> bool:
    """Whether this process works on the GPU: one may be there, and the tensors elsewhere."""
    import torch

    return torch.cuda.is_available() and torch.cuda.memory_allocated() > 0


def memory_in_use() -> int:
    """Bytes: of the GPU's memory where the work is there, else resident in this process."""
    import psutil
    import torch

    return torch.cuda.memory_allocated() if on_gpu() else psutil.Process().memory_info().rss


@contextlib.contextmanager
def resident_peak(process: int | None = None) -> Iterator[list[int]]:
    """A list whose last entry is the most bytes that were resident in a process (None: this one) in here."""
    import psutil

    watched, ended = psutil.Process(process), threading.Event()
    peak = [watched.memory_info().rss]

    def sample() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            while not ended.wait(0.001):
                peak[0] = max(peak[0], watched.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def peak_above(run: Callable[[], Any]) -> float:
    """MB that `run` needs at its peak above what was in use before it; on the GPU where there is one."""
    import torch

    trim()
    before = memory_in_use()
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / MB
    with resident_peak() as peak:
        run()
    return (peak[-1] - before) / MB


PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product"),
    "mkldnn::_linear_pointwise",
)


@contextlib.contextmanager
def profiling() -> Iterator[dict[str, float]]:
    """Seconds spent in here, those in matrix products, attention's among them, and the most MB that tensors fill.

    They are known at its end. The last leaves out what an allocator keeps beside tensors, which `peak_above` has.
    """
    import torch

    activity = torch.profiler.ProfilerActivity
    gpu = on_gpu()
    activities = [activity.CPU, activity.CUDA] if gpu else [activity.CPU]
    found: dict[str, float] = {}
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        started = time.perf_counter()
        yield found
        synchronize()
        seconds = time.perf_counter() - started
    products = [event for event in profiler.key_averages() if event.key.startswith(PRODUCTS)]
    spent = sum(event.self_device_time_total if gpu else event.self_cpu_time_total for event in products)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_bytes())["traceEvents"]
    kind = 1 if gpu else 0  # of device, as torch counts them
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == kind]
    changes.sort(key=lambda event: event["ts"])
    before = changes[0]["args"]["Total Allocated"] - changes[0]["args"]["Bytes"]
    most = max(event["args"]["Total Allocated"] for event in changes) - before
    found |= {"profiled s": seconds, "products s": spent / 1e6, "tensors MB": most / MB}


def profile(run: Callable[[], Any]) -> dict[str, float]:
    """What `profiling` finds while `run` runs."""
    with profiling() as found:
        run()
    return found


# -------------------------------------------------------------------------------------------------------- the machine


def fastest(run: Callable[[], Any], tries: int = 5) -> float:
    """Seconds of the fastest of several tries: a limit is what the machine can do, not what it does as a rule."""
    arm = Arm("limit", lambda _: run())
    race([arm], tries)
    return min(arm.seconds)


def multiplication_rate(dtype: str, device: str) -> float:
    """FLOP/s of a large matrix product; on a CPU by the faster of torch's two libraries, MKL and oneDNN."""
    import torch

    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    seconds = fastest(lambda: a @ b)
    if device == "cpu" and torch.backends.mkldnn.is_available():
        seconds = min(seconds, fastest(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")))
    return 2 * n**3 / seconds


def memory_rate(size: int, device: str) -> float:
    """Bytes/s at which `size` bytes are read, or read and written: in cache where they fit into it, as weights do."""
    import torch

    x = torch.ones(max(size // 4, 1), device=device)
    y = torch.empty_like(x)
    return max(size / fastest(x.sum), 2 * size / fastest(lambda: y.copy_(x)))


def machine() -> dict[str, str]:
    """The processor, and the GPU if there is one."""
    import torch

    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    return {"processor": name, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
