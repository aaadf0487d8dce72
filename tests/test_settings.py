"""Settings: defaults, precedence, errors that a person can act on, help, and the round trip through YAML."""

import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from config import Config
from lora_ppo.ppo import adapted_kl_coef
from lora_ppo.settings import (
    CHOICES,
    RANGES,
    ConfigError,
    check,
    from_command_line,
    help_text,
    known_name,
    parse,
    save_yaml,
    version,
)

ROOT = Path(__file__).resolve().parent.parent
NAMES = [f.name for f in fields(Config)]
# One value for each setting that is not its default: as the command line writes it, and as it is then held.
OTHER = {
    "model_name": ("some/model", "some/model"),
    "load_in_4bit": ("true", "true"),
    "bf16_copy": ("false", "false"),
    "device": ("cuda:1", "cuda:1"),
    "dtype": ("bfloat16", "bfloat16"),
    "compile": ("off", "off"),
    "prompts": ("prompts/german.yaml", "prompts/german.yaml"),
    "lora_r": ("8", 8),
    "lora_alpha": ("64", 64.0),
    "lora_dropout": ("0.1", 0.1),
    "target_modules": ("q_proj,v_proj", ["q_proj", "v_proj"]),
    "temperature": ("0.7", 0.7),
    "quiz_temperature": ("1", 1.0),
    "top_p": ("0.5", 0.5),
    "max_new_tokens": ("64", 64),
    "quiz_tries": ("5", 5),
    "learning_rate": ("3e-5", 3e-5),
    "batch_size": ("4", 4),
    "ppo_epochs": ("2", 2),
    "cliprange": ("0.1", 0.1),
    "cliprange_value": ("0.4", 0.4),
    "vf_coef": ("0.5", 0.5),
    "entropy_coef": ("1e-3", 1e-3),
    "gamma": ("0.99", 0.99),
    "lam": ("0", 0.0),
    "kl_coef": ("0.4", 0.4),
    "adaptive_kl": ("true", True),
    "kl_target": ("3", 3.0),
    "kl_horizon": ("500", 500),
    "target_kl": ("0.02", 0.02),
    "max_grad_norm": ("0.5", 0.5),
    "checkpoint_dir": ("elsewhere/c", "elsewhere/c"),
    "log_dir": ("elsewhere/l", "elsewhere/l"),
    "save_every": ("3", 3),
    "keep_checkpoints": ("2", 2),
    "precompute": ("off", False),
    "user": ("anna", "anna"),
    "pretest": ("true", True),
    "reward_right": ("0.5", 0.5),
    "reward_wrong": ("-2", -2.0),
    "reveal": ("true", True),
    "resume": ("none", "none"),
    "seed": ("42", 42),
    "learner": ("simulated", "simulated"),
    "questions": ("q.txt", "q.txt"),
    "steps": ("7", 7),
}
NEEDS = {"learner": {"questions": "q.txt"}}  # what must be set beside a setting's other value


def refusal(*arguments):
    """The message with which these arguments are refused: one line, always."""
    with pytest.raises(ConfigError) as caught:
        parse(Config, list(arguments))
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def yaml_file(tmp_path, text):
    path = tmp_path / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------------------ values and precedence


def test_defaults():
    config = parse(Config, [])
    assert config == Config()
    assert (config.model_name, config.load_in_4bit, config.device, config.dtype) == ("auto",) * 4
    assert (config.batch_size, config.ppo_epochs, config.lora_dropout, config.adaptive_kl) == (1, 1, 0.0, False)
    assert (config.cliprange, config.gamma, config.lam, config.resume) == (0.2, 1.0, 1.0, "auto")
    assert config.learning_rate is None


def test_lists_are_not_shared_between_configurations():
    Config().target_modules.append("lm_head")
    assert "lm_head" not in Config().target_modules


