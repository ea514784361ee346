"""The table of kernels/README.md: losses and log-probabilities of a head, side by side.

It stands between `<!-- heads:begin -->` and `<!-- heads:end -->`, and report_rows.py writes it from
policy_loss.json: milliseconds and MiB beyond the gradients.
"""

from __future__ import annotations

from committed import CEILINGS, Row, is_measured

SIZE = "S=2048 V=65536 D=256 float32"
CASES = (f"policy_loss {SIZE}", f"policy_loss rho=0.2 {SIZE}", f"linear_logps {SIZE}")
NAMES = {
    "fastrl policy_loss": "`policy_loss`, one pass",
    "fastrl policy_loss min_memory": "`policy_loss`, min memory",
    "fastrl linear_logps": "`linear_logps`",
    "liger chunked grpo": "Liger, chunked GRPO loss",
    "naive": "naive PyTorch",
    "trl": "TRL, fused head",
}


def render(rows: list[Row]) -> str:
    """A line for each implementation of the loss: ours as they come, then peers by their time."""
    of = {(row["case"], row["implementation"]): row for row in rows if is_measured(row)}
    names = [name for case, name in of if case == CASES[0]]
    first = [name for name in names if name.startswith((*CEILINGS, "fastrl"))]
    peers = [name for name in names if name not in first]
    peers.sort(key=lambda name: float(of[CASES[0], name]["p50_ms"]))
    lines = ["| | ms | MiB | 0.2 trained, ms | log-probabilities, ms |", "|---|---|---|---|---|"]
    for name in first + peers:
        found = [of.get((case, name)) for case in CASES]
        times = [f"{row['p50_ms']:.0f}" if row else "" for row in found]
        extra = of[CASES[0], name]["beyond_gradients_bytes"]
        memory = "" if extra is None else f"{extra / 2**20:.0f}"
        cells = [NAMES.get(name, name), times[0], memory, *times[1:]]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines) + "\n"
