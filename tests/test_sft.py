"""Imitation's gradients, through sft_gr00t.py's own functions: a tiny random GR00T, no simulator."""

from __future__ import annotations

import copy
import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

import ppo_isaac
import sft_gr00t
from common import Noise, Ranks, Run
from gr00t_n1d5.network import Gr00tConfig, Gr00tN1d5
from gr00t_n1d5.processor import Augmentation, Gr00tProcessor, tiny_tokenizer
from sft_gr00t import TASKS, Args, Gr00tActor, backward, check, draw, make_processor
from tests import warm

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny random network with rows for 32 embodiments and padded actions, for the embedded task."""
    config, folder = Gr00tConfig.tiny(action_dim=6, num_embodiments=32), tmp_path_factory.mktemp("checkpoint") / "tiny"
    torch.manual_seed(0)
    Gr00tN1d5(config).save_pretrained(folder)
    words = tiny_tokenizer(["lift", "the", "red", "blue", "cube"], config)
    data = ({"all": torch.randn(100, n)} for n in (5, 4))
    Gr00tProcessor.from_statistics(config, "new_embodiment", *data, {}, words).save_pretrained(folder)
    return folder


def given(checkpoint, **flags) -> Args:
    return check(Args(checkpoint=str(checkpoint), device="cpu", num_envs=8, **flags))


def demonstrations(n: int, g: torch.Generator) -> TensorDict:
    images = torch.randint(256, (n, 1, 64, 64, 3), generator=g, dtype=torch.uint8)
    found = {"images": images, "action": torch.randn(n, 8, 4, generator=g), "state": torch.randn(n, 5, generator=g)}
    return TensorDict(found | {"prompt": torch.arange(n) % 2}, n)


def gradients(checkpoint, augment: bool = False, **flags) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a batch of generated demonstrations; it is no multiple of the micro-batches below."""
    policy, g = Gr00tActor(given(checkpoint, **flags)), torch.Generator().manual_seed(3)
    demos, drawn = demonstrations(20, g), draw(Args(), policy, 20, 13, g)
    if augment:
        drawn.update(Augmentation.draw(13, g)._asdict())
    loss = backward(policy, demos, drawn)
    return float(loss), {name: p.grad for name, p in policy.net.named_parameters() if p.grad is not None}


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in found.values()])


HUMANOID = "Isaac-Humanoid-Direct"


def write_teacher(folder: Path, task: str = HUMANOID, **flags) -> ppo_isaac.ActorCritic:
    """A state policy as a run of ppo_isaac.py leaves it."""
    torch.manual_seed(0)
    args = ppo_isaac.Args(task=task, device="cpu", hidden=(16,), normalize_obs=True, **flags)
    policy = ppo_isaac.ActorCritic(ppo_isaac.Spaces((87 - len(args.hide_obs),), (), 21, ()), args)
    (folder / "checkpoints" / "best").mkdir(parents=True)
    policy.save(folder / "checkpoints" / "best")
    return policy


@pytest.mark.parametrize("hidden", [(), (0, 86)])
def test_a_teacher_acts_on_the_tasks_own_observation(hidden, tmp_path):
    policy, own = write_teacher(tmp_path, hide_obs=hidden), torch.randn(5, 87)
    for expert in (tmp_path, tmp_path / "checkpoints" / "best"):
        act = sft_gr00t.teacher(Args(task=HUMANOID, expert=str(expert), device="cpu"))
        seen = own[:, 1:86] if hidden else own
        assert torch.equal(act(SimpleNamespace(own_obs={"policy": own})), policy.act(seen, None)[0])
        assert torch.equal(act(SimpleNamespace(obs_buf={"own_policy": own})), policy.act(seen, None)[0])
    with pytest.raises(SystemExit, match="^--expert .*: observes 8[57] columns, Isaac-Humanoid-Direct has 8[45]$"):
        act(SimpleNamespace(own_obs={"policy": own[:, :85]}))


