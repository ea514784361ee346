"""Published hyper-parameters of surrogates and regularisers, whose functions are kernels' sources.

What is not here comes from the batch, by a rule, or from the user: the bounds of bounded_ratio, the
reward of tapered and the pass rate of negative_aware. The regularisers have no hyper-parameters.
"""

DEFAULTS: dict[str, dict[str, float]] = {
    "clipped_ratio": {"epsilon_low": 0.2, "epsilon_high": 0.2},
    "dual_clipped_ratio": {"epsilon_low": 0.2, "epsilon_high": 0.2, "dual_clip": 3.0},
    "bounded_ratio": {"dual_clip": 3.0},
    "two_sided_clipped_ratio": {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": 4.0},
    "masked_ratio": {"low": 0.5, "high": 5.0},
    "one_sided_masked_ratio": {"low": 0.8, "high": 1.2},
    "probability_masked_ratio": {"threshold_low": 0.2, "threshold_high": 0.2},
    "truncated_importance": {"epsilon_low": 1.0, "epsilon_high": 4.0},
    "soft_gated_ratio": {"temperature_positive": 1.0, "temperature_negative": 1.05},
    "quadratic_ratio": {"epsilon": 0.2},
    "kl_penalised_ratio": {"beta": 1.0},
    "mirror_descent": {"step_size": 1.0},
    "drift": {"alpha": 2.0, "beta": 0.6},
    "shaped_probability": {"gamma": 0.1},
    "shaped_probability_ratio": {"gamma": 0.1},
}
