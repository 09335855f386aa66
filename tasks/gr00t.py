"""How Isaac Lab tasks meet GR00T: one row per task, and what of a task's configuration has to change for it.

    python -m tasks.gr00t        # the rows

A task of your own needs one row of TASKS: which cameras the policy looks through, which observation terms are its
proprioception, which columns the action has, what counts as success and as failure, and what it is told to do. A script
may add it itself: `TASKS["Mine"] = Task(...)`. The tasks of Isaac Lab's managers will do, and direct tasks, whose rows name
functions where those of managers name terms (`adapt_direct`).

Isaac Lab's own tasks run on Newton without Isaac Sim. What needs Isaac Sim (random textures and lights) is switched off
there, as is what differs between environments for a whole run (random masses, frictions): members of a group of
episodes would not be alike.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks import current_name
from tasks.randomize import Ranges, add_distractor

if TYPE_CHECKING:
    from tensordict import TensorDict
    from torch import Tensor

log = logging.getLogger(__name__)
Asked = str | tuple[str, ...] | None  # what --instruction gives


@dataclass(frozen=True)
class Task:
    """How an Isaac Lab task meets GR00T."""

    cameras: dict[str, str]  # a checkpoint's video keys, and the cameras of the scene that are meant
    state: dict[str, int]  # keys and sizes of the proprioception's columns, in order; matched to a checkpoint by name
    action: dict[str, int]  # keys and sizes of the action's columns, in order
    horizon: int  # environment steps per episode
    success: str | Callable  # name of the success termination, or a function of the env: (N,) bool
    instructions: tuple[str, ...]
    failures: tuple[str, ...] = ()  # names of terminations that end an attempt; a direct task's own end always does
    isaac: str = ""  # Isaac Lab's id, where it is not the row's name
    isaacsim: bool = False  # needs Isaac Sim: PhysX alone steps it
    module: str | None = None  # imported to register the task; None: Isaac Lab's own
    terms: tuple[str | Callable, ...] = ()  # observation terms, or functions of the env, whose columns are the state
    privileged: int = 0  # columns of the observation group `critic`, which holds the simulator's state; 0: no such group
    privileged_terms: tuple[str | Callable, ...] = ()  # what that group is made of, where the task has none
    views: dict[str, tuple] = field(default_factory=dict)  # cameras to add: (eye, look-at) [m] in an environment's frame, or
    # (eye, look-at, body) in that of the robot's body, with which they move
    image_size: int | None = None  # of the cameras [px], where the checkpoint was trained on another than its own
    overrides: tuple[str, ...] = ()  # Isaac Lab's
    prepare: Callable[[Any], None] | None = None  # changes the configuration further
    wordings: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of an instruction, ever further from its own words
    target: str | None = None  # attribute of the env with the index of each episode's instruction; None: the first
    untrained: tuple[str, ...] = ()  # instructions that only imitation and evaluations ask for, not RL
    unseen: tuple[str, ...] = ()  # that only evaluations ask for
    draws: str | None = None  # event term whose parameters `asked` and `weights`, indices of instructions and how often they
    # are to come (None: equally), are what starts draw from
    expert: Callable[[Any], Tensor] | None = None  # actions (N, d) for the env as it is, which demonstrate the task
    demo_steps: int | None = None  # within which it is mostly done; None: the horizon
    action_limit: float | None = None  # beyond which the task clips all actions; demonstrations have none
    demo_params: dict[str, dict] = field(default_factory=dict)  # of event terms, while it demonstrates
    demo_noise: dict[str, float] = field(default_factory=dict)  # by key of the action: std of what demonstrations are off by
    ranges: Ranges = Ranges()  # of --randomize
    embodiment_tag: str | None = None  # of the public checkpoint that the row is for
    data_config: str | None = None  # how that one reads its metadata.json (gr00t_n1d5/embodiment.py)
    bracketed: bool = False  # instructions as "['sentence']", which NVIDIA's unbatched inference does
    pad_prompt: int | None = None  # tokens that prompts are padded to, where the checkpoint was trained so

    def texts(self, instruction: Asked) -> tuple[str, ...]:
        """The instructions of a run: what is asked for, or the task's own."""
        return (instruction,) if instruction and isinstance(instruction, str) else tuple(instruction or self.instructions)

    def meant(self, instruction: Asked) -> tuple[int | None, ...]:
        """Of each of `texts`, which of the task's own instructions it is, or a wording of; None: neither."""
        own = {other: text for text, others in self.wordings.items() for other in others}
        found = [own.get(text, text) for text in self.texts(instruction)]
        return tuple(self.instructions.index(text) if text in self.instructions else None for text in found)

    @property
    def kept_out(self) -> dict[str, str]:
        """Instructions that RL does not train, and what is said of them where they are evaluated."""
        return dict.fromkeys(self.untrained, "imitation alone") | dict.fromkeys(self.unseen, "never seen")

    @property
    def modalities(self) -> dict[str, Any]:
        """What a checkpoint has to have: video keys, and columns of the keys of state and action."""
        return {"video": tuple(self.cameras), "state": self.state, "action": self.action}

    @property
    def sizes(self) -> dict[str, int]:
        """Columns of state and action."""
        return {"state": sum(self.state.values()), "action": sum(self.action.values())}

    def images(self, env: Any) -> Tensor:
        """(N, V, H, W, 3) uint8 of the cameras; renders if the scene has moved since the last call."""
        import torch

        sensors = env.scene.sensors
        views = [sensors[name].data.output["rgb"].torch[..., :3] for name in self.cameras.values()]
        return torch.stack(views, 1) if views else torch.empty(env.num_envs, 0, 1, 1, 3, dtype=torch.uint8, device=env.device)


