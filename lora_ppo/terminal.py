"""What a person types and sees. Text of models and of files is shown as text, never as markup or control codes."""

import contextlib
import errno
import functools
import hashlib
import os
import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_ppo.policy import Policy
from lora_ppo.quiz import LETTERS, Quiz, learner_choices, learner_probabilities, quiz_text, readable
from lora_ppo.settings import ConfigError
from lora_ppo.signals import asked_to_leave

COMMANDS = """\
  A B C D      at the quiz: your choice, or type the option's text; s skips it
               (no reward, no step); an empty line shows the options again
  /help        this text
  /progress    how the quizzes went so far
  /quiz        why the last question got no quiz, or not at once
  /undo        undo the last step of this session, exactly
  /save        write a checkpoint now
  /config      every setting as it is in force
  /quit        save and leave, also at the quiz (so does Ctrl-D); Ctrl-C leaves
               where a question is asked for, and else drops the turn"""
BIDI_CONTROLS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
BYTE_ORDER_MARK = "\ufeff"
INPUT_CLOSED = sys.stdin is None  # as the program was started


def clean(text: str) -> str:
    """Untrusted text as a terminal may show it: no control, escape or bidirectional-override characters."""
    keep = (c for c in text if c in "\n\t" or (unicodedata.category(c) != "Cc" and c not in BIDI_CONTROLS))
    return "".join(keep)


