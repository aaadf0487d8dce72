"""train.py as a user runs it: logs, checkpoints, resuming, refusals."""

import json
import os
import signal
from pathlib import Path

import filelock
import pytest
import torch
from safetensors.torch import load_file
from support.echo import EchoTask
from support.training import ROOT, loaded, run_out_of_memory, same

import lora_ppo.trainer
import train
from lora_ppo.checkpoint import verify_checkpoint
from lora_ppo.episodes import Outcome, play
from lora_ppo.settings import ConfigError, parse
from lora_ppo.signals import stop_requests
from lora_ppo.trainer import Training
from lora_ppo.watching import in_short, without_contrast


def log(folder: str) -> list[dict]:
    """The log without what a clock says."""
    lines = [json.loads(line) for line in (Path(folder) / "train.log").read_text(encoding="ascii").splitlines()]
    clocks = ("timestamp", "seconds", "tokens_per_second")
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


def weights(folder: str) -> dict[str, torch.Tensor]:
    names = ("adapter_model", "value_head", "optimizer")
    return {k: t for name in names for k, t in load_file(Path(folder) / f"{name}.safetensors").items()}


def test_a_run_writes_log_checkpoints_stats_and_report(train_py):
    status, output = train_py(plots=7, output_dir="out", num_epochs=2)
    assert status == 0, output
    lines = log("out")
    assert [line["step"] for line in lines] == list(range(7))
    assert [line["step"] for line in lines if "eval_accuracy" in line] == [0, 3, 6]
    wanted = (
        "reward accuracy kl kl_estimate kl_coef loss policy_loss value_loss entropy clip_fraction grad_norm step_kl"
    )
    assert set(wanted.split()) | {"epoch", "length", "left_out", "outcome"} <= set(lines[1])
    for epoch in (1, 2):
        folder = Path("out") / f"epoch_{epoch}"
        state = verify_checkpoint(folder)
        assert (state["step"], state["epoch"]) == (3 * epoch, epoch)
        stats = json.loads((folder / "training_stats.json").read_text(encoding="utf-8"))
        assert len(stats["training"]["reward"]) == 3 * epoch
        assert len(stats["evaluation"]["accuracy"]) == epoch + 1
        assert "Held-out accuracy" in (folder / "README.md").read_text(encoding="utf-8")
    page = (Path("out") / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 6
    assert page.count("<tr>") == 11
    assert 'src="http' not in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert len(list(Path("out/plots").glob("*.png"))) == 6  # not of a price that stays
    again = parse(train.TrainConfig, ["--config", "out/effective_config.yaml"])
    assert again.num_epochs == 2


@pytest.mark.parametrize("changes", [{}, {"algorithm": "grpo", "group_size": 2, "lora_dropout": 0.2, "ppo_epochs": 2}])
def test_a_run_stopped_in_an_epoch_goes_on_bit_for_bit(train_py, monkeypatch, changes):
    changes |= {"num_epochs": 2, "eval_every": 2, "adaptive_kl": True, "samples_per_epoch": 12}
    train_py(output_dir="whole", **changes)
    real = Training.step

    def interrupted(training):
        if training.policy.step in (1, 7) and "out" in str(training.root):
            os.kill(os.getpid(), signal.SIGINT)
        return real(training)

    monkeypatch.setattr(Training, "step", interrupted)
    status, output = train_py(output_dir="out", **changes)
    assert status == 130
    assert "Stopped after step 2, saved in out/step_2." in output
    assert "resume_from=latest" in output
    with Path("out/train.log").open("a") as file:
        file.write('{"step": 3, "of a run": "that was killed"}\n{"half')
    status, output = train_py(output_dir="out", resume_from="latest", **changes)
    assert f"Resuming from {Path('out/step_2')} at step 2." in output
    if status:
        status, output = train_py(output_dir="out", resume_from="latest", **changes)
    assert status == 0
    assert log("out") == log("whole")
    for epoch in (1, 2):
        assert same(weights(f"out/epoch_{epoch}"), weights(f"whole/epoch_{epoch}"))
    assert Path("out/report.html").read_text() == Path("whole/report.html").read_text()


def test_another_price_of_divergence_counts_from_where_it_is_set(train_py):
    """A coefficient that is steered goes on as it was, unless another beginning is asked for."""
    steered = {"adaptive_kl": True, "kl_horizon": 20, "samples_per_epoch": 12}
    train_py(output_dir="out", kl_coef=0.2, **steered)
    last = log("out")[-1]["kl_coef"]
    assert last != 0.2
    train_py(output_dir="out", kl_coef=0.2, num_epochs=2, resume_from="latest", **steered)
    assert log("out")[4]["kl_coef"] < last  # a step logs the price that it was taken at
    train_py(plots=7, output_dir="out", kl_coef=0.7, num_epochs=3, resume_from="latest", **steered)
    assert log("out")[7]["kl_coef"] == 0.7
    assert Path("out/plots/kl_coef.png").exists()


def test_a_second_ctrl_c_ends_at_once_and_saves_nothing_half_done(train_py, monkeypatch):
    def learn(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr("lora_ppo.trainer.learn", learn)
    status, output = train_py(output_dir="out")
    assert status == 130
    assert "Stopped at once. To go on: python train.py" in output
    assert [path.name for path in Path("out").glob("*_*/")] == ["step_0"]  # what resume_from=latest goes on from
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_ends_at_its_logs_first_line_goes_on(train_py, monkeypatch):
    """What has a log has a checkpoint: there is nothing to remove by hand."""
    train_py(output_dir="whole")

    def ended(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Training, "write_log", ended)
        assert train_py(output_dir="out")[0] == 130
    assert "Held-out accuracy" in Path("out/step_0/README.md").read_text(encoding="utf-8")
    assert train_py(output_dir="out", resume_from="latest")[0] == 0
    assert same(weights("out/epoch_1"), weights("whole/epoch_1"))
    steps = [
        [json.loads(line)["step"] for line in Path(f"{name}/train.log").read_text().splitlines()]
        for name in ("out", "whole")
    ]
    assert steps[0] == steps[1]


def test_a_window_that_closes_stops_a_run_after_its_step(train_py, monkeypatch):
    """It sends SIGHUP, and so does its shell."""
    real = lora_ppo.trainer.learn

    def learn(*given):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)
        return real(*given)

    monkeypatch.setattr("lora_ppo.trainer.learn", learn)
    status, output = train_py(output_dir="out", samples_per_epoch=12)
    assert status == 130
    assert "Stopped after step 1, saved in out/step_1." in output
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_run_under_nohup_outlives_its_window():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests(False, print) as asked:
            signal.raise_signal(signal.SIGHUP)
        assert asked == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_before_anything_is_saved_says_so(train_py, monkeypatch):
    """In the first evaluation: the first one is acknowledged, the second ends the run."""

    def evaluate(training):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Training, "evaluate", evaluate)
    status, output = train_py(output_dir="out")
    assert status == 130
    assert "Stopping after this step. Ctrl-C again stops at once." in output
    assert "Stopped at once. Nothing was saved yet." in output


