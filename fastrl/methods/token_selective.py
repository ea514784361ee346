"""Which tokens, completions and prompts are trained on."""

from fastrl.methods.record import Method, Penalty, use
from fastrl.schedules import Schedule

CLIPPED = "-min(rho A, clip(rho, 0.8, 1.2) A)"
CLIPPED_HIGHER = "-min(rho A, clip(rho, 0.8, 1.28) A)"

TOKEN_SELECTIVE = (
    Method(
        name="entropy_top20",
        source="Beyond the 80/20 Rule, arXiv:2506.01939",
        formula=f"{CLIPPED_HIGHER} on the fifth of the tokens of highest entropy, else 0",
        token_weights=use("high_entropy"),
        surrogate=use("clipped_ratio", epsilon_high=0.28),
        settings="on top of DAPO; tokens without weight stay in the denominator",
    ),
    Method(
        name="clip_cov",
        source="The Entropy Mechanism, arXiv:2505.22617",
        formula="-min(rho A, clip(rho, 0, 2) A), for A < 0 at most 10 |A|, but 0 for 2 in 10000 "
        "tokens drawn from those whose covariance is between 1 and 5",
        token_weights=use("clip_covariance"),
        surrogate=use("dual_clipped_ratio", epsilon_low=1.0, epsilon_high=1.0, dual_clip=10.0),
    ),
    Method(
        name="kl_cov",
        source="The Entropy Mechanism, arXiv:2505.22617",
        formula="-rho A, + |log rho| on the 2 in 1000 tokens of highest covariance",
        surrogate=use("importance_ratio"),
        penalties=(Penalty(use("absolute_old"), 1.0, use("covariance_top")),),
        settings="fraction 2e-3 for 7B parameters, 2e-4 for 32B",
    ),
    Method(
        name="hapo_hetero",
        source="Heterogeneous Adaptive Policy Optimization, from its released code",
        formula="-min(rho A, clip(rho, 1 - low, 1 + high) A), for A < 0 at most 10 |A|,  bounds "
        "and A by the entropy of the token",
        advantage=use("token_group_relative"),
        selection=use("nonzero_std"),
        dynamic_sampling=True,
        token_weights=use("entropy_redistribution"),
        surrogate=use("dual_clipped_ratio", dual_clip=10.0),
        computed=use("entropy_bounds"),
        settings="its sampler moves the temperature by 0.05 of the relative entropy, which is "
        "outside of the loss and not done here",
    ),
    Method(
        name="capo",
        source="curvature-aware policy optimization, from its released code",
        formula=f"{CLIPPED} where a step on the token alone moves policy and objective little",
        advantage=use("group_centred"),
        token_weights=use("curvature"),
        settings="8 generations, learning rate 1.5e-5, 100 steps; set the learning rate of the "
        "rule to yours. The step it weighs is plain gradient descent on the output matrix",
    ),
    Method(
        name="pods",
        source="PODS, arXiv:2504.13818",
        formula=f"{CLIPPED} on the 16 of 64 completions of largest reward variance",
        selection=use("max_variance"),
        advantage_after_selection=True,
        aggregation=use("sequence_mean"),
        settings="64 generations of which 16 are kept",
    ),
    Method(
        name="d3s",
        source="D3S, arXiv:2509.22115",
        formula=f"{CLIPPED} on completions of largest advantage variance, tokens of largest |A| H",
        selection=use("max_variance_advantages", kept_fraction=Schedule("linear", 0.25, 0.5)),
        token_weights=use("advantage_entropy", fraction=Schedule("linear", 0.2, 1.0)),
        settings="8 of 16 generations, a fourth of the batch growing to half, a fifth of the "
        "tokens growing to all",
        unverified="both ends of the fractions",
    ),
    Method(
        name="pf_ppo",
        source="PF-PPO, arXiv:2409.06957",
        formula=f"{CLIPPED} on the best and the worst completion of each prompt",
        selection=use("best_and_worst"),
        settings="5 to 10 generations; selection best_and_random does as well. Group-relative "
        "advantages of all completions, where the paper has a critic",
    ),
    Method(
        name="pcl",
        source="Prompt Curriculum Learning (Gao et al. 2025)",
        formula="-A logp on prompts of medium difficulty,  A = r - group mean",
        advantage=use("group_centred"),
        surrogate=use("policy_gradient"),
        aggregation=use("sequence_mean"),
        settings="512 of 2048 prompts, those nearest to a pass rate of 0.5, 16 generations",
        missing="a value model of prompts, by which they are chosen",
        unverified="all constants, from a secondary summary",
    ),
    Method(
        name="depo",
        source="DEPO 2025, data-efficient policy optimization",
        formula=f"{CLIPPED} on the prompts with most to teach,  |A| times mean entropy",
        aggregation=use("sequence_mean"),
        settings="a fifth of the data beforehand, two fifths of the rollouts",
        missing="a score for every prompt from its last epochs, by which prompts are chosen",
        unverified="all constants",
    ),
    Method(
        name="qwenlong",
        source="QwenLong-L1, arXiv:2505.17667",
        formula=f"{CLIPPED},  A = (r - group mean) / group std",
        aggregation=use("sequence_mean"),
        settings="8 generations, 128 prompts, mini-batches of 32, learning rate 2e-6, "
        "temperature 0.7, top_p 0.95",
        missing="stages of growing input length that bring back prompts never solved",
    ),
    Method(
        name="mpo_mixed",
        source="Mixed Preference Optimization 2024",
        formula="-log sigmoid(0.1 (D_ref better - D_ref worse)) on easy pairs, PPO on hard ones",
        loss=use("dpo"),
        missing="a second stage with PPO, whose reference is the policy of the first",
        unverified="all constants, from general knowledge",
    ),
)
