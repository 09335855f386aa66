"""CUDA graphs, float8 and recomputation: what can be checked without a GPU, and on one, where there is one."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn

import grpo_gr00t
import grpo_gr00t_lora
import ppo_gr00t_frozen
import ppo_gr00t_lora
from benchmarks import throughput
from common import Metrics, Noise
from gr00t_n1d5.network import Fp8Linear, Gr00tConfig, Gr00tN1d5, recompute
from gr00t_n1d5.policy import take
from tests.test_grpo_math import ALONE, observation, perturb

SCRIPTS = [grpo_gr00t, grpo_gr00t_lora, ppo_gr00t_frozen, ppo_gr00t_lora]
every_script = pytest.mark.parametrize("module", SCRIPTS, ids=lambda m: m.__name__)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def make(module, checkpoint, device="cpu", **flags):
    if module is grpo_gr00t_lora:  # with a frozen backbone, as the others
        flags["lora_targets"] = module.HEAD_TARGETS
    return module.Gr00tActor(module.Args(checkpoint=str(checkpoint), device=device, **flags))


@pytest.mark.parametrize("module, explore", [(grpo_gr00t, False), (grpo_gr00t, True), (ppo_gr00t_lora, True)])
def test_sampling_is_one_graph(module, tiny_checkpoint, explore):
    """Without a break on the way, a GPU captures it whole; other inputs and other weights are seen."""
    policy, noise = make(module, tiny_checkpoint), Noise("cpu", ALONE, 1)
    compiled = torch.compile(policy.denoise, fullgraph=True, backend="eager")
    for seed in range(2):
        obs = observation(6, seed).set("start", noise.normal(6, *policy.action_shape))
        if explore:
            obs = obs.set("k", noise.integers(6, policy.steps)).set("eps", noise.normal(6, *policy.action_shape))
        with torch.no_grad():
            expected, found = policy.denoise(obs), compiled(obs)
        assert sorted(found.keys()) == sorted(expected.keys())
        assert all(torch.equal(found[name], expected[name]) for name in found.keys())
        perturb(policy)


@every_script
@pytest.mark.parametrize("explore", [False, True])
def test_micro_batches_do_not_change_the_actions(module, tiny_checkpoint, explore):
    """Every row keeps its own noise."""
    policy, found = make(module, tiny_checkpoint), []
    obs = observation(8).set("critic", torch.randn(8, 6))
    for policy.micro_batch_size in (8, 3):
        found.append(policy.act(obs, Noise("cpu", ALONE, 1), explore))
    assert all(torch.allclose(found[0][name].float(), found[1][name].float(), atol=1e-4) for name in found[0].keys())


def test_micro_batches_may_share_their_memory(tiny_checkpoint):
    """A CUDA graph writes the outputs of every call to the same place."""
    policy, place = make(grpo_gr00t, tiny_checkpoint, micro_batch_size=4), []
    expected = policy.act(observation(8), Noise("cpu", ALONE, 1), explore=True)

    def replay(part: TensorDict, plain=policy.denoise) -> TensorDict:
        place.append(plain(part))
        return place[0].update_(place[-1])

    policy.denoise = replay
    found = policy.act(observation(8), Noise("cpu", ALONE, 1), explore=True)
    assert len(place) == 2 and all(torch.equal(found[name], expected[name]) for name in expected.keys())


@pytest.mark.parametrize("module", [grpo_gr00t_lora, ppo_gr00t_lora], ids=lambda m: m.__name__)
def test_the_way_back_through_a_trained_backbone_does_not_wait(module, tiny_checkpoint):
    """For how many numbers a mask chooses; on a GPU `benchmarks/gpu.py --check sync` sees everything that waits."""
    args = module.Args(checkpoint=str(tiny_checkpoint), device="cpu", lora_targets=tuple(module.TARGETS))
    policy = module.Gr00tActor(args)
    policy.unfreeze(module.STAGES)
    seen, left = set(), [policy.features(observation(4)).grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [parent for parent, _ in node.next_functions]
    reached, own = {id(node.variable) for node in seen if hasattr(node, "variable")}, policy.groups()
    assert reached == {id(p) for p in own["llm"] + own["vision"]}
    assert not {node.name() for node in seen} & {"MaskedScatterBackward0", "MaskedSelectBackward0"}


WHERE = [("cpu", "cpu"), pytest.param("cuda", "cpu", marks=on_gpu), pytest.param("cuda", "cuda", marks=on_gpu)]


@pytest.mark.parametrize("device, place", WHERE)
def test_samples_are_taken_without_waiting(device, place):
    """Indices on the host; features there, too, or on the device."""
    features = torch.arange(60.0).view(10, 3, 2).to(place)
    samples, rows = TensorDict({"features": features, "k": torch.arange(10, device=device)}, 10), torch.tensor([7, 0, 0])
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    found = take(samples, rows, device)
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    assert found["k"].tolist() == [7, 0, 0] and torch.equal(found["features"].cpu(), features.cpu()[rows])
    assert {x.device.type for x in found.values()} == {device} and found.batch_size == (3,)


@every_script
def test_the_encoder_runs_in_bf16_and_the_steps_do_not(module, tiny_checkpoint):
    """What --precision bf16 says; the contexts that the steps see differ by bf16's rounding, and the types stay fp32."""
    exact, policy = (make(module, tiny_checkpoint, precision=precision) for precision in ("fp32", "bf16"))
    obs, seen = observation(6), []
    with torch.no_grad():
        obs["features"] = policy.features(obs).float()  # the same for both
        found, expected = policy.encode(obs), exact.encode(obs)
        policy.net.action_head.model.transformer_blocks[0].register_forward_hook(lambda _, x, y: seen.append(y.dtype))
        policy.velocity(torch.randn(6, *policy.action_shape), torch.zeros(6, dtype=torch.long), 4, found)
    for a, b in zip((found.state_tokens, *sum(found.key_values, ())), (expected.state_tokens, *sum(expected.key_values, ()))):
        assert a.dtype == torch.float32 and 1e-4 < float((a - b).norm() / b.norm()) < 0.05
    assert seen == [torch.float32]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "all in bf16"])
