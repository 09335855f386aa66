"""LoRA and progressive unfreezing, through ppo_gr00t_lora.py's own functions: a tiny random GR00T, no simulator."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor

import grpo_gr00t
import ppo_gr00t_lora
from common import Noise, Ranks, RunLogger
from gr00t_n1d5 import Gr00tConfig, Gr00tN1d5, activation_bytes
from ppo_gr00t_lora import (
    STAGES,
    TARGETS,
    Args,
    Batch,
    Gr00tActorCritic,
    Observation,
    Stage,
    UsageError,
    advance,
    learning_rate,
    lora_config,
    parse_schedule,
    plan_minibatches,
    ppo_loss,
    resolve,
    update,
    watch,
)
from tests.warm import CONTEXT

torch.set_num_threads(1)
ALONE = Ranks(0, 1)
CATEGORY = ("frozen", "lora", "train")


def make(checkpoint, **overrides) -> tuple[Args, Gr00tActorCritic]:
    """All targets, so that every stage has something to train."""
    wanted = {"num_envs": 8, "chunk": 4, "minibatches": 2, "critic_warmup": 0, "lora_targets": tuple(TARGETS), **overrides}
    args = resolve(Args(checkpoint=str(checkpoint), device="cpu", **wanted))
    return args, Gr00tActorCritic(args)


def observation(n: int, seed: int = 0) -> Observation:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 1, 64, 64, 3), generator=g, dtype=torch.uint8)
    return Observation(images, torch.randn(n, 5, generator=g), torch.arange(n) % 2, torch.rand(n, 6, generator=g))


def collect(args: Args, policy: Gr00tActorCritic, n: int = 8, chunks: int = 4) -> Batch:
    """A batch from generated observations, with random rewards."""
    batch = Batch(args, chunks, policy.trains_backbone)
    noise, g = Noise("cpu", ALONE, args.seed, 0), torch.Generator().manual_seed(7)
    steps = []
    with torch.no_grad():
        for t in range(chunks):
            obs = observation(n, seed=t)
            out = policy.act(obs, noise, explore=True)
            critic_input = policy.critic_input(obs._replace(features=out.features))
            batch.add(obs, out, critic_input)
            ended = torch.full((n,), t == chunks - 1)
            steps.append((torch.rand(n, generator=g), policy.critic(critic_input), ended, torch.ones(n, dtype=torch.bool)))
        return batch.finish(steps, torch.zeros(n), [torch.ones(n)], args, policy.chunk)


def perturb(policy: Gr00tActorCritic, scale: float = 0.02) -> None:
    """Adapters begin as the identity; here they become something."""
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameters in policy.groups().values():
            for p in parameters:
                p.add_(scale * torch.randn(p.shape, generator=g))


def actions(policy) -> Tensor:
    obs = observation(6)
    if isinstance(policy, grpo_gr00t.Gr00tActor):
        obs = grpo_gr00t.Observation(*obs[:3])
    return policy.act(obs, Noise("cpu", ALONE, 1)).action


def weights(policy: Gr00tActorCritic) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.net.named_parameters()}


def learn(args: Args, policy: Gr00tActorCritic, begun: tuple[str, ...]) -> None:
    """One update in a stage, as `train` makes it."""
    own, critic = policy.groups(), list(policy.critic.parameters())
    policy.unfreeze(begun)
    optimizer = torch.optim.AdamW([*({"params": own[name]} for name in own), {"params": critic}], 1e-3, weight_decay=0.0)
    batch = collect(args, policy)
    update(policy, optimizer, batch, plan_minibatches(batch, args, 0, ALONE, bool(policy.trainable())), args, ALONE)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("category", CATEGORY)
def test_adapters_off_is_the_base_and_merging_is_the_policy(tiny_checkpoint, tmp_path, category):
    args, policy = make(tiny_checkpoint, category_layers=category)
    base = grpo_gr00t.Gr00tActor(grpo_gr00t.resolve(grpo_gr00t.Args(checkpoint=str(tiny_checkpoint), device="cpu", chunk=4)))
    expected, before = actions(base), weights(policy)
    assert torch.equal(actions(policy), expected)  # adapters begin as the identity
    perturb(policy)
    on = actions(policy)
    assert (on - expected).abs().max() > 1e-2
    with policy.adapters.disable_adapter():
        assert torch.equal(actions(policy), expected)
    policy.save(tmp_path)
    assert torch.equal(actions(policy), on)  # merging left the run's own weights alone
    same = [name for name, p in weights(policy).items() if torch.equal(p, before[name])]
    assert all("lora_" in name or "modules_to_save." in name for name in set(before) - set(same))

    other = grpo_gr00t.resolve(grpo_gr00t.Args(checkpoint=str(tmp_path), device="cpu", chunk=4))
    assert (actions(grpo_gr00t.Gr00tActor(other)) - on).abs().max() < 1e-5  # read by another script, without peft
    keys = {name for name, _ in Gr00tN1d5.from_pretrained(tmp_path).named_parameters()}
    assert keys == {name for name, _ in base.net.named_parameters()}
    _, loaded = make(tiny_checkpoint, category_layers=category, adapter=str(tmp_path / "adapter"))
    assert torch.equal(actions(loaded), on)
    _, resumed = make(tiny_checkpoint, category_layers=category)
    resumed.load(tmp_path)
    assert torch.equal(actions(resumed), on)


def test_adapter_only_checkpoints(tiny_checkpoint, tmp_path):
    _, policy = make(tiny_checkpoint, merged_export=False)
    policy.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter", "critic.safetensors"}


def test_other_adapters_are_refused(tiny_checkpoint, tmp_path):
    _, policy = make(tiny_checkpoint, lora_targets=("dit-attention",), lora_rank=4)
    policy.save(tmp_path)
    folder = str(tmp_path / "adapter")
    for other in ({}, {"lora_targets": ("dit-attention",), "lora_rank": 8}):
        with pytest.raises(UsageError, match=f"--adapter {folder}: does not fit"):
            make(tiny_checkpoint, adapter=folder, **other)
    with pytest.raises(UsageError, match="--adapter"):
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
        policy.unfreeze(begun)
        batch = collect(args, policy)
        update(policy, optimizer, batch, plan_minibatches(batch, args, 0, ALONE, True), args, ALONE)
    steps = {stage: {int(optimizer.state[p]["step"]) for p in own[stage] if p in optimizer.state} for stage in STAGES[1:]}
    each = args.epochs * args.minibatches
    assert steps == {"head": {2 * each}, "vl": {each}, "llm": set(), "vision": set()}


def test_features_are_computed_again_once_the_backbone_learns(tiny_checkpoint):
    args, policy = make(tiny_checkpoint)
    perturb(policy)
    policy.unfreeze(STAGES[:3])
    assert "features" in collect(args, policy).flat and not policy.trains_backbone
    for begun in (STAGES[:4], STAGES):
        policy.unfreeze(begun)
        batch = collect(args, policy)
        assert policy.trains_backbone and "images" in batch.flat and "features" not in batch.flat
        policy.zero_grad()
        loss, _, ratio_error = ppo_loss(policy, batch, torch.arange(32), args, False)
        assert ratio_error < 1e-5
        loss.backward()
        for stage, parameters in policy.groups().items():
            assert all((p.grad is not None and p.grad.abs().max() > 0) == (stage in begun) for p in parameters), stage


def test_kl_is_to_the_base_even_when_the_backbone_has_moved(tiny_checkpoint):
    """Against a second network that was never adapted."""
    args, policy = make(tiny_checkpoint)
    _, untouched = make(tiny_checkpoint)
    perturb(policy)
    policy.unfreeze(STAGES)
    batch, rows = collect(args, policy), torch.arange(5)
    obs, chain = batch.samples(rows)
    seen = obs._replace(features=policy.features(obs))
    assert (policy.features(obs) - untouched.features(obs)).abs().max() > 1e-3
    with torch.no_grad():
        expected = untouched.evaluate(obs, chain)[1]
    assert torch.equal(policy.base_mean(seen, chain), expected)
    assert (policy.evaluate(seen, chain)[1] - expected).abs().max() > 1e-3
    assert {p.requires_grad for parameters in policy.groups().values() for p in parameters} == {True}
    policy.unfreeze(("critic", "head"))
    policy.base_mean(obs, chain)
    thawed = {stage for stage, parameters in policy.groups().items() if any(p.requires_grad for p in parameters)}
    assert thawed == {"head"}


def test_checkpointed_activations_give_the_same_gradient(tiny_checkpoint):
    gradients = []
    for on in (False, True):
        args, policy = make(tiny_checkpoint, activation_checkpointing=on)
        perturb(policy)
        policy.unfreeze(STAGES)
        batch = collect(args, policy)
        batch.flat["log_prob"] += 0.05
        policy.zero_grad()
        ppo_loss(policy, batch, torch.arange(32), args, False)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable()]))
        wrapped = ["forward" in vars(block) for block in policy.blocks()]  # instead of the class's
        config = policy.net.config
        assert wrapped == [on] * (config.dit_layers + config.vl_layers + config.text_layers + config.vision_layers)
    assert gradients[0].norm() > 0 and (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_dropout_acts_in_the_update_alone(tiny_checkpoint):
    args, policy = make(tiny_checkpoint, lora_dropout=0.5)
    perturb(policy)
    assert torch.equal(actions(policy), actions(policy))
    batch = collect(args, policy)
    policy.adapters.train(True)
    assert ppo_loss(policy, batch, torch.arange(32), args, False)[2] > 1e-3
    policy.adapters.eval()
    assert ppo_loss(policy, batch, torch.arange(32), args, False)[2] < 1e-5


# ---------------------------------------------------------------- schedule


def schedule(*unfreeze: str, **overrides) -> list[Stage]:
    return parse_schedule(Args(unfreeze=unfreeze, lora_targets=tuple(TARGETS), **overrides))


def test_schedules():
    assert schedule(critic_warmup=5) == [Stage("critic", 0, None), *(Stage(name, 5, None) for name in STAGES[1:])]
    found = schedule("critic", "head:3", "vl:plateau", "llm:40:1e-5", "vision:plateau:2e-5")
    assert found == [
        Stage("critic", 0, None), Stage("head", 3, None), Stage("vl", None, None), Stage("llm", 40, 1e-5),
        Stage("vision", None, 2e-5),
    ]  # fmt: skip
    only = parse_schedule(Args(lora_targets=("vl-attention",)))
    assert [stage.name for stage in only] == ["critic", "vl"]


@pytest.mark.parametrize(
    "flags, start, remedy",
    [
        ({"lora_targets": ("dit-attention", "all")}, "--lora-targets all:", ", ".join(TARGETS)),
        ({"lora_targets": ()}, "--lora-targets:", "--category-layers"),
        ({"lora_targets": ("dit-attention",), "category_layers": "lora", "lora_dropout": 0.1}, "--lora-dropout:", "train"),
        ({"unfreeze": ("head:soon", "vl")}, "--unfreeze head:soon:", "plateau"),
        ({"unfreeze": ("head:1:fast", "vl")}, "--unfreeze head:1:fast:", "learning rate"),
        ({"unfreeze": ("head:1:1e-4:2", "vl")}, "--unfreeze head:1:1e-4:2:", "learning rate"),
        ({"unfreeze": ("head:-1", "vl")}, "--unfreeze head:-1:", "iteration"),
        ({"unfreeze": ("head:1:-1e-4", "vl")}, "--unfreeze head:1:-1e-4:", "learning rate"),
        ({"unfreeze": ("head:1:nan", "vl")}, "--unfreeze head:1:nan:", "learning rate"),
        ({"unfreeze": ("critic", "head:3", "head:5", "vl")}, "--unfreeze head:5:", "twice"),
        ({"unfreeze": ("head", "vl", "llm:9")}, "--unfreeze llm:9:", "critic, head, vl"),
        ({"unfreeze": ("head", "tail")}, "--unfreeze tail:", "critic, head, vl"),
        ({"unfreeze": ("critic", "head:3")}, "--unfreeze: vl", "--unfreeze"),
    ],
)
def test_what_cannot_be_a_schedule(flags, start, remedy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        resolve(Args(device="cpu", **flags))
    text = str(caught.value)
    assert text.startswith(start) and remedy in text and "\n" not in text


@pytest.fixture
def logger(tmp_path):
    made = RunLogger(tmp_path / "run", {}, script=ppo_gr00t_lora.__file__, total_iterations=9, track=False)
    yield made
    made.close()


def begin() -> dict:
    return {"begun": {}, "held": "", "smooth": None, "peak": -1.0, "peak_at": 0, "kl_base": 0.0}


def begun_at(args: Args, logger, success, kl) -> dict[str, int]:
    """When stages begin, for success and KL as functions of the iteration."""
    stages, run = parse_schedule(args), begin()
    for i in range(40):
        advance(stages, run, i, args, logger)
        watch(run, {"rollout/success": success(i), "update/kl_base": kl(i)}, i)
    return run["begun"]


def test_stages_begin_by_iteration_and_by_plateau(logger):
    unfreeze = ("critic", "head:2", "vl:plateau", "llm:plateau", "vision:30")
    args = Args(unfreeze=unfreeze, lora_targets=tuple(TARGETS), plateau=4, unfreeze_kl=10.0)
    # nothing improves: the peak of a stage is its first iteration, and four more go by
    found = begun_at(args, logger, lambda i: 0.3, lambda i: 1.0)
    assert found == {"critic": 0, "head": 2, "vl": 7, "llm": 12, "vision": 30}
    # success rises up to iteration 14 and falls back
    found = begun_at(args, logger, lambda i: 0.1 + 0.05 * i if i < 15 else 0.1, lambda i: 1.0)
    assert found == {"critic": 0, "head": 2, "vl": 19, "llm": 24, "vision": 30}
    # the KL is too high in iterations 10 to 19: llm, due in 12, waits for the end of the first one with a lower KL
    found = begun_at(args, logger, lambda i: 0.3, lambda i: 20.0 if 10 <= i < 20 else 1.0)
    assert found == {"critic": 0, "head": 2, "vl": 7, "llm": 21, "vision": 30}


def test_the_bound_holds_a_stage_back_and_says_so_once(logger, tmp_path):
    args = Args(unfreeze=("head", "vl:1"), unfreeze_kl=5.0)
    stages, run = parse_schedule(args), begin()
    for i, kl in enumerate([1.0, 6.0, 7.0, 5.0, 1.0]):
        advance(stages, run, i, args, logger)
        watch(run, {"update/kl_base": kl, "rollout/success": 0.5}, i)
    assert run["begun"] == {"head": 0, "vl": 1}  # the KL of iteration 0 was below the bound
    run = begin()
    for i, kl in enumerate([6.0, 6.0, 7.0, 5.0, 1.0]):
        advance(stages, run, i, args, logger)
        watch(run, {"update/kl_base": kl, "rollout/success": 0.5}, i)
    assert run["begun"] == {"head": 0, "vl": 4}
    logger.close()
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert sum("vl waits" in line for line in lines) == 1


def test_every_stage_has_its_own_rate_and_warm_up():
    args = resolve(Args(device="cpu", iterations=100, lr_warmup=3, lr_hold=0.5, learning_rate=1e-3))
    begun = {"head": 0, "vl": 10}
    head, vl, llm = Stage("head", 0, None), Stage("vl", 10, 2e-4), Stage("llm", None, None)
    assert [learning_rate(args, i, head, begun) for i in range(4)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    assert learning_rate(args, 10, vl, begun) == pytest.approx(5e-5) and learning_rate(args, 20, vl, begun) == 2e-4
    assert learning_rate(args, 99, vl, begun) == pytest.approx(2e-4 * (1 - 0.9 * 0.98))
    assert learning_rate(args, 20, llm, begun) == 0


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


def first_update(rank: int, world: int, port: int, checkpoint: Path, folder: Path) -> None:
    """The first update of one of several processes; each has its own environments' samples."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    ranks = Ranks.start("cpu")
    args, policy = make(checkpoint, minibatches=1, epochs=1, critic_epochs=1, kl_coef=0.01)
    perturb(policy)
    policy.unfreeze(STAGES)
    batch = collect(args, policy)
    n = 8 // world  # environments of a rank, in all four chunks
    mine = torch.arange(32).view(4, 8)[:, rank * n : (rank + 1) * n].flatten()
    batch.flat = {name: x[mine] for name, x in batch.flat.items()}
    parameters = [p for group in policy.groups().values() for p in group]
    optimizer = torch.optim.SGD([*parameters, *policy.critic.parameters()], lr=1e-3)
    update(policy, optimizer, batch, plan_minibatches(batch, args, 0, ranks, True), args, ranks)
    torch.save([p.detach() for p in [*parameters, *policy.critic.parameters()]], folder / f"{world}-{rank}.pt")
    ranks.stop()


