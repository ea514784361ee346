"""`fastrl vstar` and runs of A*-PO from the command line."""

from __future__ import annotations

from fastrl.cli import main
from fastrl.config_io import save_config
from fastrl.report import read_metrics
from tests.test_training import tiny_config


def test_values_are_sampled_once_and_trained_from(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", method="astar_po", values_dir=str(tmp_path / "values"))
    save_config(config, tmp_path / "config.toml")
    words = [str(tmp_path / "config.toml"), "--rollout.num-generations", "1"]
    assert main(["vstar", *words]) == 0
    shown = capsys.readouterr().out
    assert "12 prompts with 8 reference completions each" in shown
    assert "(12 sampled now" in shown
    assert main(["train", *words]) == 0
    assert "(0 sampled now" in capsys.readouterr().out
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(rows) == 4
    assert all(row["grad_norm"] > 0 for row in rows)
    assert main(["vstar", *words, "--method", "reinforce"]) == 2
    assert "method 'reinforce' needs no values of prompts" in capsys.readouterr().err
