"""GAE: common.gae against CleanRL's loop, torch.compile of the same loop, and numba, interleaved, medians.

    python benchmarks/gae.py                          # CPU, one thread
    python benchmarks/gae.py --device cuda --iteration-seconds 0.4

The share of an iteration stands beside the speed-up: a kernel that is 6x faster in 1% of the time is worth 0.8%.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

GAMMA, LAM = 0.99, 0.95


def loop(rewards, values, terminated, truncated, final_values, last_value):
    """CleanRL's loop (ppo_continuous_action.py), with time-outs told from terminations."""
    T = rewards.shape[0]
    advantages = torch.zeros_like(rewards)  # (T, N)
    last = torch.zeros_like(last_value)  # (N,)
    for t in reversed(range(T)):
        next_value = last_value if t == T - 1 else values[t + 1]
        next_value = torch.where(truncated[t], final_values[t], next_value) * (~terminated[t]).float()
        delta = rewards[t] + GAMMA * next_value - values[t]
        last = delta + GAMMA * LAM * (~(terminated[t] | truncated[t])).float() * last
        advantages[t] = last
    return advantages, advantages + values


def contenders(device: str) -> dict:
    def ours(backend):
        return lambda *x: common.gae(*x, GAMMA, LAM, backend=backend)

    # dynamic=False: the unrolled loop is compiled once per T
    compiled = torch.compile(loop, dynamic=False)
    found = {"loop": loop, "common.gae, torch": ours("torch"), "torch.compile(loop)": compiled}
    if device.startswith("cuda"):
        return {**found, "common.gae, triton": ours("triton")}
    try:
        import numba
        import numpy as np
    except ImportError:
        return found

    @numba.njit(fastmath=False)
    def kernel(rewards, values, terminated, truncated, final_values, last_value):
        T, N = rewards.shape
        advantages, last = np.empty_like(rewards), np.zeros(N, np.float32)
        gamma, lam = np.float32(GAMMA), np.float32(LAM)
        for t in range(T - 1, -1, -1):
            for n in range(N):
                next_value = last_value[n] if t == T - 1 else values[t + 1, n]
                if truncated[t, n]:
                    next_value = final_values[t, n]
                if terminated[t, n]:
                    next_value = np.float32(0)
                if terminated[t, n] or truncated[t, n]:
                    last[n] = np.float32(0)
                last[n] = rewards[t, n] + gamma * next_value - values[t, n] + gamma * lam * last[n]
                advantages[t, n] = last[n]
        return advantages, advantages + values

    found["numba"] = lambda *x: tuple(torch.from_numpy(a) for a in kernel(*(y.numpy() for y in x)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-envs", type=int, default=4096)
    parser.add_argument("--steps", type=int, nargs="+", default=[24, 32, 64])
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--iteration-seconds", type=float, help="length of one training iteration, for the share")
    args = parser.parse_args()
    torch.set_num_threads(1)
    sync = torch.cuda.synchronize if args.device.startswith("cuda") else lambda: None
    functions = contenders(args.device)
    name = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else "CPU, one thread"
    print(f"{name}, N = {args.num_envs}, float32, median of {args.repeats} interleaved calls\n")
    share = " | share of an iteration" if args.iteration_seconds else ""
    print(f"| T | variant | ms (quartiles) | against the loop | max difference{share} |")
    print("|---|---|---|---|---|" + ("---|" if share else ""))
    for T in args.steps:
        g = torch.Generator().manual_seed(T)
        shape = (T, args.num_envs)
        rewards, values, final_values = (torch.randn(shape, generator=g) for _ in range(3))
        terminated, truncated = (torch.rand(shape, generator=g) < 0.02 for _ in range(2))
        last_value = torch.randn(args.num_envs, generator=g)
        x = [t.to(args.device) for t in (rewards, values, terminated, truncated, final_values, last_value)]
        outputs = {key: f(*x)[0].clone() for key, f in functions.items()}  # also compiles
        times: dict[str, list[float]] = {key: [] for key in functions}
        for _ in range(args.repeats):
            for key, f in functions.items():
                sync()
                start = time.perf_counter()
                f(*x)
                sync()
                times[key].append(time.perf_counter() - start)
        base = statistics.median(times["loop"])
        for key, values_s in times.items():
            low, median, high = statistics.quantiles(values_s, n=4)
            error = (outputs[key] - outputs["loop"]).abs().max().item()
            part = f" | {median / args.iteration_seconds:.2%}" if args.iteration_seconds else ""
            ms = f"{median * 1e3:.3f} ({low * 1e3:.3f}-{high * 1e3:.3f})"
            print(f"| {T} | {key} | {ms} | {base / median:.2f}x | {error:.1e}{part} |", flush=True)


if __name__ == "__main__":
    main()
