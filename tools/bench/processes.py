"""The trainers that speed.py runs in processes of their own, each of which takes a step whenever it is asked.

They are TRL's GRPOTrainer, whose release can't be imported beside the one that has a PPOTrainer; AgileRL's LLMPPO,
whose packages need an environment of their own; and this project's train.py, which may run in several processes.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench.measure import count, peak_above, profile, profiling  # noqa: E402

REQUEST = "Tell me something about number {}."


class NotRun(Exception):
    """Something that is not measured; the message says why."""


class Child:
    """A trainer of this file in `processes` processes, which answer requests; use it as a context manager.

    Raises NotRun, with the end of what the process said, if it ends before it answers.
    """

    def __init__(self, trainer: str, settings: dict[str, Any], python: str, processes: int = 1, threads: int = 1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the processes
        self.members = []
        for rank in range(processes):
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
            if processes > 1:
                environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            self.members.append(
                subprocess.Popen(
                    [python, __file__, trainer, json.dumps(settings)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self.errors,
                    text=True,
                    env=environment,
                )
            )

    def __enter__(self) -> "Child":
        try:
            self.ask("ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        for member in self.members:
            with contextlib.suppress(OSError):
                member.stdin.close()
        for member in self.members:
            try:
                member.wait(timeout=20)
            except subprocess.TimeoutExpired:
                member.kill()
                member.wait()
            member.stdout.close()
        self.errors.close()

    def ask(self, request: str, **options: Any) -> Any:
        """Sends a request to every process; returns what the first one answers, once all have."""
        line = json.dumps({"request": request} | options)
        with contextlib.suppress(OSError):
            for member in self.members:
                member.stdin.write(line + "\n")
                member.stdin.flush()
        answers = [member.stdout.readline() for member in self.members]
        if not all(answers):
            self.errors.seek(0)
            said = [text.strip() for text in self.errors.read().splitlines() if text.strip()]
            raise NotRun(f"the process ended: {said[-1] if said else 'it said nothing'}")
        return json.loads(answers[0])


def serve(actions: dict[str, Callable[..., Any]]) -> None:
    """Answers requests by the action of their name until the input ends. Each is given what stands beside the name."""
    for line in sys.stdin:
        options = json.loads(line)
        request = options.pop("request")
        print(json.dumps(actions[request](**options) if request in actions else None), file=ANSWERS, flush=True)


# ----------------------------------------------------------------------------------------------------------- trainers


def agilerl(settings: dict[str, Any]) -> None:
    """AgileRL's LLMPPO on one sample. It builds adapters, value head and reference adapter itself."""
    import agilerl
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer

    if settings["device"] == "cpu":
        agilerl.HAS_LIGER_KERNEL = False  # its Triton kernels need a GPU
    from agilerl.algorithms import LLMPPO

    tokenizer = AutoTokenizer.from_pretrained(settings["folder"])
    prompt, response = settings["prompt"], settings["response"]
    agent = LLMPPO(
        pad_token_id=tokenizer.pad_token_id,
        pad_token=tokenizer.pad_token,
        model_name=settings["folder"],
        model_config={"dtype": getattr(torch, settings["dtype"])},
        lora_config=LoraConfig(
            r=settings["lora_r"],
            lora_alpha=settings["lora_alpha"],
            target_modules=settings["target_modules"],
            task_type="CAUSAL_LM",
        ),
        batch_size=1,
        micro_batch_size_per_gpu=1,
        lr_actor=settings["learning_rate"],
        max_model_len=len(prompt) + len(response),
        device=settings["device"],
        gradient_checkpointing=False,
        use_liger_loss=agilerl.HAS_LIGER_KERNEL,
    )
    ids = torch.tensor([prompt + response])
    chosen = torch.arange(ids.shape[1] - 1).unsqueeze(0) >= len(prompt) - 1  # position t says token t + 1

    def step(epochs: int) -> None:
        agent.update_epochs = epochs
        agent.learn(([ids], [chosen], torch.tensor([1.0])))

    def probe(epochs: int) -> dict[str, float]:
        found = count(agent.actor.pretrained_model, lambda: step(epochs), len(response))
        return found | profile(lambda: step(epochs)) | {"peak MB": peak_above(lambda: step(epochs))}

    serve({"step": step, "probe": probe})


def variety(reply: str) -> float:
    """A reward that costs nothing: how many different characters the reply has."""
    return len(set(reply)) / 100


