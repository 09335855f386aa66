"""Kernels that every script shares: group advantages, GAE, statistics, logging. Nothing here knows a robot or a network.

`gae` and `group_advantages` have a Triton kernel for CUDA and a torch path for everything else; the device picks.
`Metrics` gathers an iteration's figures on the device. `Run` is the run's folder: provenance, metrics.jsonl, W&B, the
terminal display, curves, GIFs, checkpoints, summary. Heavy imports (torch, triton, wandb, rich, matplotlib, PIL) happen
on first use, so `--help` and refusals are instant.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
log = logging.getLogger("common")
ROOT = Path(__file__).resolve().parent

# ---------------------------------------------------------------- advantages

tl: Any = None  # triton.language, set by _triton(): the kernels below look it up in the module's globals
_named: set[tuple[str, str]] = set()
_no_compiler = False  # a launch has failed


@functools.cache
def _triton() -> dict[str, Any] | None:
    """The jitted kernels by name, or None where Triton is not installed (macOS, Windows)."""
    global tl
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None
    return {"gae": triton.jit(_gae_kernel), "group_advantages": triton.jit(_group_kernel)}


def _kernel(name: str, backend: Backend, tensor: Tensor) -> Any:
    """The Triton kernel to launch, or None for the torch path. Says once per process which one was taken."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"{name}: backend must be auto, torch or triton, not {backend!r}")
    want = backend == "triton" or (backend == "auto" and tensor.is_cuda and tensor.element_size() < 8)
    kernels = _triton() if want else None
    if backend == "triton" and kernels is None:
        raise RuntimeError(f"{name}: backend='triton', but Triton is not installed; use 'auto' or 'torch'")
    kernels = None if backend == "auto" and _no_compiler else kernels
    path = "triton" if kernels else "torch"
    if (name, path) not in _named:
        _named.add((name, path))
        log.info("%s: %s path (%s)", name, path, tensor.device.type)
    return kernels and kernels[name]


def _launched(name: str, backend: Backend, launch: Callable[[], Any]) -> bool:
    """Launches a Triton kernel; False where that fails (it takes a C compiler) and torch may stand in."""
    global _no_compiler
    try:
        launch()
        return True
    except Exception as error:  # subprocess's, Triton's and the driver's own kinds
        if backend == "triton":
            raise
        _no_compiler = True
        log.warning("%s: torch path from now on, Triton does not launch (%s)", name, " ".join(str(error).split())[:200])
        return False


