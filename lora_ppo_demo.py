"""A tutor that learns from whether you understood.

    python lora_ppo_demo.py                        start the tutor, or go on where you left off
    python lora_ppo_demo.py --help                 every setting

The loop, numbered as in `take_turn` below:

    1. You ask a question.
    2. The policy, a language model with LoRA adapters, answers it.
    3. The base model, its adapters off, writes a quiz from the question alone, and must be sure of its key.
    4. You choose one of four options. (With `pretest=true` also before the answer: what you knew earns nothing.)
    5. Right is a reward of +1, wrong of -1 (`reward_right`, `reward_wrong`).
    6. One PPO step on that one answer trains the adapters and the value head.
    7. The turn is on disk before you see its result: in the journal, and in the log.
    8. Every `save_every` steps the adapters are saved, in the form in which PEFT and vLLM load them.

Where to read on: lora_ppo/step.py is the PPO step, from top to bottom; lora_ppo/ppo.py holds its equations. config.py
has every setting. Left out on purpose: a reward model (the quiz is the reward), a second copy of the model (the
reference policy is the same model with its adapters off), and training in batches (train.py).
"""

import math
import sys
import time
from dataclasses import asdict
from typing import Any

from config import Config
from lora_ppo.chat import encode_chat
from lora_ppo.checks import longest_prompt
from lora_ppo.disk import users_folder
from lora_ppo.generate import Request, replies
from lora_ppo.journal import turn_seed
from lora_ppo.loading import base_name, is_bundled, load_policy
from lora_ppo.policy import Policy
from lora_ppo.quiz import LETTERS, Quiz, quiz_text, reshuffled
from lora_ppo.quizmaster import first_requests, make_quiz
from lora_ppo.run import Run, is_right
from lora_ppo.settings import ConfigError, from_command_line
from lora_ppo.signals import (
    Leave,
    SecondInterrupt,
    asked_to_leave,
    interrupts_deferred,
    leave_on_signals,
)
from lora_ppo.step import OUT_OF_MEMORY, StepSkipped, out_of_memory, ppo_step
from lora_ppo.streams import run_program
from lora_ppo.terminal import (
    COMMANDS,
    INPUT_CLOSED,
    SimulatedLearner,
    Terminal,
    clean,
    progress_chart,
    read_questions,
)
from lora_ppo.turns import Turn
from tasks.quiz_gate import QUESTIONS, ensure_gate

USAGE = f"""usage: python lora_ppo_demo.py [--config FILE] [name=value ...]

A tutor that learns from whether you understood: ask, read the answer, take the
quiz. Each result trains it.

examples:
  python lora_ppo_demo.py                   start, or go on where you left off
  python lora_ppo_demo.py resume=none       a new run beside the old one
  python lora_ppo_demo.py lora_r=8 --config my_settings.yaml
  python lora_ppo_demo.py learner=simulated questions=my_questions.txt steps=100

in the session:
{COMMANDS}

--version prints the version."""

# ---------------------------------------------------------------------------------------------------------- the turn


