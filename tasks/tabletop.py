"""Tabletop lift: a small Isaac Lab 3.0 manipulation task with nothing to download.

"lift the red|blue cube": a gantry with a parallel gripper, two cubes, one camera. Every asset is authored from USD
primitives when the scene is built. It is an ordinary manager-based environment (`Tabletop-Lift-Cube-v0`) with Newton
physics (MuJoCo-Warp) and the Newton Warp renderer, so it runs on any NVIDIA GPU with thousands of environments
(`--device cuda`) and on a laptop's CPU.

- action (4): dx, dy, dz of the gripper in [-1, 1] (times `MAX_STEP` metres per step), gripper (> 0 opens, <= 0 closes)
- observation groups: `policy` (5 joint positions [m]: x, y, z, left finger, right finger) and `critic` (privileged: both
  cubes' positions and velocities, both relative to the gripper, the named cube first; joints; the named cube's index)
- camera `cam`: uint8 RGB, 64 x 64 by default; rendered only when its data is read
- termination `success`: the named cube is above `LIFT_HEIGHT` for `HOLD_STEPS` steps in a row while the other is not
- episodes of `HORIZON` steps at 25 Hz

`Tabletop-Suite-v0` is the same scene under ten instructions of four kinds, `SUITE`: lift, push to a side, stack, put in the
middle. Only the instruction tells them apart. Every success is a function of the state as it is and belongs to one
cube, so no episode needs to remember its start. Its `critic` has columns for what is asked (`suite_state`).

On a CPU the worlds are stepped by C MuJoCo (`tasks/mujoco_c.py`) through the very model that Newton compiled, which is
about ten times faster than Warp's kernels there. `physics=newton_mjwarp` switches back to Warp, `physics=mujoco_c` asks
for C MuJoCo explicitly; the default chooses by device and says so in one log line.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import gymnasium as gym
import isaaclab.sim as sim_utils
import torch
from isaaclab.actuators import ImplicitActuatorCfg
from isaaclab.assets import ArticulationCfg, AssetBaseCfg, RigidObjectCfg
from isaaclab.envs import ManagerBasedRLEnv, ManagerBasedRLEnvCfg, mdp
from isaaclab.managers import (
    ActionTerm,
    ActionTermCfg,
    EventTermCfg,
    ManagerTermBase,
    ObservationGroupCfg,
    ObservationTermCfg,
    RewardTermCfg,
    TerminationTermCfg,
)
from isaaclab.scene import InteractiveSceneCfg
from isaaclab.sensors import CameraCfg
from isaaclab.sim.utils import clone
from isaaclab.utils import configclass
from isaaclab.utils.string import ResolvableString
from isaaclab_newton.physics import MJWarpSolverCfg, NewtonCfg, NewtonShapeCfg
from isaaclab_tasks.utils import PresetCfg
from isaaclab_tasks.utils.presets import MultiBackendRendererCfg

from tasks.stock import C_MANAGERS

log = logging.getLogger(__name__)

TASK_ID = "Tabletop-Lift-Cube-v0"
COLOURS = ("red", "blue")
INSTRUCTIONS = tuple(f"lift the {colour} cube" for colour in COLOURS)
RGB = ((0.85, 0.05, 0.05), (0.05, 0.15, 0.9))

CUBE = 0.045  # edge [m]; cubes rest on the table top, z = 0
CUBE_MASS = 0.2  # [kg]
LIFT_HEIGHT = 0.08  # cube centre above this counts as lifted [m]
HOLD_STEPS = 3  # consecutive steps a lift must last
MAX_STEP = 0.025  # gripper travel for an action of 1 [m]
FINGER_OPEN = 0.05  # opening of one finger [m]
GANTRY_LOW, GANTRY_HIGH, GANTRY_HOME = (-0.2, -0.2, 0.018), (0.2, 0.2, 0.22), (0.0, 0.0, 0.14)  # pinch centre [m]
SLOT_PITCH, ROW_OFFSET, JITTER, YAW = 0.07, 0.05, 0.015, 0.15  # start poses of the cubes [m, m, m, rad]
STEP_DT, SUBSTEPS = 0.04, 8  # 25 Hz control, 200 Hz contact
HORIZON = 32  # steps per episode

SUITE_ID, SUITE_HORIZON = "Tabletop-Suite-v0", 48
KINDS = ("lift", "push", "stack", "middle")
SUITE = {  # instruction: kind, named cube, side along y (the camera sees +y on the right)
    "lift the red cube": (0, 0, 0),
    "lift the blue cube": (0, 1, 0),
    "push the red cube to the left": (1, 0, -1),
    "push the red cube to the right": (1, 0, 1),
    "push the blue cube to the left": (1, 1, -1),
    "push the blue cube to the right": (1, 1, 1),
    "stack the red cube on the blue cube": (2, 0, 0),
    "stack the blue cube on the red cube": (2, 1, 0),
    "put the red cube in the middle": (3, 0, 0),
    "put the blue cube in the middle": (3, 1, 0),
}
SIDE = 0.11  # a cube this far out lies at the side [m]; starts end at 0.085
NEAR_MIDDLE, NEAR_STACK, NEAR_HEIGHT = 0.025, 0.018, 0.008  # tolerances [m]


# ------------------------------------------------------------------------------------------------------------------
# Scene: assets from primitives
# ------------------------------------------------------------------------------------------------------------------
@clone
def spawn_gantry(prim_path: str, cfg: GantryCfg, translation=None, orientation=None, **kwargs):
    """Write the gantry into the current stage: x, y, z prismatic joints and two opposed prismatic fingers."""
    from pxr import Gf, UsdGeom, UsdPhysics

    stage = sim_utils.get_current_stage()
    root = UsdGeom.Xform.Define(stage, prim_path).GetPrim()

    def add_body(name, mass, boxes=()):
        prim = UsdGeom.Xform.Define(stage, f"{prim_path}/{name}").GetPrim()
        UsdPhysics.RigidBodyAPI.Apply(prim)
        mass_api = UsdPhysics.MassAPI.Apply(prim)
        mass_api.CreateMassAttr(mass)
        mass_api.CreateCenterOfMassAttr(Gf.Vec3f(0))
        mass_api.CreateDiagonalInertiaAttr(Gf.Vec3f(mass * 1e-3))
        for i, (size, offset, rgb, collides) in enumerate(boxes):
            box = UsdGeom.Cube.Define(stage, f"{prim_path}/{name}/box{i}")
            box.CreateSizeAttr(1.0)
            box.AddTranslateOp().Set(Gf.Vec3d(*offset))
            box.AddScaleOp().Set(Gf.Vec3f(*size))
            box.CreateDisplayColorAttr([Gf.Vec3f(*rgb)])
            if collides:
                UsdPhysics.CollisionAPI.Apply(box.GetPrim())

    def add_joint(name, parent, child, axis, low, high, flip=False):
        joint = UsdPhysics.PrismaticJoint.Define(stage, f"{prim_path}/{name}")
        joint.CreateBody0Rel().SetTargets([f"{prim_path}/{parent}"])
        joint.CreateBody1Rel().SetTargets([f"{prim_path}/{child}"])
        joint.CreateAxisAttr(axis)
        joint.CreateLowerLimitAttr(low)
        joint.CreateUpperLimitAttr(high)
        for create in (joint.CreateLocalRot0Attr, joint.CreateLocalRot1Attr):
            create(Gf.Quatf(0, 0, 0, 1) if flip else Gf.Quatf(1))  # flip: half a turn about z, opens along -y
        drive = UsdPhysics.DriveAPI.Apply(joint.GetPrim(), "linear")
        drive.CreateTypeAttr("force")
        drive.CreateStiffnessAttr(1.0)  # the actuator models below overwrite both gains
        drive.CreateDampingAttr(1.0)

    grey, dark, finger = (0.75, 0.75, 0.78), (0.15, 0.15, 0.17), (0.03, 0.012, 0.06)
    palm, column = ((0.03, 0.12, 0.02), (0, 0, 0.055), grey, False), ((0.025, 0.025, 0.2), (0, 0, 0.165), grey, False)
    add_body("base", 1.0)
    add_body("x", 0.1)
    add_body("y", 0.1)
    add_body("z", 0.2, [palm, column])
    add_body("finger_left", 0.05, [(finger, (0, 0.006, 0.015), dark, True)])
    add_body("finger_right", 0.05, [(finger, (0, -0.006, 0.015), dark, True)])
    UsdPhysics.ArticulationRootAPI.Apply(stage.GetPrimAtPath(f"{prim_path}/base"))
    anchor = UsdPhysics.FixedJoint.Define(stage, f"{prim_path}/root_joint")
    anchor.CreateBody1Rel().SetTargets([f"{prim_path}/base"])
    for i, (parent, child) in enumerate((("base", "x"), ("x", "y"), ("y", "z"))):
        add_joint(f"{child}_joint", parent, child, child.upper(), GANTRY_LOW[i], GANTRY_HIGH[i])
    add_joint("finger_left_joint", "z", "finger_left", "Y", 0.0, FINGER_OPEN)
    add_joint("finger_right_joint", "z", "finger_right", "Y", 0.0, FINGER_OPEN, flip=True)
    return root


@configclass
class GantryCfg(sim_utils.SpawnerCfg):
    """Spawner of the procedural gantry robot."""

    func = spawn_gantry


def cube_cfg(index: int) -> RigidObjectCfg:
    """One graspable cube; its start pose is drawn by `randomise_start`."""
    return RigidObjectCfg(
        prim_path="{ENV_REGEX_NS}/" + COLOURS[index],
        init_state=RigidObjectCfg.InitialStateCfg(pos=(0.1 * (2 * index - 1), 0.0, CUBE / 2)),
        spawn=sim_utils.CuboidCfg(
            size=(CUBE,) * 3,
            rigid_props=sim_utils.RigidBodyPropertiesCfg(),
            mass_props=sim_utils.MassPropertiesCfg(mass=CUBE_MASS),
            collision_props=sim_utils.CollisionPropertiesCfg(),
            visual_material=sim_utils.PreviewSurfaceCfg(diffuse_color=RGB[index]),
        ),
    )


@configclass
class LiftSceneCfg(InteractiveSceneCfg):
    """Table, gantry, two cubes, a light and one camera."""

    table = AssetBaseCfg(
        prim_path="{ENV_REGEX_NS}/Table",
        init_state=AssetBaseCfg.InitialStateCfg(pos=(0.0, 0.0, -0.025)),
        spawn=sim_utils.CuboidCfg(
            size=(0.7, 0.7, 0.05),
            collision_props=sim_utils.CollisionPropertiesCfg(),
            visual_material=sim_utils.PreviewSurfaceCfg(diffuse_color=(0.6, 0.48, 0.33)),
        ),
    )
    robot = ArticulationCfg(
        prim_path="{ENV_REGEX_NS}/Robot",
        spawn=GantryCfg(),
        init_state=ArticulationCfg.InitialStateCfg(
            joint_pos=dict(zip(("x_joint", "y_joint", "z_joint"), GANTRY_HOME)) | {"finger_.*": FINGER_OPEN}
        ),
        actuators={
            "arm": ImplicitActuatorCfg(joint_names_expr=["[xyz]_joint"], stiffness=4000.0, damping=120.0, effort_limit_sim=1e3),
            "fingers": ImplicitActuatorCfg(
                joint_names_expr=["finger_.*"], stiffness=100.0, damping=10.0, effort_limit_sim=20.0
            ),
        },
    )
    red, blue = cube_cfg(0), cube_cfg(1)
    light = AssetBaseCfg(prim_path="/World/Light", spawn=sim_utils.DistantLightCfg(intensity=2000.0))
    cam = CameraCfg(
        prim_path="{ENV_REGEX_NS}/cam",
        height=64,
        width=64,
        data_types=["rgb"],
        renderer_cfg=MultiBackendRendererCfg(),
        spawn=sim_utils.PinholeCameraCfg(focal_length=44.0, horizontal_aperture=20.955, clipping_range=(0.05, 5.0)),
        # in front of the table, looking back along -x, 48 degrees down: a cube is about 12 of 64 pixels wide
        offset=CameraCfg.OffsetCfg(pos=(0.368, 0.0, 0.4437), rot=(0.66014, 0.66014, -0.25340, -0.25340), convention="ros"),
    )


# ------------------------------------------------------------------------------------------------------------------
# MDP terms
# ------------------------------------------------------------------------------------------------------------------
class GantryAction(ActionTerm):
    """Gripper displacement and a binary gripper command.

    The displacement is added to the last *target*, not to the measured position, so that gravity does not make the
    gripper sink. After a reset the target starts from the measured joints.
    """

    def __init__(self, cfg: GantryActionCfg, env):
        super().__init__(cfg, env)
        self._raw_actions = torch.zeros(self.num_envs, 4, device=self.device)
        self._target = torch.zeros(self.num_envs, 5, device=self.device)  # joint positions [m]
        self._fresh = torch.ones(self.num_envs, 1, dtype=torch.bool, device=self.device)
        self._low = torch.tensor(GANTRY_LOW, device=self.device)
        self._high = torch.tensor(GANTRY_HIGH, device=self.device)

    @property
    def action_dim(self) -> int:
        return 4

    @property
    def raw_actions(self) -> torch.Tensor:
        return self._raw_actions

    @property
    def processed_actions(self) -> torch.Tensor:
        return self._target

    def process_actions(self, actions: torch.Tensor):
        self._raw_actions[:] = actions
        self._target = torch.where(self._fresh, self._asset.data.joint_pos.torch, self._target)
        self._fresh.zero_()
        step = actions[:, :3].clamp(-1.0, 1.0) * MAX_STEP
        self._target[:, :3] = (self._target[:, :3] + step).clamp(self._low, self._high)
        self._target[:, 3:] = torch.where(actions[:, 3:] > 0, FINGER_OPEN, 0.0)

    def apply_actions(self):
        self._asset.actuators.target_command.set_position_index(value=self._target)

    def reset(self, env_ids=None):
        self._fresh[slice(None) if env_ids is None else env_ids] = True


@configclass
class GantryActionCfg(ActionTermCfg):
    """Configuration of `GantryAction`."""

    class_type = GantryAction
    asset_name: str = "robot"


def joint_positions(env) -> torch.Tensor:
    """The five joint positions, (N, 5) [m]."""
    return env.scene["robot"].data.joint_pos.torch.clone()


def cube_positions(env) -> torch.Tensor:
    """Centres of the red and the blue cube in the environment's frame, (N, 2, 3) [m]."""
    return torch.stack([env.scene[c].data.root_pos_w.torch - env.scene.env_origins for c in COLOURS], 1)