def test_the_table_of_other_values_is_whole():
    assert set(OTHER) == set(NAMES)
    assert all(getattr(Config(), name) != value for name, (_, value) in OTHER.items())


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_can_be_set_and_changes_nothing_else(name, tmp_path):
    text, value = OTHER[name]
    beside = NEEDS.get(name, {})
    for arguments in (
        [f"{name}={text}"],
        [f"--{name}={text}"],
        [f"--{name}", text],
        ["--config", yaml_file(tmp_path, f"{name}: {text}\n")],
    ):
        config = parse(Config, [*arguments, *(f"{other}={needed}" for other, needed in beside.items())])
        assert type(getattr(config, name)) is type(value)
        assert asdict(config) == asdict(Config()) | beside | {name: value}


def test_yaml_overrides_defaults_and_the_command_line_overrides_yaml(tmp_path):
    path = yaml_file(tmp_path, "lora_r: 4\nlora_alpha: 5\n")
    for arguments in (["--config", path, "lora_r=6"], ["lora_r=6", "--config", path], ["lora_r=6", f"--config={path}"]):
        config = parse(Config, arguments)
        assert (config.lora_r, config.lora_alpha, config.seed) == (6, 5, 0)


def test_the_last_of_two_on_the_command_line_counts():
    assert parse(Config, ["seed=1", "--seed", "2", "--seed=3"]).seed == 3


def test_yaml_lists_booleans_and_an_empty_file(tmp_path):
    assert parse(Config, ["--config", yaml_file(tmp_path, "target_modules: [q_proj, o_proj]\n")]).target_modules == [
        "q_proj",
        "o_proj",
    ]
    assert parse(Config, ["--config", yaml_file(tmp_path, "load_in_4bit: true\n")]).load_in_4bit == "true"
    assert parse(Config, ["--config", yaml_file(tmp_path, "# nothing\n")]) == Config()


def test_forms_of_a_list_and_of_auto():
    assert parse(Config, ["target_modules=[q_proj, v_proj]"]).target_modules == ["q_proj", "v_proj"]
    assert parse(Config, ["target_modules= q_proj ,v_proj,"]).target_modules == ["q_proj", "v_proj"]
    assert parse(Config, ["learning_rate=1e-3", "learning_rate=auto"]).learning_rate is None
    assert parse(Config, ["dtype=BFloat16"]).dtype == "bfloat16"


def test_text_stays_text():
    config = parse(Config, ["model_name=1e5", "log_dir=a=b", "checkpoint_dir=null", "resume=true"])
    assert (config.model_name, config.log_dir, config.checkpoint_dir, config.resume) == ("1e5", "a=b", "null", "true")


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("lerning_rate", "learning_rate"),
        ("lora_rank", "lora_r"),
        ("clip_range", "cliprange"),
        ("lora-alpha", "lora_alpha"),
        ("temprature", "temperature"),
        ("targetkl", "target_kl"),
        ("ppo_epoch", "ppo_epochs"),
    ],
)
def test_a_misspelt_setting_is_answered_with_the_nearest_one(wrong, near, tmp_path):
    for arguments in (
        [f"{wrong}=1"],
        [f"--{wrong}=1"],
        [f"--{wrong}", "1"],
        [f"--{wrong}"],
        ["--config", yaml_file(tmp_path, f"{wrong}: 1\n")],
    ):
        assert refusal(*arguments) == f"there is no setting '{wrong}': did you mean '{near}'?"


def test_a_setting_like_no_other_gets_no_guess():
    assert refusal("zzqqxx=1") == "there is no setting 'zzqqxx'; see --help"


@pytest.mark.parametrize("name", RANGES)
def test_values_out_of_range_are_refused_and_the_bounds_are_not(name):
    low, high, closed = RANGES[name]
    kind = next(f.type for f in fields(Config) if f.name == name)
    step = 1 if kind is int else (high - low) / 1000
    outside = [low - step, high + step, *([] if closed else [low])]
    for value in outside:
        value = int(value) if kind is int else float(value)
        bounds = f"{'at least' if closed else 'above'} {low:g} and at most {high:g}"
        assert refusal(f"{name}={value!r}") == f"{name}={value!r} is out of range: expected {bounds}"
    for value in [high, *([low] if closed else [low + step])]:
        value = int(value) if kind is int else float(value)
        assert getattr(parse(Config, [f"{name}={value!r}"]), name) == value