def take_turn(question: str, policy: Policy, run: Run, terminal: Terminal) -> None:
    """One question, from the answer to the step it earns. The numbers are those of the loop at the top of this file."""
    import torch

    config, tokenizer, number = run.config, policy.tokenizer, run.turn

    # 1. The question becomes a prompt. Whatever it spells, it stays text: it can't forge a chat turn.
    prompt = encode_chat(tokenizer, policy.prompts.tutor.messages(question))
    if not fits(question, prompt, policy, terminal):
        return
    foresight, run.no_quiz = None, []
    try:
        # 2. The policy answers, at `temperature`. A turn draws from a seed of its own, so that a session that was
        #    stopped goes on as if it had not been. Beside the answer, unseen, the quizmaster writes a first quiz.
        torch.manual_seed(turn_seed(config.seed, number))
        quiz, guess, knew = pretest(question, policy, run, terminal) if config.pretest else (None, None, False)
        terminal.write("Tutor: ")
        answering = Request(prompt, config.temperature, on_text=terminal.stream)
        beside = [] if config.pretest else first_requests(policy, question)
        response, *written = replies(policy, [answering, *beside])
        answer = policy.text(response)
        terminal.end_stream("" if answer.strip() else "(no answer)")

        # 3. The quiz knows the question, never the answer, and is written by the base model: the policy can't learn to
        #    make it easy. It must be sure of its key, as sure as was measured to be enough on this model.
        if not config.pretest:
            with terminal.busy("making a quiz"):
                quiz = make_quiz(policy, question, written, why=run.no_quiz)
        if quiz is None:
            terminal.say(
                "I couldn't write a reliable quiz for that, so nothing was learned (/quiz says why).", "yellow"
            )
            return
        terminal.say(f"\nQuiz: {quiz_text(quiz.question, quiz.options)}", "bold")

        # 4. You choose. Meanwhile a thread takes the step for +1 and for -1 (`precompute`): your choice picks one.
        turn = Turn(number, prompt, response, reward=math.nan)
        if terminal.waits_for_a_person:
            with interrupts_deferred():
                foresight = run.foresee(turn)
        choice = terminal.choose(quiz, answer)
        if choice == "skip":
            terminal.say("Skipped: no reward, no step.")
            return

        # 5. The reward. The key is compared here and stays here: the policy never reads it, and it is not stored.
        right = choice == quiz.key
        if knew and right:
            terminal.say("Right, and you knew it before: the answer taught you nothing, so no reward and no step.")
            return
        turn.reward = config.reward_right if right else config.reward_wrong
        line = {"question": question, "answer": answer, "quiz_id": f"quiz-{number}", "user_answer": LETTERS[choice]}
        line |= {"right": right} | ({"pretest_answer": guess} if config.pretest else {})

        with interrupts_deferred():  # a Ctrl-C waits until the turn is whole
            # 6. One PPO step, as soon as batch_size answers wait for it: by default on this one alone.
            started, line["outcome"] = time.perf_counter(), "pending"
            if run.collect(turn, foresight.before if foresight else None):
                try:
                    metrics = foresight.take(turn.reward) if foresight else ppo_step(policy, *run.step_inputs())
                    line["outcome"] = "undone" if metrics.pop("undone", False) else "taken"
                except StepSkipped as skipped:
                    line["outcome"], metrics = "skipped", {"why": str(skipped)}
                line |= metrics
            foreseen = foresight.seconds.get(turn.reward) if foresight else None
            line["seconds"] = round(foreseen or time.perf_counter() - started, 4)  # of computing, not of waiting for it

            # 7. and 8. Journal, log, and every save_every steps a checkpoint.
            foresight = None
            line = run.finish_turn(turn, line)
            show_outcome(line, run, terminal)
            if config.reveal and not right:
                terminal.say(f"The right answer is {LETTERS[quiz.key]}) {quiz.options[quiz.key]}.")
    finally:
        with interrupts_deferred():
            if foresight:
                foresight.discard()
            # A person may ask something else next time; what takes their place, stopped, goes on with this question.
            stopped = isinstance(sys.exception(), KeyboardInterrupt) and not terminal.waits_for_a_person
            run.abandon(number, again=stopped)


def pretest(question: str, policy: Policy, run: Run, terminal: Terminal) -> tuple[Quiz | None, str, bool]:
    """The quiz before the answer: what to take after it, its options in another order; the guess; whether it is right.

    So an answer is rewarded only where it turned a wrong choice into a right one.
    """
    with terminal.busy("making a quiz"):
        quiz = make_quiz(policy, question, why=run.no_quiz)
    if quiz is None:
        return None, "", False
    terminal.say(f"Before I answer: {quiz_text(quiz.question, quiz.options)}", "bold")
    guess = terminal.choose(quiz, None, "Your guess (A-D, s: I don't know): ")
    return reshuffled(quiz), guess if guess == "skip" else LETTERS[guess], guess == quiz.key


def fits(question: str, prompt: list[int], policy: Policy, terminal: Terminal) -> bool:
    """Whether the question leaves room in the model's context for an answer and for a quiz; if not, says so.

    A quiz asks the question again: so whoever takes it is told at least as much.
    """
    roles = ["quizmaster", "solver"] + ["learner"] * (policy.config.learner == "simulated")
    longest = max(len(prompt), longest_prompt(policy, question, roles))
    room = policy.context - policy.config.max_new_tokens
    if longest > room:
        terminal.say(
            f"That question takes {longest} tokens with its instructions; the model has room for {room}.", "yellow"
        )
    return longest <= room


def show_outcome(line: dict[str, Any], run: Run, terminal: Terminal) -> None:
    """Right or wrong, and what the step did."""
    right = line["right"]
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
        ratio = line["likelihood_ratio"]
        those = "that answer is" if run.config.batch_size == 1 else "those answers together are"
        effect = f"moved the policy by {line['step_kl']:.2g} nats per token: {those} now "
        if not 0.5 <= ratio < 2:
            effect += f"{ratio:.3g} times as likely"
        elif run.config.dtype == "bfloat16":
            effect = "changed the policy by less than bfloat16 can show on one answer"
        else:
            effect += f"{100 * abs(ratio - 1):.2g} % {'more' if ratio >= 1 else 'less'} likely"
        terminal.say(f"Step {line['step']} took {line['seconds']:.2f} s and {effect}.", "dim")


# ------------------------------------------------------------------------------------------------------- the session