def privileged_state(env) -> torch.Tensor:
    """What only a simulator knows, (N, 24), the named cube always first: a value is learned several times faster so.

    Cube positions (6), velocities (6), offsets from the gripper (6), joint positions (5), index of the named cube (1).
    """
    joints, cubes = joint_positions(env), cube_positions(env)
    velocities = torch.stack([env.scene[c].data.root_lin_vel_w.torch for c in COLOURS], 1)
    both = torch.cat([cubes, velocities, cubes - joints[:, None, :3]], 2).unflatten(2, (3, 3))  # (N, 2, 3 kinds, 3)
    named_first = torch.where(env.target[:, None, None, None] == 0, both, both.flip(1)).transpose(1, 2)
    return torch.cat([named_first.flatten(1), joints, env.target[:, None].float()], 1)


def lifted(env) -> torch.Tensor:
    """True where the named cube is above `LIFT_HEIGHT` and the other one is not, (N,) bool."""
    high = cube_positions(env)[..., 2] > LIFT_HEIGHT  # (N, 2)
    named = high.gather(1, env.target[:, None])[:, 0]
    other = high.gather(1, 1 - env.target[:, None])[:, 0]
    return named & ~other


def reaching(env) -> torch.Tensor:
    """1 - tanh(distance / 10 cm) between the gripper and the named cube, (N,)."""
    goal = cube_positions(env)[torch.arange(env.num_envs, device=env.device), env.target]
    return 1.0 - torch.tanh((goal - joint_positions(env)[:, :3]).norm(dim=1) / 0.1)


