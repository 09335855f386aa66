"""CUDA graphs, float8 and recomputation: what can be checked without a GPU, and on one, where there is one."""

from __future__ import annotations

import contextlib
import copy
import importlib

import pytest
import torch
from torch import nn

import gr00t_tasks
from common import CudaGraphs, Noise
from gr00t_n1d5 import Fp8Linear, Gr00tConfig, Gr00tN1d5, recompute
from tests import test_grpo_math as grpo
from tests import test_ppo_gr00t as ppo
from tests import test_ppo_lora as lora

SCRIPTS = {"grpo_gr00t": grpo, "ppo_gr00t_frozen": ppo, "ppo_gr00t_lora": lora}
every_script = pytest.mark.parametrize("tools", SCRIPTS.values(), ids=SCRIPTS.keys())
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def observe(tools, args, n: int):
    return tools.observation(args, n, 0) if tools is ppo else tools.observation(n)


class Rerun(CudaGraphs):
    """Without a GPU: a replay runs the function again on the inputs' copies, into the outputs' own memory."""

    def capture(self, call):
        outputs = call()

        def leaves(tree):
            return [tree] if isinstance(tree, torch.Tensor) else [x for part in tree or () for x in leaves(part)]

        def replay():
            for old, new in zip(leaves(outputs), leaves(call())):
                old.copy_(new)

        return replay, outputs


KINDS = [Rerun, pytest.param(CudaGraphs, marks=on_gpu)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_function_sees_new_inputs_and_leaves_old_outputs_alone(kind):
    device = "cpu" if kind is Rerun else "cuda"
    weight, calls = torch.eye(3, device=device), []

    def function(pair, factor):
        calls.append(len(pair[0]))
        return (pair[0] + pair[1]) @ weight * factor, None

    graphs, one = kind(function), torch.ones(2, 3, device=device)
    first, nothing = graphs((one, one), 2)
    assert nothing is None and torch.equal(first, 4 * one)
    captured = len(calls)
    second, _ = graphs((3 * one, one), 2)
    assert torch.equal(second, 8 * one) and torch.equal(first, 4 * one)
    weight.mul_(0.5)  # weights change in place
    assert torch.equal(graphs((one, one), 2)[0], 2 * one)
    assert kind is Rerun or len(calls) == captured  # Python does not run again
    assert len(graphs.graphs) == 1
    assert torch.equal(graphs((one, one), 3)[0], 3 * one)  # another constant, another capture
    assert torch.equal(graphs((one[:1], one[:1]), 2)[0], 2 * one[:1])  # and so with other shapes
    assert torch.equal(graphs((one, one), 2)[0], 2 * one) and len(graphs.graphs) == 3
    two = Rerun(lambda x: x + 1) if kind is Rerun else CudaGraphs(lambda x: x + 1)
    assert torch.equal(two(one), 2 * one)


@every_script
def test_actions_from_captured_sampling_are_the_same(tools, tiny_checkpoint):
    """By the ODE and by the exploring sampler, with a smaller last micro-batch, before and after the weights change."""
    args, policy = tools.make(tiny_checkpoint, micro_batch_size=5, noise="flow-sde-all")
    obs = observe(tools, args, 8)
    for _ in range(2):
        for explore in (False, True):
            found = []
            for sampler in (policy.sample, Rerun(policy.sample)):
                policy.sampler = sampler
                found.append(policy.act(obs, Noise("cpu", grpo.ALONE, 1), explore))
            assert len(sampler.graphs) == 2  # 5 and 3 rows
            assert torch.equal(found[0].action, found[1].action)
            if explore:
                assert all(torch.equal(a, b) for a, b in zip(found[0].chain, found[1].chain))
        with torch.no_grad():
            for p in policy.trainable():
                p.add_(0.02 * torch.randn_like(p))


@every_script
@pytest.mark.parametrize("explore", [False, True])
def test_micro_batches_do_not_change_the_actions(tools, explore, tiny_checkpoint):
    """Every row keeps its own noise."""
    args, policy = tools.make(tiny_checkpoint, micro_batch_size=8)
    obs, found = observe(tools, args, 8), []
    for policy.micro_batch_size in (8, 3):
        found.append(policy.act(obs, Noise("cpu", grpo.ALONE, 1), explore))
    parts = [(found[0].action, found[1].action), *(zip(found[0].chain, found[1].chain) if explore else ())]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in parts)


