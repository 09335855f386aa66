"""ppo_isaac_rgb.py: what images change about PPO, with a film in the simulator's place, and whole runs in the simulator.

The comments number the Atari details of "The 37 Implementation Details of PPO" (Huang et al., ICLR blog track 2022).
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import Tensor

import ppo_isaac_rgb
from common import Metrics, Ranks, StageTimer
from ppo_isaac_rgb import (
    ActorCritic,
    Args,
    CameraEnv,
    Network,
    Storage,
    colour_camera,
    flat_parameter,
    grey,
    make_batch,
    make_env,
    plan_minibatches,
    ppo_loss,
    rollout,
    update,
)
from tasks.stock import Spaces, task_config
from tests import assets
from tests.test_ppo_runs import metrics, ppo

torch.set_num_threads(1)
ALONE = Ranks(0, 1)
BOX = gym.spaces.Box(-1.0, 1.0, (2,))
CHOICES = gym.spaces.MultiDiscrete([3, 2])
N, T = 3, 12


class Film:
    """A task as Isaac Lab would make it, which resets inside `step`; every image tells environment, episode and age.

    Episode e of environment n takes `length(n, e)` steps; even ones are terminated, odd ones time out.
    """

    def __init__(self, space: gym.Space = BOX, length=lambda n, e: 2 + (n + 3 * e) % 6):
        self.num_envs, self.device, self.max_episode_length, self.single_action_space = N, "cpu", 9, space
        self.unwrapped, self.extras, self.common_step_counter, self.length = self, {}, 0, length
        self.episode_length_buf, self.step_dt = torch.zeros(N, dtype=torch.long), 0.1
        self.scene = SimpleNamespace(sensors={"eye": self}, articulations={})
        self.data, self.rendered, self.received = SimpleNamespace(output={}), 0, []

    @staticmethod
    def shade(n: int, episode: int, age: int) -> int:
        return (71 * n + 29 * episode + 3 * age) % 256

    def observe(self) -> dict[str, Tensor]:
        """As the camera does: renders when it is asked."""
        film = self

        class Lazy(dict):
            def __getitem__(self, kind):
                film.rendered += 1
                shades = [film.shade(n, *pair) for n, pair in enumerate(zip(film.episode.tolist(), film.age.tolist()))]
                image = torch.tensor(shades, dtype=torch.uint8)[:, None, None, None].expand(N, 10, 12, 4)
                return SimpleNamespace(torch=image)

        self.data.output = Lazy()
        return self._get_observations()

    def reset(self, seed: int):
        self.age, self.episode = torch.zeros(N, dtype=torch.long), torch.zeros(N, dtype=torch.long)
        self.reset_buf = torch.zeros(N, dtype=torch.bool)
        return self.observe(), {}

    def reward(self) -> Tensor:
        """One that changes its sign."""
        return (self.age + torch.arange(N)).float() * 0.5 - 1.5

    def step(self, action: Tensor):
        self.received.append(action.clone())
        self.age += 1
        reward = self.reward()
        end = self.age >= torch.tensor([self.length(n, e) for n, e in enumerate(self.episode.tolist())])
        terminated, truncated, self.reset_buf = end & (self.episode % 2 == 0), end & (self.episode % 2 == 1), end
        if end.any():
            self.extras["final_obs"] = self.observe()
            self.age, self.episode = self.age * ~end, self.episode + end
        return self.observe(), reward, terminated, truncated, self.extras


@pytest.fixture
def film(monkeypatch):
    """`gym.make` gives the task that is handed over as configuration."""
    monkeypatch.setattr(gym, "make", lambda task, cfg: cfg.film)


def scene(*kinds: str) -> SimpleNamespace:
    return SimpleNamespace(robot=object(), eye=SimpleNamespace(data_types=list(kinds)))


def make(space: gym.Space = BOX, finite: bool = False, **overrides):
    """Arguments, environment, policy and buffers, before the first rollout."""
    made = {key: overrides.pop(key) for key in ("length",) if key in overrides}
    wanted = {"num_envs": N, "num_steps": T, "minibatches": 2, "epochs": 2, "stagger": False, **overrides}
    args = Args(task="Film", device="cpu", exp_name="test", **wanted)
    cfg = SimpleNamespace(is_finite_horizon=finite, film=Film(space, **made), scene=scene("rgba"))
    env = CameraEnv(args.task, cfg, ALONE, args)
    torch.manual_seed(args.seed)
    policy, store = ActorCritic(env.spaces, args), Storage(args, env)
    with torch.no_grad():
        for layer in (policy.actor, policy.critic):
            layer.weight.normal_(generator=torch.Generator().manual_seed(5), std=0.1)
    store.begin(env, args, 0, None)
    return args, env, policy, store


def collect(args, env, policy, store, rollouts: int = 1, log: Metrics | None = None):
    """The batch of the last of some rollouts."""
    for i in range(rollouts):
        rollout(env, policy, store, args, i, ALONE, StageTimer("cpu"))
        batch = make_batch(env, policy, store, args, ALONE, log or Metrics("cpu", ALONE))
    return batch


def stack_of(n: int, episode: int, age: int) -> list[int]:
    """What the last four frames show, the first frame of the episode standing in for those before it."""
    return [Film.shade(n, episode, max(age - back, 0)) for back in (3, 2, 1, 0)]


def shades(stack: Tensor) -> list:
    """(..., 84, 84) frames of one shade each as numbers."""
    flat = stack.flatten(-2)
    assert flat.dtype == torch.uint8 and (flat == flat[..., :1]).all()
    return flat[..., 0].tolist()


# ---------------------------------------------------------------- 5: grey, 84 x 84, bytes


@pytest.mark.parametrize("height, width", [(96, 96), (84, 84), (100, 120), (30, 210)])
def test_grey_is_the_luma_of_the_covered_area(height, width):
    """Against the same image magnified 84 times, whose pixels can be counted out evenly."""
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    luma = images.astype(np.float64) @ [0.299, 0.587, 0.114]
    rows = np.repeat(luma, 84, axis=1).reshape(2, 84, height, width).mean(2)
    exact = np.repeat(rows, 84, axis=2).reshape(2, 84, 84, width).mean(3)
    found = grey(torch.from_numpy(images))
    assert found.shape == (2, 84, 84) and found.dtype == torch.uint8
    assert np.abs(found.numpy() - exact).max() <= 0.5 + 1e-3  # rounded to the nearest


def test_grey_knows_the_colours():
    pure = 255 * torch.eye(3, dtype=torch.uint8)[:, None, None].expand(3, 96, 96, 3)
    assert shades(grey(pure)) == [76, 150, 29]
    assert shades(grey(torch.full((1, 96, 96, 3), 255, dtype=torch.uint8))) == [255]


def test_a_task_without_colour_is_refused():
    assert colour_camera("Film", SimpleNamespace(scene=scene("depth", "albedo"))) == ("eye", "albedo")
    for kinds, word in ((("depth",), "depth"), ((), "no camera")):
        with pytest.raises(SystemExit, match=rf"^--task Film: .*{word}"):
            colour_camera("Film", SimpleNamespace(scene=scene(*kinds)))


# ---------------------------------------------------------------- 7: frame stack


def test_stack_holds_the_last_frames_of_the_episode(film):
    _, env, _, _ = make()
    seen = {n: [] for n in range(N)}
    for _ in range(30):
        obs, _, _, _, _ = env.step(torch.zeros(N, 2))
        assert obs.shape == (N, 4, 84, 84)
        for n in range(N):
            episode, age = env.base.episode[n].item(), env.base.age[n].item()
            assert shades(obs[n]) == stack_of(n, episode, age)
            seen[n].append(age)
    assert all(0 in ages and max(ages) >= 4 for ages in seen.values())


@pytest.mark.parametrize("steps", [1, 2, 5, T])
def test_batch_stacks_what_the_policy_saw(film, steps):
    """Each frame is stored once; stacks are put together by index, across the border of two rollouts too."""
    args, env, policy, store = make(num_steps=steps, minibatches=1)
    seen, act = [], policy.act
    policy.act = lambda obs, noise: seen.append(obs.clone()) or act(obs, noise)
    batch = collect(args, env, policy, store, rollouts=3)
    want, order = torch.cat(seen[-steps:]), torch.randperm(steps * N)  # (T * N, 4, 84, 84)
    assert len(seen) == 3 * steps and torch.equal(store.pick(batch, order)[0]["obs"], want[order])
    assert store.frames.dtype == torch.uint8 and store.frames.numel() == (steps + 4) * N * 84 * 84


def test_time_outs_are_bootstrapped_from_the_last_frames_before_the_reset(film, monkeypatch):
    args, env, policy, store = make()
    handed, gae = {}, ppo_isaac_rgb.gae
    names = "rewards values terminated truncated final_values last gamma lam".split()
    monkeypatch.setattr(ppo_isaac_rgb, "gae", lambda *given: handed.update(zip(names, given)) or gae(*given))
    sizes = set()  # of batches: cuDNN tries its convolutions out for every new one
    watched = policy.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
    collect(args, env, policy, store)
    watched.remove()
    assert sizes == {N}
    episode, age, ends = [0] * N, [0] * N, 0
    for t in range(T):
        for n in range(N):
            age[n] += 1
            wanted = 0.0
            if over := age[n] == env.base.length(n, episode[n]):
                late = episode[n] % 2 == 1
                assert handed["truncated"][t, n] == late and handed["terminated"][t, n] != late
                if late:
                    frames = torch.tensor(stack_of(n, episode[n], age[n]), dtype=torch.uint8)
                    wanted = policy(frames[None, :, None, None].expand(1, 4, 84, 84))[1].item()
                    ends += 1
            assert handed["final_values"][t, n].item() == pytest.approx(wanted, abs=1e-5)
            episode[n], age[n] = (episode[n] + 1, 0) if over else (episode[n], age[n])
    assert ends >= 3
    assert torch.allclose(handed["last"], policy(env.stack)[1]) and torch.equal(handed["values"], store.samples["value"])


# ---------------------------------------------------------------- 2: frame skip


@pytest.mark.parametrize("skip", [1, 2, 4])
def test_frame_skip_repeats_the_action_and_sums_up_to_the_end_of_the_episode(film, skip):
    _, env, _, _ = make(frame_skip=skip)
    twin, ended, kept = Film(), 0, 0
    twin._get_observations = dict
    twin.reset(0)
    for _ in range(12):
        action, before = torch.rand(N, 2), env.base.rendered
        total, over = torch.zeros(N), torch.zeros(2, N, dtype=torch.bool)
        finals, steps_with_ends = [None] * N, 0
        for _ in range(skip):
            pairs = list(zip(twin.episode.tolist(), twin.age.tolist()))
            going = ~over.any(0)
            _, reward, terminated, truncated, _ = twin.step(action)
            total += reward * going
            for n in (going & twin.reset_buf).nonzero()[:, 0].tolist():
                finals[n] = Film.shade(n, pairs[n][0], pairs[n][1] + 1)
            over |= torch.stack([terminated, truncated]) & going
            steps_with_ends += bool(twin.reset_buf.any())
        obs, reward, terminated, truncated, final = env.step(action)
        assert torch.equal(torch.stack(env.base.received[-skip:]), action.expand(skip, N, 2))
        assert torch.allclose(reward, total) and torch.equal(torch.stack([terminated, truncated]), over)
        assert (final is None) == (not over.any())
        for n in over.any(0).nonzero()[:, 0].tolist():
            assert shades(final[n]) == finals[n]
            assert shades(obs[n]) == [Film.shade(n, twin.episode[n].item(), twin.age[n].item())] * 4
            ended, kept = ended + 1, kept + int(twin.age[n] > 0)
        if not steps_with_ends:
            assert env.base.rendered == before + 1  # nothing in between is rendered
    assert ended > 3 and len(env.base.received) == 12 * skip
    assert kept > 0 or skip == 1  # some episodes went on within the repeats


def test_finite_horizon_has_no_time_outs(film):
    _, env, _, _ = make(finite=True, frame_skip=2)
    ends = [env.step(torch.zeros(N, 2))[2:4] for _ in range(12)]
    assert not any(truncated.any() for _, truncated in ends) and sum(terminated.sum() for terminated, _ in ends) > 5


# ---------------------------------------------------------------- 1: no-op starts


@pytest.mark.parametrize("space", [BOX, CHOICES])
def test_noops_come_first_in_every_episode(film, space):
    """A random number from 0 to the maximum, of their own for every episode, and then the policy's actions."""
    _, env, _, _ = make(space, noop_max=3, length=lambda n, e: 6)
    counts, current = [], [0] * N
    for t in range(120):
        env.step(torch.ones(N, 2, dtype=torch.long if space is CHOICES else torch.float32))
        executed = env.base.received[-1]
        for n in range(N):
            assert (executed[n] == executed[n, 0]).all() and executed[n, 0] in (0, 1)
            if executed[n, 0] == 0:
                assert t % 6 == current[n]  # no policy's action before
                current[n] += 1
            if t % 6 == 5:
                counts.append(current[n])
                current[n] = 0
    assert set(counts) == {0, 1, 2, 3} and len(counts) == 60


