"""The plan for a memory budget: micro-batches and the place of features, at full size on the meta device."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import Ranks, UsageError
from gr00t_n1d5 import CategorySpecificLinear, Gr00tConfig, Gr00tN1d5, memory_plan
from gr00t_tasks import check_memory

SAMPLES, LENGTH = 8192, 276  # 4096 environments of two chunks; tokens of a prompt with one view


@pytest.fixture(scope="module")
def policy():
    """As grpo_gr00t.py holds it: backbone in bfloat16, one embodiment, head and base head in fp32."""
    with torch.device("meta"):
        policy = nn.Module()
        policy.net = Gr00tN1d5(Gr00tConfig(num_embodiments=1))
        policy.base = Gr00tN1d5(Gr00tConfig(num_embodiments=1)).action_head.requires_grad_(False)
    policy.net.backbone.bfloat16().requires_grad_(False)
    return policy


def given(budget: float | None, **flags) -> SimpleNamespace:
    plain = {"device": "cuda", "feature_cache": "gpu", "backbone_bf16": True, "activation_checkpointing": False}
    plain |= {"compile": False}
    return SimpleNamespace(
        **{**plain, "micro_batch_size": 128, "max_memory_gb": budget, **flags}
    )


@pytest.fixture
def fraction(monkeypatch):
    """A GPU of 100 GB, and what share of it the plan asks for."""
    asked = []
    properties = SimpleNamespace(total_memory=100e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append(share))
    return asked


def total(plan: str) -> float:
    return sum(float(x) for x in re.findall(r"[a-zA-Z] (\d+\.\d+)", plan.partition(" GB")[0]))


def test_weights_and_optimizer_are_those_of_the_parameters(policy, fraction):
    plan, _ = memory_plan(given(40), policy, SAMPLES, 1, 1, LENGTH)
    head = sum(p.numel() for p in policy.net.action_head.parameters())
    row = sum(p.numel() for m in policy.net.modules() if isinstance(m, CategorySpecificLinear) for p in m.parameters())
    assert head == 1_068_806_144 - 31 * row  # the public layout's head has 32 rows
    backbone = sum(p.numel() for p in policy.net.backbone.parameters())
    assert f"weights {(2 * backbone + 8 * head) / 1e9:.2f}," in plan
    assert f"AdamW {12 * head / 1e9:.2f}," in plan
    assert f"{SAMPLES} samples an iteration {SAMPLES * (2 * LENGTH * 2048 + 8 * 16 * 32) / 1e9:.2f}," in plan


@pytest.mark.parametrize("budget", [200, 60, 40, 30, 24])
def test_the_plan_is_within_the_budget(policy, fraction, budget):
    args = given(budget)
    plan, remedy = memory_plan(args, policy, SAMPLES, 1, 1, LENGTH)
    assert remedy == "" and total(plan) <= budget
    assert policy.micro_batch_size == args.micro_batch_size and f"micro-batches of {args.micro_batch_size}" in plan
    assert fraction == [pytest.approx(min(budget / 100, 1))]
    if budget == 200:
        assert (args.feature_cache, args.micro_batch_size) == ("gpu", 128)  # nothing has to give way
    if budget == 24:
        assert args.feature_cache != "gpu"  # 9.3 GB of features beside 18 GB of weights and optimizer state


def test_larger_where_there_is_more(policy, fraction):
    """More memory never means smaller micro-batches at the same place of the features."""
    found = {}
    for budget in (22, 24, 28, 32, 40, 60, 100):
        args = given(budget)
        memory_plan(args, policy, SAMPLES, 1, 1, LENGTH)
        found.setdefault(args.feature_cache, []).append(args.micro_batch_size)
    assert len(found) > 1 and all(sizes == sorted(sizes) for sizes in found.values())


def test_captured_sampling_and_float8_weights_are_counted(policy, fraction):
    """A captured graph holds keys and values of every second of 16 blocks, and features, for one micro-batch."""
    plain, _ = memory_plan(given(200), policy, SAMPLES, 1, 1, LENGTH)
    captured, _ = memory_plan(given(200, compile=True), policy, SAMPLES, 1, 1, LENGTH)
    held = 4 * LENGTH * (8 * 2 * 1536 + 4 * 2048) * 128 / 1e9  # fp32
    assert "captured" not in plain and f"captured sampling {held:.2f}" in captured
    assert total(captured) == pytest.approx(total(plain) + held, abs=0.02)
    layers = [m for name, m in policy.net.backbone.named_modules() if ".layers." in name and isinstance(m, torch.nn.Linear)]
    rounded = sum(m.weight.numel() + 4 * len(m.weight) for m in layers) / 1e9
    rounding = copy.deepcopy(policy)
    rounding.net.backbone.to_fp8()
    assert total(memory_plan(given(200), rounding, SAMPLES, 1, 1, LENGTH)[0]) == pytest.approx(total(plain) + rounded, abs=0.02)


def test_too_small_a_budget_names_the_smallest_that_fits(policy, fraction):
    plan, remedy = memory_plan(given(10), policy, SAMPLES, 1, 1, LENGTH)
    least = float(remedy.removeprefix("--max-memory-gb "))
    assert "above the budget of 10 GB" in plan and 10 < least < 24 and fraction == []
    assert memory_plan(given(least), policy, SAMPLES, 1, 1, LENGTH)[1] == ""
    assert memory_plan(given(least - 0.2), policy, SAMPLES, 1, 1, LENGTH)[1] != ""


def test_what_was_chosen_is_not_made_larger(policy, fraction):
    args = given(200, feature_cache="off", micro_batch_size=8)
    memory_plan(args, policy, SAMPLES, 1, 1, LENGTH)
    assert (args.feature_cache, args.micro_batch_size) == ("off", 8)


def test_on_a_cpu_features_are_kept_or_computed_again(policy):
    args = given(24, device="cpu")
    assert memory_plan(args, policy, SAMPLES, 1, 1, LENGTH)[1] == "" and args.feature_cache == "off"


@pytest.mark.parametrize("world, steps, all_steps", [(1, 4, False), (1, 4, True), (2, 3, True)])
def test_a_rank_keeps_the_samples_of_its_environments(policy, fraction, world, steps, all_steps):
    """What a script asks of the plan: policy calls of this rank, one noisy step of each or all."""
    policy = copy.copy(policy)
    policy.rollout_chunks, policy.stochastic_steps, policy.all_steps = 2, steps, all_steps
    policy.prompts = torch.zeros(2, LENGTH, device="meta")
    args = given(200, task="Tabletop-Lift-Cube-v0", num_envs=4096)  # one camera
    expected, _ = memory_plan(given(200), policy, SAMPLES // world, steps if all_steps else 1, 1, LENGTH)
    assert check_memory(args, policy, Ranks(0, world)) == expected
    with pytest.raises(UsageError, match=r"^--num-envs 4096: .* budget of 1 GB; use fewer, or --max-memory-gb \d"):
        check_memory(given(1, task="Tabletop-Lift-Cube-v0", num_envs=4096), policy, Ranks(0, world))
