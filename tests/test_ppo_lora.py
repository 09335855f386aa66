"""LoRA and progressive unfreezing, through ppo_gr00t_lora.py's own functions: a tiny random GR00T, no simulator."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tensordict import TensorDict
from torch import Tensor

import grpo_gr00t
from common import Metrics, Noise, Ranks, StageTimer
from gr00t_n1d5.network import Gr00tConfig, Gr00tN1d5
from gr00t_n1d5.policy import activation_bytes
from ppo_gr00t_lora import (
    STAGES,
    TARGETS,
    Args,
    Gr00tActor,
    Stage,
    advantages,
    check,
    learning_rate,
    lora_config,
    parse_schedule,
    plan_minibatches,
    ppo_loss,
    rollout,
    train,
    update,
)
from tests.test_common import on_two_ranks
from tests.test_grpo_math import ALONE, flat
from tests.test_ppo_gr00t import Episodes, observation

torch.set_num_threads(1)
CATEGORY = ("frozen", "lora", "train")


def make(checkpoint, **overrides) -> tuple[Args, Gr00tActor]:
    """All targets, so that every stage has something to train."""
    wanted = {"num_envs": 8, "minibatches": 2, "critic_warmup": 0, "lora_targets": tuple(TARGETS), **overrides}
    args = Args(checkpoint=str(checkpoint), device="cpu", **wanted)
    return args, Gr00tActor(args)


def collect(args: Args, policy: Gr00tActor, ranks: Ranks = ALONE) -> tuple[TensorDict, Tensor]:
    """Samples (T, N) of a rollout with random rewards, and which belong to an attempt: all; a rank's share of them."""
    args.reward, n = "dense", 8 // ranks.world
    own = slice(ranks.rank * n, (ranks.rank + 1) * n)
    env = Episodes(args, (99,) * 8)
    samples = rollout(env, policy, args, 0, ALONE, StageTimer("cpu"))[:, own].clone()
    return samples, advantages(samples, env.success[own], args, ranks, Metrics("cpu", ranks))