class held(ManagerTermBase):  # noqa: N801 (a term is called like a function)
    """Success: `condition` for `steps` steps in a row, (N,) bool."""

    def __init__(self, cfg: TerminationTermCfg, env):
        super().__init__(cfg, env)
        self._count = torch.zeros(env.num_envs, dtype=torch.long, device=env.device)

    def reset(self, env_ids=None):
        self._count[slice(None) if env_ids is None else env_ids] = 0

    def __call__(self, env, steps: int = HOLD_STEPS, condition: Callable = lifted) -> torch.Tensor:
        self._count = (self._count + 1) * condition(env)
        return self._count >= steps


def randomise_start(
    env,
    env_ids: torch.Tensor,
    gantry_share: float = 0.0,
    asked: tuple[int, ...] = (0, 1),
    weights: torch.Tensor | None = None,
):
    """Draw episode starts: one cube in each row (random side), in one of three slots with jitter and yaw; a random target.

    Args:
        env: the environment.
        env_ids: indices of the environments to reset.
        gantry_share: share of episodes that start from a random gripper pose, some with the fingers part closed,
            instead of home; demonstrations use it to show recoveries.
        asked: instructions to draw from, as indices.
        weights: how often each of these, (len(asked),); all equally by default.
    """
    ids = torch.arange(env.num_envs, device=env.device)[env_ids]
    n, scene = len(ids), env.scene

    def rand(*shape):
        return torch.rand(*shape, device=env.device)

    joints = torch.tensor([[*GANTRY_HOME, FINGER_OPEN, FINGER_OPEN]], device=env.device).repeat(n, 1)
    if gantry_share > 0:
        anywhere = torch.cat([0.24 * rand(n, 2) - 0.12, 0.075 + 0.12 * rand(n, 1)], 1)
        moved = rand(n, 1) < gantry_share
        joints[:, :3] = torch.where(moved, anywhere, joints[:, :3])
        joints[:, 3:] = torch.where(moved & (rand(n, 1) < 0.25), FINGER_OPEN * rand(n, 1), joints[:, 3:])
    robot = scene["robot"]
    robot.write_joint_state_to_sim_index(position=joints, velocity=torch.zeros_like(joints), env_ids=ids.int())

    side = (rand(n) < 0.5).float() * 2 - 1
    for i, colour in enumerate(COLOURS):
        u = rand(n, 3) * 2 - 1
        pose = torch.zeros(n, 7, device=env.device)  # x, y, z, quaternion (x, y, z, w)
        pose[:, 0] = side * (1 - 2 * i) * ROW_OFFSET + JITTER * u[:, 0]
        pose[:, 1] = SLOT_PITCH * torch.randint(-1, 2, (n,), device=env.device) + JITTER * u[:, 1]
        pose[:, 2] = CUBE / 2
        pose[:, 5], pose[:, 6] = torch.sin(0.5 * YAW * u[:, 2]), torch.cos(0.5 * YAW * u[:, 2])
        pose[:, :3] += scene.env_origins[ids]
        scene[colour].write_root_pose_to_sim_index(root_pose=pose, env_ids=ids.int())
        still = torch.zeros(n, 6, device=env.device)
        scene[colour].write_root_velocity_to_sim_index(root_velocity=still, env_ids=ids.int())
    equal = weights is None
    drawn = torch.randint(0, len(asked), (n,), device=env.device) if equal else torch.multinomial(weights, n, replacement=True)
    env.target[ids] = torch.tensor(asked, device=env.device)[drawn]


