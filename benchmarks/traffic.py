"""What a full-size policy call should take on a GPU, from operations and bytes: eager and compiled, head in TF32 or bf16.

    python benchmarks/traffic.py        # two minutes, no GPU

A PREDICTION. One block of each kind, on fake tensors; products take their operations at the rate below, all other kernels
the bytes that they read and write. Eager: every ATen call reads and writes its tensors. Compiled: what TorchInductor's
scheduler (its CPU backend) leaves after fusing. Launches, caches and the few layers outside the blocks are left out.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.scheduler import ExternKernelSchedulerNode, NopKernelSchedulerNode, Scheduler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gr00t_n1d5.config import Gr00tConfig
from gr00t_n1d5.network import ActionHead, Backbone

B, TEXT = 128, 20  # observations of a call, tokens of its prompt beside those of one view
RATE = {"bf16": 790e12, "TF32": 400e12}  # of products on an H200 [1/s]: bf16 measured, TF32 at 80% of NVIDIA's figure
BANDWIDTH = 4e12  # of everything else [B/s], 83% of the data sheet's
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "attention", "convolution")


class Eager(TorchDispatchMode):
    """Bytes of all calls but products and views."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if func.is_view or any(word in func.__name__ for word in (*PRODUCTS, "empty", "_unsafe_view", "detach")):
            return out
        self.bytes += sum(x.numel() * x.element_size() for x in (*inputs, *outputs))
        return out


class Counted(Exception):
    """The scheduler has been seen; nothing is to be run."""


def compiled_bytes(module: nn.Module, inputs: tuple, named: dict) -> int:
    """Bytes of the kernels that TorchInductor would write."""
    found = Counter()

    def count(scheduler: Scheduler) -> None:
        for node in scheduler.nodes:
            if not isinstance(node, NopKernelSchedulerNode):
                found[isinstance(node, ExternKernelSchedulerNode)] += node.get_read_write_buffers_sizes()
        raise Counted

    usual, Scheduler.codegen = Scheduler.codegen, count
    torch._dynamo.reset()
    try:
        torch.compile(module, dynamic=False)(*inputs, **named)
    except Exception as error:
        if not found:
            raise RuntimeError("nothing was compiled") from error
    finally:
        Scheduler.codegen = usual
    return found[False]


def main() -> None:
    torch._inductor.config.force_disable_caches = True
    config = Gr00tConfig(num_embodiments=1)
    L, T = config.tokens_per_view + TEXT, 1 + config.num_target_vision_tokens + config.action_horizon
    total: dict[str, Counter] = {}

    def add(part: str, module: nn.Module, times: int, *inputs: Any, **named: Any) -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, not part.endswith("TF32")):
            with FlopCounterMode(display=False) as operations:
                module(*inputs, **named)
            with Eager() as eager:
                module(*inputs, **named)
            fused = compiled_bytes(module, inputs, named)
        found = {"operations": operations.get_total_flops(), "eager": eager.bytes, "compiled": fused}
        total.setdefault(part, Counter()).update({name: times * x for name, x in found.items()})

    def half(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.bfloat16)
        backbone = Backbone(config)
        torch.set_default_dtype(torch.float32)
        head, llm = ActionHead(config), backbone.language_model
        seen, wide = half(B, config.tokens_per_view, config.vision_hidden_size), half(B, L, config.text_hidden_size)
        add("backbone, bf16", backbone.vision_model.encoder.layers[0], config.vision_layers, seen, None)
        rotary = llm.rotary_emb(wide, torch.arange(L)[None])
        named = {"attention_mask": None, "position_embeddings": rotary}
        add("backbone, bf16", llm.layers[0], config.text_layers, wide, **named)
        x, tokens, time = torch.empty(wide.shape), torch.empty(B, T, config.dit_dim), torch.empty(B, config.dit_dim)
        pair = (torch.empty(B, config.dit_heads, L, config.dit_head_dim),) * 2
        for kind in RATE:
            own = tuple(p.bfloat16() for p in pair) if kind == "bf16" else pair
            add(f"encoder, {kind}", head.vl_self_attention.transformer_blocks[0], config.vl_layers, x)
            add(f"encoder, {kind}", head.model.transformer_blocks[0].attn1.to_k, config.dit_layers, x)
            calls = config.num_inference_timesteps * config.dit_layers // 2
            add(f"{config.num_inference_timesteps} steps, {kind}", head.model.transformer_blocks[0], calls, tokens, time, own)
            add(f"{config.num_inference_timesteps} steps, {kind}", head.model.transformer_blocks[1], calls, tokens, time, None)

    ms: dict[str, dict[str, float]] = {}
    print(f"{B} observations [ms]\n\n| part | products | other kernels, eager | compiled |\n|---|---|---|---|")
    for part, x in total.items():
        products = 1e3 * x["operations"] / RATE[part[-4:]]
        ms[part] = {way: products + 1e3 * x[way] / BANDWIDTH for way in ("eager", "compiled")}
        print(f"| {part} | {products:.0f} | {1e3 * x['eager'] / BANDWIDTH:.0f} | {1e3 * x['compiled'] / BANDWIDTH:.0f} |")
    print("\n| head | env steps/s, eager | compiled |\n|---|---|---|")
    for name, kinds in {"TF32": ("TF32", "TF32"), "bf16, steps in TF32": ("bf16", "TF32"), "bf16": ("bf16", "bf16")}.items():
        parts = ("backbone, bf16", f"encoder, {kinds[0]}", f"{config.num_inference_timesteps} steps, {kinds[1]}")
        rates = (1e3 * B * config.action_horizon / sum(ms[part][way] for part in parts) for way in ("eager", "compiled"))
        print(f"| {name} | {' | '.join(f'{rate:,.0f}' for rate in rates)} |")


if __name__ == "__main__":
    main()