@on_gpu
@every_script
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_and_captured_actions_on_a_gpu(tools, checkpointing, tiny_checkpoint, monkeypatch):
    """Graphs and compiled blocks against the plain network, and the update's first ratio with them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found = []
    for on in (False, True):
        args, policy = tools.make(tiny_checkpoint, compile=on, activation_checkpointing=checkpointing, micro_batch_size=5)
        policy.to("cuda")
        policy.processor.to("cuda")
        policy.sampler = CudaGraphs(policy.sample) if on else policy.sample
        obs = observe(tools, args, 8)
        obs = type(obs)(*(x if x is None else x.cuda() for x in obs))
        out = policy.act(obs, Noise("cuda", grpo.ALONE, 1), True)
        again = policy.evaluate(obs._replace(features=out.features), out.chain)[0]
        assert (again - out.chain.log_prob).abs().max() < 1e-2
        found.append(out)
    assert torch.allclose(found[0].action, found[1].action, atol=1e-3, rtol=1e-3)


@every_script
@pytest.mark.parametrize("bf16", [False, True])
def test_a_float8_backbone_reports_its_error_and_is_saved_as_it_was(tools, bf16, tiny_checkpoint, tmp_path):
    own = {"backbone_bf16": bf16} | ({"lora_targets": ("dit-attention",)} if tools is lora else {})
    exact = tools.make(tiny_checkpoint, **own)[1]
    args, policy = tools.make(tiny_checkpoint, backbone_fp8=True, **own)
    backbone, obs = policy.net.backbone, observe(tools, args, 6)
    kinds = [type(m) for m in backbone.modules() if isinstance(m, nn.Linear | Fp8Linear)]
    assert kinds.count(Fp8Linear) == 2 * 6 + 2 * 7 and kinds.count(nn.Linear) == 1  # two layers each; and mlp1
    with torch.no_grad():
        found, expected = policy.features(obs).float(), exact.features(obs).float()
        error = float((found - expected).norm() / expected.norm())
        assert 0.005 < error < 0.2 and float(backbone.fp8_error) == pytest.approx(error, rel=0.02)
        assert torch.equal(policy.features(obs).float(), found)  # measuring was for once
    assert backbone.fp8_report() == f"float8 backbone: features differ by {float(backbone.fp8_error):.2%} of their norm"
    policy.save(tmp_path / "saved")
    reread = Gr00tN1d5.from_pretrained(tmp_path / "saved")
    for name, p in Gr00tN1d5.from_pretrained(tiny_checkpoint).backbone.named_parameters():
        assert torch.equal(reread.backbone.get_parameter(name), p), name
    policy.load(tmp_path / "saved")


def test_float8_needs_a_frozen_backbone_and_a_gpu_that_has_it(tiny_checkpoint, monkeypatch):
    with pytest.raises(lora.UsageError, match="^--backbone-fp8: is for a frozen backbone"):
        lora.make(tiny_checkpoint, backbone_fp8=True, lora_targets=("dit-attention", "llm-attention"))
    for module in map(importlib.import_module, SCRIPTS):
        monkeypatch.setattr(gr00t_tasks, "pick_device", lambda device: "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        with pytest.raises(module.UsageError, match="^--backbone-fp8: this GPU has no float8"):
            module.resolve(module.Args(checkpoint=str(tiny_checkpoint), backbone_fp8=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
def test_float8_products(device):
    """Scales per row: rows of very different sizes keep their precision; the bias is added once."""
    g = torch.Generator().manual_seed(0)
    linear = nn.Linear(64, 48, bias=False).requires_grad_(False)
    linear.weight.mul_(10 ** torch.linspace(-4, 2, 48)[:, None])
    x = (torch.randn(5, 70, 64, generator=g) * 10 ** torch.linspace(-3, 3, 5)[:, None, None]).to(device)
    linear = linear.to(device)
    error = (Fp8Linear(linear)(x) - linear(x)).norm(dim=1) / linear(x).norm(dim=1)  # (5, 48)
    assert 1e-2 < error.min() and error.max() < 0.06  # e4m3 has 3 bits: 2.6% off for each factor
    linear.bias = nn.Parameter(torch.randn(48, generator=g).to(device), requires_grad=False)
    expected, close = linear.bias.expand(2, 48), {"rtol": 1e-2, "atol": 1e-2} if device == "cuda" else {}
    torch.testing.assert_close(Fp8Linear(linear)(torch.zeros(2, 64, device=device)), expected, **close)
    torch.testing.assert_close(Fp8Linear(linear)(torch.zeros(64, device=device)), expected[0], **close)


@on_gpu
def test_a_float8_backbone_on_a_gpu():
    torch.manual_seed(0)
    config = Gr00tConfig.tiny()
    net = Gr00tN1d5(config).backbone.eval().requires_grad_(False).cuda()
    ids = torch.full((2, config.tokens_per_view + 2), config.image_token_id, device="cuda")
    ids[:, -2:] = 1
    pixels = torch.rand(2, 3, config.image_size, config.image_size, device="cuda") * 2 - 1
    expected = net(ids, pixels)
    net.to_fp8()
    for autocast in (False, True):
        with torch.autocast("cuda", torch.bfloat16, autocast):
            assert float((net(ids, pixels) - expected).norm() / expected.norm()) < 0.2
    assert 0.005 < float(net.fp8_error) < 0.2


def test_blocks_are_recomputed_for_gradients_alone():
    calls = []

    class Block(nn.Linear):
        def forward(self, x):
            calls.append(torch.is_grad_enabled())
            return super().forward(x)

    block, x = Block(4, 4), torch.randn(2, 4)
    plain = torch.autograd.grad(block(x).square().sum(), block.weight)[0]
    recompute(block)
    for context, expected in ((torch.no_grad(), 1), (contextlib.nullcontext(), 2)):
        calls.clear()
        with context:
            y = block(x)
        if expected == 2:
            assert torch.equal(torch.autograd.grad(y.square().sum(), block.weight)[0], plain)
        assert len(calls) == expected


def test_a_copied_block_recomputes_itself():
    block, x = nn.Linear(4, 4), torch.randn(2, 4)
    recompute(block)
    other = copy.deepcopy(block)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(other(x), block.bias.expand(2, 4)) and not torch.equal(block(x), other(x))
