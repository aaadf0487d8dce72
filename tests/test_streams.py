"""Streams, full disks, names and modes of files, runs that are stopped: nothing is lost, no traceback is seen."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.session import log_lines, same, turns, weights
from support.tiny import tiny_policy

import evaluate
import lora_ppo_demo as demo
from config import Config
from lora_ppo.checkpoint import checkpoints, save_checkpoint
from lora_ppo.files import replace_file
from lora_ppo.journal import LineFile
from lora_ppo.quiz import Quiz, learner_choices, learner_probabilities
from lora_ppo.run import Run
from lora_ppo.settings import PATHS, ConfigError, parse, save_yaml
from lora_ppo.step import StepSkipped
from lora_ppo.terminal import SimulatedLearner
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
NOT_UTF8 = os.fsdecode(b"caf\xe9")
NAMES = ("模型_ü", "\U0001f600 smile", NOT_UTF8, "a${b}", "???", "line\nbreak", "[x, y]", 'it\'s "quoted"', "e\u0301")


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


# ------------------------------------------------------------------------------------------------- a simulated learner


class Killed(BaseException):
    pass


@pytest.fixture
def questions(tmp_path) -> Path:
    """Five questions: one is too long for the model, one is a command."""
    path = tmp_path / "questions.txt"
    path.write_text("one\nsecond one\n" + "word " * 1500 + "\n/progress\nthird question\n")
    return path


def killed(play, turn: int, **settings) -> None:
    """Plays until turn `turn` is to be made durable."""
    real = Run.finish_turn

    def finish(run, turn_, line):
        if run.turn >= turn:
            raise Killed
        return real(run, turn_, line)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish_turn", finish)
        patch.setattr(Run, "abandon", lambda run, number, again=False: None)
        with pytest.raises(Killed):
            play([], learner="simulated", **settings)


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("kills", [(3,), (1, 4, 5), (0, 2, 3)])
def test_a_simulated_run_that_was_killed_is_the_run_that_would_have_been(play, questions, kills, batch_size):
    settings = {"questions": questions, "steps": 6, "save_every": 3, "batch_size": batch_size}
    _, _, whole = play([], learner="simulated", checkpoint_dir="whole", log_dir="whole_log", **settings)
    assert whole.policy.step == 6
    for kill in kills:
        killed(play, kill, **settings)
    _, _, run = play([], learner="simulated", **settings)
    assert run.policy.step == 6
    assert same(weights(run), weights(whole))
    assert [line["question"] for line in log_lines()] == [line["question"] for line in whole.history()]


def test_a_simulated_run_that_is_over_is_followed_by_another(play, questions):
    settings = {"questions": questions, "steps": 2}
    play([], learner="simulated", checkpoint_dir="whole", log_dir="whole_log", **settings)
    killed(play, 1, **settings)
    for end in (2, 4):
        _, _, run = play([], learner="simulated", **settings)
        assert run.policy.step == end
    _, _, again = play([], learner="simulated", checkpoint_dir="whole", log_dir="whole_log", **settings)
    assert same(weights(run), weights(again))


def test_a_simulated_run_in_which_no_step_can_be_taken_ends(play, questions, monkeypatch):
    def skipped(*_):
        raise StepSkipped("out of memory")

    monkeypatch.setattr("lora_ppo_demo.ppo_step", skipped)
    status, output, run = play([], learner="simulated", questions=questions, steps=4, precompute=False)
    assert (status, run.policy.step) == (0, 0)
    assert "Not one step could be taken on these questions." in output


def test_an_empty_answer_is_not_rewarded_for_what_the_learner_knows_without_it(llama):
    policy = tiny_policy(llama)
    learner = SimulatedLearner(policy, ["What?"], 1)
    quizzes = [Quiz("Which?", ("a", "b", "c", "d"), 0), Quiz("Which?", ("d", "c", "b", "a"), 0)]
    known = [learner.choose(quiz, None) for quiz in quizzes]
    read, unread = learner_probabilities(policy, ["", ""], quizzes)
    assert known == unread.argmax(-1).tolist()
    assert [learner.choose(quiz, "") for quiz in quizzes] == learner_choices(read, unread)
    assert known != learner_choices(read, unread)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_simulated_run_that_was_stopped_goes_on_with_the_question_it_was_at(play, questions, number, batch_size):
    settings = {"learner": "simulated", "questions": questions, "steps": 4, "batch_size": batch_size}
    _, _, whole = play([], checkpoint_dir="whole", log_dir="whole_log", **settings)
    for stop in (1, 4):
        real = SimulatedLearner.choose

        def choose(learner, quiz, answer, stop=stop, real=real):
            if learner.place["asked"] > stop:
                signal.raise_signal(number)
            return real(learner, quiz, answer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SimulatedLearner, "choose", choose)
            status, _, run = play([], **settings)
        assert (status, run.policy.step < 4) == (0, True)
    _, _, run = play([], **settings)
    assert run.policy.step == 4
    assert same(weights(run), weights(whole))
    assert [line["question"] for line in log_lines()] == [line["question"] for line in whole.history()]


@pytest.mark.parametrize(("changes", "step", "first"), [
    ({"steps": 5}, 5, "third question"),  # the same run, longer
    ({"questions": "other.txt"}, 6, "something else"),  # another one of four steps
])  # fmt: skip
def test_more_steps_prolong_a_simulated_run_and_other_questions_begin_one(play, questions, changes, step, first):
    Path("other.txt").write_text("something else\n")
    killed(play, 2, questions=questions, steps=4)
    _, output, run = play([], **{"learner": "simulated", "questions": questions, "steps": 4} | changes)
    last = output.rpartition("model    ")[2].splitlines()  # the killed session's output is in front
    asked = [line[5:] for line in last if line.startswith("You: ") and "word" not in line]
    assert next(line for line in asked if line != "/progress") == first
    assert run.policy.step == step


def test_a_person_ends_a_simulated_run(play, questions):
    killed(play, 2, questions=questions, steps=4)
    play(turns(1))
    _, _, run = play([], learner="simulated", questions=questions, steps=4)
    assert run.policy.step == 2 + 1 + 4


# ----------------------------------------------------------------------------------------------------------- full disks


def full(action, when):
    def failing(*arguments, **options):
        if when():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return action(*arguments, **options)

    return failing


def test_a_full_disk_gets_room_from_the_oldest_checkpoints(play, monkeypatch):
    play(turns(4), save_every=1)
    tight = full(save_checkpoint, lambda: len(checkpoints(Path("checkpoints"))) > 3)
    monkeypatch.setattr("lora_ppo.run.save_checkpoint", tight)
    status, output, run = play(turns(2, first=4), save_every=1)
    assert status == 0
    assert "The disk is full: removed checkpoints/step_0 to make room." in output
    names = [p.name for p in checkpoints(Path("checkpoints"))]
    assert names[:1] == ["step_6"]
    assert "step_4" in names  # it was resumed from
    _, _, again = play([])
    assert same(weights(again), weights(run))


def test_a_full_disk_without_spare_checkpoints_is_told_at_the_end_and_exits_with_1(play, monkeypatch):
    play(turns(1), save_every=1)
    monkeypatch.setattr("lora_ppo.run.save_checkpoint", full(save_checkpoint, lambda: True))
    real, refuse = LineFile.flush, []
    monkeypatch.setattr(LineFile, "flush", full(real, lambda: bool(refuse)))
    record = Run.record
    monkeypatch.setattr(
        Run, "record", lambda run, it: (refuse.append(1) if it.get("number") == 2 else 0, record(run, it))
    )
    status, output, run = play(turns(3, first=1), save_every=1)
    assert (status, run.policy.step) == (1, 4)
    assert output.rstrip().endswith("what was learned since step 2 is lost.")


def test_what_is_said_to_be_lost_is_what_does_not_come_back(play, monkeypatch, tmp_path):
    play(turns(1), save_every=1)
    with monkeypatch.context() as patch:
        patch.setattr("lora_ppo.run.save_checkpoint", full(save_checkpoint, lambda: True))
        status, output, run = play(turns(2, first=1), save_every=1)
    assert status == 0  # the journal has it all
    assert "is lost" not in output
    _, _, again = play([])
    assert same(weights(again), weights(run))


def test_a_checkpoint_keeps_what_the_journal_and_the_log_can_not_take(play):
    play(turns(1), save_every=1)
    shutil.rmtree("logs")
    Path("logs").write_text("in the way")
    Path("checkpoints/journal.jsonl").rename("kept")
    Path("checkpoints/journal.jsonl").symlink_to("/dev/full")
    status, output, run = play(turns(2, first=1), save_every=1)
    assert status == 0  # the checkpoint has it
    assert "Could not write the journal" in output
    Path("checkpoints/journal.jsonl").unlink()
    Path("kept").rename("checkpoints/journal.jsonl")
    Path("logs").unlink()
    _, output, again = play([])
    assert "does not reach step 3: going on from there" in output
    assert same(weights(again), weights(run))
    assert [line["step"] for line in log_lines()] == [2, 3]


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "text"
    replace_file(path, b"old")
    monkeypatch.setattr(Path, "write_bytes", full(Path.write_bytes, lambda: True))
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("shell", "status", "words"), [
    (">/dev/full", 1, "error: [Errno 28] No space left on device"),
    (">/dev/full 2>/dev/full", 1, ""),
    (">&-", 0, ""),
    (">&- 2>&-", 0, ""),
    ("2>/dev/full checkpoint_dir=", 2, ""),
    (">/dev/full --help", 1, "error: [Errno 28] No space left on device"),
])  # fmt: skip
def test_the_tutor_and_its_output(llama, tmp_path, shell, status, words):
    command = f"printf 'hi\\n/quit\\n' | {sys.executable} {ROOT / 'lora_ppo_demo.py'} model_name={llama} device=cpu"
    done = subprocess.run(["bash", "-c", f"{command} {shell}"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (status, words)
    for path in tmp_path.rglob("*"):
        assert path.suffix not in (".jsonl", ".log") or b"Tutor" not in path.read_bytes()


def program(
    name: str, *arguments: str, shell: str = "", folder: Path, **environment: str
) -> subprocess.CompletedProcess:
    """train.py or evaluate.py on the stand-in task, as a user runs them."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import train, {name}\n"
    code += "from support.evaluation import Letters; from lora_ppo.streams import run_program\n"
    code += f"train.TASKS['letters'] = lambda config: Letters; sys.exit(run_program({name}.main))"
    command = [sys.executable, "-c", code, "task=letters", "device=cpu", "max_new_tokens=6", *arguments]
    whole = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(whole, cwd=folder, capture_output=True, env=os.environ | environment, timeout=300)


