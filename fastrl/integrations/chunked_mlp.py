"""MLPs that look at a few tokens at a time: what they keep no longer grows with the pass.

Legend: N packed tokens, D hidden, I width inside an MLP.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fastrl.errors import InputError
from fastrl.integrations.capabilities import decoder_of


class _Chunked(nn.Module):
    """Runs the forward pass of the class that it is put before on consecutive chunks of tokens."""

    mlp_chunk_size: int

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states (1, N, D). With gradient a chunk is computed again in the backward pass."""
        chunks = hidden_states.split(self.mlp_chunk_size, dim=1)
        if len(chunks) == 1:
            return super().forward(hidden_states)
        if not torch.is_grad_enabled():
            return torch.cat([super(_Chunked, self).forward(chunk) for chunk in chunks], dim=1)
        run = super().forward
        return torch.cat([checkpoint(run, chunk, use_reentrant=False) for chunk in chunks], dim=1)


def chunk_mlps(model: PreTrainedModel, num_tokens: int) -> None:
    """Let the MLP of every layer look at `num_tokens` tokens at a time, from now on.

    An MLP keeps about 4 I values of a token until backward; in chunks it keeps its input, and 4 I
    of the tokens of one chunk while that is worked on, for one more forward pass of the MLP. Sums
    over tokens, in the gradients of weights, are taken chunk by chunk and so rounded otherwise.
    """
    mlps = mlps_of(model)
    for mlp in mlps:
        kind: Any = type(mlp)
        mlp.__class__ = _chunked_class(kind)
        mlp.mlp_chunk_size = num_tokens


def mlps_of(model: PreTrainedModel) -> list[Any]:
    """The MLP of every layer, each a function of single tokens; InputError for other models."""
    decoder, name = decoder_of(model), type(model).__name__
    found = [
        module.mlp
        for module in decoder.modules()
        if hasattr(module, "gradient_checkpointing") and isinstance(
            getattr(module, "mlp", None), nn.Module
        )
    ]  # fmt: skip
    if len(found) != decoder.config.num_hidden_layers:
        raise InputError(
            f"model.mlp_chunk_size needs a layer.mlp in every layer, but {name} has {len(found)} "
            f"in {decoder.config.num_hidden_layers} layers; set it to 0"
        )
    for mlp in found:
        takes = list(inspect.signature(mlp.forward).parameters)
        if hasattr(mlp, "experts") or hasattr(mlp, "router") or len(takes) != 1:
            raise InputError(
                f"model.mlp_chunk_size needs MLPs of single tokens, but {name} has "
                f"{type(mlp).__name__}, which routes tokens to experts or takes more than hidden "
                "states; set it to 0"
            )
    return found


@functools.cache
def _chunked_class(kind: type) -> type:
    return type(f"Chunked{kind.__name__}", (_Chunked, kind), {})