def test_teachers_that_do_not_fit_are_refused(tmp_path):
    def refusal(task: str, run: Path) -> str:
        with pytest.raises(SystemExit) as error:
            sft_gr00t.check(Args(task=task, expert=str(run)))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refusal(HUMANOID, tmp_path).startswith(f"--expert {tmp_path}: no policy of ppo_isaac.py there")
    write_teacher(tmp_path / "ant", "Isaac-Ant-Direct")
    assert refusal(HUMANOID, tmp_path / "ant").startswith(f"--expert {tmp_path}/ant: --task Isaac-Ant-Direct: no row")
    write_teacher(tmp_path / "other")
    assert "a policy for Isaac-Humanoid-Direct with 21 actions, not for Isaac-Lift-Franka with 9" in refusal(
        "Isaac-Lift-Franka", tmp_path / "other"
    )
    write_teacher(tmp_path / "lstm", recurrent=True)
    assert "has an LSTM" in refusal(HUMANOID, tmp_path / "lstm")
    assert "has no scripted expert" in str(pytest.raises(SystemExit, sft_gr00t.check, Args(task=HUMANOID)).value)


@pytest.mark.parametrize("tune", ["all", "head"])
@pytest.mark.parametrize("flags", [{"micro_batch_size": 4}, {"activation_checkpointing": True}])
def test_memory_options_do_not_change_the_gradient(checkpoint, tune, flags):
    loss, plain = gradients(checkpoint, tune=tune)
    other, found = gradients(checkpoint, tune=tune, **flags)
    assert other == pytest.approx(loss, rel=1e-5) and found.keys() == plain.keys()
    assert flat(plain).norm() > 0 and (flat(found) - flat(plain)).norm() < 1e-5 * flat(plain).norm()


def test_what_is_trained(checkpoint):
    """--tune head trains all of the head, the layers that read the features included, and nothing of the backbone."""
    _, found = gradients(checkpoint, tune="head")
    assert all(name.startswith("action_head.") for name in found)
    for part in ("vlln", "vl_self_attention", "model.transformer_blocks.0.attn1.to_k", "state_encoder", "action_decoder"):
        own = [x for name, x in found.items() if name.startswith(f"action_head.{part}")]
        assert own and any(x.abs().max() > 0 for x in own), part  # the blank statistics make the state 0
    _, found = gradients(checkpoint, tune="all")
    assert any(name.startswith("backbone.vision_model") and x.abs().max() > 0 for name, x in found.items())


def test_bfloat16_backbone(checkpoint):
    _, plain = gradients(checkpoint, tune="head")
    _, found = gradients(checkpoint, tune="head", precision="bf16")
    assert not torch.equal(flat(found), flat(plain))
    assert torch.cosine_similarity(flat(found), flat(plain), 0) > 0.99


def test_augmentation_is_drawn_once_per_sample(checkpoint):
    """It changes the gradient; how a batch is cut does not: every sample keeps its own draw."""
    _, plain = gradients(checkpoint)
    loss, found = gradients(checkpoint, augment=True)
    other, cut = gradients(checkpoint, augment=True, micro_batch_size=4)
    assert (flat(found) - flat(plain)).norm() > 0.05 * flat(plain).norm()
    assert other == pytest.approx(loss, rel=1e-5) and (flat(cut) - flat(found)).norm() < 1e-5 * flat(found).norm()


def test_the_other_embodiments_are_left_alone(checkpoint, tmp_path):
    args = given(checkpoint)
    policy, g = Gr00tActor(args), torch.Generator().manual_seed(3)
    optimizer = torch.optim.AdamW(policy.trainable(), 1e-2)
    backward(policy, demonstrations(4, g), draw(args, policy, 4, 4, g))
    optimizer.step()
    policy.save(tmp_path / "new")
    old, new = (Gr00tN1d5.from_pretrained(x).action_head.action_decoder.layer2.W for x in (checkpoint, tmp_path / "new"))
    assert [i for i in range(32) if not torch.equal(old[i], new[i])] == [31]  # the new_embodiment's


# ---------------------------------------------------------------- several processes

