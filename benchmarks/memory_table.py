"""What `--max-memory-gb` plans for the full-size network: micro-batch and place of the features. No GPU needed.

    python benchmarks/memory_table.py

Shapes alone, on the meta device; the host is taken to have room for the features. Estimates, not measurements.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gr00t_n1d5 import Gr00tConfig, Gr00tN1d5, memory_plan

CARDS = {24: 22, 40: 37, 80: 75, 141: 132}  # GB of a card: the budget, the rest is for the simulator
ADAPTERS = 17_700_000  # parameters that ppo_gr00t_lora.py trains by default, critic included (throughput.py --what predict)


def make_policy(lora: bool) -> nn.Module:
    """As the scripts hold it: backbone in bfloat16, one embodiment, head in fp32; without LoRA also the base head."""
    with torch.device("meta"):
        policy, config = nn.Module(), Gr00tConfig(num_embodiments=1)
        policy.net = Gr00tN1d5(config)
        if lora:
            policy.net.requires_grad_(False)
            policy.adapters = nn.Parameter(torch.empty(ADAPTERS))
        else:
            policy.base = Gr00tN1d5(config).action_head.requires_grad_(False)
    policy.net.backbone.bfloat16().requires_grad_(False)
    return policy


def main() -> None:
    print("| script | views | chunks | environments | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---|---|---|---|" + "---|" * len(CARDS))
    for name in ("GRPO, PPO frozen", "LoRA on the head"):
        policy = make_policy(lora=name.startswith("LoRA"))
        for views, chunks in ((1, 2), (1, 28), (2, 2), (2, 28)):
            for envs in (64, 1024, 4096):
                cells = []
                for budget in CARDS.values():
                    args = SimpleNamespace(
                        device="cuda", feature_cache="gpu", backbone_bf16=True, activation_checkpointing=False,
                        compile=False, micro_batch_size=128, max_memory_gb=budget,
                    )  # fmt: skip
                    _, remedy = memory_plan(args, policy, envs * chunks, 1, views, 19 + 263 * views)
                    cells.append(remedy or f"{args.micro_batch_size} {args.feature_cache}")
                print(f"| {name} | {views} | {chunks} | {envs} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    with (
        mock.patch("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=141e9)),
        mock.patch("torch.cuda.set_per_process_memory_fraction", lambda share, device: None),
        mock.patch("psutil.virtual_memory", lambda: SimpleNamespace(available=1e15)),
    ):
        main()
