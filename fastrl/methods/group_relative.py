"""GRPO and what changed about its advantages, its averages and its clip."""

from fastrl.methods.record import Method, Penalty, use

CLIPPED = "-min(rho A, clip(rho, 0.8, 1.2) A)"
CLIPPED_HIGHER = "-min(rho A, clip(rho, 0.8, 1.28) A)"
DUAL_CLIP_HIGHER = use("dual_clipped_ratio", epsilon_high=0.28, dual_clip=10.0)

GROUP_RELATIVE = (
    Method(
        name="grpo",
        source="DeepSeekMath, arXiv:2402.03300",
        formula=f"{CLIPPED},  A = (r - group mean) / group std",
        aggregation=use("sequence_mean"),
        settings="the paper has 64 generations and a k3 penalty with beta 0.04, later ones 8 to 16 "
        "and 0.001; beta is 0 here as in TRL",
    ),
    Method(
        name="dr_grpo",
        source="Dr. GRPO, arXiv:2503.20783",
        formula=f"{CLIPPED},  A = r - group mean",
        advantage=use("group_centred"),
        aggregation=use("constant"),
    ),
    Method(
        name="dapo",
        source="DAPO, arXiv:2503.14476",
        formula=f"{CLIPPED_HIGHER}, for A < 0 at most 10 |A|,  r minus a penalty near the limit",
        reward_shaping=use("soft_overlong"),
        selection=use("nonzero_std"),
        dynamic_sampling=True,
        surrogate=DUAL_CLIP_HIGHER,
        settings="16 generations, 512 prompts, limit 20480 of which the last 4096 cost",
    ),
    Method(
        name="lite_ppo",
        source="Tricks or Traps, arXiv:2508.08221",
        formula=f"{CLIPPED},  A = (r - group mean) / std of all rewards",
        advantage=use("batch_relative"),
        settings="8 generations, temperature 0.99, top_p 0.99, top_k 100",
    ),
    Method(
        name="cispo",
        source="MiniMax-M1, arXiv:2506.13585; bounds [0, 5] as in ScaleRL, arXiv:2510.13786",
        formula="-sg[clip(rho, 0, 5)] A logp",
        surrogate=use("truncated_importance", epsilon_low=1.0, epsilon_high=4.0),
    ),
    Method(
        name="scalerl",
        source="ScaleRL, arXiv:2510.13786",
        formula="-sg[clip(rho, 0, 5)] A logp,  A = (r - group mean) / its root mean square so far",
        advantage=use("batch_rms", decay=1e-3),
        selection=use("nonzero_std"),
        advantage_after_selection=True,
        max_pass_rate=0.9,
        surrogate=use("truncated_importance", epsilon_low=1.0, epsilon_high=4.0),
        aggregation=use("prompt_mean"),
        thinking=use("forced_end", min_thinking_tokens=10240, max_thinking_tokens=12288),
        settings="16 generations, 48 prompts, rewards +-1, prompts of 2048 tokens and completions "
        "of 14336, the head in float32 (model.cast_lm_head_to_fp32); rollouts are made by other "
        "machines and up to 8 updates old, here on one device they are fresh, or as old as "
        "num_mini_batches makes them",
        unverified="learning rate 5e-7",
    ),
    Method(
        name="bnpo",
        source='the loss type "bnpo" of TRL',
        formula=f"{CLIPPED}, a mean over the tokens of a batch",
        settings="TRL averages over each micro-batch, which makes the loss depend on its size; "
        "here over the whole step",
    ),
    Method(
        name="bnpo_beta",
        source="BNPO, arXiv:2506.02864",
        formula=f"{CLIPPED},  A = (r - p) / f(p), f a Beta density fitted to the pass rates",
        advantage=use("beta_normalised"),
        aggregation=use("sequence_mean"),
        unverified="the parameters 1 + a/3 and 1 + b/3 of the density, from general knowledge",
    ),
    Method(
        name="mapo",
        source="MAPO, arXiv:2509.18849",
        formula=f"{CLIPPED} + 0.01 k3,  A = c (r - m) / std + (1 - c) (r - m) / m, c = 4 p (1 - p)",
        advantage=use("mixed"),
        penalties=(Penalty(use("k3"), 0.01),),
        aggregation=use("sequence_mean"),
        settings="rewards of at least 0",
    ),
    Method(
        name="aapo",
        source="AAPO, arXiv:2505.14264",
        formula="-A logp,  A = (r - group mean) / std + clip(r - r_ref, -0.2, 0.28)",
        advantage=use("reference_margin"),
        prompt_values=use("reference_rollouts", num_samples=0),
        surrogate=use("policy_gradient"),
        settings="6 generations, learning rate 1e-6, one update a batch",
    ),
    Method(
        name="seed_grpo",
        source="SEED-GRPO, arXiv:2505.12346",
        formula=f"{CLIPPED},  A = (r - group mean) / std (1 - 0.5 entropy of the answers / log G)",
        advantage=use("uncertainty_scaled"),
        aggregation=use("constant"),
        settings="8 to 16 generations; the paper has strength 0.02 of the entropy itself",
        missing="answers that are grouped by meaning",
        unverified="the strength",
    ),
    Method(
        name="copo",
        source="COPO, arXiv:2508.04138",
        formula=f"{CLIPPED},  A = w local + (1 - w) global, w = sigmoid(20 (entropy - 1.5))",
        advantage=use("consistency_blended"),
        aggregation=use("sequence_mean"),
        settings="6 generations, 512 prompts, learning rate 1e-6",
        missing="answers that are grouped by meaning",
        unverified="the form of the global reward, from secondary literature",
    ),
    Method(
        name="nft",
        source="NFT, arXiv:2505.18116",
        formula="-(1 - k) log rho if correct, -(1 - k) log max(1, (1 - k rho) / (1 - k)) if wrong",
        advantage=use("outcome_sign"),
        selection=use("nonzero_std"),
        token_weights=use("failure_rates"),
        surrogate=use("negative_aware"),
        computed=use("group_pass_rates"),
        aggregation=use("fixed_constant"),
        settings="learning rate 1e-6; k is the pass rate of the prompt, within 0.02 and 0.98",
    ),
    Method(
        name="spo_single_stream",
        source="SPO, arXiv:2509.13232",
        formula=f"{CLIPPED_HIGHER}, for A < 0 at most 10 |A|,  A = whitened r - pass rate so far",
        advantage=use("baseline_whitened"),
        prompt_values=use("success_rates"),
        surrogate=DUAL_CLIP_HIGHER,
        settings="1 generation, learning rate 1e-6; prompts drawn by sqrt(v (1 - v)) + 0.05",
    ),
    Method(
        name="sfpo",
        source="SFPO, arXiv:2510.04072",
        formula=f"{CLIPPED},  theta_0 + 0.8 (theta_3 - theta_0) before the last step on a batch",
        aggregation=use("sequence_mean"),
        look_ahead=use("slow_fast", fast_steps=3, way_back=0.8),
        controllers=(use("entropy_break", window=10, threshold=2.0),),
        settings="num_iterations and num_mini_batches 1, of the steps after the break",
        unverified="all four settings",
    ),
    Method(
        name="gdpo",
        source="GDPO, arXiv:2601.05242",
        formula=f"{CLIPPED},  A = whitened sum of every reward's (r - group mean) / group std",
        advantage=use("decoupled_rewards"),
        settings="a weight for each reward, 1 by default",
    ),
    Method(
        name="passk_max",
        source="pass@k training, arXiv:2503.19595",
        formula=f"{CLIPPED},  A = (best - second) / group std for the best alone, else 0",
        advantage=use("pass_at_k_max"),
    ),
)
