"""Isaac Lab's own tasks behind the GR00T scripts, with stand-in assets and random tiny networks.

`python tests/test_gr00t_tasks.py ROW SCRIPT FOLDER` runs one row's checks and an iteration of training: there is one
simulator per process.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.random_checkpoint import write_random
from tasks.gr00t import TASKS, adapt_direct, broken, check_columns, find_task, gripper_frame, own_end, task_config
from tasks.stock import known_task

STACK = "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor"
RUNS = {  # row: the script that trains on it, its flags
    STACK: ("grpo_gr00t", {}),
    "RLinf-Stack-Cube": ("ppo_gr00t_frozen", {"critic_obs": "privileged"}),
    "Isaac-Open-Drawer-Franka": ("grpo_gr00t", {}),
    "Isaac-Lift-Franka": ("ppo_gr00t_frozen", {"critic_obs": "privileged"}),
    "Isaac-Humanoid": ("ppo_gr00t_lora", {"reward": "dense"}),
    "Isaac-Humanoid-Direct": ("grpo_gr00t", {}),
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
    actions = torch.rand(N // GROUP, 4, env.task.sizes["action"]) * 2 - 1
    for moment in ("reset", "chunk"):
        state = physics_state(env)
        alike = [torch.equal(x[0::2], x[1::2]) for x in (state, obs["state"], obs["images"])]
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
    found, still = [], torch.zeros(N, 3, env.task.sizes["action"])
    for last in (True, False):
        count.clear()
        env.step_chunk(still, last=last)
        found.append(len(count))
    Camera._update_buffers_impl = render
    return found


def freshness(env) -> dict:
    """How far the proprioception is from where hand [m] or joints [rad] are, and whether the wrist's camera goes along."""
    import torch

    found = {}
    eye, *_ = env.task.views.get("wrist_cam", ((0.13, 0.0, -0.15),))  # the stack task has its own camera
    for moment in ("reset", "chunk"):
        obs = env.reset(5) if moment == "reset" else env.step_chunk(torch.full((N, 3, env.task.sizes["action"]), 0.5))
        robot = env.env.scene["robot"].data
        hand = env.env.scene["robot"].find_bodies("panda_hand")[0][0]
        position, rotation = robot.body_pos_w.torch[:, hand], robot.body_quat_w.torch[:, hand]
        from isaaclab.utils.math import quat_apply

        grasp = position + quat_apply(rotation, torch.tensor([0.0, 0.0, 0.1034]).expand(N, 3))
        joints = "joint_position" in env.task.state
        seen, true = (obs["state"], robot.joint_pos.torch) if joints else (obs["state"][:, :3], grasp)
        found[moment] = (seen - true).norm(dim=1).max().item()
        camera = env.env.scene.sensors["wrist_cam"].data.pos_w.torch - position
        found[f"camera {moment}"] = abs(camera.norm(dim=1) - torch.tensor(eye).norm()).max().item()
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
    d = env.task.sizes["action"]
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
        for _ in range(24):  # the cube stays where it is
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
    from common import Ranks, Run

    os.chdir(folder)
    os.environ["WANDB_MODE"] = "disabled"
    TASKS[name] = dataclasses.replace(TASKS[name], horizon=STEPS)
    write_random(name, folder / "checkpoint")
    module, (_, flags), ranks = importlib.import_module(script), RUNS[name], Ranks(0, 1)
    grpo = {"group_size": GROUP} if script == "grpo_gr00t" else {"critic_warmup": 0}
    args = module.check(
        module.Args(
            task=name, checkpoint=str(folder / "checkpoint"), device="cpu", num_envs=N, iterations=1, eval_episodes=N,
            exp_name="run", **flags, **grpo,
        )
    )  # fmt: skip
    policy = module.Gr00tActor(args)
    with (
        Run(vars(args), str(ROOT / f"{script}.py"), ranks, "run", 1, "cpu") as run,
        module.make_env(args, policy.camera_size, run.dir, ranks) as env,
    ):
        obs = env.reset(1)
        found = {"state": list(obs["state"].shape), "images": list(obs["images"].shape)}
        if script == "grpo_gr00t":
            found["groups"] = groups(env, lambda seed: env.reset(seed, GROUP))
        found["renders"], found["ends"] = renders(env), ends(env, name)
        if "wrist_cam" in TASKS[name].cameras.values():
            found["freshness"] = freshness(env)
        module.train(args, env, policy, run, ranks)
    found["log"] = (run.dir / "log.txt").read_text()
    return found


