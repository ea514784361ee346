"""Ratios of whole completions, softer trust regions, and corrections for the sampler."""

from fastrl.methods.record import Choice, Method, Penalty, use

GRPO = "-min(rho A, clip(rho, 0.8, 1.2) A)"
TIS = "Yao et al. 2025, on the mismatch of sampler and trainer"


def _corrected(name: str, source: str, weight: str, correction: Choice) -> Method:
    """GRPO with weights for the sampler's distance to the trainer."""
    return Method(
        name=name,
        source=source,
        formula=f"{GRPO} times {weight}",
        rollout_correction=correction,
        aggregation=use("sequence_mean"),
        settings="a modifier: rollout_correction goes with every surrogate of tokens",
    )


SEQUENCE_LEVEL = (
    Method(
        name="gspo",
        source="GSPO, arXiv:2507.18071",
        formula="-min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A),  s = exp(mean log rho)",
        surrogate=use("geometric_ratio"),
        aggregation=use("sequence_mean"),
        settings="4 updates a batch",
    ),
    Method(
        name="gspo_token",
        source="GSPO, arXiv:2507.18071",
        formula="-min(s_t A_t, clip(s_t, 1 - 3e-4, 1 + 4e-4) A_t),  s_t = sg[s] p / sg[p]",
        surrogate=use("geometric_token_ratio"),
        aggregation=use("sequence_mean"),
        settings="any advantage, also of tokens",
    ),
    Method(
        name="gmpo",
        source="GMPO, arXiv:2507.20673",
        formula="-A exp(mean of log rho, each at most 0.4 for A > 0, at least -0.4 for A < 0)",
        surrogate=use("clipped_geometric_ratio"),
        aggregation=use("sequence_mean"),
    ),
    Method(
        name="luspo",
        source="LUSPO, arXiv:2602.05261",
        formula="-T min(s A, clip(s, 1 - 2e-3, 1 + 2.5e-3) A),  s = exp(mean log rho)",
        surrogate=use("geometric_ratio", epsilon_low=2e-3, epsilon_high=2.5e-3),
        aggregation=use("sequence_sum"),
    ),
    Method(
        name="sapo_soft",
        source="SAPO, arXiv:2511.20347",
        formula="-4 / t sigmoid(t (rho - 1)) A,  t = 1 for A > 0, else 1.05",
        surrogate=use("soft_gated_ratio"),
        aggregation=use("sequence_mean"),
    ),
    Method(
        name="vespo",
        source="VESPO, arXiv:2602.10693",
        formula="-sg[w^k exp(c (1 - w))] A logp,  k, c = 2, 3 for A >= 0, else 3, 2",
        surrogate=use("sequence_tempered"),
    ),
    Method(
        name="topr",
        source="TOPR, arXiv:2503.14286",
        formula="-A L for r > 0, -sg[min(w, 1)] A L for r <= 0,  A = r - group mean",
        advantage=use("group_centred"),
        surrogate=use("tapered_sequence"),
        aggregation=use("sequence_sum"),
    ),
    Method(
        name="topr_token",
        source="TOPR, arXiv:2503.14286; token by token as in ROLL",
        formula="-A logp for r > 0, -sg[min(rho, 1)] A logp for r <= 0,  A = r - group mean",
        advantage=use("group_centred"),
        surrogate=use("tapered"),
        computed=use("completion_rewards"),
        aggregation=use("sequence_sum"),
    ),
    Method(
        name="bapo",
        source="BAPO, arXiv:2510.18927",
        formula="-min(rho A, clip(rho, low, high) A), for A < 0 at most 3 |A|,  bounds searched",
        surrogate=use("bounded_ratio", dual_clip=3.0),
        computed=use("balanced_bounds"),
        settings="low from 0.6 to 0.8, high from 1.2 to 2, each by 0.05",
    ),
    Method(
        name="simple_po",
        source="Simple Policy Optimization, arXiv:2401.16025",
        formula="-(rho A - |A| (rho - 1)^2 / 0.4)",
        surrogate=use("quadratic_ratio"),
    ),
    Method(
        name="discovered_po",
        source="Discovered Policy Optimisation, arXiv:2210.05639",
        formula="-(rho A - drift),  drift = max(0, u - 2 tanh(u / 2)) of u = (rho - 1) A for "
        "A >= 0, max(0, v - 0.6 tanh(v / 0.6)) of v = A log rho for A < 0",
        surrogate=use("drift"),
    ),
    Method(
        name="mdpo",
        source="Mirror Descent Policy Optimization, arXiv:2005.09814",
        formula="-(rho A - (rho log rho - rho + 1) / eta),  eta from 1 to 0 over the training",
        surrogate=use("mirror_descent"),
        computed=use("annealed_step_size"),
        unverified="the schedule of eta, from general knowledge",
    ),
    Method(
        name="p3o",
        source="P3O, arXiv:2310.00212",
        formula="-(min(w1 a, clip(w1) a) + min(-w2 a, -clip(w2) a)) / 2,  a = R1 - R2, clip to "
        "[0.8, 1.2], R = r - 0.05 log(p_old / p_ref)",
        reward_shaping=use("kl_penalised", beta=0.05),
        advantage=use("leave_one_out"),
        surrogate=use("pairwise_clipped"),
        aggregation=use("sequence_sum"),
        settings="2 generations; surrogate pairwise_jointly_clipped for its second version",
        unverified="beta, and the gate of the second version; from secondary literature",
    ),
    Method(
        name="dppo_tv",
        source="DPPO, arXiv:2602.04879; as in prime-rl",
        formula="-rho A unless p - p_rollout is past +-0.2 the way of A, + 0.001 (log rho)^2",
        advantage=use("group_centred"),
        surrogate=use("probability_masked_ratio"),
        penalties=(Penalty(use("squared_old"), 1e-3),),
        ratio_to_sampler=True,
        unverified="the weight of the penalty",
    ),
    Method(
        name="opsm_unbiased_kl",
        source="DeepSeek-V3.2, arXiv:2512.02556",
        formula=f"{GRPO} + 0.001 rho k3, without completions of A < 0 that the policy has left",
        selection=use("off_policy_sequence_mask"),
        penalties=(Penalty(use("k3_is"), 1e-3),),
        aggregation=use("sequence_mean"),
        settings="left: a mean of log(p_rollout / p) above 0.5",
        unverified="the weight of the penalty",
    ),
    Method(
        name="bgpo_bound",
        source="BGPO, arXiv:2510.11683",
        formula="-A (1 + log rho) for A >= 0, -A rho for A < 0",
        surrogate=use("linear_bound"),
        aggregation=use("sequence_mean"),
        unverified="the form for token log-probabilities; the paper has diffusion models",
    ),
    _corrected("tis", TIS, "min(kappa, 2),  kappa = p_old / p_rollout", use("truncated_tokens")),
    _corrected(
        "tis_sequence", TIS, "min(product of kappa over the completion, 2)",
        use("truncated_sequences"),
    ),
    _corrected(
        "mis", "Liu et al. 2025, When Speed Kills Stability",
        "the product of kappa over the completion if in [0.5, 2], else 0", use("masked_sequences"),
    ),
    _corrected(
        "icepop", "IcePop, arXiv:2510.18855", "kappa if in [0.5, 5], else 0", use("masked_tokens")
    ),
    _corrected(
        "sequence_masked_tis", TIS,
        "kappa if its geometric mean over the completion is in [0.5, 2], else 0",
        use("sequence_masked_tokens"),
    ),
    _corrected(
        "rejection_sampling", "rollout rejection, as in verl",
        "1 if the product of kappa over the completion is in [0.5, 2], else 0",
        use("rejected_sum_k1"),
    ),
)  # fmt: skip
