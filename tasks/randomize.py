"""What may differ between episodes beyond their starts: to train against, and to be tested on, one axis at a time.

`--randomize camera:0.5 latency:1` draws for every episode how much of each axis' range it gets, from none up to the strength
that is given; `camera:0.5-1` draws from there on, `camera:1-1` is always all of it. `all:0.5`, or just `0.5`, are all axes
that a task has. The directions are drawn, too. Members of a group of episodes share their draw, noise included, and a draw
depends on the episode's seed alone.

Masses and gains go through Isaac Lab's own event terms, whose distribution shrinks to the value drawn here; those terms draw
for each environment, and groups would not be alike. Friction, gravity and cameras are written where Newton keeps them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torch import Tensor


@dataclass(frozen=True)
class Ranges:
    """What strength 1 of each axis is; a row of TASKS may have its own."""

    camera: tuple[float, float] = (0.04, 0.08)  # by how much each camera is moved [m] and turned [rad]
    light: tuple[float, float] = (1.8, 1.3)  # factors of brightness, and of each colour against the others
    start: float = 0.06  # by how much each joint of the robot but its fingers is off at the start [m or rad]
    noise: float = 0.02  # std of what the proprioception is off by, at every look, in its own units
    frames: float = 0.6  # chance that a look shows the images of the look before
    latency: int = 4  # control steps by which actions come too late
    inference: int = 4  # control steps that a policy call takes: as many actions of its chunk are overtaken when it is there
    dynamics: tuple[float, ...] = (2.0, 2.0, 1.5, 1.15)  # factors of masses of objects, friction, the robot's gains, gravity
    # one more object: where it lies in an environment's frame [m], and its distance from there at strength 0 and 1 [m]
    distractor: tuple[tuple[float, float, float], float, float] | None = None


AXES = tuple(Ranges.__dataclass_fields__)


def parse_axes(values: tuple[str, ...], task: Any) -> dict[str, tuple[float, float]]:
    """Lowest and highest strength of each axis that `--randomize` names, in the order of `AXES`.

    Refuses what is none, and what the row of TASKS `task` has nothing for.
    """
    blind = () if task.cameras else ("camera", "light", "frames")
    able = [axis for axis in AXES if axis not in blind and (axis != "distractor" or task.ranges.distractor)]
    found = {}
    for value in values:
        name, _, strength = value.rpartition(":")
        low, _, high = strength.rpartition("-")
        try:
            bounds = float(low or (high if "-" in strength else 0)), float(high)
        except ValueError:
            raise SystemExit(f"--randomize {value}: must be axis:strength, as {AXES[0]}:0.5, or axis:low-high") from None
        if not 0 <= bounds[0] <= bounds[1] <= 1:
            raise SystemExit(f"--randomize {value}: strengths are from 0 to 1, the lower one first")
        if name not in (*able, "all", ""):
            raise SystemExit(f"--randomize {value}: no such axis here; there are {', '.join(able)}, and all")
        found |= dict.fromkeys(able if name in ("all", "") else (name,), bounds)
    return {axis: found[axis] for axis in AXES if axis in found and found[axis][1] > 0}


def add_distractor(cfg: Any, size: float = 0.045) -> None:
    """A green cube [m] in the configuration of a task, which `Randomization` lays somewhere."""
    import isaaclab.sim as sim_utils
    from isaaclab.assets import RigidObjectCfg

    cfg.scene.distractor = RigidObjectCfg(
        prim_path="{ENV_REGEX_NS}/distractor",
        spawn=sim_utils.CuboidCfg(
            size=(size,) * 3,
            rigid_props=sim_utils.RigidBodyPropertiesCfg(),
            mass_props=sim_utils.MassPropertiesCfg(mass=0.2),
            collision_props=sim_utils.CollisionPropertiesCfg(),
            visual_material=sim_utils.PreviewSurfaceCfg(diffuse_color=(0.1, 0.6, 0.15)),
        ),
    )


class Randomization:
    """Makes the episodes of a started environment differ. Without axes it does nothing.

    Args:
        env: Isaac Lab's, on Newton where dynamics are among the axes.
        task: its row of TASKS.
        axes: of `parse_axes`.
    """

    def __init__(self, env: Any, task: Any, axes: dict[str, tuple[float, float]]):
        import torch

        self.env, self.axes, self.ranges = env, axes, task.ranges
        self.generator = torch.Generator(env.device)  # of the noise within an episode
        rest = [1.0 if key == "gripper_open" else 0.0 for key, size in task.action.items() for _ in range(size)]
        self.rest = torch.tensor(rest, device=env.device)  # (d,) before the first action arrives: stand still, hand open
        hand = [key in ("gripper", "gripper_open") for key, size in task.action.items() for _ in range(size)]
        self.hand = torch.tensor(hand, device=env.device)  # (d,)
        self.cameras = [env.scene.sensors[name]._view for name in task.cameras.values()]
        self.poses = None  # of the cameras, as the task has them
        if "dynamics" in axes:
            self.prepare_dynamics()

    def draw(self, seed: int, group_size: int = 1) -> None:
        """Draws what the next episodes are like; call it after a reset, before the starts are shared in groups."""
        import torch

        groups = self.env.num_envs // group_size
        self.generator.manual_seed(seed)
        self.group_size, self.images = group_size, None
        for axis, (low, high) in self.axes.items():
            host = torch.Generator().manual_seed(seed * len(AXES) + AXES.index(axis))  # the same on every device
            strength = low + (high - low) * torch.rand(groups, 1, generator=host)  # (G, 1)
            way = 2 * torch.rand(groups, 32, generator=host) - 1  # (G, 32) directions
            strength, way = (x.repeat_interleave(group_size, 0).to(self.env.device) for x in (strength, way))
            getattr(self, f"draw_{axis}")(strength, way)

    # what `draw` sets: strength (N, 1) from 0 to 1, way (N, 32) uniform from -1 to 1
    def draw_camera(self, strength: Tensor, way: Tensor) -> None:
        """Moves and turns each camera about where the task, or the body it rides on, has it."""
        import torch
        import warp as wp
        from isaaclab.utils.math import quat_from_angle_axis, quat_mul

        if self.poses is None:
            self.poses = [tuple(x.torch.clone() for x in view.get_local_poses()) for view in self.cameras]
        shift, turn = self.ranges.camera
        for i, (view, (position, quat)) in enumerate(zip(self.cameras, self.poses)):
            move, axis = (torch.nn.functional.normalize(way[:, 6 * i + j : 6 * i + j + 3], dim=1) for j in (0, 3))
            position = (position + strength * shift * move).contiguous()
            quat = quat_mul(quat, quat_from_angle_axis((strength * turn)[:, 0], axis)).contiguous()
            with view.xform_local_space_writer() as writer:
                writer.set_poses(wp.from_torch(position, dtype=wp.vec3f), wp.from_torch(quat, dtype=wp.vec4f), None)

    def draw_light(self, strength: Tensor, way: Tensor) -> None:
        """Newton's renderer has one light for all environments, and no strength of it: the image is what changes."""
        bright, colour = (math.log(x) for x in self.ranges.light)
        gain = (strength * (bright * way[:, :1].sign() + colour * way[:, 1:4])).exp()  # (N, 3)
        self.gain = gain[:, None, None, None]

    def draw_start(self, strength: Tensor, way: Tensor) -> None:
        """Joints at the start are off by as much, each in a direction of its own, within their limits."""
        robot = self.env.scene["robot"]
        joints, _ = robot.find_joints("^(?!.*(finger|gripper)).*$")
        limits = robot.data.soft_joint_pos_limits.torch[:, joints]  # (N, joints, 2)
        position = robot.data.joint_pos.torch.clone()
        moved = position[:, joints] + self.ranges.start * strength * way[:, : len(joints)].sign()
        position[:, joints] = moved.clamp(limits[..., 0], limits[..., 1])
        robot.write_joint_state_to_sim_index(position=position, velocity=0 * position)
        self.env.scene.write_data_to_sim()
        self.env.sim.forward()

    def draw_distractor(self, strength: Tensor, way: Tensor) -> None:
        import torch

        (x, y, z), far, near = self.ranges.distractor
        distance, angle = far + (near - far) * strength[:, 0], math.pi * way[:, 0]
        pose = torch.zeros(len(way), 7, device=way.device)  # x, y, z, quaternion (x, y, z, w)
        pose[:, 0], pose[:, 1], pose[:, 2] = x + distance * angle.cos(), y + distance * angle.sin(), z
        pose[:, 5], pose[:, 6] = (math.pi * way[:, 1]).sin(), (math.pi * way[:, 1]).cos()
        pose[:, :3] += self.env.scene.env_origins
        thing = self.env.scene["distractor"]
        thing.write_root_pose_to_sim_index(root_pose=pose)
        thing.write_root_velocity_to_sim_index(root_velocity=0 * pose[:, :6])
        self.env.scene.write_data_to_sim()
        self.env.sim.forward()

    def draw_noise(self, strength: Tensor, way: Tensor) -> None:
        self.noise = self.ranges.noise * strength

    def draw_frames(self, strength: Tensor, way: Tensor) -> None:
        self.lost = self.ranges.frames * strength

    def draw_latency(self, strength: Tensor, way: Tensor) -> None:
        """Nothing arrives for the first steps of an episode."""
        self.lag = (self.ranges.latency * strength[:, 0]).round().long()  # (N,)
        self.pending = self.rest.expand(self.env.num_envs, self.ranges.latency, -1)

    def draw_inference(self, strength: Tensor, way: Tensor) -> None:
        """Real-time chunking's problem (Black et al. 2025, arXiv 2506.07339), for a robot that does nothing of its own."""
        self.busy = (self.ranges.inference * strength).round().long()  # (N, 1)
        self.held = self.rest.expand(self.env.num_envs, -1)  # (N, d)

    def draw_dynamics(self, strength: Tensor, way: Tensor) -> None:
        import torch

        logs = torch.tensor([math.log(x) for x in self.ranges.dynamics], device=self.env.device)
        mass, friction, gains, gravity = (strength * logs * way[:, :4].sign()).exp().split(1, 1)  # (N, 1) each
        for term, name in self.masses:
            term(self.env, None, **self.settings(name), mass_distribution_params=(mass, mass))
        both = {"stiffness_distribution_params": (gains, gains), "damping_distribution_params": (gains, gains)}
        self.gains(self.env, None, **self.settings("robot"), **both)
        self.write_shared(friction, gravity)

    def prepare_dynamics(self) -> None:
        """The terms, and what friction and gravity are in the task."""
        import warp as wp
        from isaaclab.envs import mdp
        from isaaclab.managers import EventTermCfg

        if not self.env.sim.physics_manager.__name__.startswith("Newton"):
            raise SystemExit("--randomize dynamics: is written to Newton's model; name other axes, or --physics newton_mjwarp")

        def term(function: Any, name: str, *values: str) -> Any:
            params = self.settings(name) | dict.fromkeys(values, (1.0, 1.0))
            params |= {"distribution": "uniform"} | ({"min_mass": 1e-6} if "mass" in values[0] else {})
            return function(EventTermCfg(func=function, mode="reset", params=params), self.env)

        one = "mass_distribution_params"
        self.masses = [(term(mdp.randomize_rigid_body_mass, name, one), name) for name in self.env.scene.rigid_objects]
        both = "stiffness_distribution_params", "damping_distribution_params"
        self.gains = term(mdp.randomize_actuator_gains, "robot", *both)
        model = self.env.sim.physics_manager.get_model()
        self.friction, self.gravity = (wp.to_torch(x).clone() for x in (model.shape_material_mu, model.gravity))
        self.world = wp.to_torch(model.shape_world).long()  # (shapes,), -1 for what all environments share

    def settings(self, name: str) -> dict[str, Any]:
        """Of a term about all of an asset."""
        from isaaclab.managers import SceneEntityCfg

        entity = SceneEntityCfg(name)
        entity.resolve(self.env.scene)
        return {"asset_cfg": entity, "operation": "scale"}

    def write_shared(self, friction: Tensor, gravity: Tensor) -> None:
        """Factors (N, 1) of what no asset owns."""
        import warp as wp
        from newton import ModelFlags

        manager = self.env.sim.physics_manager
        model, n = manager.get_model(), self.env.num_envs
        own = self.world >= 0
        wp.to_torch(model.shape_material_mu)[own] = self.friction[own] * friction[self.world[own], 0]
        wp.to_torch(model.gravity)[:n] = self.gravity[:n] * gravity
        for flag in (ModelFlags.SHAPE_PROPERTIES, ModelFlags.MODEL_PROPERTIES):
            manager.add_model_change(flag)

    # what an episode goes through
    def overtake(self, actions: Tensor) -> Tensor:
        """What is sent of a chunk (N, chunk, d) that comes late: until then the robot stands still, its hand as it was.

        One step of a chunk at the least is in time, and single actions are: who sends these has asked for the chunk.
        """
        import torch

        chunk = actions.shape[1]
        if "inference" not in self.axes or chunk == 1:
            return actions
        late = torch.arange(chunk, device=actions.device) < self.busy.clamp(max=chunk - 1)  # (N, chunk)
        held, self.held = self.held, actions[:, -1].where(self.hand, self.rest)
        return actions.where(~late[..., None], held[:, None])

    def delay(self, actions: Tensor) -> Tensor:
        """The (N, chunk, d) actions that arrive while these are sent."""
        import torch

        actions = self.overtake(actions)
        if "latency" not in self.axes:
            return actions
        sent = torch.cat([self.pending, actions], 1)
        most, chunk = self.pending.shape[1], actions.shape[1]
        self.pending = sent[:, chunk:]
        index = most - self.lag[:, None] + torch.arange(chunk, device=actions.device)  # (N, chunk)
        return sent.gather(1, index[..., None].expand(-1, -1, actions.shape[2]))

    def spoil(self, obs: TensorDict) -> TensorDict:
        """What the policy gets to see of `images` (N, V, H, W, 3) uint8 and `state` (N, d)."""
        import torch

        groups = len(obs) // self.group_size

        def shared(draw: Any, *shape: int) -> Tensor:
            return draw(groups, *shape, generator=self.generator, device=self.env.device).repeat_interleave(self.group_size, 0)

        if "light" in self.axes:
            obs["images"] = (obs["images"] * self.gain).clamp(0, 255).to(torch.uint8)
        if "frames" in self.axes:
            lost = shared(torch.rand, 1) < self.lost  # (N, 1)
            images = obs["images"] if self.images is None else obs["images"].where(~lost[..., None, None, None], self.images)
            self.images = obs["images"] = images.clone()
        if "noise" in self.axes:
            obs["state"] = obs["state"] + self.noise * shared(torch.randn, obs["state"].shape[1])
        return obs
