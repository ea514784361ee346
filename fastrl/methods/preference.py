"""Losses of preferred and other completions: of pairs, of lists and of single ones."""

from typing import Any

from fastrl.methods.record import Method, Penalty, use

MARGIN = "D_ref better - D_ref worse"
COMPANION = "a third completion for every pair"
JUDGE = "a model that prefers one completion to another"


def _of_loss(
    name: str, source: str, formula: str, loss: str, *, settings: str = "", missing: str = "",
    unverified: str = "", **parameters: Any,
) -> Method:  # fmt: skip
    """A method that is a preference loss with these hyper-parameters."""
    return Method(
        name=name,
        source=source,
        formula=formula,
        loss=use(loss, **parameters),
        settings=settings,
        missing=missing,
        unverified=unverified,
    )


_OF_MARGINS = (
    _of_loss(
        "dpo", "DPO, arXiv:2305.18290", f"-log sigmoid(0.1 ({MARGIN}))", "dpo",
        settings="learning rate 5e-7; pairs are collected beforehand, here best and worst of a "
        "prompt's completions, as for all losses of pairs",
    ),
    _of_loss(
        "cdpo", "Mitchell 2023", f"-0.9 log sigmoid(u) - 0.1 log sigmoid(-u),  u = 0.1 ({MARGIN})",
        "conservative_dpo",
    ),
    _of_loss(
        "robust_dpo", "robust DPO, arXiv:2403.00409",
        f"(0.1 log sigmoid(-u) - 0.9 log sigmoid(u)) / 0.8,  u = 0.1 ({MARGIN})", "robust_dpo",
    ),
    _of_loss(
        "ipo", "IPO, arXiv:2310.12036", f"({MARGIN}, each a mean over its tokens, - 5)^2", "ipo",
        settings="loss ipo_sum for sums, as in the derivation",
    ),
    _of_loss(
        "hinge", "RSO, arXiv:2309.06657; SLiC, arXiv:2305.10425", f"max(0, 1 - 0.05 ({MARGIN}))",
        "hinge",
    ),
    _of_loss(
        "bco", "BCO, arXiv:2404.04656", "-log sigmoid(0.01 D_ref better) - log sigmoid(-0.01 "
        "D_ref worse)", "bco", settings="the simple form, without a running baseline of the scores",
    ),
    _of_loss(
        "nca", "NCA, arXiv:2402.05369", "-log sigmoid(b) - log sigmoid(-b) / 2 - log sigmoid(-w) "
        "/ 2,  b, w = 0.01 D_ref better, worse", "nca",
    ),
    _of_loss(
        "apo_zero", "APO, arXiv:2408.06266", "1 - sigmoid(0.1 D_ref better) + sigmoid(0.1 D_ref "
        "worse)", "apo_zero",
    ),
    _of_loss(
        "apo_down", "APO, arXiv:2408.06266", f"sigmoid(0.1 D_ref better) + 1 - sigmoid(0.1 "
        f"({MARGIN}))", "apo_down",
    ),
    _of_loss(
        "discopop", "DiscoPOP, arXiv:2406.08414", f"-(1 - m) log sigmoid(u) + m exp(-u),  m = "
        f"sigmoid(u / 0.05), u = 0.05 ({MARGIN})", "discopop",
    ),
    _of_loss(
        "kto", "KTO, arXiv:2402.01306", "1 - sigmoid(0.1 D_ref - z) if r > 0, else 1 - sigmoid(z - "
        "0.1 D_ref)", "kto", settings="single completions, no pairs",
        missing="z, from the mean log-ratio of completions under other prompts (0 in loss kto)",
    ),
    _of_loss(
        "orpo", "ORPO, arXiv:2403.07691", "-mean logp better - 0.1 log sigmoid(difference of log "
        "odds)", "orpo", settings="no reference",
    ),
    _of_loss(
        "cpo", "CPO, arXiv:2401.08417", "-log sigmoid(0.1 (L better - L worse)) - mean logp better",
        "cpo", settings="no reference",
    ),
    _of_loss(
        "aot", "AOT, arXiv:2406.05882", "-log sigmoid(0.1 (D_ref better - D_ref worse)), paired by "
        "rank over the step", "sorted_dpo",
    ),
    _of_loss(
        "aot_pair", "AOT, arXiv:2406.05882", "-log sigmoid(0.1 (margin - margin of the reference)),"
        " paired by rank over the step", "sorted_margin_dpo",
    ),
    _of_loss(
        "simpo", "SimPO, arXiv:2405.14734", "-log sigmoid(2 (mean logp better - mean logp worse) - "
        "1)", "simpo", settings="no reference; released with beta 2 to 10, margin / beta 0.1 to "
        "0.8, learning rate 3e-7 to 1e-6",
    ),
    _of_loss(
        "dpo_norm", "Tulu 3, arXiv:2411.15124", f"-log sigmoid(5 ({MARGIN})), each a mean over its "
        "tokens", "normalised_dpo", unverified="beta 5, from general knowledge",
    ),
    _of_loss(
        "exo", "EXO, arXiv:2402.00856", f"KL of (sigmoid(u), sigmoid(-u)) to (0.999, 0.001),  u = "
        f"0.5 ({MARGIN})", "exo",
    ),
    _of_loss(
        "f_dpo", "f-DPO, arXiv:2309.16240", "-log sigmoid(0.1 (log sigmoid D_ref better - log "
        "sigmoid D_ref worse))", "jensen_shannon_dpo",
        settings="the Jensen-Shannon divergence; the reverse KL is dpo",
    ),
    _of_loss(
        "f_dpo_forward_kl", "f-DPO, arXiv:2309.16240", "-log sigmoid(0.1 (exp(-D_ref worse) - exp("
        "-D_ref better)))", "forward_kl_dpo",
    ),
    _of_loss(
        "f_dpo_alpha", "f-DPO, arXiv:2309.16240", "-log sigmoid(0.2 (exp(-D_ref worse / 2) - exp("
        "-D_ref better / 2)))", "alpha_divergence_dpo",
    ),
    _of_loss(
        "rpo", "RPO, arXiv:2405.16436", f"-log sigmoid(0.01 ({MARGIN})) - 0.005 L better",
        "regularised_dpo",
    ),
    _of_loss(
        "wpo", "WPO, arXiv:2406.11827", f"-w log sigmoid(0.01 ({MARGIN})),  w = min(1, exp(sum of "
        "mean logp - log sum p^2))", "weighted_dpo",
    ),
    _of_loss(
        "ld_dpo", "LD-DPO, arXiv:2409.06411", f"-log sigmoid(0.1 ({MARGIN})), half of it past the "
        "shorter one's length", "length_desensitized_dpo",
    ),
)  # fmt: skip

