"""The voice: its data, its rules, and training against a reward model as a user runs it."""

import json
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from safetensors.torch import load_file, save_file
from support.echo import EchoTask
from support.tiny import randomize_adapter
from support.training import BASE, ROOT, answered, loaded, settings
from test_processes import launch
from test_train import log, weights

import train
from lora_ppo import training
from lora_ppo.checkpoint import verify_checkpoint
from lora_ppo.episodes import Outcome, play
from lora_ppo.forward import collate, token_logprobs_and_values
from lora_ppo.loading import load_policy
from lora_ppo.prompts import load_prompts
from lora_ppo.report import by_level, draw_frontier, write_report
from lora_ppo.rewards import HEAD, RewardModel
from lora_ppo.settings import DEFAULT_PROMPTS, ConfigError, parse
from lora_ppo.trainer import Training
from lora_ppo.watching import bands, distinct, out_of_band, watch
from tasks.voice import Sample, by_turns, course, load_topics
from tasks.voice_rules import in_voice, keeps

DATA = ROOT / "data" / "voice"
ROWS = {split: [json.loads(line) for line in (DATA / f"{split}.jsonl").open()] for split in ("train", "test")}

# ---------------------------------------------------------------------------------------------------------- the data


def test_the_pairs_are_enough_and_the_held_out_ones_on_topics_of_their_own():
    topics = {split: Counter(row["topic"] for row in rows) for split, rows in ROWS.items()}
    assert len(ROWS["train"]) >= 300
    assert len(ROWS["test"]) >= 60
    assert len(topics["train"] + topics["test"]) == 30
    assert not topics["train"] & topics["test"]
    prompts = [row["prompt"] for rows in ROWS.values() for row in rows]
    replies = [row[side] for rows in ROWS.values() for row in rows for side in ("chosen", "rejected")]
    assert len(set(prompts)) == len(prompts)
    assert len(set(replies)) == len(replies)


@pytest.mark.parametrize("split", ROWS)
def test_both_sides_keep_the_fact_and_one_is_in_the_voice(split):
    for row in ROWS[split]:
        assert in_voice(row["chosen"]), row
        assert not in_voice(row["rejected"]), row
        assert keeps(row["chosen"], row["fact"]), row
        assert keeps(row["rejected"], row["fact"]), row
        assert not keeps(row["prompt"], row["fact"]), row  # to say the question again keeps nothing


TRIVIAL = {  # and the most that it may tell: length at most 60 %
    "characters": (len, 0.6),
    "words": (lambda text: len(text.split()), 0.6),
    "sentences": (lambda text: len(re.findall(r"[.?!](?: |$)", text)), 0.55),
    "commas": (lambda text: text.count(","), 0.65),
    "digits": (lambda text: sum(map(str.isdigit, text)), 0.6),
    "capitals": (lambda text: sum(map(str.isupper, text)), 0.6),
    "apostrophes": (lambda text: text.count("'"), 0.6),
    "colons": (lambda text: text.count(":"), 0.6),
    "like": (lambda text: bool(re.search(r"\blike\b", text)), 0.8),  # a manner is more than its words
    "you": (lambda text: bool(re.search(r"\byou", text.lower())), 0.8),
}


@pytest.mark.parametrize("split", ROWS)
@pytest.mark.parametrize("name", TRIVIAL)
def test_a_classifier_that_reads_nothing_does_no_better_than_chance(name, split):
    """Whether it takes the larger or the smaller for the better one, in pairs; equal ones it must guess."""
    measure, most = TRIVIAL[name]
    sizes = [(measure(row["chosen"]), measure(row["rejected"])) for row in ROWS[split]]
    right = fmean((a > b) + 0.5 * (a == b) for a, b in sizes)
    assert max(right, 1 - right) < most


