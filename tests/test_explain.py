"""`fastrl explain`: every field in words, from the config itself."""

from __future__ import annotations

import pytest

from fastrl.cli import main
from fastrl.config import Config
from fastrl.config_io import as_paths
from fastrl.errors import InputError
from fastrl.explain import explain


def test_a_field_with_its_limits_default_and_trl_name():
    assert explain("rollout.top_p") == [
        "rollout.top_p (number above 0 and at most 1; default 1)",
        "    Sample from the smallest set of tokens with this much probability.",
        "    TRL: top_p",
    ]
    assert explain("--optim.in-backward")[0] == (
        "optim.in_backward (one of off, two_phase, previous_norm; default 'off')"
    )
    assert explain("objective.beta")[0] == (
        "objective.beta (number at least 0; default the method's)"
    )
    assert explain("reward_weights")[0] == "reward_weights (list of number; default none)"


def test_every_field_of_the_config_is_explained():
    lines = explain("")
    for path in as_paths(Config()):
        assert any(line.startswith(f"{path} (") for line in lines), path
    shown = explain("objective")
    assert shown[0].startswith("objective (table")
    assert any(line.startswith("objective.advantage (") for line in shown)


def test_unknown_fields_name_the_nearest(capsys):
    with pytest.raises(InputError, match=r"did you mean .optim.learning_rate"):
        explain("optim.lerning_rate")
    assert main(["explain", "rollout.temperature"]) == 0
    assert "softmax(logits / temperature)" in capsys.readouterr().out
    assert main(["explain", "nothing"]) == 2
