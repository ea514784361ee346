"""docs/methods.md from the records: python -m fastrl.methods.document > docs/methods.md."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable, Sequence

from fastrl.methods.axes import AXES, first_line, hyper_parameters_of
from fastrl.methods.describe import LEGEND, besides, in_effect, with_numbers
from fastrl.methods.record import Method, number
from fastrl.methods.table import FAMILIES

OPENING = """# Methods

A method is a record: a choice on every axis, with its numbers and its source. `method` in the
config names one, `objective` replaces single choices, and `fastrl methods show NAME` prints one
beside GRPO. This page is made from the records by
`python -m fastrl.methods.document > docs/methods.md`.
"""

READING = """In the formulas {legend}. A formula is the loss of one token, completion or pair; the
aggregation says how they are averaged. "Trained" says what a published method has beyond its loss
and we lack; a run of it is refused. "Verified" names constants that come from neither a paper nor
its authors' code."""

OWN = '''## Your own objective

An objective is one function of a module's top level, in arithmetic that a GPU kernel and PyTorch
share: it returns the value to be maximised and its derivative with respect to logp. The kernel is
made from its source, so it costs no more than ours. A file `damped.py`:

```python
from fastrl_kernels import policy_loss
from fastrl_kernels.objectives import Objective, Regulariser, k3, tl


def damped_ratio(logp, old_logp, advantage, width):
    """rho A exp(-(log rho / width)^2 / 2): a trust region without an edge."""
    log_ratio = logp - old_logp
    distance = log_ratio / width
    value = tl.exp(log_ratio - 0.5 * distance * distance) * advantage
    return value, value * (1.0 - distance / width)


def loss(hidden_states, weight, target_ids, advantages, token_weights, old_logps, ref_logps):
    objective = Objective(damped_ratio, (0.3,), (Regulariser(k3, 0.01),))
    return policy_loss(
        hidden_states,
        weight,
        target_ids,
        advantages,
        token_weights,
        objective=objective,
        old_logps=old_logps,
        ref_logps=ref_logps,
    )
```

## Your own method

A record of choices that exist needs one call, from your own code, before the run starts:

```python
from fastrl.config import ObjectiveConfig
from fastrl.methods import Method, Penalty, register, resolve_method, use

register(
    Method(
        name="gentle_gspo",
        source="ours",
        formula="-min(s A, clip(s, 0.999, 1.001) A) + 0.001 delta^2 / 2",
        advantage=use("leave_one_out"),
        surrogate=use("geometric_ratio", epsilon_low=1e-3, epsilon_high=1e-3),
        penalties=(Penalty(use("k2"), 1e-3),),
        aggregation=use("sequence_mean"),
    )
)
method = resolve_method("gentle_gspo", ObjectiveConfig(beta=0.01))
```'''


def document() -> str:
    """The page, in Markdown."""
    found = [OPENING, textwrap.fill(READING.format(legend=LEGEND), 100), ""]
    for title, methods in FAMILIES.items():
        header = ("method", "formula", "choices", "source", "verified", "trained")
        found += [f"## {title}", "", _table(header, map(_row, methods)), ""]
    found += ["# Axes", ""]
    for axis in AXES:
        rows = [
            (f"`{name}`", first_line(axis, name), _escaped(_numbers(axis, name)))
            for name in AXES[axis]
        ]
        table = _table(("choice", "what it is", "hyper-parameters"), rows)
        found += [f"## {axis}", "", table, ""]
    return "\n".join([*found, OWN])


def _row(method: Method) -> tuple[str, ...]:
    choices = [with_numbers(axis, choice, method) for axis, choice in in_effect(method).items()]
    choices += [str(penalty) for penalty in method.penalties]
    choices += [f"{key}: {text}" for key, text in besides(method).items()]
    choices += [method.settings]
    return (
        f"`{method.name}`",
        f"`{method.formula}`",
        _escaped("; ".join(text for text in choices if text)),
        method.source,
        f"not: {method.unverified}" if method.unverified else "yes",
        f"needs {method.missing}" if method.missing else "yes",
    )


def _numbers(axis: str, name: str) -> str:
    if axis == "pairing":
        return ""
    given = hyper_parameters_of(axis, name)
    empty = inspect.Parameter.empty
    return ", ".join(
        key if value is empty else f"{key}={number(value)}" for key, value in given.items()
    )


def _escaped(text: str) -> str:
    """Text that Markdown would take for a tag."""
    return text.replace("<", "&lt;")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )


if __name__ == "__main__":
    print(document())
