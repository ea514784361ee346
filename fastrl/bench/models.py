"""The model of a request, as the trainer would have it: real, or counted on fake tensors."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastrl.adapters import with_adapter
from fastrl.bench.request import Request
from fastrl.errors import InputError
from fastrl.integrations.bare_models import bare_model, model_config
from fastrl.integrations.capabilities import without_wrappers
from fastrl.integrations.liger import use_liger_kernel
from fastrl.policy import Policy, train_tokenizer
from fastrl.precision import frozen_dtype, store_weights, trained_dtype


class Blueprint(NamedTuple):
    """What a model is made of, without its memory."""

    config: Any  # of transformers
    model: Any  # of fake tensors
    mode: FakeTensorMode
    num_parameters: int
    num_trained: int
    products: tuple[tuple[int, int, bool], ...]
    """Shape of every matrix that tokens are multiplied with in the layers; is it trained?"""
    trains_head: bool
    has_experts: bool
    can_run: bool
    """Whether a forward pass of fake tensors tells what autograd keeps."""

    @property
    def weight_bytes(self) -> int:
        """Of all parameters."""
        return sum(x.numel() * x.dtype.itemsize for x in self.model.parameters())

    @property
    def gradient_bytes(self) -> int:
        """Of those that are trained."""
        trained = (x for x in self.model.parameters() if x.requires_grad)
        return sum(x.numel() * x.dtype.itemsize for x in trained)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def hidden_size(self) -> int:
        """Width of the head's input."""
        return int(self.config.get_text_config().hidden_size)


def draw_blueprint(request: Request) -> Blueprint:
    """Of the model with its adapter; takes a second or two and no memory, whatever its size."""
    config = model_config(request.architecture)
    mode = FakeTensorMode()
    is_adapted = bool(request.config.model.lora)
    # peft moves its weights, which fake tensors do not take; those on "meta" cannot run.
    with torch.device("meta") if is_adapted else mode, quiet():
        model = _assembled(request, config, is_fake=True)
    text: Any = without_wrappers(model)
    head = text.get_output_embeddings().weight
    apart = {id(x.weight) for x in text.modules() if isinstance(x, nn.Embedding)} | {id(head)}
    matrices = [x for x in model.parameters() if x.dim() == 2 and id(x) not in apart]
    has_experts = any("expert" in name for name, _ in text.named_modules())
    return Blueprint(
        config,
        model,
        mode,
        num_parameters=sum(x.numel() for x in model.parameters()),
        num_trained=sum(x.numel() for x in model.parameters() if x.requires_grad),
        products=tuple((x.shape[0], x.shape[1], x.requires_grad) for x in matrices),
        trains_head=head.requires_grad,
        has_experts=has_experts,
        can_run=not has_experts and not is_adapted,
    )


def load_model(request: Request, device: torch.device) -> Policy:
    """The policy of the request on its device, training."""
    with quiet():
        model = _assembled(request, model_config(request.architecture), is_fake=False)
    settings = request.config.model
    return Policy(
        model.to(device).train(),
        train_tokenizer(["0"], vocab_size=258),  # random tokens are never read
        bf16=settings.precision == "autocast",
        cast_lm_head_to_fp32=settings.cast_lm_head_to_fp32,
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of libraries about names that they will change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _assembled(request: Request, config: Any, *, is_fake: bool) -> Any:
    settings = request.config.model
    trained, frozen = trained_dtype(settings.precision), frozen_dtype(settings.precision)
    model = bare_model(
        config, None if is_fake else request.directory, seed=request.config.seed,
        dtype=frozen if settings.lora else trained,
    )  # fmt: skip
    if model.get_output_embeddings() is None:
        raise InputError(f"{type(model).__name__} has no head to make logits with")
    if settings.use_liger_kernel and not is_fake:
        use_liger_kernel(model)
    if settings.lora:
        model = with_adapter(model.requires_grad_(False), settings.lora, seed=request.config.seed)
    store_weights(model, trained=trained, frozen=frozen)
    return model.train()
