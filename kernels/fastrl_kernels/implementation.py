"""Which code computes a public function: one meaning of `implementation=` for all of them."""


def choose_implementation(implementation: str) -> str:
    """Name of the implementation to run; "auto" picks, and a choice that cannot be met raises."""
    if implementation in ("auto", "torch"):
        return "torch"
    if implementation == "triton":
        raise ValueError(
            'implementation="triton" is unavailable in this version; use "torch", or "auto" to '
            "take the Triton kernels as soon as they are there"
        )
    raise ValueError(
        f'implementation must be "auto", "torch" or "triton", got {implementation!r}; use "auto"'
    )
