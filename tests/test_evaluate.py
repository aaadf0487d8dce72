"""evaluate.py as a user runs it: answers, comparisons, merging, refusals."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from peft import LoraModel, PeftModel
from support.evaluation import Letters, LettersEpisode
from support.tiny import CORPUS, randomize_adapter, tiny_policy
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import tasks.quiz
from lora_ppo.adapters import MERGE_TOLERANCE, attach, probe_logits
from lora_ppo.checkpoint import save_checkpoint
from lora_ppo.episodes import Outcome
from lora_ppo.evaluation import Answer, Result, answer_all, comparison, figures, held_out
from lora_ppo.prompts import load_prompts
from lora_ppo.quiz import Quiz
from lora_ppo.settings import PROMPTS_FILE
from lora_ppo.statistics import mcnemar_exact

ROOT = Path(__file__).resolve().parent.parent


def result(verdicts: str, rewards=None, name="model") -> Result:
    """A result from a string: r right, w wrong, u unknown."""
    words = {"r": "correct", "w": "incorrect", "u": "unknown"}
    rewards = rewards or [{"r": 1.0, "w": -1.0, "u": 0.0}[v] for v in verdicts]
    details = {"states_fact": True}
    outcomes = [Outcome(words[v], reward, "", details) for v, reward in zip(verdicts, rewards, strict=True)]
    return Result(name, "", None, [Answer("q", "a", i, o) for i, o in enumerate(outcomes)])


def test_figures_leave_out_what_is_unknown():
    found = figures(result("rrwu"))
    assert (found["samples"], found["unknown"], found["correct"]) == (3, 1, 2)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["mean_reward"] == pytest.approx(1 / 3)
    assert (found["mean_tokens"], found["most_tokens"]) == (1.5, 3)
    assert figures(result("uu"))["accuracy"] is None


def test_comparison_counts_pairs_that_both_know():
    versus = comparison(result("rrrwwur"), result("rwwrwru"))
    assert [versus[k] for k in ("both_right", "only_this_right", "only_base_right", "neither_right")] == [1, 2, 1, 1]
    assert versus["accuracy_difference"] == pytest.approx(0.2)
    assert versus["reward_difference"] == pytest.approx(0.4)
    assert versus["p"] == mcnemar_exact(2, 1)
    assert comparison(result("uu"), result("rw"))["accuracy_difference"] is None


@pytest.fixture
def adapter(llama, tmp_path):
    """`adapter(name, step, effect)` is a checkpoint of the tiny Llama; without effect its policy is the base."""

    def adapter(name: str, step: int = 7, effect: bool = True, model: Path = llama, **trained) -> Path:
        policy = tiny_policy(model)
        policy.step = step
        if effect:
            randomize_adapter(policy, seed=step)
        save_checkpoint(tmp_path / name, policy, {"config": trained} if trained else {}, "A test.")
        return tmp_path / name

    return adapter


def test_an_adapter_without_effect_answers_and_is_judged_as_the_base_is(run, adapter):
    status, _, record = run("--adapter", adapter("same", effect=False))
    assert status == 0
    base, same = record["models"]
    assert {**same, "name": "base", "folder": "", "step": None, "versus_base": None} == {**base, "versus_base": None}
    for row in record["answers"]:
        question, first, second = row.values()
        assert question.startswith("test question")
        assert first == second
    versus = same["versus_base"]
    assert (versus["accuracy_difference"], versus["p"], versus["reward_difference"]) == (0.0, 1.0, 0.0)
    assert len({row["base"]["reward"] for row in record["answers"]}) == 10  # random numbers, not one number


def test_several_adapters_make_a_learning_curve(run, adapter):
    folders = [adapter(f"epoch_{i}", step=10 * i) for i in (2, 1)]
    status, output, record = run("--adapter", *folders)
    assert status == 0
    assert [model["step"] for model in record["models"]] == [None, 10, 20]
    assert [model["name"] for model in record["models"]] == ["base", "epoch_1", "epoch_2"]
    for text in ("epoch_1", "epoch_2", "Wilson", "Newcombe", "McNemar", "bootstrap", "held-out samples"):
        assert text in output
    assert set(record["methods"]) == {"accuracy", "accuracy difference", "p", "pass@k", "reward difference"}
    for model in record["models"]:
        answers = [row[model["folder"] or "base"] for row in record["answers"]]
        right = sum(answer["verdict"] == "correct" for answer in answers)
        known = sum(answer["verdict"] != "unknown" for answer in answers)
        assert (model["correct"], model["samples"], model["unknown"]) == (right, known, len(answers) - known)
        assert all(len(a["answer"]) % 2 == (a["verdict"] != "correct") for a in answers if a["verdict"] != "unknown")
    texts = [[row[model["folder"] or "base"]["answer"] for row in record["answers"]] for model in record["models"]]
    assert texts[0] != texts[1] != texts[2]


def test_the_same_command_gives_the_same_figures(run, adapter):
    folder = adapter("epoch_1")
    first, second = (run("--adapter", folder)[2] for _ in range(2))
    assert first["models"] == second["models"]
    assert first["answers"] == second["answers"]


def test_several_answers_to_a_sample_give_pass_at_k(run, adapter):
    """The first answers are those that a single round gives; the others are drawn from other seeds."""
    folder = adapter("epoch_1")
    once = run("--adapter", folder)[2]
    status, output, record = run("--adapter", folder, "samples_per_problem=3")
    assert status == 0
    assert "pass@k" in output
    for model, alone in zip(record["models"], once["models"], strict=True):
        assert model | {"pass_at": {}} == alone
        rows = [row[model["folder"] or "base"]["verdicts"] for row in record["answers"]]
        assert any(len(set(row)) > 1 for row in rows)
        known = [row for row in rows if "unknown" not in row]
        wanted = {
            str(k): fmean(fmean("correct" in some for some in itertools.combinations(row, k)) for row in known)
            for k in (1, 2, 3)
        }
        assert {k: found["share"] for k, found in model["pass_at"].items()} == pytest.approx(wanted)
        for found in model["pass_at"].values():
            assert found["interval"][0] <= found["share"] <= found["interval"][1]


def graded(verdicts: str, strict: str, levels: str, cut_off: str) -> Result:
    """A result of a task with levels, and a form that is asked for (s: in it)."""
    rows = zip(result(verdicts).answers, strict, levels, cut_off, strict=True)
    answers = [
        replace(
            answer, outcome=replace(answer.outcome, details={"strict": form == "s", "level": level}), cut_off=cut == "c"
        )
        for answer, form, level, cut in rows
    ]
    return Result("model", "", None, answers)


def test_levels_the_form_and_answers_cut_off_are_told_apart():
    mine, base = graded("rrwrw", "ss-s-", "11122", "--c-c"), graded("wrwww", "-s---", "11122", "ccccc")
    found = figures(mine)
    assert found["strict_accuracy"] == pytest.approx(3 / 5)
    assert found["cut_off_share"] == pytest.approx(2 / 5)
    assert {level: (row["samples"], row["accuracy"]) for level, row in found["by_level"].items()} == {
        "1": (3, pytest.approx(2 / 3)),
        "2": (2, pytest.approx(1 / 2)),
    }
    versus = comparison(mine, base)
    assert versus["strict"]["accuracy_difference"] == pytest.approx(2 / 5)
    assert [versus["by_level"][level]["only_this_right"] for level in "12"] == [1, 1]
    assert versus["by_level"]["1"]["accuracy_difference"] == pytest.approx(1 / 3)
    assert versus["accuracy_difference"] == pytest.approx(2 / 5)


def test_the_base_alone_and_a_task_of_several_turns(run, monkeypatch):
    monkeypatch.setattr(Letters, "turns", 3)
    status, output, record = run("--adapter", "none")
    assert status == 0
    assert len(record["models"]) == 1
    assert "difference" not in output
    assert 3 <= record["models"][0]["mean_tokens"] <= 18


def test_the_quiz_task_counts_facts_and_the_learners_choice(run, adapter, monkeypatch):
    def scripted(policy, question, written):
        return None if len(question) % 5 == 0 else Quiz("Which?", ("alpha", "beta", "gamma", "delta"), 0)

    monkeypatch.setattr(tasks.quiz, "make_quiz", scripted)
    status, output, record = run("task=quiz", "quiz_learner=gain", "num_samples=20", "--adapter", adapter("epoch_1"))
    assert status == 0
    without = sum(len(row["question"]) % 5 == 0 for row in record["answers"])
    assert without > 0
    for model in record["models"]:
        assert (model["unknown"], model["samples"], model["facts"]) == (without, 20 - without, 20)
        assert model["facts_stated"] == 0
    assert f"{without} more samples had no outcome" in output


def test_a_config_file_of_training_serves_evaluation_and_its_settings_alone(run):
    Path("train.yaml").write_text("task: letters\nalgorithm: grpo\nlearning_rate: 1.0e-4\nnum_samples: 3\n")
    status, _, record = run("--config", "train.yaml")
    assert (status, len(record["answers"])) == (0, 10)  # the command line wins
    status, output, _ = run("learning_rate=1e-4")
    assert status == 2
    assert "learning_rate is a setting of training" in output


def next_logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(**tokenizer(text, return_tensors="pt")).logits[0].float() for text in CORPUS[:5]])


@pytest.mark.parametrize(
    ("architecture", "dtype", "tolerance"), [("qwen3", "float32", 1e-5), ("llama", "bfloat16", 0.05)]
)
def test_a_merged_model_is_base_plus_adapter(run, adapter, tiny_folder, architecture, dtype, tolerance):
    model = tiny_folder(architecture)
    folder = adapter("epoch_1", model=model)
    settings = (f"model_name={model}", f"dtype={dtype}", "--merged_model_path", "merged")
    status, output, record = run(*settings, "--mode", "merge", "--adapter", folder)
    assert (status, record) == (0, None)
    assert "largest difference of merged and adapter logits" in output
    merged = AutoModelForCausalLM.from_pretrained("merged")
    assert merged.dtype == getattr(torch, dtype)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained("merged")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(model).chat_template
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain = next_logits(base, tokenizer)
    wanted = next_logits(PeftModel.from_pretrained(base, folder), tokenizer)
    found = next_logits(merged.float(), tokenizer)
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert (plain - wanted).abs().max() > 0.5 * wanted.abs().max()  # the adapter has an effect to lose


def test_both_merges_and_evaluates_and_the_merged_model_answers_as_the_adapter_does(run, adapter):
    folder = adapter("epoch_1")
    status, _, record = run(
        "--mode", "both", "--adapter", folder, "--merged_model_path", "merged", "--use_merged_model"
    )
    assert status == 0
    assert [model["name"] for model in record["models"]] == ["base", "epoch_1", "merged"]
    assert all(row[str(folder)] == row["merged"] for row in record["answers"])
    status, _, record = run("--merged_model_path=merged", "--use_merged_model")
    assert [model["name"] for model in record["models"]] == ["base", "merged"]


def test_adapters_and_merged_models_are_told_what_they_were_told_in_training(run, llama, tmp_path, monkeypatch):
    """Unless prompts=FILE says otherwise; an adapter whose prompts are not those in use is named."""
    folders = []
    for name in ("Du bist Lehrer.", "You teach."):
        (tmp_path / "mine.yaml").write_text(f"tutor:\n  system: {name}\n", encoding="utf-8")
        policy = tiny_policy(llama, prompts=str(tmp_path / "mine.yaml"))
        policy.step = len(folders)
        randomize_adapter(policy)
        save_checkpoint(folder := tmp_path / f"step_{policy.step}", policy, {}, "A test.")
        folders.append(folder)
    asked = []
    reset = LettersEpisode.reset
    monkeypatch.setattr(LettersEpisode, "reset", lambda episode: asked.append(reset(episode)) or asked[-1])

    def systems() -> set[str]:
        found = {messages[0]["content"] for messages in asked}
        asked.clear()
        return found

    german = folders[0] / PROMPTS_FILE
    status, output, record = run("--adapter", *folders)
    assert status == 0
    assert systems() == {"Du bist Lehrer."}
    assert record["settings"]["prompts"] == str(german)
    assert f"prompts={german}: the roles are told what they were told in training." in output
    other = f"{folders[1]} was trained under other prompts of tutor: set prompts={folders[1] / PROMPTS_FILE} to keep"
    assert output.count(" was trained under other prompts") == output.count(other) == 1
    run("--adapter", folders[0], f"prompts={folders[1] / PROMPTS_FILE}")
    assert systems() == {"You teach."}
    run("--adapter", folders[0], "--mode=merge", "--merged_model_path=merged", "task=quiz")
    assert load_prompts("merged/prompts.yaml") == load_prompts(german)
    assert "Du bist Lehrer." in Path("merged/README.md").read_text(encoding="utf-8")
    run("--merged_model_path=merged", "--use_merged_model")
    assert systems() == {"Du bist Lehrer."}


def test_an_adapter_under_the_prompts_of_its_model_is_told_nothing_more(run, adapter):
    _, output, record = run("--adapter", adapter("epoch_1"))
    assert "prompts" not in output
    assert record["settings"]["prompts"] == ""


def test_a_base_in_4_bits_is_merged_in_bfloat16(run, adapter):
    folder = adapter("epoch_1", load_in_4bit="true")
    status, output, _ = run("--mode=merge", "--adapter", folder, "--merged_model_path=merged", "dtype=auto")
    assert status == 0
    assert "wrote merged (bfloat16)" in output
    assert AutoModelForCausalLM.from_pretrained("merged").dtype == torch.bfloat16


def test_a_merge_that_lost_the_adapter_writes_nothing(run, adapter, monkeypatch):
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda model, adapter_names: model.unload(), raising=False)
    folder = adapter("epoch_1")
    status, output, _ = run("--mode=merge", "--adapter", folder, "--merged_model_path=merged")
    assert status == 2
    assert "merging failed and nothing was written" in output
    assert not any("merged" in path.name for path in Path().iterdir())


def test_a_merge_in_which_half_of_the_adapter_got_lost_writes_nothing(run, adapter, monkeypatch):
    """However much rounding is said to explain: what is left must be the adapter."""
    merge = LoraModel.merge_and_unload

    def halved(model, adapter_names):
        for name, parameter in model.named_parameters():
            if "lora_B.trained" in name:
                parameter.data *= 0.5
        return merge(model, adapter_names=adapter_names)

    monkeypatch.setattr(LoraModel, "merge_and_unload", halved)
    monkeypatch.setitem(MERGE_TOLERANCE, "float32", 1e9)
    status, output, _ = run("--mode=merge", "--adapter", adapter("epoch_1"), "--merged_model_path=merged")
    assert status == 2
    assert "merging failed and nothing was written" in output


def test_merging_leaves_a_folder_that_is_not_empty_alone(run, adapter):
    Path("merged").mkdir()
    Path("merged/notes.txt").write_text("mine")
    arguments = ("--mode=merge", "--adapter", adapter("epoch_1"), "--merged_model_path=merged")
    status, output, _ = run(*arguments)
    assert status == 2
    assert "merged_model_path=merged is not empty (1 entries, such as notes.txt)" in output
    assert [path.name for path in Path("merged").iterdir()] == ["notes.txt"]
    Path("merged/notes.txt").unlink()
    assert run(*arguments)[0] == 0  # empty: fine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "melt"], "mode=melt is unknown: expected one of evaluate, merge, both"),
        (["--task", "chess"], "task=chess is unknown: expected one of maths, os_interaction, quiz, voice"),
        (["--task", "quiz", "--quiz_learner", "x"], "quiz_learner=x is unknown: expected one of auto, reader, gain"),
        (["num_samples=0"], "num_samples=0 is out of range"),
        (["num_samples=ten"], "num_samples='ten' does not fit: expected a whole number"),
        (["test_share=1"], "test_share=1 is out of range"),
        (["--mode", "merge", "--adapter", "a"], "mode=merge needs merged_model_path=DIR"),
        (["--mode", "merge", "--merged_model_path", "m"], "mode=merge merges one adapter, and adapter names 0"),
        (["--mode", "both", "--adapter", "a", "b", "--merged_model_path=m"], "adapter names 2: name one"),
        (["--use_merged_model"], "use_merged_model=true needs merged_model_path=DIR"),
        (["--use_merged_model", "--merged_model_path=m"], "merged_model_path=m holds no model"),
        (["--adapter", "nowhere"], "adapter=nowhere: there is no such folder"),
        (["output_file=nowhere/x.json"], "output_file=nowhere/x.json: nowhere is no folder"),
        (["--adapters", "x"], "there is no setting 'adapters': did you mean 'adapter'?"),
        (["--adapter"], "--adapter needs a value"),
    ],
)
def test_what_can_not_be_used_is_one_line_before_a_model_is_loaded(run, monkeypatch, arguments, message):
    monkeypatch.setattr(evaluate, "load_policy", lambda *_: pytest.fail("a model was loaded"))
    status, output, record = run(*arguments)
    assert (status, record) == (2, None)
    assert message in output
    assert output.count("\n") == 1


def test_an_adapter_folder_that_is_damaged_or_of_another_kind_is_refused(run, adapter):
    folder = adapter("epoch_1")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "is damaged: adapter_model.safetensors has" in run("--adapter", folder)[1]
    for name in ("manifest.json", "state.json", "adapter_model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    assert "has no adapter_model.safetensors" in run("--adapter", folder)[1]
    (folder / "adapter_config.json").write_text("{}")
    status, output, _ = run("--adapter", folder)
    assert status == 2
    assert "has no usable adapter_config.json" in output


def test_an_adapter_of_another_base_model_is_refused(run, adapter, tiny_folder, llama):
    folder = adapter("epoch_1", model=tiny_folder("qwen2"))
    status, output, _ = run("--adapter", folder)
    assert status == 2
    assert f"was trained with model_name={tiny_folder('qwen2')}, now it is {llama}" in output
    for name in ("manifest.json", "state.json"):  # a plain PEFT folder doesn't say
        (folder / name).unlink()
    config = json.loads((folder / "adapter_config.json").read_text()) | {"target_modules": ["c_attn"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    status, output, _ = run("--adapter", folder)
    assert status == 2
    assert "does not fit model_name" in output


def test_a_plain_peft_folder_is_evaluated(run, adapter):
    folder = adapter("epoch_1")
    whole = run("--adapter", folder)[2]
    for path in folder.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    status, _, record = run("--adapter", folder)
    assert status == 0
    assert record["answers"] == whole["answers"]
    assert record["models"][1]["step"] is None


def test_an_adapter_trained_on_what_is_held_out_here_is_refused(run, adapter):
    folder = adapter("epoch_1", task="letters", seed=3, test_share=0.3)
    status, output, _ = run("--adapter", folder)
    assert status == 2
    assert "was trained with test_share=0.3, now it is 0.2" in output
    assert run("--adapter", folder, "test_share=0.3")[0] == 0


@pytest.mark.parametrize(
    ("trained", "here"), [(["q_proj"], ["q_proj", "up_proj"]), (["q_proj", "up_proj"], ["q_proj"])]
)
def test_an_adapter_may_sit_on_other_layers_than_the_policys_own(llama, tmp_path, trained, here):
    """On fewer it leaves the rest alone; on more, those too are off where the base model speaks."""
    source = tiny_policy(llama, target_modules=trained)
    base = probe_logits(source, adapter=False)
    randomize_adapter(source)
    wanted = probe_logits(source, adapter=True)
    save_checkpoint(tmp_path / "trained", source, {}, "A test.")
    policy = tiny_policy(llama, target_modules=here)
    attach(policy, tmp_path / "trained", "trained")
    torch.testing.assert_close(probe_logits(policy, adapter=True), wanted, rtol=1e-5, atol=1e-5)
    assert (wanted - base).abs().max() > 0.01
    torch.testing.assert_close(probe_logits(policy, adapter=False), base, rtol=1e-5, atol=1e-5)


def test_an_adapter_with_dora_is_refused(run, adapter):
    folder = adapter("epoch_1")
    for path in folder.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_bias": True}))
    status, output, _ = run("--adapter", folder)
    assert status == 2
    assert output.count("error:") == 1


def test_more_samples_than_are_held_out_is_refused(run):
    status, output, _ = run("num_samples=13")
    assert status == 2
    assert "num_samples=13: the test split has 12 samples" in output


def test_help_answers_without_torch():
    code = "import sys, evaluate; sys.argv = ['evaluate.py', '--help']; evaluate.main(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: python evaluate.py")
    assert "  merged_model_path" in done.stdout
    assert "  learning_rate" not in done.stdout
    assert done.stdout.endswith("False\n")


def test_a_difference_is_in_percentage_points_with_its_interval():
    assert evaluate.points(0.125, (0.081, 0.169)) == "+12.5 points (+8.1 to +16.9)"
    assert evaluate.points(None, (0, 0)) == "-"


def test_progress_is_told_sample_by_sample(llama):
    policy = tiny_policy(llama, max_new_tokens=4)
    told = []
    answers = answer_all(policy, Letters(policy), held_out(Letters(policy), 5, 0), True, 0, 2, told.append)
    assert told == [2, 4, 5]
    assert len(answers) == 5
