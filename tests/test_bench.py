"""The benchmark on a tiny model: every table is filled, by numbers that can be true, and says what is missing."""

import json
import math

import pytest
import torch

from config import Config
from lora_ppo.forward import collate
from lora_ppo.layers import speed_up_products
from lora_ppo.loading import load_policy
from lora_ppo.step import ppo_step
from tools.bench import speed as bench
from tools.bench.measure import MB, profile


@pytest.fixture
def setup(tiny_folder, tmp_path):
    """The smallest measurement of a random Llama; peers that need a folder or an environment are not given."""
    name = str(tiny_folder("llama"))
    return bench.Bench(
        models=[name, "7b"],
        device="cpu",
        dtype="float32",
        repeats=1,
        workspace=tmp_path,
        turns=2,
        prompt_tokens=8,
        response_tokens=6,
        question_tokens=8,
        new_tokens=24,
        batches={name: {"batch_size": 4, "group_size": 2, "new_tokens": 4}},
    )


@pytest.mark.parametrize("number", bench.TABLES)
def test_a_table_is_filled_with_numbers(setup, number, capsys):
    table = bench.TABLES[number](setup)
    json.dumps(table.rows, allow_nan=False)
    assert len(table.rows) >= 3
    for row in table.rows:
        values = [value for value in row.values() if isinstance(value, int | float)]
        assert values
        assert all(map(math.isfinite, values))
        assert row.get("seconds", 1.0) > 0
    reasons = [missing["why"] for missing in table.not_run]
    assert all(any(known in reason for known in ("--trl", "--agilerl", "CUDA", "alone", "none")) for reason in reasons)
    bench.show(table)
    shown = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(reason.split())[:40] in shown for reason in reasons)


def test_passes_and_tensors_of_a_step(setup):
    """With one epoch: reference, gradient and check forward, one backward."""
    setup.models = setup.models[:1]
    row = bench.ppo_step_table(setup).rows[0]
    assert (row["forward passes"], row["backward passes"]) == (3, 1)
    assert row["vocabulary tensors"] > 0


def test_a_profile_counts_live_tensors_and_products():
    a = torch.ones(1000, 1000)

    def run():
        for _ in range(3):  # one at a time: 4 MB each, and 1 MB beside the last
            b = a @ a
            del b
        c = a + 1
        return c, torch.zeros(250_000)

    found = profile(run)
    assert found["tensors MB"] == pytest.approx(5.0, abs=0.1)
    assert 0 < found["products s"] < found["profiled s"]
    assert profile(lambda: a + 1)["products s"] == 0
    layer = torch.nn.Linear(1000, 1000).requires_grad_(False)
    speed_up_products(torch.nn.ModuleList([layer]))
    assert profile(lambda: layer(a))["products s"] > 0


def test_a_step_of_more_epochs_keeps_one_distribution_more():
    """As wide as the vocabulary: that of the sampled policy, beside the pass at hand. Not that of the pass before."""
    policy, _ = load_policy(Config(device="cpu", target_kl=1e9))
    batch = collate([[300] * 150], [[301] * 256], policy.pad_id, policy.device)
    wide = 256 * policy.head.weight.shape[0] * 4 / MB
    peaks = []
    for policy.config.ppo_epochs in (1, 3):
        ppo_step(policy, batch, [1.0])
        peaks.append(profile(lambda: ppo_step(policy, batch, [1.0]))["tensors MB"])
    assert peaks[1] < peaks[0] + 2 * wide