def asked_for(env) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the suite's instructions ask for: kind, named cube, side, each (N,) int64."""
    return tuple(env.suite[env.target].T)


def named_first(env, named: torch.Tensor) -> torch.Tensor:
    """Centres of the named and of the other cube, (N, 2, 3) [m]."""
    cubes = cube_positions(env)
    return torch.where(named[:, None, None] == 0, cubes, cubes.flip(1))


def place(env) -> torch.Tensor:
    """Where the named cube's centre has to go if it is to be stacked or put in the middle, (N, 3) [m].

    The middle gives way to the other cube where that lies near it, by less than `NEAR_MIDDLE`.
    """
    kind, named, _ = asked_for(env)
    other = named_first(env, named)[:, 1]
    on_top, middle = other.clone(), torch.zeros_like(other)
    on_top[:, 2] += CUBE
    gap = CUBE + 0.008 - other[:, 0].abs()  # by how much a cube in the middle would be too near
    gap = torch.where(other[:, 1].abs() < CUBE + 0.01, gap.clamp(0.0, 0.02), torch.zeros_like(gap))
    middle[:, 0], middle[:, 2] = -gap * other[:, 0].sign(), CUBE / 2
    return torch.where((kind == KINDS.index("stack"))[:, None], on_top, middle)


def fulfilled(env) -> torch.Tensor:
    """True where the scene is as the instruction asks, and fingers have let go of what was put somewhere, (N,) bool."""
    kind, named, side = asked_for(env)
    cube, other = named_first(env, named).unbind(1)
    lies, other_lies = cube[:, 2] < CUBE, other[:, 2] < CUBE
    free = joint_positions(env)[:, 3:].sum(1) > CUBE + 0.02
    raised = (cube[:, 2] > LIFT_HEIGHT) & (other[:, 2] <= LIFT_HEIGHT)
    aside = (cube[:, 1] * side > SIDE) & (other[:, 1].abs() < SIDE) & lies & other_lies
    offset = cube - other
    stacked = (offset[:, :2].norm(dim=1) < NEAR_STACK) & ((offset[:, 2] - CUBE).abs() < NEAR_HEIGHT) & other_lies & free
    middle = (cube[:, :2].norm(dim=1) < NEAR_MIDDLE) & lies & other_lies & free
    return torch.stack([raised, aside, stacked, middle], 1).gather(1, kind[:, None])[:, 0]


