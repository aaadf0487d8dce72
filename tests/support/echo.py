"""A task without a model behind it: questions about numbers, rewards that follow from the replies' text."""

from lora_ppo.episodes import Outcome


class EchoTask:
    """`turns` replies an episode (a number, or a function of the sample); half of all texts are rewarded."""

    def __init__(self, turns=1):
        self.turns = turns if callable(turns) else lambda number: turns

    def samples(self, split):
        return range(20) if split == "train" else range(100, 112)

    def prompt(self, number):
        return f"What is {number} <b>?" + " then" * (number % 3)

    def episode(self, number):
        return EchoEpisode(self, number)


class EchoEpisode:
    def __init__(self, task, number):
        self.task, self.number, self.replies = task, number, []

    def reset(self):
        return [{"role": "user", "content": self.task.prompt(self.number)}]

    def step(self, reply):
        self.replies.append(reply)
        return f"and then {self.number}?" if len(self.replies) < self.task.turns(self.number) else None

    def outcome(self):
        right = sum(map(ord, "".join(self.replies))) % 2
        return Outcome("correct" if right else "incorrect", 1.0 if right else -1.0)
