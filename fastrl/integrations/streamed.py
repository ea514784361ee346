"""A model whose weights stay on the CPU and visit the device layer by layer.

While one layer computes, the weights of the next are on their way. At most two layers are on the
device; the embedding is looked up on the CPU, the head comes when it is asked for.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastrl.errors import InputError
from fastrl.integrations.capabilities import decoder_of
from fastrl.integrations.offload import Transfers


class StreamedLayers:
    """Moves the layers of a decoder in and out, as they are called."""

    def __init__(self, layers: list[nn.Module], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.transfers = Transfers(device)
        self.at_home = [{x: x.data for x in layer.parameters()} for layer in layers]
        self.arrivals: dict[int, Any] = {}
        self.visiting: dict[int, dict[nn.Parameter, Tensor]] = {}
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, i=index: self.enter(i))
            layer.register_forward_hook(lambda *_, i=index: self.leave(i))

    def send(self, index: int) -> None:
        """Begin to copy the weights of a layer to the device."""
        if index in self.visiting or index >= len(self.layers):
            return
        found = {}
        for parameter, home in self.at_home[index].items():
            found[parameter] = torch.empty_like(home, device=self.device)
            self.arrivals[index] = self.transfers.copy(found[parameter], home)
        self.visiting[index] = found

    def enter(self, index: int) -> None:
        """Let a layer compute with its weights on the device; the next one's set out."""
        self.send(index)
        self.transfers.wait(self.arrivals[index])
        for parameter, visitor in self.visiting[index].items():
            parameter.data = visitor
        self.send(index + 1)

    def leave(self, index: int) -> None:
        """Give a layer's memory on the device back."""
        for parameter, home in self.at_home[index].items():
            parameter.data = home
        self.visiting.pop(index, None)


def streamed_copy(model: PreTrainedModel, device: torch.device) -> Any:
    """A frozen copy of the model on the CPU, whose layers compute on `device`."""
    decoder = decoder_of(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise InputError(
            f"model.reference = 'cpu' needs a model with a list of layers, got "
            f"{type(model).__name__}; choose another reference"
        )
    away = [*layers.parameters()]
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        away.extend(end.parameters())
    made = {id(x): _on_cpu(x, pinned=device.type == "cuda") for x in away}
    found = copy.deepcopy(model, made).eval().requires_grad_(False)
    StreamedLayers(list(decoder_of(found).layers), device)
    embedding = found.get_input_embeddings().cpu()  # some have a factor beside their weight
    embedding.register_forward_pre_hook(lambda _, inputs: tuple(x.cpu() for x in inputs))
    embedding.register_forward_hook(lambda _, inputs, output: output.to(device))
    return found


def _on_cpu(parameter: nn.Parameter, *, pinned: bool) -> nn.Parameter:
    values = parameter.detach().to("cpu", copy=True)
    return nn.Parameter(values.pin_memory() if pinned else values, requires_grad=False)