class VarietyTask:
    """A task of one turn whose reward is `variety`."""

    def samples(self, split: str) -> Sequence[int]:
        return range(1000)

    def episode(self, sample: int) -> "VarietyEpisode":
        return VarietyEpisode(sample)


class VarietyEpisode:
    def __init__(self, sample: int):
        self.sample, self.reply = sample, ""

    def reset(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": REQUEST.format(self.sample)}]

    def step(self, reply: str) -> None:
        self.reply = reply

    def outcome(self):
        from lora_ppo.episodes import Outcome

        return Outcome("correct", variety(self.reply))


def ours(settings: dict[str, Any]) -> None:
    """train.py's step, with GRPO; no token ends a reply, so that all have the full length."""
    import torch
    from accelerate import Accelerator

    from lora_ppo.loading import load_policy
    from lora_ppo.processes import align
    from lora_ppo.trainer import Training
    from lora_ppo.training import prepare
    from train import TrainConfig

    config = TrainConfig(
        model_name=settings["folder"],
        device=settings["device"],
        dtype=settings["dtype"],
        load_in_4bit="false",
        algorithm="grpo",
        batch_size=settings["batch_size"],
        mini_batch_size=settings["batch_size"],
        group_size=settings["group_size"],
        max_new_tokens=settings["new_tokens"],
        temperature=1.0,
        top_p=1.0,
        learning_rate=settings["learning_rate"],
        kl_coef=settings["kl_coef"],
        output_dir=settings["output"],
    )
    accelerator = Accelerator(cpu=settings["device"] == "cpu")
    policy, config = load_policy(config)
    policy.stop_ids = [-1]
    policy.recorder.pays = 0  # as after a few steps
    prepare(policy, config)
    training = Training(config, policy, VarietyTask(), accelerator)
    align(policy, accelerator)

    def step(threads: int, target_kl: float = 0.0) -> None:
        torch.set_num_threads(threads)
        training.config.target_kl = target_kl
        line = training.step()
        if line["outcome"] != "taken":
            raise RuntimeError(f"the step was {line['outcome']} ({line.get('why')})")

    serve({"step": step, "profile": lambda **options: profile(lambda: step(**options))})


def grpo(settings: dict[str, Any]) -> None:
    """TRL's GRPOTrainer with the same settings; no reply may end before it has the full length."""
    if settings["trl_latest"]:
        sys.path.insert(0, settings["trl_latest"])
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    on_cpu = settings["device"] == "cpu"
    arguments = GRPOConfig(
        output_dir=settings["output"],
        per_device_train_batch_size=settings["batch_size"],
        num_generations=settings["group_size"],
        max_completion_length=settings["new_tokens"],
        generation_kwargs={"min_new_tokens": settings["new_tokens"]},
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        beta=settings["kl_coef"],
        scale_rewards="none",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=on_cpu,
        max_steps=1_000_000,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
    )
    asked = iter(sys.stdin)

    class Asked(TrainerCallback):
        """Begins a step when one is asked for, and says when it is done."""

        def __init__(self):
            self.profiling = contextlib.ExitStack()

        def on_step_begin(self, args, state, control, **_) -> None:
            while True:
                line = next(asked, None)
                if line is None:
                    os._exit(0)
                options, self.answer = json.loads(line), None
                if options["request"] == "ready":
                    print("null", file=ANSWERS, flush=True)
                    continue
                torch.set_num_threads(options["threads"])
                if options["request"] == "profile":
                    self.answer = self.profiling.enter_context(profiling())
                return

        def on_step_end(self, args, state, control, **_) -> None:
            self.profiling.close()
            print(json.dumps(self.answer), file=ANSWERS, flush=True)

    model = AutoModelForCausalLM.from_pretrained(settings["folder"], dtype=getattr(torch, settings["dtype"]))
    model.generation_config.use_cache = True
    trainer = GRPOTrainer(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(settings["folder"], padding_side="left"),
        reward_funcs=lambda completions, **_: [variety(completion[0]["content"]) for completion in completions],
        args=arguments,
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": REQUEST.format(i)}]} for i in range(1000)]
        ),
        peft_config=LoraConfig(
            r=settings["lora_r"],
            lora_alpha=settings["lora_alpha"],
            target_modules=settings["target_modules"],
            task_type="CAUSAL_LM",
        ),
        callbacks=[Asked()],
    )
    trainer.train()


if __name__ == "__main__":
    ANSWERS = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    {"agilerl": agilerl, "ours": ours, "grpo": grpo}[sys.argv[1]](json.loads(sys.argv[2]))