def test_no_noops_by_default(film):
    _, env, _, _ = make()
    actions = torch.rand(20, N, 2)
    for action in actions:
        env.step(action)
    assert torch.equal(torch.stack(env.base.received), actions)


# ---------------------------------------------------------------- 6: signs of rewards


def test_sign_rewards_are_for_learning_only(film, monkeypatch):
    handed, gae = [], ppo_isaac_rgb.gae
    monkeypatch.setattr(ppo_isaac_rgb, "gae", lambda *given: handed.append(given[0].clone()) or gae(*given))
    for sign in (False, True):
        (args, env, policy, store), log = make(sign_rewards=sign), Metrics("cpu", ALONE)
        collect(args, env, policy, store, log=log)
        reward = store.samples["reward"]
        assert log.read()["rollout/reward"] == pytest.approx(float(reward.mean()))
    assert torch.equal(handed[0], reward) and torch.equal(handed[1], reward.sign())
    assert set(handed[1].unique().tolist()) == {-1.0, 0.0, 1.0}


# ---------------------------------------------------------------- 8 and 9: network


def test_nature_cnn_has_its_shapes_and_gains():
    torch.manual_seed(0)
    policy = ActorCritic(Spaces((4, 84, 84), (), 5, ()), Args(init_std=0.5))
    layers = [layer for layer in policy.network if hasattr(layer, "weight")]
    shapes = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136)]
    assert [tuple(layer.weight.shape) for layer in layers] == shapes
    assert [layer.stride for layer in layers[:3]] == [(4, 4), (2, 2), (1, 1)]
    assert tuple(policy.actor.weight.shape) == (5, 512) and tuple(policy.critic.weight.shape) == (1, 512)
    assert sum(isinstance(layer, torch.nn.ReLU) for layer in policy.network) == 4
    for layer, gain in zip([*layers, policy.actor, policy.critic], [2**0.5] * 4 + [0.01, 1.0]):
        values = torch.linalg.svdvals(layer.weight.detach().flatten(1))
        assert torch.allclose(values, torch.full_like(values, gain), rtol=1e-4) and not layer.bias.any()
    assert torch.allclose(policy.log_std.exp(), torch.tensor(0.5))
    assert sum(p.numel() for p in policy.parameters()) == 8224 + 32832 + 36928 + 1606144 + 513 * 6 + 5