def perturb(policy: Gr00tActor, scale: float = 0.02) -> None:
    """Adapters begin as the identity; here they become something."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameters in policy.groups().values():
            for p in parameters:
                p.add_(scale * torch.randn(p.shape, generator=g))


def actions(policy) -> Tensor:
    return policy.act(observation(Args(), 6, 0), Noise("cpu", ALONE, 1))["action"]


def grpo_policy(checkpoint) -> grpo_gr00t.Gr00tActor:
    return grpo_gr00t.Gr00tActor(grpo_gr00t.Args(checkpoint=str(checkpoint), device="cpu"))


def weights(policy: Gr00tActor) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.net.named_parameters()}


def loss_of(args, policy, batch, first: bool = False) -> tuple[Tensor, dict]:
    log = Metrics("cpu", ALONE)
    return ppo_loss(policy, batch, args, log, first), log.read()


def learn(args: Args, policy: Gr00tActor, begun: tuple[str, ...], optimizer=None) -> dict:
    """One update in a stage, as `train` makes it."""
    own, critic = policy.groups(), list(policy.critic.parameters())
    policy.unfreeze(begun)
    optimizer = optimizer or torch.optim.AdamW([*({"params": x} for x in own.values()), {"params": critic}], 1e-3)
    samples, keep = collect(args, policy)
    log = Metrics("cpu", ALONE)
    update(policy, optimizer, samples, plan_minibatches(keep, args, 0, ALONE, bool(policy.trainable())), args, ALONE, log)
    return log.read()


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("category", CATEGORY)
def test_adapters_off_is_the_base_and_merging_is_the_policy(tiny_checkpoint, tmp_path, category):
    args, policy = make(tiny_checkpoint, category_layers=category)
    base = grpo_policy(tiny_checkpoint)
    expected, before = actions(base), weights(policy)
    assert torch.equal(actions(policy), expected)  # adapters begin as the identity
    assert {m.scaling["default"] for m in policy.modules() if isinstance(m, LoraLayer)} == {2.0}  # alpha is twice the rank
    perturb(policy)
    on = actions(policy)
    assert (on - expected).abs().max() > 1e-2
    with policy.adapters.disable_adapter():
        assert torch.equal(actions(policy), expected)
    policy.save(tmp_path)
    assert torch.equal(actions(policy), on)  # merging left the run's own weights alone
    same = [name for name, p in weights(policy).items() if torch.equal(p, before[name])]
    assert all("lora_" in name or "modules_to_save." in name for name in set(before) - set(same))

    assert (actions(grpo_policy(tmp_path)) - on).abs().max() < 1e-5  # read by another script, without peft
    keys = {name for name, _ in Gr00tN1d5.from_pretrained(tmp_path).named_parameters()}
    assert keys == {name for name, _ in base.net.named_parameters()}
    _, loaded = make(tiny_checkpoint, category_layers=category, adapter=str(tmp_path / "adapter"))
    _, resumed = make(tiny_checkpoint, category_layers=category)
    policy.save_adapters(tmp_path / "alone")
    assert {p.name for p in (tmp_path / "alone").iterdir()} == {"adapter", "critic.safetensors"}
    resumed.load(tmp_path / "alone")
    assert torch.equal(actions(loaded), on) and torch.equal(actions(resumed), on)


def test_other_adapters_are_refused(tiny_checkpoint, tmp_path):
    _, policy = make(tiny_checkpoint, lora_targets=("dit-attention",), lora_rank=4)
    policy.save(tmp_path)
    folder = str(tmp_path / "adapter")
    for other in ({}, {"lora_targets": ("dit-attention",), "lora_rank": 8}):
        with pytest.raises(SystemExit, match=f"--adapter {folder}: does not fit"):
            make(tiny_checkpoint, adapter=folder, **other)
    with pytest.raises(SystemExit, match="--adapter"):
        make(tiny_checkpoint, adapter=str(tmp_path / "nothing"))


def full_size(**overrides) -> tuple[int, int]:
    """Trainable and all parameters of the full network on the meta device, one embodiment's layers as in training."""
    from peft import get_peft_model

    with torch.device("meta"):
        net = Gr00tN1d5(Gr00tConfig(num_embodiments=1)).requires_grad_(False)
        total = sum(p.numel() for p in net.parameters())
        adapted = get_peft_model(net, lora_config(Args(**overrides), net), low_cpu_mem_usage=True)
    return sum(p.numel() for p in adapted.parameters() if p.requires_grad), total


def test_share_of_the_full_network_that_is_trained():
    """Counted by hand for the defaults: rank 16, every adapted layer has 16 (in + out) parameters."""
    trained, total = full_size()
    dit, vl, inner = 1536, 2048, 32 * 64
    attention = 8 * (4 * 2 * dit + 2 * 2 * dit + 2 * (vl + dit))  # 8 self- and 8 cross-attention layers
    forward = 16 * 2 * (dit + 4 * dit)
    assert trained == 16 * (attention + forward + 4 * 4 * (vl + inner))
    assert 2.0e9 < total < 2.4e9 and trained / total < 0.05
    for more in ({"category_layers": "train"}, {"category_layers": "lora"}, {"lora_targets": tuple(TARGETS)}):
        count, _ = full_size(**more)
        assert trained < count < 0.05 * total


def test_targets_are_what_their_names_say(tiny_checkpoint):
    for target, (stage, _) in TARGETS.items():
        _, policy = make(tiny_checkpoint, lora_targets=(target,), llm_layers=1)
        names = [name for name, _ in policy.net.named_parameters() if "lora_A" in name]
        assert list(policy.groups()) == [stage] and names
        place = {"dit": "action_head.model.", "vl": "vl_self_attention", "llm": "language_model", "vision": "vision_model"}
        assert all(place[target.split("-")[0]] in name for name in names)
        assert all((".ff." in name) == (target == "dit-feed-forward") for name in names)
    _, policy = make(tiny_checkpoint, lora_targets=("llm-attention",), llm_layers=1)
    layers = {name.split("layers.")[1][0] for name, _ in policy.net.named_parameters() if "lora_A" in name}
    assert layers == {str(policy.net.config.text_layers - 1)}  # the top one


