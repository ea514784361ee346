"""Coefficients and scales that follow what training measures.

Each controller holds its state between steps; state_dict() is what a checkpoint has to keep.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

STD_FLOOR = 1e-8
"""A running spread below this is rounding: rewards are left in their own unit."""


class AdaptiveKL:
    """Coefficient of the KL penalty that steers the measured KL to a target (Ziegler et al.,
    arXiv:1909.08593).

    kl: mean KL of the completions of a step, in nats. A step changes beta by at most
    0.2 * completions / horizon of itself.
    """

    def __init__(self, beta: float, *, target: float = 6.0, horizon: float = 10_000.0) -> None:
        if not (beta > 0 and target > 0 and horizon > 0):
            raise ValueError(
                f"expected beta, target and horizon above 0, got {beta}, {target} and {horizon}; "
                "a beta of 0 would stay 0"
            )
        self.beta = beta
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_completions: int) -> float:
        """beta * (1 + clip(kl / target - 1, +-0.2) * num_completions / horizon) from here on."""
        _check_finite("KL", kl)
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + error * num_completions / self.horizon
        return self.beta

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = state["beta"]


class DoublingKL:
    """Coefficient of the KL penalty that doubles above 1.5 * target and halves below target / 1.5
    (the adaptive penalty of PPO, arXiv:1707.06347).

    kl: mean KL between the old and the current policy after an update, in nats a token.
    """

    def __init__(self, beta: float, *, target: float = 0.01) -> None:
        if not (beta > 0 and target > 0):
            raise ValueError(
                f"expected beta and target above 0, got {beta} and {target}; "
                "a beta of 0 would stay 0"
            )
        self.beta = beta
        self.target = target

    def update(self, kl: float) -> float:
        """The coefficient from here on."""
        _check_finite("KL", kl)
        if kl > 1.5 * self.target:
            self.beta *= 2
        elif kl < self.target / 1.5:
            self.beta /= 2
        return self.beta

    def state_dict(self) -> dict[str, float]:
        return {"beta": self.beta}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.beta = state["beta"]


class TargetEntropy:
    """Coefficient of the entropy bonus that steps towards a target entropy (Skywork-OR1,
    arXiv:2505.22312).

    target_entropy and the measured entropy are means per token, in nats. The coefficient grows by
    step_size while the entropy is below the target, shrinks above it, and stays in
    [lowest, highest].
    """

    def __init__(
        self,
        coefficient: float,
        *,
        target_entropy: float,
        step_size: float,
        lowest: float,
        highest: float,
    ) -> None:
        if not (lowest <= coefficient <= highest and step_size > 0):
            raise ValueError(
                f"expected a coefficient in [{lowest}, {highest}] and a step_size above 0, got "
                f"{coefficient} and {step_size}"
            )
        self.coefficient = coefficient
        self.target_entropy = target_entropy
        self.step_size = step_size
        self.lowest = lowest
        self.highest = highest

    def update(self, entropy: float) -> float:
        """clip(coefficient + step_size * sign(target - entropy)) from here on."""
        _check_finite("entropy", entropy)
        direction = (self.target_entropy > entropy) - (self.target_entropy < entropy)
        moved = self.coefficient + self.step_size * direction
        self.coefficient = min(max(moved, self.lowest), self.highest)
        return self.coefficient

    def state_dict(self) -> dict[str, float]:
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]


class EntropyBreak:
    """A coefficient that becomes 0 for good where the entropy breaks out (SFPO, arXiv:2510.04072).

    The entropy of a step, in nats a token, is compared with the `window` steps before it: at
    `threshold` standard deviations from their mean or beyond, the coefficient is 0 from then on.
    """

    def __init__(self, coefficient: float, *, window: int = 10, threshold: float = 2.0) -> None:
        if window < 2 or not threshold > 0:
            raise ValueError(
                f"expected a window of 2 steps or more and a threshold above 0, got {window} and "
                f"{threshold}"
            )
        self.coefficient = coefficient
        self.window = window
        self.threshold = threshold
        self.entropies: list[float] = []

    def update(self, entropy: float) -> float:
        """The coefficient from here on."""
        _check_finite("entropy", entropy)
        if len(self.entropies) == self.window:
            past = torch.tensor(self.entropies, dtype=torch.float64)
            if abs(entropy - float(past.mean())) >= self.threshold * float(past.std()):
                self.coefficient = 0.0
        self.entropies = [*self.entropies, entropy][-self.window :]
        return self.coefficient

    def state_dict(self) -> dict[str, float]:
        past = {str(index): entropy for index, entropy in enumerate(self.entropies)}
        return {"coefficient": self.coefficient, **past}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.coefficient = state["coefficient"]
        self.entropies = [state[str(index)] for index in range(len(state) - 1)]


class RunningRewards:
    """Mean and standard deviation of all rewards so far, to bring them to one scale
    (PPO-max, arXiv:2307.04964).

    Call update with the rewards of a step, then scaled or standardised with the same rewards:
    a step's own rewards count. Until two rewards differ the standard deviation is 1.
    """

    def __init__(self) -> None:
        self.count = torch.zeros((), dtype=torch.float64)
        self.mean = torch.zeros((), dtype=torch.float64)
        self.squared_deviations = torch.zeros((), dtype=torch.float64)

    def update(self, rewards: Tensor) -> None:
        """Add (B,) rewards to the statistics."""
        if rewards.numel() == 0:
            return
        if not torch.isfinite(rewards).all():
            raise ValueError("expected finite rewards for running statistics; mend the reward")
        rewards = rewards.double().to(self.mean.device)
        count = self.count + rewards.numel()
        shift = rewards.mean() - self.mean
        within = (rewards - rewards.mean()).square().sum()
        between = shift.square() * self.count * rewards.numel() / count
        self.squared_deviations = self.squared_deviations + within + between
        self.mean = self.mean + shift * rewards.numel() / count
        self.count = count

    @property
    def std(self) -> Tensor:
        """() sample standard deviation."""
        std = (self.squared_deviations / (self.count - 1).clamp(min=1)).sqrt()
        return torch.where(std > STD_FLOOR, std, 1.0)

    def scaled(self, rewards: Tensor, *, bound: float = 10.0) -> Tensor:
        """(B,) rewards / std, clipped to +-bound; the mean stays, advantages remove it anyway."""
        return (rewards / self.std.to(rewards)).clamp(-bound, bound)

    def standardised(self, rewards: Tensor, *, bound: float = 10.0) -> Tensor:
        """(B,) (rewards - mean) / std, clipped to +-bound."""
        return ((rewards - self.mean.to(rewards)) / self.std.to(rewards)).clamp(-bound, bound)

    def state_dict(self) -> dict[str, Tensor]:
        return {
            "count": self.count,
            "mean": self.mean,
            "squared_deviations": self.squared_deviations,
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.count = state["count"]
        self.mean = state["mean"]
        self.squared_deviations = state["squared_deviations"]


def _check_finite(name: str, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(
            f"expected a finite {name} to steer by, got {value}; look for the step that made it so"
        )