SWITCHED_OFF = {
    STACK: ("randomize_light", "randomize_table_visual_material", "randomize_robot_arm_visual_texture"),
    "Isaac-Open-Drawer-Franka": ("robot_physics_material",),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_row_in_the_simulator(name, tmp_path):
    """In a process of its own: shapes, groups, cameras, success and failure, and an iteration of training."""
    command, task = [sys.executable, __file__, name, RUNS[name][0], str(tmp_path)], TASKS[name]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    found = json.loads((tmp_path / "found.json").read_text())

    assert found["state"] == [N, task.sizes["state"]] and found["images"][:2] == [N, len(task.cameras)]
    assert not task.cameras or found["images"][2:] == [task.image_size or 64] * 2 + [3]
    assert found["renders"] == [0, len(task.cameras)]  # at the end of a chunk, where it is looked at
    assert found.get("groups", {}) == ({"reset": True, "chunk": True} if RUNS[name][0] == "grpo_gr00t" else {})
    expected = [[False, False], [True, False]]  # (success, failure) before and after what the task asks for
    if "Stack" in name:
        expected = [[True, False], [True, False], [False, True]]
    if "Humanoid" in name:
        expected = [[True, False], [False, True]]
    assert found["ends"] == expected
    if "wrist_cam" in task.cameras.values():  # proprioception and camera are those of the state, right after a reset, too
        tolerance = 4e-3 if name.startswith("RLinf") else 1e-5  # which is rounded to bfloat16
        assert found["freshness"]["reset"] < tolerance and found["freshness"]["chunk"] < tolerance
        assert found["freshness"]["camera reset"] < 1e-4 and found["freshness"]["camera chunk"] < 1e-4
    assert all(event in found["log"] for event in SWITCHED_OFF.get(name, ()))

    rows = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and rows[0]["env_steps"] == N * STEPS
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert summary["task"] == name and summary["ode_success_after"]["episodes"] == N


# ---------------------------------------------------------------- without a simulator


def config(task: str, num_envs: int = 2, image_size: int = 64, dense: bool = False):
    return task_config(task, "cpu", num_envs, image_size, None, None, dense)


def refused(monkeypatch, **changes) -> str:
    monkeypatch.setitem(TASKS, "mine", dataclasses.replace(TASKS["Isaac-Open-Drawer-Franka"], **changes))
    with pytest.raises(SystemExit) as error:
        config("mine")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_rows_that_do_not_fit_are_refused(monkeypatch):
    text = refused(monkeypatch, isaac="Isaac-Open-Drawer-Franka", cameras={"wrist": "wrist", "front": "front_cam"})
    assert text.startswith("--task mine:") and "camera wrist" in text and "it has front_cam" in text
    text = refused(monkeypatch, isaac="Isaac-Open-Drawer-Franka", terms=("joint_pos", "joint_torque"))
    assert "no observation term joint_torque" in text and "joint_vel" in text and "rel_ee_drawer_distance" in text
    text = refused(monkeypatch, isaac="Isaac-Humanoid-Direct", cameras={}, views={})
    assert "a direct task has no terms to name; success and terms of its row must be functions" in text


@pytest.mark.parametrize(
    "name, row",
    {
        "Isaac-Stack-Cube-Franka-v0": STACK,
        "Isaac-Stack-Cube-Franka-IK-Rel-v0": STACK,
        "Isaac-Stack-Cube-Franka-IK-Rel-Visuomotor-v0": STACK,
        "Isaac-Open-Drawer-Franka-v0": "Isaac-Open-Drawer-Franka",
        "Isaac-Open-Drawer-Franka-Play-v0": "Isaac-Open-Drawer-Franka",
        "Isaac-Humanoid-Direct-v0": "Isaac-Humanoid-Direct",
        "Isaac-Lift-Cube-Franka-v0": "Isaac-Lift-Franka",
        "Tabletop-Lift-Cube-v0": "Tabletop-Lift-Cube-v0",
    }.items(),
)
def test_names_of_older_isaac_labs(name, row, capsys):
    assert find_task(name) == row
    assert capsys.readouterr().out == (f"--task {name}: {row}\n" if name != row else "")


OLD_NAMES = """
    Isaac-Ant-v0 Isaac-Ant-Direct-v0 Isaac-Cartpole-v0 Isaac-Cartpole-Direct-v0 Isaac-Cartpole-RGB-v0
    Isaac-Cartpole-RGB-Camera-Direct-v0 Isaac-Humanoid-v0 Isaac-Humanoid-Direct-v0 Isaac-Reach-Franka-v0 Isaac-Reach-UR10-v0
    Isaac-Lift-Cube-Franka-v0 Isaac-Lift-Cube-Franka-IK-Rel-v0 Isaac-Open-Drawer-Franka-v0 Isaac-Open-Drawer-Franka-IK-Abs-v0
    Isaac-Franka-Cabinet-Direct-v0 Isaac-Stack-Cube-Franka-v0 Isaac-Stack-Cube-Franka-IK-Rel-v0 Isaac-Repose-Cube-Allegro-v0
    Isaac-Repose-Cube-Shadow-Direct-v0 Isaac-Shadow-Hand-Over-Direct-v0 Isaac-Velocity-Flat-Anymal-D-v0
    Isaac-Velocity-Rough-Anymal-C-v0 Isaac-Velocity-Flat-Unitree-Go2-v0 Isaac-Velocity-Rough-Unitree-A1-v0
    Isaac-Velocity-Flat-H1-v0 Isaac-Velocity-Flat-G1-v0 Isaac-Velocity-Flat-Spot-v0 Isaac-Factory-PegInsert-Direct-v0
""".split()


@pytest.mark.parametrize("name", OLD_NAMES)
def test_old_names_are_tasks_of_this_isaac_lab(name):
    import gymnasium as gym

    assert known_task(name) in gym.registry
    assert known_task(name.replace("-v0", "-Play-v0")) == known_task(name)


def test_a_direct_task_ends_nothing_by_itself():
    """Its own verdict goes to the script, its rewards see it, and its observations are the row's terms."""
    yes, no = torch.tensor([True, False]), torch.zeros(2, dtype=torch.bool)

    class Direct:
        num_envs, device, reset_terminated = 2, "cpu", no.clone()

        def _get_dones(self):
            return yes, torch.ones_like(yes)

        def _get_rewards(self):
            return -self.reset_terminated.float()

        def _get_observations(self):
            return {"policy": torch.arange(174.0).view(2, 87)}

        def reset(self):
            self.obs_buf = self._get_observations()

    env, row = Direct(), TASKS["Isaac-Humanoid-Direct"]
    adapt_direct(env, row)
    assert own_end(env).tolist() == [False, False]
    assert [x.tolist() for x in env._get_dones()] == [[False] * 2] * 2 and own_end(env).tolist() == [True, False]
    assert env._get_rewards().tolist() == [-1.0, 0.0] and not env.reset_terminated.any()
    assert {name: tuple(x.shape) for name, x in env.obs_buf.items()} == {"policy": (2, 54), "critic": (2, 87)}
    env.single_action_space = SimpleNamespace(shape=(21,))
    check_columns(env, "Isaac-Humanoid-Direct")


def test_a_world_whose_physics_blew_up_is_told_and_its_observations_are_finite():
    policy, critic = torch.randn(4, 3), torch.randn(4, 2)
    policy[1, 2], critic[3, 0] = float("nan"), float("inf")
    env = SimpleNamespace(obs_buf={"policy": policy, "critic": critic})
    assert broken(env).tolist() == [False, True, False, True]
    assert policy[1, 2] == critic[3, 0] == 0 and broken(env).sum() == 0
    assert not broken(SimpleNamespace(obs_buf={"policy": policy})).any()


def test_dense_reward_of_a_task_without_rewards():
    with pytest.raises(SystemExit, match="^--reward dense: .* has no rewards; use --reward sparse$"):
        config(STACK, dense=True)
    assert config(STACK).rewards == {} and vars(config("Tabletop-Lift-Cube-v0", dense=True).rewards)


def test_images_are_not_observed_and_cameras_look_as_asked():
    cfg = config(STACK, image_size=100)
    terms = {name for group in cfg.observations.values() for name, term in vars(group).items() if hasattr(term, "func")}
    assert terms == {"eef_pos", "eef_quat", "gripper_pos", "object"}
    assert cfg.scene.wrist_cam.width == cfg.scene.table_cam.height == 100 and cfg.scene.num_envs == 2
    assert config("RLinf-Stack-Cube", image_size=100).scene.wrist_cam.width == 256


def test_the_lift_row_has_one_shape_for_all_members_of_a_group(monkeypatch):
    """The task itself spawns another shape in each environment."""
    row = TASKS["Isaac-Lift-Franka"]
    assert type(config("Isaac-Lift-Franka").scene.object.spawn).__name__ == "CuboidCfg"
    monkeypatch.setitem(TASKS, "Isaac-Lift-Franka", dataclasses.replace(row, overrides=()))
    assert type(config("Isaac-Lift-Franka").scene.object.spawn).__name__ == "MultiAssetSpawnerCfg"


def test_columns_are_compared_with_the_row():
    env = SimpleNamespace(
        observation_manager=SimpleNamespace(group_obs_dim={"policy": (9,), "critic": (39,)}),
        action_manager=SimpleNamespace(total_action_dim=7),
    )
    check_columns(env, STACK)
    env.action_manager.total_action_dim = 8
    with pytest.raises(SystemExit, match="8 action columns, its row in TASKS says 7"):
        check_columns(env, STACK)


def test_presets_that_there_are_not():
    for flags, known in ((("bullet", None), "newton_mjwarp"), ((None, "blender"), "newton_renderer")):
        for task in ("Tabletop-Lift-Cube-v0", "Isaac-Open-Drawer-Franka"):
            with pytest.raises(SystemExit) as refused:
                task_config(task, "cpu", 2, 64, *flags)
            text = str(refused.value)
            assert known in text and "\n" not in text and ("bullet" in text or text.startswith("--renderer blender: "))


def test_programs(tmp_path):
    def run(*command):
        return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)

    assert all(name in run("-m", "tasks.gr00t").stdout for name in TASKS)
    made = run("benchmarks/random_checkpoint.py", "--task", "Isaac-Humanoid", "--out", str(tmp_path / "random"))
    assert made.returncode == 0, made.stderr
    assert json.loads((tmp_path / "random/config.json").read_text())["action_dim"] == 21


