"""Methods that train a value model, beside PPO itself."""

from fastrl.methods.record import Method, Penalty, use

CLIPPED = "-min(rho A, clip(rho, 0.8, 1.2) A)"

VALUE_MODEL = (
    Method(
        name="t_ppo",
        source="Truncated PPO, arXiv:2506.15050",
        formula=f"{CLIPPED},  A = generalized advantage of a window of the completion",
        advantage=use("truncated_advantages"),
        ratio_to_sampler=True,
        value_loss=use("squared_error", value_lambda=1.0),
        value_tokens="finished",
        settings="windows of 8k tokens, limit 24k; rollout.max_tokens_per_step is the window of "
        "all completions together, trained on when the last one of their prompt has ended",
        unverified="the size of the windows, and the loss of the values",
    ),
    Method(
        name="vc_ppo",
        source="VC-PPO, arXiv:2503.01491",
        formula=f"{CLIPPED},  A = generalized advantage with lambda 0.95, values with 1",
        advantage=use("generalized_advantages", gae_lambda=0.95),
        value_loss=use(
            "clipped_squared_error", epsilon_value=0.2, value_lambda=1.0, critic_warmup_steps=50
        ),
        settings="the value model is trained alone until its loss stays",
        unverified="all constants, from general knowledge",
    ),
    Method(
        name="vapo",
        source="VAPO, arXiv:2504.05118",
        formula="-min(rho A, clip(rho, 0.8, 1.28) A) - 0.1 mean logp of correct completions,  "
        "lambda = 1 - 1 / (0.05 T)",
        advantage=use("length_adaptive_advantages"),
        surrogate=use("clipped_ratio", epsilon_high=0.28),
        penalties=(Penalty(use("negative_log_likelihood"), 0.1, use("correct_tokens")),),
        value_loss=use(
            "clipped_squared_error", epsilon_value=0.2, value_lambda=1.0, critic_warmup_steps=50
        ),
        settings="512 prompts, 16 generations, learning rate 1e-6, critic 2e-6",
        unverified="learning rates and 50 steps of the critic alone",
    ),
    Method(
        name="poad",
        source="POAD, arXiv:2405.15821",
        formula=f"{CLIPPED} - 0.01 entropy,  A discounted between actions, not inside them",
        advantage=use("action_level_advantages"),
        entropy_coef=0.01,
        value_loss=use("huber_error", delta=10.0, value_lambda=0.95),
        settings="learning rate 1e-6, critic 5e-5",
        missing="environments that number the actions of an agent",
    ),
    Method(
        name="rto",
        source="RTO, arXiv:2404.18922",
        formula=f"{CLIPPED},  token rewards clip(0.05 log(p_dpo / p_ref), -0.05, 0.05) - 0.01 "
        "log(p_old / p_ref), r within +-10 on the last token",
        reward_shaping=use("preference_tokens"),
        token_reward_shaping=use("kl_penalised_tokens", beta=0.01),
        advantage=use("generalized_advantages"),
        value_loss=use("clipped_squared_error", epsilon_value=0.2, value_lambda=0.95),
        settings="1024 completions, mini-batches of 128, learning rate 5e-7, critic 9e-6",
        missing="a model trained with DPO, and the bound of the rewards beside these two",
    ),
    Method(
        name="text2grad",
        source="Text2Grad (Wang et al. 2025)",
        formula=f"{CLIPPED},  rewards +1, 0, -1 on the spans that a critique names",
        reward_shaping=use("kl_penalised_tokens", beta=0.2),
        advantage=use("whitened_generalized_advantages"),
        value_loss=use("clipped_squared_error", epsilon_value=0.2, value_lambda=0.95),
        controllers=(use("adaptive_reward_kl", target=0.1),),
        settings="beta follows a KL of 0.1",
        missing="a feedback model that rewards spans",
    ),
    Method(
        name="dgpo",
        source="DGPO, arXiv:2508.20324",
        formula=f"{CLIPPED},  token rewards -0.001 log(p_old / p_teacher) where wrong",
        reward_shaping=use("teacher_penalised_tokens"),
        advantage=use("generalized_advantages", gae_lambda=1.0),
        value_loss=use("clipped_squared_error", epsilon_value=0.2, value_lambda=1.0),
        settings="512 completions, mini-batches of 256, learning rate 1e-6, critic 1e-5",
        missing="a teacher",
        unverified="discount and lambda of 1",
    ),
)
