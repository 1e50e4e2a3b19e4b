"""A frozen linear layer and its adapter as one step of autograd's graph.

PEFT computes `base(x) + B(A(x)) * scaling` layer by layer: the adapter's output is written, scaled into another tensor
and added into a third, and so again on the way back; where the base is not in fp32, x is copied into the adapter's type
and back for each layer that reads it, and each keeps its copy until the backward pass. Here products are added where
the sum lies, and x is kept as it came, one tensor for query, key and value. The sums are PEFT's in another order; what
is saved, merged or switched off is PEFT's own.

Only what is plain is taken over: nn.Linear under one adapter without dropout, DoRA and biases of its own. The rest
stays with PEFT, as does a layer that torch.compile sees, which fuses by itself, and one whose weights ZeRO-3 has cut
up: these are gathered around the calls of modules, and here A and B are read without being called.

Shapes: N positions, I inputs, O outputs, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


def fuse(model: PeftModel) -> int:
    """Takes over the layers that are plain; returns their number."""
    plain = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    for layer in plain:
        layer.__class__ = FusedLinear
    return len(plain)


def _is_plain(layer: Linear) -> bool:
    (name, *others) = layer.active_adapters
    base = layer.get_base_layer()
    return (
        not others
        and type(base) is nn.Linear
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and layer.lora_B[name].bias is None
    )


class FusedLinear(Linear):  # type: ignore[misc]  # PEFT's classes are untyped
    """PEFT's layer in all but how it is computed. By class and not by a function on the instance, which a deep copy of
    the model would share with the original."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.merged or self.disable_adapters or args or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        base = self.get_base_layer()
        output: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]  # torch
            x.to(base.weight.dtype),
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            self.scaling[name],
        )
        return output


class _LoraLinear(torch.autograd.Function):
    """x W' + b + scaling x A' B'. A and B, in fp32, are rounded to the type of x for each product."""

    @staticmethod
    def forward(  # noqa: PLR0917 (apply takes no names)
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x_NI = x.flatten(0, -2)
            inner_NR = x_NI @ a_RI.to(x.dtype).T
            output_NO = F.linear(x_NI, weight_OI, bias_O).addmm_(inner_NR, b_OR.to(x.dtype).T, alpha=scaling)
        ctx.save_for_backward(x, weight_OI, a_RI, b_OR, inner_NR)
        ctx.scaling = scaling
        return output_NO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, a_RI, b_OR, inner_NR = ctx.saved_tensors
        x_NI, gradient_NO = x.flatten(0, -2), gradient.flatten(0, -2)
        inner_gradient_NR = (gradient_NO @ b_OR.to(x.dtype)).mul_(ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x_NI = (gradient_NO @ weight_OI).addmm_(inner_gradient_NR, a_RI.to(x.dtype))
            of_x = of_x_NI.view(x.shape)
        of_a_RI = (inner_gradient_NR.T @ x_NI).to(a_RI.dtype)
        of_b_OR = (gradient_NO.T @ inner_NR).to(b_OR.dtype).mul_(ctx.scaling)
        return of_x, None, None, of_a_RI, of_b_OR, None