def test_network_divides_bytes_by_255_and_shares_its_trunk():
    torch.manual_seed(0)
    network, frames = Network(), torch.randint(256, (3, 4, 84, 84), dtype=torch.uint8)
    x = frames.double() / 255
    for layer in network:
        if isinstance(layer, torch.nn.Conv2d):
            x = torch.nn.functional.conv2d(x, layer.weight.double(), layer.bias.double(), layer.stride).relu()
    x = (x.flatten(1) @ network[-2].weight.double().T + network[-2].bias.double()).relu()
    assert torch.allclose(network(frames).double(), x, atol=1e-4) and x.std() > 0.01
    policy = ActorCritic(Spaces((4, 84, 84), (), 2, ()), Args(init_std=1.0))
    params, value = policy(frames)
    features = policy.network(frames)
    assert torch.allclose(params, policy.actor(features)) and torch.allclose(value, policy.critic(features)[:, 0])
    value.sum().backward()
    assert policy.network[0].weight.grad.abs().sum() > 0


# ---------------------------------------------------------------- rollout and update agree


@pytest.mark.parametrize("space", [BOX, CHOICES])
def test_first_ratio_is_one(film, space):
    args, env, policy, store = make(space, frame_skip=2)
    batch, log = collect(args, env, policy, store, rollouts=2), Metrics("cpu", ALONE)
    part, states = store.pick(batch, torch.randperm(T * N))
    _, kl, ratio = ppo_loss(policy, part, states, store.log_std, T * N, args, log)
    assert (ratio - 1).abs().max() <= 1e-5 and abs(kl) <= 1e-5 and log.read()["update/clip_frac"] == 0
    optimizer, log = torch.optim.Adam([flat_parameter(policy)], torch.tensor(1e-3), eps=1e-5, fused=True), Metrics("cpu", ALONE)
    update(policy, optimizer, batch, store, plan_minibatches(store.units, 0, args, ALONE), args, ALONE, log)
    figures = log.read()
    assert figures["update/first_ratio_error"] <= 1e-5 < figures["update/kl"]


