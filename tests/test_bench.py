"""The benchmark on a tiny model: every table is filled, by numbers that can be true, and says what is missing."""

import json
import math

import pytest

from tools import bench


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
