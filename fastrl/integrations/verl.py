"""Our policy losses in verl's registry, and our head in the forward pass of its FSDP workers.

verl reaches both in every worker process through `fastrl.integrations.verl_plugin`, which its
setting actor_rollout_ref.model.external_lib imports. docs/verl.md has a recipe.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from packaging.version import Version

from fastrl.errors import InputError, nearest
from fastrl.integrations.verl_head import use_fused_head
from fastrl.integrations.verl_losses import VerlPolicyLoss, why_not
from fastrl.integrations.verl_settings import overrides_of
from fastrl.methods.table import METHODS

__all__ = [
    "BACKEND",
    "check_verl",
    "policy_loss",
    "policy_loss_overrides",
    "register_fused_head",
    "register_policy_losses",
    "use_fused_head",
]

FIRST, BEFORE = "0.8.0", "0.10"
"""The versions of verl that are supported: from the first, up to but not including the other."""
PREFIX = "fastrl_"
MODEL = "actor_rollout_ref.model"
PLUGIN = "fastrl.integrations.verl_plugin"
BACKEND = "fastrl"
"""What actor_rollout_ref.model.fused_kernel_options.impl_backend is called."""


def check_verl() -> None:
    """Raise InputError where verl is missing or of a version that is not supported."""
    try:
        found = import_module("verl").__version__
    except ModuleNotFoundError as error:
        if error.name != "verl":
            raise
        raise InputError(
            f"verl is not installed; pip install 'verl>={FIRST},<{BEFORE}' first and fastrl-llm "
            "after it"
        ) from error
    if not Version(FIRST) <= Version(found) < Version(BEFORE):
        raise InputError(
            f"expected verl>={FIRST},<{BEFORE}, got {found}; install one of those, or call "
            "fastrl_kernels.token_loss and fastrl_kernels.linear_logps on your own tensors"
        )


def policy_loss(name: str) -> VerlPolicyLoss:
    """The policy loss of a method, with the signature of verl's registry.

    name: that of a method, as `fastrl methods` lists them. Raises InputError for a method whose
    policy loss needs more than verl passes, and says what.
    """
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; {nearest(name, list(METHODS))}")
    reason = why_not(METHODS[name])
    if reason is not None:
        raise InputError(f"method {name!r} gives no policy loss for verl: {reason}")
    return VerlPolicyLoss(PREFIX + name, METHODS[name])


def policy_loss_overrides(name: str) -> list[str]:
    """Arguments of verl's command line that choose a method's policy loss with its numbers."""
    loss = policy_loss(name)
    return [f"{MODEL}.external_lib={PLUGIN}", *overrides_of(loss.name, loss.method)]


def register_policy_losses(names: Iterable[str] | None = None) -> list[str]:
    """Make policy losses known to verl as "fastrl_" + the method's name; returns those names.

    names: of methods; by default all whose policy loss verl can compute. Again is allowed. Raises
    InputError where verl has a loss of another origin under such a name already.
    """
    check_verl()
    core = import_module("verl.trainer.ppo.core_algos")
    if names is None:
        names = [name for name, method in METHODS.items() if why_not(method) is None]
    losses = [policy_loss(name) for name in names]
    for loss in losses:
        known = core.POLICY_LOSS_REGISTRY.get(loss.name)
        if known is not None and not isinstance(known, VerlPolicyLoss):
            raise InputError(
                f"verl has a policy loss {loss.name!r} already, which is not ours; register that "
                "one under another name"
            )
    for loss in losses:
        core.register_policy_loss(loss.name)(loss)
    return [loss.name for loss in losses]


def register_fused_head() -> None:
    """Let fused_kernel_options.impl_backend=fastrl choose our head; the other backends stay.

    It is read where a worker builds its model and use_fused_kernels is set. Again is allowed.
    """
    check_verl()
    patches: Any = import_module("verl.models.transformers.monkey_patch")
    if not isinstance(patches.patch_forward_with_backends, _Chooser):
        patches.patch_forward_with_backends = _Chooser(patches.patch_forward_with_backends)


class _Chooser:
    """Stands where verl has its choice of a fused forward."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __call__(
        self, model: Any, use_fused_kernels: bool = False, fused_kernels_backend: str | None = None
    ) -> None:
        if use_fused_kernels and fused_kernels_backend == BACKEND:
            use_fused_head(model)
            return
        self.original(
            model, use_fused_kernels=use_fused_kernels, fused_kernels_backend=fused_kernels_backend
        )
