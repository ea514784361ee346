"""Every per-token objective on log-probabilities that are there already, against plain PPO-clip.

python benchmarks/bench_objectives.py [--quick] [--json PATH] [--csv PATH] [--device cpu|cuda]
    [--only TEXT ...]

Value, slopes and metrics by `token_loss`, forward and backward, on 65536 tokens in float32; and
PPO-clip against PyTorch's, with memory.
"""

from __future__ import annotations

import sys

from compare import device_is_there, kernel_case
from loss_cases import LossCase, Tokens, prepare
from suite import make_parser, run_suite


def main() -> int:
    """1 where an objective is not correct."""
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few tokens, to try the benchmark")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    if not device_is_there(args.device):
        return 2
    shape = Tokens(1024 if args.quick else 65536, args.device)
    cases = [
        kernel_case(
            LossCase(group, shape), prepare, seconds=5.0 if args.quick else 60.0, limit=600.0,
            with_memory=group == "peers",
        )
        for group in ("objectives", "peers")
    ]  # fmt: skip
    return run_suite(cases, args)


if __name__ == "__main__":
    sys.exit(main())
