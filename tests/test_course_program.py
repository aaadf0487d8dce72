"""`python -m exercises` as a learner runs it: the walk, the toy, the notebook, training with one's own functions."""

import json
from pathlib import Path

import pytest

from exercises import notebook, pictures, toy
from exercises.__main__ import main
from exercises.cases import FUNCTIONS
from exercises.harness import made
from lora_ppo import functions, ppo
from lora_ppo.settings import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SOLUTIONS = (ROOT / "exercises/solutions.py").read_text(encoding="utf-8")
WRONG_SIGN = (ROOT / "exercises/wrong_sign.py").read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------- the program
def test_untouched_blanks_fail_all_six(capsys):
    assert main([]) == 1
    output = capsys.readouterr().out
    assert output.count("not filled in yet") == 6
    assert "0 of 6 pass" in output
    assert "exercise 0, chosen_logprobs" in output


def test_the_solutions_pass_all_six_as_json(capsys):
    assert main(["--json", "--file", str(ROOT / "exercises/solutions.py")]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["exercise"] for row in rows] == list(range(6))
    assert all(row["passed"] and row["mistake"] is None for row in rows)


def test_a_file_half_way_says_what_is_wrong_in_json_and_on_the_screen(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(WRONG_SIGN + "print('hello')\n\n\ndef entropy(*given):\n    raise NotImplementedError\n")
    assert main(["--json", "--file", str(file)]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["passed"] for row in rows] == [True, False, True, False, True, True]
    assert rows[1]["mistake"].startswith("The sign")
    assert rows[1]["got"]["loss"] == pytest.approx(-rows[1]["expected"]["loss"])
    gradients = [rows[1][side]["gradient of logprobs"] for side in ("got", "expected")]
    assert gradients[0] != gradients[1]
    assert rows[3]["mistake"] == "Not filled in yet."
    assert main(["--file", str(file)]) == 1
    output = capsys.readouterr().out
    assert "4 of 6 pass" in output
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no file"),
        ("def broken(:\n", "line 1, is no Python"),
        ("import nothing_like_it\n", "can't be imported (ModuleNotFoundError"),
        ("raise SystemExit(3)\n", "can't be imported (SystemExit"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_status_2(tmp_path, capsys, text, words):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    assert main(["--file", str(file)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_pytest_checks_the_learners_file_and_with_solutions_the_librarys(monkeypatch, capsys):
    """In this process, where torch is loaded."""
    monkeypatch.chdir(ROOT)
    assert pytest.main(["exercises", "-p", "no:xdist", "-p", "no:cacheprovider"]) == 1
    output = capsys.readouterr().out
    assert "6 failed" in output, output
    assert "Not filled in yet." in output
    assert pytest.main(["exercises", "--solutions", "-p", "no:xdist", "-p", "no:cacheprovider"]) == 0
    assert capsys.readouterr().out.count(".") >= 6


def test_the_walk_is_plain_in_a_pipe_and_at_most_100_columns_wide(capsys):
    assert main(["walk"]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert max(map(len, output.splitlines())) <= 100
    for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns", "ratio", "loss"):
        assert name in output


# ------------------------------------------------------------------------------------------------------ the toy
def reward_at_the_end(rows) -> float:
    return sum(row["reward"] for row in rows[-5:]) / 5


def test_the_toy_learns_and_with_mistakes_in_the_mathematics_it_does_not():
    learned = reward_at_the_end(toy.run(toy.Toy()))
    assert learned > 0.8
    by_name = {f.name: f for f in FUNCTIONS}
    for name, words in (("policy_loss", "The sign:"), ("gae", "delta is V(s)"), ("minibatch_update", "does not step")):
        mistake = next(m for m in by_name[name].mistakes if words in m.sentence)
        with functions.replaced({name: made(by_name[name], mistake)}):
            assert reward_at_the_end(toy.run(toy.Toy())) < 0.0, words
    assert reward_at_the_end(toy.run(toy.Toy())) == learned  # put back


def test_the_toy_says_which_settings_it_has(capsys):
    assert main(["toy", "learning_rat=3"]) == 2
    assert "did you mean learning_rate" in capsys.readouterr().err
    assert main(["toy", "steps=4", "vs", "lam=0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["lam=0.95", "lam=0"]
    assert len(lines) == 2 * len(toy.SHOWN)
    assert max(map(len, lines)) <= 80


def test_the_toy_runs_with_functions_of_ones_own(tmp_path, capsys):
    assert main(["toy", "steps=4", "vs", "functions=exercises.solutions"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines[:2]] == ["lora_ppo.ppo", "exercises.solutions"[:18]]
    assert all(one[2:] == two[2:] for one, two in zip(lines[::2], lines[1::2], strict=True))
    (tmp_path / "mine.py").write_text(WRONG_SIGN)
    assert main(["toy", "steps=30", "vs", f"functions={tmp_path / 'mine.py'}"]) == 0
    library, mine = (line.split() for line in capsys.readouterr().out.splitlines()[:2])
    assert mine[1] == "mine.py"
    assert float(mine[-1]) < 0.0 < float(library[-1])
    assert main(["toy", "functions=exercises.ppo"]) == 2
    assert "still raise NotImplementedError" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- the notebook
def test_the_notebook_is_made_of_the_chapters_and_the_blanks():
    assert (ROOT / "exercises/notebook.ipynb").read_text(encoding="utf-8") == notebook.text_of_notebook()
    for name in ("clip", "gae", "mask"):
        assert (ROOT / f"exercises/pictures/{name}.png").is_file()
        assert len(getattr(pictures, name)().axes) >= 1


SHORT = """
import dataclasses

from exercises import toy

whole = toy.run
toy.run = lambda config: whole(dataclasses.replace(config, steps=8))"""


def test_the_notebook_runs():
    """With blanks each cell says so; then, with the library's functions in their cells, all pass. Plots are drawn.

    The toy's runs are short: how they go is not the notebook's doing.
    """
    import nbformat
    from nbclient import NotebookClient

    made_of = nbformat.reads(notebook.text_of_notebook(), as_version=4)
    made_of.cells[0].source += SHORT
    exercises = [tag for cell in made_of.cells for tag in cell.metadata.get("tags", [])]
    names = [tag.removeprefix("exercise-") for tag in exercises]
    assert names == functions.FUNCTIONS
    filled = [f"from lora_ppo.ppo import {name}\n\ncheck({name})" for name in names]
    comparison = next(cell.source for cell in made_of.cells if "compare(globals())" in cell.source)
    made_of.cells += [nbformat.v4.new_code_cell(source) for source in (*filled, comparison)]
    NotebookClient(made_of, timeout=600, resources={"metadata": {"path": str(ROOT / "exercises")}}).execute()
    outputs = [output for cell in made_of.cells for output in cell.get("outputs", [])]
    # rich prints in a notebook as HTML, with the plain text beside it
    text = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert text.count("Not filled in yet.") == text.count("passes.") == 8
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) == 3 + 2 + 6  # pictures, the comparison with none and with all filled in, the cards


# ------------------------------------------------------------------------------ functions= of train.py
def test_right_functions_give_the_librarys_run_bit_for_bit_and_the_report_has_both(train_py):
    status, output = train_py(functions="exercises.solutions", output_dir="out", ppo_epochs=2)
    assert status == 0, output
    assert "The weights are the baseline's, bit for bit." in output
    for name in ("adapter_model", "value_head", "optimizer"):
        mine, library = (Path("out") / part / f"epoch_1/{name}.safetensors" for part in ("", "library"))
        assert mine.read_bytes() == library.read_bytes()
    assert "bit for bit" in Path("out/report.html").read_text(encoding="utf-8")
    again = train_py(functions="exercises.solutions", output_dir="out", ppo_epochs=2, resume_from="latest")
    assert again[0] == 0


def test_a_wrong_function_gives_another_run_and_the_library_is_put_back(train_py, tmp_path):
    (tmp_path / "mine.py").write_text(WRONG_SIGN)
    before = ppo.policy_loss
    status, output = train_py(functions=tmp_path / "mine.py", output_dir="out")
    assert status == 0, output
    assert "The weights are not the baseline's." in output
    assert ppo.policy_loss is before
    status, output = train_py(functions=tmp_path / "mine.py", output_dir="second", baseline="out/library")
    assert status == 0, output
    assert not Path("second/library").exists()
    assert "The baseline out/library: held-out accuracy" in output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SOLUTIONS.replace("    gae,\n", ""), "lacks gae: it must have chosen_logprobs, "),
        (SOLUTIONS + "\n\ndef helper():\n    pass\n", "adds helper, which is none of the eight"),
        (SOLUTIONS + "\n\ndef gae(*given):\n    raise NotImplementedError\n", "gae still raise"),
        (
            f"import torch\n{SOLUTIONS}\n\n@torch.no_grad()\ndef gae(*given):\n    raise NotImplementedError\n",
            "gae still raise",
        ),
        ("import nothing_like_it\n", "can't be imported"),
    ],
)
def test_a_module_that_does_not_fit_is_refused_in_one_line(train_py, tmp_path, text, words):
    (tmp_path / "mine.py").write_text(text)
    status, output = train_py(functions=tmp_path / "mine.py", output_dir="out")
    assert status == 2
    assert words in output
    assert output.count("\n") == 1
    assert not Path("out").exists()


def test_a_baseline_that_is_no_run_is_refused(train_py):
    status, output = train_py(baseline="nowhere", output_dir="out")
    assert (status, output.count("\n")) == (2, 1)
    assert "baseline=nowhere holds no run" in output


def test_helpers_that_begin_with_an_underscore_are_welcome(tmp_path):
    left = "\n\ndef _helper():\n    return 1\n    raise NotImplementedError\n"  # what is never reached is no blank
    (tmp_path / "mine.py").write_text(
        SOLUTIONS + left + "\n\ndef gae(*given):\n    return 1\n    raise NotImplementedError\n"
    )
    assert list(functions.load_functions(str(tmp_path / "mine.py"))) == functions.FUNCTIONS
    with pytest.raises(ConfigError, match="lacks"):
        functions.load_functions("exercises")


def test_the_library_uses_each_function_that_replaces_one_of_its_own(train_py, tmp_path):
    """Each is called in a run: none is looked up where it can't be replaced."""
    counts = tmp_path / "counts.json"
    (tmp_path / "mine.py").write_text(
        "import json, pathlib\nfrom lora_ppo import ppo as _ppo\n_calls = {}\n\n\n"
        "def _counted(name, right):\n    def function(*given):\n        _calls[name] = _calls.get(name, 0) + 1\n"
        f"        pathlib.Path({str(counts)!r}).write_text(json.dumps(_calls))\n        return right(*given)\n"
        "    return function\n\n\nfor _name in ('chosen_logprobs policy_loss value_loss entropy compute_rewards gae '"
        "'ppo_losses minibatch_update').split():\n    vars()[_name] = _counted(_name, getattr(_ppo, _name))\n"
    )
    status, output = train_py(functions=tmp_path / "mine.py", output_dir="out", baseline="none")
    assert status == 0, output
    assert sorted(json.loads(counts.read_text())) == sorted(functions.FUNCTIONS)
