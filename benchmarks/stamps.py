"""The hash of the numbers that a picture was drawn from, in the metadata of its file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

KEY = "Data"


def digest(data: Any) -> str:
    """Of the numbers of a picture, rounded to what can be seen."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, dict):
            return {key: rounded(inner) for key, inner in value.items()}
        return [rounded(inner) for inner in value] if isinstance(value, list | tuple) else value

    return hashlib.sha256(json.dumps(rounded(data), sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The hash in a picture; None where there is no picture."""
    from PIL import Image

    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.info.get(KEY)


def stamp(source: Path, target: Path, data: Any) -> None:
    """Copy a picture that a run drew, with the hash of the results that it stands beside."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    known = PngInfo()
    known.add_text(KEY, digest(data))
    with Image.open(source) as image:
        image.save(target, pnginfo=known)