# ------------------------------------------------------------------------------------------------------------------
def later(path: str) -> Callable[[Any], Tensor]:
    """The function `module:name`, imported when it is called: the rows themselves need neither torch nor Isaac Lab."""
    module, _, name = path.partition(":")
    return lambda env: getattr(importlib.import_module(module), name)(env)


# ------------------------------------------------------------------------------------------------------------------
# what rows refer to: functions of an Isaac Lab environment or its configuration
# ------------------------------------------------------------------------------------------------------------------
def gripper_frame(env: Any) -> Tensor:
    """Position [m] and rotation vector [rad] of the gripper's frame in the environment's, and two finger positions [m]: (N, 8).

    As RLinf feeds its Isaac Lab checkpoints: angle 2 acos(w), the second finger with a minus, all rounded to bfloat16.
    """
    import torch

    frame, joints = env.scene["ee_frame"].data, env.scene["robot"].data.joint_pos.torch
    position = frame.target_pos_w.torch[:, 0] - env.scene.env_origins
    quat = frame.target_quat_w.torch[:, 0]  # (N, 4) x, y, z, w
    quat = torch.where(quat[:, :1] < 0, -quat, quat)  # the hand points down: x is about 1 and w about 0, of either sign
    w = quat[:, 3:].clamp(-1, 1)
    # RLinf's quat2axisangle_torch, in its order of operations: continuous through pi
    rotation = quat[:, :3] * 2 * torch.acos(w) / (1 - w * w).sqrt().clamp(min=1e-8)
    return torch.cat([position, rotation, joints[:, -2:-1], -joints[:, -1:]], 1).bfloat16().float()


def arms_and_hands(env: Any) -> Tensor:
    """Joint positions [rad] of arms (left, right) and hands (left, right), 7 each, in the order of Unitree's SDK: (N, 28).

    As Isaac Lab feeds its Assemble-Trocar checkpoint through RLinf, rounded to bfloat16.
    """
    import torch
    from isaaclab_tasks.contrib.assemble_trocar import mdp

    body = mdp.get_robot_body_joint_states(env)  # (N, 3 * 29) positions, velocities, efforts; the arms are the last 14
    return torch.cat([body[:, 15:29], mdp.get_robot_dex3_joint_states(env)], 1).bfloat16().float()


def trocar_assembled(env: Any) -> Tensor:
    """(N,) whether both parts were lifted, aligned, put into one another and laid down, in this order.

    Isaac Lab 3.0 counts these stages in a reward term of weight 0, which its reward manager never calls.
    """
    from isaaclab_tasks.contrib.assemble_trocar import mdp
    from isaaclab_tasks.contrib.assemble_trocar.g129_dex3_env_cfg import RewardsCfg

    mdp.update_task_stage(env, **RewardsCfg().update_stage.params)
    return mdp.task_success_termination(env)


def still_legs(cfg: Any) -> None:
    """Actions move arms and hands alone: legs and waist keep their default, the 0 that RLinf puts before a policy's actions."""
    cfg.actions.joint_pos.joint_names = cfg.actions.joint_pos.joint_names[15:]


def drawer_open(env: Any) -> Tensor:
    """(N,) whether the top drawer stands open by 0.3 m, where Isaac Lab's reward has its last bonus."""
    cabinet = env.scene["cabinet"]
    return cabinet.data.joint_pos.torch[:, cabinet.find_joints("drawer_top_joint")[0][0]] > 0.30


def object_raised(env: Any) -> Tensor:
    """(N,) whether the object is 0.1 m above where it lies on the table."""
    return object_position(env)[:, 2] > OBJECT_ON_TABLE + 0.1


def object_position(env: Any) -> Tensor:
    """(N, 3) of the object in the environment's frame [m]."""
    return env.scene["object"].data.root_pos_w.torch - env.scene.env_origins


def walked(env: Any) -> Tensor:
    """(N,) whether the robot's root has come 3 m forward."""
    return (env.scene["robot"].data.root_pos_w.torch - env.scene.env_origins)[:, 0] > 3.0


def body_and_joints(env: Any) -> Tensor:
    """(N, 54) of a humanoid's 87 own columns: without the feet's wrenches and the last action."""
    return env.own_obs["policy"][:, :54]


def own_policy(env: Any) -> Tensor:
    """All columns of a direct task's own observation."""
    return env.own_obs["policy"]