def program(main: Callable[..., int]) -> Callable[..., int]:
    """A program's `main` that tells in one line what can't be used (exit status 2), and ends with 130 after Ctrl-C."""

    @functools.wraps(main)
    def told(*arguments: Any, **options: Any) -> int:
        try:
            return main(*arguments, **options)
        except ConfigError as error:
            print(f"error: {clean(str(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            return 130

    return told


def as_typed(line: str) -> str:
    """A line from a person without the marks that keyboards of right-to-left scripts put in, and editors before it."""
    return "".join(c for c in line if c not in BIDI_CONTROLS and c != BYTE_ORDER_MARK).strip()


class Output:
    """Standard output. Once whoever read it is gone, what is still to come goes nowhere, and the program leaves."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with self.watched():
            self.stream.write(text)

    def flush(self) -> None:
        with self.watched():
            self.stream.flush()

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """A reader or a terminal that is gone asks the program to leave, as a signal does: not within a turn."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            signal.raise_signal(signal.SIGTERM)


class Terminal:
    """Reads lines (with history and editing at a terminal, plainly from a pipe) and writes untrusted text safely."""

    waits_for_a_person = True

    def __init__(self, history: Path | None):
        from rich.console import Console

        for stream in (sys.stdin, sys.stdout):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(encoding="utf-8", errors="replace")
        self.console = Console(file=Output(sys.stdout), highlight=False, markup=False, emoji=False)
        self.interactive = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self.prompter, self.prompting = None, False
        self.column, self.word = 0, ""  # where the line is that is being written; the word that is not whole yet
        if self.interactive and history:
            from prompt_toolkit import PromptSession
            from prompt_toolkit.completion import WordCompleter
            from prompt_toolkit.history import FileHistory, InMemoryHistory
            from prompt_toolkit.key_binding import KeyBindings

            class KeptHistory(FileHistory):
                def store_string(self, string: str) -> None:
                    with contextlib.suppress(OSError):  # a full disk costs the line's history, not the session
                        super().store_string(string)

            try:
                history.parent.mkdir(parents=True, exist_ok=True)
                history.touch()
                kept = KeptHistory(str(history))
            except OSError:
                kept = InMemoryHistory()
            self.keys = {"completer": WordCompleter(re.findall(r"/\w+", COMMANDS), sentence=True)}
            self.keys |= {"complete_while_typing": False, "enable_suspend": True}  # Tab; Ctrl-Z
            self.keys |= {"key_bindings": KeyBindings()}
            self.keys["key_bindings"].add("c-\\")(lambda event: event.app.exit(exception=EOFError))
            self.prompter = PromptSession(history=kept, **self.keys)
            if hasattr(self.prompter.input, "stdin_reader"):  # bytes that are no UTF-8 are replaced, as in a pipe
                from prompt_toolkit.input.posix_utils import PosixStdinReader

                self.prompter.input.stdin_reader = PosixStdinReader(sys.stdin.fileno(), errors="replace")

    @contextlib.contextmanager
    def keys_kept(self) -> Iterator[None]:
        """What is typed while the tutor speaks, Ctrl-D too, waits in here for the next prompt, and does not show."""
        try:
            import termios
        except ImportError:  # Windows
            yield
            return
        if not self.interactive:
            yield
            return
        before = termios.tcgetattr(sys.stdin)
        kept = [*before[:3], before[3] & ~(termios.ICANON | termios.ECHO), *before[4:]]
        termios.tcsetattr(sys.stdin, termios.TCSANOW, kept)
        try:
            yield
        finally:
            with contextlib.suppress(termios.error):  # the terminal may be gone
                termios.tcsetattr(sys.stdin, termios.TCSANOW, before)

    def say(self, text: str, style: str | None = None) -> None:
        self.console.print(clean(text), style=style, soft_wrap=not self.interactive)  # in a pipe no line is broken
        self.column, self.word = 0, ""

    def write(self, text: str) -> None:
        """Text without a line's end, shown at once."""
        from rich.cells import cell_len

        self.console.print(clean(text), end="", soft_wrap=True)
        self.console.file.flush()
        self.column = cell_len(text.rpartition("\n")[2]) + (0 if "\n" in text else self.column)

    def stream(self, text: str) -> None:
        """The next piece of an answer. At a terminal a word that no longer fits goes to the next line whole."""
        from rich.cells import cell_len

        if not self.interactive:
            self.write(text)
            return
        *words, self.word = re.split(r"(?<=\s)", self.word + clean(text))
        for word in words:
            if self.column and self.column + cell_len(word.rstrip()) > self.console.width:
                self.write("\n")
            self.write(word)

    def end_stream(self, text: str = "") -> None:
        """Ends the answer, and its line with `text`."""
        if self.interactive:
            self.stream(" ")  # the last word is whole
        self.say(text)

    def ask(self, prompt: str, remember: bool = True) -> str:
        """A line from the person. Raises EOFError at the end of input and KeyboardInterrupt on Ctrl-C."""
        if asked_to_leave:
            raise EOFError
        if self.prompter is None:
            self.write(prompt)
            line = ""
            with contextlib.suppress(OSError):  # of an input that is no longer there
                line = sys.stdin.readline()
            if not line:
                self.say("")
                raise EOFError
            self.say(line.strip())  # the pipe's text is part of the transcript
            return as_typed(line)
        from prompt_toolkit import prompt as ask_once
        from prompt_toolkit.application import get_app

        def leave_if_asked() -> None:
            if asked_to_leave:
                get_app().exit(exception=EOFError)

        line, how = "", {"pre_run": leave_if_asked}
        self.prompting = True
        try:
            with self.console.file.watched():
                line = self.prompter.prompt(prompt, **how) if remember else ask_once(prompt, **self.keys, **how)
        finally:
            self.prompting = False
        if asked_to_leave:
            raise EOFError
        return as_typed(line)

    def end_prompt(self) -> bool:
        """Ends the prompt that is shown as Ctrl-D does, from a signal's handler; False where none is."""
        if self.prompting:
            from prompt_toolkit.application import get_app

            app = get_app()
            if app.future and app.loop:  # else `leave_if_asked` ends it as it begins
                with contextlib.suppress(RuntimeError):  # it has ended
                    app.loop.call_soon_threadsafe(lambda: app.future.done() or app.exit(exception=EOFError))
        return self.prompting

    def choose(self, quiz: Quiz, answer: str | None, prompt: str = "Your choice (A-D, s skips): ") -> int | str:
        """The person's choice: an option's index, or "skip". Raises EOFError where they leave."""
        while True:
            text = self.ask(prompt, remember=False)
            choice = parse_choice(text, quiz.options)
            if choice is not None:
                return choice
            if text.lower() == "/quit":
                raise EOFError
            if not text:
                self.say(f"\n{quiz_text(quiz.question, quiz.options)}", "bold")
            elif text.lower() == "/help":
                self.say(COMMANDS)
            else:
                self.say("Please choose A, B, C or D, type the option's text, or s to skip.")

    @contextlib.contextmanager
    def busy(self, text: str) -> Iterator[Callable[[str], None]]:
        """Shows `text` and a spinner at a terminal; what it gives shows another text."""
        if not self.interactive:
            yield lambda text: None
            return
        with self.console.status(text) as status:
            yield status.update


def parse_choice(text: str, options: Sequence[str]) -> int | str | None:
    """The index of the chosen option, "skip", or None if `text` is no choice. Letters come before options' texts."""
    text, *texts = (visible(each).casefold() for each in (text, *options))
    if text == "s":
        return "skip"
    letter = text.rstrip(").") if len(text) < 3 else text
    if len(letter) == 1 and letter in LETTERS.casefold():
        return LETTERS.casefold().index(letter)
    return texts.index(text) if text in texts else None


def visible(text: str) -> str:
    """`text` without formatting characters, which nobody sees (joiners, marks of direction, spaces of no width)."""
    return "".join(c for c in text if unicodedata.category(c) != "Cf").strip()


class SimulatedLearner(Terminal):
    """Sits at the tutor in a person's place: asks the questions of a list, and chooses by what the answers say."""

    waits_for_a_person = False  # it thinks with the policy's own base model

    def __init__(self, policy: Policy, questions: Sequence[str], steps: int, before: dict[str, Any] | None = None):
        """`before` is the `place` that the session before this one had reached: if that was not over, it goes on."""
        super().__init__(None)
        self.policy, self.questions = policy, questions
        these = hashlib.sha256("\n".join(questions).encode()).hexdigest()
        fresh = {"questions": these, "start": policy.step, "steps": steps, "asked": 0, "chosen": 0}
        over = not before or before["questions"] != these or policy.step >= before["start"] + before["steps"]
        if not over and before["asked"] and before["asked"] % len(questions) == before["chosen"] == 0:
            over = True  # it had given up
        if not over and before["asked"] % len(questions) == 0 and before.get("step_before") == policy.step:
            over = True  # it had given up, too
        # Questions asked; choices made since the first of them was asked last.
        self.place = fresh if over else before | {"steps": steps}

    def ask(self, prompt: str, remember: bool = True) -> str:
        """The next question, over and over, until the steps are taken; then EOFError, as when a person leaves."""
        place = self.place
        if self.policy.step >= place["start"] + place["steps"]:
            raise EOFError
        if place["asked"] % len(self.questions) == 0:
            if place["asked"] and not place["chosen"]:
                self.say("\nNot one of the questions led to a quiz.", "yellow")
                raise EOFError
            enough = place["asked"] and place["chosen"] >= self.policy.config.batch_size
            if enough and not self.policy.config.pretest and place.get("step_before") == self.policy.step:
                self.say("\nNot one step could be taken on these questions.", "yellow")
                raise EOFError
            place |= {"chosen": 0, "step_before": self.policy.step}
        question = self.questions[place["asked"] % len(self.questions)]
        place["asked"] += 1
        self.say(f"{prompt}{question}")
        return question

    def choose(self, quiz: Quiz, answer: str | None, prompt: str = "") -> int | str:
        if readable(self.policy, "", quiz) is None:
            self.say("The quiz is too long for the learner's context.")
            return "skip"
        read, unread = learner_probabilities(self.policy, [answer or ""], [quiz])
        guess = answer is None  # before there is an answer; an empty one teaches nothing
        choice = unread[0].argmax().item() if guess else learner_choices(read, unread)[0]
        self.say(f"The learner chooses {LETTERS[choice]}.")
        self.place["chosen"] += 1
        return choice


def read_questions(path: str) -> list[str]:
    """The questions of a text file, one a line; empty lines don't count. Raises ConfigError naming file and line."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise ConfigError(f"questions={path}: {error.strerror or error}") from None
    questions = []
    for number, line in enumerate(lines, 1):
        try:
            questions.append(as_typed(line.decode("utf-8")))
        except UnicodeDecodeError:
            raise ConfigError(f"questions={path}: line {number} is not UTF-8 text") from None
        if control := [c for c in questions[-1] if c != "\t" and unicodedata.category(c) == "Cc"]:
            raise ConfigError(f"questions={path}: line {number} holds the control character U+{ord(control[0]):04X}")
    questions = [question for question in questions if question]
    if not questions:
        raise ConfigError(f"questions={path} holds no question: write one per line")
    return questions


def progress_chart(
    right: Sequence[bool], rewards: Sequence[float], columns: int = 60, rows: int = 5, window: int = 10
) -> str:
    """Accuracy over the last `window` quizzes, drawn over all of them, and the totals."""
    if not rewards:
        return "No quiz was answered yet."
    means = [sum(right[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(right))]
    width = min(columns, len(means))
    points = [means[(i + 1) * len(means) // width - 1] for i in range(width)]
    lines = []
    for row in reversed(range(rows)):
        least = 0 if row else 1  # a share of 0 is to be seen too
        cells = [" ▁▂▃▄▅▆▇█"[max(round(min(max(p * rows - row, 0.0), 1.0) * 8), least)] for p in points]
        share = (row + 1) / rows
        lines.append(f"{100 * share:>4.0f} % {''.join(cells)}".rstrip())
    mean_reward = sum(rewards) / len(rewards)
    last = rewards[-window:]
    return "\n".join(
        [
            f"right choices, running over {window} quizzes",
            *lines,
            "       1" + (f"{len(rewards):>{width - 1}}" if width > 4 else ""),
            f"accuracy {sum(right) / len(right):.0%} of {len(right)}, mean reward {mean_reward:+.2f}; "
            f"last {len(last)}: {sum(right[-window:]) / len(last):.0%}, {sum(last) / len(last):+.2f}",
        ]
    )