def suite_state(env) -> torch.Tensor:
    """What only a simulator knows, (N, 31), the named cube always first.

    Cube positions (6), velocities (6), offsets from the gripper (6), joint positions (5), offset of the named cube from
    where it is to be put (3), kind (4), side (1).
    """
    kind, named, side = asked_for(env)
    joints, cubes = joint_positions(env), named_first(env, named)
    velocities = torch.stack([env.scene[c].data.root_lin_vel_w.torch for c in COLOURS], 1)
    velocities = torch.where(named[:, None, None] == 0, velocities, velocities.flip(1))
    kinds = torch.nn.functional.one_hot(kind, len(KINDS)).float()
    parts = cubes.flatten(1), velocities.flatten(1), (cubes - joints[:, None, :3]).flatten(1), joints
    return torch.cat([*parts, place(env) - cubes[:, 0], kinds, side[:, None].float()], 1)


# ------------------------------------------------------------------------------------------------------------------
# Environment configuration
# ------------------------------------------------------------------------------------------------------------------
@configclass
class ActionsCfg:
    """One action term."""

    gantry = GantryActionCfg()


@configclass
class ObservationsCfg:
    """`policy`: proprioception. `critic`: privileged simulator state."""

    @configclass
    class PolicyCfg(ObservationGroupCfg):
        """Proprioception."""

        joints = ObservationTermCfg(func=joint_positions)

    @configclass
    class CriticCfg(ObservationGroupCfg):
        """Privileged state."""

        state = ObservationTermCfg(func=privileged_state)

    policy = PolicyCfg()
    critic = CriticCfg()