def test_two_processes_make_the_same_first_update(tiny_checkpoint, tmp_path):
    for world in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        jobs = [CONTEXT.Process(target=first_update, args=(r, world, port, tiny_checkpoint, tmp_path)) for r in range(world)]
        for job in jobs:
            job.start()
        for job in jobs:
            job.join(120)
            assert job.exitcode == 0
    alone, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    _, untouched = make(tiny_checkpoint)
    perturb(untouched)
    start = [p for group in untouched.groups().values() for p in group] + list(untouched.critic.parameters())
    change = torch.cat([(a - s.detach()).flatten() for a, s in zip(alone, start)])
    error = torch.cat([(a - b).flatten() for a, b in zip(alone, first)])
    assert change.norm() > 0 and error.norm() < 1e-4 * change.norm()
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("checkpointing", [False, True])
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
        batch = collect(args, policy)
        loss, _, error = ppo_loss(policy, batch, torch.arange(8), args, True)
        loss.backward()
        assert error < 1e-4
        found.append(torch.cat([p.grad.flatten() for p in policy.trainable()]))
        blocks = [m for m in policy.modules() if m._compiled_call_impl is not None]
        expected = len(policy.net.backbone.vision_model.encoder.layers) + len(policy.net.backbone.language_model.layers)
        head = policy.net.action_head
        expected += len(head.model.transformer_blocks) + len(head.vl_self_attention.transformer_blocks)
        assert len(blocks) == (expected if compiled else 0)
    assert found[0].norm() > 0 and (found[1] - found[0]).norm() < 1e-4 * found[0].norm()
