"""The plan for a memory budget against the bytes that the scripts' own rollout and update hold, at full size.

On fake CUDA tensors, which have sizes and no numbers: no GPU, and no memory, is needed. What torch's allocator wastes, and
what CUDA and the simulator hold, is not in these figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from benchmarks import throughput
from common import Metrics
from gr00t_n1d5.network import Gr00tN1d5
from gr00t_n1d5.policy import plan_memory

ALONE, DEVICE = throughput.ALONE, "cpu"


class Bytes(TorchDispatchMode):
    """Counts the bytes of all storages while they live."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.now += (size := storage.nbytes())
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, storage._cdata, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return out


def Noise():
    return common.Noise(DEVICE, ALONE, 0)


class Env:
    """What `rollout` needs of a ChunkEnv; observations are made anew for each moment, as a simulator makes them."""

    def __init__(self, task, envs: int, views: int, size: int):
        self.task, self.num_envs, self.shape = task, envs, (envs, views, size, size, 3)
        self.success = torch.empty(envs, dtype=torch.bool, device=DEVICE)
        self.ended, self.reward = self.success, torch.empty(envs, device=DEVICE)

    def reset(self, *_):
        n, sizes = self.num_envs, self.task.sizes
        seen = {"images": torch.empty(self.shape, dtype=torch.uint8, device=DEVICE)}
        seen |= {
            "state": torch.empty(n, sizes["state"], device=DEVICE),
            "critic": torch.empty(n, sizes["state"] + 1, device=DEVICE),
        }
        return TensorDict(seen | {"prompt": torch.empty(n, dtype=torch.long, device=DEVICE)}, n)

    def step_chunk(self, actions, last=False):
        return None if last else self.reset()


def make_net(config, device, dtype, seed):
    """Backbone in bf16, head in fp32: as it is after the policy's conversions, which fake parameters do not bear."""
    with torch.device(device):
        net = Gr00tN1d5(config).eval()
    for name, p in list(net.named_parameters()):
        if name.startswith("backbone."):
            net._put(name, torch.empty(p.shape, dtype=dtype, device=device))
    return net


def timer(stage):
    return contextlib.nullcontext()


def only_twice(denoise):
    """The first two micro-batches of a kind as they are; of the others, outputs of these sizes: what is inside repeats."""
    seen: dict = {}

    def called(part):
        key = (len(part), "k" in part.keys())
        seen.setdefault(key, [])
        if len(seen[key]) < 2:
            out = denoise(part)
            seen[key].append({name: (x.shape, x.dtype) for name, x in out.items()})
            return out
        return TensorDict({name: torch.empty(s, dtype=t, device=DEVICE) for name, (s, t) in seen[key][-1].items()}, len(part))

    return called


def measured(name: str, views: int, envs: int, budget: float, **flags) -> tuple[dict[str, float], str]:
    """Most bytes that a rollout, an update and an evaluation hold at once [GB], and what was planned for all of them."""
    args, config = throughput.Args(device=DEVICE, dtype="bfloat16"), throughput.make_config("full")
    processor = throughput.make_processor(config, views)  # of real numbers
    patches = (
        mock.patch.object(throughput, "make_processor", lambda *_: processor),
        mock.patch.object(common, "seeded_generator", lambda *_: None),
        mock.patch.object(common, "_triton", lambda: None),
        mock.patch.object(throughput, "make_net", make_net),
        mock.patch.object(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=1e12)),
        mock.patch.object(torch.cuda, "set_per_process_memory_fraction", lambda *_: None),
        FakeTensorMode(allow_non_fake_inputs=True),
    )
    found: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        held = stack.enter_context(Bytes())
        with (
            mock.patch.object(nn.Module, "to", lambda self, *_, **__: self),
            mock.patch.object(nn.Module, "float", lambda self: self),
        ):
            script, own, policy = throughput.make_actor(name, args, config, views, num_envs=envs, **flags)
        env = Env(script.TASKS[own.task], envs, views, policy.camera_size)
        chunks = env.task.horizon // policy.chunk
        own.feature_cache, own.micro_batch_size, line = plan_memory(
            policy, envs, chunks, own.feature_cache, own.micro_batch_size, budget, own.activation_checkpointing, False
        )
        policy.micro_batch_size = own.micro_batch_size
        policy.denoise = only_twice(policy.denoise)
        critic = list(policy.critic.parameters()) if hasattr(policy, "critic") else []
        optimizer = torch.optim.AdamW([*policy.trainable(), *critic], own.learning_rate, foreach=True)
        rows = torch.empty(3 * own.micro_batch_size, dtype=torch.long, device=DEVICE)
        size = torch.empty((), device=DEVICE)
        for i in range(2):  # the second iteration has gradients and the optimizer's state beside it
            held.peak = held.now
            samples = script.rollout(env, policy, own, i, ALONE, timer)
            found["rollout"] = held.peak / 1e9
            held.peak, log = held.now, Metrics(DEVICE, ALONE)
            script.advantages(samples, env.success, own, ALONE, log)
            script.update(policy, optimizer, samples, [(rows, size, *([True] if critic else []))] * 2, own, ALONE, log)
            found["update"] = held.peak / 1e9
            del samples
        held.peak = held.now
        policy.act(env.reset(), Noise(), False)
        found["evaluation"] = held.peak / 1e9
    return found, line


@pytest.mark.slow
@pytest.mark.parametrize("views, envs, budget", [(1, 4096, 40), (2, 256, 60)])
@pytest.mark.parametrize("name", ["grpo_gr00t", "grpo_gr00t_lora", "ppo_gr00t_frozen", "ppo_gr00t_lora"])
def test_what_is_planned_is_what_is_held(name, views, envs, budget):
    # fake tensors are not let go: a process of its own
    command = [sys.executable, "-W", "ignore", __file__, name, str(views), str(envs), str(budget)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    found, line = json.loads(run.stdout.splitlines()[-1])
    planned = sum(float(x) for x in re.findall(r"[a-zA-Z] (\d+\.\d+)", line.partition(" GB")[0]))
    assert max(found.values()) <= planned <= budget, (found, line)
    assert found["update"] > 0.75 * planned, (found, line)  # nor is memory left unused


if __name__ == "__main__":
    print(json.dumps(measured(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))), flush=True)
    os._exit(0)  # torch does not always survive the interpreter's end after fake tensors
