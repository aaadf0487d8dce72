"""A training run: which samples a step gets, evaluation, progress, and what stands on disk.

What a step does follows from the weights, the settings and its number: a run that was stopped goes on as if it had not
been.
"""

import contextlib
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ppo.checkpoint import Damaged, all_checkpoints, load_checkpoint, save_checkpoint
from lora_ppo.disk import Checkpoints, locked
from lora_ppo.episodes import Task, Trajectory, play
from lora_ppo.files import replace_file
from lora_ppo.journal import LineFile, now, turn_seed
from lora_ppo.loading import base_name
from lora_ppo.policy import Policy
from lora_ppo.processes import align, everywhere, total
from lora_ppo.rewards import normalize
from lora_ppo.settings import ConfigError, Settings
from lora_ppo.signals import stop_requests
from lora_ppo.statistics import wilson_interval
from lora_ppo.step import StepSkipped
from lora_ppo.terminal import clean
from lora_ppo.training import chunks, learn, rows_per_pass
from lora_ppo.watching import in_short, out_of_band, result_of, shares, training_stats, watch, without_contrast

if TYPE_CHECKING:
    from accelerate import Accelerator


def writing(folder: Path) -> contextlib.AbstractContextManager:
    """Keeps a second run out of output_dir, as `locked` does. Raises ConfigError."""
    try:
        return locked(folder, f"another run is writing to output_dir={folder}: wait for it, or set another output_dir")
    except OSError as error:
        raise ConfigError(f"output_dir={folder} can't be written ({error.strerror}): set another output_dir") from None


