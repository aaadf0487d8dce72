"""Prompts as data: which file wins, what a broken one is answered with, and what goes with a checkpoint."""

import random
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support.session import turns
from support.tiny import PROMPTS, tiny_config, tiny_policy
from transformers import AutoTokenizer

from config import Config
from lora_ppo.chat import encode_chat
from lora_ppo.checkpoint import model_card
from lora_ppo.loading import find_prompts, load_policy
from lora_ppo.prompts import ROLES, Prompts, Role, load_prompts
from lora_ppo.quiz import LETTERS, parse_quiz, quiz_json
from lora_ppo.quizmaster import quiz_request
from lora_ppo.settings import BUNDLED_MODEL, DEFAULT_PROMPTS, PROMPTS_FILE, ConfigError
from tasks.facts import table_facts
from tasks.questions import known_questions

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "prompts").glob("*.yaml"))


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# --------------------------------------------------------------------------------------------------- the bundled model


def test_the_bundled_model_reads_what_it_read_before_prompts_were_data():
    """Its own system texts and no examples, through its own chat template, token by token."""
    texts = yaml.safe_load((BUNDLED_MODEL / PROMPTS_FILE).read_text(encoding="utf-8"))
    policy, _ = load_policy(Config(model_name=str(BUNDLED_MODEL), device="cpu"))
    plain = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    assert list(texts) == list(ROLES)
    questions = [fact.question(fact.subject.ask[0]) for fact in random.Random(0).sample(table_facts(), 20)]
    for name in ROLES:
        assert list(texts[name]) == ["system"]
        for question in questions:
            chat = [{"role": "system", "content": texts[name]["system"]}, {"role": "user", "content": question}]
            ids = plain.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
            assert encode_chat(policy.tokenizer, getattr(policy.prompts, name).messages(question)) == ids
            if name == "quizmaster":
                assert quiz_request(policy, question).prompt_ids == ids


# ---------------------------------------------------------------------------------------------------------- precedence


def test_each_role_comes_from_the_setting_or_the_models_folder_or_the_default(tmp_path):
    model, default = tmp_path / "model", load_prompts(DEFAULT_PROMPTS)
    model.mkdir()
    config = Config(model_name=str(model))
    assert find_prompts(config) == default
    write(model / PROMPTS_FILE, "tutor:\n  system: The model's.\nsolver:\n  system: Solve.\n")
    own = find_prompts(config)
    assert (own.tutor, own.solver) == (Role("The model's."), Role("Solve."))
    assert own.differing(default) == ["tutor", "solver"]
    text = "tutor:\n  system: Mine.\n  examples:\n  - user: 2 + 2?\n    assistant: 4\n"
    config.prompts = write(tmp_path / "mine.yaml", text)
    found = find_prompts(config)
    assert found.tutor == Role("Mine.", (("2 + 2?", "4"),))
    assert found.differing(own) == ["tutor"]
    config.model_name = "nobody/a-model-of-a-hub"
    assert find_prompts(config).differing(default) == ["tutor"]


def test_a_whole_file_wins_over_a_folders_broken_one(tmp_path):
    write(tmp_path / PROMPTS_FILE, "something: else\n")
    config = Config(model_name=str(tmp_path))
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path / PROMPTS_FILE}, line 1: found a role called")):
        find_prompts(config)
    config.prompts = str(DEFAULT_PROMPTS)
    assert find_prompts(config) == load_prompts(DEFAULT_PROMPTS)


def test_the_policy_has_them_and_a_broken_file_is_told_before_a_model_is_loaded(llama, tmp_path, monkeypatch):
    mine = write(tmp_path / "mine.yaml", "tutor:\n  system: Mine.\n")
    policy = tiny_policy(llama, prompts=mine)
    assert policy.prompts.differing(PROMPTS) == ["tutor"]
    monkeypatch.setattr("lora_ppo.loading.load_base", lambda config: pytest.fail("a model was loaded"))
    write(Path(mine), "tutor: Mine.\n")
    with pytest.raises(ConfigError, match=re.escape(f"{mine}, line 1, tutor")):
        tiny_policy(llama, prompts=mine)


# -------------------------------------------------------------------------------------------------------- broken files