def test_checkpoints_within_an_epoch_are_few_and_a_damaged_one_is_passed_over(train_py):
    train_py(output_dir="out", samples_per_epoch=24, save_every=1)
    assert sorted(path.name for path in Path("out").glob("*_*/")) == ["epoch_1", "step_4", "step_5"]
    os.truncate("out/epoch_1/adapter_model.safetensors", 10)
    for left in (".step_1.gone", ".epoch_1.new"):  # by a kill
        (Path("out") / left).mkdir()
    status, output = train_py(output_dir="out", samples_per_epoch=24, resume_from="latest")
    assert not list(Path("out").glob(".*_*"))
    assert status == 0
    assert "epoch_1 can't be used (adapter_model.safetensors has 10 bytes" in output
    assert "Resuming from out/step_5" in output
    verify_checkpoint(Path("out/epoch_1"))


def test_a_run_that_goes_on_under_other_prompts_is_told_so(train_py):
    train_py(output_dir="out")
    Path("mine.yaml").write_text("quizmaster:\n  system: Ask.\n", encoding="utf-8")
    status, output = train_py(output_dir="out", num_epochs=2, resume_from="latest", prompts="mine.yaml")
    assert status == 0
    line = "out/epoch_1 was trained under other prompts of quizmaster: set prompts=out/epoch_1/prompts.yaml to keep to"
    assert output.count(line) == 1
    assert "other prompts" not in train_py(output_dir="out", num_epochs=3, resume_from="latest", prompts="mine.yaml")[1]


