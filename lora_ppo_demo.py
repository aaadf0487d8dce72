"""A tutor that learns from whether you understood.

    python lora_ppo_demo.py                        start, or go on with, the tutor
    python lora_ppo_demo.py --help                 every setting

You ask. A local language model answers, then quizzes you on your question. Right is a reward of +1, wrong of -1, and
one PPO step on that one answer trains the model's LoRA adapters and its value head. This file holds all of it, in
reading order: policy, generation, quiz, PPO, checkpoints and journal, session. Mathematics is batch-first; the tutor
is the case of a batch of one.

Left out on purpose: a reward model (the quiz is the reward), a second copy of the model (the reference policy is the
same model with the adapters off), and batched or unattended training (a companion's work).

Shapes: B samples, P prompt tokens, T response tokens, V vocabulary. `response_mask` (B, T) is True
exactly where the policy chose the token, its end-of-sequence token included.
"""

import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import Config
from lora_ppo.chat import (
    QUIZMASTER_PROMPT,
    TUTOR_PROMPT,
    chat,
    encode_chat,
)
from lora_ppo.generate import Request, replies
from lora_ppo.journal import Run, Turn, turn_seed
from lora_ppo.policy import Policy, base_name, load_policy
from lora_ppo.quiz import LETTERS, make_quiz, quiz_request, quiz_text
from lora_ppo.settings import (
    ConfigError,
    from_command_line,
)
from lora_ppo.step import OUT_OF_MEMORY, out_of_memory
from lora_ppo.terminal import (
    SecondInterrupt,
    SimulatedLearner,
    Terminal,
    clean,
    interrupts_deferred,
    progress_chart,
    read_questions,
)

if TYPE_CHECKING:  # torch takes seconds to import: `--help` answers without it
    pass


# ------------------------------------------------------------------------------------------------ roles and prompts


# ------------------------------------------------------------------------------------------------------------ policy


# -------------------------------------------------------------------------------------------------------- generation


# -------------------------------------------------------------------------------------------------------------- quiz


# The simulated learner: the base model in a learner's role, blind to the key, reads an answer and takes the quiz.


# --------------------------------------------------------------------------------------------------------------- PPO


# ------------------------------------------------------------------------------------------ checkpoints, journal, log


# ----------------------------------------------------------------------------------------------------------- session

HELP = """Ask a question, read the answer, then choose A to D on the quiz: right is +1, wrong is -1; the tutor learns.
At the quiz:     A B C D, or the option's text, then Enter; s skips (no reward, no step).
At the question: /help       this text
                 /progress   how the quizzes went so far
                 /undo       take the last step back, exactly
                 /save       write a checkpoint now
                 /config     every setting as it is in force
                 /quit       save and leave (so do Ctrl-D and Ctrl-C)"""


def banner(policy: Policy, config: Config, run: Run) -> str:
    """What a person sees first."""
    size = sum(p.numel() for p in policy.parameters.values())
    total = sum(p.numel() for n, p in policy.model.named_parameters() if n not in policy.parameters)
    precision = "4-bit NF4" if config.load_in_4bit == "true" else config.dtype
    return "\n".join(
        [
            f"model    {base_name(config)} ({total / 1e6:,.1f} M parameters, {precision}, on {config.device})",
            f"adapter  LoRA rank {config.lora_r} on {len(policy.targets)} layer types, {size / 1e6:.2f} M trainable",
            f"step     {policy.step}, saved every {config.save_every} steps in {run.folder}",
            f"log      {run.log.path}",
            "help     /help lists the commands; an empty line asks again; Ctrl-D leaves",
        ]
    )


def session(policy: Policy, run: Run, terminal: Terminal) -> int:
    """Questions, answers, quizzes and steps, until the person leaves. Returns the exit status."""
    interrupted = False
    while True:
        try:
            question = terminal.ask("\nYou: ")
            interrupted = False
        except EOFError:
            return 0
        except KeyboardInterrupt:
            return 130 if interrupted else 0
        try:
            if question.startswith("/"):
                if command(question, policy, run, terminal):
                    return 0
            elif question:
                take_turn(question, policy, run, terminal)
        except EOFError:
            return 0
        except SecondInterrupt:
            return 130
        except KeyboardInterrupt:
            interrupted = True
            terminal.say("\nInterrupted. Finished turns are kept.", "yellow")
        except Exception as error:
            if not out_of_memory(error):
                raise
            terminal.say(f"\nThe turn ended: {OUT_OF_MEMORY}", "yellow")


def take_turn(question: str, policy: Policy, run: Run, terminal: Terminal) -> None:
    """One question: the answer, the quiz, the choice, and the step it earns."""
    config, tokenizer = run.config, policy.tokenizer
    prompt = encode_chat(tokenizer, chat(TUTOR_PROMPT, question))
    longest = max(len(prompt), len(encode_chat(tokenizer, chat(QUIZMASTER_PROMPT, question))))
    if longest + config.max_new_tokens > policy.context:
        room = policy.context - config.max_new_tokens
        terminal.say(
            f"That question takes {longest} tokens with its instructions; the model has room for {room}.", "yellow"
        )
        return
    number = run.turn
    try:
        answer_and_quiz(question, prompt, policy, run, terminal)
    finally:
        with interrupts_deferred():
            run.forget()
            if run.turn == number:
                run.pass_over(number)