GOOD = "tutor:\n  system: Teach.\n  examples:\n    - user: Why?\n      assistant: So.\n"
FORM = 'null or {"question":"...","correct":"...","wrong":["...","...","..."]}, with no spaces between its parts'
QUIZ = "quizmaster:\n  system: Ask.\n  examples:\n    - user: Why?\n      assistant: "
BROKEN = {
    "no file content": ("", "line 1: found nothing, expected roles: tutor, quizmaster, solver, learner"),
    "comments alone": ("# nothing\n", "line 1: found nothing, expected roles: "),
    "a text": ("Teach.\n", "line 1: found 'Teach.', expected a mapping with tutor and quizmaster and "),
    "a list": ("- tutor\n", "line 1: found a list, expected a mapping with tutor and "),
    "a misspelt role": (GOOD + "solvr:\n  system: x\n", "line 6: found a role called 'solvr', expected 'solver'"),
    "no such role": ("\nx: 1\n", "line 2: found a role called 'x', expected tutor or quizmaster or solver or learner"),
    "a role twice": (GOOD + "tutor:\n  system: x\n", "line 6: found tutor a second time, expected it once"),
    "a role of text": ("tutor: Teach.\n", "line 1, tutor: found 'Teach.', expected a mapping with system"),
    "an empty role": (GOOD + "solver:\n", "line 6, solver: found nothing, expected a mapping with system"),
    "a misspelt field": ("tutor:\n  sytem: x\n", "line 2, tutor: found a field called 'sytem', expected 'system'"),
    "no system": ("tutor:\n  examples: []\n", "line 2, tutor: found no system, expected a mapping with system"),
    "an empty system": ("tutor:\n  system:\n", "line 2, tutor: found an empty text, expected what is said"),
    "a blank system": ("tutor:\n  system: ' '\n", "line 2, tutor: found an empty text, expected what is said"),
    "a system that is a list": ("tutor:\n  system:\n    - x\n", "line 3, tutor: found a list, expected text"),
    "examples of text": (
        "tutor:\n  system: x\n  examples: none\n",
        "line 3, tutor: found 'none', expected a list of examples, each with user and assistant",
    ),
    "examples in a mapping": (
        "tutor:\n  system: x\n  examples:\n    user: a\n",
        "line 4, tutor: found a mapping, expected a list of examples",
    ),
    "an example of text": (
        GOOD + "    - Why?\n",
        "line 6, tutor: found 'Why?', expected a mapping with user and assistant",
    ),
    "half an example": (
        GOOD + "    - user: x\n",
        "line 6, tutor: found no assistant, expected a mapping with user and ",
    ),
    "another side": (GOOD + "    - usr: x\n", "line 6, tutor: found a side called 'usr', expected 'user'"),
    "a side twice": (GOOD + "      user: x\n", "line 6, tutor: found user a second time, expected it once"),
    "an empty reply": (GOOD + "    - user: x\n      assistant:\n", "line 7, tutor: found an empty text, expected what"),
    "half a character": ('tutor:\n  system: "\\ud83d"\n', "line 2, tutor: found half a character"),
    "JSON without quotes": (
        QUIZ + '{"question":"x"}\n',
        "line 5, quizmaster: found a mapping, expected text (put JSON in single quotes)",
    ),
    "JSON with spaces": (
        QUIZ + """'{"question": "x", "correct": "a", "wrong": ["b","c","d"]}'\n""",
        f"""line 5, quizmaster: found '{{"question": "x", "correct": "a", "wrong": ["b","c","d"]}}', expected {FORM}""",
    ),
    "another JSON": (QUIZ + "'[1,2]'\n", f"line 5, quizmaster: found '[1,2]', expected {FORM}"),
    "no JSON": (QUIZ + "none\n", f"line 5, quizmaster: found 'none', expected {FORM}"),
    "a colon in a text": (GOOD + "    - user: a: b\n", "line 6, tutor: found broken YAML (mapping values are not"),
    "an open quote": (GOOD + "solver:\n  system: 'x\n", "solver: found broken YAML (found unexpected end of stream), "),
    "a tab": ("tutor:\n\tsystem: x\n", "line 2, tutor: found broken YAML (found character '\\t' that cannot start"),
    "two documents": (GOOD + "---\n" + GOOD, "line 6, tutor: found broken YAML (but found another document), "),
    "no such anchor": ("tutor: *x\n", "line 1, tutor: found broken YAML (found undefined alias "),
    "a control character": ("tutor:\n  system: a\x1bb\n", "line 2: found the control character '\\x1b', expected text"),
    "lists without end": ("[" * 100_000, "line 1: found lists in lists without end, expected a mapping of roles"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_by_role_and_line(kind, tmp_path):
    text, words = BROKEN[kind]
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(ConfigError) as refusal:
        load_prompts(path, DEFAULT_PROMPTS)
    message = str(refusal.value)
    assert "\n" not in message
    assert message.startswith(f"{path}, ")
    assert words in message


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, reason in ((tmp_path / "no.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=re.escape(f"prompts={path}: {reason}")):
            load_prompts(path)
    (tmp_path / "latin.yaml").write_bytes("tutor:\n  system: Erkl\u00e4re.\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.yaml, line 2: found bytes, expected text in UTF-8"):
        load_prompts(tmp_path / "latin.yaml")


def test_files_that_lack_a_role_between_them_are_refused(tmp_path):
    path = write(tmp_path / "mine.yaml", GOOD)
    with pytest.raises(
        ConfigError, match=r"mine.yaml: found no quizmaster, solver, learner, maths, expected all of tutor, "
    ):
        load_prompts(path)


def test_every_value_is_the_text_that_stands_there(tmp_path):
    """YAML would make of these a number, nothing, a truth value and a date."""
    examples = "".join(
        f"    - user: {word}\n      assistant: {word}\n" for word in ("007", "null", "yes", "2020-01-01")
    )
    block = "    - user: |\n        a\n        b\n      assistant: >\n        c\n        d\n"
    path = write(tmp_path / "mine.yaml", f"\ufefftutor:\n  system: 1e3\n  examples:\n{examples}{block}")
    tutor = load_prompts(path, DEFAULT_PROMPTS).tutor
    assert tutor.system == "1e3"
    assert [asked for asked, _ in tutor.examples[:4]] == ["007", "null", "yes", "2020-01-01"]
    assert tutor.examples[4] == ("a\nb", "c d")


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).map(str.strip).filter(bool)
ROLE = st.builds(Role, TEXTS, st.lists(st.tuples(TEXTS, TEXTS), max_size=2).map(tuple), st.booleans())


@settings(max_examples=200, deadline=None)
@given(prompts=st.builds(Prompts, ROLE, st.builds(Role, TEXTS, st.just((("x", "null"),))), ROLE, ROLE, ROLE))
def test_what_a_checkpoint_keeps_is_read_back(prompts, tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / PROMPTS_FILE
    assert load_prompts(write(path, prompts.as_yaml())) == prompts


# ------------------------------------------------------------------------------------------------------- the own files


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_examples_are_what_they_shall_teach(file):
    prompts = load_prompts(file)
    assert len(prompts.tutor.examples) == len(prompts.solver.examples) == len(prompts.learner.examples) == 4
    assert all(1 <= answer.count(".") <= 2 for _, answer in prompts.tutor.examples)
    assert sum(answer.startswith(("I do not know", "Ich wei\u00df nicht")) for _, answer in prompts.tutor.examples) == 1
    replies = [reply for _, reply in prompts.quizmaster.examples]
    assert replies.count("null") == 1
    quizzes = [parse_quiz(reply) for reply in replies if reply != "null"]
    for quiz, reply in zip(quizzes, [reply for reply in replies if reply != "null"], strict=True):
        assert quiz_json(*quiz) == reply
        question, correct, wrong = quiz
        assert all(len(option.split()) <= 2 and option.casefold() not in question.casefold() for option in wrong)
        assert correct.casefold() not in question.casefold()
    for role in (prompts.solver, prompts.learner):
        places = []
        for asked, reply in role.examples:
            options = dict(line.split(") ", 1) for line in asked.splitlines()[-4:])
            assert "".join(options) == LETTERS
            assert len(set(options.values())) == 4
            places.append(list(options.values()).index(reply))
        assert sorted(places) == [0, 1, 2, 3] or role is prompts.learner
        assert len(set(places)) >= 3
    for asked, reply in prompts.learner.examples[:2]:
        assert reply in asked.partition("\n\n")[0].casefold() + asked.partition("\n\n")[0]
    assert prompts.learner.examples[2][1] not in prompts.learner.examples[2][0].partition("\n\n")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_no_example_holds_a_fact_of_the_tables(file):
    prompts = load_prompts(file)
    for name in ROLES:
        for example in getattr(prompts, name).examples:
            text = "\n".join(example)
            assert example[0].casefold() not in known_questions()
            words = set(re.findall(r"\w+", text.casefold()))
            for fact in table_facts():
                sides = [set(re.findall(r"\w+", side.casefold())) for side in (fact.about, fact.answer)]
                assert not all(side <= words for side in sides), (name, text, fact.about, fact.answer)


# ------------------------------------------------------------------------------------------------------- in the program


def test_how_a_role_begins_includes_its_examples(llama):
    policy = tiny_policy(llama, prompts=str(DEFAULT_PROMPTS))
    for name in ROLES:
        role = getattr(policy.prompts, name)
        prompt = tuple(encode_chat(policy.tokenizer, role.messages("When was that?")))
        known = policy.beginnings.of([prompt])
        assert policy.tokenizer.decode(known).count("<|im_start|>assistant") == len(role.examples) >= 3
        assert role.examples[-1][1] in policy.tokenizer.decode(known)


LONG = "solver:\n  system: " + "Solve it. " * 225 + "\n"


@pytest.mark.parametrize("role", ["tutor", "quizmaster", "solver", "learner"])
def test_a_question_must_fit_the_prompts_of_every_role_of_its_turn(play, tmp_path, role):
    """The tiny model has room for 1024 tokens; the learner's prompts count where it takes the quizzes."""
    mine = write(tmp_path / "mine.yaml", LONG.replace("solver", role))
    question = "even " * 50
    questions = write(tmp_path / "questions.txt", f"{question}\n")
    person = play([question, "A"], prompts=mine)[1]
    simulated = play([], prompts=mine, learner="simulated", questions=questions, steps=1, resume="none")[1]
    assert ("tokens with its instructions; the model has room for 1018" in person) == (role != "learner")
    assert "tokens with its instructions; the model has room for 1018" in simulated


def test_a_run_that_goes_on_under_other_prompts_is_told_so(play, tmp_path):
    play(turns(1))
    kept = Path("checkpoints/step_1") / PROMPTS_FILE
    assert load_prompts(kept) == PROMPTS
    assert "other prompts" not in play([])[1]
    mine = write(tmp_path / "mine.yaml", "tutor:\n  system: Mine.\n")
    line = f"checkpoints/step_1 was trained under other prompts of tutor: set prompts={kept} to keep to them."
    status, output, run = play([], prompts=mine)
    assert status == 0
    assert output.count(line) == 1
    assert run.policy.step == 1
    assert "other prompts" not in play([], prompts=str(kept))[1]
    assert line in play([], prompts=mine, resume="checkpoints/step_1")[1]


def test_the_model_card_tells_the_tutors_prompts(llama, tmp_path):
    card = model_card(tiny_policy(llama), "A test.")
    assert (
        f"system message; use it, or expect nonsense:\n\n    {PROMPTS.tutor.system}\n\n`{PROMPTS_FILE}` holds" in card
    )
    mine = write(tmp_path / "mine.yaml", GOOD.replace("Teach.", "|\n    Teach,\n    well."))
    card = model_card(tiny_policy(llama, prompts=mine), "A test.")
    assert "    Teach,\n    well.\n\nAfter it came these messages, and then the question:\n\n    user: Why?\n" in card
    assert "    assistant: So.\n" in card


def test_settings_may_name_no_file(llama):
    assert tiny_policy(llama, prompts="").prompts == PROMPTS
    with pytest.raises(ConfigError, match=r"prompts=nowhere.yaml: No such file"):
        load_policy(tiny_config(llama, prompts="nowhere.yaml"))