def test_a_run_is_never_overwritten_and_another_folder_branches_off(train_py):
    train_py(output_dir="out", num_epochs=2)
    before = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    for changes in ({}, {"resume_from": "out/epoch_1"}):
        status, output = train_py(output_dir="out", **changes)
        assert status == 2
        assert "output_dir=out holds a run" in output
    status, output = train_py(output_dir="branch", resume_from="out/epoch_1", num_epochs=2)
    assert status == 0
    assert same(weights("branch/epoch_2"), weights("out/epoch_2"))
    assert {path: path.read_bytes() for path in before} == before


def test_memory_that_runs_out_while_answers_are_written_costs_their_step_alone(train_py, monkeypatch):
    real, calls = play, []

    def forgetful(*arguments):
        calls.append(arguments)
        return run_out_of_memory() if len(calls) in (1, 3) else real(*arguments)  # evaluation, and the second step

    monkeypatch.setattr("lora_ppo.trainer.play", forgetful)
    status, output = train_py(output_dir="out")
    assert status == 0, output
    assert [line.get("outcome") for line in log("out")] == [None, "taken", "skipped", "taken"]
    assert "out of memory" in log("out")[2]["why"]
    assert [line["step"] for line in log("out") if "eval_accuracy" in line] == [3]
    assert "Step 0 was not evaluated: out of memory" in output


def test_a_folder_takes_one_run_at_a_time(train_py, monkeypatch):
    Path("out").mkdir()
    with filelock.FileLock("out/.lock"), monkeypatch.context() as patch:
        patch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
        status, output = train_py(output_dir="out")
    assert (status, output.count("\n")) == (2, 1)
    assert "another run is writing to output_dir=out" in output
    assert train_py(output_dir="out")[0] == 0
    Path("file").touch()
    status, output = train_py(output_dir="file")
    assert (status, output.count("\n")) == (2, 1)
    assert "output_dir=file can't be written" in output


def test_samples_come_in_whole_shuffled_passes(llama, accelerator):
    policy, config = loaded(llama)
    training = Training(config, policy, EchoTask(), accelerator)
    training.train = list(range(10))
    seen = [sample for step in range(5) for sample in training.samples(step)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": "cooking"}, ("task=cooking", "quiz")),
        ({"batch_size": 10, "mini_batch_size": 4}, ("batch_size=10", "mini_batch_size=4")),
        (
            {"batch_size": 12, "mini_batch_size": 4, "gradient_accumulation_steps": 2},
            ("gradient_accumulation_steps=2",),
        ),
        ({"algorithm": "grpo", "group_size": 1}, ("group_size=1", "algorithm=grpo")),
        ({"algorithm": "grpo", "group_size": 3}, ("batch_size=4", "group_size=3")),
        ({"samples_per_epoch": 6}, ("samples_per_epoch=6", "batch_size=4")),
        ({"optimizer": "sgd"}, ("optimizer=sgd", "paged_adamw_8bit")),
        ({"test_share": 1.5}, ("test_share=1.5", "0.999")),
        ({"learnin_rate": 1}, ("learnin_rate", "learning_rate")),
        ({"batch_size": "many"}, ("batch_size='many'", "a whole number")),
        ({"resume_from": "latest"}, ("resume_from=latest", "none at all")),
        ({"questions": "questions.txt"}, ("questions.txt", "line 17")),
        ({"questions": "nowhere.txt"}, ("nowhere.txt",)),
    ],
)
def test_bad_input_gets_one_line_before_any_model_is_loaded(train_py, monkeypatch, capsys, changes, words):
    Path("questions.txt").write_bytes(b"What is it?\n" * 16 + b"\xff\xfe\n")
    monkeypatch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    changes = {"task": "quiz"} | changes
    try:
        status, output = train_py(**changes)
    except SystemExit as ended:
        status, output = ended.code, capsys.readouterr().err
    assert status == 2
    assert output.count("\n") == 1
    assert all(word in output for word in words), output
    assert not Path("runs").exists()


