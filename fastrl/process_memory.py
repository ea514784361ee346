"""What Linux counts of this process's memory."""

from __future__ import annotations

from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
IS_COUNTED = CLEAR.exists()
"""Whether this is Linux: without its counters nothing can be set back."""


def counted_bytes(name: str) -> int:
    """VmRSS, RssAnon or VmHWM, the most that was resident; 0 where only Linux would know."""
    if not STATUS.exists():
        return 0
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {name} in {STATUS}, found no such line")


def forget_peak() -> None:
    """Set VmHWM back to what is resident now."""
    CLEAR.write_text("5", encoding="ascii")
