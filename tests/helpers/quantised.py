"""What libraries that are no dependency do to a model's linear layers: quantise them, and put adapters around them."""

import torch
from torch import nn
from torch.utils import _pytree as pytree


class Int8Weight(torch.Tensor):
    """A quantised weight, made as torchao makes them: a wrapper around the tensors `qdata` and `scale`."""

    @staticmethod
    def __new__(cls, qdata, scale):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype, device=qdata.device)

    def __init__(self, qdata, scale):
        self.qdata, self.scale = qdata, scale

    @classmethod
    def quantised(cls, weight):
        scale = weight.abs().amax() / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self):
        return ["qdata", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return cls(args[0].qdata, args[0].scale)
        args, kwargs = pytree.tree_map_only(cls, lambda w: w.qdata * w.scale, (args, kwargs or {}))
        return function(*args, **kwargs)


def quantise_linear_layers(model):
    """Like torchao's `quantize_`."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8Weight.quantised(module.weight.detach()), requires_grad=False)


class LoraLinear(nn.Module):
    """A linear layer inside a fresh low-rank adapter, which changes nothing yet."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapt_linear_layers(model):
    """Like PEFT with `target_modules="all-linear"`."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, LoraLinear(child))