def test_the_ratio_bears_sums_in_another_order(precision, monkeypatch):
    """As a GPU's kernels for other batch sizes do it: the update adds up each product in two halves. In TF32 beside bf16."""
    kind = {"fp32": "fp32"}.get(precision, "bf16")
    checkpoint = str(grpo_gr00t.HERE / "checkpoints" / "tiny")
    policy, halves = make(grpo_gr00t, checkpoint, precision=kind), False

    def rounded(x):  # to TF32's 10 bits
        return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    def linear(layer, x):
        half, (x, w) = torch.is_autocast_enabled("cpu"), (x.float(), layer.weight.float())
        if kind == "bf16":
            x, w = (y.bfloat16().float() if half else rounded(y) for y in (x, w))
        with torch.autocast("cpu", enabled=False):
            n = x.shape[-1] // 2
            y = x[..., :n] @ w[:, :n].t() + x[..., n:] @ w[:, n:].t() if halves else x @ w.t()
            y = y if layer.bias is None else y + layer.bias.float()
        return y.bfloat16() if half else y

    monkeypatch.setattr(nn.Linear, "forward", linear)
    if precision == "all in bf16":
        throughput.steps_in_bf16(policy)
    obs, features = observation(256), policy.feature_buffer(1, 256, "gpu")[0]
    out = policy.act(obs, Noise("cpu", ALONE, 1), True, features)
    halves = True
    with torch.no_grad():
        log_prob = policy.evaluate(TensorDict({**obs, **out, "features": features}, 256))[0]
    error = float((log_prob - out["log_prob"]).expm1().abs().max())
    low, high = {"fp32": (1e-6, 1e-4), "bf16": (1e-3, 2e-2), "all in bf16": (3e-2, 1.0)}[precision]
    assert low < error < high


def test_gradients_in_bf16_have_the_same_direction():
    """Of the shipped checkpoint, whose weights are trained: backbone and encoder in bf16 against fp32."""
    found, advantage = [], torch.randn(256, generator=torch.Generator().manual_seed(0))
    for precision in ("fp32", "bf16"):
        args = grpo_gr00t.Args(device="cpu", precision=precision)
        policy, obs = grpo_gr00t.Gr00tActor(args), observation(256)
        features = policy.feature_buffer(1, 256, "gpu")[0]
        out = policy.act(obs, Noise("cpu", ALONE, 1), True, features)
        own = {"features": features, "advantage": advantage, "weight": torch.ones(256)}
        batch = TensorDict({**obs, **out, **own}, 256)
        grpo_gr00t.grpo_loss(policy, batch, args, Metrics("cpu", ALONE), False).backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.trainable()]))
    assert 0.999 < torch.nn.functional.cosine_similarity(*found, 0) < 1 - 1e-7