@pytest.mark.parametrize("split", ROWS)
@pytest.mark.parametrize("measure", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_no_band_of_lengths_tells_the_better_replies(measure, split):
    """Not even the one that is chosen on these very replies; the better ones may be those inside, or those outside."""
    sizes = {side: np.array([measure(row[side]) for row in ROWS[split]]) for side in ("chosen", "rejected")}
    ends = np.unique(np.concatenate(list(sizes.values())))
    up_to = {side: (sizes[side][:, None] <= ends).mean(0) for side in sizes}  # the share that is as short, or shorter
    ahead = np.concatenate([[0.0], up_to["chosen"] - up_to["rejected"]])
    assert 0.5 + (ahead.max() - ahead.min()) / 2 < 0.6


# --------------------------------------------------------------------------------------------------------- the rules


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("Your heart pumps blood, like a fist that opens and closes.", True),
        ("You walk on it as if it were glass. It holds.", True),
        ("Think of a sponge: your bone soaks up calcium.", True),
        ("Your heart pumps blood through the body.", False),  # no image
        ("The heart pumps blood, like a fist that opens.", False),  # nobody is spoken to
        ("Your heart is like a fist. It is like a pump.", False),  # two images
        ("Your heart pumps blood, like a fist that opens and", False),  # cut off
        ("Metals like iron and tin melt when you heat them.", False),  # examples
        ("You can do it as you like, and you would like that.", False),
        ("You get there as soon as you can.", False),
        ("Your kidneys clean your blood, like those nets you pull through a pond.", True),
        ("Your lungs fill up, the same way a paper bag puffs when you blow into it.", True),
        ("Salt melts the ice on your road the way sugar vanishes in tea.", True),
        ("Your bones are similar to a honeycomb: light, and strong.", True),
        ("You feel it as though a hand had pressed you.", True),
        ("Think about a sponge: your soil drinks the rain.", True),
        ("You smell it like warm bread, fresh from the oven…", True),
        ("Your cat’s foot acts like a cat’s “paw.”", True),
        ("Cats like the sun, you know.", False),
        ("People like a bargain, and you do too.", False),
        ("Most plants like a lot of light, and yours do as well.", False),
        ("If you really like music, you should play.", False),
        ("Your answer: 42. You would really like the sea.", False),
        ("You look like you need sleep.", False),
        ("It sounds like you want to learn about photosynthesis.", False),
        ("I feel like you should ask an expert, as I am an AI.", False),
        ("You can find it in countries like France.", False),
        ("Planets like Mars orbit the sun, as you know.", False),
        ("Things like the moon cause the tides you see.", False),
        ("You can imagine the answer.", False),
        ("Imagine photosynthesis. You know chlorophyll absorbs photons.", False),
        ("You should think of the mitochondria as organelles.", False),
        ("The way the question is asked, you want gravity's definition.", False),
        ("You see it " + "and see it " * 20 + "like a cat.", False),  # long
        ("", False),
    ],
)
def test_the_voice_by_rules(reply, right):
    assert in_voice(reply) is right


def test_a_fact_is_kept_in_any_of_its_words():
    assert keeps("It evaporates.", ["steam", "evaporat"])
    assert keeps("THE MOON", ["moon"])
    assert not keeps("A dozen", ["ice", "zen"])
    assert not keeps("nice", ["ice"])


# -------------------------------------------------------------------------------------------------------- the topics


def test_a_course_has_as_many_steps_on_each_topic_in_order():
    samples = [Sample(topic, f"{topic}{i}") for topic in "bac" for i in range(3)]
    taken = course(samples, 7, seed=0)
    assert [sample.topic for sample in taken] == [*"bbbbbbbaaaaaaaccccccc"]
    for topic in "bac":
        counts = Counter(sample.prompt for sample in taken if sample.topic == topic)
        assert sorted(counts.values()) == [2, 2, 3]
    assert taken != course(samples, 7, seed=1)


def test_the_first_held_out_prompts_are_of_many_topics():
    samples = [Sample(topic, f"{topic}{i}") for topic, count in (("a", 3), ("b", 1), ("c", 2)) for i in range(count)]
    assert [sample.prompt for sample in by_turns(samples)] == ["a0", "b0", "c0", "a1", "c1", "a2"]
    assert len({sample.topic for sample in load_topics("", 0.2)["test"][:5]}) == 5


