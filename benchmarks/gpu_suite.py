"""Everything worth knowing about kernels and an update on one GPU, within nine minutes.

python benchmarks/gpu_suite.py [--json PATH] [--csv PATH] [--only TEXT ...] [--seconds 530] [--tiny]

The most valuable cases come first. Each runs in a process of its own with a time limit, and its
rows are in the JSON before the next one starts. Peers take part where they are installed. --tiny
runs the same cases at small sizes on the CPU, to try the suite itself.
"""

from __future__ import annotations

import sys

import torch
from suite import make_parser, run_suite


def main() -> int:
    """Run all cases; 2 without a GPU, 1 where one of our implementations is not correct."""
    from suite_cases import absent_peers, gpu_cases  # every case's process imports this file anew

    parser = make_parser(__doc__.splitlines()[0], seconds=530)
    parser.add_argument("--tiny", action="store_true", help="small sizes on the CPU")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        print("gpu_suite needs a CUDA device, found none; --tiny runs the same cases on the CPU")
        return 2
    absent = absent_peers("cpu" if args.tiny else "cuda")
    return run_suite(gpu_cases(args.tiny), args, absent=absent)


if __name__ == "__main__":
    sys.exit(main())