@on_gpu
@every_script
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_and_captured_actions_on_a_gpu(module, checkpointing, tiny_checkpoint, monkeypatch):
    """Graphs and compiled blocks against the plain network, and the update's first ratio with them."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    found, obs = [], observation(8).set("critic", torch.randn(8, 6)).to("cuda")
    for on in (False, True):
        flags = {"compile": on, "activation_checkpointing": checkpointing, "micro_batch_size": 5}
        policy = make(module, tiny_checkpoint, "cuda:0", **flags)
        features = policy.feature_buffer(1, 8, "gpu")[0]
        for _ in range(3):  # a graph is recorded in the second call, and replayed in the third
            out = policy.act(obs, Noise("cuda", ALONE, 1), True, features)
        batch = TensorDict({**obs.exclude("images"), **out, "features": features}, 8)
        assert (policy.evaluate(batch)[0] - out["log_prob"]).abs().max() < 1e-2
        found.append(out)
    assert torch.allclose(found[0]["action"], found[1]["action"], atol=1e-3, rtol=1e-3)


@every_script
def test_a_float8_backbone_is_near_and_saved_as_it_was(module, tiny_checkpoint, tmp_path):
    exact, policy = (make(module, tiny_checkpoint, precision=precision) for precision in ("bf16", "fp8"))
    backbone, obs = policy.net.backbone, observation(6)
    kinds = [type(m) for m in backbone.modules() if isinstance(m, nn.Linear | Fp8Linear)]
    assert kinds.count(Fp8Linear) == 2 * 6 + 2 * 7 and kinds.count(nn.Linear) == 1  # two layers each; and mlp1
    with torch.no_grad():
        found, expected = policy.features(obs).float(), exact.features(obs).float()
    assert 0.005 < float((found - expected).norm() / expected.norm()) < 0.2
    policy.save(tmp_path / "saved")
    reread = Gr00tN1d5.from_pretrained(tmp_path / "saved")
    for name, p in Gr00tN1d5.from_pretrained(tiny_checkpoint).backbone.named_parameters():
        assert torch.equal(reread.backbone.get_parameter(name), p), name
    policy.load(tmp_path / "saved")


def test_float8_is_for_a_frozen_backbone():
    args = ppo_gr00t_lora.Args(precision="fp8", lora_targets=("dit-attention", "llm-attention"))
    with pytest.raises(SystemExit, match="^--precision fp8: is for a frozen backbone"):
        ppo_gr00t_lora.check(args)


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
    ids[:, -2:] = config.image_token_id + 1  # as many image tokens as features, or a device-side assert ends the process
    pixels = torch.rand(2, 3, config.image_size, config.image_size, device="cuda") * 2 - 1
    expected = net(ids, pixels)
    net.to_fp8()
    for autocast in (False, True):
        with torch.autocast("cuda", torch.bfloat16, autocast):
            assert 0.005 < float((net(ids, pixels) - expected).norm() / expected.norm()) < 0.2


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


@every_script
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_blocks_stay_compiled(module, checkpointing, tiny_checkpoint, monkeypatch):
    """Dynamo goes back to eager in silence after 8 versions of a block, fewer than a run of tails and base model has."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="eager"))
    policy = make(module, tiny_checkpoint, compile=True, activation_checkpointing=checkpointing)
    args = module.Args(device="cpu", checkpoint=str(tiny_checkpoint))
    for policy.micro_batch_size in (8, 5, 3):
        obs, features = observation(8).set("critic", torch.randn(8, 6)), policy.feature_buffer(1, 8, "gpu")[0]
        for explore in (False, True):
            out = policy.act(obs, Noise("cpu", ALONE, 1), explore, features)
        own = {"features": features, "advantage": torch.ones(8), "weight": torch.ones(8)}
        loss = module.grpo_loss if hasattr(module, "grpo_loss") else module.ppo_loss
        loss(policy, TensorDict({**obs.exclude("images"), **out, **own}, 8), args, Metrics("cpu", ALONE), True).backward()
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 4
    torch._dynamo.reset()
