"""Lengths, tools, exploration and several rewards: other rewards for losses that exist."""

from fastrl.methods.record import Choice, Method, Penalty, use

GRPO = "-min(rho A, clip(rho, 0.8, 1.2) A)"
CLIPPED_HIGHER = "-min(rho A, clip(rho, 0.8, 1.28) A)"
ENSEMBLE = "reward model ensembles, arXiv:2310.02743"
CHI2 = "Correlated Proxies, arXiv:2403.03185"
COEFFICIENT = "the coefficient: 0.01 to 1 times the spread of the reward under the reference"
LENGTHS = "prompts that ask for a number of tokens, from 100 to 4000"
CALLS = "the number of tool calls of every completion"


def _rewarded(
    name: str, source: str, reward: str, shaping: Choice, *, beta: float = 0.0, settings: str = "",
    missing: str = "", unverified: str = "",
) -> Method:  # fmt: skip
    """GRPO on another reward."""
    return Method(
        name=name,
        source=source,
        formula=f"{GRPO}{f' + {beta:g} k3' if beta else ''},  r = {reward}",
        reward_shaping=shaping,
        penalties=(Penalty(use("k3"), beta),) if beta else (),
        aggregation=use("sequence_mean"),
        settings=settings,
        missing=missing,
        unverified=unverified,
    )