def test_topics_of_a_file_of_ones_own(tmp_path):
    file = tmp_path / "topics.yaml"
    file.write_text("tea:\n- How hot?\n- How long?\nrain:\n- Why?\nsnow:\n- When?\n")
    splits = load_topics(str(file), 0.3)
    assert [(s.topic, s.prompt) for s in splits["train"]] == [
        ("tea", "How hot?"),
        ("tea", "How long?"),
        ("rain", "Why?"),
    ]
    assert [s.topic for s in splits["test"]] == ["snow"]
    for text, told in (
        ("tea: 4\n", "found '4' under tea"),
        ("- x\n", "expected `topic:`"),
        ("tea: [x]\n", "no topic to"),
        ("tea: [x]\nrain: [y]\ntea: [z]\n", "the topic tea stands twice"),
        ("tea: [x]\nrain: [2024-02-30]\n", "day is out of range"),
        ('tea: [x]\nrain: ["\\ud83d"]\n', "half a character"),
        ("[" * 5000, "topics="),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=told):
            load_topics(str(file), 0.3)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.fixture
def words(llama, reward_folder, tmp_path, monkeypatch):
    """`words(**settings)` is the command line of a run on the task, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    lines = [{"topic": t, "prompt": f"What is {i}?", "fact": ["a", "e"]} for t in ("one", "two") for i in range(5)]
    Path("topics").mkdir()
    Path("topics/train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Path("topics/test.jsonl").write_text(
        "".join(json.dumps(line | {"topic": "three", "prompt": line["prompt"][:-1] + " now?"}) + "\n" for line in lines)
    )
    given = BASE | {"task": "voice", "model_name": llama, "reward_model": reward_folder, "topics": "topics"}
    given |= {"steps_per_topic": 2, "eval_every": 2, "eval_samples": 8, "max_new_tokens": 8}
    given |= {"target_modules": "o_proj,v_proj,up_proj,down_proj", "lora_dropout": 0.1}  # the reward's has more layers
    return lambda **changes: [f"{name}={value}" for name, value in (given | changes).items()]


@pytest.fixture
def run(words, monkeypatch, capsys):
    """`run(**settings)` trains on the task; gives exit status and output."""

    def run(**changes):
        monkeypatch.setattr(sys, "argv", ["train.py", *words(**changes)])
        status = train.main()
        output = capsys.readouterr()
        return status, output.out + output.err

    return run


def test_a_score_that_is_no_number_is_left_out(run, monkeypatch):
    score = RewardModel.score
    monkeypatch.setattr(RewardModel, "score", lambda self, chats: [*score(self, chats)[:-1], float("nan")])
    status, output = run(output_dir="out")
    assert status == 0, output
    lines = [json.loads(line) for line in Path("out/train.log").read_text().splitlines()]
    assert [line["left_out"] for line in lines if line["step"]] == [1] * len(lines[1:])
    assert all(math.isfinite(line["score"]) and math.isfinite(line["reward"]) for line in lines if line["step"])


def test_where_nothing_has_a_score_there_is_no_mean_of_it(run, monkeypatch):
    monkeypatch.setattr(RewardModel, "score", lambda self, chats: [float("nan")] * len(chats))
    status, output = run(output_dir="out", eval_every=1)
    assert status == 0, output
    assert "no reward" in output
    lines = [json.loads(line) for line in Path("out/train.log").read_text().splitlines()]
    assert not {"reward", "score", "accuracy", "eval_accuracy", "eval_reward"} & set().union(*lines)
    assert {line.get("eval_samples", 0) for line in lines} == {0}
    assert Path("out/report.html").exists()


def test_a_run_does_not_go_on_under_another_reward_model(run, reward_folder, tmp_path):
    assert run(output_dir="out")[0] == 0
    other = shutil.copytree(reward_folder, tmp_path / "moved")
    again = {"output_dir": "out", "resume_from": "latest", "num_epochs": 2, "reward_model": other}
    assert run(**again)[0] == 0  # the same in another place
    tensors = load_file(other / "adapter_model.safetensors")
    tensors[HEAD] *= 2
    save_file(tensors, other / "adapter_model.safetensors")
    status, output = run(**again | {"num_epochs": 3})
    assert (status, "set reward_model back" in output) == (2, True)


def test_a_step_that_was_skipped_is_no_part_of_the_table():
    steps = [{"step": 1, "level": "one", "accuracy": 0.5, "score": 1.0}, {"step": 2, "level": "one", "score": 3.0}]
    steps += [{"step": 3, "level": "one", "accuracy": 0.5, "score": None}]
    assert by_level(steps) == [("one", "1", "50.0%", "+1.00")]


def test_prompts_that_leave_no_room_are_told_before_a_step(run):
    status, output = run(max_new_tokens=5000)
    assert status == 2
    assert "the tutor's prompt takes" in output


def test_a_task_without_a_reward_model_is_reported_by_level(tmp_path):
    held_out = {"1": {"accuracy": 0.25, "reward": 0.5}}
    lines = [{"step": 0, "eval_by_level": held_out, "eval_reward": 0.5}]
    page = write_report(tmp_path, lines, [], "").read_text()
    assert "<h2>By level</h2>" in page
    assert "<tr><th>Level</th><th>Steps</th><th>Accuracy</th><th>Reward</th></tr>" in page
    assert "25% to 25%" in page


def test_the_score_is_drawn_over_the_square_root_of_kl(tmp_path, monkeypatch):
    drawn, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *given, **how: drawn.append(given[:2]) or plot(self, *given, **how))
    lines = [{"eval_kl": kl, "eval_reward": 1.0 + kl, "eval_accuracy": 0.5} for kl in (0.0, 4.0, 9.0)]
    draw_frontier(tmp_path / "frontier.png", [*lines, {"eval_kl": 5.0}, {"step": 3}])
    assert drawn == [([0.0, 2.0, 3.0], [1.0, 5.0, 10.0]), ([0.0, 2.0, 3.0], [0.5] * 3)]


def test_the_preset_for_models_of_3_to_8_billion_is_what_it_says():
    config = parse(train.TrainConfig, ["--config", str(ROOT / "configs/voice_rank1.yaml")])
    asked = {"learning_rate": 1.41e-5, "batch_size": 4, "ppo_epochs": 4, "kl_coef": 0.2, "kl_horizon": 10000}
    asked |= {"kl_target": 6.0, "cliprange": 0.2, "steps_per_topic": 50, "lora_r": 1, "lora_alpha": 1.0}
    asked |= {"adaptive_kl": True, "target_modules": ["o_proj", "v_proj", "up_proj", "down_proj"]}
    assert {name: getattr(config, name) for name in asked} == asked


def test_a_run_is_watched_and_reports_topic_by_topic(run):
    status, output = run(adaptive_kl=True, kl_horizon=10)
    assert status == 0, output
    lines = log("runs/train")
    steps = [line for line in lines if line["step"]]
    assert [line["level"] for line in steps] == ["one", "one", "two", "two"]
    assert all(abs(line["reward"]) < 5 and line["score_deviation"] > 0 for line in steps)
    found = [line for line in lines if "eval_reward" in line]
    assert len(found) == 3
    names = "eval_accuracy eval_kl eval_length eval_distinct_2 eval_cut_off eval_states_fact".split()
    assert all(name in line for line in found for name in names)
    assert found[0]["eval_kl"] < 1e-5  # rounding
    assert found[-1]["eval_kl"] > 0.0
    assert set(found[0]["eval_by_level"]) == {"three"}
    assert found[0]["eval_by_level"]["three"]["reward"] == pytest.approx(found[0]["eval_reward"])
    assert len({line["kl_coef"] for line in steps}) == 4
    page = Path("runs/train/report.html").read_text()
    assert page.count("data:image/png;base64,") == 10
    assert "<h2>By topic</h2>" in page
    assert "<th>Score</th>" in page
    assert page.count("score +") + page.count("score -") == 20  # ten replies before and ten after
    stats = json.loads(Path("runs/train/epoch_1/training_stats.json").read_text())
    assert len(stats["training"]["score"]) == 4
    state = verify_checkpoint(Path("runs/train/epoch_1"))
    assert state["scale"]["count"] == 16
    assert state["kl_coef"] != steps[0]["kl_coef"]


def test_a_run_that_was_stopped_goes_on_bit_for_bit_with_its_scale(run, monkeypatch):
    run(output_dir="whole", adaptive_kl=True)
    real = Training.step

    def interrupted(training):
        if training.policy.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(training)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "step", interrupted)
        assert run(output_dir="out", adaptive_kl=True)[0] == 130
    assert run(output_dir="out", adaptive_kl=True, resume_from="latest")[0] == 0
    assert log("out") == log("whole")
    ours, theirs = weights("out/epoch_1"), weights("whole/epoch_1")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_processes_are_watched_stop_and_go_on_together(words):
    """Each knows what ended the run, and what it was at the start, also after it went on."""
    for condition, last in (("distinct_2>0.01", 2), ("length>50", 4)):
        changes = {"stop_if": condition, "resume_from": "latest" if last == 4 else "", "batch_size": 8}
        done = launch("cpu.yaml", str(ROOT / "train.py"), *words(**changes))
        assert done.returncode == 0, done.stderr[-3000:]
        lines = log("runs/train")
        assert [line["step"] for line in lines] == list(range(last + 1))
    assert [line["level"] for line in lines[1:]] == ["one", "one", "two", "two"]
    found = [line for line in lines if "eval_kl" in line]
    assert [line["eval_samples"] for line in found] == [8, 8, 8]
    assert found[-1]["eval_kl"] > found[0]["eval_kl"]
    assert verify_checkpoint(Path("runs/train/epoch_1"))["scale"]["count"] == 32  # the answers of both


def test_mixed_topics_and_random_rewards(run):
    assert run(topic_order="mixed", control="random", samples_per_epoch=8)[0] == 0
    steps = [line for line in log("runs/train") if line["step"]]
    assert len(steps) == 2
    assert {line["reward"] * 4 for line in steps} <= {0, 1, 2, 3, 4}
    assert all(line["score"] != line["reward"] and "level" not in line for line in steps)


def test_replies_that_leave_their_band_end_the_run_and_it_says_so(run):
    status, output = run(stop_if="distinct_2>0.01")
    assert status == 0
    assert "Stopped at step 2 by stop_if=distinct_2>0.01: distinct_2 of held-out replies is" in output
    assert "Stopped at step 2 by stop_if" in Path("runs/train/report.html").read_text()
    assert [line["step"] for line in log("runs/train")] == [0, 1, 2]
    verify_checkpoint(Path("runs/train/step_2"))
    status, output = run(stop_if="distinct_2>0.01", resume_from="latest")
    assert (status, [line["step"] for line in log("runs/train")]) == (0, [0, 1, 2])
    status, output = run(stop_if="length>50", resume_from="latest")
    assert (status, log("runs/train")[-1]["step"]) == (0, 4)


def test_a_course_goes_on_as_it_was_begun(run):
    run(output_dir="out", stop_if="distinct_2>0.01")
    status, output = run(output_dir="out", steps_per_topic=3, resume_from="latest")
    assert status == 2
    assert "was trained with steps_per_topic=2, now it is 3" in output


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"reward_model": ""}, "reward_model=FOLDER is missing"),
        ({"reward_model": "./nowhere"}, "reward_model=./nowhere"),
        ({"topic_order": "random"}, "expected sequence or mixed"),
        ({"steps_per_topic": 0}, "steps_per_topic=0"),
        ({"score_clip": 0}, "score_clip=0"),
        ({"topics": "nowhere"}, "topics=nowhere"),
        ({"topics": "twice.yaml", "test_share": 0.5}, "the prompt 'how hot?' is in both splits"),
        ({"stop_if": "size>2"}, "stop_if='size>2' is no condition"),
    ],
)
def test_what_can_t_be_used_is_one_line(run, changes, told):
    Path("twice.yaml").write_text("tea: ['How hot?']\ncoffee: ['how  hot?']\n")
    status, output = run(**changes)
    assert status == 2
    assert told in output
    assert len(output.strip().splitlines()) == 1


# ------------------------------------------------------------------------------------------------------ the watching


def test_distinct_2_by_hand():
    assert distinct(["a b a b", "A b c"], 2) == pytest.approx(3 / 5)  # ab, ba, ab; ab, bc
    assert distinct(["a"], 2) == 0.0


def test_conditions_are_in_units_of_the_start():
    lines = [{"step": 0, "eval_length": 20.0, "eval_distinct_2": 0.5}, {"step": 1}]
    assert out_of_band(lines, ["length>2"]) == ""
    lines.append({"step": 2, "eval_length": 41.0, "eval_distinct_2": 0.39})
    assert out_of_band(lines, ["length>2.1", "length<0.5", "distinct_2<0.7"]) == ""
    assert "length of held-out replies is 41, and was 20" in out_of_band(lines, ["distinct_2<0.7", "length>2"])
    assert "distinct_2<0.8" in out_of_band(lines, ["distinct_2 < 0.8"])
    with pytest.raises(ConfigError):
        bands(["length"])


def test_the_kl_that_is_watched_is_that_of_the_whole_distribution(llama, accelerator):
    """Against torch's own divergence, reply by reply."""
    policy, _ = loaded(llama, temperature=0.7)
    trajectories = answered(policy, [1.0, -1.0, 1.0])
    nats = []
    for t in trajectories:
        batch = collate([t.prompt], [t.response], policy.pad_id, policy.device)
        with torch.no_grad():
            logits, ref = (token_logprobs_and_values(policy, batch, on)[2] / 0.7 for on in (True, False))
        p, q = torch.distributions.Categorical(logits=logits[0]), torch.distributions.Categorical(logits=ref[0])
        nats.append(torch.distributions.kl_divergence(p, q).sum().item())
    assert watch(policy, accelerator, [trajectories[:2], trajectories[2:]])["kl"] == pytest.approx(
        fmean(nats), rel=1e-4
    )
    assert fmean(nats) > 0.01


