"""The offline mirror of assets: building and choosing it, the Franka's geometry, and each stand-in's physics in its task.

`python tests/test_assets.py KIND` runs one kind's check: there is one simulator per process.
"""

import argparse
import http.server
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests import assets, warm

# public modified (Craig's) DH parameters of the Panda, flange included: a [m], d [m], alpha [rad]
DH = (
    (0, 0.333, 0),
    (0, 0, -np.pi / 2),
    (0, 0.316, np.pi / 2),
    (0.0825, 0, np.pi / 2),
    (-0.0825, 0.384, -np.pi / 2),
    (0, 0, np.pi / 2),
    (0.088, 0, np.pi / 2),
    (0, 0.107, 0),
)


def hand_pose(q) -> np.ndarray:
    """Hand in the base's frame (4, 4) for seven joint angles [rad]; the hand is turned by -45 degrees on the flange."""
    pose = np.eye(4)
    for (a, d, alpha), theta in zip(DH, [*q, -np.pi / 4]):
        ct, st, ca, sa = np.cos(theta), np.sin(theta), np.cos(alpha), np.sin(alpha)
        pose = pose @ [[ct, -st, 0, a], [st * ca, ct * ca, -sa, -d * sa], [st * sa, ct * sa, ca, d * ca], [0, 0, 0, 1]]
    return pose


# ------------------------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return assets.build(tmp_path_factory.mktemp("assets") / "mirror")


def files(root: Path) -> dict:
    return {p.relative_to(root): p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}


def open_stage(path: Path):
    from pxr import Usd

    return Usd.Stage.Open(str(path))


def names(root: Path, path: str, kind: str) -> set[str]:
    """Names of the joints (D6 as one), or of the rigid bodies, of an asset."""
    from pxr import UsdPhysics

    stage = open_stage(root / path)
    prims = [p for p in stage.Traverse() if not p.IsA(UsdPhysics.FixedJoint)]
    if kind == "joints":
        return {p.GetName() for p in prims if p.IsA(UsdPhysics.Joint)}
    return {p.GetName() for p in prims if p.HasAPI(UsdPhysics.RigidBodyAPI)}


def test_build_is_complete_and_idempotent(root):
    before = files(root)
    paths = {assets.GROUND, assets.CARTPOLE, assets.ANT, assets.HUMANOID, assets.FRANKA, assets.CABINET, assets.TABLE}
    paths |= {assets.BLOCK.format(colour=colour) for colour in ("blue", "red", "green")}
    assert {str(p) for p in before} == paths | {assets.STAMP}
    for path in paths:
        stage = open_stage(root / path)
        assert stage.GetDefaultPrim().IsValid(), path
    assert assets.build(root) == root and files(root) == before
    assert not list(root.parent.glob(f".{root.name}-*"))  # no scratch folder is left