class Training:
    """A policy, its task, and the run on disk. What a step does follows from weights, settings and its number."""

    def __init__(self, config: Settings, policy: Policy, task: Task, accelerator: "Accelerator"):
        self.config, self.policy, self.task, self.accelerator = config, policy, task, accelerator
        self.root = Path(config.output_dir)
        self.log = LineFile(self.root / "train.log")
        self.shelf = Checkpoints(self.root, self.say)
        self.lost: set[str] = set()  # what the disk did not take
        self.lines: list[dict[str, Any]] = []
        self.train, self.laps = task.samples("train"), {}
        self.in_order = getattr(task, "in_order", False)
        self.scale = getattr(task, "scale", None)  # of a task whose reward is a model's score
        per_epoch = config.samples_per_epoch or len(self.train)
        self.steps_per_epoch = max(1, per_epoch // config.prompts_per_step)
        self.last = config.num_epochs * self.steps_per_epoch

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(clean(text), file=sys.stderr, flush=True)

    def resume(self, folder: Path, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint; the log's lines of later steps are dropped, as these steps are taken again."""
        try:
            state = load_checkpoint(folder, self.policy, self.say)
            if self.scale and "scale" in state:
                self.scale.load(state["scale"])
        except Damaged as error:
            raise ConfigError(f"resume_from={folder}: {error}") from None
        self.policy.configure(self.config)
        self.shelf.kept["resumed"] = self.root / f"step_{state['step']}"
        if folder.resolve().parent == self.root.resolve():
            there, damaged = self.log.read()
            self.lines = [line for line in there if line.get("step", math.inf) <= state["step"]]
            if self.accelerator.is_main_process:
                self.tidy_up(damaged, len(self.lines) < len(there))
        self.say(f"Resuming from {folder} at step {self.policy.step}.")

    def tidy_up(self, damaged: Sequence[int], later: bool) -> None:
        """Takes out of the folder what a run that goes on has no use for: in its log damaged lines and `later` ones."""
        self.shelf.clear_up()
        for step, epoch in all_checkpoints(self.root):  # of epochs that were shorter
            if epoch.name.startswith("epoch_") and epoch.name != f"epoch_{step / self.steps_per_epoch:g}":
                epoch.rename(self.root / f"step_{step}")
        if damaged:
            self.say(f"{self.log.path}: left out what can't be read: line {', '.join(map(str, damaged))}.")
        if damaged or later:
            replace_file(self.log.path, b"".join(json.dumps(line).encode("ascii") + b"\n" for line in self.lines))

    def samples(self, step: int) -> list[Any]:
        """The samples of a step: shuffled passes over the training split, or a course as it stands."""
        places = range(step * self.config.prompts_per_step, (step + 1) * self.config.prompts_per_step)
        for lap in {place // len(self.train) for place in places} - self.laps.keys():
            count = len(self.train)
            self.laps[lap] = range(count) if self.in_order else shuffled(self.config.seed, lap, count)
        return [self.train[self.laps[place // len(self.train)][place % len(self.train)]] for place in places]

    def play(self, parts: Sequence[Sequence[Any]], adapter: bool = True) -> list[list[Trajectory]]:
        """Episodes on this process's samples, part by part. Raises StepSkipped where memory runs out."""
        policy, episode = self.policy, self.task.episode

        def each() -> list[list[Trajectory]]:
            return [play(policy, [episode(sample) for sample in part], adapter) for part in parts]

        return everywhere(policy, self.accelerator, each)

    def step(self) -> dict[str, Any]:
        """Plays and learns one batch; returns its log line."""
        import torch

        config, accelerator, number = self.config, self.accelerator, self.policy.step
        if config.lr_schedule == "linear":
            self.policy.optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - number / self.last)
        processes = accelerator.num_processes
        torch.manual_seed(turn_seed(config.seed, number * processes + accelerator.process_index))
        mine = self.samples(number)[accelerator.process_index :: processes]
        copies = config.group_size if config.algorithm == "grpo" else 1
        started = time.perf_counter()
        try:
            (trajectories,) = self.play([[sample for sample in mine for _ in range(copies)]])
        except StepSkipped as skipped:
            trajectories, metrics = [], {"outcome": "skipped", "why": str(skipped)}
        played = time.perf_counter() - started
        scored = normalize(self.scale, accelerator, trajectories) if self.scale and trajectories else {}
        if self.in_order and (told := [t.outcome.details for t in trajectories if t.outcome.verdict != "unknown"]):
            scored["level"] = told[0]["level"]  # a step's answers are all of one
        if config.control == "random":
            toss_coins(trajectories, f"{config.seed}/{number}/{accelerator.process_index}")
        if trajectories:
            metrics = learn(self.policy, accelerator, config, trajectories) | scored
        self.policy.step = number + 1
        tokens = total(accelerator, sum(t.length for t in trajectories))[0]
        line = {"timestamp": now(), "step": number + 1, "epoch": number // self.steps_per_epoch + 1} | metrics
        seconds = time.perf_counter() - started
        return line | {"tokens_per_second": round(tokens / played, 1), "seconds": round(seconds, 3)}

    def evaluate(self) -> dict[str, float]:
        """Accuracy with its interval, reward and length on test samples; samples and seed are the same every time."""
        import torch

        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        samples = self.task.samples("test")[: self.config.eval_samples][rank::processes]
        torch.manual_seed(turn_seed(self.config.seed, -1 - rank))
        try:
            played = self.play(chunks(samples, max(1, self.config.batch_size // processes)))
            trajectories = [trajectory for part in played for trajectory in part]
            parts, watched = chunks(trajectories, rows_per_pass(self.config, self.accelerator)), {}
            if self.scale or self.config.stop_if:
                watched = watch(self.policy, self.accelerator, parts)
        except StepSkipped as skipped:
            self.say(f"Step {self.policy.step} was not evaluated: {skipped}.")
            return {}
        known = [t for t in trajectories if t.outcome.verdict != "unknown"]
        right = sum(t.outcome.verdict == "correct" for t in known)
        count, right, reward, tokens, answers = total(
            self.accelerator,
            *(len(known), right, sum(t.outcome.reward for t in known)),
            *(sum(t.length for t in trajectories), len(trajectories)),
        )
        found = {"eval_samples": int(count), "eval_length": tokens / max(answers, 1)}
        if count:  # of nothing there is no mean
            low, high = wilson_interval(right, count)
            found |= {"eval_accuracy": right / count, "eval_low": low, "eval_high": high, "eval_reward": reward / count}
        told = shares(self.accelerator, trajectories) | watched
        return found | {f"eval_{name}": figure for name, figure in told.items()}

    def note(self, line: dict[str, Any]) -> None:
        """Takes in a line that `write_log` adds to the log, and adds it to the trackers."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.lines.append(line)
        self.accelerator.log({k: v for k, v in line.items() if isinstance(v, int | float)}, step=line["step"])
        if self.accelerator.is_main_process:
            self.log.add(line)

    def write_log(self) -> None:
        """Writes the lines that were noted; a disk that refuses costs a message, not the run."""
        if self.accelerator.is_main_process:
            try:
                self.shelf.write(self.log.flush)
            except OSError as error:
                self.say(f"Could not write the log ({error}). The run goes on.")

    def compared(self) -> tuple[str, list[dict[str, Any]]]:
        """How the run went, and beside it the baseline's, whose log lines are the second."""
        folder, name = self.config.baseline_folder, self.checkpoint_name()
        if not folder:
            return result_of(self.lines), []
        try:
            lines, _ = LineFile(folder / "train.log").read()
        except OSError as error:
            return f"{result_of(self.lines)} The baseline's log can't be read ({error}).", []
        weights = [root / name / "adapter_model.safetensors" for root in (self.root, folder)]
        same = all(path.is_file() for path in weights) and weights[0].read_bytes() == weights[1].read_bytes()
        end = "The weights are the baseline's, bit for bit." if same else "The weights are not the baseline's."
        return f"{result_of(self.lines)} {result_of(lines, f'The baseline {folder}: held-out accuracy')} {end}", lines

    def save(self, name: str) -> None:
        """Writes the checkpoint `name`, on the main process, while the others wait."""
        from safetensors import SafetensorError

        if self.accelerator.is_main_process:
            step = self.policy.step
            state = {"epoch": step // self.steps_per_epoch, "data_cursor": step * self.config.prompts_per_step}
            state |= {"scale": self.scale.state()} if self.scale else {}
            state |= {"rng": {"seed": self.config.seed, "step": step}, "log_offset": self.log.size}
            stats = {"training_stats.json": json.dumps(training_stats(self.lines), indent=1)}
            try:
                folder = self.root / name
                result = result_of(self.lines)
                self.shelf.save(folder, lambda: save_checkpoint(folder, self.policy, state, result, stats))
                self.lost.discard("the last checkpoint")
                self.shelf.prune(self.config.keep_checkpoints)
            except (OSError, SafetensorError) as error:
                self.lost.add("the last checkpoint")
                self.say(f"Could not save {name} ({error}). The run goes on.")
        total(self.accelerator, 0)  # the others wait; accelerate's own barrier wants a GPU for each process

    def checkpoint_name(self) -> str:
        epoch, rest = divmod(self.policy.step, self.steps_per_epoch)
        return f"epoch_{epoch}" if epoch and not rest else f"step_{self.policy.step}"

    def run(self) -> int:
        """Trains to the end, or until it is asked to stop. Returns the exit status."""
        align(self.policy, self.accelerator)
        with stop_requests(self.accelerator.num_processes > 1, self.say) as asked, self.progress() as show:
            try:
                self.steps(asked, show)
            except KeyboardInterrupt:
                there = bool(all_checkpoints(self.root))
                self.say("Stopped at once. " + (self.how_to_go_on() if there else "Nothing was saved yet."))
                return 130
        policy = self.policy
        if policy.step < self.last and not self.ended:
            folder = self.root / self.checkpoint_name()
            self.say(f"Stopped after step {policy.step}" + (f", saved in {folder}." if folder.exists() else "."))
            self.say(self.how_to_go_on())
            return 130
        self.report()
        with contextlib.suppress(OSError):
            self.log.flush()
        if self.log.unwritten:
            self.lost.add("lines of the log")
        if self.lost:
            self.say(f"{self.root} could not be written to: {' and '.join(sorted(self.lost))} lost.")
        return int(bool(self.lost))

    def steps(self, asked: list[int], show: Callable[[dict[str, Any]], None]) -> None:
        """Takes the steps that are left, or those until somebody `asked` to stop."""
        config, policy = self.config, self.policy
        every = config.eval_every or self.steps_per_epoch
        if not self.lines:  # the start of this run, be it the base model or a checkpoint of another
            self.note({"timestamp": now(), "step": policy.step} | self.evaluate())
            self.save(self.checkpoint_name())  # before the log is there: what has a log can be gone on with
            self.write_log()
        stop = bool(self.ended)
        while policy.step < self.last and not stop:
            line = self.step()
            stop = total(self.accelerator, float(bool(asked)))[0] > 0
            if policy.step % every == 0 or policy.step == self.last:
                line |= self.evaluate()
            self.note(line)
            self.write_log()
            show(line)
            if advice := without_contrast(self.lines, config.prompts_per_step):
                self.say(advice)
            stop = stop or bool(self.ended)
            if stop or policy.step % self.steps_per_epoch == 0 or policy.step % config.save_every == 0:
                self.save(self.checkpoint_name())

    @property
    def ended(self) -> str:
        """What ended the run before its last step: the condition of stop_if that is fulfilled, in a sentence."""
        return out_of_band(self.lines, self.config.stop_if)

    def how_to_go_on(self) -> str:
        several = self.accelerator.num_processes
        launcher = f"accelerate launch --num_processes {several}" if several > 1 else "python"
        return f"To go on: {launcher} train.py --config {self.root / 'effective_config.yaml'} resume_from=latest"

    @contextlib.contextmanager
    def progress(self) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A progress bar; what it gives shows a log line in it."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (MofNCompleteColumn(), TimeRemainingColumn(compact=True), TextColumn("{task.description}"))
        hidden, console = not self.accelerator.is_main_process, Console(stderr=True, markup=False)
        # Speed is judged by the last hour's steps: one step of a large model takes longer than rich looks back.
        with Progress(
            BarColumn(bar_width=10), *columns, console=console, disable=hidden, speed_estimate_period=3600
        ) as bar:
            item = bar.add_task("starting", total=self.last, completed=self.policy.step)

            def show(line: dict[str, Any]) -> None:
                text = in_short(line, self.config.prompts_per_step)
                counts = {name: sum(one.get("outcome") == name for one in self.lines) for name in ("undone", "skipped")}
                text += "".join(f"  {count} {name}" for name, count in counts.items() if count)
                bar.update(item, completed=line["step"], description=text)

            yield show

    def report(self) -> None:
        """Writes report.html and its plots, with answers of the base model and of the trained one side by side."""
        import torch

        from lora_ppo.report import write_report

        answers: list[list[Trajectory]] = []
        rows_at_once = max(1, self.config.batch_size // self.accelerator.num_processes)
        try:
            for adapter in (False, True):
                torch.manual_seed(self.config.seed)
                played = self.play(chunks(self.task.samples("test")[:10], rows_at_once), adapter=adapter)
                answers.append([trajectory for part in played for trajectory in part])
        except StepSkipped as skipped:
            self.say(f"The report has no answers: {skipped}.")
            answers = [[], []]
        if self.accelerator.is_main_process:
            rows = [
                (a.question, *([*t.replies, f"({t.outcome.label or t.outcome.verdict})"] for t in (a, b)))
                for a, b in zip(*answers, strict=True)
            ]
            settings = f"Task {self.config.task}, {self.config.algorithm.upper()}, {base_name(self.config)}, "
            settings += f"learning rate {self.config.learning_rate:g}, {self.config.batch_size} answers per step, "
            settings += f"seed {self.config.seed}."
            result, other = self.compared()
            result = f"{self.ended} {result}".strip()
            try:
                path = write_report(self.root, self.lines, rows, f"{settings} {result}", other)
                self.say(f"{result} The report is {path}.")
            except OSError as error:
                self.lost.add("the report")
                self.say(f"{result} The report could not be written ({error}).")
        total(self.accelerator, 0)  # the others wait; accelerate's own barrier wants a GPU for each process


def shuffled(seed: int, lap: int, count: int) -> list[int]:
    """The order of so many samples in a pass over them, of a run with this seed."""
    return random.Random(f"{seed}/{lap}").sample(range(count), count)


def toss_coins(trajectories: Sequence[Trajectory], seed: str) -> None:
    """Makes each reward 0 or 1 by a coin, whatever was answered: what then seems to be learned is chance."""
    rng = random.Random(f"control/{seed}")
    for trajectory in trajectories:
        trajectory.outcome = replace(trajectory.outcome, reward=float(rng.random() < 0.5))