def test_a_finished_run_says_so_at_once(train_py, monkeypatch):
    train_py(output_dir="out")
    with monkeypatch.context() as patch:
        patch.setattr(train, "load_policy", lambda *_: pytest.fail("a model was loaded"))
        status, output = train_py(output_dir="out", resume_from="latest")
    assert status == 0
    assert "out is finished: step 3 is its last. Set num_epochs higher to go on." in output
    Path("out/report.html").unlink()  # a crash before the report: it is written now
    status, output = train_py(output_dir="out", resume_from="latest")
    assert "finished" not in output
    assert Path("out/report.html").exists()
    status, output = train_py(output_dir="out", resume_from="latest", num_epochs=2)
    assert "Resuming from out/epoch_1 at step 3." in output
    assert [line["step"] for line in log("out")] == list(range(7))


def test_an_epoch_may_grow_and_gets_the_samples_it_would_have_had(train_py):
    train_py(output_dir="whole", samples_per_epoch=24)
    train_py(output_dir="out")
    status, output = train_py(output_dir="out", resume_from="latest", samples_per_epoch=24)
    assert status == 0, output
    assert same(weights("out/epoch_1"), weights("whole/epoch_1"))
    assert verify_checkpoint(Path("out/epoch_1"))["step"] == 6
    assert verify_checkpoint(Path("out/step_3"))["step"] == 3  # what was epoch_1 is kept
    status, output = train_py(output_dir="out", resume_from="latest", samples_per_epoch=12)
    assert status == 2
    assert "samples_per_epoch=24, now it is 12" in output


def test_what_decides_the_order_of_samples_can_not_change_on_resume(train_py):
    train_py(output_dir="out")
    status, output = train_py(output_dir="out", resume_from="latest", seed=5)
    assert status == 2
    assert "seed=0" in output
    assert "now it is 5" in output


def test_eight_bit_adam_is_refused_without_cuda(llama):
    with pytest.raises(ConfigError, match=r"optimizer=adamw_8bit needs CUDA.*cpu"):
        loaded(llama, optimizer="adamw_8bit")


def test_the_control_tosses_coins_and_the_log_still_knows_what_is_right(train_py, monkeypatch):
    """Its coins come from the seed and the step; a run that was stopped tosses the same again."""
    seen, real = [], lora_ppo.trainer.learn

    def learn(policy, accelerator, config, trajectories):
        seen.append([(t.outcome.reward, t.outcome.verdict) for t in trajectories])
        return real(policy, accelerator, config, trajectories)

    monkeypatch.setattr("lora_ppo.trainer.learn", learn)
    assert train_py(output_dir="out", control="random", samples_per_epoch=40, seed=3)[0] == 0
    rewards = [reward for step in seen for reward, _ in step]
    assert set(rewards) == {0.0, 1.0}
    assert 10 < sum(rewards) < 30
    assert {(r, v) for step in seen for r, v in step} == {(r, v) for r in (0.0, 1.0) for v in ("correct", "incorrect")}
    share = [sum(v == "correct" for _, v in step) / len(step) for step in seen]
    assert [line["accuracy"] for line in log("out")[1:]] == share
    first, seen[:] = list(seen), []
    assert train_py(output_dir="again", control="random", samples_per_epoch=40, seed=3)[0] == 0
    assert seen == first


