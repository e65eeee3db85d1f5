"""How far a converted model is from its original on a text: loss and every gradient, in float64 and in bf16.

Transformers' norms and losses compute in float32 whatever the dtype of the model; ``keep_float64`` lets them keep float64, so
that what is left there is the conversion and no rounding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel


class keep_float64(TorchFunctionMode):
    """While active, no float64 tensor is rounded to float32 by ``to``, ``float``, ``softmax`` or ``sum``."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if argument is torch.float32 else argument for argument in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class Difference(NamedTuple):
    """What one dtype shows."""

    dtype: str
    original: float
    """Loss of the original, nats per token."""
    converted: float
    gradient: float
    """The largest |difference| of a gradient, relative to the largest |gradient| of its parameter; the worst parameter's."""

    @property
    def loss(self) -> float:
        return abs(self.converted - self.original)

    def as_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "loss_difference": self.loss}


def _loss_and_gradients(model: PreTrainedModel, tokens: Tensor, names: list[str]) -> tuple[float, dict[str, Tensor]]:
    parameters = dict(model.named_parameters())
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    gradients = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
    found = {name: gradient for name, gradient in zip(names, gradients, strict=True) if gradient is not None}
    return float(loss.detach()), found


def difference(original: PreTrainedModel, converted: PreTrainedModel, tokens: Tensor) -> Difference:
    """Compare the two, which share their parameters, on ``tokens`` [B, T] in the dtype that they have."""
    names = [name for name, parameter in original.named_parameters() if parameter.requires_grad]
    prefix = f"{converted.base_model_prefix}."
    with keep_float64():
        loss, expected = _loss_and_gradients(original, tokens, names)
        got_loss, got = _loss_and_gradients(converted, tokens, [prefix + name for name in names])
    worst = 0.0
    for name, gradient in expected.items():
        largest = float(gradient.abs().max())
        if largest > 0:
            worst = max(worst, float((got[prefix + name] - gradient).abs().max()) / largest)
    return Difference(str(original.dtype).removeprefix("torch."), loss, got_loss, worst)


def table(differences: list[Difference]) -> str:
    """The differences as aligned lines, for people and for the model card."""
    lines = ["dtype     original loss  converted loss  loss differs by  gradients differ by at most (relative)"]
    for each in differences:
        lines.append(
            f"{each.dtype:<9} {each.original:>13.6f}  {each.converted:>14.6f}  {each.loss:>15.1e}  {each.gradient:>15.1e}"
        )
    return "\n".join(lines)
