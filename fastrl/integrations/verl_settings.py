"""Hyper-parameters of our methods and the fields of verl's actor config that they are read from.

What verl has a field for comes from there, so that verl's command line means what it says; the rest
is as published. `policy_loss_overrides` writes the published numbers as verl's command line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from fastrl.errors import InputError
from fastrl.methods.axes import hyper_parameters_of
from fastrl.methods.record import Choice, Method, Penalty

SURROGATE = {
    "epsilon_low": "clip_ratio_low",
    "epsilon_high": "clip_ratio_high",
    "threshold_low": "clip_ratio_low",
    "threshold_high": "clip_ratio_high",
    "epsilon": "clip_ratio",
    "dual_clip": "clip_ratio_c",
    "temperature_positive": "tau_pos",
    "temperature_negative": "tau_neg",
}
"""By the hyper-parameter's name, whatever the surrogate."""
CLIP_COVARIANCE = {
    "fraction": "policy_loss.clip_cov_ratio",
    "lowest": "policy_loss.clip_cov_lb",
    "highest": "policy_loss.clip_cov_ub",
}
COVARIANCE_TOP = {"fraction": "policy_loss.kl_cov_ratio"}
COVARIANCE_COEFFICIENT = "policy_loss.ppo_kl_coef"
FIELDS = (
    *dict.fromkeys(SURROGATE.values()), *CLIP_COVARIANCE.values(), *COVARIANCE_TOP.values(),
    COVARIANCE_COEFFICIENT, "policy_loss.dro_beta",
)  # fmt: skip
"""All fields of verl's actor config that belong to one policy loss or another."""
AGGREGATIONS = {
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "constant": "seq-mean-token-sum-norm",
    "sum": "token-sum",
}
"""verl's loss_agg_mode for each of our averages. What `constant` divides by is loss_scale_factor
there."""
BOUNDS = ("clip_ratio_low", "clip_ratio_high")


def fields_of(method: Method) -> dict[str, float]:
    """The fields of verl's actor config that this method's policy loss reads, as published."""
    found = _of_choice("surrogate", method.surrogate, SURROGATE)
    if method.token_weights is not None and method.token_weights.name == "clip_covariance":
        found |= _of_choice("token_weights", method.token_weights, CLIP_COVARIANCE)
    for penalty in _selective(method):
        assert penalty.tokens is not None
        found |= _of_choice("tokens", penalty.tokens, COVARIANCE_TOP)
        found[COVARIANCE_COEFFICIENT] = penalty.beta
    return found


def with_fields(method: Method, values: Mapping[str, float]) -> Method:
    """The method with its hyper-parameters replaced by the values of `fields_of`."""
    weights = method.token_weights
    if weights is not None and weights.name == "clip_covariance":
        weights = _with("token_weights", weights, CLIP_COVARIANCE, values)
    changed = []
    for penalty in method.penalties:
        if penalty in _selective(method):
            assert penalty.tokens is not None
            tokens = _with("tokens", penalty.tokens, COVARIANCE_TOP, values)
            beta = values[COVARIANCE_COEFFICIENT]
            penalty = dataclasses.replace(penalty, beta=beta, tokens=tokens)
        changed.append(penalty)
    return dataclasses.replace(
        method,
        surrogate=_with("surrogate", method.surrogate, SURROGATE, values),
        token_weights=weights,
        penalties=tuple(changed),
    )


def read_fields(name: str, method: Method, config: Any) -> dict[str, float]:
    """The values of `fields_of` in verl's actor config.

    Raises InputError for a field of another policy loss that is not at verl's default: it would
    have no effect. clip_ratio stands in for a bound that is None, as in verl's own losses.
    """
    defaults = _verl_defaults()
    values = {field: _value(config, field, defaults) for field in FIELDS if field in defaults}
    used = set(fields_of(method))
    for bound in BOUNDS:
        if _get(config, bound) is None:
            values[bound] = values["clip_ratio"]
            used |= {"clip_ratio"} if bound in used else set()
    for field, value in values.items():
        idle = field not in used and value != defaults[field]
        if field == "clip_ratio":  # usually given beside the bounds
            idle = idle and not any(values[bound] == value for bound in BOUNDS if bound in used)
        if idle:
            raise InputError(
                f"actor.{field} = {value} has no effect on the policy loss {name!r}, which reads "
                f"{', '.join(sorted(used)) or 'no field of its own'}; leave it at {defaults[field]}"
            )
    return {field: values[field] for field in fields_of(method)}


def overrides_of(name: str, method: Method) -> list[str]:
    """Arguments of verl's command line that give this policy loss its published numbers."""
    actor = "actor_rollout_ref.actor"
    return [
        f"{actor}.policy_loss.loss_mode={name}",
        *(f"{actor}.{field}={value:g}" for field, value in fields_of(method).items()),
        f"{actor}.loss_agg_mode={AGGREGATIONS[method.aggregation.name]}",
    ]


def _selective(method: Method) -> list[Penalty]:
    """Penalties on tokens of high covariance, whose weight and number verl has fields for."""
    return [
        penalty
        for penalty in method.penalties
        if penalty.tokens is not None and penalty.tokens.name == "covariance_top"
    ]


def _of_choice(axis: str, choice: Choice, fields: Mapping[str, str]) -> dict[str, float]:
    known = {**hyper_parameters_of(axis, choice.name), **choice.parameters}
    # The bounds of BAPO are computed, those of others have numbers.
    return {
        field: known[name]
        for name, field in fields.items()
        if isinstance(known.get(name), int | float)
    }


def _with(
    axis: str, choice: Choice, fields: Mapping[str, str], values: Mapping[str, float]
) -> Choice:
    known = hyper_parameters_of(axis, choice.name)
    changed = {
        name: values[field] for name, field in fields.items() if name in known and field in values
    }
    return Choice(choice.name, {**choice.parameters, **changed})


def _verl_defaults() -> dict[str, Any]:
    """Defaults of FIELDS in the installed verl; fields that it does not have are left out."""
    configs = import_module("verl.workers.config")
    owners = {"": configs.ActorConfig, "policy_loss": configs.PolicyLossConfig}
    found = {}
    for field in FIELDS:
        section, _, key = field.rpartition(".")
        if hasattr(owners[section], key):
            found[field] = getattr(owners[section], key)
    return found


def _value(config: Any, field: str, defaults: Mapping[str, Any]) -> Any:
    value = _get(config, field)
    return defaults[field] if value is None else value


def _get(config: Any, field: str) -> Any:
    """A field of an ActorConfig or of an OmegaConf node; None where it has none."""
    for key in field.split("."):
        if config is None:
            return None
        config = config.get(key, None) if hasattr(config, "get") else getattr(config, key, None)
    return config