SHAPED = (
    _rewarded(
        "l1_exact", "L1, arXiv:2503.04697", "1 if correct, - 0.0003 |goal - length|",
        use("exact_length"), beta=1e-3, settings="16 generations, learning rate 1e-6",
        missing=LENGTHS,
    ),
    _rewarded(
        "l1_max", "L1, arXiv:2503.04697", "clip(0.0003 (goal - length) + 0.5, 0, 1) if correct",
        use("maximum_length"), beta=1e-3,
        settings="16 generations, learning rate 4e-6, from a model trained with l1_exact",
        missing=LENGTHS,
    ),
    Method(
        name="dler",
        source="DLER (Liu et al. 2025)",
        formula=f"{CLIPPED_HIGHER}, for A < 0 at most 10 |A|, + 0.0005 k3,  r = 0 where cut",
        reward_shaping=use("truncated_to_zero"),
        advantage=use("whitened_group_centred"),
        selection=use("nonzero_std"),
        dynamic_sampling=True,
        surrogate=use("dual_clipped_ratio", epsilon_high=0.28, dual_clip=10.0),
        penalties=(Penalty(use("k3"), 5e-4),),
        settings="16 generations, 512 prompts, mini-batches of 64, limit 4000, learning rate 1e-6",
    ),
    _rewarded(
        "hapo_history", "history-aware policy optimization, from its released code",
        "1 if correct, + cos of the length over the shortest so far, at least -0.7",
        use("history_length"), missing="the shortest correct completion of every prompt so far",
    ),
    Method(
        name="hbpo",
        source="HBPO, arXiv:2507.15844",
        formula=f"{CLIPPED_HIGHER},  A = (r - mean) / std + mean of the budget - its worth",
        reward_shaping=use("budgeted_cosine"),
        advantage=use("budget_margin"),
        surrogate=use("clipped_ratio", epsilon_high=0.28),
        settings="budgets of 512, 1024, 2048 and 2560 tokens, limit 4096",
        missing="prompts that state a budget",
    ),
    _rewarded(
        "otc_ppo", "OTC, arXiv:2504.14870", "r cos(pi m / (2 m + c)) of m tool calls",
        use("tool_efficiency"), settings="c = 4 for search, 3 for code",
        missing=f"{CALLS}, and a critic",
    ),
    _rewarded(
        "otc_grpo", "OTC, arXiv:2504.14870", "r sin(pi h / (2 n)), h = 2 n m / (m + n), n fewest",
        use("tool_efficiency"), missing=f"{CALLS}, and the fewest of any correct one so far",
    ),
    Method(
        name="entropy_adaptive",
        source="Skywork-OR1, arXiv:2505.22312",
        formula=f"{GRPO} - c entropy,  c moves towards a target entropy",
        controllers=(
            use("target_entropy", target_entropy=0.2, step_size=1e-4, lowest=0.0, highest=5e-3),
        ),
        unverified="the size and the bounds of its moves",
    ),
    Method(
        name="repexp",
        source="representation-based exploration, as in verl",
        formula=f"{GRPO},  r + 0.01 phi (0.01 I + sum phi phi')^-1 phi of the hidden states phi",
        aggregation=use("sequence_mean"),
        settings="32 or 128 projected dimensions",
        missing="a bonus from the hidden states of a frozen copy",
    ),
    Method(
        name="polychromic",
        source="Polychromic Objectives 2025",
        formula=f"{GRPO},  A = mean over sets of (mean r times distinct answers) - mean of all",
        advantage=use("set_relative"),
        missing="answers that are grouped by meaning, and a KL towards the sampling policy",
        unverified="sets of 4, 128 of them",
    ),
    Method(
        name="eapo",
        source="IterResearch, arXiv:2511.07327",
        formula="-min(s A, clip(s, 1 - 3e-4, 1 + 4e-4) A),  r = 0.995^(turns left) final reward",
        reward_shaping=use("discounted_turns"),
        selection=use("multiple_of", multiple=1),
        surrogate=use("geometric_ratio"),
        aggregation=use("sequence_mean"),
        missing="agents of several turns, each a completion of its own",
        unverified="the discount",
    ),
    Method(
        name="aspo_tool",
        source="ASPO, arXiv:2508.19201",
        formula=f"{CLIPPED_HIGHER},  A + clip(-2 (p - mean p) / mean T, -0.7 |A|, 0.7 |A|) of the "
        "place p of the first tool call",
        advantage=use("early_tool_calls"),
        surrogate=use("clipped_ratio", epsilon_high=0.28),
        settings="96 prompts, 8 generations, temperature 1",
        missing="the place of the first tool call in every completion",
        unverified="-2 and 0.7, from a recipe of others",
    ),
    Method(
        name="papo",
        source="PAPO, arXiv:2507.06448",
        formula=f"{GRPO} - 0.02 k3 against masked input - 0.05 logp",
        penalties=(Penalty(use("negative_log_likelihood"), 0.05),),
        aggregation=use("sequence_mean"),
        missing="a second forward pass with masked input, from which the k3 keeps away",
    ),
    Method(
        name="gui_g1",
        source="GUI-G1 (Zhou et al. 2025)",
        formula=f"w ({GRPO}) / 64 of every token,  A = r - group mean, w by the target's size",
        advantage=use("group_centred"),
        aggregation=use("constant"),
        missing="a weight of every prompt by the size of its target, and a denominator of 64",
    ),
    _rewarded(
        "a2fm_apo", "A2FM 2025", "r + 1, - (pass rate)^2 where an expensive mode was used",
        use("cheap_mode"), missing="modes of answering, some of them forced",
        unverified="the share of forced completions",
    ),
    _rewarded("reward_ensemble", ENSEMBLE, "mean of the rewards", use("ensemble_mean")),
    _rewarded("reward_ensemble_worst", ENSEMBLE, "lowest of the rewards", use("ensemble_worst")),
    _rewarded(
        "reward_ensemble_cautious", ENSEMBLE, "mean - 0.1 variance of the rewards",
        use("ensemble_cautious"), settings="4 or 5 reward models; 0.5 for best-of-n",
    ),
    _rewarded(
        "chi2_reg", CHI2, "r - 0.1 (w_ref - 1)", use("chi_squared_penalised", coefficient=0.1),
        settings="w_ref is p_old / p_ref of the completion", unverified=COEFFICIENT,
    ),
    _rewarded(
        "root_chi2_reg", CHI2, "r - 0.1 (w_ref - 1) / sqrt(mean (w_ref - 1))",
        use("root_chi_squared_penalised", coefficient=0.1),
        settings="w_ref is p_old / p_ref of the completion", unverified=COEFFICIENT,
    ),
    Method(
        name="cgpo_crpg",
        source="CGPO, arXiv:2409.20370",
        formula="-A L,  r = sigmoid(r - r_data) max(0, 1 - D_ref / 5) where constraints hold",
        reward_shaping=use("constrained"),
        advantage=use("batch_centred"),
        surrogate=use("policy_gradient"),
        aggregation=use("sequence_sum"),
        settings="4 generations",
        missing="judges of constraints, and rewards of the data set's own answers",
        unverified="the limit 5 of the KL, from a trainer of others",
    ),
    Method(
        name="cgpo_codpo",
        source="CGPO, arXiv:2409.20370",
        formula="-log sigmoid(0.1 (D_ref better - D_ref worse)) - mean logp of the better one",
        loss=use("constrained_dpo"),
        settings="4 generations",
        missing="judges of constraints, by which the pairs are chosen",
        unverified="beta, and the weight 1 of the likelihood",
    ),
)  # fmt: skip
