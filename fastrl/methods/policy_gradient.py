"""Policy gradients and PPO: one ratio per token, baselines from the batch or from a critic."""

from fastrl.methods.record import Method, Penalty, use

PPO = "PPO, arXiv:1707.06347"
REINFORCE_PP = "REINFORCE++, arXiv:2501.03262"

POLICY_GRADIENT = (
    Method(
        name="reinforce",
        source="Williams 1992; as in Back to Basics, arXiv:2402.14740",
        formula="-(R - mean R of the batch) L,  R = r - 0.03 log(p_old / p_ref) of the completion",
        reward_shaping=use("kl_penalised", beta=0.03),
        advantage=use("batch_centred"),
        surrogate=use("policy_gradient"),
        aggregation=use("sequence_sum"),
        settings="one update a batch; beta 0.03 to 0.1",
        unverified="beta of the reward's penalty, from general knowledge",
    ),
    Method(
        name="rloo",
        source="Back to Basics, arXiv:2402.14740",
        formula="-(R - mean R of the others) L,  R = r - 0.03 log(p_old / p_ref) of the completion",
        reward_shaping=use("kl_penalised", beta=0.03),
        advantage=use("leave_one_out"),
        surrogate=use("policy_gradient"),
        aggregation=use("sequence_sum"),
        settings="2 to 4 generations, 512 completions a batch, learning rate 1e-6; "
        "surrogate clipped_sequence_ratio for more than one update",
    ),
    Method(
        name="remax",
        source="ReMax, arXiv:2310.10505",
        formula="-min(rho A, clip(rho, 0.8, 1.2) A),  A = R - R of the greedy completion",
        reward_shaping=use("kl_penalised", beta=0.05),
        advantage=use("baseline_centred"),
        prompt_values=use("greedy_completion"),
        settings="1 generation and a greedy one",
        unverified="beta of the reward's penalty",
    ),
    Method(
        name="reinforce_pp",
        source=REINFORCE_PP,
        formula="-min(rho A, clip(rho, 0.8, 1.2) A),  A = whitened sum of later token rewards",
        reward_shaping=use("kl_penalised_tokens", beta=0.01),
        advantage=use("whitened_returns"),
        unverified="beta of the token rewards' penalty, from general knowledge of OpenRLHF",
    ),
    Method(
        name="reinforce_pp_baseline",
        source=REINFORCE_PP,
        formula="-min(rho A, clip(rho, 0.8, 1.2) A) + 0.001 delta^2 / 2,  A = whitened r - mean",
        advantage=use("whitened_group_centred"),
        penalties=(Penalty(use("k2"), 1e-3),),
        settings="beta 1e-3 to 1e-2",
    ),
    Method(
        name="ppo",
        source=PPO,
        formula="-min(rho A, clip(rho, 0.8, 1.2) A),  A = whitened generalized advantage",
        reward_shaping=use("kl_penalised_tokens", beta=0.05),
        advantage=use("whitened_generalized_advantages"),
        value_loss=use(
            "clipped_squared_error", epsilon_value=0.2, value_coef=0.1, value_lambda=0.95
        ),
        settings="1 to 4 epochs of several mini-batches; gae_lambda and value_lambda 1 for long "
        "reasoning; value_coef 0.1 to 0.5 on shared layers",
        unverified="beta of the token rewards' penalty, 0.001 to 0.05",
    ),
    Method(
        name="ppo_rlvr",
        source="Tulu 3, arXiv:2411.15124",
        formula="-min(rho A, clip(rho, 0.8, 1.2) A),  r = 10 where verified, -10 without an end",
        reward_shaping=use("verified_or_unfinished"),
        token_reward_shaping=use("kl_penalised_tokens", beta=0.05),
        advantage=use("whitened_generalized_advantages"),
        value_loss=use(
            "clipped_squared_error", epsilon_value=0.2, value_coef=0.1, value_lambda=0.95
        ),
        settings="4 epochs, learning rate 3e-7, completions to 2048 tokens; beta 0.07 for 70B; "
        "critic.model the directory of a reward model",
        unverified="reward 10, lambda 0.95, clip 0.2 and 4 epochs, from general knowledge",
    ),
    Method(
        name="ppo_max",
        source="Secrets of RLHF, arXiv:2307.04964",
        formula="-min(rho A, clip(rho, 0.8, 1.2) A),  r over its running spread, clipped to +-10",
        reward_shaping=use("running_scaled", bound=10.0),
        token_reward_shaping=use("kl_penalised_tokens", beta=0.01),
        advantage=use("generalized_advantages"),
        value_loss=use(
            "clipped_squared_error",
            epsilon_value=0.2,
            value_coef=1.0,
            value_lambda=0.95,
            critic_warmup_steps=20,
        ),
        settings="learning rate 5e-7, critic 1.5e-6, completions to 512 tokens, temperature 0.8; "
        "critic.model the directory of a reward model",
        unverified="the training of the critic before the policy, and its 20 steps",
    ),
    Method(
        name="ppo_dualclip",
        source="dual-clip PPO, arXiv:1912.09729",
        formula="-min(rho A, clip(rho, 0.8, 1.2) A), for A < 0 at most 3 |A|",
        surrogate=use("dual_clipped_ratio"),
        settings="any advantage; dual_clip 10 in runs after DAPO",
    ),
    Method(
        name="gpg",
        source="GPG, arXiv:2504.02546",
        formula="-A logp,  A = (completions / those with a reward) (r - group mean)",
        advantage=use("good_policy_gradient"),
        surrogate=use("policy_gradient"),
    ),
    Method(
        name="opo",
        source="OPO, arXiv:2505.23585",
        formula="-A logp,  A = r - mean reward of the group's tokens",
        advantage=use("length_weighted"),
        surrogate=use("policy_gradient"),
        settings="strictly on-policy: one update a batch, no penalty, no entropy bonus",
    ),
    Method(
        name="otb",
        source="optimal token baseline, as in verl",
        formula="-min(rho A, clip(rho, 0.8, 1.2) A),  A = return - its baseline of least variance",
        advantage=use("optimal_token_baseline"),
    ),
    Method(
        name="trpo_penalty",
        source="TRPO, arXiv:1502.05477; its penalty as in PPO, arXiv:1707.06347",
        formula="-(rho A - beta (rho - 1 - log rho)),  beta doubles or halves with the measured KL",
        surrogate=use("kl_penalised_ratio", beta=1.0),
        settings="target KL 0.01; beta changes outside of target / 1.5 to 1.5 target",
        controllers=(use("doubling_kl", target=0.01),),
        unverified="the first beta and the target",
    ),
)
