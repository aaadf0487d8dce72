"""What a person's keyboard may send: bytes that are no text, marks that nobody sees; and an input that is closed."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.session import log_lines

from lora_ppo.terminal import as_typed

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("shell", ["<&-", "<&- >&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_without_an_input_there_is_one_line_and_nothing_is_loaded(llama, tmp_path, shell):
    command = f"{sys.executable} {ROOT / 'lora_ppo_demo.py'} model_name={llama} device=cpu {shell}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    if "2>" not in shell:
        assert (result.stdout, result.stderr.count("\n")) == ("", 1)
        assert result.stderr.startswith("error: standard input is closed")
        assert "learner=simulated" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_an_input_a_simulated_learner_learns(llama, tmp_path):
    (tmp_path / "questions.txt").write_text("What is 7 + 5?\n")
    command = f"{sys.executable} {ROOT / 'lora_ppo_demo.py'} model_name={llama} device=cpu max_new_tokens=6"
    command += " learner=simulated questions=questions.txt steps=1 <&-"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "You: What is 7 + 5?" in result.stdout


def test_an_input_that_can_not_be_read_is_at_its_end(llama, tmp_path):
    command = f"{sys.executable} {ROOT / 'lora_ppo_demo.py'} model_name={llama} device=cpu 0> write_only"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "You: " in result.stdout


@pytest.mark.parametrize(
    ("typed", "question"),
    [
        (b"caf\xe9 ?", "caf\ufffd ?"),  # Latin-1
        (b"\xff\xfe!", "\ufffd\ufffd!"),
        (b"half \xc3", "half \ufffd"),
        (b"\xed\xb3\xbf.", "\ufffd\ufffd\ufffd."),  # half of a surrogate pair
        ("é日本 😀".encode(), "é日本 😀"),
        ("\u200fשלום\u2068 abc\u2069".encode(), "שלום abc"),
        (b"\xef\xbb\xbfeven", "even"),
    ],
)
@pytest.mark.parametrize("pasted", [False, True])
def test_bytes_at_a_terminal_are_read_as_in_a_pipe(at_terminal, play, monkeypatch, tmp_path, typed, question, pasted):
    line = b"\x1b[200~" + typed + b"\x1b[201~" if pasted else typed
    script = [("You:", line + b"\r"), ("Your choice", b"alpha\r"), ("You:", b"\x04")]
    status, screen, _, (before, after) = at_terminal(script)
    assert (status, before) == (0, after)
    assert "Traceback" not in screen
    assert [line["question"] for line in log_lines()] == [question]
    assert as_typed(Path("logs/history").read_text(encoding="utf-8")).endswith(question)
    with (tmp_path / "lines").open("wb") as file:
        file.write(typed + b"\nalpha\n")
    with (tmp_path / "lines").open(encoding="utf-8") as lines:
        monkeypatch.setattr(sys, "stdin", lines)
        play(None, resume="none")
    assert [line["question"] for line in log_lines()] == [question, question]