def test_training_writes_its_report_whatever_its_output_meets(llama, tmp_path):
    settings = [f"model_name={llama}", "samples_per_epoch=4", "batch_size=4", "mini_batch_size=4", "eval_samples=2"]
    done = program("train", *settings, shell=">/dev/full 2>/dev/full", folder=tmp_path)
    assert done.returncode == 0
    assert (tmp_path / "runs/train/report.html").exists()


@pytest.mark.parametrize(("shell", "status"), [("", 0), (">/dev/full", 1), (">&-", 0)])
def test_results_are_on_disk_before_they_are_shown_in_any_encoding(llama, tmp_path, shell, status):
    name = "模型_ü\U0001f600"
    save_checkpoint(tmp_path / name, tiny_policy(llama), {}, "A test.")
    done = program(
        "evaluate", f"model_name={llama}", "num_samples=6", "--adapter", name,
        shell=shell, folder=tmp_path, PYTHONIOENCODING="ascii",
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert b"Traceback" not in done.stdout + done.stderr
    if not shell:
        assert rb"\u6a21\u578b_\xfc" in done.stdout
    record = json.loads((tmp_path / "evaluation.json").read_text("ascii"))
    assert record["models"][1]["name"] == name


def test_training_that_can_not_save_its_last_checkpoint_exits_with_1(train_py, monkeypatch):
    monkeypatch.setattr("lora_ppo.trainer.save_checkpoint", full(save_checkpoint, lambda: Path("out/step_0").exists()))
    status, output = train_py(output_dir="out")
    assert status == 1
    assert "could not be written to: the last checkpoint lost" in output
    assert Path("out/report.html").exists()


def test_a_damaged_training_log_is_named_and_the_run_goes_on(train_py):
    train_py(output_dir="out")
    log = Path("out/train.log")
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"\r\n".join([lines[0].strip(), b"\xff", *map(bytes.strip, lines[1:]), b""]))
    status, output = train_py(output_dir="out", num_epochs=2, resume_from="latest")
    assert status == 0
    assert "left out what can't be read: line 2." in output
    assert [json.loads(line)["step"] for line in log.read_bytes().splitlines()] == [*range(7)]