def test_a_rank_that_a_minibatch_leaves_without_samples(film):
    args, env, policy, store = make(num_steps=4)
    part, states = store.pick(collect(args, env, policy, store), torch.tensor([], dtype=torch.long))
    loss, _, _ = ppo_loss(policy, part, states, store.log_std, 6, args, Metrics("cpu", ALONE))
    loss.backward()
    assert loss == 0 and not policy.actor.weight.grad.any()


# ---------------------------------------------------------------- in the simulator


@pytest.fixture(scope="module", autouse=True)
def stand_ins():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISAACSIM_ASSET_ROOT", str(assets.mirror()))
        yield


def test_the_camera_shows_the_present_and_the_last_moment_before_a_reset(tmp_path):
    """What `grey` gets is fresh: no frame is late, neither after a step nor after a reset."""
    args = Args(num_envs=4, device="cpu", seed=3)
    cfg = task_config(args.task, "cpu", 4, None, (), {}, True)
    with make_env(args, cfg, ALONE, tmp_path / "simulator.log") as env:

        def rendered() -> Tensor:
            env.base.sim.forward()
            env.camera.update(0.0, force_recompute=True)
            return grey(env.image())

        started = env.restart(5)[0].clone()
        assert env.image().shape == (4, 96, 96, 3) and env.image().dtype == torch.uint8
        assert all(len(frame.unique()) > 3 for frame in started[:, 0])  # something is in view
        assert torch.equal(started, rendered()[:, None].expand(4, 4, 84, 84))
        env.base.episode_length_buf.zero_()
        moving = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        for _ in range(3):
            before = env.stack
            obs, _, terminated, truncated, final = env.step(moving)
            assert final is None and not (terminated | truncated).any()
            assert torch.equal(obs[:, :3], before[:, 1:]) and torch.equal(obs[:, 3], rendered())
        assert (obs[:, 3] != obs[:, 2]).flatten(1).any(1).all()  # it moves
        saved = env.state()
        env.step(env.idle)
        env.step(moving)
        unbroken = env.stack
        env.restart(77, saved=saved)  # makes the idle step
        env.base.episode_length_buf[1] = 10_000  # it alone times out
        again, _, _, truncated, final = env.step(moving)
        assert truncated.tolist() == [False, True, False, False]
        assert torch.equal(final, unbroken[:, 3])  # before the resets all environments look as they would without
        assert torch.equal(again[[0, 2, 3]], unbroken[[0, 2, 3]])
        assert torch.equal(again[1], again[1, :1].expand(4, 84, 84))
        assert (again[1, 3] != final[1]).any() and torch.equal(again[:, 3], rendered())


