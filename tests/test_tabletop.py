"""The embedded task in the real simulator: starts, groups, determinism, camera, success, expert, both steppers."""

import os
from pathlib import Path

import pytest
import torch

from tests import warm

ROOT = Path(__file__).resolve().parents[1]
N = 32


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    from tests.sim import chunk_env

    with chunk_env(tmp_path_factory.mktemp("simulator"), N) as env:
        yield env


def physics_state(env) -> torch.Tensor:
    """Every joint position and velocity and every cube pose and velocity, (N, d)."""
    scene = env.env.scene.get_state(is_relative=True)
    leaves = [v for kind in scene.values() for asset in kind.values() for v in asset.values()]
    return torch.cat([v.flatten(1) for v in leaves], 1)


def play(env, actions: torch.Tensor) -> tuple[list, list]:
    """Steps (N, T, 4) actions in chunks of 8; states and images after each chunk."""
    states, images = [], []
    for part in actions.split(8, dim=1):
        obs = env.step_chunk(part)
        states.append(physics_state(env))
        images.append(obs["images"])
    return states, images


def random_actions(seed: int, rows: int = N) -> torch.Tensor:
    return torch.rand(rows, 32, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_starts_differ_and_stay_on_the_table(env):
    from tasks import tabletop

    env.reset(seed=1)
    cubes = tabletop.cube_positions(env.env)  # (N, 2, 3)
    assert (cubes[:, 0, :2] - cubes[:, 1, :2]).norm(dim=1).min() > 2**0.5 * tabletop.CUBE  # never overlap, at any yaw
    assert cubes[..., :2].abs().max() < 0.2 and (cubes[..., 2] - tabletop.CUBE / 2).abs().max() < 1e-6
    assert len({tuple(row) for row in cubes.flatten(1).tolist()}) == N
    assert set(env.env.target.tolist()) == {0, 1}
    assert env.env.instructions == [tabletop.INSTRUCTIONS[i] for i in env.env.target.tolist()]


def test_groups_start_identical_and_stay_so(env):
    obs = env.reset(seed=2, group_size=8)
    heads = torch.arange(N) // 8 * 8
    assert torch.equal(physics_state(env), physics_state(env)[heads])
    assert torch.equal(obs["images"], obs["images"][heads]) and torch.equal(obs["prompt"], obs["prompt"][heads])
    assert not torch.equal(obs["images"][0], obs["images"][8])  # groups differ
    states, images = play(env, random_actions(0, N)[heads])
    assert not torch.equal(states[-1], states[0])
    for state, image in zip(states, images, strict=True):
        assert torch.equal(state, state[heads]) and torch.equal(image, image[heads])


def test_expert_actions_keep_groups_identical_through_contact(env):
    from tasks import tabletop

    env.reset(seed=3, group_size=8)
    heads = torch.arange(N) // 8 * 8
    for _ in range(32):
        env.step_chunk(tabletop.expert_action(env.env)[:, None], last=True)
    assert env.success.all()
    assert torch.equal(physics_state(env), physics_state(env)[heads])


def test_replay_with_one_seed_is_identical(env):
    runs = []
    for _ in range(2):
        first = env.reset(seed=4)["images"]
        runs.append((first, *play(env, random_actions(1))))
    (first_a, states_a, images_a), (first_b, states_b, images_b) = runs
    assert torch.equal(first_a, first_b)
    assert all(torch.equal(a, b) for a, b in zip(states_a + images_a, states_b + images_b, strict=True))


def test_images_are_fresh(env):
    """The image of a reset and of a chunk is that of a forced new rendering."""
    for act in (lambda: env.reset(seed=5), lambda: env.step_chunk(random_actions(2)[:, :8])):
        obs = act()
        for camera in env.task.cameras:
            sensor = env.env.scene.sensors[camera]
            sensor._is_outdated.fill_(True)
            sensor._data_dirty = True
        assert torch.equal(obs["images"], env.task.images(env.env))


def test_cubes_are_large_enough_to_see(env):
    """At least 10 pixels wide wherever the gripper does not hide them."""
    image = env.reset(seed=6)["images"][:, 0].int()  # (N, H, W, 3)
    red = (image[..., 0] > 140) & (image[..., 1] < 90) & (image[..., 2] < 90)
    blue = (image[..., 2] > 140) & (image[..., 0] < 110)
    for mask in (red, blue):
        width = mask.any(1).sum(1).float()  # (N,) columns with the colour
        assert width.median() >= 10 and width.max() < 24


def test_success_needs_a_held_lift_of_the_named_cube(env):
    from tasks import tabletop

    scene = env.env.scene

    def place(heights):
        for name, z in zip(tabletop.COLOURS, heights, strict=True):
            pose = torch.zeros(N, 7)
            pose[:, 0], pose[:, 1], pose[:, 2], pose[:, 6] = 0.15, 0.1 if name == "red" else -0.1, z, 1.0
            scene[name].write_root_pose_to_sim_index(root_pose=pose, env_ids=torch.arange(N).int())
        env.terminations.compute()
        return env.terminations.get_term("success").clone()

    env.reset(seed=7)
    red = env.env.target == 0
    assert red.any() and (~red).any()
    up, down = 0.12, tabletop.CUBE / 2
    for count in range(1, tabletop.HOLD_STEPS + 1):
        done = place((up, down))
        assert torch.equal(done, red & (count >= tabletop.HOLD_STEPS))
    assert not place((up, up)).any()  # both in the air does not count
    assert not place((down, down)).any()
    for _ in range(tabletop.HOLD_STEPS - 1):
        assert not place((up, down)).any()  # the count has started anew
    env.reset(seed=8)
    assert not place((up, down)).any()


def test_an_instruction_of_the_task_fixes_the_target(env):
    from tasks.gr00t import Prompts

    before = env.prompts
    try:
        for text, asked, index in (("lift the blue cube", {1}, 0), ("pick up something", {0, 1}, 0), (None, {0, 1}, None)):
            env.prompts = Prompts(env.env, env.task, text)
            obs = env.reset(seed=9)
            assert set(env.env.target.tolist()) == asked
            assert torch.equal(obs["prompt"], env.env.target if index is None else torch.full((N,), index))
    finally:
        env.prompts = before


def test_observation_groups(env):
    env.reset(seed=10)
    obs = env.env.observation_manager.compute()
    assert obs["policy"].shape == (N, 5) and obs["critic"].shape == (N, 24)
    from tasks import tabletop

    cubes, target = tabletop.cube_positions(env.env), env.env.target
    assert len(set(target.tolist())) == 2
    for i, named in enumerate(target.tolist()):
        expected = torch.cat([cubes[i, named], cubes[i, 1 - named]])
        assert torch.allclose(obs["critic"][i, :6], expected)
        offsets = expected.view(2, 3) - obs["policy"][i, :3]
        assert torch.allclose(obs["critic"][i, 12:18].view(2, 3), offsets, atol=1e-6)
        velocity = env.env.scene[tabletop.COLOURS[named]].data.root_lin_vel_w.torch[i]
        assert torch.allclose(obs["critic"][i, 6:9], velocity)
    assert torch.equal(obs["critic"][:, 18:23], obs["policy"]) and torch.equal(obs["critic"][:, -1], target.float())


def test_expert_solves_the_task(env):
    """At least 95% of fresh episodes; half of those of demonstrations start from a random gripper pose."""
    from tasks import tabletop

    start, rates = env.env.event_manager.get_term_cfg("reset"), []
    try:
        for share in (0.0, 0.5):
            start.params["gantry_share"] = share
            for seed in (11, 12):
                env.reset(seed=seed)
                for _ in range(tabletop.HORIZON):
                    env.step_chunk(tabletop.expert_action(env.env)[:, None], last=True)
                rates.append(env.success.float().mean().item())
    finally:
        start.params["gantry_share"] = 0.0
    assert sum(rates[:2]) >= 1.9 and sum(rates[2:]) >= 1.9


WARP = """
import argparse, logging, sys, torch, gymnasium as gym
from isaaclab.app import launch_simulation
from isaaclab_tasks.utils import parse_env_cfg
from tasks import tabletop
logging.getLogger("tasks").setLevel(logging.INFO)
logging.getLogger("tasks").addHandler(logging.StreamHandler(sys.stdout))
cfg = parse_env_cfg(tabletop.TASK_ID, "cpu", 16, overrides=["physics=newton_mjwarp"])
with launch_simulation(cfg, argparse.Namespace(device="cpu", headless=True, enable_cameras=True)):
    env = gym.make(tabletop.TASK_ID, cfg=cfg).unwrapped
    env.reset(seed=0)
    ends = torch.zeros(16, dtype=torch.long)
    for _ in range(tabletop.HORIZON - 1):
        _, reward, terminated, truncated, _ = env.step(tabletop.expert_action(env))
        ends += terminated
        assert not truncated.any() and torch.isfinite(reward).all()
    assert (ends >= 1).sum() >= 15, ends
    env.reset(seed=0)
    for step in range(tabletop.HORIZON):
        _, _, terminated, truncated, _ = env.step(torch.zeros(16, 4))
    assert truncated.all() and not terminated.any()
    from isaaclab_newton.physics import NewtonManager
    from mujoco import mjtDisableBit
    assert NewtonManager._solver.mjw_model.opt.disableflags & int(mjtDisableBit.mjDSBL_NATIVECCD)  # boxes as in C
    print("ENDS OK")
    env.close()
"""


@pytest.mark.slow
def test_standard_environment_on_the_other_stepper(tmp_path):
    """Outside ChunkEnv it is an ordinary Isaac Lab task: success resets it, the horizon times out; MuJoCo-Warp does, too."""
    (tmp_path / "code.py").write_text(WARP)
    out, err = warm.start([str(tmp_path / "code.py")], ROOT, dict(os.environ)).communicate(timeout=900)
    assert "ENDS OK" in out and "physics: Newton MuJoCo-Warp" in out, out[-2000:] + err[-2000:]
    assert "linesearch iterations" not in out + err  # which the kernels would print from the device