@pytest.mark.parametrize(
    "name", [name for name in RANGES if next(f for f in fields(Config) if f.name == name).type is not int]
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", ".nan"])
def test_numbers_that_are_not_finite_are_refused(name, value):
    assert refusal(f"{name}={value}").startswith(f"{name}=")


@pytest.mark.parametrize("name", CHOICES)
def test_a_value_that_is_no_choice_is_refused_with_the_choices(name):
    assert refusal(f"{name}=int3") == f"{name}='int3' is unknown: expected one of {', '.join(CHOICES[name])}"


@pytest.mark.parametrize(
    ("argument", "shown", "expected"),
    [
        ("lora_r=abc", "'abc'", "a whole number"),
        ("lora_r=1.5", "'1.5'", "a whole number"),
        ("lora_r=true", "'true'", "a whole number"),
        ("lora_r=", "''", "a whole number"),
        ("lora_r=auto", "'auto'", "a whole number"),
        ("lora_r=[1]", "'[1]'", "a whole number"),
        ("lora_r={a: 1}", "'{a: 1}'", "a whole number"),
        ("lora_r=[1", "'[1'", "a whole number"),
        ("lora_r=\x07", r"'\x07'", "a whole number"),
        ("seed=1e3", "'1e3'", "a whole number"),
        ("gamma=half", "'half'", "a number"),
        ("gamma=1,0", "'1,0'", "a number"),
        ("learning_rate=fast", "'fast'", "a number, or auto"),
        ("learning_rate=true", "'true'", "a number, or auto"),
        ("adaptive_kl=maybe", "'maybe'", "true or false"),
        ("adaptive_kl=null", "'null'", "true or false"),
        ("target_modules=[q_proj", "'[q_proj'", "names, separated by commas"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(argument, shown, expected):
    assert refusal(argument) == f"{argument.partition('=')[0]}={shown} does not fit: expected {expected}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_r: [1]", "lora_r=[1] does not fit: expected a whole number"),
        ("lora_r: {a: 1}", "lora_r={'a': 1} does not fit: expected a whole number"),
        ("lora_r: 1.5", "lora_r=1.5 does not fit: expected a whole number"),
        ("lora_r: .inf", "lora_r=inf does not fit: expected a whole number"),
        ("gamma: true", "gamma=True does not fit: expected a number"),
        ("model_name: null", "model_name=None does not fit: expected text"),
        ("model_name: [a]", "model_name=['a'] does not fit: expected text"),
        ("target_modules: 5", "target_modules=5 does not fit: expected names, separated by commas"),
        ("target_modules: {a: b}", "target_modules={'a': 'b'} does not fit: expected names, separated by commas"),
        ("lora_r: 0", "lora_r=0 is out of range: expected at least 1 and at most 4096"),
        ("dtype: int8", "dtype='int8' is unknown: expected one of auto, float32, bfloat16"),
    ],
)
def test_a_value_of_the_wrong_type_in_yaml_is_refused(text, message, tmp_path):
    assert refusal("--config", yaml_file(tmp_path, text + "\n")) == message


def test_rewards_that_teach_nothing_are_refused():
    expected = "reward_right=0 and reward_wrong=0: nothing would be learned, set one of them"
    assert refusal("reward_right=0", "reward_wrong=0") == expected


@pytest.mark.parametrize("name", ["../x", "a/b", ".", "-x", "~", "a/../b", " "])
def test_a_user_is_a_plain_name(name):
    assert refusal(f"user={name}") == (
        f"user={name!r} is no name for a folder: use letters, digits, spaces, dots and hyphens"
    )


def test_no_target_modules_are_refused():
    for argument in ("target_modules=", "target_modules=[]", "target_modules=,"):
        assert refusal(argument).startswith("target_modules=[]: name at least one")


def test_a_simulated_learner_without_questions_is_refused():
    assert refusal("learner=simulated").startswith("learner=simulated needs questions=FILE")


def test_a_coefficient_that_could_not_be_steered_or_would_change_its_sign_is_refused():
    """One step multiplies it by 1 - 0.2 x batch_size / kl_horizon at the least."""
    assert refusal("adaptive_kl=true", "kl_coef=0").startswith("adaptive_kl=true with kl_coef=0: 0 stays 0")
    for horizon in (10, 12):
        told = refusal("adaptive_kl=true", "batch_size=64", f"kl_horizon={horizon}")
        assert told.startswith(f"kl_horizon={horizon} with batch_size=64")
        assert "to 13 at least" in told
    config = parse(Config, "adaptive_kl=true batch_size=64 kl_horizon=13".split())
    assert adapted_kl_coef(0.1, 0.0, 6.0, config.kl_horizon, config.batch_size) > 0
    parse(Config, "kl_coef=0 batch_size=64 kl_horizon=1".split())  # not steered


def test_what_is_no_setting_at_all_is_refused():
    for word in ("lora_r", "-x", "lora_r: 5", ""):
        assert refusal(word) == f"{word!r} is no setting: write name=value or --name value (see --help)"
    assert refusal("--lora_r") == "--lora_r needs a value"
    assert refusal("--config") == "--config needs a value"
    assert refusal("=5").startswith("there is no setting ''")


@pytest.mark.parametrize("text", ["a: [", "{", "\t", "lora_r: 2\nlora_r: 3", "lora_r: 2\n---\nlora_r: 3"])
def test_a_file_that_is_not_yaml_is_refused(text, tmp_path):
    path = yaml_file(tmp_path, text)
    assert refusal("--config", path).startswith(f"--config {path} is not valid YAML: ")


def test_a_file_of_the_wrong_form_is_refused(tmp_path):
    path = yaml_file(tmp_path, "- lora_r\n- 5\n")
    assert refusal("--config", path) == f"--config {path}: expected lines of the form `name: value`"
    assert refusal("--config", yaml_file(tmp_path, "5")).startswith(f"--config {path}: ")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    missing = tmp_path / "no.yaml"
    assert refusal("--config", str(missing)) == f"--config {missing}: No such file or directory"
    assert refusal("--config", str(tmp_path)).startswith(f"--config {tmp_path}: ")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert refusal("--config", str(tmp_path / "binary.yaml")).startswith(f"--config {tmp_path / 'binary.yaml'} ")


@pytest.mark.parametrize("argument", ["device=???", "target_modules=???"])
def test_what_omegaconf_takes_for_its_own_syntax_is_refused(argument):
    assert refusal(argument).startswith(argument.partition("=")[0])


def test_a_choice_with_a_line_break_is_refused_in_one_line():
    assert refusal("dtype=a\nb").startswith("dtype=")


def test_a_number_with_more_lines_is_refused():
    refusal("lora_r=5\nfoo: 3")


def test_a_list_in_the_list_of_modules_is_refused():
    refusal("target_modules=[[q_proj]]")


def test_ranges_and_choices_name_settings():
    assert set(RANGES) <= set(NAMES)
    assert set(CHOICES) <= set(NAMES)
    assert not set(RANGES) & set(CHOICES)
    numbers = {f.name for f in fields(Config) if f.type in (int, float, float | None)}
    assert set(RANGES) == numbers  # every number has bounds


def test_check_returns_what_is_right_and_the_defaults_are():
    config = Config()
    assert check(config) is config
    for name, allowed in CHOICES.items():
        assert all(check(Config(**(NEEDS.get(name, {}) | {name: value}))) for value in allowed)


# ----------------------------------------------------------------------------------------------------------- round trip


def test_the_effective_configuration_reads_back_as_it_was(tmp_path):
    path = tmp_path / "effective_config.yaml"
    odd = {
        "log_dir": "Größe: #1 two",
        "checkpoint_dir": "null",
        "resume": "'q'",
        "seed": 2**63 - 1,
        "learning_rate": 3e-7,
    }
    for config in (Config(), Config(**{name: value for name, (_, value) in OTHER.items()}), Config(**odd)):
        save_yaml(config, path)
        assert parse(Config, ["--config", str(path)]) == config
        assert [line.partition(":")[0] for line in path.read_text("utf-8").splitlines() if line[0].isalpha()] == NAMES


# ------------------------------------------------------------------------------------------------- help and the program


def entries(text: str) -> list[str]:
    """The entries of a help text, a setting each, in one line."""
    whole = re.sub(r"\n {3,}", " ", text)  # what was wrapped
    return [line for line in whole.splitlines() if re.match(r"  \w+ {2,}", line)]


def test_help_has_an_entry_for_every_setting_with_its_default_in_80_columns():
    text = help_text(Config, "usage: x")
    assert text.startswith("usage: x\n")
    assert max(map(len, text.splitlines())) <= 80
    assert re.findall(r"^(\w+):$", text, flags=re.MULTILINE) == ["model", "generation", "PPO", "session"]
    body = entries(text)
    assert [line.split()[0] for line in body] == NAMES
    for f, line in zip(fields(Config), body, strict=True):
        assert f.metadata["help"] in line
        value = getattr(Config(), f.name)
        shown = "auto" if value is None else ",".join(value) if isinstance(value, list) else value
        assert line.endswith(f" [{shown}]")


def test_help_can_leave_settings_out_and_then_names_no_empty_group():
    text = help_text(Config, "usage: x", only=("seed", "lora_r"))
    assert [line.split()[0] for line in entries(text)] == ["lora_r", "seed"]
    assert re.findall(r"^(\w+):$", text, flags=re.MULTILINE) == ["model", "session"]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_wins_over_errors(flag, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "lerning_rate=1", flag])
    with pytest.raises(SystemExit) as caught:
        from_command_line(Config, "usage: x")
    out = capsys.readouterr()
    assert caught.value.code == 0
    assert out.out.startswith("usage: x\n")
    assert out.err == ""


