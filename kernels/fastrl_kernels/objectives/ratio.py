"""What objectives share: the ratio of two policies, safe from overflow, and bounds."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl

    kernel_function = triton.jit
except ImportError:  # triton has no build for this platform; the torch binding needs none

    def kernel_function(function):
        """Nothing to do where there are no kernels."""
        return function

    tl = torch


@kernel_function
def clip(value, low, high):
    """The value within [low, high]."""
    return tl.where(value > high, high, tl.where(value < low, low, value))


@kernel_function
def clamped_log_ratio(log_ratio):
    """The log-ratio clamped to +-20, and whether it was outside, where it has no slope."""
    outside = (log_ratio < -20.0) | (log_ratio > 20.0)
    return clip(log_ratio, -20.0, 20.0), outside


@kernel_function
def clamped_ratio(log_ratio):
    """exp(log_ratio clamped to +-20), and its derivative: the ratio itself, 0 outside."""
    clamped, outside = clamped_log_ratio(log_ratio)
    ratio = tl.exp(clamped)
    return ratio, tl.where(outside, 0.0, ratio)