def test_the_rotation_that_rlinf_feeds_is_continuous_where_the_hand_points_down():
    """Roll goes through pi, where w changes its sign, whatever sign the simulator gives the quaternion."""
    roll = torch.linspace(2.9, 3.4, 101)
    direction = torch.nn.functional.normalize(torch.tensor([[1.0, 0.03, -0.05]]), dim=1)
    quat = torch.cat([direction * (roll / 2).sin()[:, None], (roll / 2).cos()[:, None]], 1)  # (N, 4) x, y, z, w
    quat[::3] *= -1
    joints, zeros = torch.arange(9.0).expand(101, 9), torch.zeros(101, 1, 3)

    def data(**fields):
        return SimpleNamespace(data=SimpleNamespace(**{name: SimpleNamespace(torch=x) for name, x in fields.items()}))

    class Scene(dict):
        env_origins = zeros[:, 0]

    scene = Scene(ee_frame=data(target_pos_w=zeros, target_quat_w=quat[:, None]), robot=data(joint_pos=joints))
    state = gripper_frame(SimpleNamespace(scene=scene))
    torch.testing.assert_close(state[:, 3:6], (roll[:, None] * direction).bfloat16().float(), rtol=0, atol=0.016)  # bfloat16
    assert state[:, 3:6].diff(dim=0).abs().max() < 0.05 and state[0, 6:].tolist() == [7.0, -8.0]


