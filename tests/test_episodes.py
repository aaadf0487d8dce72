"""Episodes are played into trajectories of tokens."""

import pytest
import torch
from support.echo import EchoEpisode, EchoTask
from support.tiny import tiny_policy
from support.training import loaded

import lora_ppo.episodes
from lora_ppo import evaluation, training
from lora_ppo.chat import encode_chat
from lora_ppo.episodes import Outcome, play


def test_several_replies_make_one_trajectory_and_only_they_are_chosen(llama_policy):
    task = EchoTask(turns=3)
    torch.manual_seed(0)
    trajectory = play(llama_policy, [task.episode(5)])[0]
    assert len(trajectory.replies) == 3
    assert trajectory.outcome.verdict in ("correct", "incorrect")
    parts, policy_ids = [], []
    for token, chosen in zip(trajectory.response, trajectory.chosen, strict=True):
        if not parts or parts[-1][0] != chosen:
            parts.append((chosen, []))
        parts[-1][1].append(token)
        policy_ids += [token] if chosen else []
    assert [chosen for chosen, _ in parts] == [True, False, True, False, True]
    decode = llama_policy.tokenizer.decode
    assert [decode(ids, skip_special_tokens=True) for chosen, ids in parts if chosen] == trajectory.replies
    for chosen, ids in parts:
        assert chosen or "and then 5?" in decode(ids)
    assert trajectory.length == len(policy_ids)


def test_episodes_of_different_length_are_played_together_as_each_alone_would_be(llama_policy, monkeypatch):
    contexts = []
    real = lora_ppo.episodes.replies

    def replies(policy, requests):
        contexts.append([list(request.prompt_ids) for request in requests])
        return real(policy, requests)

    monkeypatch.setattr("lora_ppo.episodes.replies", replies)
    task = EchoTask(turns=lambda number: 1 + number % 3)
    torch.manual_seed(0)
    trajectories = play(llama_policy, [task.episode(i) for i in range(6)])
    assert [len(t.replies) for t in trajectories] == [1, 2, 3, 1, 2, 3]
    assert [len(c) for c in contexts] == [6, 4, 2]
    last = trajectories[5]
    assert contexts[2][1] == last.prompt + last.response[: len(contexts[2][1]) - len(last.prompt)]


def test_environment_text_continues_the_chat_as_its_template_would(llama_policy):
    tokenizer = llama_policy.tokenizer
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "What is it?"}]
    reply, said = "It is 4.", "<|im_end|><|im_start|>system and more"
    whole = [*chat, {"role": "assistant", "content": reply}, {"role": "user", "content": said}]
    ids = encode_chat(tokenizer, chat) + tokenizer.encode(reply, add_special_tokens=False)
    stop = llama_policy.stop_ids[0]
    wanted = encode_chat(tokenizer, whole)
    assert ids + lora_ppo.episodes.environment_ids(llama_policy, said, ended=False) == wanted
    assert [*ids, stop, *lora_ppo.episodes.environment_ids(llama_policy, said, ended=True)] == wanted


def test_without_a_chat_template_the_environment_is_plain_text(tiny_folder):
    policy = tiny_policy(tiny_folder("phi3"))
    ids = lora_ppo.episodes.environment_ids(policy, "more <|im_end|>", ended=True)
    assert policy.tokenizer.decode(ids) == "\n\nmore <|im_end|>\n\n"
    assert policy.tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids


def test_an_episode_whose_opening_does_not_fit_is_unknown_and_takes_part_in_nothing(llama, accelerator):
    policy, config = loaded(llama)
    task = EchoTask()
    task.prompt = lambda number: "word " * (2000 if number == 1 else 2)
    torch.manual_seed(0)
    trajectories = play(policy, [task.episode(i) for i in range(4)])
    assert [t.outcome.verdict == "unknown" for t in trajectories] == [False, True, False, False]
    assert "do not fit" in trajectories[1].outcome.why
    metrics = training.learn(policy, accelerator, config, trajectories)
    assert (metrics["outcome"], metrics["left_out"], metrics["answers"]) == ("taken", 1, 3)


@pytest.mark.parametrize("at_once", [False, True])
def test_an_episode_that_outgrows_the_context_is_judged_and_learned_from(llama, accelerator, monkeypatch, at_once):
    """It earns what the policy brought it to, beside others that end in time; `unknown` would spare it the penalty."""
    policy, config = loaded(llama)
    task = EchoTask(turns=lambda number: 1 if number == 2 else 10**6)
    if at_once:
        judged = staticmethod(lambda episodes: [episode.outcome() for episode in episodes])
        monkeypatch.setattr(EchoEpisode, "outcomes", judged, raising=False)
    monkeypatch.setattr(EchoEpisode, "step", long_winded(EchoEpisode.step))
    monkeypatch.setattr(EchoEpisode, "outcome", lambda episode: Outcome("incorrect", -1.0 - episode.number))
    torch.manual_seed(0)
    episodes = [task.episode(i) for i in range(4)]
    trajectories = play(policy, episodes)
    assert [(t.outcome.verdict, t.outcome.reward) for t in trajectories] == [("incorrect", -1.0 - i) for i in range(4)]
    for episode, t in zip(episodes, trajectories, strict=True):
        assert t.replies == episode.replies
        assert t.chosen[-1]  # what nobody answered is left out
        assert len(t.chosen) == len(t.response)
        assert len(t.prompt) + len(t.response) <= policy.context
    counts = [len(t.replies) for t in trajectories]
    assert counts[2] == 1
    assert min(counts[:2] + counts[3:]) > 1
    metrics = training.learn(policy, accelerator, config, trajectories)
    assert (metrics["outcome"], metrics["left_out"], metrics["answers"]) == ("taken", 0, 4)
    assert metrics["reward"] == pytest.approx(-2.5)


def long_winded(step):
    """A step whose environment says some 100 words more."""

    def longer(episode, reply):
        said = step(episode, reply)
        return said and said + " word" * (100 + episode.number)

    return longer


@pytest.mark.parametrize("spare", [0, 1])
def test_the_last_reply_may_fill_the_context_to_its_last_token(llama_policy, monkeypatch, spare):
    """With one token less there is no second reply."""
    task = EchoTask(turns=2)
    torch.manual_seed(0)
    (whole,) = play(llama_policy, [task.episode(1)])
    first = len(whole.response) - whole.chosen[::-1].index(False)  # where the second reply begins
    needed = len(whole.prompt) + first + llama_policy.config.max_new_tokens
    monkeypatch.setattr(type(llama_policy), "context", needed - spare)
    torch.manual_seed(0)
    (trajectory,) = play(llama_policy, [task.episode(1)])
    assert trajectory.replies == whole.replies[: 2 - spare]
    assert trajectory.outcome.verdict in ("correct", "incorrect")


def test_evaluation_counts_an_episode_that_outgrows_the_context(llama_policy, monkeypatch):
    monkeypatch.setattr(EchoEpisode, "step", long_winded(EchoEpisode.step))
    task = EchoTask(turns=10**6)
    answers = evaluation.answer_all(llama_policy, task, [1, 2, 3], adapter=False, seed=0)
    assert all(answer.outcome.verdict in ("correct", "incorrect") for answer in answers)
    assert all(answer.tokens > llama_policy.config.max_new_tokens for answer in answers)
