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

from gr00t_n1d5.network import Gr00tConfig, Gr00tN1d5
from gr00t_n1d5.policy import plan_memory
from sft_gr00t import FULL

CARDS = {24: 22, 40: 37, 80: 75, 141: 132}  # GB of a card: the budget, the rest is for the simulator
ADAPTERS = 17_700_000  # parameters that ppo_gr00t_lora.py trains by default, critic included (throughput.py --what predict)


def make_policy(lora: bool, views: int) -> nn.Module:
    """What the plan reads of a policy: backbone in bfloat16, one embodiment, head in fp32; without LoRA also the base head."""
    with torch.device("meta"):
        policy, config = nn.Module(), Gr00tConfig(num_embodiments=1)
        policy.prompts = torch.empty(1, 19 + 263 * views)
        policy.net = Gr00tN1d5(config)
        if lora:
            policy.net.requires_grad_(False)
            policy.adapters = nn.Parameter(torch.empty(ADAPTERS))
        else:
            policy.base = Gr00tN1d5(config).action_head.requires_grad_(False)
    policy.net.backbone.bfloat16().requires_grad_(False)
    policy.device, policy.views, policy.bf16, policy.trains_backbone = torch.device("cuda"), views, True, False
    policy.base_mean = None  # there is a base model
    return policy


def imitation(views: int, tune: str) -> str:
    """The plan of sft_gr00t.py at full size."""
    policy = make_policy(True, views)
    del policy.base_mean, policy.adapters
    policy.trains_backbone, policy.bf16 = tune == "all", tune != "all"
    (policy.net.float() if tune == "all" else policy.net.action_head).requires_grad_(True)
    average = {"moving average": 4 * sum(p.numel() for p in policy.parameters() if p.requires_grad)}
    return plan_memory(policy, FULL.batch_size, 1, "off", FULL.micro_batch_size, FULL.max_memory_gb, False, False, average)[2]


def main() -> None:
    print("| script | views | chunks | environments | " + " | ".join(f"{card} GB" for card in CARDS) + " |")
    print("|---|---|---|---|" + "---|" * len(CARDS))
    for name in ("GRPO, PPO frozen", "LoRA on the head"):
        for views, chunks in ((1, 2), (1, 28), (2, 2), (2, 28)):
            policy = make_policy(name.startswith("LoRA"), views)
            for envs in (64, 1024, 4096):
                cells = []
                for budget in CARDS.values():
                    try:
                        cache, micro, _ = plan_memory(policy, envs, chunks, "gpu", 128, budget, False, False)
                        cells.append(f"{micro} {cache}")
                    except SystemExit as error:
                        cells.append(str(error))
                print(f"| {name} | {views} | {chunks} | {envs} | " + " | ".join(cells) + " |", flush=True)
    for tune in ("head", "all"):
        for views in (1, 2, 3):
            print(f"sft_gr00t.py --tune {tune}, {views} views: {imitation(views, tune)}", flush=True)


if __name__ == "__main__":
    with (
        mock.patch("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=141e9)),
        mock.patch("torch.cuda.set_per_process_memory_fraction", lambda share, device: None),
        mock.patch("psutil.virtual_memory", lambda: SimpleNamespace(available=1e15)),
    ):
        main()