# ---------------------------------------------------------------- stages


@pytest.mark.parametrize("count", range(len(STAGES) + 1))
def test_parameters_outside_the_stages_do_not_change_by_a_bit(tiny_checkpoint, count):
    args, policy = make(tiny_checkpoint, category_layers="train", kl_coef=0.01)  # the KL switches adapters off and on
    perturb(policy)
    begun = STAGES[:count]
    before, own = weights(policy), {id(p): stage for stage, group in policy.groups().items() for p in group}
    critic = [p.detach().clone() for p in policy.critic.parameters()]
    learn(args, policy, begun)
    for name, p in policy.net.named_parameters():
        assert torch.equal(p, before[name]) == (own.get(id(p)) not in begun), name
    assert not all(torch.equal(a, b) for a, b in zip(critic, policy.critic.parameters()))


def test_the_optimizer_keeps_the_state_of_earlier_stages(tiny_checkpoint):
    args, policy = make(tiny_checkpoint)
    own = policy.groups()
    optimizer = torch.optim.AdamW([{"params": own[s]} for s in STAGES[1:]] + [{"params": list(policy.critic.parameters())}])
    for begun in (STAGES[:2], STAGES[:3]):
        learn(args, policy, begun, optimizer)
    steps = {stage: {int(optimizer.state[p]["step"]) for p in own[stage] if p in optimizer.state} for stage in STAGES[1:]}
    each = args.epochs * args.minibatches
    assert steps == {"head": {2 * each}, "vl": {each}, "llm": set(), "vision": set()}


def test_features_are_computed_again_once_the_backbone_learns(tiny_checkpoint):
    args, policy = make(tiny_checkpoint)
    perturb(policy)
    policy.unfreeze(STAGES[:3])
    assert "features" in collect(args, policy)[0].keys() and not policy.trains_backbone
    for begun in (STAGES[:4], STAGES):
        policy.unfreeze(begun)
        samples, _ = collect(args, policy)
        assert policy.trains_backbone and "images" in samples.keys() and "features" not in samples.keys()
        policy.zero_grad()
        loss, figures = loss_of(args, policy, flat(samples, torch.arange(32)), first=True)
        assert figures["update/first_ratio_error"] < 1e-5
        loss.backward()
        for stage, parameters in policy.groups().items():
            assert all((p.grad is not None and p.grad.abs().max() > 0) == (stage in begun) for p in parameters), stage


def test_kl_is_to_the_base_even_when_the_backbone_has_moved(tiny_checkpoint):
    """Against a second network that was never adapted."""
    args, policy = make(tiny_checkpoint)
    _, untouched = make(tiny_checkpoint)
    perturb(policy)
    policy.unfreeze(STAGES)
    batch = flat(collect(args, policy)[0], torch.arange(5))
    batch["features"] = policy.features(batch)
    with torch.no_grad():
        assert (batch["features"] - untouched.features(batch.exclude("features"))).abs().max() > 1e-3
        expected = untouched.evaluate(batch.exclude("features"))[1]
    assert torch.equal(policy.base_mean(batch), expected)
    assert (policy.evaluate(batch)[1] - expected).abs().max() > 1e-3
    assert {p.requires_grad for parameters in policy.groups().values() for p in parameters} == {True}
    policy.unfreeze(("critic", "head"))
    policy.base_mean(batch)
    thawed = {stage for stage, parameters in policy.groups().items() if any(p.requires_grad for p in parameters)}
    assert thawed == {"head"}