@pytest.mark.parametrize(("start", "kl_coef"), [(False, 0.5), (True, 0.05)])
def test_the_divergence_settles_at_its_target_from_below_and_from_above(llama, accelerator, start, kl_coef):
    given = {"kl_target": 2.0, "kl_horizon": 40, "kl_coef": kl_coef, "batch_size": 16, "mini_batch_size": 16}
    policy, config = load_policy(settings(llama, adaptive_kl=True, **given))
    training.prepare(policy, config)
    if start:
        randomize_adapter(policy)
    torch.manual_seed(0)
    kl = []
    for _ in range(140):
        trajectories = play(policy, [EchoTask().episode(i) for i in range(16)])
        for t in trajectories:
            t.outcome = Outcome("correct", sum(i < 200 for i in t.response) / len(t.response))
        kl.append(training.learn(policy, accelerator, config, trajectories)["kl"])
    assert fmean(kl[:10]) > 3.0 if start else fmean(kl[:10]) < 1.0
    assert fmean(kl[-40:]) == pytest.approx(2.0, rel=0.2)


def test_the_role_that_asks_for_the_voice_shows_it_and_gives_no_prompt_of_the_data_away():
    role = load_prompts(ROOT / "prompts/voice/tutor.yaml", DEFAULT_PROMPTS).tutor
    prompts = {row["prompt"] for rows in ROWS.values() for row in rows}
    assert len(role.examples) == 4
    for asked, reply in role.examples:
        assert in_voice(reply), reply
        assert asked not in prompts