@configclass
class RewardsCfg:
    """Dense shaping for those who want it; the GR00T scripts learn from `success` alone."""

    reaching = RewardTermCfg(func=reaching, weight=1.0)
    lifted = RewardTermCfg(func=lambda env: lifted(env).float(), weight=10.0)


@configclass
class TerminationsCfg:
    """Success ends an episode, and so does its horizon."""

    success = TerminationTermCfg(func=held)
    time_out = TerminationTermCfg(func=mdp.time_out, time_out=True)


@configclass
class EventsCfg:
    """Episode starts."""

    reset = EventTermCfg(func=randomise_start, mode="reset", params={"gantry_share": 0.0})


def lift_solver(**changes) -> MJWarpSolverCfg:
    """Contacts that hold a cube; looser ones let it slip out of the fingers."""
    return MJWarpSolverCfg(
        solver="newton",
        integrator="implicitfast",
        cone="elliptic",
        impratio=10.0,
        iterations=10,
        ls_iterations=20,
        njmax=80,
        nconmax=24,
        **changes,
    )


@configclass
class LiftNewtonCfg(NewtonCfg):
    """Newton with the contact settings that hold a cube."""

    num_substeps = SUBSTEPS
    use_cuda_graph = True
    default_shape_cfg = NewtonShapeCfg(mu=2.0, ke=1e4, kd=200.0)
    solver_cfg = lift_solver()


