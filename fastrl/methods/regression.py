"""Fits of a log-ratio to a reward: squared errors of sums of log-probabilities."""

from fastrl.methods.record import Method, Penalty, use

REGRESSION = (
    Method(
        name="astar_po",
        source="A*-PO, arXiv:2505.20686",
        formula="(0.001 D_ref + V* - r)^2,  V* = 0.5 log mean exp(r_ref / 0.5)",
        advantage=use("reference_value_centred"),
        prompt_values=use("reference_rollouts"),
        loss=use("optimal_advantage_regression"),
        entropy_coef=1e-3,
        settings="8 reference completions a prompt beforehand, then 1 generation, 256 prompts in "
        "mini-batches of 128, learning rate 1e-6; min_solved 1 on the hardest data",
    ),
    Method(
        name="rebel",
        source="REBEL, arXiv:2404.16767",
        formula="(D1 - D2 - (r1 - r2))^2",
        loss=use("rebel"),
        settings="2 generations, 4 inner epochs",
    ),
    Method(
        name="refuel",
        source="REFUEL, arXiv:2410.04612",
        formula="(D1 - D2 - 1000 (R1 - R2))^2,  D of one turn, R the return from it on",
        loss=use("rebel", eta=1000.0),
        draws_turn=True,
        settings="2 generations, learning rate 3e-7; eta 1 and 4 inner epochs in the second "
        "setting",
    ),
    Method(
        name="copg",
        source="CoPG, arXiv:2406.19185",
        formula="-sg[R1 - R2] (L1 - L2),  R = r - 0.1 D_ref",
        loss=use("contrastive_policy_gradient"),
        settings="beta 0.03 to 0.5, by task; completions may come from any policy",
    ),
    Method(
        name="gvpo",
        source="GVPO, arXiv:2504.19599",
        formula="-sg[(r - group mean) - (D - group mean D)] L",
        loss=use("group_variance"),
        unverified="beta 1",
    ),
    Method(
        name="opmd",
        source="Kimi k1.5, arXiv:2501.12599",
        formula="-(r - group mean) L + 0.05 D^2",
        loss=use("mirror_descent"),
    ),
    Method(
        name="trpa",
        source="TRPA, arXiv:2504.04524",
        formula="-log sigmoid(0.1 a (mean D_ref better - mean D_ref worse)),  a = 2.5 for the top "
        "level, + 0.001 k3 towards the old policy",
        loss=use("level_preference"),
        penalties=(Penalty(use("k3_old"), 1e-3),),
        settings="16 generations, learning rate 4e-7",
    ),
    Method(
        name="sppo",
        source="SPPO, arXiv:2405.00675",
        formula="((D_ref better - 500)^2 + (D_ref worse + 500)^2) / 2",
        loss=use("sppo"),
        settings="best and worst of 5 generations, 3 rounds, learning rate 5e-7",
        missing="a model that prefers one completion to another, and rounds of which each has the "
        "last one's policy for its reference",
    ),
    Method(
        name="gpo",
        source="General Preference Optimization, arXiv:2410.02197",
        formula="((D_ref better - 1000 s)^2 + (D_ref worse - 1000 s)^2) / 2,  s the mean score "
        "over the opponents",
        loss=use("general_preference"),
        settings="best and worst of 5 generations, 3 rounds",
        missing="a general preference model for the scores, and rounds",
    ),
    Method(
        name="direct_advantage_po",
        source="Direct Advantage Policy Optimization (Liu et al. 2024)",
        formula="(0.01 D_ref - (V after the step - V before it))^2 of each step of a solution",
        advantage=use("baseline_centred"),
        loss=use("optimal_advantage_regression", beta=0.01),
        missing="a critic of unfinished solutions, and completions cut into steps",
        unverified="beta, 0.01 to 0.1, from general knowledge",
    ),
)