HAND = f"Geometry/{'/'.join(f'panda_link{i}' for i in range(8))}/panda_hand"  # of a Franka, below its root
OBJECT_ON_TABLE = 0.28  # height of the lift task's cube at rest [m]: the table's top is at 0.255, the cube's edge 0.05


def plain_wrist_camera(cfg: Any) -> None:
    """The hand's path in full: Newton does not find a camera by the pattern that the task has for it."""
    camera = cfg.scene.wrist_cam
    camera.prim_path = camera.prim_path.replace("(Geometry/.*/)?panda_hand", HAND)


def lift_cube(cfg: Any) -> None:
    """Full gravity, and a cube somewhere on the table: no curriculum, bank of states or goal of Isaac Lab's recipe."""
    import isaaclab.envs.mdp as mdp
    import isaaclab.sim as sim_utils
    from isaaclab.managers import EventTermCfg, SceneEntityCfg

    cfg.curriculum, cfg.commands, cfg.rewards = None, None, {}
    cfg.scene.panda_leftfinger_object_s = cfg.scene.panda_rightfinger_object_s = None  # contacts, which its rewards read
    contacts = getattr(cfg.sim.physics, "collision_cfg", None)  # Newton's: the stock buffer is for 4096 environments
    if contacts is not None:
        contacts.rigid_contact_max = 1000 * cfg.scene.num_envs
    cfg.scene.object.spawn.visual_material = sim_utils.PreviewSurfaceCfg(diffuse_color=(0.8, 0.1, 0.1))
    spread = {"x": (-0.1, 0.1), "y": (-0.2, 0.2), "z": (OBJECT_ON_TABLE - 0.35, OBJECT_ON_TABLE - 0.35), "yaw": (-0.8, 0.8)}
    cfg.events = {
        "everything": EventTermCfg(func=mdp.reset_scene_to_default, mode="reset"),
        "joints": EventTermCfg(
            func=mdp.reset_joints_by_offset,
            mode="reset",
            params={"position_range": (-0.05, 0.05), "velocity_range": (0.0, 0.0)},
        ),
        "object": EventTermCfg(
            func=mdp.reset_root_state_uniform,
            mode="reset",
            params={"pose_range": spread, "velocity_range": {}, "asset_cfg": SceneEntityCfg("object")},
        ),
    }