@configclass
class LiftPhysicsCfg(PresetCfg):
    """Presets for `physics=`. The default is C MuJoCo on a CPU, Warp on a GPU."""

    newton_mjwarp: LiftNewtonCfg = LiftNewtonCfg()
    mujoco_c: LiftNewtonCfg = LiftNewtonCfg(solver_cfg=lift_solver(class_type=ResolvableString(C_MANAGERS[True])))
    default: LiftNewtonCfg = LiftNewtonCfg(solver_cfg=lift_solver(class_type=ResolvableString(C_MANAGERS[False])))


@configclass
class LiftEnvCfg(ManagerBasedRLEnvCfg):
    """The task. `env_spacing = 0`: the same float rounding in every environment, so equal starts stay equal."""

    scene = LiftSceneCfg(num_envs=128, env_spacing=0.0, replicate_physics=True)
    actions = ActionsCfg()
    observations = ObservationsCfg()
    rewards = RewardsCfg()
    terminations = TerminationsCfg()
    events = EventsCfg()
    decimation = 1  # the contact substeps run inside the physics step
    episode_length_s = HORIZON * STEP_DT
    wait_for_textures = False
    sim = sim_utils.SimulationCfg(dt=STEP_DT, render_interval=1, physics=LiftPhysicsCfg())


class LiftEnv(ManagerBasedRLEnv):
    """Manager-based environment that adds the language target.

    Attributes:
        target: index into `texts`, which for the lift task is the named cube's in `COLOURS`, (N,) int64.
    """

    texts = INSTRUCTIONS

    def __init__(self, cfg: LiftEnvCfg, **kwargs):
        physics = cfg.sim.physics
        if "cpu" not in cfg.sim.device:  # Isaac Lab's own manager
            physics.class_type = physics.solver_cfg.class_type = LiftNewtonCfg().class_type
        on_warp = physics.class_type not in C_MANAGERS
        self.target = torch.zeros(cfg.scene.num_envs, dtype=torch.long, device=cfg.sim.device)
        super().__init__(cfg, **kwargs)
        if on_warp:
            from isaaclab_newton.physics import NewtonManager
            from mujoco import mjtDisableBit

            option = NewtonManager._solver.mjw_model.opt
            # at full line search iterations the kernels would print a line each, tens of thousands an episode
            option.warn_overflow = False
            # boxes by the routine for boxes, as C MuJoCo does it: the two stay nearer, and a GPU's compiler is done sooner
            option.disableflags |= int(mjtDisableBit.mjDSBL_NATIVECCD)
            log.info("physics: Newton MuJoCo-Warp on %s", cfg.sim.device)

    @property
    def instructions(self) -> list[str]:
        """The instruction of every environment (one transfer to the host)."""
        return [self.texts[i] for i in self.target.tolist()]


@configclass
class SuiteEnvCfg(LiftEnvCfg):
    """The same scene, ten instructions."""

    episode_length_s = SUITE_HORIZON * STEP_DT

    def __post_init__(self):
        super().__post_init__()
        self.observations.critic.state = ObservationTermCfg(func=suite_state)
        self.rewards = {}
        self.terminations.success.params = {"condition": fulfilled}
        self.events.reset.params["asked"] = tuple(range(len(SUITE)))


class SuiteEnv(LiftEnv):
    """`LiftEnv` under the instructions of `SUITE`.

    Attributes:
        suite: kind, named cube and side of every instruction, (10, 3) int64.
    """

    texts = tuple(SUITE)

    def __init__(self, cfg: SuiteEnvCfg, **kwargs):
        self.suite = torch.tensor(list(SUITE.values()), device=cfg.sim.device)
        super().__init__(cfg, **kwargs)


gym.register(
    TASK_ID,
    entry_point=f"{__name__}:LiftEnv",
    disable_env_checker=True,
    kwargs={"env_cfg_entry_point": f"{__name__}:LiftEnvCfg"},
)
gym.register(
    SUITE_ID,
    entry_point=f"{__name__}:SuiteEnv",
    disable_env_checker=True,
    kwargs={"env_cfg_entry_point": f"{__name__}:SuiteEnvCfg"},
)