EPISODES = ("--overrides", "env.episode_length_s=0.1666")  # of 10 steps, so that rollouts hold time-outs and resets


@functools.cache
def whole(folder: Path) -> str:
    flags = "--num-envs 4 --num-steps 6 --epochs 2 --minibatches 2 --iterations 4 --save-every 2 --frame-skip 2 --noop-max 2"
    flags += " --eval-episodes 4 --seed 5 --exp-name whole --capture-video --device cpu"
    return ppo(folder, *flags.split(), *EPISODES, script="ppo_isaac_rgb.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.slow
def test_a_run_leaves_everything(folder):
    out, made = whole(folder), folder / "runs/whole"
    assert "deterministic policy" in out
    found = metrics(made)
    assert [row["iteration"] for row in found] == [0, 1, 2, 3]
    assert all(math.isfinite(value) for row in found for value in row.values())
    assert found[0]["update/first_ratio_error"] <= 1e-3 and found[0]["update/kl"] != 0
    assert any(row["rollout/episodes"] > 0 for row in found) and found[-1]["eval/length"] == 5  # 10 steps, 2 at a time
    assert {p.name for p in (made / "checkpoints").iterdir()} == {"best", "step_000002", "step_000004"}
    assert (made / "videos/policy.gif").exists() and (made / "source/ppo_isaac_rgb.py").exists()
    saved = json.loads((made / "checkpoints/best/policy.json").read_text())
    assert saved["frame_skip"] == 2 and saved["spaces"]["obs"] == [4, 84, 84]


@pytest.mark.slow
def test_resumed_equals_uninterrupted(folder, tmp_path):
    """From the checkpoint in the middle, as if the run had been killed before the last one: bit for bit."""
    whole(folder)
    shutil.copytree(folder / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/whole/checkpoints/step_000004")
    ppo(tmp_path, "--resume", "runs/whole", script="ppo_isaac_rgb.py")
    assert metrics(tmp_path / "runs/whole") == metrics(folder / "runs/whole")
    weights = [(p / "runs/whole/checkpoints/step_000004/policy.safetensors").read_bytes() for p in (folder, tmp_path)]
    assert weights[0] == weights[1]
    assert weights[0] != (folder / "runs/whole/checkpoints/step_000002/policy.safetensors").read_bytes()


@pytest.mark.slow
def test_a_saved_policy_evaluates_to_the_same_return(folder):
    """The checkpoint knows its frame skip."""
    whole(folder)
    flags = "--evaluate --checkpoint runs/whole/checkpoints/step_000004 --exp-name again --num-envs 4 --noop-max 2 --seed 5"
    ppo(folder, *flags.split(), "--device", "cpu", *EPISODES, script="ppo_isaac_rgb.py")
    results = [json.loads((folder / f"runs/{name}/summary.json").read_text())["eval"] for name in ("whole", "again")]
    assert results[0] == results[1] and results[0]["episodes"] == 4