# -------------------------------------------------------------------------------------------------- modes and names


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o077, 0o600), (0o022, 0o644)])
def test_every_file_has_the_mode_that_the_umask_says(play, llama, tmp_path, monkeypatch, capsys, mask, mode):
    os.umask(mask)
    play(turns(1), save_every=1)
    words = {"mode": "merge", "merged_model_path": "merged", "adapter": "checkpoints/step_1", "dtype": "float32"}
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(f"{k}={v}" for k, v in words.items()), "device=cpu"])
    assert evaluate.main() == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {".lock", "journal.jsonl", "run.log", "adapter_model.safetensors", "optimizer.safetensors"} <= {
        path.name for path in files
    }
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {path.name: oct(mode) for path in files}
    assert (tmp_path / "merged" / "model.safetensors") in files


@pytest.mark.parametrize("name", NAMES)
def test_any_name_works_in_every_path_of_the_tutor(play, llama, tmp_path, name):
    os.mkdir(name)
    shutil.copytree(llama, f"{name}/model")
    shutil.copy(llama / "prompts.yaml", f"{name}/p.yaml")
    paths = {"model_name": f"{name}/model", "checkpoint_dir": f"{name}/c", "log_dir": f"{name}/l"}
    paths |= {"prompts": f"{name}/p.yaml"}
    status, output, run = play(turns(2), **paths)
    assert status == 0, output
    assert not run.unsafe
    wanted = weights(run)
    settings = f"{name}/c/effective_config.yaml"
    assert parse(Config, ["--config", settings]) == run.config
    sys.argv = ["lora_ppo_demo.py", f"--config={settings}"]
    assert demo.main() == 0
    _, output, run = play([], **paths, resume=f"{name}/c/step_2")
    assert same(weights(run), wanted)
    for path in Path(name).rglob("*.md"):
        path.read_text("utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_any_name_works_in_every_setting_from_every_source(tmp_path, name):
    for schema in (TrainConfig, evaluate.EvaluateConfig, Config):
        there = [f for f in PATHS if hasattr(schema(), f)]
        default = schema(**({"learner": "simulated"} if schema is Config else {}))
        for setting in there:
            value = [name, f"x{name}"] if setting == "adapter" else name
            if setting != "adapter":
                assert getattr(parse(schema, [f"{setting}={name}"]), setting) == value
                assert getattr(parse(schema, [f"--{setting}", name]), setting) == value
            assert getattr(parse(schema, [], {setting: value}), setting) == value
            setattr(default, setting, value)
        if schema is Config:
            default.questions = name
        path = tmp_path / "settings.yaml"
        save_yaml(default, path)
        assert parse(schema, ["--config", str(path)]) == default
        if name.isprintable() or name == NOT_UTF8:
            raw = f"{there[0]}: {name}\n" if name == NOT_UTF8 else yaml.safe_dump({there[0]: name}, allow_unicode=True)
            path.write_bytes(os.fsencode(raw))  # as a person writes it
            assert getattr(parse(schema, ["--config", str(path)]), there[0]) == name


@pytest.mark.parametrize("name", [*NAMES[:4], "comma, and ] bracket"])
def test_adapters_with_any_name_are_measured_and_merged(run, llama, tmp_path, name):
    sys.stdout.reconfigure(errors="backslashreplace")  # as the program begins
    save_checkpoint(tmp_path / name, tiny_policy(llama), {}, "A test.")
    status, output, record = run("--adapter", name, f"merged_model_path={name}_merged", "mode=both")
    assert status == 0, output
    assert record["models"][1]["folder"] == name
    assert (tmp_path / f"{name}_merged" / "model.safetensors").exists()
    status, output, record = run("--adapter", name, f"merged_model_path={name}_merged", "--use_merged_model")
    assert [model["name"] for model in record["models"]] == ["base", name, "merged"]


@pytest.mark.parametrize("source", ["yaml", "argument", "default"])
def test_the_home_folder_is_expanded_in_every_path_from_every_source(tmp_path, monkeypatch, source):
    monkeypatch.setenv("HOME", "/home/somebody")
    for schema in (TrainConfig, evaluate.EvaluateConfig, Config):
        for setting in (f for f in PATHS if hasattr(schema(), f)):
            value = ["~/x", "~", "y"] if setting == "adapter" else "~/x"
            wanted = ["/home/somebody/x", "/home/somebody", "y"] if setting == "adapter" else "/home/somebody/x"
            if source == "yaml":
                (tmp_path / "s.yaml").write_text(yaml.safe_dump({setting: value}))
                found = parse(schema, ["--config", str(tmp_path / "s.yaml")])
            elif source == "argument":
                found = parse(schema, [f"{setting}=[~/x, '~', y]" if setting == "adapter" else f"{setting}=~/x"])
            else:
                field = schema.__dataclass_fields__[setting]
                monkeypatch.setattr(field, "default", value) if setting != "adapter" else None
                monkeypatch.setattr(
                    field, "default_factory", lambda value=value: value
                ) if setting == "adapter" else None
                found = parse(schema, [])
            assert getattr(found, setting) == wanted


def test_the_settings_file_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.yaml").write_text("seed: 7\n")
    assert parse(Config, ["--config=~/s.yaml"]).seed == 7


@pytest.mark.parametrize("value", ["a\0b", "\ud83d", "~/\ud800"])
def test_what_no_file_can_be_called_is_refused(value):
    with pytest.raises(ConfigError, match="no file can have this name"):
        parse(Config, [f"log_dir={value}"])
