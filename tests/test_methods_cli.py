"""`fastrl methods`, the page docs/methods.md and the examples on it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrl.cli import main
from fastrl.errors import InputError
from fastrl.methods import AXES, FAMILIES, METHODS, Method, register, use
from fastrl.methods.describe import differences, lines, show
from fastrl.methods.document import document

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"


def test_methods_lists_every_method_and_loads_no_transformers():
    code = (
        "import sys; from fastrl.cli import main; code = main(['methods']);"
        "print('transformers' in sys.modules, code)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *listed, last = run.stdout.splitlines()
    assert last == "False 0"
    assert listed == lines()
    for title, methods in FAMILIES.items():
        assert title in listed
        for method in methods:
            (line,) = [line for line in listed if line.split()[:1] == [method.name]]
            assert line.endswith(method.source)
            assert (line.split()[1] == "*") == bool(method.missing)
    assert any(line.startswith("  aggregation: token_mean, ") for line in listed)
    assert not any(line.startswith("  computed:") for line in listed)  # no option of the config


def test_show_says_what_changes_against_grpo(capsys):
    assert main(["methods", "show", "gspo"]) == 0
    out = capsys.readouterr().out
    assert "gspo: GSPO, arXiv:2507.18071" in out
    assert METHODS["gspo"].formula in out
    assert "surrogate: geometric_ratio(epsilon_low=0.0003, epsilon_high=0.0004)" in out
    assert "min(s A, clip(s) A) with s the geometric mean of token ratios" in out
    assert differences(METHODS["gspo"], METHODS["grpo"]) == [
        "surrogate: geometric_ratio(epsilon_low=0.0003, epsilon_high=0.0004) instead of "
        "clipped_ratio(epsilon_low=0.2, epsilon_high=0.2)"
    ]
    assert all(len(line) <= 100 for line in out.splitlines())


def test_show_has_everything_of_a_record():
    def text(name):
        return " ".join(" ".join(show(name)).split())

    assert "missing: a model trained with DPO" in text("rto")
    assert "value_coef=0.1, value_lambda=0.95, critic_warmup_steps=0," in text("ppo")
    assert "value model: learns from finished completions" in text("t_ppo")
    assert "unverified: the weight of the penalty" in text("dppo_tv")
    assert "old policy: the sampler's log-probabilities" in text("dppo_tv")
    assert "regulariser: 1 absolute_old on covariance_top" in text("kl_cov")
    assert "low=from balanced_bounds" in text("bapo")
    assert "entropy bonus: 0.001" in text("astar_po")
    assert "controllers: doubling_kl(target=0.01)" in text("trpo_penalty")
    dpo = text("dpo")
    assert "pairing: best_worst" in dpo
    assert "advantage: none instead of group_relative(std_epsilon=0.0001)" in dpo
    assert "compared with" not in text("grpo")
    assert differences(METHODS["grpo"], METHODS["grpo"]) == ["the loss is the same"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_shown(name):
    shown = show(name)
    assert shown[0].startswith(f"{name}: ")
    assert not any("inspect" in line for line in shown)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "gsop"], "unknown method 'gsop'; did you mean 'gspo'?"),
        (["show"], "show needs a value"),
        (["shw", "gspo"], "unexpected argument 'shw'"),
        (["show", "gspo", "grpo"], "unexpected argument 'grpo'"),
    ],
)
def test_bad_words_are_one_line(capsys, words, message):
    assert main(["methods", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_the_page_is_made_from_the_records():
    page = PAGE.read_text(encoding="utf-8")
    assert page == document() + "\n", "python -m fastrl.methods.document > docs/methods.md"
    for name in METHODS:
        assert page.count(f"| `{name}` | `") == 1
    for axis, choices in AXES.items():
        section = page.split(f"\n## {axis}\n")[1].split("\n## ")[0]
        for name in choices:
            assert f"| `{name}` |" in section
    for line in page.splitlines():
        if line.startswith("| `"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (4, 7)


def code_blocks() -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    return blocks


def test_the_objective_of_the_page_trains(tmp_path):
    """From a file of its own, as the page says; against autograd on stock log-probabilities."""
    path = tmp_path / "damped.py"
    path.write_text(code_blocks()[0], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("damped", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["damped"] = module
    try:
        spec.loader.exec_module(module)
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden, weight = draw(7, 8).requires_grad_(), draw(11, 8).requires_grad_()
        targets = torch.randint(0, 11, (7,), generator=generator)
        advantages, token_weights = draw(7), torch.full((7,), 1 / 7, dtype=torch.float64)
        logps = (hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None])[:, 0]
        old_logps, ref_logps = (logps.detach() + 0.2 * draw(7) for _ in range(2))
        log_ratios = logps - old_logps
        gains = log_ratios.exp() * advantages * (-((log_ratios / 0.3) ** 2) / 2).exp()
        delta = logps - ref_logps
        penalties = 0.01 * ((-delta).exp() - 1 + delta)
        expected = ((penalties - gains) * token_weights).sum()
        gradients = torch.autograd.grad(expected, (hidden, weight))
        out = module.loss(hidden, weight, targets, advantages, token_weights, old_logps, ref_logps)
        got = torch.autograd.grad(out.loss, (hidden, weight))
    finally:
        sys.modules.pop("damped")
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, gradients, rtol=1e-10, atol=1e-12)


def test_the_method_of_the_page_is_known_by_name():
    names = {}
    try:
        exec(compile(code_blocks()[1], "methods.md", "exec"), names)
        assert METHODS["gentle_gspo"].penalties[0].beta == 1e-3
        assert "Registered" in lines()
        assert any("gentle_gspo" in line for line in lines())
        assert show("gentle_gspo")
    finally:
        METHODS.pop("gentle_gspo", None)
    method = names["method"]
    assert method.penalties[0].beta == 0.01
    assert method.surrogate == use("geometric_ratio", epsilon_low=1e-3, epsilon_high=1e-3)
    assert "Registered" not in lines()
    with pytest.raises(InputError, match="there is a method 'gspo' already"):
        register(Method("gspo", "ours", "-rho A"))
