"""AdamW in few bytes: float32 arithmetic, whatever weights and moments are kept in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastrl.errors import InputError
from fastrl.optim.moments import STORES, MomentStore, Store, spans_of
from fastrl.seeding import derive_seed
from fastrl_kernels.adamw import Keys, Rates, adamw_step
from fastrl_kernels.adamw.blockwise import BLOCK_SIZE

WeightStore = Literal["float32", "split", "stochastic"]
CHUNK_SIZES = {"cpu": 1 << 17, "cuda": 1 << 22}
"""Elements at a time: what fits into a CPU's caches, and hides the latency of a GPU."""
SMALL = 4096
"""Parameters with fewer elements have float32 moments: they are a thousandth of a model."""


class LeanAdamW(torch.optim.Optimizer):
    """AdamW that goes over each parameter in chunks, with a bounded amount of scratch memory.

    weights: what happens to bfloat16 parameters. "split" keeps the 16 bits that they lack to
    float32 beside them, and trains as float32 would, to the bit; "stochastic" rounds by chance;
    "float32" has none. float32 parameters are stepped as they are in all three.
    moments: "float32"; "8bit", see `fastrl_kernels.adamw.blockwise`; "cpu", in float32, brought
    to the parameter's device chunk by chunk.

    Chances are functions of (seed, step, parameter, element), so a resumed run draws the same.
    Options are those of this object, also after `load_state_dict`, which restores the state alone.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], *, lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        weights: WeightStore = "float32", moments: MomentStore = "float32", seed: int = 0,
        chunk_size: int | None = None,
    ) -> None:  # fmt: skip
        self.weights = weights
        self.moments = moments
        self.seed = seed
        self.chunk_size = chunk_size
        self._index: dict[Tensor, int] = {}
        self._group_of: dict[Tensor, dict[str, Any]] = {}
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameters with options of their own; bfloat16 ones need a store for their lost bits."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            _check(parameter, self.weights)
            self._index[parameter] = len(self._index)
            self._group_of[parameter] = group

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        assert closure is None, "the loss is computed before the step"
        for parameter in self._index:
            if parameter.grad is not None:
                self.step_parameter(parameter)

    @torch.no_grad()
    def step_parameter(self, parameter: Tensor, *, scale: float = 1.0) -> None:
        """Step one parameter by its gradient times `scale`, which leaves `.grad` as it is."""
        assert parameter.grad is not None
        assert (self.chunk_size or 0) % BLOCK_SIZE == 0, "chunks are whole blocks"
        store, state = self._state_of(parameter)
        state["step"] += 1
        group, step = self._group_of[parameter], state["step"]
        beta1, beta2 = group["betas"]
        rates = Rates(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], step)
        labels = ("optimizer", self._index[parameter], step)
        keys = Keys(*(derive_seed(self.seed, name, *labels) for name in ("moments", "weights")))
        weights = parameter.detach().view(-1)
        gradients = parameter.grad.view(-1)
        remainders = state.get("remainders")
        device = parameter.device
        spans = spans_of(len(weights), self.chunk_size or CHUNK_SIZES[device.type])
        for span, moments in store.walk(state, spans, device):
            adamw_step(
                weights[span], gradients[span], moments, rates,
                scale=scale, remainders=None if remainders is None else remainders[span],
                start=span.start, keys=keys,
            )  # fmt: skip
        increment_version(parameter)  # which a kernel does not

    def reserve(self, parameters: Iterable[Tensor]) -> None:
        """Have the state of parameters, or leave all as it was.

        So that memory runs out before a weight has moved, not between two of them.
        """
        new = [parameter for parameter in parameters if not self.state.get(parameter)]
        try:
            for parameter in new:
                self._state_of(parameter)
        except BaseException:
            for parameter in new:
                self.state.pop(parameter, None)
            raise

    def _state_of(self, parameter: Tensor) -> tuple[Store, dict[str, Any]]:
        kind = "float32" if parameter.numel() < SMALL and self.moments == "8bit" else self.moments
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state.update(STORES[kind].start(parameter.numel(), parameter.device))
            if parameter.dtype == torch.bfloat16 and self.weights == "split":
                shape, device = parameter.numel(), parameter.device
                state["remainders"] = torch.zeros(shape, dtype=torch.int16, device=device)
        return STORES[kind], state

    def __getstate__(self) -> dict[str, Any]:
        """For copies: torch's own leaves out what this class adds."""
        names = ("weights", "moments", "seed", "chunk_size", "_index", "_group_of")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def state_dict(self) -> dict[str, Any]:
        """As torch's, once whatever is still on its way to the CPU has arrived."""
        if self.moments == "cpu" and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, bit by bit, of an optimizer over parameters of the same shapes.

        torch's own would cast float32 moments to the dtype of a bfloat16 parameter.
        """
        saved = [len(group["params"]) for group in state_dict["param_groups"]]
        own = [len(group["params"]) for group in self.param_groups]
        if saved != own:
            raise ValueError(f"expected groups of {own} parameters, got {saved}")
        self.state.clear()
        parameters = list(self._index)
        for index, values in state_dict["state"].items():
            _, state = self._state_of(parameters[index])
            wrong = set(values) ^ set(state) or {
                name
                for name, value in state.items()
                if isinstance(value, Tensor) and _kind(value) != _kind(values[name])
            }
            if wrong:
                raise ValueError(
                    f"parameter {index}: {', '.join(sorted(wrong))} of the saved state do not fit "
                    f"{self.moments} moments of {self.weights} weights"
                )
            for name, value in values.items():
                if isinstance(value, Tensor):
                    state[name].copy_(value)
                else:
                    state[name] = value


def _kind(value: Tensor) -> tuple[torch.dtype, torch.Size]:
    return value.dtype, value.shape


def _check(parameter: Tensor, weights: WeightStore) -> None:
    """Refuse what would be trained wrongly or not at all."""
    if not parameter.is_contiguous():
        raise InputError(
            f"the optimizer needs contiguous parameters, got one of shape {tuple(parameter.shape)} "
            f"and strides {parameter.stride()}; call .contiguous() on it"
        )
    if parameter.dtype == torch.float32 or (
        parameter.dtype == torch.bfloat16 and weights != "float32"
    ):
        return
    raise InputError(
        f"a parameter of {parameter.dtype} loses small updates; load the weights in float32, or in "
        f"bfloat16 with model.precision split or stochastic"
    )