def answer_and_quiz(question: str, prompt: list[int], policy: Policy, run: Run, terminal: Terminal) -> None:
    """The turn from the answer on."""
    import torch

    config, tokenizer, number = run.config, policy.tokenizer, run.turn
    torch.manual_seed(turn_seed(config.seed, number))
    terminal.write("Tutor: ")
    answering = Request(prompt, config.temperature, on_text=terminal.write)
    response, written = replies(policy, [answering, quiz_request(policy, question)])
    answer = tokenizer.decode(response, skip_special_tokens=True)
    terminal.say("" if answer.strip() else "(no answer)")
    with terminal.busy("making a quiz"):
        quiz = make_quiz(policy, question, written)
    if quiz is None:
        terminal.say("No sound quiz could be made on this question, so it earns no reward and no step.", "yellow")
        return
    terminal.say(f"\nQuiz: {quiz_text(quiz.question, quiz.options)}", "bold")
    turn = Turn(number, prompt, response, math.nan)
    if terminal.waits_for_a_person:
        with interrupts_deferred():
            run.foresee(turn)
    choice = terminal.choose(quiz, answer)
    if choice == "skip":
        terminal.say("Skipped: no reward, no step.")
        return
    turn.reward = 1.0 if choice == quiz.key else -1.0
    line = {"question": question, "answer": answer, "quiz_id": f"quiz-{number}", "user_answer": LETTERS[choice]}
    with interrupts_deferred():
        line = run.finish_turn(turn, line)
        show_outcome(line, run, terminal)


def show_outcome(line: dict[str, Any], run: Run, terminal: Terminal) -> None:
    """Right or wrong, and what the step did."""
    right = line["reward"] > 0
    terminal.say(f"{'Right' if right else 'Wrong'}. Reward {line['reward']:+g}.", "green" if right else "red")
    if line["outcome"] == "pending":
        terminal.say(f"{len(run.pending)} of {run.config.batch_size} answers for the next step.")
    elif line["outcome"] == "skipped":
        terminal.say(f"No step was taken: {line['why']}. The weights are as they were.", "yellow")
    elif line["outcome"] == "undone":
        terminal.say(
            f"Step {line['step']} was undone: it moved the policy by {line['step_kl']:.3f} nats per token, "
            f"more than target_kl={run.config.target_kl:g}.",
            "yellow",
        )
    else:
        those = "this answer is" if run.config.batch_size == 1 else "these answers together are"
        terminal.say(
            f"Step {line['step']} took {line['seconds']:.2f} s and moved the policy by {line['step_kl']:.2g} nats per "
            f"token: {those} now {line['likelihood_ratio']:.3g} times as likely.",
            "dim",
        )


def command(text: str, policy: Policy, run: Run, terminal: Terminal) -> bool:
    """Carries out a /command; True if the session ends."""
    name = text.split()[0].lower()
    if name == "/quit":
        return True
    if name == "/help":
        terminal.say(HELP)
    elif name == "/progress":
        terminal.say(progress_chart([line["reward"] for line in run.history()]))
    elif name == "/undo":
        step = policy.step
        with interrupts_deferred():
            undone = run.undo()
        if undone and policy.step == step:
            terminal.say("The last answer was taken back before its step.")
        else:
            terminal.say(
                f"Step {step} was taken back; the tutor is at step {policy.step}." if undone else "No step to undo."
            )
    elif name == "/save":
        with interrupts_deferred():
            saved = run.save()
        if saved:
            terminal.say(f"Saved {run.folder / f'step_{policy.step}'}.")
    elif name == "/config":
        terminal.say("\n".join(f"{key}: {value}" for key, value in asdict(run.config).items()))
    else:
        terminal.say(f"There is no command {name}; /help lists them.")
    return False


USAGE = """usage: python lora_ppo_demo.py [--config FILE] [name=value ...]

A tutor that learns from whether you understood: ask, read the answer, take the quiz; each result trains it."""


def main() -> int:
    """The program. Exit status: 0; 2 for a setting that can't be used; 130 after a second Ctrl-C."""
    run, status = None, 0
    try:
        config = from_command_line(Config, USAGE)
        questions = read_questions(config.questions) if config.learner == "simulated" else []
        terminal = Terminal(Path(config.log_dir) / "history")

        def notice(text: str) -> None:
            terminal.say(text, "yellow")

        try:
            policy, config = load_policy(config, notice)
            run = Run(policy, config, notice)
            if questions:
                terminal = SimulatedLearner(policy, questions, config.steps)
            terminal.say(banner(policy, config, run), "cyan")
            with terminal.keys_kept():
                status = session(policy, run, terminal)
        except KeyboardInterrupt:  # while loading
            terminal.say("\nInterrupted.")
        # After a second Ctrl-C nothing is saved: the journal has every turn, and the weights may be half of a step.
        if run and status == 0 and run.policy.step > run.saved_step and run.save():
            terminal.say(f"Saved step {policy.step} in {run.folder}. Goodbye.")
        if run and run.journal.unwritten:
            terminal.say(f"{run.folder} could not be written to: what was learnt since step {run.saved_step} is lost.")
        return status
    except ConfigError as error:
        print(f"error: {clean(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        if run:
            run.close()


if __name__ == "__main__":
    raise SystemExit(main())
