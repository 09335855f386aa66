"""What the PPO scripts on Isaac Lab's own tasks build policies from: layers, statistics, distributions of actions."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import Ranks, merge_moments, seeded_generator
from stock_tasks import Spaces, save_policy


class Policy(nn.Module):
    """Gaussian or categorical actions with independent components; networks and `log_std` (C,) are the subclass's.

    The parameters (..., P) of the distribution are the mean, or the log-probabilities of all components side by side.
    """

    log_std: nn.Parameter

    def __init__(self, spaces: Spaces, args: Any, kept: tuple[str, ...]):
        """
        Args:
            spaces: what the networks read and write.
            args: a script's; read are task and mixed_precision.
            kept: names of arguments that a checkpoint keeps.
        """
        super().__init__()
        self.spaces, self.args, self.kept = spaces, args, kept

    def save(self, folder: Path) -> None:
        save_policy(self, folder, self.args, self.kept, self.spaces)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.log_std.device.type, torch.bfloat16, self.args.mixed_precision)

    def distribution(self, out: Tensor) -> Tensor:
        """Parameters (..., P) from a network's outputs (..., P)."""
        if self.spaces.choices:
            return torch.cat([part.log_softmax(-1) for part in out.split(self.spaces.choices, -1)], -1)
        return out

    def noise(self, steps: int, n: int, ranks: Ranks, *seeds: int) -> Tensor:
        """(T, N, P) standard normal or Gumbel numbers; every rank draws all columns and keeps its own."""
        x = torch.empty(steps, n * ranks.world, self.spaces.outputs, device=self.log_std.device)
        generator = seeded_generator(x.device, *seeds)
        x = -x.exponential_(generator=generator).log() if self.spaces.choices else x.normal_(generator=generator)
        return x[:, ranks.rank * n : (ranks.rank + 1) * n]

    def sample(self, params: Tensor, noise: Tensor | None) -> Tensor:
        """Actions (N, C), drawn with noise (N, P), or the most likely ones for None."""
        if self.spaces.choices:  # the largest of log-probability plus Gumbel noise is a sample
            scores = params if noise is None else params + noise
            return torch.stack([s.argmax(-1) for s in scores.split(self.spaces.choices, -1)], -1)
        return params if noise is None else torch.addcmul(params, noise, self.log_std.exp())

    def log_prob(self, params: Tensor, action: Tensor) -> Tensor:
        """Log-probability of actions (..., C), summed over the independent components: (...,)."""
        if self.spaces.choices:
            parts = zip(params.split(self.spaces.choices, -1), action.long().split(1, -1))
            return sum(p.gather(-1, a).squeeze(-1) for p, a in parts)
        z = (action - params) * torch.exp(-self.log_std)
        return -0.5 * z.square().sum(-1) - (self.log_std.sum() + 0.5 * math.log(2 * math.pi) * len(self.log_std))

    def entropy(self, params: Tensor) -> Tensor:
        """Entropy, summed over components: (...,)."""
        if self.spaces.choices:
            return -(params.exp() * params).sum(-1)
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(params.shape[:-1])

    def kl(self, old: Tensor, old_log_std: Tensor, new: Tensor) -> Tensor:
        """KL(old | new) in closed form: (...,)."""
        if self.spaces.choices:
            return (old.exp() * (old - new)).sum(-1)
        change = self.log_std - old_log_std  # (C,)
        fixed = (change + 0.5 * torch.exp(-2 * change) - 0.5).sum()
        return fixed + 0.5 * ((new - old) * torch.exp(-self.log_std)).square().sum(-1)


class Network(nn.Module):
    """A multi-layer perceptron, behind an LSTM with --recurrent; with --init orthogonal, biases are zero."""

    def __init__(self, shape: tuple[int, ...], outputs: int, gain: float, args: Any):
        """
        Args:
            shape: of an observation; (d,) for an LSTM.
            gain: of the last layer's orthogonal weights; other layers have sqrt(2), the LSTM 1.
            args: a script's; read are hidden, activation, init, recurrent and lstm_size.
        """
        super().__init__()
        self.lstm = nn.LSTMCell(*shape, args.lstm_size) if args.recurrent else None
        sizes, layers = [args.lstm_size if args.recurrent else math.prod(shape), *args.hidden], []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), {"elu": Elu, "tanh": nn.Tanh, "relu": nn.ReLU}[args.activation]()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))
        for name, p in self.named_parameters() if args.init == "orthogonal" else ():
            last = name.startswith(f"layers.{len(layers)}.")
            std = gain if last else 1.0 if name.startswith("lstm") else math.sqrt(2)
            nn.init.orthogonal_(p, std) if "weight" in name else nn.init.zeros_(p)

    def forward(
        self, x: Tensor, state: Tensor | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Outputs for each step, and the LSTM's states after it.

        Args:
            x: (T, N, d); any leading dimensions without an LSTM.
            state: (2, N, H) hidden and cell state before the first step.
            starts: (T, N) whether a step is the first of an episode, which sees a zero state.

        Returns:
            (T, N, outputs) in fp32, (T, 2, N, H) or None.
        """
        if self.lstm is None:
            return self.layers(x).float(), None
        states, keep = [], (~starts).to(x.dtype)[:, None, :, None]  # (T, 1, N, 1)
        for t in range(len(x)):
            state = torch.stack(self.lstm(x[t], tuple(state * keep[t])))
            states.append(state)
        states = torch.stack(states)
        return self.layers(states[:, 0]).float(), states


class Elu(nn.Module):
    """ELU. On CPUs torch's own takes expm1, which is 3 (AVX2) to 24 (AVX-512) times slower than this one's exp."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return EluFromExp.apply(x)
        return nn.functional.elu(x)


class EluFromExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = torch.maximum(x, x.clamp(max=0).exp_().sub_(1))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y.clamp(max=0).add_(1).mul_(grad)


class RunningNorm(nn.Module):
    """Normalises by running mean and std; 0.01 is added to the std, so that a constant column is not blown up."""

    def __init__(self, size: int, clip: float):
        super().__init__()
        self.clip = clip
        self.register_buffer("moments", torch.zeros(3, size, dtype=torch.float64))
        self.register_buffer("shift", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.shift) * self.scale).clamp(-self.clip, self.clip)

    def update(self, rows: Tensor, ranks: Ranks) -> None:
        """Takes rows (..., size) of all ranks into the statistics."""
        self.moments = merge_moments(self.moments, rows, ranks)
        self.shift.copy_(self.moments[1])
        self.scale.copy_(1 / ((self.moments[2] / self.moments[0]).sqrt() + 0.01))


def flat_parameter(module: nn.Module) -> nn.Parameter:
    """All parameters of a module side by side: one small optimizer step, norm and sum over ranks instead of many.

    Returns:
        (P,); the module's own parameters and their gradients become views of it and its gradient.
    """
    parameters = sorted(module.parameters(), key=lambda p: -p.numel())  # small ones last, for the others' alignment
    flat = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    flat.grad = torch.zeros_like(flat)
    nn.utils.vector_to_parameters(flat.data, parameters)
    for p, grad in zip(parameters, flat.grad.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)
    return flat