# ------------------------------------------------------------------------------------------------------------------
STACK = Task(
    isaac="IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor",
    cameras={"table_cam": "table_cam", "wrist_cam": "wrist_cam"},
    state={"eef_position": 3, "eef_quaternion": 4, "finger_positions": 2},
    terms=("eef_pos", "eef_quat", "gripper_pos"),  # the quaternion is x, y, z, w; Isaac Lab 2.x began with w
    action={"eef_position_delta": 3, "eef_rotation_delta": 3, "gripper_open": 1},  # inverse kinematics, scaled by 0.5
    horizon=256,
    success="success",
    failures=("cube_1_dropping", "cube_2_dropping", "cube_3_dropping"),
    instructions=("Stack the red block on the blue block, then stack the green block on the red block.",),
    privileged=39,
    privileged_terms=("object",),
    prepare=plain_wrist_camera,
    expert=later("tasks.experts:stack_cubes"),
    demo_steps=160,
    demo_noise={"eef_position_delta": 0.05, "eef_rotation_delta": 0.05},
)
LIFT = Task(
    module="tasks.tabletop",
    cameras={"cam": "cam"},
    state={"gripper_position": 3, "finger_positions": 2},
    action={"gripper_delta": 3, "gripper_open": 1},
    horizon=32,
    success="success",
    instructions=("lift the red cube", "lift the blue cube"),
    target="target",
    draws="reset",
    privileged=24,
    ranges=Ranges(camera=(0.02, 0.04), distractor=((0.0, 0.0, 0.0225), 0.22, 0.16)),  # the camera's view is 27 degrees wide
    wordings={f"lift the {x} cube": (f"lift {x} cube", f"the {x} cube", x) for x in ("red", "blue")},  # in words that it knows
    expert=later("tasks.tabletop:expert_action"),
    demo_steps=16,
    demo_params={"reset": {"gantry_share": 0.5}},
)
TASKS = {
    "Tabletop-Lift-Cube-v0": LIFT,
    "Tabletop-Suite-v0": dataclasses.replace(
        LIFT,
        horizon=48,
        instructions=(
            "lift the red cube",
            "lift the blue cube",
            "push the red cube to the left",
            "push the red cube to the right",
            "push the blue cube to the left",
            "push the blue cube to the right",
            "stack the red cube on the blue cube",
            "stack the blue cube on the red cube",
            "put the red cube in the middle",
            "put the blue cube in the middle",
        ),
        untrained=("put the blue cube in the middle",),
        unseen=("push the blue cube to the right",),
        privileged=31,
        expert=later("tasks.tabletop:suite_expert"),
        demo_steps=None,
        # stacks are learned last: of 30 demonstrations each has 8, a middle 3, a push 2, a lift 1
        demo_params={"reset": {"gantry_share": 0.5, "asked": (0, 1, *2 * (2, 3, 4, 5), *8 * (6, 7), *3 * (8, 9))}},
    ),
    "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor": STACK,
    # the setting of RLinf's public checkpoint, 0.654 success before and 0.897 after its PPO
    "RLinf-Stack-Cube": dataclasses.replace(
        STACK,
        cameras={"image": "table_cam", "wrist_image": "wrist_cam"},
        image_size=256,
        horizon=448,
        pad_prompt=570,
        embodiment_tag="isaaclab_franka",
        data_config="libero",
        state={"x": 1, "y": 1, "z": 1, "roll": 1, "pitch": 1, "yaw": 1, "gripper": 2},
        terms=(gripper_frame,),
        action={"x": 1, "y": 1, "z": 1, "roll": 1, "pitch": 1, "yaw": 1, "gripper": 1},
        demo_noise=dict.fromkeys(("x", "y", "z", "roll", "pitch", "yaw"), 0.05),
    ),
    # the setting of Isaac Lab's own example of RL for GR00T, with the checkpoint nvidia/Assemble_Trocar; needs Isaac Sim
    "IsaacContrib-Assemble-Trocar-G129-Dex3": Task(
        cameras={
            "room_view": "front_camera",
            "left_wrist_view": "left_wrist_camera",
            "right_wrist_view": "right_wrist_camera",
        },
        state={"left_arm": 7, "right_arm": 7, "left_hand": 7, "right_hand": 7},
        terms=(arms_and_hands,),
        action={"left_arm": 7, "right_arm": 7, "left_hand": 7, "right_hand": 7},  # joint targets
        horizon=256,
        success=trocar_assembled,
        failures=("object_drop",),
        instructions=("assemble trocar from tray",),
        prepare=still_legs,
        isaacsim=True,
        pad_prompt=850,
        embodiment_tag="new_embodiment",
        data_config="isaaclab_g1_dex3",
    ),
    "Isaac-Open-Drawer-Franka": Task(
        cameras={"front_cam": "front_cam"},
        views={"front_cam": ((-0.6, 1.0, 1.1), (0.5, 0.0, 0.5))},
        state={"joint_position": 9},
        terms=("joint_pos",),
        action={"joint_target": 7, "gripper_open": 1},
        horizon=384,
        success=drawer_open,
        instructions=("Open the top drawer.",),
        privileged=23,
        privileged_terms=("joint_pos", "joint_vel", "cabinet_joint_pos", "cabinet_joint_vel", "rel_ee_drawer_distance"),
        expert=later("tasks.experts:open_drawer"),
        demo_steps=350,
        demo_noise={"joint_target": 0.3},
    ),
    "Isaac-Lift-Franka": Task(
        cameras={"front_cam": "front_cam", "wrist_cam": "wrist_cam"},
        views={
            "front_cam": ((-1.2, 0.12, 0.8), (-0.52, 0.12, 0.28)),
            "wrist_cam": ((0.07, 0.0, 0.0), (0.03, 0.0, 0.2), HAND),
        },
        state={"joint_position": 9},
        terms=("joint_pos",),
        action={"joint_delta": 9},
        horizon=96,
        success=object_raised,
        instructions=("Lift the cube.",),
        privileged=21,
        privileged_terms=("joint_pos", "joint_vel", object_position),
        overrides=("env.scene.object.spawn=cube",),
        prepare=lift_cube,
        expert=later("tasks.experts:lift_object"),
        demo_steps=60,
        demo_noise={"joint_delta": 0.3},
    ),
    # no camera: it tries the whole path of a large body without rendering. GR00T has not seen such states or actions
    "Isaac-Humanoid": Task(
        cameras={},
        state={"base": 12, "joint_position": 21, "joint_velocity": 21},
        terms=(
            "base_height", "base_lin_vel", "base_ang_vel", "base_yaw_roll", "base_angle_to_target", "base_up_proj",
            "base_heading_proj", "joint_pos_norm", "joint_vel_rel",
        ),
        action={"joint_effort": 21},
        horizon=240,
        success=walked,
        failures=("torso_height",),
        instructions=("Walk forward.",),
    ),
    # the same body as a direct task, with a camera on its back that follows it
    "Isaac-Humanoid-Direct": Task(
        cameras={"follow_cam": "follow_cam"},
        views={"follow_cam": ((-2.4, -1.2, 0.6), (0.3, 0.0, -0.3), "torso")},
        state={"base": 12, "joint_position": 21, "joint_velocity": 21},
        terms=(body_and_joints,),
        action={"joint_effort": 21},
        horizon=240,
        success=walked,
        instructions=("Walk forward.",),
        action_limit=1.0,
        demo_noise={"joint_effort": 0.4},
        privileged=87,
        privileged_terms=(own_policy,),
    ),
}  # fmt: skip
# tasks without cameras, and the row that looks at the same scene
SEEN = dict.fromkeys(
    ("IsaacContrib-Stack-Cube-Franka", "IsaacContrib-Stack-Cube-Franka-IK-Rel"),
    "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor",
)
KIT_EVENTS = ("randomize_scene_lighting_domelight", "randomize_visual_texture_material", "randomize_visual_color")