_OF_LISTS = (
    _of_loss(
        "exo_list", "EXO, arXiv:2402.00856", "KL of softmax(0.5 D_ref) to softmax(r / 0.5)",
        "list_wise_exo",
    ),
    _of_loss(
        "infonca", "InfoNCA, arXiv:2402.05369", "-sum softmax(r / 0.01) log softmax(0.01 D_ref)",
        "info_nca", unverified="the temperature of the rewards",
    ),
    _of_loss(
        "plackett_luce", "DPO, arXiv:2305.18290 appendix A.3", "-log probability of the ranking by "
        "reward under scores 0.1 D_ref", "plackett_luce",
    ),
    _of_loss(
        "rrhf", "RRHF, arXiv:2304.05302", "sum of max(0, mean logp worse - mean logp better)",
        "rank_hinge", settings="no reference",
    ),
    _of_loss(
        "lipo_lambda", "LiPO, arXiv:2402.01878", "-sum w log sigmoid(0.05 (D_ref better - D_ref "
        "worse)),  w by gain and rank", "lambda_rank",
        settings="8 generations, temperature 0.7, top_k 40; rewards are win rates",
    ),
)  # fmt: skip

_WITH_MORE = (
    _of_loss(
        "slic", "SLiC-HF, arXiv:2305.10425", "max(0, 1 - L better + L worse) - 0.01 L of the "
        "target", "slic", missing=f"{COMPANION}, the target of fine-tuning",
        unverified="0.01, from general knowledge",
    ),
    _of_loss(
        "rationale_dpo", "Just et al. 2024, arXiv:2407.14477", f"-log sigmoid(0.1 ({MARGIN})) - "
        "mean logp of the reason", "rationale_dpo", settings="gamma 1 to 2; loss "
        "rationale_sigmoid_dpo as released", missing=f"{COMPANION}, the reason for the preference",
    ),
    _of_loss(
        "rationale_orpo", "Just et al. 2024, arXiv:2407.14477", "ORPO - mean logp of the reason",
        "rationale_orpo", missing=f"{COMPANION}, the reason for the preference",
    ),
    _of_loss(
        "xpo", "XPO, arXiv:2405.21046", f"-log sigmoid(0.1 ({MARGIN})) + 1e-5 L of the reference's "
        "completion", "exploratory_dpo", missing="a completion of the reference in every pair",
    ),
    _of_loss(
        "rso", "RSO, arXiv:2309.06657", f"max(0, 1 - 0.05 ({MARGIN}))", "hinge",
        missing="8 of 64 completions of the reference, by rejection sampling, and their ranking",
        unverified="the sampling, from general knowledge",
    ),
    Method(
        name="hypo",
        source="HyPO, arXiv:2406.01462",
        formula=f"-log sigmoid(0.1 ({MARGIN})) + 1e-4 sum of sg[delta] logp, fresh completions",
        loss=use("dpo"),
        penalties=(Penalty(use("k1_score"), 1e-4),),
        aggregation=use("sequence_sum"),
        missing="pairs that were collected beforehand, beside the fresh completions",
        unverified="1e-4 to 1e-3",
    ),
    _of_loss(
        "online_dpo", "OAIF, arXiv:2402.04792", f"-log sigmoid(0.1 ({MARGIN})), fresh completions",
        "dpo", settings="2 or more generations, 2 to 4 inner epochs",
    ),
    _of_loss(
        "dno", "DNO, arXiv:2404.03715", f"-q log sigmoid(u) - (1 - q) log sigmoid(-u),  u = 0.1 "
        f"({MARGIN})", "soft_dpo", settings="5 generations and one strong answer",
        missing=f"{JUDGE}, and rounds of which each has the last one's policy for its reference",
        unverified="beta and the number of generations",
    ),
    _of_loss(
        "inpo", "INPO, arXiv:2407.00617", "(margin against the mixture of reference and last round "
        "- 1 / 0.015)^2", "inpo", settings="3 rounds", missing=f"{JUDGE}, and rounds",
        unverified="both constants, from a reimplementation",
    ),
    Method(
        name="nash_md",
        source="Nash-MD, arXiv:2312.00886",
        formula="-(P - 1/2) L + 0.1 sg[delta] logp,  P the chance to beat the mixture",
        advantage=use("baseline_centred"),
        surrogate=use("policy_gradient"),
        penalties=(Penalty(use("k1_score"), 0.1),),
        aggregation=use("sequence_sum"),
        settings="mixture half policy and half reference in TRL, an eighth reference in the paper",
        missing=f"{JUDGE}, and opponents sampled from a mixture with the reference",
    ),
    Method(
        name="spo_minimax",
        source="SPO, arXiv:2401.04056",
        formula="-min(rho A, clip(rho, 0.8, 1.2) A),  r = share of the group that it beats",
        advantage=use("group_centred"),
        missing=JUDGE,
        unverified="all of it, from general knowledge",
    ),
    _of_loss(
        "apo_nesterov", "Accelerated Preference Optimization, arXiv:2410.06293",
        f"-log sigmoid(0.1 ({MARGIN}))", "dpo", settings="extrapolation by 0.3",
        missing="rounds that start from an extrapolation of the last two policies",
        unverified="0.3",
    ),
    _of_loss(
        "spac", "SPAC, arXiv:2406.04274", "0.1 (D own - mean D of the pair) - log sigmoid(0.1 (D "
        "better - D worse))", "spac", missing=f"{COMPANION}, sampled by the last round's policy",
        unverified="both constants, derived",
    ),
)  # fmt: skip

PREFERENCE = (*_OF_MARGINS, *_OF_LISTS, *_WITH_MORE)
