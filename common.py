"""Kernels that every script shares: GAE, group advantages, logging. Nothing here knows a robot or a network.

`gae` and `group_advantages` have a Triton kernel for CUDA and a torch path for everything else; the device picks.
`RunLogger` owns `runs/<name>/`: provenance, metrics.jsonl, W&B, the terminal display, curves, videos, summary.
Heavy imports (torch, triton, wandb, rich, matplotlib, PIL) happen on first use, so `--help` stays instant.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import errno
import functools
import importlib.metadata
import json
import logging
import math
import netrc
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlparse

if TYPE_CHECKING:
    from torch import Tensor

Backend = Literal["auto", "torch", "triton"]
log = logging.getLogger("common")

# ---------------------------------------------------------------- kernels

tl: Any = None  # triton.language, set by _triton(): the kernels below look it up in the module's globals
_named: set[tuple[str, str]] = set()


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
    path = "triton" if kernels else "torch"
    if (name, path) not in _named:
        _named.add((name, path))
        log.info("%s: %s path (%s)", name, path, tensor.device.type)
    return kernels and kernels[name]


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
                kernel[((N + block - 1) // block,)](
                    *inputs, advantages, returns, float(gamma), float(lam), N, T=T, BLOCK=block
                )
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
                kernel[(grouped.shape[0],)](
                    grouped, mask.contiguous(), advantages, keep, float(eps),
                    G=group_size, BLOCK=block, NORMALIZE=bool(normalize_std),
                )  # fmt: skip
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


class CudaGraphs:
    """A function of CUDA tensors, captured as a CUDA graph at its first call with inputs of some shapes, then replayed.

    The host then launches one graph instead of hundreds of kernels. For functions without gradients, random numbers and
    host syncs, whose other tensors (weights) stay where they are; they may change in place.

    Args:
        function: of tensors, or of tuples of them; returns the same. What is no tensor must be hashable.
    """

    def __init__(self, function: Callable[..., Any]):
        self.function, self.graphs, self.pool = function, {}, None

    def __call__(self, *inputs: Any) -> Any:
        """The function's outputs, as copies that later calls leave alone."""
        from torch import Tensor
        from torch.utils import _pytree as pytree

        leaves, spec = pytree.tree_flatten(inputs)
        key = (spec, *((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in leaves))
        if key not in self.graphs:
            own = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
            self.graphs[key] = own, *self.capture(lambda: self.function(*pytree.tree_unflatten(own, spec)))
        own, replay, outputs = self.graphs[key]
        for mine, x in zip(own, leaves):
            if isinstance(x, Tensor):
                mine.copy_(x)
        replay()
        return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, outputs)

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """How to run a call again, and where its outputs will then lie."""
        import torch

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # compiles and picks kernels, which a capture must not
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):  # NCCL has a thread of its own
            outputs = call()
        self.pool = graph.pool()  # outputs are copied before another graph runs, so all can share their memory
        return graph.replay, outputs


