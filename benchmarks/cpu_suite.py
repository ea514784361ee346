"""The same on a CPU, within fifteen minutes on two cores.

python benchmarks/cpu_suite.py [--json PATH] [--csv PATH] [--only TEXT ...] [--seconds 880] [--tiny]

Kernels against their peers, an update, what plans and optimizers take. The most valuable cases come
first, each in a process of its own with a time limit; its rows are in the JSON before the next one
starts. Whole trainers are bench_trainer.py's. --tiny runs the same cases at small sizes.
"""

from __future__ import annotations

import sys

from suite import make_parser, run_suite


def main() -> int:
    """Run all cases; 1 where one of our implementations is not correct."""
    from suite_cases import absent_peers, cpu_cases  # every case's process imports this file anew

    parser = make_parser(__doc__.splitlines()[0], seconds=880)
    parser.add_argument("--tiny", action="store_true", help="small sizes")
    args = parser.parse_args()
    return run_suite(cpu_cases(args.tiny), args, absent=absent_peers("cpu"))


if __name__ == "__main__":
    sys.exit(main())
