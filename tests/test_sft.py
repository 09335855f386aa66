"""Imitation's gradients, through sft_gr00t.py's own functions: a tiny random GR00T, no simulator."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import sft_gr00t
from common import Ranks, RunLogger
from gr00t_n1d5 import Augmentation, Gr00tN1d5
from sft_gr00t import TASKS, Args, Demonstrations, Gr00tPolicy, Observation, UsageError, backward, make_policy, resolve
from tests import warm

torch.set_num_threads(1)
TEXTS = ("lift the red cube", "lift the blue cube")


def make(checkpoint, **overrides) -> Gr00tPolicy:
    args = resolve(Args(checkpoint=str(checkpoint), device="cpu", num_envs=8, **overrides))
    policy = make_policy(args, TEXTS)
    policy.net.backbone.requires_grad_(args.tune == "all")
    return policy


def demonstrations(n: int, chunk: int, g: torch.Generator) -> Demonstrations:
    images = torch.randint(256, (n, 1, 64, 64, 3), generator=g, dtype=torch.uint8)
    action = torch.randn(n, chunk, 4, generator=g)
    return Demonstrations(images, torch.randn(n, 5, generator=g), torch.arange(n) % 2, action)


def gradients(policy: Gr00tPolicy, rows: int = 13, augment: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a batch of generated demonstrations; it is no multiple of the micro-batches below."""
    g = torch.Generator().manual_seed(3)
    demos = demonstrations(20, policy.chunk, g)
    noise = torch.randn(rows, policy.chunk, policy.net.config.action_dim, generator=g)
    batch = (torch.randint(20, (rows,), generator=g), noise, torch.rand(rows, generator=g))
    loss = backward(policy, demos, *batch, Augmentation.draw(rows, g) if augment else None)
    return float(loss), {name: p.grad for name, p in policy.net.named_parameters() if p.grad is not None}


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in found.values()])


@pytest.mark.parametrize("tune", ["all", "head"])
@pytest.mark.parametrize("flags", [{"micro_batch_size": 4}, {"activation_checkpointing": True}])
def test_memory_options_do_not_change_the_gradient(tiny_checkpoint, tune, flags):
    loss, plain = gradients(make(tiny_checkpoint, tune=tune))
    other, found = gradients(make(tiny_checkpoint, tune=tune, **flags))
    assert other == pytest.approx(loss, rel=1e-5) and found.keys() == plain.keys()
    assert flat(plain).norm() > 0 and (flat(found) - flat(plain)).norm() < 1e-5 * flat(plain).norm()


def test_what_is_trained(tiny_checkpoint):
    """--tune head trains all of the head, the layers that read the features included, and nothing of the backbone."""
    _, found = gradients(make(tiny_checkpoint, tune="head"))
    assert all(name.startswith("action_head.") for name in found)
    for part in ("vlln", "vl_self_attention", "model.transformer_blocks.0.attn1.to_k", "state_encoder", "action_decoder"):
        own = [x for name, x in found.items() if name.startswith(f"action_head.{part}")]
        assert own and any(x.abs().max() > 0 for x in own), part  # the stand-in statistics make the state 0
    _, found = gradients(make(tiny_checkpoint, tune="all"))
    assert any(name.startswith("backbone.vision_model") and x.abs().max() > 0 for name, x in found.items())


def test_bfloat16_backbone(tiny_checkpoint):
    _, plain = gradients(make(tiny_checkpoint, tune="head"))
    _, found = gradients(make(tiny_checkpoint, tune="head", backbone_bf16=True))
    assert not torch.equal(flat(found), flat(plain))
    assert torch.cosine_similarity(flat(found), flat(plain), 0) > 0.99
    with pytest.raises(UsageError, match="--backbone-bf16.*--tune head"):
        make(tiny_checkpoint, tune="all", backbone_bf16=True)


def test_augmentation_is_drawn_once_per_sample(tiny_checkpoint):
    """It changes the gradient; how a batch is cut does not: every sample keeps its own draw."""
    _, plain = gradients(make(tiny_checkpoint))
    loss, found = gradients(make(tiny_checkpoint), augment=True)
    other, cut = gradients(make(tiny_checkpoint, micro_batch_size=4), augment=True)
    assert (flat(found) - flat(plain)).norm() > 0.05 * flat(plain).norm()
    assert other == pytest.approx(loss, rel=1e-5) and (flat(cut) - flat(found)).norm() < 1e-5 * flat(found).norm()


