"""The losses, gradients and metrics of TRL's GRPOTrainer, from FastRL's forward and backward."""

from __future__ import annotations

from typing import Any

import pytest

from fastrl.integrations.trl_one_pass import one_pass_of
from tests.helpers_trl import assert_same, batch_of, online, result_of, save_tiny

trl = pytest.importorskip("trl")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def pair(directory: str) -> tuple[Any, Any]:
    """TRL's trainer and ours, of equal weights; each test sets their attributes as it needs."""
    from fastrl.integrations.trl import FastGRPOTrainer

    theirs = online(trl.GRPOTrainer, directory)
    ours = online(FastGRPOTrainer, directory, fast={"strict": True})
    return theirs, ours


@pytest.fixture
def compare(pair: tuple[Any, Any]) -> Any:
    """A function that sets attributes of both, compares one micro-batch, and undoes it."""
    saved = [(vars(x).copy(), vars(x.args).copy()) for x in pair]

    def run(changes: dict[str, Any] | None = None, **attributes: Any) -> tuple[Any, Any]:
        for trainer in pair:
            trainer.current_gradient_accumulation_steps = 2
            for name, value in attributes.items():
                setattr(trainer.args if hasattr(trainer.args, name) else trainer, name, value)
                if hasattr(trainer, name):
                    setattr(trainer, name, value)
        inputs = {**batch_of(pair[0]), **(changes or {})}
        inputs = {name: value for name, value in inputs.items() if value is not None}
        found = result_of(pair[1], inputs), result_of(pair[0], inputs)
        assert_same(*found)
        return found

    yield run
    for trainer, (state, arguments) in zip(pair, saved, strict=True):
        vars(trainer).clear()
        vars(trainer).update(state)
        vars(trainer.args).clear()
        vars(trainer.args).update(arguments)


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_is_trls(compare, pair, loss_type, level, beta):
    high = 2.5 if loss_type == "cispo" else 0.28
    found, _ = compare(
        loss_type=loss_type, importance_sampling_level=level, beta=beta, epsilon_high=high
    )
    one_pass = one_pass_of(pair[1], batch_of(pair[0]))
    assert (one_pass is not None) == (level == "token" and loss_type != "vespo")
    assert all(bool(gradient.any()) for gradient in found.gradients.values())
