"""What a model's quizzes are worth: measured, kept, read back."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny import randomize_adapter, tiny_policy

import evaluate
import tasks.quiz_gate
from lora_ppo.adapters import merge
from lora_ppo.gate import Gate, measured_file, read_gate, write_gate
from lora_ppo.loading import load_policy
from lora_ppo.quizmaster import Draft
from lora_ppo.settings import BUNDLED_MODEL, GATE_FILE, ConfigError
from tasks.facts import table_facts
from tasks.questions import split_samples
from tasks.quiz_gate import by_agreement, ensure_gate, logistic_fit, measure, says, sound

GATE = Gate("agreement", agreement=11, lead=2.0, right=12, shown=13, asked=60)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def unmeasured(llama, tmp_path, cache):
    """The folder of a tiny model without a gate of its own."""
    import shutil

    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / GATE_FILE).unlink()
    return folder


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (GATE, "about 9 of 10 keys right where plainly asked, a quiz on 2 of 10 questions"),
        (Gate("options", 0, 0, 388, 388, 400), "about 10 of 10 keys right, a quiz on 10 of 10 questions"),
        (
            Gate("agreement", 16, 0, 2, 2, 60),
            "about 10 of 10 keys right where plainly asked, a quiz on fewer than 1 of 10 questions",
        ),
        (Gate(asked=60), "none: this model's answers can't be told from guesses"),
        (Gate(), "none: how good this model's are was not measured yet"),
    ],
)
def test_a_gate_says_what_quizzes_are_worth(gate, words):
    assert gate.worth() == words


def test_a_models_own_gate_is_read_from_its_folder(cache):
    assert load_policy(replace_model(BUNDLED_MODEL))[0].quiz_gate == Gate("options", 0, 0.0, 388, 388, 400)


def replace_model(folder):
    from config import Config

    return Config(model_name=str(folder), device="cpu")


def test_what_was_measured_is_read_back_for_this_very_model(unmeasured):
    policy = tiny_policy(unmeasured)
    assert policy.quiz_gate == Gate()
    write_gate(measured_file(policy), GATE)
    assert read_gate(unmeasured, policy) == GATE
    assert tiny_policy(unmeasured).quiz_gate == GATE
    randomize_adapter(policy)  # adapters and their training change nothing
    assert read_gate(unmeasured, policy) == GATE
    assert tiny_policy(unmeasured, top_p=0.5).quiz_gate == Gate()
    tensors = load_file(unmeasured / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, unmeasured / "model.safetensors", metadata={"format": "pt"})
    assert tiny_policy(unmeasured).quiz_gate == Gate()


def test_a_gate_is_that_of_the_prompts_and_the_sampling_that_it_was_measured_under(unmeasured, tmp_path):
    write_gate(measured_file(tiny_policy(unmeasured)), GATE)
    assert tiny_policy(unmeasured, max_new_tokens=5).quiz_gate == Gate()
    assert tiny_policy(unmeasured, quiz_temperature=2.0).quiz_gate == Gate()
    own = Gate("options", 0, 0.0, 388, 388, 400)
    write_gate(unmeasured / GATE_FILE, own)
    assert tiny_policy(unmeasured).quiz_gate == own
    (tmp_path / "tutor.yaml").write_text("tutor:\n  system: Be brief.\n")
    assert tiny_policy(unmeasured, prompts=str(tmp_path / "tutor.yaml")).quiz_gate == own
    (tmp_path / "solver.yaml").write_text("solver:\n  system: Guess.\n")
    assert tiny_policy(unmeasured, prompts=str(tmp_path / "solver.yaml")).quiz_gate == Gate()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"signal": "perhaps"}', '{"right": 5, "shown": 4, "asked": 9}'])
def test_a_broken_gate_is_named_in_the_models_folder_and_measured_again_in_the_cache(unmeasured, text):
    policy = tiny_policy(unmeasured)
    kept = measured_file(policy)
    kept.parent.mkdir(parents=True)
    kept.write_text(text)
    assert read_gate(unmeasured, policy) == Gate()
    (unmeasured / GATE_FILE).write_text(text)
    with pytest.raises(ConfigError, match=f"{GATE_FILE}: found .*, expected a JSON object with signal, .*; remove it"):
        tiny_policy(unmeasured)


def test_a_random_model_makes_no_quizzes(unmeasured, monkeypatch):
    """Its answers can't be told from guesses; it is measured once, and draws no random number of the session's."""
    monkeypatch.setattr(tasks.quiz_gate, "QUESTIONS", 10)
    policy, said = tiny_policy(unmeasured, max_new_tokens=20), []
    torch.manual_seed(1)
    ensure_gate(policy, said.append)
    drawn = torch.rand(())
    torch.manual_seed(1)
    assert drawn == torch.rand(())
    assert policy.quiz_gate == Gate(asked=10)
    assert said[1] == "Its quizzes: none: this model's answers can't be told from guesses."
    again = tiny_policy(unmeasured, max_new_tokens=20)
    ensure_gate(again, lambda text: pytest.fail(text))
    assert again.quiz_gate == policy.quiz_gate


def test_nothing_is_measured_on_the_test_split(unmeasured, monkeypatch):
    asked = []

    def drafts(policy, questions, done):
        asked.extend(fact for _, fact in questions)
        return [None] * len(questions)

    monkeypatch.setattr(tasks.quiz_gate, "drafts", drafts)
    monkeypatch.setattr(tasks.quiz_gate, "by_options", lambda policy, questions: Gate(asked=len(questions)))
    measure(tiny_policy(unmeasured))
    assert len(asked) == 60
    assert not {sample.fact for sample in split_samples("test")} & set(asked)


FACTS = table_facts()[:60]


def draft(i: int, agreement: int, right: bool, lead: float = 5.0, also_right: bool = False) -> Draft:
    """A draft on fact i."""
    key = FACTS[i].answer if right else "Atlantis"
    wrong = [(f"wrong {word}", lead) for word in ("one", "two", "three")]
    if also_right:
        wrong[0] = (FACTS[i].answer, lead)
    return Draft("q", key, agreement, tuple(wrong))


def test_the_gate_lets_most_quizzes_through_that_are_still_sound():
    """From 12 on all are right, at 8 two of 14, below none."""
    made = [draft(i, 14, True) for i in range(8)] + [draft(i, 12, True) for i in range(8, 16)]
    made += [draft(i, 8, i % 7 == 0) for i in range(16, 30)] + [draft(i, 6, False) for i in range(30, 40)]
    assert by_agreement(made + [None] * 20, FACTS) == Gate("agreement", 12, 1.0, 16, 16, 60)


def test_questions_without_a_quiz_tell_how_right_keys_are():
    """One of eight quizzes is wrong, at a high agreement; that hardly a key is right below makes it an exception."""
    few = [draft(i, agreement, agreement != 14) for i, agreement in enumerate((9, 9, 10, 13, 13, 14, 16, 16))]
    assert by_agreement(few, FACTS[:8]) == Gate(asked=8)
    below = [draft(i, i % 6, i % 6 == 5) for i in range(8, 60)]
    assert by_agreement(few + below, FACTS) == Gate("agreement", 9, 1.0, 7, 8, 60)


def test_options_too_near_to_the_key_are_no_quiz():
    made = [draft(i, 16, True) for i in range(12)] + [draft(i, 16, True, lead=0.9) for i in range(12, 30)]
    assert by_agreement(made, FACTS[:30]) == Gate("agreement", 16, 1.0, 12, 12, 30)


def test_the_curve_is_that_of_logistic_regression():
    """Where agreement 4 is right in a quarter of many cases and 12 in three quarters: by hand, logit = +-log 3."""
    pairs = [(4, i % 4 == 0) for i in range(4000)] + [(12, i % 4 != 0) for i in range(4000)]
    expected = logistic_fit(pairs)
    for agreement, probability in ((4, 0.25), (8, 0.5), (12, 0.75), (16, 0.9)):
        assert expected(agreement) == pytest.approx(probability, abs=1e-3)
    assert logistic_fit([])(8) == 0.5
    assert logistic_fit([(16, True)] * 9)(16) < 1


@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75])
def test_a_model_that_cannot_be_told_from_chance_gets_no_gate(share):
    made = [draft(i, 16, i % 4 < 4 * share) for i in range(40)]
    assert by_agreement(made, FACTS[:40]) == Gate(asked=40)


def test_a_few_right_ones_are_no_evidence():
    assert by_agreement([draft(i, 16, True) for i in range(4)], FACTS[:4]) == Gate(asked=4)
    assert by_agreement([draft(i, 16, True) for i in range(9)], FACTS[:9]).shown == 9


def test_a_quiz_with_two_right_options_is_not_sound():
    made = [draft(i, 16, True, also_right=i % 2 == 0) for i in range(40)]
    assert by_agreement(made, FACTS[:40]) == Gate(asked=40)


def test_what_a_short_answer_says():
    (fact,) = [fact for fact in table_facts() if fact.about == "Mona Lisa"]
    assert says("leonardo da Vinci", fact)
    assert not says("Leonards", fact)
    assert sound(["Leonardo", "Bosch", "Vermeer", "Raphael"], fact)
    assert not sound(["Bosch", "Leonardo", "Vermeer", "Raphael"], fact)
    assert not sound(["Leonardo", "Leonardo da Vinci", "Vermeer", "Raphael"], fact)


def test_evaluate_measures_and_keeps_it(unmeasured, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--mode", "quizmaster", f"model_name={unmeasured}", "device=cpu"])
    monkeypatch.setattr(tasks.quiz_gate, "by_options", lambda policy, asked: replace(GATE, signal="options"))
    monkeypatch.setattr(tasks.quiz_gate, "drafts", lambda policy, asked, done: [None] * len(asked))
    assert evaluate.main() == 0
    output = capsys.readouterr().out
    assert "quizzes: about 9 of 10 keys right, a quiz on 2 of 10 questions" in output
    assert "13 of 60 questions got a quiz; sound: 12, 92.3 % (66.7 to 98.6)" in output
    policy = load_policy(replace_model(unmeasured))[0]
    assert json.loads(measured_file(policy).read_text()) == asdict(replace(GATE, signal="options"))


def test_measuring_takes_no_adapter(monkeypatch, capsys, llama):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--mode", "quizmaster", "--adapter", str(llama)])
    assert evaluate.main() == 2
    assert "mode=quizmaster measures the base model: it takes no adapter" in capsys.readouterr().err


@pytest.mark.parametrize("signal", ["options", "agreement"])
def test_a_merged_model_keeps_a_gate_it_was_trained_for(unmeasured, tmp_path, signal, monkeypatch):
    """What was measured by agreement is the base's alone: the merged model answers otherwise."""
    from lora_ppo.checkpoint import save_checkpoint

    write_gate(unmeasured / GATE_FILE, replace(GATE, signal=signal))
    policy = tiny_policy(unmeasured)
    randomize_adapter(policy)
    save_checkpoint(tmp_path / "adapter", policy, {}, "")
    config = replace(
        evaluate.EvaluateConfig(),
        model_name=str(unmeasured),
        device="cpu",
        dtype="float32",
        mode="merge",
        adapter=[str(tmp_path / "adapter")],
        merged_model_path=str(tmp_path / "merged"),
    )
    merge(config, lambda text: None)
    assert (tmp_path / "merged" / GATE_FILE).exists() is (signal == "options")
