"""Isaac Lab's own tasks behind the GR00T scripts, with stand-in assets and random tiny networks.

`python tests/test_gr00t_tasks.py ROW SCRIPT FOLDER` runs one row's checks and an iteration of training: there is one
simulator per process.
"""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import gr00t_tasks
from common import UsageError
from gr00t_tasks import TASKS, task_config, write_random

STACK = "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor"
RUNS = {  # row: the script that trains on it, its flags
    STACK: ("grpo_gr00t", {}),
    "RLinf-Stack-Cube": ("ppo_gr00t_frozen", {"critic_obs": "privileged"}),
    "Isaac-Open-Drawer-Franka": ("grpo_gr00t", {}),
    "Isaac-Lift-Franka": ("ppo_gr00t_frozen", {"critic_obs": "privileged"}),
    "Isaac-Humanoid": ("ppo_gr00t_lora", {"reward": "dense"}),
}
N, GROUP, STEPS = 4, 2, 16


# ---------------------------------------------------------------- one row in the simulator


def physics_state(env):
    """Every joint position and velocity and every pose and velocity, (N, d)."""
    import torch

    scene = env.env.scene.get_state(is_relative=True)
    return torch.cat([v.flatten(1) for kind in scene.values() for asset in kind.values() for v in asset.values()], 1)