def test_augmentation_by_default_at_full_size(tiny_checkpoint):
    def resolved(**flags):
        return resolve(Args(device="cpu", **flags)).augment

    assert resolved() == resolved(checkpoint=str(tiny_checkpoint)) == "off"
    assert resolved(checkpoint="nvidia/GR00T-N1.5-3B") == "on"
    assert resolved(checkpoint=str(tiny_checkpoint), augment="on") == "on"
    assert resolved(checkpoint="nvidia/GR00T-N1.5-3B", augment="off") == "off"


def test_a_task_without_an_expert():
    with pytest.raises(UsageError, match="^--task Isaac-Humanoid: has no expert to learn from; Tabletop-Lift-Cube-v0 has$"):
        resolve(Args(task="Isaac-Humanoid", device="cpu"))
    assert resolve(Args(task="Isaac-Humanoid", device="cpu", checkpoint="x", evaluate=True)).task == "Isaac-Humanoid"


# ---------------------------------------------------------------- several processes

STEPS, CLIP, BATCH = 3, 0.05, 12
AVERAGED = {"plain": {"max_grad_norm": 1e9}, "clipped": {"max_grad_norm": CLIP}}
SHARDED = {
    "plain": {"fsdp": True, "max_grad_norm": 1e9},
    "clipped": {"fsdp": True, "max_grad_norm": CLIP, "activation_checkpointing": True, "micro_batch_size": 4},
}
VARIANTS = {f"{kind} averaged": x for kind, x in AVERAGED.items()} | {f"{kind} sharded": x for kind, x in SHARDED.items()}


def of_rank(rank: int, chunk: int) -> Demonstrations:
    """Ranks keep different numbers of demonstrations: some episodes fail."""
    return demonstrations(20 - 3 * rank, chunk, torch.Generator().manual_seed(3 + rank))


def train_in_two(rank: int, port: int, checkpoint: Path, folder: Path) -> None:
    """One of two processes, as torchrun would start it: `train` with generated demonstrations, in every variant.

    Notes the gradients of each optimizer step and what the averaged weights do after it.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    ranks, found = Ranks.start("cpu"), {}
    step = torch.optim.AdamW.step

    def noted(optimizer, *args, **kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        note["local"].append(sum(g.to_local().numel() if hasattr(g, "to_local") else g.numel() for g in grads))
        note["gradients"].append([g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in grads])
        return step(optimizer, *args, **kwargs)

    def evaluate(args, env, policy, ranks):
        assert isinstance(policy, Gr00tPolicy)
        note["actions"].append(policy.act(observation()).action)
        return {}

    torch.optim.AdamW.step, sft_gr00t.evaluate = noted, evaluate
    for name, flags in VARIANTS.items():
        note = found[name] = {"gradients": [], "actions": [], "local": []}
        common = {"steps": STEPS, "batch_size": BATCH, "eval_every": 1, "exp_name": name}
        args = resolve(Args(checkpoint=str(checkpoint), device="cpu", num_envs=8, **common, **flags))
        policy = make_policy(args, TEXTS)
        sft_gr00t.collect = lambda *_, chunk=policy.chunk: of_rank(rank, chunk)
        env = SimpleNamespace(images=lambda: torch.zeros(1, 1, 64, 64, 3), task=TASKS[args.task])
        logger = RunLogger(folder / name, {}, script=__file__, total_iterations=STEPS, track=False, is_main=rank == 0)
        sft_gr00t.train(args, env, policy, logger, ranks, TEXTS)
        logger.close()
        weights = list(policy.net.parameters())
        for _ in range(2):  # what has been gathered once must not be used again
            note["actions"].append(policy.act(observation()).action)
            with torch.no_grad():
                torch._foreach_mul_(weights, 1.01)
    torch.save(found, folder / f"{rank}.pt")
    ranks.stop()


def observation() -> Observation:
    g = torch.Generator().manual_seed(9)
    images = torch.randint(256, (6, 1, 64, 64, 3), generator=g, dtype=torch.uint8)
    return Observation(images, torch.randn(6, 5, generator=g), torch.arange(6) % 2)


@pytest.fixture(scope="module")
def two(tiny_checkpoint, tmp_path_factory):
    """The folder of two processes that trained together, and what each of them noted."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [warm.CONTEXT.Process(target=train_in_two, args=(rank, port, tiny_checkpoint, folder)) for rank in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(300)
        assert job.exitcode == 0
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """Distance relative to b's norm."""
    a, b = (torch.cat([x.detach().flatten() for x in xs]) for xs in (a, b))
    return float((a - b).norm() / b.norm())