ARM = ("shoulder_pitch", "shoulder_roll", "shoulder_yaw", "elbow", "wrist_roll", "wrist_pitch", "wrist_yaw")
HAND = ("thumb_0", "thumb_1", "thumb_2", "middle_0", "middle_1", "index_0", "index_1")


def trocar_env() -> SimpleNamespace:
    """What the row's functions read: 43 joints in the order that PhysX gives them, two objects in two environments."""
    from isaaclab_tasks.contrib.assemble_trocar.config import G1_29DOF_BODY_JOINT_INDICES, G1_DEX3_JOINT_INDICES
    from isaaclab_tasks.contrib.assemble_trocar.g129_dex3_env_cfg import joint_names

    names = dict(zip((*G1_29DOF_BODY_JOINT_INDICES, *G1_DEX3_JOINT_INDICES), joint_names_by_limb(joint_names)))
    joints = torch.arange(43.0).expand(2, 43)
    box = SimpleNamespace
    robot = box(
        data=box(joint_pos=box(torch=joints), joint_vel=box(torch=joints)), actuators=box(applied_effort=box(torch=joints))
    )

    class Scene(dict):
        env_origins = torch.tensor([[0.0, 0, 0], [10.0, 0, 0]])

    things = {
        f"trocar_{i}": box(data=box(root_pos_w=box(), root_quat_w=box(torch=torch.tensor([[0.0, 0, 0, 1]] * 2))))
        for i in (1, 2)
    }
    return box(scene=Scene(robot=robot, **things), num_envs=2, device="cpu", names=names)


