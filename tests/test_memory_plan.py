"""The plan for a memory budget: micro-batches and the place of features, at full size on the meta device."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gr00t_n1d5.network import CategorySpecificLinear, Gr00tConfig, Gr00tN1d5
from gr00t_n1d5.policy import plan_memory

SAMPLES, LENGTH = 8192, 276  # 4096 environments of two chunks; tokens of a prompt with one view
GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(scope="module")
def policy():
    """As grpo_gr00t.py holds it: backbone in bfloat16, one embodiment, head and base head in fp32."""
    with torch.device("meta"):
        policy = nn.Module()
        policy.net = Gr00tN1d5(Gr00tConfig(num_embodiments=1))
        policy.base_head = Gr00tN1d5(Gr00tConfig(num_embodiments=1)).action_head.requires_grad_(False)
        policy.prompts = torch.zeros(2, LENGTH)
    policy.net.backbone.bfloat16().requires_grad_(False)
    policy.base_mean = None  # there is a base model
    policy.views, policy.bf16, policy.device, policy.trains_backbone = 1, True, GPU, False
    return policy


def plan(policy, budget: float | None, samples: int = SAMPLES, cache: str = "gpu", micro: int = 128, compiled: bool = False):
    """Place of features, micro-batch size, line for the log."""
    return plan_memory(policy, samples // 2, 2, cache, micro, budget, checkpointing=False, compiled=compiled)


@pytest.fixture(autouse=True)
def fraction(monkeypatch):
    """A GPU of 100 GB, and what share of it the plan asks for."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100e9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: asked.append(share))
    return asked


def total(line: str) -> float:
    return sum(float(x) for x in re.findall(r"[a-zA-Z] (\d+\.\d+)", line.partition(" GB")[0]))


def test_weights_and_optimizer_are_those_of_the_parameters(policy):
    _, _, line = plan(policy, 40)
    head = sum(p.numel() for p in policy.net.action_head.parameters())
    row = sum(p.numel() for m in policy.net.modules() if isinstance(m, CategorySpecificLinear) for p in m.parameters())
    assert head == 1_068_806_144 - 31 * row  # the public layout's head has 32 rows
    backbone = sum(p.numel() for p in policy.net.backbone.parameters())
    assert f"weights {(2 * backbone + 8 * head) / 1e9:.2f}," in line
    assert f"AdamW {12 * head / 1e9:.2f}," in line
    assert f"{SAMPLES} samples an iteration {SAMPLES * (2 * LENGTH * 2048 + 8 * 16 * 32) / 1e9:.2f}," in line


@pytest.mark.parametrize("budget", [200, 60, 40, 30, 24])
def test_the_plan_is_within_the_budget(policy, fraction, budget):
    cache, micro, line = plan(policy, budget)
    assert total(line) <= budget and f"micro-batches of {micro}" in line
    assert fraction == [pytest.approx(min(budget / 100, 1))]
    if budget == 200:
        assert (cache, micro) == ("gpu", 128)  # nothing has to give way
    if budget == 24:
        assert cache != "gpu"  # 9.3 GB of features beside 18 GB of weights and optimizer state


def test_larger_where_there_is_more(policy):
    """More memory never means smaller micro-batches at the same place of the features."""
    found = {}
    for budget in (22, 24, 28, 32, 40, 60, 100):
        cache, micro, _ = plan(policy, budget)
        found.setdefault(cache, []).append(micro)
    assert len(found) > 1 and all(sizes == sorted(sizes) for sizes in found.values())


def test_captured_sampling_and_float8_weights_are_counted(policy):
    """A captured graph holds keys and values of every second of 16 blocks, and features, for one micro-batch."""
    plain, captured = (plan(policy, 200, compiled=compiled)[2] for compiled in (False, True))
    held = 4 * LENGTH * (8 * 2 * 1536 + 4 * 2048) * 128 / 1e9  # fp32
    assert "captured" not in plain and f"captured sampling {held:.2f}" in captured
    assert total(captured) == pytest.approx(total(plain) + held, abs=0.02)
    layers = [m for name, m in policy.net.backbone.named_modules() if ".layers." in name and isinstance(m, torch.nn.Linear)]
    rounded = sum(m.weight.numel() + 4 * len(m.weight) for m in layers) / 1e9
    rounding = copy.deepcopy(policy)
    rounding.net.backbone.to_fp8()
    assert total(plan(rounding, 200)[2]) == pytest.approx(total(plain) + rounded, abs=0.02)


def test_too_small_a_budget_names_the_smallest_that_fits(policy, fraction):
    with pytest.raises(SystemExit, match="^--max-memory-gb 10: an estimate of ") as refused:
        plan(policy, 10)
    least = float(re.search(r"estimate of ([\d.]+) GB at least", str(refused.value))[1])
    assert 10 < least < 24 and fraction == []
    plan(policy, least)
    with pytest.raises(SystemExit):
        plan(policy, least - 0.2)


def test_what_was_chosen_is_not_made_larger(policy):
    assert plan(policy, 200, cache="off", micro=8)[:2] == ("off", 8)


def test_on_a_cpu_features_are_kept_or_computed_again(policy, monkeypatch):
    policy = copy.copy(policy)
    policy.device = CPU
    assert plan(policy, 24)[0] == "off"
    for available, fits in ((20e9, True), (1e9, False)):  # without a budget what is free counts
        monkeypatch.setattr("psutil.virtual_memory", lambda available=available: SimpleNamespace(available=available))
        if fits:
            assert plan(policy, None)[:2] == ("gpu", 128)
        else:
            with pytest.raises(SystemExit, match="^too many samples: .*8192 samples .* --feature-cache off$"):
                plan(policy, None)