def test_gradients_are_those_of_both_ranks_batches(tiny_checkpoint, two):
    """The first step's, against one process that holds the union of the demonstrations and both halves of the batch."""
    policy = make(tiny_checkpoint)
    shares = [of_rank(rank, policy.chunk) for rank in range(2)]
    state, action = (torch.cat([getattr(x, name) for x in shares]) for name in ("state", "action"))
    args = Args(checkpoint=str(tiny_checkpoint))
    processor = (policy.net.config, state, action.flatten(0, 1), {}, policy.processor.tokenizer)
    policy.processor = sft_gr00t.make_processor(args, *processor)
    for rank, demos in enumerate(shares):
        g = torch.Generator().manual_seed(args.seed + 1_000_003 * rank)
        rows = torch.randint(len(demos.state), (BATCH // 2,), generator=g)
        noise = torch.randn(len(rows), policy.chunk, policy.net.config.action_dim, generator=g)
        backward(policy, demos, rows, noise, policy.net.action_head.sample_time(len(rows), g))  # adds up
    parameters = [p for p in policy.net.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad / 2
    for kind, most in (("plain", 1e9), ("clipped", CLIP)):
        norm = torch.nn.utils.clip_grad_norm_(parameters, most)
        assert norm > 2 * CLIP
        expected = [p.grad for many in (True, False) for p in parameters if (p.ndim > 1) == many]
        for how in ("averaged", "sharded"):
            for rank in range(2):
                assert apart(two[1][rank][f"{kind} {how}"]["gradients"][0], expected) < 1e-5, (kind, how, rank)


@pytest.mark.parametrize("kind", SHARDED)
def test_sharded_training_is_averaged_training(two, kind):
    """Later gradients depend on the weights; the actions are the moving average's, which is sharded as well."""
    folder, notes = two
    name = f"{kind} sharded"
    whole = sum(g.numel() for g in notes[0][name]["gradients"][0])
    for rank in range(2):
        a, b = notes[rank][name], notes[rank][f"{kind} averaged"]
        assert b["local"][0] == whole and a["local"][0] < 0.6 * whole
        for i in range(STEPS):
            assert apart(a["gradients"][i], b["gradients"][i]) < 1e-4, (rank, i)
        for i in range(STEPS + 2):
            assert (a["actions"][i] - b["actions"][i]).abs().max() < 1e-4, (rank, i)
            assert torch.equal(a["actions"][i], notes[0][name]["actions"][i])
            assert i == 0 or (a["actions"][i] - a["actions"][i - 1]).abs().max() > 1e-3
    assert sum(notes[rank][name]["local"][0] for rank in range(2)) == whole
    logs = [(folder / name / "metrics.jsonl").read_text().splitlines() for name in VARIANTS]
    assert all(len(log) == STEPS for log in logs)


@pytest.mark.parametrize("name", VARIANTS)
def test_sharded_weights_are_saved_whole(two, name):
    folder, notes = two
    path = folder / name / "checkpoints" / "last"
    averaged = folder / f"{name.split()[0]} averaged" / "checkpoints" / "last"
    files = {p.name for p in averaged.iterdir()}
    assert {p.name for p in path.iterdir()} == files and "model.safetensors" in files
    net, other = (Gr00tN1d5.from_pretrained(p) for p in (path, averaged))
    assert {n: p.shape for n, p in net.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert apart(list(net.parameters()), list(other.parameters())) < 1e-5
    flags = {k: v for k, v in VARIANTS[name].items() if k != "fsdp"}
    args = resolve(Args(checkpoint=str(path), device="cpu", evaluate=True, exp_name="x", **flags))
    assert torch.equal(make_policy(args, TEXTS).act(observation()).action, notes[0][name]["actions"][STEPS - 1])


@pytest.mark.parametrize(
    "world, flags, start, remedy",
    [
        (1, {"fsdp": True}, "--fsdp:", "torchrun"),
        (2, {"fsdp": True, "tune": "head"}, "--fsdp:", "--tune all"),
        (4, {"num_envs": 30}, "--num-envs 30:", "4 ranks"),
        (4, {"batch_size": 30}, "--batch-size 30:", "4 ranks"),
    ],
)
def test_what_ranks_cannot_share(world, flags, start, remedy, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(UsageError) as caught:
        resolve(Args(device="cpu", **flags))
    assert str(caught.value).startswith(start) and remedy in str(caught.value)