def joint_names_by_limb(joint_names: list[str]) -> list[str]:
    """Legs, waist, arms, hands; the action's list has the legs' joints side by side."""
    legs = [name for side in ("left", "right") for name in joint_names[:12] if name.startswith(side)]
    return legs + joint_names[12:]


def test_the_trocar_rows_columns_are_arms_and_hands():
    """State and action have the keys' order: left and right arm, left and right hand, joint by joint."""
    env, row = trocar_env(), TASKS["IsaacContrib-Assemble-Trocar-G129-Dex3"]
    state = row.terms[0](env)
    expected = [f"{side}_{joint}_joint" for side in ("left", "right") for joint in ARM]
    expected += [f"{side}_hand_{joint}_joint" for side in ("left", "right") for joint in HAND]
    assert [env.names[int(i)] for i in state[0]] == expected and sum(row.state.values()) == 28
    from isaaclab_tasks.contrib.assemble_trocar.g129_dex3_env_cfg import ActionsCfg

    cfg = SimpleNamespace(actions=ActionsCfg())
    row.prepare(cfg)
    assert cfg.actions.joint_pos.joint_names == expected and cfg.actions.joint_pos.preserve_order
    assert set(cfg.actions.joint_pos.offset) <= set(expected)


def test_the_trocar_rows_success_goes_through_its_stages():
    env, row = trocar_env(), TASKS["IsaacContrib-Assemble-Trocar-G129-Dex3"]
    from isaaclab_tasks.contrib.assemble_trocar.mdp.rewards import get_assemble_trocar_state

    state = get_assemble_trocar_state(env)
    state.tip_offset_trocar_1 = state.tip_offset_trocar_2 = torch.zeros(3)
    lifted, laid = torch.tensor([-1.6, 1.6, 1.1]), torch.tensor([-1.6, 1.6, 0.86])
    for place, stages in ((laid, 0), (lifted, 3), (laid, 4)):  # laid down at once is nothing
        for thing in ("trocar_1", "trocar_2"):
            env.scene[thing].data.root_pos_w.torch = env.scene.env_origins + place
        found = row.success(env)
        assert state.task_stage.tolist() == [stages] * 2 and found.tolist() == [stages == 4] * 2


def test_a_task_that_needs_isaac_sim():
    with pytest.raises(
        SystemExit, match="--task IsaacContrib-Assemble-Trocar-G129-Dex3: runs on PhysX, which comes with Isaac Sim"
    ):
        find_task("IsaacContrib-Assemble-Trocar-G129-Dex3")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from tests import assets

    os.environ.setdefault("ISAACSIM_ASSET_ROOT", str(assets.mirror()))
    name, script, folder = sys.argv[1:]
    (Path(folder) / "found.json").write_text(json.dumps(check(name, script, Path(folder))))