# ------------------------------------------------------------------------------------------------------------------
# Scripted experts
# ------------------------------------------------------------------------------------------------------------------
def pick(env, goal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Descend in a funnel over a cube, close, lift; re-open after a miss.

    Args:
        env: the environment; its joints are read.
        goal: the cube's centre, (N, 3) [m].

    Returns:
        Actions (N, 4), without memory between calls, and where the cube is in the fingers, (N,) bool.
    """
    joints = joint_positions(env)
    grip, width = joints[:, :3], joints[:, 3:].sum(1)
    delta = goal - grip
    lateral = delta[:, :2].norm(dim=1)
    near = (lateral < 0.018) & (delta[:, 2].abs() < 0.02)
    centred = (lateral < 0.010) & (delta[:, 2].abs() < 0.008)
    closing = near & (centred | (width < 2 * FINGER_OPEN - 0.015))
    grasped = near & (width < CUBE + 0.012)
    height = goal[:, 2] + (3 * (lateral - 0.01)).clamp(0.0, 0.07)  # stay above the cube until centred over it
    height = torch.where(grasped, torch.full_like(height, 0.2), height)
    action = torch.zeros(env.num_envs, 4, device=env.device)
    action[:, :2] = torch.where(closing[:, None], 0.0, (0.5 * delta[:, :2] / MAX_STEP).clamp(-1, 1))
    action[:, 2] = torch.where(closing & ~grasped, 0.0, (0.6 * (height - grip[:, 2]) / MAX_STEP).clamp(-1, 1))
    action[:, 3] = torch.where(closing, -1.0, 1.0)
    return action, grasped


def expert_action(env: LiftEnv) -> torch.Tensor:
    """Closed-loop expert on privileged state for the lift task: (N, 4) actions, without memory between calls."""
    goal = cube_positions(env)[torch.arange(env.num_envs, device=env.device), env.target]
    return pick(env, goal)[0]


def suite_expert(env: SuiteEnv) -> torch.Tensor:
    """Closed-loop expert for the suite: (N, 4) actions, without memory between calls.

    A cube is pushed from between the open fingers; what is to be put somewhere is carried above its place, lowered, let go.
    """
    kind, named, side = asked_for(env)
    joints, cube, goal = joint_positions(env), named_first(env, named)[:, 0], place(env)
    action, grasped = pick(env, cube)
    delta, push = cube - joints[:, :3], kind == KINDS.index("push")

    between = (delta[:, 0].abs() < 0.012) & (delta[:, 1].abs() < FINGER_OPEN) & (delta[:, 2].abs() < 0.012)
    along = torch.stack([0.5 * delta[:, 0] / MAX_STEP, side, 0.6 * delta[:, 2] / MAX_STEP, torch.ones_like(side)], 1)
    action[:, 3] = torch.where(push, 1.0, action[:, 3])
    action = torch.where((push & between)[:, None], along.clamp(-1, 1), action)

    offset, puts = goal - cube, kind >= KINDS.index("stack")
    lateral, open_ = offset[:, :2].norm(dim=1), joints[:, 3:].sum(1) > CUBE + 0.02
    there = (lateral < 0.012) & (offset[:, 2].abs() < 0.006)
    up = offset[:, 2] + (3 * (lateral - 0.01)).clamp(0.0, 0.06)
    clear = (offset[:, 2] < -0.03) | (lateral < 0.02)  # of the other cube: first up, then aside
    aside = (0.3 * offset[:, :2] * clear[:, None] / MAX_STEP).clamp(-0.5, 0.5)  # faster, and it slips out of the fingers
    carry = torch.cat([aside, (0.6 * up[:, None] / MAX_STEP).clamp(-1, 1), torch.full_like(aside[:, :1], -1.0)], 1)
    leave = torch.stack([0 * up, 0 * up, open_.float(), torch.ones_like(up)], 1)
    action = torch.where((puts & grasped & ~there)[:, None], carry, action)
    return torch.where((puts & there)[:, None], leave, action)