def groups(env, group_reset) -> dict:
    """Whether members of a group are alike after a reset and after a chunk of equal actions."""
    import torch

    obs, found = group_reset(3), {}
    actions = torch.rand(N // GROUP, 4, env.env.action_manager.total_action_dim) * 2 - 1
    for moment in ("reset", "chunk"):
        state = physics_state(env)
        alike = [torch.equal(x[0::2], x[1::2]) for x in (state, obs.state, obs.images)]
        found[moment] = all(alike) and not torch.equal(state[0], state[2])
        if moment == "reset":
            obs = env.step_chunk(actions.repeat_interleave(GROUP, 0))
    return found


def renders(env) -> list[int]:
    """How often cameras render in a chunk whose end is not looked at, and in one whose end is."""
    import torch
    from isaaclab.sensors import Camera

    count, render = [], Camera._update_buffers_impl
    Camera._update_buffers_impl = lambda self, *args: (count.append(0), render(self, *args))[1]
    found, still = [], torch.zeros(N, 3, env.env.action_manager.total_action_dim)
    for last in (True, False):
        count.clear()
        env.step_chunk(still, last=last)
        found.append(len(count))
    Camera._update_buffers_impl = render
    return found


def freshness(env, module) -> dict:
    """How far the proprioception is from the hand's true place [m], and whether the wrist's camera goes with it."""
    import torch

    found = {}
    for moment in ("reset", "chunk"):
        obs = env.reset(5) if moment == "reset" else env.step_chunk(torch.full((N, 3, 7), 0.5))
        robot = env.env.scene["robot"].data
        hand = env.env.scene["robot"].find_bodies("panda_hand")[0][0]
        position, rotation = robot.body_pos_w.torch[:, hand], robot.body_quat_w.torch[:, hand]
        from isaaclab.utils.math import quat_apply

        grasp = position + quat_apply(rotation, torch.tensor([0.0, 0.0, 0.1034]).expand(N, 3))
        found[moment] = (obs.state[:, :3] - grasp).norm(dim=1).max().item()
        camera = env.env.scene.sensors["wrist_cam"].data.pos_w.torch - position
        found[f"camera {moment}"] = abs(camera.norm(dim=1) - (0.13**2 + 0.15**2) ** 0.5).max().item()
    return found


def put(env, name: str, position) -> None:
    """Lays an object down in all environments, at rest."""
    import torch

    thing = env.env.scene[name]
    pose = torch.cat([torch.as_tensor(position).expand(N, 3), torch.tensor([0.0, 0, 0, 1]).expand(N, 4)], 1)
    thing.write_root_pose_to_sim(pose)
    thing.write_root_velocity_to_sim(torch.zeros(N, 6))


def ends(env, name: str) -> list[list[bool]]:
    """(success, failure) of environments after something was done to all of them, and after it was undone."""
    import torch

    env.reset(7)
    d = env.env.action_manager.total_action_dim
    hold = torch.zeros(N, 1, d)
    found = []
    if "Stack" in name:
        hold[..., -1] = 1  # the hand stays open
        tower = [(f"cube_{i + 1}", (0.6, 0.0, 0.0203 + 0.0468 * i)) for i in range(3)]
        for _ in range(8):  # fingers reach the open position, cubes come to rest
            for cube, position in tower:
                put(env, cube, position)
            env.step_chunk(hold, last=True)
        found.append([env.success.all().item(), env.failure.any().item()])
        put(env, "cube_3", (0.6, 0.0, -0.5))
        env.step_chunk(hold, last=True)  # a fall after success is none
        found.append([env.success.all().item(), env.failure.any().item()])
        env.reset(8)
        put(env, "cube_1", (0.6, 0.0, -0.5))
        env.step_chunk(hold, last=True)
        found.append([env.success.any().item(), env.failure.all().item()])
    elif "Drawer" in name:
        env.step_chunk(hold, last=True)
        found.append([env.success.any().item(), env.failure.any().item()])
        cabinet = env.env.scene["cabinet"]
        joint = cabinet.find_joints("drawer_top_joint")[0]
        cabinet.write_joint_position_to_sim(torch.full((N, 1), 0.38), joint_ids=joint)
        env.step_chunk(hold, last=True)
        found.append([env.success.all().item(), env.failure.any().item()])
    elif "Lift" in name:
        env.step_chunk(hold, last=True)
        found.append([env.success.any().item(), env.failure.any().item()])
        put(env, "object", (-0.5, 0.3, 0.45))
        env.step_chunk(hold, last=True)
        found.append([env.success.all().item(), env.failure.any().item()])
    else:
        put(env, "robot", (5.0, 0.0, 1.34))
        env.step_chunk(hold, last=True)
        found.append([env.success.all().item(), env.failure.any().item()])
        env.reset(8)
        put(env, "robot", (0.0, 0.0, 0.3))
        env.step_chunk(hold, last=True)
        put(env, "robot", (5.0, 0.0, 1.34))
        env.step_chunk(hold, last=True)
        found.append([env.success.any().item(), env.failure.all().item()])
    return found


def check(name: str, script: str, folder: Path) -> dict:
    from common import Ranks, start_logger

    TASKS[name] = dataclasses.replace(TASKS[name], horizon=STEPS)
    write_random(name, folder / "checkpoint")
    module, (_, flags), ranks = importlib.import_module(script), RUNS[name], Ranks(0, 1)
    if script == "grpo_gr00t":
        flags = {**flags, "group_size": GROUP}
    args = module.Args(
        task=name, checkpoint=str(folder / "checkpoint"), device="cpu", num_envs=N, iterations=1, eval_episodes=N,
        track=False, exp_name="run", **flags,
    )  # fmt: skip
    args = module.resolve(args)
    policy = (module.Gr00tActor if script == "grpo_gr00t" else module.Gr00tActorCritic)(args)
    logger = start_logger(args, folder / "run", str(ROOT / f"{script}.py"), [], None, ranks)
    logger.listen("gr00t_tasks")
    with module.make_env(args, policy.processor.camera_size, folder / "run", ranks) as env:
        found = {"state": list(env.reset(1).state.shape), "images": list(env.reset(1).images.shape)}
        if script == "grpo_gr00t":
            found["groups"] = groups(env, lambda seed: env.reset(seed, GROUP))
        found["renders"], found["ends"] = renders(env), ends(env, name)
        if "wrist_cam" in TASKS[name].cameras:
            found["freshness"] = freshness(env, module)
        module.train(args, env, policy, logger, ranks, None)
    logger.close()
    found["log"] = (folder / "run" / "log.txt").read_text()
    return found


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What `check` found of a row, from a process of its own."""
    found = {}

    def of(name: str) -> dict:
        if name not in found:
            folder = tmp_path_factory.mktemp("row")
            script = RUNS[name][0]
            run = subprocess.run(
                [sys.executable, __file__, name, script, str(folder)], cwd=folder, capture_output=True, text=True
            )
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
            found[name] = json.loads((folder / "found.json").read_text()) | {"folder": folder}
        return found[name]

    return of


every_row = pytest.mark.parametrize("name", RUNS)


@every_row
def test_shapes(name, checked):
    task, found = TASKS[name], checked(name)
    assert found["state"] == [N, sum(task.state.values())]
    assert found["images"][:2] == [N, len(task.cameras)]
    if task.cameras:
        assert found["images"][2:] == [task.image_size or 64] * 2 + [3]


@pytest.mark.parametrize("name", [name for name, (script, _) in RUNS.items() if script == "grpo_gr00t"])
def test_members_of_a_group_stay_alike(name, checked):
    assert checked(name)["groups"] == {"reset": True, "chunk": True}


@every_row
def test_cameras_render_when_they_are_read(name, checked):
    assert checked(name)["renders"] == [0, len(TASKS[name].cameras)]


@every_row
def test_success_and_failure(name, checked):
    expected = [[False, False], [True, False]]  # before and after what the task asks for
    if "Stack" in name:
        expected = [[True, False], [True, False], [False, True]]
    if "Humanoid" in name:
        expected = [[True, False], [False, True]]
    assert checked(name)["ends"] == expected


@pytest.mark.parametrize("name", [name for name in RUNS if "wrist_cam" in TASKS[name].cameras])
def test_proprioception_and_wrist_camera_are_those_of_the_state(name, checked):
    """Right after a reset, too. RLinf's row is rounded to bfloat16."""
    found = checked(name)["freshness"]
    tolerance = 4e-3 if name.startswith("RLinf") else 1e-5
    assert found["reset"] < tolerance and found["chunk"] < tolerance
    assert found["camera reset"] < 1e-4 and found["camera chunk"] < 1e-4


@every_row
def test_an_iteration_of_training(name, checked):
    folder = checked(name)["folder"]
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and rows[0]["env_steps"] == N * STEPS
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["task"] == name and summary["ode_success_after"]["episodes"] == N


def test_what_is_switched_off_is_said(checked):
    log = checked(STACK)["log"]
    for event in ("randomize_light", "randomize_table_visual_material", "randomize_robot_arm_visual_texture"):
        assert event in log
    assert "robot_physics_material" in checked("Isaac-Open-Drawer-Franka")["log"]


# ---------------------------------------------------------------- without a simulator


def arguments(task: str, **flags) -> SimpleNamespace:
    return SimpleNamespace(**{"task": task, "device": "cpu", "physics": None, "renderer": None, "reward": "sparse", **flags})


def refused(monkeypatch, **changes) -> str:
    monkeypatch.setitem(TASKS, "mine", dataclasses.replace(TASKS["Isaac-Open-Drawer-Franka"], **changes))
    with pytest.raises(UsageError) as error:
        task_config(arguments("mine"), 2, 64)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rows_that_do_not_fit_are_refused(monkeypatch):
    text = refused(monkeypatch, isaac="Isaac-Open-Drawer-Franka", cameras=("wrist", "front_cam"))
    assert text.startswith("--task mine:") and "camera wrist" in text and "it has front_cam" in text
    text = refused(monkeypatch, isaac="Isaac-Open-Drawer-Franka", terms=("joint_pos", "joint_torque"))
    assert "no observation term joint_torque" in text and "joint_vel" in text and "rel_ee_drawer_distance" in text
    text = refused(monkeypatch, isaac="Isaac-Humanoid-Direct", cameras=(), views={})
    assert "Isaac-Humanoid-Direct is a direct task" in text


def test_dense_reward_of_a_task_without_rewards():
    with pytest.raises(UsageError, match="^--reward dense: .* has no rewards; use --reward sparse$"):
        task_config(arguments(STACK, reward="dense"), 2, 64)


def test_images_are_not_observed_and_cameras_look_as_asked():
    cfg = task_config(arguments(STACK), 2, 100)
    terms = {name for group in cfg.observations.values() for name, term in vars(group).items() if hasattr(term, "func")}
    assert terms == {"eef_pos", "eef_quat", "gripper_pos", "object"}
    assert cfg.scene.wrist_cam.width == cfg.scene.table_cam.height == 100 and cfg.scene.num_envs == 2
    assert task_config(arguments("RLinf-Stack-Cube"), 2, 100).scene.wrist_cam.width == 256


def test_the_lift_row_has_one_shape_for_all_members_of_a_group(monkeypatch):
    """The task itself spawns another shape in each environment."""
    row = TASKS["Isaac-Lift-Franka"]
    assert type(task_config(arguments("Isaac-Lift-Franka"), 2, 64).scene.object.spawn).__name__ == "CuboidCfg"
    monkeypatch.setitem(TASKS, "Isaac-Lift-Franka", dataclasses.replace(row, overrides=()))
    assert type(task_config(arguments("Isaac-Lift-Franka"), 2, 64).scene.object.spawn).__name__ == "MultiAssetSpawnerCfg"


def test_columns_are_compared_with_the_row():
    env = SimpleNamespace(
        observation_manager=SimpleNamespace(group_obs_dim={"policy": (9,), "critic": (39,)}),
        action_manager=SimpleNamespace(total_action_dim=7),
    )
    gr00t_tasks.check_columns(env, STACK)
    env.action_manager.total_action_dim = 8
    with pytest.raises(UsageError, match="8 action columns, its row in TASKS says 7"):
        gr00t_tasks.check_columns(env, STACK)


def test_program(tmp_path):
    def run(*flags):
        command = [sys.executable, ROOT / "gr00t_tasks.py", *flags]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert all(name in run().stdout for name in TASKS)
    assert run("--task", "Isaac-Humanoid", "--out", "random").returncode == 0
    config = json.loads((tmp_path / "random" / "config.json").read_text())
    assert config["action_dim"] == 21
    for flags, text in (
        (("--task", "nothing"), "--task nothing: no row"),
        (("--task", STACK), "--out:"),
        (("--task", STACK, "--out", "x", "--size", "huge"), "--size huge"),
    ):
        failed = run(*flags)
        assert failed.returncode == 1 and failed.stderr.startswith(f"error: {text}") and failed.stderr.count("\n") == 1


if __name__ == "__main__":
    import os

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from tests import assets

    os.environ.setdefault("ISAACSIM_ASSET_ROOT", str(assets.mirror()))
    name, script, folder = sys.argv[1:]
    (Path(folder) / "found.json").write_text(json.dumps(check(name, script, Path(folder))))