def run(*arguments, code=("lora_ppo_demo.py",), cwd=ROOT):
    return subprocess.run([sys.executable, *code, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_program_answers_help_without_the_heavy_libraries():
    script = (
        "import atexit, runpy, sys\n"
        "heavy = ('torch', 'transformers', 'peft', 'bitsandbytes', 'omegaconf', 'numpy', 'rich', 'prompt_toolkit')\n"
        "atexit.register(lambda: print('LOADED', [name for name in heavy if name in sys.modules]))\n"
        "sys.argv = ['lora_ppo_demo.py', '--help']\n"
        "runpy.run_path('lora_ppo_demo.py', run_name='__main__')\n"
    )
    done = run(code=("-c", script))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "LOADED []"
    assert lines[0].startswith("usage: python lora_ppo_demo.py")
    assert [line.split()[0] for line in entries("\n".join(lines))] == NAMES
    assert max(map(len, lines)) <= 80
    assert any("python lora_ppo_demo.py resume=none" in line for line in lines)


def test_the_version_is_that_of_the_project():
    done = run("--version")
    assert done.stdout == f"{version()}\n"
    assert version().split()[1] in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("name", "meant"), [("lr", "learning_rate"), ("lerning_rate", "learning_rate"), ("model", "model_name")]
)
def test_a_name_that_is_none_is_answered_with_the_one_that_was_meant(name, meant):
    with pytest.raises(ConfigError, match=f"did you mean {meant!r}"):
        known_name(Config, name)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lerning_rate=1", "error: there is no setting 'lerning_rate': did you mean 'learning_rate'?"),
        ("lora_r=0", "error: lora_r=0 is out of range: expected at least 1 and at most 4096"),
    ],
)
def test_the_program_refuses_a_bad_setting_with_one_line_and_status_2(argument, message, tmp_path):
    done = run(argument, code=(str(ROOT / "lora_ppo_demo.py"),), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [message]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []  # nothing was begun