def session(policy: Policy, run: Run, terminal: Terminal) -> int:
    """Turns and commands, until the person leaves. Returns the exit status."""
    while not asked_to_leave:
        try:
            question = terminal.ask("\nYou: ")
        except (EOFError, KeyboardInterrupt):
            return 0
        try:
            if question.startswith("/"):
                if command(question, policy, run, terminal):
                    return 0
            elif question:
                take_turn(question, policy, run, terminal)
        except (EOFError, Leave):
            terminal.say("")  # an answer may have been cut off
            return 0
        except SecondInterrupt:
            return 130
        except KeyboardInterrupt:
            if not terminal.waits_for_a_person:
                terminal.say("")
                return 0
            terminal.say("\nInterrupted. Finished turns are kept.", "yellow")
        except Exception as error:
            if not out_of_memory(error):
                raise
            terminal.say(f"\nThe turn ended: {OUT_OF_MEMORY}", "yellow")
    return 0


def command(text: str, policy: Policy, run: Run, terminal: Terminal) -> bool:
    """Carries out a /command; True if the session ends."""
    name = text.split()[0].lower()
    if name == "/quit":
        return True
    if name == "/help":
        terminal.say(COMMANDS)
    elif name == "/progress":
        lines = run.history()
        terminal.say(progress_chart([is_right(line) for line in lines], [line["reward"] for line in lines]))
    elif name == "/quiz":
        terminal.say("\n".join(run.no_quiz) or "The last question got its quiz at once, or none was asked yet.")
    elif name == "/undo":
        step = policy.step
        with interrupts_deferred():
            undone = run.undo()
        if not undone:
            terminal.say("There is no step to undo: only the last one of this session can be, once.")
        elif policy.step == step:
            terminal.say("Undid the last answer; its step had not been taken yet.")
        else:
            terminal.say(f"Undid step {step}; the tutor is back at step {policy.step}.")
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


def banner(policy: Policy, config: Config, run: Run) -> str:
    """What a person sees first."""
    size = sum(p.numel() for p in policy.parameters.values())
    adapters, whole = policy.model.get_nb_trainable_parameters()  # counts what is packed in 4 bits, too
    total = whole - adapters
    precision = "4-bit NF4" if config.load_in_4bit == "true" else config.dtype
    third = "What is 7 + 5?" if is_bundled(config.model_name) else "Which planet is the largest?"
    return "\n".join(
        [
            f"model    {base_name(config)} ({total / 1e6:,.1f} M parameters, {precision}, on {config.device})",
            f"adapter  LoRA rank {config.lora_r} on {len(policy.targets)} layer types, {size / 1e6:.2f} M trainable",
            f"quizzes  {policy.quiz_gate.worth()}",
            f"step     {policy.step}, saved every {config.save_every} steps in {run.folder}",
            f"log      {run.log.path}",
            "ask      What is the capital of Norway?",
            "         What is the opposite of early?",
            f"         {third}",
            "help     /help lists the commands; Ctrl-D leaves",
        ]
    )


def main() -> int:
    """The program. Exit status: 0; 1 if a disk kept nothing of it; 2 for bad settings; 130 after a second Ctrl-C."""
    run, status = None, 0
    try:
        config = from_command_line(Config, USAGE)
        questions = read_questions(config.questions) if config.learner == "simulated" else []
        if INPUT_CLOSED and not questions:
            raise ConfigError("standard input is closed: expected a terminal, a pipe or a file, or learner=simulated")
        terminal = Terminal(users_folder(config.log_dir, config.user) / "history")

        def notice(text: str) -> None:
            terminal.say(text, "yellow")

        with leave_on_signals(terminal.end_prompt):
            try:
                # The base model (in 4 bits on a GPU), LoRA adapters on its linear layers, a float32 value head, AdamW;
                # then the run on disk: the newest whole checkpoint, and the turns after it replayed from the journal.
                with terminal.busy("Loading the model ..."):
                    policy, config = load_policy(config, notice)
                    run = Run(policy, config, notice)
                with terminal.busy("Measuring ...") as show:
                    ensure_gate(policy, notice, lambda count: show(f"Measuring: {count} of {QUESTIONS} questions"))
                if questions:
                    terminal = SimulatedLearner(policy, questions, config.steps, run.simulation)
                    run.simulation = terminal.place
                terminal.say(banner(policy, config, run), "cyan")
                with terminal.keys_kept():
                    status = session(policy, run, terminal)
            except Leave:  # while loading
                pass
            except Exception:  # which a library may have made of it
                if run or not asked_to_leave:
                    raise
            except KeyboardInterrupt:
                terminal.say("\nInterrupted.")
            asked_to_leave.append(0)  # it is leaving: another signal changes nothing
            # After a second Ctrl-C nothing is saved: the journal has every turn, and the weights may be half of a step.
            if run and status == 0 and (run.unsafe or run.policy.step > run.saved_step) and run.save():
                terminal.say(f"Saved step {policy.step} in {run.folder}. Goodbye.")
            if run and run.unsafe:
                terminal.say(
                    f"{run.folder} could not be written to: what was learned since step {run.safe_step} is lost."
                )
        return status or int(run is not None and run.unsafe)
    except ConfigError as error:
        print(f"error: {clean(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        return 0 if isinstance(interrupt, Leave) else 130
    finally:
        if run:
            run.close()


if __name__ == "__main__":
    raise SystemExit(run_program(main))