def find_task(name: str, runs: bool = True, say: bool = True) -> str:
    """The row of TASKS that a name means, an older Isaac Lab's among them; says which, if it is called otherwise.

    Refuses a name without a row, and lists the nearest that have one; also what cannot run here.
    """
    row = name if name in TASKS else current_name(name)
    row = SEEN.get(row, row)
    if row not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 3, 0.0)
        raise SystemExit(f"--task {name}: no row for it in TASKS; nearest: {', '.join(near)}")
    if runs and TASKS[row].isaacsim and not importlib.util.find_spec("isaacsim"):
        raise SystemExit(f"--task {name}: runs on PhysX, which comes with Isaac Sim; install that, or choose another task")
    if row != name and say and os.environ.get("RANK", "0") == "0":
        print(f"--task {name}: {row}")
    return row


def find_tasks(names: str | tuple[str, ...], ranks: int) -> str | tuple[str, ...]:
    """`find_task` of one name, or of each of several, which so many ranks take in turn."""
    if isinstance(names, str):
        return find_task(names)
    if not names:
        raise SystemExit("--task: name one, or several for the ranks of torchrun")
    if ranks % len(names):
        way = f"start torchrun --nproc-per-node {len(names)} or a multiple, not {ranks}"
        raise SystemExit(f"--task {' '.join(names)}: ranks take tasks in turn; {way}")
    return tuple(find_task(name) for name in names)


def task_names(tasks: str | tuple[str, ...]) -> tuple[str, ...]:
    """The tasks of a run, each once."""
    return (tasks,) if isinstance(tasks, str) else tuple(dict.fromkeys(tasks))


def rank_task(tasks: str | tuple[str, ...]) -> str:
    """This process's task, by the rank that torchrun gave it."""
    return tasks if isinstance(tasks, str) else tasks[int(os.environ.get("RANK", 0)) % len(tasks)]


class Instructions(NamedTuple):
    """All that a run's tasks ask for, numbered alike on every rank."""

    names: tuple[str, ...]  # with several tasks, each names its own
    notes: dict[str, str]  # on those that RL does not train: `Task.kept_out`
    first: int  # number of the first one of this rank's task

    def number(self, prompt: Tensor) -> tuple[Tensor, int]:
        """Numbers of a rank's prompts (indices into `Task.texts`), and how many there are."""
        return prompt + self.first, len(self.names)


def check_instructions(tasks: str | tuple[str, ...], instruction: Asked) -> None:
    """Refuses, in one line, several instructions that a task does not draw from by itself."""
    for task in task_names(tasks) if instruction and not isinstance(instruction, str) else ():
        row, meant = TASKS[task], TASKS[task].meant(instruction)
        if None in meant or not row.draws:
            wrong, known = instruction[meant.index(None) if None in meant else 0], "; ".join(row.instructions)
            raise SystemExit(f"--instruction {wrong!r}: is not one that {task} draws; name one alone, or several of: {known}")
        if len(set(meant)) < len(meant):
            twice = next(text for i, text in enumerate(instruction) if meant[i] in meant[:i])
            raise SystemExit(f"--instruction {twice!r}: {task} is asked for that already; take it away")


def all_instructions(tasks: str | tuple[str, ...], instruction: Asked) -> Instructions:
    """Those of a run; `instruction` as in `Task.texts`."""
    names, notes, first = [], {}, 0
    for task in task_names(tasks):
        first = len(names) if task == rank_task(tasks) else first
        for text in TASKS[task].texts(instruction):
            names.append(text if isinstance(tasks, str) else f"{text} ({task})")
            notes |= {names[-1]: TASKS[task].kept_out[text]} if text in TASKS[task].kept_out else {}
    return Instructions(tuple(names), notes if len(notes) < len(names) else {}, first)  # where all are, all count


