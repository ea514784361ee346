"""Which numbers of a document nothing stands behind.

A measured number comes after `<!-- measured:NAME -->` (quantities.py makes it from a committed
result) or stands in a section that is made from one; a bound that the suite holds comes after
`<!-- test:PATH::NAME -->`. What is code, an address or fits a rule below is no measurement. The
rest is unproved.
"""

from __future__ import annotations

import re

MADE = (  # made from results, with machine and command inside
    r"<!-- results:\w+ -->.*?<!-- end of results -->",
    r"<!-- (demo|study|heads):begin -->.*?<!-- (demo|study|heads):end -->",
)
CODE = (r"```.*?```", r"`[^`\n]*`", r"\]\([^)]*\)", r"https?://\S+")
HELD = re.compile(r"<!-- test:([\w/.]+)::(\w+) -->")
NUMBER = r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"
PROVED = (rf"<!-- measured:\w+ -->{NUMBER}[x%]?", rf"<!-- test:[\w/.]+::\w+ -->{NUMBER}[x%]?")
SOFTWARE = "torch|TRL|Python|Triton|triton|transformers|Liger|vLLM"
RULES = {
    "a version": rf"\b(?:{SOFTWARE}) {NUMBER}(?:\.\d+)*(?:\+\w+)?(?: (?:or|and) [\d.]+)*"
    rf"|\b[A-Za-z]\w*-{NUMBER}(?:\.\d+)*",
    "a part of a name": r"[A-Za-z_][\w@]*\d\w*",
    "a size of a case": rf"\b[A-Z] ?(?:=|>=|<=) ?{NUMBER}[kM]?\b",
    "a paper": r"\b\d{4}\.\d{4,5}\b",
    "a tolerance, which tests hold": r"(?<![\d.])1e-\d+\b",
    "a size of a model or machine": rf"\b{NUMBER}[MB] parameters|\b\d+ cores?\b|\b\d+ threads?\b",
}
FIGURE = re.compile(
    rf"(?<![\w.=]){NUMBER} ?(?:x\b(?! ?\d)|ms\b|s\b|seconds\b|tokens/s|times (?:as|faster|less))"
)


def remaining(text: str) -> str:
    """The document without what is made, proved, code or no measurement."""
    for pattern in (*MADE, *CODE):
        text = re.sub(pattern, " ", text, flags=re.DOTALL)
    for pattern in (*PROVED, *RULES.values()):
        text = re.sub(pattern, " ", text)
    return re.sub(r"<!--.*?-->", " ", text, flags=re.DOTALL)


def unproved(text: str) -> list[str]:
    """Lines with a number that nothing stands behind."""
    return [line.strip() for line in remaining(text).splitlines() if re.search(r"\d", line)]


def unproved_figures(text: str) -> list[str]:
    """The same of numbers with a unit of time or speed alone."""
    return [line.strip() for line in remaining(text).splitlines() if FIGURE.search(line)]


def held_by(text: str) -> list[tuple[str, str]]:
    """Files and tests that hold the bounds of a document."""
    return HELD.findall(text)
