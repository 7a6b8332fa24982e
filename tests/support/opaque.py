"""An operation that cannot carry tangents."""

import torch


class NoForwardDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


class Opaque(torch.nn.Module):
    def forward(self, x):
        return NoForwardDerivative.apply(x)