def task_config(
    name: str, device: str, num_envs: int, image_size: int, physics: str | None, renderer: str | None, dense: bool = False,
    own_groups: tuple[str, ...] = (), axes: Iterable[str] = (),
) -> Any:  # fmt: skip
    """Isaac Lab's configuration of a row of TASKS, ready for a policy that looks when it wants to.

    Images leave the observation manager: they are rendered when the policy reads a camera. The observation groups
    `policy` and `critic` become what the row says. Refuses, in one line, what the task does not have.

    Args:
        num_envs: of this process.
        image_size: height and width of the cameras [px], unless the row has its own.
        physics, renderer: Isaac Lab's presets, or mujoco_c; None: the task's own, or Newton's where Isaac Sim is not installed.
        dense: keep the task's own rewards; a script that watches success alone has no use for them.
        own_groups: the task's own observation groups that `own_observation` is to find.
        axes: of `--randomize`.
    """
    import isaaclab_tasks  # noqa: F401  (registers Isaac Lab's own tasks)
    from isaaclab_tasks.utils.presets import MultiBackendRendererCfg

    from tasks import stock

    task = TASKS[name]
    isaac, newton = task.isaac or name, (physics or "newton").startswith(("newton", "mujoco"))
    renderers = [key for key in vars(MultiBackendRendererCfg()) if key != "default"]
    if renderer and renderer not in renderers:
        raise SystemExit(f"--renderer {renderer}: must be one of {', '.join(renderers)}")
    renders = (f"renderer={renderer}",) if renderer else ()
    if task.module:
        stock.check_physics(physics, device)
        importlib.import_module(task.module)
        presets = (*((f"physics={physics}",) if physics else ()), *renders)
        cfg = stock.parse_config(isaac, device, num_envs, [*presets, *task.overrides])
    else:
        cfg = stock.task_config(isaac, device, num_envs, physics, (*renders, *task.overrides), {})
        cfg.compute_final_obs = False
        newton = newton and (bool(physics) or not importlib.util.find_spec("isaacsim"))
    direct = not hasattr(cfg, "observations")
    if direct and not all(map(callable, (task.success, *task.terms, *task.privileged_terms))):
        raise SystemExit(f"--task {name}: a direct task has no terms to name; success and terms of its row must be functions")
    if task.prepare:
        task.prepare(cfg)
    if "distractor" in axes:
        add_distractor(cfg)
    if not task.module:
        switched_off = switch_off(cfg)
        if switched_off:
            log.info(f"{name}: switched off {', '.join(switched_off)}, see tasks/gr00t.py")
        if not direct:
            choose_observations(cfg, task, name, own_groups)
    if direct:
        pass  # its rewards are a function, whoever reads them
    elif not dense:
        cfg.rewards = {}  # success is watched by the script
    elif isinstance(cfg.rewards, dict) or not getattr(cfg.rewards, "__dict__", None):  # tasks/stock.py puts success in a dict
        raise SystemExit(f"--reward dense: {name} has no rewards; use --reward sparse")
    if newton:  # PhysX and RTX put all environments into one world
        cfg.scene.env_spacing = 0.0  # equal rounding everywhere: members of a group stay bit-identical
    for camera, view in task.views.items():
        add_view(cfg, camera, *view)
    for camera in task.cameras.values():
        if not hasattr(cfg.scene, camera):
            found = [key for key, value in vars(cfg.scene).items() if hasattr(value, "data_types")]
            raise SystemExit(f"--task {name}: no camera {camera} in its scene; it has {', '.join(found) or 'none'}")
        sensor = getattr(cfg.scene, camera)
        sensor.height = sensor.width = task.image_size or image_size
        sensor.data_types, sensor.update_latest_camera_pose = ["rgb"], True  # a camera on the wrist moves
        if newton and not renderer and not task.module:
            sensor.renderer_cfg = MultiBackendRendererCfg().newton_renderer
    return cfg


def switch_off(cfg: Any) -> list[str]:
    """Takes out events that need Isaac Sim where it is not installed, and those that make environments differ for good."""
    kit = importlib.util.find_spec("isaacsim") is not None
    events = cfg.events if isinstance(cfg.events, dict) else vars(cfg.events) if cfg.events else {}
    names = []
    for name, term in list(events.items()):
        function = getattr(term, "func", None)
        visual = getattr(function, "__name__", str(function)) in KIT_EVENTS
        if (visual and not kit) or (not visual and getattr(term, "mode", None) in ("startup", "prestartup")):
            names.append(name)
            if isinstance(cfg.events, dict):
                del cfg.events[name]
            else:
                setattr(cfg.events, name, None)
    return names


def choose_observations(cfg: Any, task: Task, name: str, own_groups: tuple[str, ...]) -> None:
    """Makes the observation groups `policy` and `critic` of the row's terms, one tensor each; keeps some as own_<name>."""
    from isaaclab.managers import ObservationGroupCfg, ObservationTermCfg

    groups = [group for group in vars(cfg.observations).values() if isinstance(group, ObservationGroupCfg)]
    found = {key: term for group in reversed(groups) for key, term in vars(group).items() if hasattr(term, "func")}
    found = {key: term for key, term in found.items() if "image" not in getattr(term.func, "__name__", str(term.func))}
    chosen = {}
    for group in own_groups:
        if not isinstance(kept := getattr(cfg.observations, group, None), ObservationGroupCfg):
            raise SystemExit(f"--expert: observes the group {group}, which {name} does not have")
        chosen[f"own_{group}"], kept.enable_corruption = kept, False
    for group, terms in (("policy", task.terms), ("critic", task.privileged_terms)):
        if not terms:
            continue
        chosen[group] = ObservationGroupCfg(enable_corruption=False, concatenate_terms=True)
        for term in terms:
            if isinstance(term, str) and term not in found:
                raise SystemExit(f"--task {name}: it has no observation term {term}; it has {', '.join(found)}")
            key = term if isinstance(term, str) else term.__name__
            own = found[term].copy() if isinstance(term, str) else ObservationTermCfg(func=term)
            own.noise, own.history_length = None, 0
            setattr(chosen[group], key, own)
    cfg.observations = chosen