def test_build_replaces_an_older_mirror_but_nothing_else(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    (old / assets.STAMP).write_text("older")
    (old / "left over").touch()
    assets.build(old)
    assert (old / assets.STAMP).read_text() == assets.fingerprint() and not (old / "left over").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(FileExistsError):
        assets.build(other)


def test_two_processes_build_at_once(tmp_path):
    code = f"from tests import assets; print(assets.build({str(tmp_path / 'mirror')!r}))"
    runs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
    assert [run.communicate()[1] for run in runs] == [b"", b""] and all(run.returncode == 0 for run in runs)
    assert [p.name for p in tmp_path.iterdir()] == ["mirror"]


def test_script_prints_the_root_only():
    run = subprocess.run([sys.executable, ROOT / "tests/assets.py"], capture_output=True, text=True, check=True)
    assert run.stdout == f"{assets.mirror()}\n" and assets._is_current(assets.mirror())


@pytest.mark.parametrize(
    "given,online,choice",
    [("/assets", False, "given"), ("/assets", True, "given"), ("", True, "nvidia"), ("", False, "mirror")],
)
def test_use(monkeypatch, tmp_path, given, online, choice):
    monkeypatch.setenv("ISAACSIM_ASSET_ROOT", given)
    monkeypatch.setattr(assets, "reachable", lambda: online)
    monkeypatch.setattr(assets, "mirror", lambda: tmp_path)
    assert assets.use() == choice
    assert os.environ["ISAACSIM_ASSET_ROOT"] == (str(tmp_path) if choice == "mirror" else given)


def test_reachable(monkeypatch):
    assert assets.server().startswith("https://") and assets.server().rsplit("/", 2)[-2] == "Isaac"
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_response(200 if self.path == f"/root/{assets.ANT}" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for path, answer in (("/root", True), ("/elsewhere", False)):
            monkeypatch.setattr(assets, "server", lambda path=path: url + path)
            assert assets.reachable() is answer
        server.shutdown()
    assert len(asked) == 2
    assert not assets.reachable()  # nobody listens any more


def test_stock_names(root):
    assert names(root, assets.CARTPOLE, "joints") == {"slider_to_cart", "cart_to_pole"}
    legs = {f"{leg}_{part}" for leg in ("front_left", "front_right", "left_back", "right_back") for part in ("leg", "foot")}
    assert names(root, assets.ANT, "joints") == legs
    sides = {f"{side}_{part}" for side in ("left", "right") for part in ("upper_arm", "lower_arm", "thigh", "shin", "foot")}
    assert names(root, assets.HUMANOID, "joints") == sides | {"lower_waist", "pelvis"}
    fingers = {"panda_finger_joint1", "panda_finger_joint2"}
    assert names(root, assets.FRANKA, "joints") == fingers | {f"panda_joint{i}" for i in range(1, 8)}
    gripper = {"panda_hand", "panda_leftfinger", "panda_rightfinger"}
    assert names(root, assets.FRANKA, "bodies") == gripper | {f"panda_link{i}" for i in range(8)}
    drawers = {"drawer_top", "drawer_bottom"}
    assert names(root, assets.CABINET, "joints") == {f"{d}_joint" for d in drawers} | {"door_left_joint", "door_right_joint"}
    assert names(root, assets.CABINET, "bodies") >= drawers | {"sektion", "drawer_handle_top", "drawer_handle_bottom"}


def test_franka_geometry_is_the_pandas(root):
    """Chain of the USD file's joint frames against the DH table, and the bodies' own poses against the chain at zero."""
    from pxr import Gf, UsdGeom, UsdPhysics

    stage = open_stage(root / assets.FRANKA)

    def frame(joint, i):
        rotation = Gf.Rotation(Gf.Quatd(getattr(joint, f"GetLocalRot{i}Attr")().Get()))
        return Gf.Matrix4d(rotation, Gf.Vec3d(getattr(joint, f"GetLocalPos{i}Attr")().Get()))

    def chain(q):
        pose = Gf.Matrix4d(1)  # row vectors: the child's frame comes first
        for name, angle in zip([f"panda_joint{i}" for i in range(1, 8)] + ["panda_hand_joint"], [*q, 0.0]):
            joint = UsdPhysics.Joint(stage.GetPrimAtPath(f"/panda/Physics/{name}"))
            turn = Gf.Matrix4d(Gf.Rotation(Gf.Vec3d(0, 0, 1), float(np.degrees(angle))), Gf.Vec3d(0))
            pose = frame(joint, 1).GetInverse() * turn * frame(joint, 0) * pose
        return np.array(pose).T

    for q in [np.zeros(7), np.array([0, -0.569, 0, -2.81, 0, 3.037, 0.741]), *np.random.default_rng(0).uniform(-2, 2, (8, 7))]:
        assert np.abs(chain(q) - hand_pose(q)).max() < 1e-5
    hand = next(p for p in stage.Traverse() if p.GetName() == "panda_hand")
    pose = np.array(UsdGeom.XformCache().GetLocalToWorldTransform(hand)).T
    assert np.abs(pose - hand_pose(np.zeros(7))).max() < 1e-6


def test_franka_colliders(root):
    from pxr import UsdPhysics

    stage = open_stage(root / assets.FRANKA)
    count = {}
    for name in ("primitives", "gripper_only"):
        stage.GetDefaultPrim().GetVariantSet("Colliders").SetVariantSelection(name)
        count[name] = sum(p.HasAPI(UsdPhysics.CollisionAPI) for p in stage.Traverse())
    assert count["gripper_only"] == 3 < count["primitives"]


# ------------------------------------------------------------------------------------------------------------------
# Physics: one function per kind, run in a process of its own on `N` environments
# ------------------------------------------------------------------------------------------------------------------
N = 2
NEWTON = ["physics=newton_mjwarp"]
TASKS = {  # kind: task, overrides
    "cartpole": ("Isaac-Cartpole-Direct", NEWTON),
    "ant": ("Isaac-Ant-Direct", NEWTON),
    "humanoid": ("Isaac-Humanoid-Direct", NEWTON),
    "lift": (
        "Isaac-Lift-Franka",
        [
            *NEWTON,
            "env.sim.physics.collision_cfg.rigid_contact_max=10000",  # the stock four million take most of a CPU step
            "env.events.conditional_reset.params.buffer_size_per_group=4",  # stock: 1024 start states per object shape
        ],
    ),
    "drawer": ("Isaac-Open-Drawer-Franka", NEWTON),
    "stack": ("IsaacContrib-Stack-Cube-Franka", [*NEWTON, "env.scene.replicate_physics=true"]),
}


def zero_actions(env):
    import torch

    return torch.zeros(N, env.single_action_space.shape[-1])


def hand_error(env) -> float:
    """Largest distance of a hand from the public forward kinematics of its measured joints [m]."""
    robot = env.scene["robot"].data
    base, hand = (env.scene["robot"].body_names.index(name) for name in ("panda_link0", "panda_hand"))
    offset = (robot.body_pos_w.torch[:, hand] - robot.body_pos_w.torch[:, base]).numpy()
    expected = np.stack([hand_pose(q)[:3, 3] for q in robot.joint_pos.torch[:, :7].double().numpy()])
    return np.linalg.norm(offset - expected, axis=1).max()


def check_cartpole(env):
    import torch

    robot = env.scene["cartpole"]
    cart, pole = (robot.joint_names.index(name) for name in ("slider_to_cart", "cart_to_pole"))
    position, rest = torch.zeros(N, 2), torch.zeros(N, 2)
    position[:, pole] = torch.tensor([-0.2, 0.2])
    robot.write_joint_position_to_sim_index(position=position)
    robot.write_joint_velocity_to_sim_index(velocity=rest)
    for _ in range(20):
        env.step(zero_actions(env))
    growth = robot.data.joint_pos.torch[:, pole] / position[:, pole]  # an unstable equilibrium
    assert growth.min() > 2 and growth.max() < 3.5
    before = robot.data.joint_pos.torch[:, cart].clone()
    for _ in range(20):
        env.step(zero_actions(env) + 1)
    assert (robot.data.joint_pos.torch[:, cart] > before + 0.1).all()


def check_ant(env):
    for _ in range(60):
        _, _, terminated, _, _ = env.step(zero_actions(env))
        assert not terminated.any()
    height = env.scene["robot"].data.root_pos_w.torch[:, 2]
    assert height.min() > 0.3 and height.max() < 0.6  # stands; the torso's radius is 0.25


def check_humanoid(env):
    robot = env.scene["robot"]
    feet = [robot.body_names.index(f"{side}_foot") for side in ("left", "right")]
    for step in range(28):
        _, _, terminated, _, _ = env.step(zero_actions(env))
        assert robot.data.body_pos_w.torch[:, feet, 2].min() > 0.01, step  # the ground holds
        assert not terminated.any(), step
    assert robot.data.root_pos_w.torch[:, 2].max() < 1.25  # and it sinks to its knees


def check_lift(env):
    robot, box = env.scene["robot"], env.scene["object"]
    start = robot.data.joint_pos.torch.clone()
    for _ in range(20):
        env.step(zero_actions(env))  # relative positions, and no gravity at the curriculum's start
    assert (robot.data.joint_pos.torch - start)[:, :7].abs().max() < 0.05
    assert (box.data.root_pos_w.torch - env.scene.env_origins)[:, 2].min() > 0.25  # above the table top at 0.255


def check_drawer(env):
    import torch

    robot, cabinet = env.scene["robot"], env.scene["cabinet"]
    assert hand_error(env) < 1e-3
    aside = robot.data.joint_pos.torch.clone()
    aside[:, :2] = torch.tensor([2.5, 0.3])  # leaning away: the arm is in the drawer's way otherwise
    robot.write_joint_position_to_sim_index(position=aside)
    env.action_manager.reset(torch.arange(N))  # the smoothed targets start from here
    low, high = robot.data.soft_joint_pos_limits.torch[:, :7].unbind(-1)
    hold = zero_actions(env) + 1
    hold[:, :7] = 2 * (robot.data.joint_pos.torch[:, :7] - low) / (high - low) - 1  # actions span the limits
    drawer = cabinet.joint_names.index("drawer_top_joint")
    handle = cabinet.body_names.index("drawer_handle_top")
    frame = env.scene["cabinet_frame"].data.target_pos_w.torch[:, 0]
    assert (frame - cabinet.data.body_pos_w.torch[:, handle] - torch.tensor([-0.305, 0, 0.01])).abs().max() < 1e-4
    for force, steps in ((8.0, 50), (-8.0, 50)):  # [N]
        effort = torch.zeros(N, len(cabinet.joint_names))
        effort[:, drawer] = force
        for _ in range(steps):
            cabinet.actuators.target_command.set_effort_index(value=effort)
            env.step(hold)
            position = cabinet.data.joint_pos.torch[:, drawer]
            assert -0.01 < position.min() and position.max() < 0.41  # limits give a little
        assert (position - (0.4 if force > 0 else 0.0)).abs().max() < 0.02


def check_stack(env):
    import torch
    from isaaclab.utils.math import quat_apply

    robot, cubes = env.scene["robot"], [env.scene[f"cube_{i}"] for i in (1, 2, 3)]
    actions = zero_actions(env)
    actions[:, -1] = 1  # open
    for _ in range(50):
        env.step(actions)
    assert (robot.data.joint_pos.torch - robot.data.default_joint_pos.torch).abs().max() < 0.05
    assert hand_error(env) < 1e-3
    for cube in cubes:
        assert (cube.data.root_pos_w.torch[:, 2] - 0.0203).abs().max() < 2e-3
        assert cube.data.root_lin_vel_w.torch.abs().max() < 0.02
    hand = robot.body_names.index("panda_hand")
    pose = robot.data.body_pose_w.torch[:, hand].clone()
    pose[:, :3] += quat_apply(pose[:, 3:], torch.tensor([0, 0, 0.1034]).expand(N, 3))
    cubes[0].write_root_pose_to_sim_index(root_pose=pose, env_ids=torch.arange(N).int())
    cubes[0].write_root_velocity_to_sim_index(root_velocity=torch.zeros(N, 6), env_ids=torch.arange(N).int())
    actions[:, -1] = -1  # close
    for _ in range(30):
        env.step(actions)
    assert (cubes[0].data.root_pos_w.torch[:, 2] - pose[:, 2]).abs().max() < 0.02  # held against gravity
    assert (robot.data.joint_pos.torch[:, 7:].sum(1) - assets.BLOCK_EDGE).abs().max() < 3e-3


def finite(tree) -> bool:
    """Whether every tensor of nested dicts is finite."""
    import torch

    if isinstance(tree, dict):
        return all(finite(value) for value in tree.values())
    return bool(torch.isfinite(tree.float()).all())


def run(kind: str):
    """Random actions, then the kind's own check."""
    import gymnasium as gym
    import isaaclab_tasks  # noqa: F401
    import torch
    from isaaclab.app import launch_simulation
    from isaaclab_tasks.utils import parse_env_cfg

    task, overrides = TASKS[kind]
    cfg = parse_env_cfg(task, device="cpu", num_envs=N, overrides=overrides)
    with launch_simulation(cfg, argparse.Namespace(device="cpu", headless=True, enable_cameras=False)):
        env = gym.make(task, cfg=cfg).unwrapped
        env.reset(seed=0)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            obs, reward, *_ = env.step(torch.rand(zero_actions(env).shape, generator=generator) * 2 - 1)
            assert finite(obs) and (reward is None or finite(reward))
        env.reset(seed=0)
        globals()[f"check_{kind}"](env)
        print(f"{kind} passed", flush=True)
        env.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_physics(kind):
    env = {**os.environ, "ISAACSIM_ASSET_ROOT": str(assets.mirror()), "OMP_NUM_THREADS": "1"}
    out, err = warm.start([__file__, kind], ROOT, env).communicate(timeout=600)
    assert f"{kind} passed" in out, err[-3000:]


if __name__ == "__main__":
    run(sys.argv[1])
