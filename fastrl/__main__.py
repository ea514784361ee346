"""`python -m fastrl` is the command line."""

from fastrl.cli import main

raise SystemExit(main())