def add_view(cfg: Any, name: str, eye: tuple[float, ...], look_at: tuple[float, ...], body: str = "") -> None:
    """A camera in every environment, or on a body of its robot, at `eye` towards `look_at` [m], 50 degrees wide."""
    import isaaclab.sim as sim_utils
    import torch
    from isaaclab.sensors import CameraCfg
    from isaaclab.utils.math import create_rotation_matrix_from_view, quat_from_matrix
    from isaaclab_tasks.utils.presets import MultiBackendRendererCfg

    view = create_rotation_matrix_from_view(torch.tensor([eye]).float(), torch.tensor([look_at]).float(), "Z")
    camera = CameraCfg(
        prim_path="{ENV_REGEX_NS}/" + (f"Robot/{body}/" if body else "") + name, height=64, width=64, data_types=["rgb"],
        renderer_cfg=MultiBackendRendererCfg().default,
        spawn=sim_utils.PinholeCameraCfg(focal_length=22.5, horizontal_aperture=20.955, clipping_range=(0.05, 10.0)),
        offset=CameraCfg.OffsetCfg(pos=eye, rot=quat_from_matrix(view)[0].tolist(), convention="opengl"),
    )  # fmt: skip
    setattr(cfg.scene, name, camera)


# ------------------------------------------------------------------------------------------------------------------
# what a script does with a running environment
# ------------------------------------------------------------------------------------------------------------------
def make_task(name: str, cfg: Any) -> tuple[Any, Any]:
    """Isaac Lab's environment, in which nothing ends but by `reset`, and a manager of the ends that a script watches.

    The ends are `success`, the row's failures and `broken`. Refuses a task with other columns than its row says.
    """
    import gymnasium as gym
    from isaaclab.managers import TerminationManager, TerminationTermCfg

    task, direct = TASKS[name], not hasattr(cfg, "observations")
    own = None if direct else cfg.terminations
    success = getattr(own, task.success) if isinstance(task.success, str) else TerminationTermCfg(func=task.success)
    ends = {"success": success} | {failure: getattr(own, failure) for failure in task.failures}
    if direct:
        ends["over"] = TerminationTermCfg(func=own_end)
    else:
        cfg.terminations = {}
    ends["broken"] = TerminationTermCfg(func=broken)
    env = gym.make(task.isaac or name, cfg=cfg).unwrapped
    if direct:
        adapt_direct(env, task)
    check_columns(env, name)
    return env, TerminationManager(ends, env)


def broken(env: Any) -> Tensor:
    """(N,) whose physics blew up, with observations that are not finite; these become 0, or the weights were lost, too."""
    import torch

    groups = [env.obs_buf[name] for name in ("policy", "critic") if name in env.obs_buf]
    found = ~torch.cat(groups, 1).isfinite().all(1)
    for group in groups:
        group.nan_to_num_(0.0, 0.0, 0.0)
    return found


def own_end(env: Any) -> Tensor:
    """(N,) whether a direct task's own code would have ended the episode, other than by its time."""
    return env.over


def adapt_direct(env: Any, task: Task) -> None:
    """Makes a direct task like one of managers: it resets nothing in its steps, and has the row's observation groups.

    Sets `env.over` (N,), its own verdict, and `env.own_obs`, its own observations, which the row's terms may read.
    """
    import torch

    dones, rewards, observations = env._get_dones, env._get_rewards, env._get_observations
    groups = {"policy": task.terms} | ({"critic": task.privileged_terms} if task.privileged_terms else {})
    none = torch.zeros(env.num_envs, dtype=torch.bool, device=env.device)

    def get_dones() -> tuple[Tensor, Tensor]:
        env.over = dones()[0].clone()
        return none, none

    def get_rewards() -> Tensor:
        env.reset_terminated.copy_(env.over)  # which may cost something
        reward = rewards()
        env.reset_terminated.zero_()
        return reward

    def get_observations() -> dict[str, Tensor]:
        env.own_obs = observations()
        return {group: torch.cat([term(env) for term in terms], 1) for group, terms in groups.items()}

    env._get_dones, env._get_rewards, env._get_observations, env._get_states = get_dones, get_rewards, get_observations, dict
    env.over = none.clone()
    env.reset()


def own_observation(env: Any, groups: tuple[str, ...]) -> Tensor:
    """(N, d) of the task's own observation groups, joined as `VecEnv.read` does for a state policy."""
    from tasks.stock import flatten

    found = {f"own_{name}": x for name, x in env.own_obs.items()} if hasattr(env, "own_obs") else env.obs_buf
    return flatten([found[f"own_{name}"] for name in groups])


class Prompts:
    """Which instruction each environment has: an index into the run's instructions (`Task.texts`)."""

    def __init__(self, env: Any, task: Task, instruction: Asked):
        import torch

        # instructions of the task's own, or wordings of theirs, are what is asked for; any other leaves that to the task
        meant = task.meant(instruction)
        self.asked = meant if task.target and None not in meant else ()
        self.env, self.target, self.several = env, task.target, len(self.asked) > 1
        self.place = torch.zeros(len(task.instructions), dtype=torch.long, device=env.device)  # among those of the run
        self.place[list(self.asked)] = torch.arange(len(self.asked), device=env.device)
        if instruction and self.several:
            env.event_manager.get_term_cfg(task.draws).params["asked"] = self.asked

    def fix(self) -> None:
        """After a reset, which has drawn what is asked for."""
        if len(self.asked) == 1:
            getattr(self.env, self.target).fill_(self.asked[0])

    def index(self) -> Tensor:
        """(N,) int64."""
        import torch

        if self.several:
            return self.place[getattr(self.env, self.target)]
        return torch.zeros(self.env.num_envs, dtype=torch.long, device=self.env.device)