def test_a_linear_schedule_ends_near_0_and_a_resumed_run_takes_it_up(train_py, monkeypatch):
    rates, real = [], lora_ppo.trainer.learn

    def learn(policy, accelerator, config, trajectories):
        rates.append([group["lr"] for group in policy.optimizer.param_groups])
        if len(rates) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(policy, accelerator, config, trajectories)

    monkeypatch.setattr("lora_ppo.trainer.learn", learn)
    settings = {"output_dir": "out", "lr_schedule": "linear", "samples_per_epoch": 16, "learning_rate": 0.01}
    assert train_py(**settings)[0] == 130
    assert train_py(**settings, resume_from="latest")[0] == 0
    assert [rate for rate, _ in rates] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert len({head for _, head in rates}) == 1  # the value head keeps its own


class Flat(EchoTask):
    """Every answer earns the same."""

    def episode(self, number):
        episode = super().episode(number)
        episode.outcome = lambda: Outcome("incorrect", 0.0)
        return episode


def test_a_run_without_contrast_says_so_once_and_what_to_change(train_py, monkeypatch):
    monkeypatch.setitem(train.TASKS, "echo", lambda config: lambda policy: Flat())
    settings = {"algorithm": "grpo", "group_size": 2, "samples_per_epoch": 44, "save_every": 21}
    status, output = train_py(output_dir="out", **settings)
    assert status == 0
    assert output.count("For 20 steps no group of answers has had contrast") == 1
    assert "are cut off: raise max_new_tokens" in output
    assert {line["outcome"] for line in log("out")[1:]} == {"skipped"}
    assert all(line["equal_groups"] == 2 for line in log("out")[1:])


@pytest.mark.parametrize(
    ("accuracy", "cut_off", "words"),
    [
        (0.9, 0.5, "take harder problems"),
        (0.1, 0.5, "50% are cut off"),
        (0.1, 0.0, "take easier problems"),
        (0.5, 0.0, "between them"),
    ],
)
def test_the_advice_follows_from_the_last_step(accuracy, cut_off, words):
    line = {"equal_groups": 4, "accuracy": accuracy, "cut_off": cut_off}
    assert words in without_contrast([line] * 20, 4)
    assert not without_contrast([line] * 19, 4)
    assert not without_contrast([line] * 21, 4)
    assert not without_contrast([*[line] * 19, line | {"equal_groups": 3}, *[line] * 19], 4)
    assert words in without_contrast([line | {"equal_groups": 3}, *[line] * 20], 4)


def test_a_step_in_short_names_what_it_is_watched_by():
    line = {"reward": 0.5, "accuracy": 0.5, "kl": 0.125, "tokens_per_second": 100.0}
    assert in_short(line, 8) == "reward +0.50  accuracy 50%  KL 0.12  100 tokens/s"
    line |= {"strict": 0.25, "entropy": 0.314, "equal_groups": 3, "cut_off": 0.125}
    assert in_short(line, 8) == (
        "reward +0.50  accuracy 50% (25% strict)  entropy 0.31  KL 0.12  100 tokens/s  3 of 8 groups without contrast"
        "  12% cut off"
    )


def test_answers_without_an_end_are_counted_as_cut_off(train_py):
    """The tiny model rarely writes its end token: with one token an answer, all but those that are nothing else."""
    assert train_py(output_dir="out", max_new_tokens=1)[0] == 0
    assert all(line["cut_off"] > 0.9 for line in log("out")[1:])


def test_the_presets_are_valid():
    for path in (ROOT / "configs").glob("quiz*.yaml"):
        train.check(parse(train.TrainConfig, ["--config", str(path)]))