def seeded_generator(device: Any, *seeds: int) -> Any:
    """A torch.Generator of its own for every tuple of seeds."""
    import numpy as np
    import torch

    entropy = int(np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(entropy)


def per_step(steps: int, k: Tensor, *figures: Tensor) -> Tensor:
    """Sums (steps, F + 1) of figures (B, J) by the denoising step k (B, J) they belong to, and their number."""
    import torch

    columns = torch.stack([*figures, torch.ones_like(figures[0])], -1).detach().flatten(0, 1)  # (B J, F + 1)
    return columns.new_zeros(steps, columns.shape[1]).index_add(0, k.flatten(), columns)


def step_means(sums: list[float], names: tuple[str, ...]) -> dict[str, float]:
    """Metrics per denoising step, update/<name>_k<step>, from the flattened sums of `per_step`."""
    metrics, width = {}, len(names) + 1
    for k in range(len(sums) // width):
        *figures, count = sums[k * width : (k + 1) * width]
        metrics |= {f"update/{name}_k{k}": value / max(count, 1.0) for name, value in zip(names, figures)}
    return metrics


def explained_variance(target: list[float], error: list[float], n: float) -> float:
    """1 - var(error) / var(target), from sums and sums of squares; 0 where the targets are all alike."""
    spread, rest = (square / n - (total / n) ** 2 for total, square in (target, error))
    return 1 - rest / spread if spread > 1e-8 else 0.0


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


def success_text(result: dict[str, float]) -> str:
    """A success rate with its interval, in words; `result` as an evaluation returns it, empty without one."""
    return "{mean:.3f} [{low:.3f}, {high:.3f}] of {episodes} episodes".format(**result) if result else "not measured"


# ---------------------------------------------------------------- files


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


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write` of UTF-8 text."""
    atomic_write(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def _plain(x: Any) -> Any:
    """What JSON can hold: non-finite numbers become null, tensors and numpy arrays lists, the unknown its str."""
    if x is None or isinstance(x, (bool, int, str)):
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    if isinstance(x, dict):
        return {str(k): _plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, set)):
        return [_plain(v) for v in x]
    return _plain(x.tolist()) if hasattr(x, "tolist") else str(x)


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole objects of a .jsonl file; a line cut short by SIGKILL or a full disk is passed over."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("iteration"), int):
                rows.append(row)
    return rows


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", *command], cwd=folder, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _device_name(device: Any) -> str:
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device) if torch.cuda.is_available() else str(device)
    with contextlib.suppress(OSError, StopIteration):  # platform.processor() is empty or just "x86_64" on Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


PACKAGES = "torch triton isaaclab newton warp-lang mujoco mujoco-warp transformers numpy wandb".split()


def _provenance(script: Path, device: Any) -> dict[str, Any]:
    """Where a run came from. No host name, no user: a run folder may be published."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    status = _git(script.parent, "status", "--porcelain")
    return {
        "git_sha": _git(script.parent, "rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": versions,
        "device": str(device),
        "device_name": _device_name(device),
        "cpu_count": os.cpu_count(),
        "platform": platform.platform(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


# ---------------------------------------------------------------- logging


def _si(x: float) -> str:
    """12345 -> 12.3k: three digits and a prefix."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(x) >= limit:
            return f"{x / limit:.3g}{suffix}"
    return f"{x:.3g}"


def _hms(seconds: float) -> str:
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


# metric key, label on the terminal, format: what the display shows, in this order; absent keys are left out
FIELDS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("env_steps", "steps", _si),
    ("sps/env", "env/s", _si),
    ("sps/policy", "+policy/s", _si),
    ("sps/train", "+train/s", _si),
    ("rollout/success", "success", lambda x: f"{x:.3f}"),
    ("eval/ode_success", "eval", lambda x: f"{x:.3f}"),
    ("rollout/return", "return", lambda x: f"{x:.4g}"),
    ("rollout/length", "length", lambda x: f"{x:.0f}"),
    ("eval/return", "eval", lambda x: f"{x:.4g}"),
    ("update/kl", "KL", lambda x: f"{x:.2g}"),
    ("update/kl_base", "KL", lambda x: f"{x:.2g}"),
    ("update/clip_frac", "clip", lambda x: f"{x:.3f}"),
    ("update/loss", "loss", lambda x: f"{x:.3g}"),
    ("time/elapsed", "elapsed", _hms),
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
    ("loss", {"update/loss": "loss"}),
    ("steps per second", {"sps/env": "env", "sps/policy": "env + policy", "sps/train": "everything"}),
)


def _wandb_mode() -> str:
    """WANDB_MODE if set; online when a login lies ready; else offline. No network, no prompt."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for file in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(file)).authenticators(host):
                return "online"
    return "offline"


class RunLogger:
    """All logging of one run, in `run_dir`: args.json, provenance.json, source/, log.txt, metrics.jsonl, curves.png,
    videos/, summary.json, W&B's files. The terminal gets a live block, or one plain line an iteration when piped.

    Iterations count from 0 and `resume_iteration` is the first one still to run. On resume (> 0) metrics.jsonl is cut
    back to the rows before it and the W&B run is continued; a fresh start moves an old metrics.jsonl aside.
    Rates, in steps per second: `sps/env` = env steps over env time, `sps/policy` = over env + policy time,
    `sps/train` = over everything. `eval/episodes` beside `eval/ode_success` gives the curve its Wilson band.
    W&B never stops training: what it raises becomes one event line and the run goes on without it.
    With `is_main=False` (ranks other than 0) every method does nothing. Raises OSError if `run_dir` is not writable.
    """

    def __init__(
        self,
        run_dir: str | Path,
        args: dict[str, Any],
        *,
        script: str | Path,
        total_iterations: int,
        track: bool = True,
        wandb_project: str = "robot-rl",
        resume_iteration: int = 0,
        is_main: bool = True,
        device: Any = "cpu",
        sources: Iterable[str | Path] = (),
        console: Any = None,  # a rich Console; None: the terminal, if there is one
    ) -> None:
        self.run_dir, self.is_main = Path(run_dir), is_main
        self.total_iterations, self.resume_iteration = total_iterations, resume_iteration
        self.wandb: Any = None
        self._live: Any = None
        self._latest: dict[str, float] = {}  # last value of every metric: evaluations come every few iterations
        self._start = time.monotonic()
        if not is_main:
            return
        try:
            self._prepare(args, Path(script).resolve(), device, sources)
        except OSError as e:
            code = e.errno or errno.EIO
            raise OSError(code, f"cannot write the run directory {self.run_dir}: {e.strerror or e}") from e
        self._out = sys.stdout  # kept: what a simulator prints at start-up may be sent elsewhere
        if console is None and self._out.isatty():
            from rich.console import Console

            console = Console(file=self._out)
        self._console = console
        self._handler = logging.Handler()  # the kernels' "which path" lines become events
        self._handler.emit = lambda record: self.event(record.getMessage())  # type: ignore[method-assign]
        self._heard: list[logging.Logger] = []
        self.listen("common")
        if track:
            self._start_wandb(args, wandb_project)

    def _prepare(self, args: dict[str, Any], script: Path, device: Any, sources: Iterable[str | Path]) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # a resume keeps what the run began with and puts its own args, sources and versions beside it
        resumed = self.resume_iteration > 0 and (self.run_dir / "args.json").exists()
        suffix = f".resume{self.resume_iteration}" if resumed else ""
        command = shlex.join(sys.orig_argv)
        written = {"args": {"command": command, "args": args}, "provenance": _provenance(script, device)}
        for name, content in written.items():
            atomic_write_text(self.run_dir / f"{name}{suffix}.json", json.dumps(_plain(content), indent=2) + "\n")
        folder = self.run_dir / f"source{suffix}"
        folder.mkdir(exist_ok=True)
        for file in {script, Path(__file__).resolve(), *(Path(s).resolve() for s in sources)}:
            shutil.copyfile(file, folder / file.name)
        path = self.run_dir / "metrics.jsonl"
        if self.resume_iteration > 0:
            rows = [row for row in _json_lines(path) if row["iteration"] < self.resume_iteration]
            atomic_write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        elif path.exists() and path.stat().st_size:
            os.replace(path, path.with_suffix(f".{time.strftime('%Y%m%d-%H%M%S')}.old.jsonl"))
        self._metrics = open(path, "a", encoding="utf-8")
        self._log = open(self.run_dir / "log.txt", "a", encoding="utf-8")

    # ------------------------------------------------ W&B

    def _start_wandb(self, args: dict[str, Any], project: str) -> None:
        id_file, mode = self.run_dir / "wandb_id.txt", _wandb_mode()
        for attempt in (mode, "offline") if mode == "online" else (mode,):
            try:
                import wandb

                old = self.resume_iteration > 0 and id_file.exists()
                run_id = id_file.read_text().strip() if old else secrets.token_hex(4)
                os.environ.setdefault("WANDB_SILENT", "true")  # settings come too late for some lines
                self.wandb = wandb.init(
                    project=project, name=self.run_dir.name, id=run_id, dir=str(self.run_dir), config=_plain(args),
                    mode=attempt, resume="allow" if attempt == "online" else None,
                    settings=wandb.Settings(silent=True, console="off", init_timeout=60),
                )  # fmt: skip
                # W&B's own step must rise, which a resume breaks; an axis of our own does not have to
                self.wandb.define_metric("iteration")
                self.wandb.define_metric("*", step_metric="iteration")
                atomic_write_text(id_file, run_id + "\n")
                return
            except Exception as e:  # any failure of a tracker is less bad than a lost run
                self.wandb = None
                self.event(f"W&B ({attempt}) did not start: {type(e).__name__}: {e}")

    def _wandb_do(self, act: Callable[[Any], Any]) -> None:
        if self.wandb is not None:
            try:
                act(self.wandb)
            except Exception as e:
                self.wandb = None
                self.event(f"W&B failed, the run goes on without it: {type(e).__name__}: {e}")

    def listen(self, *names: str) -> None:
        """Shows the log lines (INFO and above) of modules as events."""
        for name in names if self.is_main else ():
            source = logging.getLogger(name)
            source.addHandler(self._handler)
            source.setLevel(logging.INFO)
            source.propagate = False
            self._heard.append(source)

    # ------------------------------------------------ during the run

    def event(self, message: str) -> None:
        """One line to the terminal (above the live block) and, with the time, to log.txt."""
        if not self.is_main:
            return
        if not self._log.closed:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
            self._log.flush()
        if self._console is not None:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)
        else:
            print(message, file=self._out, flush=True)

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        """Metrics of one iteration to metrics.jsonl (flushed), W&B and the terminal. 0-d tensors are read."""
        if not self.is_main:
            return
        numbers = {key: float(x) for key, x in metrics.items() if x is not None and key != "iteration"}
        self._metrics.write(json.dumps({"iteration": int(iteration), **_plain(numbers)}) + "\n")
        self._metrics.flush()
        self._wandb_do(lambda run: run.log({"iteration": int(iteration), **numbers}))
        shown = {"iteration": float(iteration), **numbers}
        self._latest.update(shown)
        if self._console is None:
            print("  ".join(f"{label} {text}" for label, text in self._fields(shown)), file=self._out, flush=True)
        elif self._live is None:  # only now: the simulator's start-up noise would tear the block
            from rich.live import Live

            self._live = Live(get_renderable=self._block, console=self._console, refresh_per_second=1)
            self._live.start(refresh=True)
            atexit.register(self._live.stop)  # an exception must not leave the cursor hidden
        else:
            self._live.refresh()

    def _fields(self, metrics: dict[str, float]) -> list[tuple[str, str]]:
        """(label, text) of everything the terminal shows."""
        done = int(metrics["iteration"]) + 1
        fields = [("iteration", f"{done}/{self.total_iterations}")]
        for key, label, form in FIELDS:
            if key in metrics:
                x = metrics[key]
                fields.append((label, form(x) if math.isfinite(x) else str(x)))
        here = done - self.resume_iteration  # iterations of this process
        if here > 0:
            seconds = (time.monotonic() - self._start) / here * max(self.total_iterations - done, 0)
            fields.append(("ETA", _hms(seconds)))
        return fields

    def _block(self) -> Any:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        fields = self._fields(self._latest)
        table = Table.grid(padding=(0, 2), expand=True)
        for _ in range(4):
            table.add_column(ratio=1)
        cells = [f"[dim]{label}[/] [bold]{text}[/]" for label, text in fields]
        for i in range(0, len(cells), 4):
            table.add_row(*cells[i : i + 4])
        whole = Table.grid(expand=True)
        whole.add_row(ProgressBar(total=max(self.total_iterations, 1), completed=self._latest["iteration"] + 1))
        whole.add_row(table)
        return Panel(whole, title=self.run_dir.name)

    # ------------------------------------------------ artifacts

    def curve_png(self) -> None:
        """Learning curves of metrics.jsonl (the whole run, resumes included) against env_steps -> curves.png."""
        if not self.is_main:
            return
        from matplotlib.figure import Figure  # no pyplot: no global state, Agg without asking

        rows = _json_lines(self.run_dir / "metrics.jsonl")
        panels = [(t, k) for t, k in PANELS if any(row.get(key) is not None for row in rows for key in k)]
        if not panels:
            return
        axis = "env_steps" if any("env_steps" in row for row in rows) else "iteration"
        figure = Figure(figsize=(10, 3 * math.ceil(len(panels) / 2)), layout="constrained")
        axes = list(figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False).flat)
        for ax, (title, keys) in zip(axes, panels, strict=False):
            for key, label in keys.items():
                points = [row for row in rows if row.get(key) is not None and row.get(axis) is not None]
                x, y = [row[axis] for row in points], [row[key] for row in points]
                (line,) = ax.plot(x, y, label=label, marker="." if len(x) < 30 else None)
                if key == "eval/ode_success" and all(row.get("eval/episodes") for row in points):
                    n = [row["eval/episodes"] for row in points]
                    band = [wilson_interval(min(max(p, 0), 1) * m, m) for p, m in zip(y, n, strict=True)]
                    low, high = zip(*band, strict=True) if band else ((), ())
                    ax.fill_between(x, low, high, alpha=0.2, color=line.get_color(), label="95% (Wilson)")
            ax.set(title=title, xlabel="env steps" if axis == "env_steps" else axis)
            ax.grid(alpha=0.3)
            if len(keys) > 1:
                ax.legend(fontsize="small")
        for ax in axes[len(panels) :]:
            ax.axis("off")
        atomic_write(self.run_dir / "curves.png", lambda tmp: figure.savefig(tmp, dpi=120))

    def save_gif(self, name: str, frames: Any, success: Any, success_step: Any = None, fps: float = 10) -> Path | None:
        """Tile a group's rollouts into one looping GIF -> videos/<name>.gif, and W&B. Returns its path.

        Args:
            frames: uint8 (F, N, H, W, 3), a tensor or an array; enlarged by whole numbers until a tile is >= 128 px.
            success: (N,) bool. The tile's border is green once it has succeeded.
            success_step: (N,) frame of the first success; without it a successful tile is green from the start.
        Raises ValueError for other shapes or types.
        """
        if not self.is_main:
            return None
        import numpy as np
        from PIL import Image

        frames, success, success_step = (
            x.detach().cpu().numpy() if hasattr(x, "detach") else x for x in (frames, success, success_step)
        )
        frames, success = np.asarray(frames), np.asarray(success, dtype=bool)
        if frames.ndim != 5 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
            raise ValueError(f"save_gif: frames must be uint8 (F, N, H, W, 3), not {frames.dtype} {frames.shape}")
        F, N, H, W, _ = frames.shape
        since = np.zeros(N, dtype=int) if success_step is None else np.asarray(success_step)
        if success.shape != (N,) or since.shape != (N,):
            raise ValueError(f"save_gif: success {success.shape} and success_step {since.shape} must be ({N},)")
        columns = math.ceil(math.sqrt(N))
        rows, scale = math.ceil(N / columns), math.ceil(128 / min(H, W, 128))
        edge = max(2, min(H, W) * scale // 32)

        def grid(f: int) -> Image.Image:  # one frame at a time: the enlarged clip may not fit in memory
            tiles = frames[f].repeat(scale, axis=1).repeat(scale, axis=2)  # (N, h, w, 3)
            border = np.ones(tiles.shape[1:3], dtype=bool)
            border[edge:-edge, edge:-edge] = False
            green = success & (since >= 0) & (f >= since)
            tiles[:, border] = np.where(green[:, None, None], (0, 200, 0), (40, 40, 40)).astype(np.uint8)
            h, w = tiles.shape[1:3]
            canvas = np.zeros((rows * columns, h, w, 3), dtype=np.uint8)
            canvas[:N] = tiles
            canvas = canvas.reshape(rows, columns, h, w, 3).swapaxes(1, 2).reshape(rows * h, columns * w, 3)
            return Image.fromarray(canvas).quantize(128)

        path = self.run_dir / "videos" / f"{name}.gif"
        path.parent.mkdir(parents=True, exist_ok=True)
        later, ms = (grid(f) for f in range(1, F)), round(1000 / fps)
        atomic_write(path, lambda tmp: grid(0).save(tmp, save_all=True, append_images=later, duration=ms, loop=0))

        def upload(run: Any) -> None:
            import wandb

            run.log({"iteration": int(self._latest.get("iteration", 0)), f"video/{name}": wandb.Video(str(path))})

        self._wandb_do(upload)
        return path

    def summary(self, result: dict[str, Any]) -> None:
        """The run's final figures -> summary.json (atomic) and W&B's summary."""
        if not self.is_main:
            return
        plain = _plain(result)
        atomic_write_text(self.run_dir / "summary.json", json.dumps(plain, indent=2) + "\n")
        self._wandb_do(lambda run: run.summary.update(plain))

    def close(self) -> None:
        """Stops the display, finishes W&B, closes the files. A second call does nothing."""
        if not self.is_main or self._metrics.closed:
            return
        if self._live is not None:
            self._live.stop()
            atexit.unregister(self._live.stop)
        self._wandb_do(lambda run: run.finish())
        self.wandb = None
        for source in self._heard:
            source.removeHandler(self._handler)
        self._metrics.close()
        self._log.close()


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
    """Peak memory of this process: allocated on the GPU, or resident on the host [GB]."""
    if str(device).startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


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


# ---------------------------------------------------------------- command line and checkpoints


class UsageError(Exception):
    """Bad input: one line that names the flag and the remedy."""


def pick_device(device: str) -> str:
    """The device that `--device` asks for: cpu, cuda:N; every rank of torchrun gets its own GPU.

    Raises:
        UsageError: no such device.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: must be cpu, cuda, cuda:N or auto")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch sees no CUDA GPU here; use --device cpu")
    if device == "cuda" or (device != "cpu" and "LOCAL_RANK" in os.environ):  # torchrun says which one
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


def check_numbers(args: Any, positive: str, not_negative: str, shares: str = "") -> None:
    """Refuses numbers out of range, of the fields that the strings name; None passes.

    Args:
        shares: numbers from 0 to 1.

    Raises:
        UsageError: names the flag.
    """
    ranges = (
        (positive, lambda x: 0 < x < math.inf, "greater than 0, and finite"),
        (not_negative, lambda x: 0 <= x < math.inf, "0 or more, and finite"),
        (shares, lambda x: 0 <= x <= 1, "from 0 to 1"),
    )
    for names, fits, words in ranges:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not fits(value):
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be {words}")


def check_ranks(args: Any, *names: str) -> None:
    """Refuses a number that torchrun's processes cannot share evenly.

    Raises:
        UsageError: names the flag and what it must be.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name in names:
        if getattr(args, name) % world:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UsageError(f"{flag}: must be a multiple of {world} ranks")


def run_name(args: Any, stem: str) -> str:
    """--exp-name, or one made from script, task, seed and time.

    Raises:
        UsageError: that run exists.
    """
    stem = "eval" if args.evaluate else stem
    name = own = args.exp_name or f"{stem}__{args.task}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    while not args.exp_name and (Path("runs") / name).exists():  # another of the same second
        name = f"{own}_{int(name.removeprefix(own + '_')) + 1 if name != own else 2}"
    resume = getattr(args, "resume", None)
    if not resume and (Path("runs") / name / "metrics.jsonl").exists():
        remedy = f" or --resume runs/{name}" if hasattr(args, "resume") else ""
        raise UsageError(f"--exp-name {name}: that run exists; take another name{remedy}")
    return name


def resumed_args(args: Any) -> Any:
    """The arguments of the run to go on with.

    Raises:
        UsageError: there is none, or a flag contradicts them.
    """
    file = Path(args.resume) / "args.json"
    if not file.is_file():
        raise UsageError(f"--resume {args.resume}: no args.json there; name a folder like runs/<name>")
    try:
        saved = json.loads(file.read_text())["args"]
        saved = type(args)(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()} | {"resume": args.resume})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"--resume {args.resume}: its args.json is not this script's ({error})") from error
    for field in dataclasses.fields(args):
        given, old = getattr(args, field.name), getattr(saved, field.name)
        if field.name != "resume" and given != field.default and given != old:
            flag = f"--{field.name.replace('_', '-')}"
            raise UsageError(f"{flag} {given}: the run to resume has {old}; leave the flag out or start a new run")
    if latest_checkpoint(Path(args.resume)) is None:
        raise UsageError(f"--resume {args.resume}: it has no complete checkpoint yet; start the run again")
    return saved


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run."""
    found = sorted((run_dir / "checkpoints").glob("step_*/trainer_state.pt"))
    return found[-1].parent if found else None


def load_run(args: Any, run_dir: Path, load: Callable[[Path], Any]) -> dict | None:
    """What `save_checkpoint` wrote last, for --resume: `load(folder)` takes the policy, the rest is returned.

    Raises:
        UsageError: the checkpoint is damaged.
    """
    if not args.resume:
        return None
    import torch

    folder = latest_checkpoint(run_dir)
    try:
        load(folder)
        return torch.load(folder / "trainer_state.pt", weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load has many kinds
        raise UsageError(f"--resume {args.resume}: {folder.name} is damaged ({error!r}); remove it") from error


def start_logger(args: Any, run_dir: Path, script: str, sources: list[Path], state: dict | None, ranks: Ranks) -> RunLogger:
    """The run's logger; a resumed run goes on in its files.

    Raises:
        UsageError: the run's folder cannot be written.
    """
    try:
        return RunLogger(
            run_dir, dataclasses.asdict(args), script=script, total_iterations=args.iterations,
            track=args.track, wandb_project=args.wandb_project,
            resume_iteration=state["iteration"] if state else 0,
            is_main=ranks.rank == 0,
            device=args.device,
            sources=sources,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"--exp-name {args.exp_name}: {error}") from error


def save_checkpoint(args: Any, policy: Any, optimizer: Any, run: dict, name: str, logger: RunLogger) -> None:
    """Writes runs/<run>/checkpoints/<name> whole or not at all, and drops outdated ones.

    `policy.save(folder)` writes the policy; `run` and the optimizer's state go to trainer_state.pt, for --resume.
    """
    import torch

    if not logger.is_main:
        return

    def write(partial: Path) -> None:
        policy.save(partial)
        if optimizer is not None:
            torch.save({**run, "optimizer": optimizer.state_dict()}, partial / "trainer_state.pt")

    folder = logger.run_dir / "checkpoints"
    try:
        replace_folder(folder / name, write)
    except Exception as error:  # a full disk, in whatever words the writer has for it: hours of training go on
        logger.event(f"checkpoint {name} could not be written, earlier ones are kept: {error}")
        return
    for outdated in sorted(folder.glob("step_*"))[: -args.keep_checkpoints]:
        shutil.rmtree(outdated)


def check_finite(metrics: dict[str, float], iteration: int, logger: RunLogger, tolerance: float = math.inf) -> None:
    """Stops a run that went wrong; the last checkpoint is from before.

    Args:
        tolerance: of the first minibatch's ratio, which is 1 where nothing has been learned yet.

    Raises:
        UsageError: a number is not finite, or the first ratio is not 1.
    """
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        logger.event(f"not finite in iteration {iteration}: {', '.join(bad)}; stopped, earlier checkpoints are kept")
        raise UsageError(f"{', '.join(bad)} became nan or inf: lower --learning-rate or --clip and --resume")
    error = metrics.get("update/first_ratio_error", 0.0)
    if error > tolerance:
        raise UsageError(f"ratio on the first minibatch is off by {error:.1e}: rollout and update disagree; a bug")


def steps_per_second(steps: int, seconds: dict[str, float]) -> dict[str, float]:
    """Environment steps per second of the simulator alone, with the policy, and with everything."""
    env, policy = seconds["env"], seconds["policy"]
    return {"env": steps / env, "policy": steps / (env + policy), "train": steps / sum(seconds.values())}


def close_iteration(run: dict[str, Any], timer: StageTimer, iteration: int, steps: int) -> dict[str, float]:
    """Counts an iteration of so many environment steps as done in `run`; returns what it took, for the log."""
    seconds = timer.seconds()
    run["iteration"] = iteration + 1
    run["stages"] = {name: value + run["stages"].get(name, 0.0) for name, value in seconds.items()}
    speeds = {f"sps/{name}": value for name, value in steps_per_second(steps, seconds).items()}
    return {"env_steps": (iteration + 1) * steps, **speeds, **{f"time/{name}": value for name, value in seconds.items()}}


def run_summary(args: Any, algorithm: str, run: dict[str, Any], steps: int, ranks: Ranks) -> dict[str, Any]:
    """What every run's summary.json begins with; `steps` are the environment steps of one iteration."""
    names = ("task", "seed", "iterations", "device", "checkpoint", "num_envs")
    return {
        "algorithm": algorithm,
        **{name: getattr(args, name) for name in names},
        "world_size": ranks.world,
        "env_steps": args.iterations * steps,
        "seconds": run["elapsed"],
        "peak_memory_gb": peak_memory_gb(args.device),
        "steps_per_second": steps_per_second(args.iterations * steps, run["stages"]),
    }


# ---------------------------------------------------------------- several processes


class Ranks(NamedTuple):
    """This process among those of torchrun; 0 of 1 without it."""

    rank: int
    world: int

    @classmethod
    def start(cls, device: str) -> Ranks:
        """Joins the process group that torchrun describes: gloo on a CPU, NCCL on GPUs."""
        ranks = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if device.startswith("cuda"):
            import torch

            torch.cuda.set_device(device)
        if ranks.world > 1:
            import torch.distributed as dist

            dist.init_process_group("gloo" if device == "cpu" else "nccl")
        return ranks

    def stop(self) -> None:
        """Leaves the process group."""
        if self.world > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, everywhere."""
        if self.world == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

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
        """Sums gradients over the ranks in one message; a rank without samples counts as zero."""
        if self.world == 1:
            return
        import torch

        parameters = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.reduce(torch.cat([g.flatten() for g in grads]))
        for p, g in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
            p.grad = g.view_as(p).clone()


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


def to_host(sums: dict[str, Tensor], maxima: dict[str, Tensor], ranks: Ranks) -> dict[str, list[float]]:
    """Brings an iteration's figures to the host in one transfer, added (or the largest taken) over the ranks.

    Args:
        sums, maxima: tensors of any shape, the same names and shapes on every rank.

    Returns:
        The numbers of each, flattened.
    """
    import torch

    total = ranks.reduce(torch.cat([x.reshape(-1).float() for x in sums.values()]))
    highest = ranks.reduce(torch.cat([x.reshape(-1).float() for x in maxima.values()]), maximum=True)
    host = iter(torch.cat([total, highest]).tolist())  # the transfer
    return {name: [next(host) for _ in range(x.numel())] for name, x in (sums | maxima).items()}