@contextlib.contextmanager
def asking(env: Any, without: tuple[str, ...], weights: Tensor | None = None) -> Iterator[None]:
    """While this lasts, starts of a script's `ChunkEnv` draw from the run's instructions without these, if any is left.

    `weights` (instructions,): how often each of those of all ranks is asked for; all equally by default.
    """
    several = weights is not None and env.prompts.several
    if not (env.task.draws and (without or several)):
        yield
        return
    params = env.env.event_manager.get_term_cfg(env.task.draws).params
    usual = dict(params)
    own = env.prompts.asked if env.prompts.several else usual["asked"]
    own = [i for i in own if env.task.instructions[i] not in without] or own
    params["asked"] = tuple(i for i in usual["asked"] if i in own)
    if several:
        params["weights"] = weights[[env.asked.first + env.prompts.asked.index(i) for i in params["asked"]]]
    try:
        yield
    finally:
        params.clear()
        params.update(usual)


def scene_states(env: Any, task: Task) -> TensorDict:
    """Where everything is and what is asked for, one row per environment (N,): all that an episode's start consists of."""
    import torch
    from tensordict import TensorDict

    from tasks import stock

    def rows(tree: dict[str, Any]) -> dict[str, Any]:
        found = {key: rows(x) if isinstance(x, dict) else x for key, x in tree.items()}
        return {
            key: x for key, x in found.items()
            if (isinstance(x, dict) and x) or (isinstance(x, torch.Tensor) and x.shape[:1] == (env.num_envs,))
        }  # fmt: skip

    # a direct task remembers in attributes of its own
    tree = env.scene.get_state(is_relative=True) if hasattr(env, "reset_to") else stock.snapshot(env)
    target = {"target": getattr(env, task.target)} if task.target else {}
    return TensorDict({"scene": rows(tree)} | target, env.num_envs).to(env.device).clone()


def start_from(env: Any, task: Task, states: TensorDict) -> None:
    """Puts environments into `scene_states` (N,)."""
    from tasks import stock

    def put(tree: dict[str, Any], new: Any) -> dict[str, Any]:
        def changed(key: str, x: Any) -> Any:
            return x if key not in new.keys() else put(x, new[key]) if isinstance(x, dict) else new[key].to(x.device)

        return {key: changed(key, x) for key, x in tree.items()}

    if hasattr(env, "reset_to"):
        robots = env.scene.articulations.values()
        aims = [robot.data.joint_vel_target.torch.clone() for robot in robots]
        # draws new starts, then overwrites them
        env.reset_to(put(env.scene.get_state(is_relative=True), states["scene"]), None, is_relative=True)
        for robot, aim in zip(robots, aims):  # it has made velocities in mid-episode what controllers aim at, for good
            robot.set_joint_velocity_target_index(target=aim)
        env.action_manager.reset()  # some actions begin at the joints as they were drawn
    else:
        stock.restore(env, put(stock.snapshot(env), states["scene"]))
    if task.target:
        getattr(env, task.target)[:] = states["target"]


def refresh_observations(env: Any) -> None:
    """Lets sensors and observations see the state that a reset has made: Newton moves its frames in physics steps only."""
    if env.sim.physics_manager.__name__.startswith("Newton"):  # the manager class of the backend
        from isaaclab_newton.physics import NewtonManager

        for frames in NewtonManager._newton_frame_transform_sensors:
            frames.update(NewtonManager.get_state_0())
    for sensor in env.scene.sensors.values():
        sensor.update(0.0)
    if hasattr(env, "observation_manager"):
        env.obs_buf = env.observation_manager.compute()
    else:
        env._get_dones()  # where direct tasks prepare what they observe
        env.obs_buf = env._compute_observations()


def check_columns(env: Any, name: str) -> None:
    """Refuses a started task with other columns than its row says."""
    task = TASKS[name]
    if hasattr(env, "observation_manager"):
        groups = {group: shape[0] for group, shape in env.observation_manager.group_obs_dim.items()}
        action = env.action_manager.total_action_dim
    else:
        groups, action = {group: x.shape[1] for group, x in env.obs_buf.items()}, env.single_action_space.shape[0]
    found = {"state": groups["policy"], "action": action, "privileged": groups.get("critic", 0)}
    for kind, wanted in {**task.sizes, "privileged": task.privileged}.items():
        if found[kind] != wanted:
            raise SystemExit(f"--task {name}: {found[kind]} {kind} columns, its row in TASKS says {wanted}")


if __name__ == "__main__":
    for name, task in TASKS.items():
        views, sizes = ", ".join(task.cameras.values()) or "no camera", task.sizes
        columns = f"state {sizes['state']}, action {sizes['action']}"
        print(f"{name}: {views}; {columns}, {task.horizon} steps; {task.instructions[0]}")