def gae(
    rewards: Tensor,
    values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    final_values: Tensor,
    last_value: Tensor,
    gamma: float,
    lam: float,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation with separate terminations and time-outs.

        delta_t = r_t + gamma * V(s_{t+1}) - V(s_t)
        A_t     = delta_t + gamma * lam * (1 - done_t) * A_{t+1},   returns_t = A_t + V(s_t)

    Schulman et al. 2016, eq. 11, 12 and 16 (arXiv:1506.02438). V(s_{t+1}) is 0 where `terminated`, `final_values` where
    only `truncated` (Pardo et al. 2018, arXiv:1712.00378), else `values[t+1]`, or `last_value` after the last step.
    With both flags set, termination wins. Either flag ends the episode, so nothing leaks across a reset.

    Args:
        rewards, values: (T, N), time-major; `values[t]` = V(s_t).
        terminated, truncated: (T, N), bool or 0/1 numbers; whether step t ended the episode, and how.
        final_values: (T, N), V of the true final observation (before the reset); read only where `truncated`.
        last_value: (N,), V of the state after the last step; read only where that step did not end the episode.
        gamma: discount of one row. A row that executes a chunk of k actions takes gamma**k.
        lam: 0 = one-step TD, 1 = Monte Carlo.
        backend: "auto" is Triton on CUDA and torch elsewhere.
    Returns:
        advantages, returns: (T, N), float32, detached (float64 in, float64 out on the torch path).
    Raises:
        ValueError: shapes differ, or T = 0. RuntimeError: backend="triton" without Triton.
    """
    import torch

    if rewards.ndim != 2 or 0 in rewards.shape:
        raise ValueError(f"gae: rewards must be (T, N) with T, N >= 1, not {tuple(rewards.shape)}")
    T, N = rewards.shape
    for name, x in dict(values=values, terminated=terminated, truncated=truncated, final_values=final_values).items():
        if x.shape != (T, N):
            raise ValueError(f"gae: {name} is {tuple(x.shape)}, rewards are {(T, N)}")
    if last_value.shape != (N,):
        raise ValueError(f"gae: last_value is {tuple(last_value.shape)}, expected {(N,)}")

    kernel = _kernel("gae", backend, values)
    dtype = torch.float64 if values.dtype == torch.float64 and kernel is None else torch.float32
    with torch.no_grad():
        rewards, values, final_values, last_value = (x.to(dtype) for x in (rewards, values, final_values, last_value))
        terminated, truncated = terminated.bool(), truncated.bool()
        if kernel is not None:
            inputs = [x.contiguous() for x in (rewards, values, terminated, truncated, final_values, last_value)]
            advantages, returns = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])  # (T, N)
            block = 128  # 4096 envs are 32 programs: small blocks spread the lanes over more SMs
            with torch.cuda.device_of(advantages):
                launch = kernel[((N + block - 1) // block,)]
                launch = partial(launch, *inputs, advantages, returns, float(gamma), float(lam), N, T=T, BLOCK=block)
                if _launched("gae", backend, launch):
                    return advantages, returns

        next_values = torch.cat([values[1:], last_value[None]])  # (T, N)
        next_values = torch.where(truncated, final_values, next_values).masked_fill_(terminated, 0.0)
        advantages = next_values.mul_(gamma).add_(rewards).sub_(values)  # the deltas, all at once, without temporaries
        decay = (terminated | truncated).logical_not_().to(dtype).mul_(gamma * lam)  # (T, N)
        for t in range(T - 2, -1, -1):  # in place: the only sequential part is one fused multiply-add a step
            advantages[t].addcmul_(decay[t], advantages[t + 1])
        return advantages, advantages + values


def _gae_kernel(
    rewards, values, terminated, truncated, final_values, last_value, advantages, returns, gamma, lam, N,
    T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One lane per env, sequential in T: neighbouring lanes read neighbouring addresses of the time-major buffers."""
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < N
    next_value = tl.load(last_value + lane, mask=inside, other=0.0)
    advantage = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.range(0, T, loop_unroll_factor=8):  # loads overlap; all 96 unrolled compile a minute
        at = (T - 1 - i) * N + lane
        value = tl.load(values + at, mask=inside, other=0.0)
        term = tl.load(terminated + at, mask=inside, other=0) != 0
        trunc = tl.load(truncated + at, mask=inside, other=0) != 0
        next_value = tl.where(trunc, tl.load(final_values + at, mask=inside, other=0.0), next_value)
        next_value = tl.where(term, 0.0, next_value)
        delta = tl.load(rewards + at, mask=inside, other=0.0) + gamma * next_value - value
        advantage = delta + gamma * lam * tl.where(term | trunc, 0.0, advantage)
        tl.store(advantages + at, advantage, mask=inside)
        tl.store(returns + at, advantage + value, mask=inside)
        next_value = value


def group_advantages(
    returns: Tensor,
    group_size: int,
    valid: Tensor | None = None,
    normalize_std: bool = False,
    eps: float = 1e-4,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """GRPO's group-relative advantage: R_i - mean(R of the group), optionally divided by (std of the group + eps).

    Shao et al. 2024, sec. 4.1.2 (arXiv:2402.03300). Without the division it is Dr. GRPO (Liu et al. 2025,
    arXiv:2503.20783), the default here: dividing inflates groups that are nearly all success or all failure.
    The std is the population's (divided by n, not n - 1): a group is the whole set that is compared, and with 0/1
    returns and success rate p the advantages of a group are then exactly +-sqrt((1-p)/p) and its inverse (eps = 0).

    Args:
        returns: (N,), members of a group adjacent: group g is `returns[g * group_size : (g + 1) * group_size]`.
        group_size: members per group; divides N.
        valid: (N,) bool or 0/1; members that count (None: all). What stands in the others is never read, NaN included.
        eps: added to the std; in the units of the returns.
    Returns:
        advantages: (N,) float32, exactly 0 where `keep` is False.
        keep: (N,) bool, False for invalid members and for groups that carry no gradient: fewer than two valid
            members, or all valid returns equal (max == min: a std threshold would depend on rounding).
    Raises:
        ValueError: wrong shapes. RuntimeError: backend="triton" without Triton.
    """
    import torch

    if returns.ndim != 1 or returns.numel() == 0 or group_size < 1 or returns.numel() % group_size:
        raise ValueError(f"group_advantages: returns {tuple(returns.shape)} do not split into groups of {group_size}")
    if valid is not None and valid.shape != returns.shape:
        raise ValueError(f"group_advantages: valid is {tuple(valid.shape)}, returns are {tuple(returns.shape)}")
    kernel = _kernel("group_advantages", backend, returns)
    dtype = torch.float64 if returns.dtype == torch.float64 and kernel is None else torch.float32
    with torch.no_grad():
        grouped = returns.to(dtype).contiguous().view(-1, group_size)  # (groups, G)
        mask = torch.ones_like(grouped, dtype=torch.bool) if valid is None else valid.bool().reshape(grouped.shape)
        if kernel is not None:
            advantages, keep = torch.empty_like(grouped), torch.empty_like(mask)
            block = 1 << (group_size - 1).bit_length()  # Triton wants a power of two
            with torch.cuda.device_of(advantages):
                launch = partial(
                    kernel[(grouped.shape[0],)], grouped, mask.contiguous(), advantages, keep, float(eps),
                    G=group_size, BLOCK=block, NORMALIZE=bool(normalize_std),
                )  # fmt: skip
                if _launched("group_advantages", backend, launch):
                    return advantages.view(-1), keep.view(-1)

        count = mask.sum(1, keepdim=True)  # (groups, 1)
        high = grouped.masked_fill(~mask, -math.inf).amax(1, keepdim=True)
        low = grouped.masked_fill(~mask, math.inf).amin(1, keepdim=True)
        keep = mask & (count >= 2) & (high != low)  # (groups, G)
        mean = grouped.masked_fill(~mask, 0.0).sum(1, keepdim=True) / count.clamp(min=1)
        advantages = (grouped - mean).masked_fill(~mask, 0.0)
        if normalize_std:
            std = (advantages.square().sum(1, keepdim=True) / count.clamp(min=1)).sqrt()
            advantages = advantages / (std + eps)
        return advantages.masked_fill(~keep, 0.0).view(-1), keep.view(-1)


def _group_kernel(
    returns, valid, advantages, keep, eps, G: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    """One program per group."""
    member = tl.arange(0, BLOCK)
    at = tl.program_id(0) * G + member
    inside = member < G
    mask = tl.load(valid + at, mask=inside, other=0) != 0
    value = tl.load(returns + at, mask=inside & mask, other=0.0)
    count = tl.sum(mask.to(tl.float32), axis=0, keep_dims=True)
    high = tl.max(tl.where(mask, value, float("-inf")), axis=0, keep_dims=True)
    low = tl.min(tl.where(mask, value, float("inf")), axis=0, keep_dims=True)
    live = mask & (count >= 2.0) & (high != low)
    size = tl.maximum(count, 1.0)
    advantage = tl.where(mask, value - tl.sum(value, axis=0) / size, 0.0)
    if NORMALIZE:
        advantage = advantage / (tl.sqrt(tl.sum(advantage * advantage, axis=0) / size) + eps)
    tl.store(advantages + at, tl.where(live, advantage, 0.0), mask=inside)
    tl.store(keep + at, live, mask=inside)


class StartBank:
    """Starts to come back to, drawn by what can be learned from them, and how often each instruction succeeds.

    Where p is the chance of success, a group of G episodes less their mean has an expected squared advantage of
    p(1-p)(G-1)/G: to draw in proportion to p(1-p) is to draw by gradient signal (SFL, arXiv 2408.15099). Counts fade, for
    the policy changes; p of an instruction is (s+1)/(n+2), of an entry (s+2q)/(n+2) with q its instruction's.

        fresh = bank.draw(fresh, seed)            # a share of the groups begins from entries instead
        bank.note(states, running)                # once in the rollout, or never: what could become an entry
        bank.record(success, group_size, log)     # counts; better entries take the place of those that teach least

    A rank has entries of its own; instructions are counted over all ranks. Nothing waits for the device.

    Args:
        instructions: of the run.
        groups: that start together on this rank; the bank holds four times as many entries.
        share: of the groups that begin from entries, once there are any.
    """

    FLOOR, FADE = 0.2, 0.9  # share of draws that is uniform; what is left of counts after an iteration

    def __init__(self, instructions: int, groups: int, share: float, device: Any, ranks: Ranks):
        import torch

        self.size, self.replayed, self.ranks, self.device = 4 * groups, int(share * groups), ranks, device
        self.counts = torch.zeros(2, instructions, device=device)  # successes and attempts of fresh starts
        self.entries: TensorDict | None = None  # (size,) states, prompt, successes, attempts, midway
        self.noted: tuple[TensorDict, Tensor] | None = None

    @property
    def chances(self) -> Tensor:
        """p of every instruction, (instructions,)."""
        return (self.counts[0] + 1) / (self.counts[1] + 2)

    def value(self, entries: TensorDict) -> Tensor:
        """p(1-p) of entries (n,); -1 of what was never tried."""
        prior, tried = self.chances[entries["prompt"]], entries["attempts"]
        p = (entries["successes"] + 2 * prior) / (tried + 2)
        return (p * (1 - p)).where(tried > 0, -1.0)

    def weights(self, value: Tensor) -> Tensor:
        """Chances to be drawn (n,), which sum to 1, by `value` (n,), of which those below 0 are left out."""
        there, value = (value >= 0).float(), value.clamp(min=0)
        return (1 - self.FLOOR) * value / value.sum() + self.FLOOR * there / there.sum()

    def asked(self) -> Tensor:
        """Weights of the instructions in fresh starts, (instructions,)."""
        return self.weights(self.chances * (1 - self.chances))

    def draw(self, fresh: TensorDict, seed: int) -> TensorDict:
        """Where groups begin: `fresh` (groups,) states and prompt, entries in the place of the first of them."""
        import torch

        entry = {name: torch.zeros(len(fresh), device=self.device) for name in ("successes", "attempts", "midway")}
        self.begun, self.drawn = fresh.copy().update(entry), torch.arange(0, device=self.device)
        if self.entries is not None:
            chance = self.weights(self.value(self.entries))
            luck = torch.empty_like(chance).exponential_(generator=seeded_generator(self.device, seed))
            self.drawn = (chance / luck).topk(self.replayed).indices  # without replacement
            self.begun = torch.cat([self.entries[self.drawn], self.begun[self.replayed :]])
        return self.begun.exclude(*entry)

    def note(self, states: TensorDict, running: Tensor) -> None:
        """Keeps states (N,) and prompt in mid-episode, of those that are `running` (N,), until the outcome is known."""
        self.noted = states.copy(), running

    def record(self, success: Tensor, group_size: int, log: Metrics) -> None:
        """Counts the outcomes (N,) of the groups that were drawn, and takes in what is worth coming back to."""
        import torch

        won, begun, old = success.float().view(-1, group_size).sum(1), self.begun, len(self.drawn)  # (groups,)
        outcome = torch.stack([won, torch.full_like(won, group_size)])
        new = self.ranks.reduce(torch.zeros_like(self.counts).index_add(1, begun["prompt"][old:], outcome[:, old:]))
        self.counts = self.FADE * self.counts + new
        if self.entries is None:
            self.entries = torch.zeros_like(begun[0]).expand(self.size).clone()
        for name, add in zip(("successes", "attempts"), outcome):
            self.entries[name] = (self.FADE * self.entries[name]).index_add(0, self.drawn, add[:old])
            begun[name] = add
        found = [begun[old:]]
        if self.noted is not None:  # a member's own outcome is the one attempt from where it was
            later, running = self.noted
            later.update({"successes": success.float(), "attempts": running.float(), "midway": running.float()})
            mixed = ((won > 0) & (won < group_size)).repeat_interleave(group_size)
            surprise = self.value(later).where(mixed, -1.0).view(-1, group_size)
            best = surprise.argmax(1)  # of each group the one that teaches most
            rows = torch.arange(len(won), device=self.device) * group_size + best
            found.append(later[rows])
            found[-1]["attempts"] = found[-1]["attempts"] * mixed[rows]
            self.noted = None
        candidates = torch.cat(found)
        gain, worth = self.value(candidates).sort(descending=True)
        least, worst = (x[: len(gain)] for x in self.value(self.entries).sort())
        self.entries[worst] = candidates[worth].where(gain > least, self.entries[worst])
        each = torch.arange(len(self.chances), device=self.device)
        if len(each) > 1:
            log.mean("curriculum/chance", self.chances, by=(each, len(each)))
            drawn = torch.nn.functional.one_hot(begun["prompt"], len(each))  # (groups, instructions)
            log.mean("curriculum/share", drawn, by=(each.expand_as(drawn), len(each)))
        log.mean("curriculum/midway", begun["midway"])

    def state(self) -> dict[str, Any]:
        """What `load` takes, on the host."""
        return {"counts": self.counts.cpu(), "entries": None if self.entries is None else self.entries.cpu().to_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`."""
        from tensordict import TensorDict

        self.counts = state["counts"].to(self.device)
        self.entries = None if state["entries"] is None else TensorDict(state["entries"], self.size).to(self.device)


def merge_moments(moments: Tensor, rows: Tensor, ranks: Ranks) -> Tensor:
    """Running mean and variance of a stream of rows, merged batch by batch (Chan et al. 1983) over all ranks.

    Args:
        moments: (3, d) float64: count, mean, sum of squared deviations; zeros at first.
        rows: (..., d), this rank's share.
    Returns:
        moments: (3, d) float64, the same on every rank.
    """
    import torch

    count, mean, square = moments
    rows = (rows - mean.to(rows.dtype)).reshape(-1, rows.shape[-1])  # small numbers: fp32 sums are exact enough
    sums = torch.stack([torch.full_like(mean, len(rows)), rows.sum(0).double(), rows.square().sum(0).double()])
    new, first, second = ranks.reduce(sums)
    total, delta = count + new, first / new
    spread = second - first * delta + delta.square() * count * new / total
    return torch.stack([total, mean + delta * new / total, square + spread])


def standardize(x: Tensor, moments: Tensor, eps: float = 0.01, clip: float = 10.0) -> Tensor:
    """Rows (..., d) by the mean and std of `merge_moments`, clipped; as they are while nothing was merged.

    `eps` is added to the std, so that a constant column is not blown up.
    """
    import torch

    count, mean, square = moments
    std = torch.where(count > 0, (square / count.clamp(min=1)).sqrt(), 1 - eps)
    return ((x - mean.to(x.dtype)) / (std + eps).to(x.dtype)).clamp(-clip, clip)


def group_moments(x: Tensor, groups: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance of x in each of K groups over all ranks, (K,) each; 0 where a group is empty.

    Sums over masks: `index_add` would add in the order of a GPU's atomics.

    Args:
        x: (...), this rank's share.
        groups: (K, ...) bool, what belongs to each.
    """
    import torch

    n, total = ranks.reduce(torch.stack([y.flatten(1).sum(1) for y in (groups, x * groups)]))  # (K,)
    mean = total / n.clamp(min=1)
    rest = (x - mean.view(-1, *[1] * x.ndim)) * groups  # (K, ...)
    return n, mean, ranks.reduce(rest.square().flatten(1).sum(1)) / n.clamp(min=1)


def normalize_advantages(advantages: Tensor, size: int, ranks: Ranks) -> None:
    """To mean 0 and std 1 over a minibatch of `size` samples on all ranks, in place; 1e-8 is added to the std.

    Args:
        advantages: of any shape, this rank's share.
    """
    import torch

    if ranks.world == 1:
        var, mean = torch.var_mean(advantages, correction=0)
    else:
        mean, square = ranks.reduce(torch.stack([advantages.sum(), advantages.square().sum()])) / size
        var = (square - mean.square()).clamp(min=0)
    advantages.sub_(mean).div_(var.sqrt_().add_(1e-8))


def wilson_interval(successes: float, episodes: float, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate (Wilson 1927), fractions in [0, 1]; z = 1.96 covers 95%.

    Unlike p +- z * SE it stays inside [0, 1] and has width at 0 or n successes. No episodes: (0, 1).
    Raises ValueError unless 0 <= successes <= episodes.
    """
    if not 0 <= successes <= episodes:
        raise ValueError(f"wilson_interval: {successes} successes in {episodes} episodes")
    if episodes == 0:
        return 0.0, 1.0
    p, z2n = successes / episodes, z * z / episodes
    centre = (p + z2n / 2) / (1 + z2n)
    half = z * math.sqrt(p * (1 - p) / episodes + z2n / (4 * episodes)) / (1 + z2n)
    # at 0 and n successes the bound is exact; rounding would leave it 1e-17 off
    return 0.0 if successes == 0 else centre - half, 1.0 if successes == episodes else centre + half


def seeded_generator(device: Any, *seeds: int) -> Any:
    """A torch.Generator of its own for every tuple of seeds."""
    import numpy as np
    import torch

    entropy = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(entropy)


class Noise:
    """Random numbers that do not depend on how environments are split: every rank draws all rows and keeps its own."""

    def __init__(self, device: Any, ranks: Ranks, *seeds: int):
        self.generator = seeded_generator(device, *seeds)
        self.device, self.ranks = device, ranks

    def own(self, x: Tensor) -> Tensor:
        n = len(x) // self.ranks.world
        return x[self.ranks.rank * n : (self.ranks.rank + 1) * n]

    def normal(self, n: int, *shape: int) -> Tensor:
        """(n, *shape) standard normal numbers."""
        import torch

        return self.own(torch.randn(n * self.ranks.world, *shape, generator=self.generator, device=self.device))

    def integers(self, n: int, high: int) -> Tensor:
        """(n,) int64 in [0, high)."""
        import torch

        return self.own(torch.randint(high, (n * self.ranks.world,), generator=self.generator, device=self.device))


# ---------------------------------------------------------------- several processes


MESSAGE = 1 << 26  # numbers that a message of gradients holds at most: 256 MB in fp32


class Ranks(NamedTuple):
    """This process among those of torchrun; 0 of 1 without it."""

    rank: int
    world: int

    @classmethod
    def start(cls, device: str) -> Ranks:
        """Joins the process group that torchrun describes (gloo on a CPU, NCCL on GPUs), until the process ends."""
        ranks = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if device.startswith("cuda"):
            import torch

            torch.cuda.set_device(device)
        if ranks.world > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo" if device == "cpu" else "nccl")
            atexit.register(dist.destroy_process_group)
        return ranks

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, everywhere."""
        return self.gather(value)[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def reduce(self, x: Tensor, maximum: bool = False) -> Tensor:
        """Sum (or maximum) of a tensor over the ranks, in place."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(x, dist.ReduceOp.MAX if maximum else dist.ReduceOp.SUM)
        return x

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sums gradients over the ranks, in messages of up to 256 MB; a rank without samples counts as zero."""
        if self.world == 1:
            return
        import torch

        parts, size = [[]], 0
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if parts[-1] and size + p.numel() > MESSAGE:
                parts.append([])
                size = 0
            parts[-1].append(p.grad)
            size += p.numel()
        for grads in filter(None, parts):
            flat = self.reduce(torch.cat([g.flatten() for g in grads]))
            for g, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
                g.copy_(summed.view_as(g))


# ---------------------------------------------------------------- logging: figures of an iteration


class Metrics:
    """An iteration's figures, on the device until `read`, which makes one transfer to the host.

    log.mean("update/clip_frac", outside)     # mean over all samples of all calls, on all ranks
    log.sum("rollout/samples", valid)
    log.max("update/grad_norm", norm)
    log.read()                                # {"update/clip_frac": 0.1, ...}
    """

    def __init__(self, device: Any, ranks: Ranks):
        self.device, self.ranks = device, ranks
        self._tables: dict[str, dict[str, Any]] = {"mean": {}, "count": {}, "sum": {}, "max": {}}

    def _add(self, kind: str, name: str, x: Any) -> None:
        old = self._tables[kind].get(name)
        self._tables[kind][name] = x if old is None else old.maximum(x) if kind == "max" else old + x

    def mean(self, name: str, x: Tensor, where: Tensor | None = None, by: tuple[Tensor, int] | None = None) -> None:
        """Mean of x, of any shape.

        Args:
            where: bool, of x's shape: what counts; all by default.
            by: (groups, number of groups), int64 of x's shape: logs the mean of each of several groups as <name>_k<group>, too.
        """
        import torch

        x = x.detach().float()
        x = x if where is None else torch.where(where, x, 0.0)
        self._add("mean", name, x.sum())
        self._add("count", name, x.numel() if where is None else where.sum())
        if by is not None and by[1] > 1:
            k, n = by[0].reshape(-1), by[1]
            count = torch.ones_like(x) if where is None else where.float()
            self._add("mean", f"{name}_k", x.new_zeros(n).index_add(0, k, x.reshape(-1)))
            self._add("count", f"{name}_k", x.new_zeros(n).index_add(0, k, count.reshape(-1)))

    def sum(self, name: str, x: Tensor) -> None:
        """Sum of x, of any shape."""
        self._add("sum", name, x.detach().float().sum())

    def max(self, name: str, x: Tensor) -> None:
        """Largest number of x, of any shape."""
        self._add("max", name, x.detach().float().max())

    def read(self) -> dict[str, float]:
        """Everything as numbers, the same on every rank; a mean over nothing is left out.

        Raises SystemExit where a number is not finite: what is saved is from before.
        """
        import torch

        own = {(kind, name): getattr(x, "shape", ()) for kind, table in self._tables.items() for name, x in table.items()}
        shapes: dict[tuple[str, str], Any] = {}
        for other in self.ranks.gather(own):  # a rank without samples lacks some
            shapes |= other
        sizes = {key: math.prod(shape) for key, shape in shapes.items()}
        order = sorted(sizes, key=lambda key: (key[0] == "max", key))
        flat: dict[bool, list[Tensor]] = {False: [], True: []}  # to add over the ranks, and to take the largest of
        for kind, name in order:
            x = self._tables[kind].get(name, -math.inf if kind == "max" else 0.0)
            x = x if hasattr(x, "numel") else torch.full((sizes[kind, name],), float(x), device=self.device)
            flat[kind == "max"].append(x.reshape(-1).float())
        parts = [self.ranks.reduce(torch.cat(xs), maximum) for maximum, xs in flat.items() if xs]
        host = iter(torch.cat(parts).tolist()) if parts else iter(())  # the transfer
        found = {key: [next(host) for _ in range(sizes[key])] for key in order}
        metrics = {name: values[0] for (kind, name), values in found.items() if kind in ("sum", "max")}
        for (kind, name), totals in found.items():
            for i, (total, count) in enumerate(zip(totals, found["count", name])) if kind == "mean" else ():
                if count:
                    metrics[f"{name}{i}" if name.endswith("_k") else name] = total / count
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise SystemExit(f"{', '.join(bad)} became nan or inf: lower --learning-rate; checkpoints are from before")
        return metrics


class StageTimer:
    """Seconds per stage of an iteration, without making a GPU wait: CUDA events there, the clock on a CPU.

    timer = StageTimer(device)
    with timer("env"): ...
    timer.seconds()   # {"env": ...}, and starts anew; the one place that waits for the device
    """

    def __init__(self, device: str):
        self._cuda = str(device).startswith("cuda")
        self._marks: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        yield
        self._marks.append((stage, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Seconds per stage since the last call [s]."""
        out: dict[str, float] = {}
        if self._cuda and self._marks:
            self._marks[-1][2].synchronize()
        for stage, start, end in self._marks:
            took = start.elapsed_time(end) / 1e3 if self._cuda else end - start
            out[stage] = out.get(stage, 0.0) + took
        self._marks.clear()
        return out


def peak_memory_gb(device: str) -> float:
    """Peak memory: allocated on the GPU, or what it has in use now if that is more; or resident on the host [GB].

    In use is what other processes and libraries hold, too: a simulator's memory is not torch's.
    """
    if str(device).startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return max(torch.cuda.max_memory_allocated(device), total - free) / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# ---------------------------------------------------------------- logging: a run's folder


def pick_device(device: str) -> str:
    """The device that `--device` asks for: cpu, cuda:N; every rank of torchrun gets its own GPU."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise SystemExit(f"--device {device}: must be cpu, cuda, cuda:N or auto")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"--device {device}: torch sees no CUDA GPU here; use --device cpu")
    if device == "cuda" or (device != "cpu" and "LOCAL_RANK" in os.environ):  # torchrun says which one
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def check_positive(**numbers: float | None) -> None:
    """Refuses numbers, by the names of their flags, that are not greater than 0 and finite; None passes."""
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise SystemExit(f"--{name.replace('_', '-')} {value}: must be greater than 0, and finite")


def check_not_negative(**numbers: float) -> None:
    """Refuses numbers, by the names of their flags, that are not 0 or more, and finite."""
    for name, value in numbers.items():
        if not 0 <= value < math.inf:
            raise SystemExit(f"--{name.replace('_', '-')} {value}: must be 0 or more, and finite")


def run_name(exp_name: str | None, *parts: Any, resume: str | None = None) -> str:
    """The name of a run's folder: --exp-name, that of the run to resume, or one made of `parts` and the time."""
    if resume:
        return Path(resume).resolve().name
    if exp_name is None:
        name = own = "__".join(str(part) for part in (*parts, time.strftime("%Y%m%d-%H%M%S")))
        for i in range(2, 1000):  # another of the same second
            if not (Path("runs") / name).exists():
                break
            name = f"{own}_{i}"
        return name
    if not re.fullmatch(r"[\w.+=@-]+", exp_name) or not exp_name.strip("."):
        raise SystemExit(f"--exp-name {exp_name}: is the name of a folder under runs/: letters, digits and .+=@_- only")
    metrics = Path("runs") / exp_name / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        raise SystemExit(f"--exp-name {exp_name}: that run exists; take another name")
    return exp_name


def saved_args[T](resume: str, kind: type[T]) -> T:
    """The arguments that the latest checkpoint of a run was made with, as an instance of the dataclass `kind`."""
    folder = Path(resume)
    if not (folder / "args.json").is_file():
        raise SystemExit(f"--resume {resume}: no args.json there; name a folder like runs/<name>")
    checkpoint = latest_checkpoint(folder)
    if checkpoint is None:
        raise SystemExit(f"--resume {resume}: it has no complete checkpoint yet; start the run again")
    own = checkpoint / "args.json"  # runs of earlier versions have none
    try:
        saved = json.loads((own if own.is_file() else folder / "args.json").read_text())["args"]
        saved = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        return kind(**saved | {"resume": resume})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise SystemExit(
            f"--resume {resume}: its args.json is not of this version of the script ({error}); "
            "start a run with --checkpoint <one of its checkpoints>"
        ) from error


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = sorted((run_dir / "checkpoints").glob("step_*/trainer_state.pt"))
    return found[-1].parent if found else None


def success_rates(
    names: Sequence[str], successes: Sequence[float], episodes: Sequence[float], notes: dict[str, str] | None = None
) -> dict[str, Any]:
    """Success rate of an evaluation with its Wilson 95% interval, of all together and of each instruction.

    Args:
        names: the instructions; one alone gets no entry of its own.
        successes, episodes: counts of each.
        notes: what is to be said of some of them, which are then left out of the whole.

    Returns:
        mean, low, high, episodes; `instructions`: the same, and its note, for each of several that had episodes.
    """

    def rate(count: float, of: float, **note: str) -> dict[str, Any]:
        low, high = wilson_interval(count, of)
        return {"mean": count / max(of, 1), "low": low, "high": high, "episodes": int(of), **note}

    if len(names) == 1:
        return rate(*successes, *episodes)
    each, whole = {}, [0.0, 0.0]
    for name, n, of in zip(names, successes, episodes):
        note = {"note": notes[name]} if notes and name in notes else {}
        if of:
            each[name] = rate(n, of, **note)
        if not note:
            whole = [whole[0] + n, whole[1] + of]
    return rate(*whole) | {"instructions": each}


def success_text(result: dict[str, Any]) -> str:
    """A success rate with its interval, in words; `result` as an evaluation returns it, empty without one."""
    return "{mean:.3f} [{low:.3f}, {high:.3f}] of {episodes} episodes".format(**result) if result else "not measured"


def atomic_write(path: str | Path, writer: Callable[[Path], Any]) -> None:
    """`writer(tmp)` fills a temporary file in the same folder, which is synced to disk and renamed over `path`.

    A reader, or a run killed at any moment, sees the old file or the new one, never half of one. If the writer fails
    (disk full) the temporary file is removed, the old file stays, and the error propagates. `tmp` keeps the suffix of
    `path`, so savers that go by the suffix work: `atomic_write("model.pt", lambda tmp: torch.save(state, tmp))`.
    """
    path = Path(path)
    tmp = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        writer(tmp)
        with open(tmp, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise


def replace_folder(target: str | Path, write: Callable[[Path], Any]) -> None:
    """Fills a new folder with `write(folder)` and moves it to `target`; a failure leaves the old one whole.

    Raises whatever `write` raises, after removing the part that was written.
    """
    target = Path(target)
    partial, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():  # killed between the two renames below
        os.replace(old, target)
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    shutil.rmtree(old, ignore_errors=True)


def plain(x: Any) -> Any:
    """What JSON can hold: non-finite numbers become null, tensors and numpy arrays lists, the unknown its str."""
    if x is None or isinstance(x, (bool, int, str)):
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, dict):
        return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, set)):
        return [plain(v) for v in x]
    return plain(x.tolist()) if hasattr(x, "tolist") else str(x)


def write_json(path: Path, content: Any) -> None:
    atomic_write(path, lambda tmp: tmp.write_text(json.dumps(plain(content), indent=2) + "\n", encoding="utf-8"))


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole objects of a .jsonl file; a line cut short by SIGKILL or a full disk is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                rows.append(row)
    return rows


PACKAGES = "torch triton isaaclab newton warp-lang mujoco mujoco-warp transformers tensordict numpy wandb".split()


def provenance(folder: Path, device: Any) -> dict[str, Any]:
    """Where a run came from. No host name, no user: a run folder may be published."""

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    name = platform.processor() or platform.machine()
    if str(device).startswith("cuda"):
        import torch

        name = torch.cuda.get_device_name(device)
    elif (cpus := Path("/proc/cpuinfo")).exists():  # platform.processor() is empty or just "x86_64" on Linux
        name = next((line.split(":", 1)[1].strip() for line in cpus.read_text().splitlines() if "model name" in line), name)
    status = git("status", "--porcelain")
    return {
        "git_sha": git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": versions,
        "device": str(device),
        "device_name": name,
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def si(x: float) -> str:
    """12345 -> 12.3k: three digits and a prefix."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return f"{x / limit:.3g}{suffix}"
    return f"{x:.3g}"


def hms(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


# metric key, label on the terminal, format: what the display shows, in this order; absent keys are left out
FIELDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("env_steps", "steps", si),
    ("sps/env", "env/s", si),
    ("sps/policy", "+policy/s", si),
    ("sps/train", "+train/s", si),
    ("rollout/success", "success", "{:.3f}".format),
    ("rollout/broken", "broken", "{:.2%}".format),
    ("eval/ode_success", "eval", "{:.3f}".format),
    ("rollout/return", "return", "{:.4g}".format),
    ("rollout/length", "length", "{:.0f}".format),
    ("eval/return", "eval", "{:.4g}".format),
    ("update/kl", "KL", "{:.2g}".format),
    ("update/kl_base", "KL", "{:.2g}".format),
    ("update/clip_frac", "clip", "{:.3f}".format),
    ("update/loss", "loss", "{:.3g}".format),
    ("eval/loss", "held out", "{:.3g}".format),
    ("time/elapsed", "elapsed", hms),
)
# title of a panel of curves.png, and the metric keys drawn in it; a panel without data is left out
PANELS: tuple[tuple[str, dict[str, str]], ...] = (
    ("success", {"rollout/success": "rollout (SDE)", "eval/ode_success": "eval (ODE)"}),
    ("return", {"rollout/return": "exploring policy", "eval/return": "deterministic policy"}),
    ("KL of an update", {"update/kl": "KL"}),
    ("learning rate", {"update/learning_rate": "learning rate"}),
    ("explained variance of the value", {"update/explained_variance": "explained variance"}),
    ("KL to base", {"update/kl_base": "KL"}),
    ("clip fraction", {"update/clip_frac": "clip"}),
    ("groups without variance", {"rollout/zero_variance_share": "share"}),
    ("loss", {"update/loss": "loss", "eval/loss": "held out"}),
    ("steps per second", {"sps/env": "env", "sps/policy": "env + policy", "sps/train": "everything"}),
)
LOGGERS = ("common", "tasks", "gr00t_n1d5")  # of the repo's own modules


class Run:
    """A run's folder, runs/<name>: args.json, provenance.json, source/, log.txt, metrics.jsonl, curves.png, videos/,
    checkpoints/, summary.json, W&B's files. The terminal gets a live block, or one plain line an iteration when piped.

        with Run(vars(args), __file__, ranks, name, args.iterations, args.device, args.resume) as run:
            begin = run.restore(policy.load)     # 0 for a new run
            run.log(iteration, metrics, timer.seconds(), steps)
            run.save("step_000050", policy.save, optimizer)

    Iterations count from 0. A resumed run goes on in the files of the old one: metrics.jsonl is cut back to the rows
    before it, its own arguments, versions and sources lie beside the old ones. W&B never stops training: what it raises
    becomes one event line, and the run goes on without it. WANDB_MODE=disabled leaves it out, WANDB_PROJECT names the
    project. On ranks other than 0 only `state` and `restore` do something.

    Attributes:
        dir: the folder.
        state: what a resumed run needs besides policy and optimizer; scripts may add to it.
    """

    def __init__(
        self, args: dict[str, Any], script: str, ranks: Ranks, name: str, iterations: int, device: str,
        resume: str | None = None, console: Any = None,
    ):  # fmt: skip
        """
        Args:
            args: the arguments: recorded, and repeated in summary.json in part.
            script: __file__ of the script.
            name: of the folder; rank 0's is taken.
            iterations: of the whole run, for the display.
            resume: the folder of the run to go on with.
            console: a rich Console; None: the terminal, if there is one.
        """
        self.dir = Path(resume) if resume else Path("runs") / ranks.broadcast(name)
        self._resumed = latest_checkpoint(self.dir) if resume else None
        self.is_main, self.device = ranks.rank == 0, device
        self.args, self.script, self.ranks, self.iterations = args, Path(script).resolve(), ranks, iterations
        self.state: dict[str, Any] = {"iteration": 0, "elapsed": 0.0, "stages": {}, "best": -math.inf, "results": {}}
        self.wandb: Any = None
        self._live: Any = None
        self._latest: dict[str, float] = {}  # last value of every metric: evaluations come every few iterations
        self._optimizer: dict | None = None
        self._out, self._console = sys.stdout, console  # kept: what a simulator prints is sent elsewhere
        if console is None and self._out.isatty() and self.is_main:
            from rich.console import Console

            self._console = Console(file=self._out)

    # ------------------------------------------------ beginning and end

    def __enter__(self) -> Run:
        if self._resumed:
            import torch

            try:
                self.state = torch.load(self._resumed / "trainer_state.pt", weights_only=True, map_location="cpu")
                self._optimizer = self.state.pop("optimizer")
            except Exception as error:  # torch.load has many kinds
                self._does_not_load(error)
        self._start, self._loop, self._begin = time.monotonic(), None, self.state["iteration"]
        if not self.is_main:
            return self
        try:
            self._prepare()
        except OSError as error:
            raise SystemExit(f"--exp-name {self.dir.name}: cannot write {self.dir} ({error.strerror or error})") from error
        handler = logging.Handler()  # what the repo's own modules log becomes events
        handler.emit = lambda record: self.event(record.getMessage())  # type: ignore[method-assign]
        for name in LOGGERS:
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = [handler], False
            logger.setLevel(logging.INFO)
        if os.environ.get("WANDB_MODE") != "disabled":
            self._start_wandb()
        return self

    def _does_not_load(self, error: Exception) -> None:
        why = " ".join(str(error).split())[:200]
        raise SystemExit(
            f"--resume {self.dir}: {self._resumed.name} does not load ({type(error).__name__}: {why}); leave out flags that "
            "the run did not have, or, where the checkpoint is damaged, go on from an earlier one by moving it away"
        ) from error

    def _prepare(self) -> None:
        self.dir.mkdir(parents=True, exist_ok=True)
        suffix = f".resume{self._begin}" if self._resumed else ""
        write_json(self.dir / f"args{suffix}.json", {"command": shlex.join(sys.orig_argv), "args": self.args})
        write_json(self.dir / f"provenance{suffix}.json", provenance(self.script.parent, self.device))
        loaded = {Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
        own = {f for f in loaded if f.suffix == ".py" and f.is_relative_to(ROOT) and "site-packages" not in f.parts}
        for file in {self.script, *own, *ROOT.glob("tasks/*.py")}:  # some of those are imported with the simulator
            target = self.dir / f"source{suffix}" / (file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        path = self.dir / "metrics.jsonl"
        if self._resumed:
            rows = [json.dumps(row) + "\n" for row in json_lines(path) if row["iteration"] < self._begin]
            atomic_write(path, lambda tmp: tmp.write_text("".join(rows), encoding="utf-8"))
        self._metrics = open(path, "a", encoding="utf-8")
        self._log = open(self.dir / "log.txt", "a", encoding="utf-8")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Stops the display, finishes W&B, closes the files."""
        if not self.is_main:
            return
        if self._live is not None:
            self._live.stop()
        if error is not None:
            self._write_log(f"stopped: {kind.__name__}: {error}")
        self._wandb_do(lambda run: run.finish(exit_code=int(error is not None)))
        self.wandb = None
        for name in LOGGERS:  # nobody listens any more
            logging.getLogger(name).handlers = []
        self._metrics.close()
        self._log.close()

    def _start_wandb(self) -> None:
        """Online for who is logged in, else offline; or as WANDB_MODE says."""
        id_file = self.dir / "wandb_id.txt"
        os.environ.setdefault("WANDB_SILENT", "true")  # settings come too late for some lines
        for mode in (os.environ.get("WANDB_MODE"), "offline"):
            try:
                import wandb

                mode = mode or ("online" if wandb.login(prompt=False) else "offline")
                run_id = id_file.read_text().strip() if self._resumed and id_file.exists() else secrets.token_hex(4)
                self.wandb = wandb.init(
                    project=os.environ.get("WANDB_PROJECT", "gr00t-rl"), name=self.dir.name, id=run_id, dir=str(self.dir),
                    config=plain(self.args), mode=mode, resume="allow" if mode == "online" else None,
                    settings=wandb.Settings(silent=True, console="off", init_timeout=60),
                )  # fmt: skip
                # W&B's own step must rise, which a resume breaks; an axis of our own does not have to
                self.wandb.define_metric("iteration")
                self.wandb.define_metric("*", step_metric="iteration")
                atomic_write(id_file, lambda tmp, run_id=run_id: tmp.write_text(run_id + "\n"))
                return
            except Exception as e:  # any failure of a tracker is less bad than a lost run
                self.wandb = None
                self.event(f"W&B did not start: {type(e).__name__}: {e}")

    def _wandb_do(self, act: Callable[[Any], Any]) -> None:
        if self.wandb is not None:
            try:
                act(self.wandb)
            except Exception as e:
                self.wandb = None
                self.event(f"W&B failed, the run goes on without it: {type(e).__name__}: {e}")

    # ------------------------------------------------ during the run

    def event(self, message: str) -> None:
        """One line to the terminal (above the live block) and, with the time, to log.txt."""
        if not self.is_main:
            return
        self._write_log(message)
        if self._console is not None:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=self._out, flush=True)

    def _write_log(self, message: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
        self._log.flush()

    def log(self, iteration: int, metrics: dict[str, float], stages: dict[str, float], steps: int) -> None:
        """One iteration's metrics to metrics.jsonl (flushed), W&B and the terminal, with rates in steps per second.

        `sps/env` is steps over env time, `sps/policy` over env and policy time, `sps/train` over everything but
        evaluation. `eval/episodes` beside `eval/ode_success` gives the curve its Wilson band.

        Args:
            stages: seconds of this iteration by stage: env, policy, update.
            steps: environment steps of an iteration, over all ranks; 0 where there are none to count.
        """
        state = self.state
        state["iteration"] = iteration + 1
        state["stages"] = {name: value + state["stages"].get(name, 0.0) for name, value in stages.items()}
        if not self.is_main:
            return
        if self._loop is None:  # now that the simulator has started and the first evaluation is over
            self._loop = time.monotonic() - sum(stages.values())
        speeds = {f"sps/{name}": value for name, value in steps_per_second(steps, stages).items() if steps}
        times = {f"time/{name}": value for name, value in stages.items()} | {"time/elapsed": self.elapsed()}
        numbers = {k: float(x) for k, x in metrics.items()} | speeds | times
        numbers |= {"env_steps": (iteration + 1) * steps} if steps else {}
        self._metrics.write(json.dumps({"iteration": iteration, **plain(numbers)}) + "\n")
        self._metrics.flush()
        self._wandb_do(lambda run: run.log({"iteration": iteration, **numbers}))
        shown = {"iteration": float(iteration), **numbers}
        self._latest.update(shown)
        if self._console is None:
            print("  ".join(f"{label} {text}" for label, text in self._fields(shown)), file=self._out, flush=True)
        elif self._live is None:  # only now: the simulator's start-up noise would tear the block
            from rich.live import Live

            self._live = Live(get_renderable=self._block, console=self._console, refresh_per_second=1)
            self._live.start(refresh=True)
        else:
            self._live.refresh()

    def elapsed(self) -> float:
        """Seconds of the whole run, those before a resume included [s]."""
        return self.state["elapsed"] + time.monotonic() - self._start

    def _fields(self, metrics: dict[str, float]) -> list[tuple[str, str]]:
        """(label, text) of everything the terminal shows."""
        done = int(metrics["iteration"]) + 1
        fields = [("iteration", f"{done}/{self.iterations}")]
        shown = {key: x for key, x in metrics.items() if x or key != "rollout/broken"}  # there should be none
        fields += [(label, form(shown[key])) for key, label, form in FIELDS if key in shown]
        here = done - self._begin  # iterations of this process
        seconds = (time.monotonic() - self._loop) / max(here, 1) * max(self.iterations - done, 0)
        return [*fields, ("ETA", hms(seconds))]

    def _block(self) -> Any:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(4):
            table.add_column(ratio=1)
        cells = [f"[dim]{label}[/] [bold]{text}[/]" for label, text in self._fields(self._latest)]
        for i in range(0, len(cells), 4):
            table.add_row(*cells[i : i + 4])
        whole = Table.grid(expand=True)
        whole.add_row(ProgressBar(total=max(self.iterations, 1), completed=self._latest["iteration"] + 1))
        whole.add_row(table)
        return Panel(whole, title=self.dir.name)

    def result(self, **figures: Any) -> None:
        """Final figures, as soon as there are any -> summary.json (atomic), W&B's summary and, of success rates, an event."""
        self.state["results"] |= figures
        if not self.is_main:
            return
        for name, value in figures.items():
            if isinstance(value, dict) and "low" in value:
                self.event(f"{name.replace('_', ' ')}: {success_text(value)}")
                for text, rate in value.get("instructions", {}).items():
                    note = f" ({rate['note']})" if "note" in rate else ""
                    self.event(f"    {text}{note}: {success_text(rate)}")
        stages = self.state["stages"]
        about = {name: self.args[name] for name in ("task", "seed", "checkpoint", "num_envs") if name in self.args}
        about |= {"script": self.script.stem, "device": self.device, "world_size": self.ranks.world}
        about |= {"iterations": self.state["iteration"], "seconds": self.elapsed()}
        about |= {"peak_memory_gb": peak_memory_gb(self.device)}
        if steps := self._latest.get("env_steps"):
            about |= {"env_steps": steps, "steps_per_second": steps_per_second(steps, stages)}
        summary = plain(about | self.state["results"])
        write_json(self.dir / "summary.json", summary)
        self._wandb_do(lambda run: run.summary.update(summary))

    # ------------------------------------------------ checkpoints

    def restore(self, load: Callable[[Path], Any]) -> int:
        """The iteration to begin with; `load(folder)` takes the policy of the run to resume, if there is one."""
        if self._resumed:
            try:
                load(self._resumed)
            except Exception as error:  # safetensors and torch have many kinds
                self._does_not_load(error)
        return self.state["iteration"]

    def restore_optimizer(self, optimizer: Any) -> Any:
        """The optimizer, with the state of the run to resume."""
        if self._optimizer is not None:
            try:
                optimizer.load_state_dict(self._optimizer)
            except ValueError as error:  # other parameters
                self._does_not_load(error)
            self._optimizer = None
        return optimizer

    def improved(self, score: float) -> bool:
        """Whether a score is the best so far."""
        better = score > self.state["best"]
        self.state["best"] = max(score, self.state["best"])
        return better

    def save(self, name: str, write: Callable[[Path], Any], optimizer: Any = None, **state: Any) -> None:
        """Writes checkpoints/<name> whole or not at all, and drops all but the latest two of those to resume from.

        Args:
            write: writes the policy into a folder.
            optimizer: with one, the checkpoint is one to resume from, and is called step_<iteration>.
            state: more for `Run.state`, in this file alone.
        """
        if not self.is_main:
            return
        import torch

        def fill(partial: Path) -> None:
            write(partial)
            if optimizer is not None:
                trainer = {**self.state, "elapsed": self.elapsed(), **state, "optimizer": optimizer.state_dict()}
                write_json(partial / "args.json", {"args": self.args})  # to go on with
                torch.save(trainer, partial / "trainer_state.pt")

        folder = self.dir / "checkpoints"
        try:
            replace_folder(folder / name, fill)
        except Exception as error:  # a full disk, in whatever words the writer has for it: hours of training go on
            self.event(f"checkpoint {name} could not be written, earlier ones are kept: {error}")
            return
        for outdated in sorted(folder.glob("step_*/trainer_state.pt"))[:-2]:
            shutil.rmtree(outdated.parent)
        self.curves()

    # ------------------------------------------------ pictures

    def curves(self) -> None:
        """Learning curves of metrics.jsonl (the whole run, resumes included) against env_steps -> curves.png."""
        from matplotlib.figure import Figure  # no pyplot: no global state, Agg without asking

        rows = json_lines(self.dir / "metrics.jsonl")
        panels = [(t, k) for t, k in PANELS if any(row.get(key) is not None for row in rows for key in k)]
        if not panels:
            return
        figure = Figure(figsize=(10, 3 * math.ceil(len(panels) / 2)), layout="constrained")
        axes = list(figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False).flat)
        for ax, (title, keys) in zip(axes, panels):
            for key, label in keys.items():
                points = [row for row in rows if row.get(key) is not None]
                x, y = [row.get("env_steps", row["iteration"]) for row in points], [row[key] for row in points]
                (line,) = ax.plot(x, y, label=label, marker="." if len(x) < 30 else None)
                if key == "eval/ode_success" and points:
                    n = [row["eval/episodes"] for row in points]
                    low, high = zip(*(wilson_interval(min(max(p, 0), 1) * m, m) for p, m in zip(y, n)))
                    ax.fill_between(x, low, high, alpha=0.2, color=line.get_color(), label="95% (Wilson)")
            ax.set(title=title, xlabel="env steps" if rows and "env_steps" in rows[0] else "iteration")
            ax.grid(alpha=0.3)
            if len(keys) > 1:
                ax.legend(fontsize="small")
        for ax in axes[len(panels) :]:
            ax.axis("off")
        atomic_write(self.dir / "curves.png", lambda tmp: figure.savefig(tmp, dpi=120))

    def gif(
        self, name: str, frames: Any, success: Any = None, texts: Iterable[str] = (), every: int = 1, fps: float = 10
    ) -> None:
        """Tiles episodes into one looping GIF -> videos/<name>.gif, and W&B.

        Args:
            frames: uint8 (F, N, H, W, 3), a tensor or an array; enlarged by whole numbers until a tile is >= 128 px.
            success: (F, N) bool: an episode stands still, in a green frame, once it has succeeded.
            texts: N instructions; one that all share stands above all, else each above its own episode.
            every: environment steps before each frame.
        Raises ValueError for other shapes or types.
        """
        if not self.is_main:
            return
        import numpy as np
        from PIL import Image, ImageDraw

        frames, success = (x.detach().cpu().numpy() if hasattr(x, "detach") else x for x in (frames, success))
        if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise ValueError(f"gif: frames must be uint8 (F, N, H, W, 3), not {frames.dtype} {frames.shape}")
        F, N, H, W, _ = frames.shape
        success = np.zeros((F, N), bool) if success is None else success
        if success.shape != (F, N):
            raise ValueError(f"gif: success {success.shape} must be {(F, N)}")
        first, texts = np.where(success.any(0), success.argmax(0), F), list(texts)  # (N,) frame of the first success
        columns, scale = math.ceil(math.sqrt(N)), math.ceil(128 / min(H, W, 128))
        edge, strip = max(2, min(H, W) * scale // 32), 14  # of a tile's frame and of a line of text [px]
        own = strip if len(set(texts)) > 1 else 0
        h, w = H * scale + own, W * scale

        def grid(f: int) -> Image.Image:  # one frame at a time: the enlarged clip may not fit in memory
            canvas = Image.new("RGB", (columns * w, math.ceil(N / columns) * h + strip))
            pen = ImageDraw.Draw(canvas)
            shared = texts[0] if texts and not own else ""
            pen.text((3, 1), f"step {(f + 1) * every}   {shared}", fill=(255, 255, 255))
            for n in range(N):
                tile = frames[min(f, first[n]), n].repeat(scale, 0).repeat(scale, 1)
                border = np.ones(tile.shape[:2], bool)
                border[edge:-edge, edge:-edge] = False
                tile[border] = (0, 200, 0) if f >= first[n] else (40, 40, 40)
                x, y = n % columns * w, n // columns * h + strip
                canvas.paste(Image.fromarray(tile), (x, y + own))
                if own:
                    text = next(t for t in (texts[n][:i] for i in range(len(texts[n]), -1, -1)) if pen.textlength(t) < w - 4)
                    pen.text((x + 3, y + 1), text, fill=(255, 255, 255))
            return canvas.quantize(128)

        path = self.dir / "videos" / f"{name}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        later, ms = (grid(f) for f in range(1, F)), round(1000 / fps)
        atomic_write(path, lambda tmp: grid(0).save(tmp, save_all=True, append_images=later, duration=ms, loop=0))

        def upload(run: Any) -> None:
            import wandb

            run.log({"iteration": int(self._latest.get("iteration", 0)), f"video/{name}": wandb.Video(str(path))})

        self._wandb_do(upload)


def steps_per_second(steps: float, seconds: dict[str, float]) -> dict[str, float]:
    """Environment steps per second of the simulator alone, with the policy, and with everything."""
    env, policy = seconds.get("env", 0.0), seconds.get("policy", 0.0)
    times = {"env": env, "policy": env + policy, "train": sum(seconds.values())}
    return {name: steps / time for name, time in times.items() if time}