STEPS, CLIP, BATCH = 3, 0.05, 12
AVERAGED = {"plain": {}, "clipped": {}}
SHARDED = {"plain": {"fsdp": True}, "clipped": {"fsdp": True, "activation_checkpointing": True, "micro_batch_size": 4}}
VARIANTS = {f"{kind} averaged": x for kind, x in AVERAGED.items()} | {f"{kind} sharded": x for kind, x in SHARDED.items()}


def of_rank(rank: int) -> tuple[TensorDict, TensorDict]:
    """Ranks keep different numbers of demonstrations: some episodes fail."""
    g = torch.Generator().manual_seed(3 + rank)
    return demonstrations(20 - 3 * rank, g), demonstrations(9 - rank, g)


def act(policy: Gr00tActor) -> Tensor:
    obs = demonstrations(6, torch.Generator().manual_seed(9)).exclude("action")
    return policy.act(obs, Noise("cpu", Ranks(0, 1), 0))["action"]


def train_in_two(rank: int, port: int, checkpoint: Path, folder: Path) -> None:
    """One of two processes, as torchrun would start it: `train` with generated demonstrations, in every variant.

    Notes the gradients of each optimizer step and what the averaged weights do after it.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ["WANDB_MODE"] = "disabled"
    os.chdir(folder)
    torch.set_num_threads(1)
    ranks, found = Ranks.start("cpu"), {}
    step = torch.optim.AdamW.step

    def noted(optimizer, *args, **kwargs):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        note["local"].append(sum(g.to_local().numel() if hasattr(g, "to_local") else g.numel() for g in grads))
        note["gradients"].append([g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in grads])
        return step(optimizer, *args, **kwargs)

    def evaluate(args, env, policy, ranks):
        note["actions"].append(act(policy))
        return {"mean": 0.0, "low": 0.0, "high": 0.5, "episodes": 8}

    torch.optim.AdamW.step, sft_gr00t.evaluate = noted, evaluate
    sft_gr00t.collect = lambda *_: of_rank(rank)
    for name, flags in VARIANTS.items():
        note = found[name] = {"gradients": [], "actions": [], "local": []}
        sft_gr00t.MAX_GRAD_NORM = CLIP if name.startswith("clipped") else 1e9
        args = given(checkpoint, steps=STEPS, batch_size=BATCH, eval_every=1, exp_name=name.replace(" ", "_"), **flags)
        policy = Gr00tActor(args)
        with Run(vars(args), sft_gr00t.__file__, ranks, args.exp_name, STEPS, "cpu") as run:
            sft_gr00t.train(args, SimpleNamespace(task=TASKS[args.task]), policy, run, ranks)
        weights = list(policy.net.parameters())
        for _ in range(2):  # what has been gathered once must not be used again
            note["actions"].append(act(policy))
            with torch.no_grad():
                torch._foreach_mul_(weights, 1.01)
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two(checkpoint, tmp_path_factory):
    """The folder of the runs of two processes that trained together, and what each of them noted."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs = [warm.CONTEXT.Process(target=train_in_two, args=(rank, port, checkpoint, folder)) for rank in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(300)
        assert job.exitcode == 0
    return folder / "runs", [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """Distance relative to b's norm."""
    a, b = (torch.cat([x.detach().flatten() for x in xs]) for xs in (a, b))
    return float((a - b).norm() / b.norm())


def test_gradients_are_those_of_both_ranks_batches(checkpoint, two):
    """The first step's, against one process that holds the union of the demonstrations and both halves of the batch."""
    args = given(checkpoint)
    policy, shares = Gr00tActor(args), [of_rank(rank)[0] for rank in range(2)]
    state, action = torch.cat([x["state"] for x in shares]), torch.cat([x["action"].flatten(0, 1) for x in shares])
    policy.processor = make_processor(args, policy.net.config, policy.processor.tokenizer, state, action)
    for rank, demos in enumerate(shares):
        g = torch.Generator().manual_seed(args.seed + 1_000_003 * rank)
        backward(policy, demos, draw(args, policy, len(demos), BATCH // 2, g))  # adds up
    parameters = policy.trainable()
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


@pytest.mark.parametrize("name", VARIANTS)
def test_sharded_weights_are_saved_whole(two, name):
    """And what was evaluated before the last step is kept, too."""
    folder, notes = two
    saved = folder / name.replace(" ", "_") / "checkpoints"
    assert {p.name for p in saved.iterdir()} == {"last", *(f"step_{i + 1:06d}" for i in range(STEPS - 1))}
    averaged = folder / f"{name.split()[0]}_averaged" / "checkpoints" / "last"
    net, other = (Gr00tN1d5.from_pretrained(p) for p in (saved / "last", averaged))
    assert {n: p.shape for n, p in net.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    assert apart(list(net.parameters()), list(other.parameters())) < 1e-5
    flags = {k: v for k, v in VARIANTS[name].items() if k != "fsdp"}
    args = given(saved / "last", evaluate=True, **flags)
    policy, losses = Gr00tActor(args), []
    assert torch.equal(act(policy), notes[0][name]["actions"][STEPS - 1])
    for rank in range(2):
        unseen = of_rank(rank)[1]
        drawn = draw(args, policy, len(unseen), 4 * BATCH // 2, torch.Generator().manual_seed(args.seed))
        losses.append(float(sft_gr00t.held_out_loss(policy, unseen, drawn)))
    rows = [json.loads(line) for line in (saved.parent / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval/loss"] == pytest.approx(sum(losses) / 2, rel=1e-4) and rows[-1]["eval/loss"] != rows[-2]["eval/loss"]


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "world, flags, start, remedy",
    [
        (1, {"fsdp": True}, "--fsdp:", "torchrun"),
        (2, {"fsdp": True, "tune": "head"}, "--fsdp:", "--tune all"),
        (4, {"num_envs": 30}, "--num-envs 30:", "4 ranks"),
        (4, {"batch_size": 30}, "--batch-size 30:", "4 ranks"),
        (1, {"precision": "bf16"}, "--precision bf16:", "--tune head"),
        (1, {"task": "Isaac-Humanoid"}, "--task Isaac-Humanoid:", "Tabletop-Lift-Cube-v0"),
        (1, {"evaluate": True}, "--evaluate:", "--checkpoint"),
    ],
)
def test_what_cannot_work(world, flags, start, remedy, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(SystemExit) as caught:
        check(Args(device="cpu", **flags))
    assert str(caught.value).startswith(start) and remedy in str(caught.value)
    if "task" in flags:
        with pytest.raises(SystemExit, match="--checkpoint x: no such folder"):
            check(Args(task="Isaac-Humanoid", checkpoint="x", evaluate=True))  # which needs no expert


def test_settings_by_size(checkpoint, tmp_path, monkeypatch):
    """At full size NVIDIA's recipe: head and DiT at 1e-4, the backbone frozen in bf16, images augmented, memory planned."""

    def parsed(*flags: str) -> Args:
        monkeypatch.setattr("sys.argv", ["sft_gr00t.py", *flags])
        return sft_gr00t.parse()

    (tmp_path / "config.json").write_text(json.dumps(Gr00tConfig().to_dict()))  # no weights: nothing is loaded yet
    full = ("--checkpoint", str(tmp_path))
    for flags in ((), ("--checkpoint", str(checkpoint))):
        assert (parsed(*flags).tune, parsed(*flags).learning_rate, parsed(*flags).augment) == ("all", 1e-3, False)
    found = parsed(*full)
    assert (found.tune, found.learning_rate, found.augment, found.precision) == ("head", 1e-4, True, "bf16")
    assert found.max_memory_gb < 80
    assert parsed("--augment").augment and not parsed(*full, "--no-augment").augment


def test_the_average_of_the_weights(checkpoint):
    """What is evaluated and saved lags behind: 0.99 of it stays with each step, less in the first ones."""
    simulate = SimpleNamespace(state={"iteration": 0}, event=lambda *_: None, log=lambda *a, **k: None, result=lambda **k: None)
    saved, seen = {}, []
    simulate.save = lambda name, save, *_: saved.setdefault(name, save)
    args = given(checkpoint, steps=25, batch_size=4, eval_episodes=0, tune="head")
    policy, g = Gr00tActor(args), torch.Generator().manual_seed(3)
    trained = policy.net.action_head.vlln.weight
    before, step = trained.detach().clone(), torch.optim.AdamW.step
    averages = [before.clone()]

    def watched(self, *a):
        out = step(self, *a)
        seen.append(trained.detach().clone())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", watched)
        patch.setattr(sft_gr00t, "collect", lambda *_: (demonstrations(20, g), demonstrations(8, g)))
        copied, deepcopy = [], copy.deepcopy

        def kept(x, memo=None):
            copied.append(deepcopy(x, memo))
            return copied[-1]

        patch.setattr(sft_gr00t.copy, "deepcopy", kept)
        sft_gr00t.train(args, None, policy, simulate, Ranks(0, 1))
    for i, x in enumerate(seen):
        decay = min(0.99, (1 + i) / (10 + i))
        averages.append(averages[-1] + (1 - decay) * (x - averages[-1]))
    (found,) = (x.net for x in copied if isinstance(x, Gr00tActor))
    torch.testing.assert_close(found.action_head.vlln.weight, averages[-1])
    assert not torch.allclose(found.action_head.vlln.weight, seen[-1], atol=1e-5)
    assert found.backbone is policy.net.backbone and list(saved) == ["last"]  # what is frozen is not copied


def test_demonstrations_that_go_astray():
    """Noise is executed in four steps before each observation, never in the chunk after it, and never recorded."""

    class Env:
        num_envs, success = 64, torch.ones(64, dtype=torch.bool)

        def __init__(self, noise):
            expert = lambda env: torch.full((64, 4), 0.25)  # noqa: E731
            self.task = replace(TASKS["Tabletop-Lift-Cube-v0"], expert=expert, demo_params={}, demo_noise=noise, demo_steps=80,
                                horizon=160)  # fmt: skip
            self.env, self.executed, self.seen, self.begins = None, [], [], []

        def reset(self, seed):
            self.begins.append(len(self.executed))
            self.success = torch.zeros(64, dtype=torch.bool)
            return self.observe()

        def observe(self):
            self.seen.append(len(self.executed))
            return TensorDict({"state": torch.zeros(64, 5)}, 64)

        def step_chunk(self, actions, last):
            self.executed.append(actions[:, 0])
            self.success = torch.full((64,), len(self.executed) - self.begins[-1] >= 82)

        @property
        def ended(self):
            return self.success

    run, args = SimpleNamespace(event=lambda text: None), Args(device="cpu", num_envs=64, demos=256, frames=5)
    for noise in ({}, {"gripper_delta": 0.2}):
        executed = []
        for _ in range(2):
            env = Env(noise)
            demos, unseen = sft_gr00t.collect(args, env, 8, run, Ranks(0, 1))
            executed.append(torch.stack(env.executed) - 0.25)
            assert len(demos) == 4 * len(unseen) == 4 * 64 * args.frames and (demos["action"] == 0.25).all()
        assert torch.equal(*executed) and not executed[0][..., 3].any()  # by the seed; the gripper never
        astray = executed[0][..., :3].any(-1).any(-1)  # (steps,)
        later = [t for t in env.seen if t not in env.begins]
        moments = {t - max(begin for begin in env.begins if begin <= t) for t in later}
        assert len(later) == 5 * 4 and len(moments) > 4  # other moments in other batches
        lasts = [max(t for t in env.seen if t < end) for end in (*env.begins[1:], len(executed[0]))]
        ends = [max(begin + 82, last + 8) for begin, last in zip(env.begins, lasts)]
        assert ends == [*env.begins[1:], len(executed[0])]  # a batch is over when all is shown
        if not noise:
            assert not astray.any()
            continue
        for t in env.seen:
            assert not astray[t : t + 8].any()
        assert sorted({t - i for t in later for i in range(1, 5)}) == astray.nonzero()[:, 0].tolist()
        assert abs(executed[0][astray][..., :3].std() - 0.2) < 0.01
