"""Drop-in parts for reinforcement learning of language models; needs torch and nothing else."""

from fastrl_kernels.cross_entropy_modules import CrossEntropyOutput, FusedLinearCrossEntropyLoss
from fastrl_kernels.decode_attention import decode_attention
from fastrl_kernels.grpo_modules import FusedLinearGRPOLoss
from fastrl_kernels.head import LMHead
from fastrl_kernels.linear_logps import LinearLogps, linear_logps
from fastrl_kernels.modules import FusedLinearLogps, FusedLinearPolicyLoss
from fastrl_kernels.plan import Plan, explain
from fastrl_kernels.policy_loss import PolicyLoss, policy_loss
from fastrl_kernels.preference_modules import (
    FusedLinearCPOLoss,
    FusedLinearDPOLoss,
    FusedLinearKTOLoss,
    FusedLinearORPOLoss,
    FusedLinearSimPOLoss,
)
from fastrl_kernels.segment_attention import segment_attention
from fastrl_kernels.segments import Segments, make_segments
from fastrl_kernels.selected_logps import selected_logps
from fastrl_kernels.token_loss import TokenLoss, token_loss
from fastrl_kernels.token_selection import select_tokens

__all__ = [
    "CrossEntropyOutput",
    "FusedLinearCPOLoss",
    "FusedLinearCrossEntropyLoss",
    "FusedLinearDPOLoss",
    "FusedLinearGRPOLoss",
    "FusedLinearKTOLoss",
    "FusedLinearLogps",
    "FusedLinearORPOLoss",
    "FusedLinearPolicyLoss",
    "FusedLinearSimPOLoss",
    "LMHead",
    "LinearLogps",
    "Plan",
    "PolicyLoss",
    "Segments",
    "TokenLoss",
    "decode_attention",
    "explain",
    "linear_logps",
    "make_segments",
    "policy_loss",
    "segment_attention",
    "select_tokens",
    "selected_logps",
    "token_loss",
]