def test_checkpointed_activations_give_the_same_gradient(tiny_checkpoint):
    gradients = []
    for on in (False, True):
        args, policy = make(tiny_checkpoint, activation_checkpointing=on)
        perturb(policy)
        policy.unfreeze(STAGES)
        batch = flat(collect(args, policy)[0], torch.arange(32))
        batch["log_prob"] += 0.05
        policy.zero_grad()
        loss_of(args, policy, batch)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable()]))
        wrapped = ["forward" in vars(block) for block in policy.blocks()]  # instead of the class's
        config = policy.net.config
        assert wrapped == [on] * (config.dit_layers + config.vl_layers + config.text_layers + config.vision_layers)
    assert gradients[0].norm() > 0 and (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


# ---------------------------------------------------------------- schedule


def schedule(*unfreeze: str, **overrides) -> list[Stage]:
    return parse_schedule(Args(unfreeze=unfreeze, lora_targets=tuple(TARGETS), **overrides))


def test_schedules():
    assert schedule(critic_warmup=5, learning_rate=1e-3) == [Stage(name, 5, 1e-3) for name in STAGES[1:]]
    found = schedule("critic", "vision:50", "head:3", "vl", "llm:40:1e-5", learning_rate=1e-4)
    assert found == [Stage("vl", 0, 1e-4), Stage("head", 3, 1e-4), Stage("llm", 40, 1e-5), Stage("vision", 50, 1e-4)]
    assert [stage.name for stage in parse_schedule(Args(lora_targets=("vl-attention",)))] == ["vl"]


@pytest.mark.parametrize(
    "flags, start, remedy",
    [
        ({"lora_targets": ("dit-attention", "all")}, "--lora-targets all:", ", ".join(TARGETS)),
        ({"lora_targets": ()}, "--lora-targets:", "--category-layers"),
        ({"unfreeze": ("head:soon", "vl")}, "--unfreeze head:soon:", "first iteration"),
        ({"unfreeze": ("head:1:fast", "vl")}, "--unfreeze head:1:fast:", "learning rate"),
        ({"unfreeze": ("head:1:1e-4:2", "vl")}, "--unfreeze head:1:1e-4:2:", "learning rate"),
        ({"unfreeze": ("head:-1", "vl")}, "--unfreeze head:-1:", "iteration"),
        ({"unfreeze": ("head:1:nan", "vl")}, "--unfreeze head:1:nan:", "learning rate"),
        ({"unfreeze": ("critic", "head:3", "head:5", "vl")}, "--unfreeze head:5:", "twice"),
        ({"unfreeze": ("head", "vl", "llm:9")}, "--unfreeze llm:9:", "critic, head, vl"),
        ({"unfreeze": ("critic", "head:3")}, "--unfreeze: vl", "add a stage"),
    ],
)
def test_what_cannot_be_a_schedule(flags, start, remedy):
    with pytest.raises(SystemExit) as caught:
        check(Args(device="cpu", **flags))
    text = str(caught.value)
    assert text.startswith(start) and remedy in text and "\n" not in text


def test_every_stage_has_its_own_rate_and_warm_up():
    args = Args(iterations=100, lr_warmup=3, lr_hold=0.5)
    head, vl = Stage("head", 0, 1e-3), Stage("vl", 10, 2e-4)
    assert [learning_rate(args, i, head) for i in range(4)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert learning_rate(args, 9, vl) == 0 and learning_rate(args, 10, vl) == pytest.approx(5e-5)
    assert learning_rate(args, 20, vl) == 2e-4 and learning_rate(args, 99, vl) == pytest.approx(2e-4 * (1 - 0.9 * 0.98))


def test_stages_of_a_run(tiny_checkpoint):
    """`train` without a simulator: who learns in which iteration, at which rate, in which order of the optimizer."""
    unfreeze = ("critic", "vl:1", "head:2:3e-4", "llm:3", "vision:3")
    args, policy = make(tiny_checkpoint, iterations=4, eval_episodes=0, unfreeze=unfreeze, lr_warmup=0, minibatches=1, epochs=1)
    own, rows, events, changed, nothing = policy.groups(), [], [], [], lambda *_, **__: None

    def copied() -> dict[str, list[Tensor]]:
        return {name: [p.detach().clone() for p in group] for name, group in own.items()}

    def log(iteration, metrics, stages, steps):
        rows.append(metrics)
        now = copied()
        changed.append({name for name in own if not all(map(torch.equal, before[0][name], now[name]))})
        before[0] = now

    before = [copied()]
    run = SimpleNamespace(restore_optimizer=nothing, result=nothing, save=nothing, log=log, event=events.append)
    run.state = {"iteration": 0}
    train(args, Episodes(args), policy, run, ALONE)
    assert changed == [set(), {"vl"}, {"vl", "head"}, {"vl", "head", "llm", "vision"}]
    assert [row["update/stage"] for row in rows] == [0, 1, 2, 4]
    assert events == [f"iteration {i}: stage {name} begins" for i, name in ((1, "vl"), (2, "head"), (3, "llm"), (3, "vision"))]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("backbone, checkpointing", [(False, False), (True, False)])
def test_estimate_of_activations(tiny_checkpoint, backbone, checkpointing):
    """Against what autograd really keeps."""
    net = Gr00tN1d5.from_pretrained(tiny_checkpoint)
    net.backbone.requires_grad_(backbone)
    config, batch = net.config, 16
    ids = torch.tensor([2, 3, 4, 5] + [config.image_token_id] * config.tokens_per_view).expand(batch, -1)
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept: dict[int, int] = {}
    tensors = []  # alive, so that no address is used twice

    def pack(x: Tensor) -> Tensor:
        tensors.append(x)
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        features = net.backbone(ids, torch.randn(batch, 3, config.image_size, config.image_size))
        row = torch.zeros(batch, dtype=torch.long)
        context = net.action_head.encode(features, torch.randn(batch, 1, config.state_dim), row)
        net.action_head.velocity(torch.randn(batch, config.action_horizon, config.action_dim), row, row, context)
    found = sum(size for place, size in kept.items() if place not in weights) / batch
    estimate = activation_bytes(config, ids.shape[1], 1, backbone, checkpointing)
    assert 0.8 < estimate / found < 1.25


# ---------------------------------------------------------------- several processes


def first_update(ranks: Ranks, checkpoint: Path, folder: Path) -> None:
    """The first update of one of several processes; each has its own environments' samples."""
    args, policy = make(checkpoint, minibatches=1, epochs=1, critic_epochs=1, kl_coef=0.01)
    perturb(policy)
    policy.unfreeze(STAGES)
    samples, keep = collect(args, policy, ranks)
    parameters = [*(p for group in policy.groups().values() for p in group), *policy.critic.parameters()]
    before = torch.cat([p.detach().flatten() for p in parameters])
    plan, log = plan_minibatches(keep, args, 0, ranks, True), Metrics("cpu", ranks)
    update(policy, torch.optim.SGD(parameters, lr=1.0), samples, plan, args, ranks, log)
    torch.save(torch.cat([p.detach().flatten() for p in parameters]) - before, folder / f"{ranks.world}-{ranks.rank}.pt")


def test_two_processes_make_the_same_first_update(tiny_checkpoint, tmp_path):
    on_two_ranks(first_update, tiny_checkpoint, tmp_path)
    first_update(ALONE, tiny_checkpoint, tmp_path)
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(first, second) and alone.norm() > 0 and (alone - first).norm() < 1e-4 * alone.norm()


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same_gradient(tiny_checkpoint, checkpointing, monkeypatch):
    """All blocks, of backbone and head; the gradient of the whole loss, adapters on and off.

    Captured as for any backend, but run as it is: generating code takes minutes on a CPU.
    """
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: whole(module, backend="aot_eager"))
    found = []
    for compiled in (False, True):
        args, policy = make(tiny_checkpoint, compile=compiled, activation_checkpointing=checkpointing, kl_coef=0.1)
        perturb(policy)
        loss, figures = loss_of(args, policy, flat(collect(args, policy)[0], torch.arange(8)), first=True)
        loss.backward()
        assert figures["update/first_ratio_error"] < 1e-4
        found.append(torch.cat([p.grad.flatten() for p in policy.trainable()]))
        blocks = [m for m in policy.modules() if m._compiled_call_impl is not None]
        expected = len(policy.net.backbone.vision_model.encoder.layers) + len(policy.net.backbone.language_model.layers)
        head = policy.net.action_head
        expected += len(head.model.transformer_blocks) + len(head.vl_self_attention.transformer_blocks)
        assert len(blocks) == (expected if compiled else 0)
    assert found[0].norm() > 0 and (found[1] - found[0]).norm() < 1e-4 * found[0].norm()
