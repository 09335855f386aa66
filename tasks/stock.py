"""Isaac Lab's own tasks: names old and new, configuration, the simulator's start, and `VecEnv`, a task as plain tensors.

Isaac Lab 3.0 runs most of its tasks on Newton, without Isaac Sim. Assets come from NVIDIA's server, or from the folder in
ISAACSIM_ASSET_ROOT.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from common import Ranks
from tasks import current_name

MISSING = object()
C_MANAGERS = "tasks.mujoco_c:NewtonMujocoCManager", "tasks.mujoco_c:NewtonMujocoCOnlyManager"  # if it can be; must be


@contextlib.contextmanager
def start_simulator(cfg: Any, device: str, cameras: bool, log: Path) -> Iterator[Callable[[], None]]:
    """Starts Isaac Lab; what Python prints goes to a file until the function that this yields is called.

        with start_simulator(cfg, args.device, cameras, run.dir / "simulator.log") as ready:
            env = gym.make(args.task, cfg=cfg)
            ready()
            yield env
            env.close()

    Args:
        cfg: of the environment, or anything else that Isaac Lab finds out the backends from.
        cameras: whether something is rendered.
        log: a file, appended to.
    """
    log.parent.mkdir(parents=True, exist_ok=True)  # ranks other than 0 may be here first
    with contextlib.ExitStack() as quiet, contextlib.ExitStack() as simulation:
        file = quiet.enter_context(open(log, "a"))
        quiet.enter_context(contextlib.redirect_stdout(file))
        quiet.enter_context(contextlib.redirect_stderr(file))
        from isaaclab.app import launch_simulation

        launcher = argparse.Namespace(device=device, headless=True, enable_cameras=cameras)
        simulation.enter_context(launch_simulation(cfg, launcher))
        yield quiet.close


def known_task(name: str) -> str:
    """The registered id of a task, from the same or an older name."""
    import isaaclab_tasks  # noqa: F401  (registers them)

    tasks = [task for task, spec in gym.registry.items() if "env_cfg_entry_point" in spec.kwargs]
    found = name if name in tasks else current_name(name)
    if found not in tasks and found.replace("Isaac-", "IsaacContrib-", 1) in tasks:  # where older ones went
        found = found.replace("Isaac-", "IsaacContrib-", 1)
    if found not in tasks:
        near = difflib.get_close_matches(found, tasks, 3, 0.0)
        raise SystemExit(f"--task {name}: Isaac Lab has no such task; nearest: {', '.join(near)}")
    return found


def parse_config(task: str, device: str, num_envs: int, overrides: Sequence[str]) -> Any:
    """Isaac Lab's configuration of a registered task with key=value overrides; refuses those that it does not know."""
    from isaaclab_tasks.utils import parse_env_cfg

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            return parse_env_cfg(task, device, num_envs, overrides=list(overrides))
    except (Exception, SystemExit) as error:  # hydra's own kinds
        why = " ".join(f"{error} {told.getvalue()}".split()).replace(" Available presets", "; available presets")
        raise SystemExit(f"--task {task} with {' '.join(overrides)}: {why}; see --physics and --overrides") from error


def check_physics(physics: str | None, device: str) -> None:
    """Refuses C MuJoCo on a GPU."""
    if physics == "mujoco_c" and "cpu" not in device:
        raise SystemExit(
            f"--physics mujoco_c: steps on a CPU only, not on {device}; use --device cpu or --physics newton_mjwarp"
        )


def step_in_c(cfg: Any, required: bool) -> None:
    """Lets C MuJoCo step what Newton would with MuJoCo-Warp: sets the manager that Isaac Lab takes for a task's physics.

    Args:
        cfg: Isaac Lab's configuration of a task that runs on a CPU.
        required: whether the simulator's start refuses a task that C MuJoCo cannot step, rather than using Warp.
    """
    from isaaclab.utils.string import ResolvableString
    from isaaclab_newton.physics import MJWarpSolverCfg

    solver = getattr(cfg.sim.physics, "solver_cfg", None)
    if isinstance(solver, MJWarpSolverCfg) and not solver.use_mujoco_cpu:
        cfg.sim.physics.class_type = solver.class_type = ResolvableString(C_MANAGERS[required])
        solver.ls_iterations = max(50, solver.ls_iterations)  # MuJoCo's own; fewer do not hold a cube that starts cold
    elif required:
        raise SystemExit(f"--physics mujoco_c: {type(solver).__name__} is not MuJoCo's; leave out --physics or the override")


def task_config(
    task: str, device: str, num_envs: int, physics: str | None, overrides: tuple[str, ...],
    groups: dict[str, tuple[str, ...] | None], images: bool = False, assets: bool = True,
) -> Any:  # fmt: skip
    """Isaac Lab's configuration of a task; refuses what cannot be trained here, before the simulator starts.

    A task without rewards gets its success termination as one, worth 1 for the step that succeeds.

    Args:
        physics: Isaac Lab's preset, or mujoco_c; None: the task's own, or Newton where Isaac Sim is not installed, which
            C MuJoCo steps on a CPU.
        overrides: Isaac Lab's key=value overrides.
        groups: observation groups that it must have, at least one, by the flag that names them; None: not asked for.
        images: whether the policy is to observe images, rather than numbers.
        assets: whether the simulator is to start, so that the assets have to be there.
    """
    from isaaclab.envs.utils.spaces import spec_to_gym_space
    from isaaclab.managers import RewardTermCfg
    from isaaclab.utils.assets import check_file_path

    check_physics(physics, device)
    free = physics is None and not importlib.util.find_spec("isaacsim")
    in_c = physics == "mujoco_c" or (free and "cpu" in device)
    physics, required = "newton_mjwarp" if free or in_c else physics, physics == "mujoco_c"
    given = [*([f"physics={physics}"] if physics else []), *overrides]
    if "Stack-Cube" in task and physics and physics.startswith("newton"):
        given.append("env.scene.replicate_physics=true")  # Newton finds no bodies otherwise
    cfg = parse_config(task, device, num_envs, given)
    plain = parse_config(task, device, num_envs, [g for g in given if not g.startswith("env.")])
    for override in overrides:
        check_override(override, cfg, plain)
    robot = getattr(getattr(cfg, "scene", None), "robot", None)
    if physics and physics.startswith("newton") and getattr(getattr(robot, "spawn", None), "rigid_props", None):
        if getattr(robot.spawn.rigid_props, "disable_gravity", False):  # which Newton does not know by that name
            from isaaclab_newton.sim.schemas import MujocoRigidBodyCfg

            robot.spawn.rigid_props = [robot.spawn.rigid_props, MujocoRigidBodyCfg(gravcomp=1.0)]
    refused = f"--task {task}:"
    if not hasattr(cfg, "is_finite_horizon") or hasattr(cfg, "possible_agents"):
        raise SystemExit(f"{refused} no task for a single agent; choose another")
    if hasattr(cfg, "action_space"):  # a direct task; those of managers have Box actions always
        try:
            space, observed = spec_to_gym_space(cfg.action_space), spec_to_gym_space(cfg.observation_space)
        except Exception as error:  # gymnasium's assertions among them
            raise SystemExit(f"{refused} its action space {cfg.action_space} is none ({error})") from error
        if not isinstance(space, gym.spaces.Box | gym.spaces.Discrete | gym.spaces.MultiDiscrete):
            raise SystemExit(f"{refused} its action space {space} is not supported (Box, Discrete, MultiDiscrete are)")
        if images != (len(observed.shape or ()) > 1):
            found, script = ("numbers", "ppo_isaac.py") if images else ("images", "ppo_isaac_rgb.py")
            raise SystemExit(f"{refused} it observes {found}; {script} is for those")
    elif images:
        raise SystemExit(f"{refused} ppo_isaac_rgb.py takes direct tasks whose policy observation is an image")
    elif cfg.rewards is None:
        success = getattr(cfg.terminations, "success", None)
        if success is None:
            raise SystemExit(f"{refused} it has neither rewards nor a termination called success to learn from")
        weight = 1 / (cfg.sim.dt * cfg.decimation)  # Isaac Lab multiplies rewards by the step's length
        cfg.rewards = {"success": RewardTermCfg(func=success.func, params=success.params, weight=weight)}
    direct = hasattr(cfg, "action_space")
    if direct:
        found = ("policy", "critic") if cfg.state_space else ("policy",)
    else:
        found = tuple(name for name, group in vars(cfg.observations).items() if group is not None)
    for flag, names in groups.items():
        if names == ():
            raise SystemExit(f"{flag}: needs at least one group; {task} has {', '.join(found)}")
        for name in names or ():
            if name not in found:
                raise SystemExit(f"{flag} {name}: {task} has no such group; it has {', '.join(found)}")
            terms = () if direct else vars(getattr(cfg.observations, name)).values()
            if any(getattr(getattr(term, "func", None), "__name__", "").startswith("image") for term in terms):
                raise SystemExit(f"{flag} {name}: {task} has images there; choose a group of numbers, or another task")
    for file in sorted(set(re.findall(r"'([^']+\.usd[acz]?)'", repr(cfg)))) if assets else ():
        if "/UIElements/" not in file and not check_file_path(file):  # those are markers, drawn on demand
            raise SystemExit(
                f"{refused} cannot reach {file}; connect to the network, or set ISAACSIM_ASSET_ROOT to a copy of "
                "NVIDIA's assets (stand-ins that need no network: python tests/assets.py)"
            )
    if in_c:
        step_in_c(cfg, required)
    cfg.compute_final_obs = True  # what time-outs are bootstrapped from
    return cfg


def check_override(override: str, cfg: Any, plain: Any) -> None:
    """Refuses env.path=value where a task's plain configuration has no such path, or a number and the value is none."""
    path = override.partition("=")[0].lstrip("+~").split(".")
    if path[0] != "env":
        return
    for name in path[1:]:
        nodes = (cfg, plain)
        cfg, plain = (x.get(name, MISSING) if isinstance(x, dict) else getattr(x, name, MISSING) for x in nodes)
        if plain is MISSING:
            raise SystemExit(f"--overrides {override}: the task has no {'.'.join(path)}")
    if isinstance(plain, int | float) and isinstance(cfg, str):
        raise SystemExit(f"--overrides {override}: {'.'.join(path)} is a number, as {plain}")


class Spaces(NamedTuple):
    """What the networks read and write."""

    obs: tuple[int, ...]  # shape of a policy observation
    critic: tuple[int, ...]  # shape of a critic observation; empty: the critic sees the policy's
    continuous: int  # dimensions of a Box action, else 0
    choices: tuple[int, ...]  # number of values of each component of a (Multi)Discrete action

    @property
    def outputs(self) -> int:
        return self.continuous or sum(self.choices)


def action_bounds(space: gym.Space, clip_actions: float | None, device: str = "cpu") -> tuple[Tensor, Tensor] | None:
    """Lowest and highest action (C,) of a Box, within a symmetric bound; None where there is no limit."""
    if not isinstance(space, gym.spaces.Box):
        return None
    limit = clip_actions or math.inf
    low, high = (torch.as_tensor(np.ravel(b), device=device).clamp(-limit, limit) for b in (space.low, space.high))
    return (low, high) if torch.isfinite(torch.cat([low, high])).any() else None


def deployment(
    cfg: Any, spaces: Spaces, obs_groups: Sequence[str], hide_obs: Sequence[int], clip_actions: float | None
) -> tuple[dict[str, Any], tuple[Tensor, Tensor] | None]:
    """What runs a policy outside of Isaac Lab has to know, and the bounds on its actions. The simulator need not run.

    Args:
        cfg: Isaac Lab's configuration of the task.
        obs_groups, hide_obs, clip_actions: as for `VecEnv`.

    Returns:
        control period [s]; observation: size, hidden columns of the joined groups and, of a task with managers, each
        group's terms in order; action: size, number of values per component (discrete), bounds that the policy keeps, and
        what the task makes of it after that.
    """
    from isaaclab.envs.utils.spaces import spec_to_gym_space
    from isaaclab.managers import ActionTermCfg, ObservationTermCfg

    def terms(group: Any, kind: type) -> list[dict]:
        return [{"name": name, **term.to_dict()} for name, term in vars(group).items() if isinstance(term, kind)]

    direct, size = hasattr(cfg, "action_space"), spaces.continuous or len(spaces.choices)
    space = spec_to_gym_space(cfg.action_space) if direct else gym.spaces.Box(-math.inf, math.inf, (size,))
    bounds = action_bounds(space, clip_actions)
    observation, action = {"size": math.prod(spaces.obs), "hidden": hide_obs}, {"size": size, "choices": spaces.choices}
    action |= {"low": bounds and bounds[0], "high": bounds and bounds[1]}
    if direct:
        action["scale"] = getattr(cfg, "action_scale", None)  # by the task itself, as is the order of observations
    else:
        action["terms"] = terms(cfg.actions, ActionTermCfg)
        observation["terms"] = {name: terms(getattr(cfg.observations, name), ObservationTermCfg) for name in obs_groups}
    return {"control_period": cfg.sim.dt * cfg.decimation, "observation": observation, "action": action}, bounds


class VecEnv:
    """An Isaac Lab task as plain tensors. Isaac Lab resets inside `step`; its two kinds of tasks are alike here.

    Attributes:
        running: (2, N) return and length of the current episodes.
        done: (N,) which episodes ended in the step that `restart` left out.
    """

    def __init__(
        self, task: str, cfg: Any, ranks: Ranks, seed: int, clip_actions: float | None = None,
        obs_groups: tuple[str, ...] = ("policy",), hide_obs: tuple[int, ...] = (),
    ):  # fmt: skip
        """
        Args:
            cfg: Isaac Lab's configuration of the task.
            ranks: this process and its siblings.
            seed: of the first start.
            clip_actions: symmetric bound on actions, beside the action space's own.
            obs_groups: observation groups that the policy sees, joined; the critic sees `critic`, or the same without one.
            hide_obs: columns of the policy's observation to leave out.
        """
        self.env = gym.make(task, cfg=cfg)
        self.base, self.ranks = self.env.unwrapped, ranks
        self.obs_groups, self.hide_obs = obs_groups, hide_obs
        self.num_envs, self.device, self.horizon = self.base.num_envs, self.base.device, int(self.base.max_episode_length)
        self.finite, self.final = cfg.is_finite_horizon, None
        self.running = torch.zeros(2, self.num_envs, device=self.device)
        space = self.base.single_action_space
        choices = [int(space.n)] if isinstance(space, gym.spaces.Discrete) else [int(n) for n in getattr(space, "nvec", ())]
        self.bounds = action_bounds(space, clip_actions, self.device)
        self.idle = torch.zeros(self.num_envs, len(choices) or math.prod(space.shape), device=self.device)
        self.idle = self.idle.long() if choices else self.idle
        self.prepare(task, cfg)
        obs, critic = self.restart(seed, stagger=False)
        separate = tuple(critic.shape[1:]) if critic is not obs else ()
        self.spaces = Spaces(tuple(obs.shape[1:]), separate, 0 if choices else math.prod(space.shape), tuple(choices))

    def prepare(self, task: str, cfg: Any) -> None:
        """For a variant with attributes of its own; the simulator runs, nothing was reset yet."""

    def read(self, groups: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Policy and critic observations (N, d), (N, dc) of Isaac Lab's observation groups; one tensor if they agree."""
        obs = flatten([groups[name] for name in self.obs_groups])
        if self.hide_obs:
            kept = [i for i in range(obs.shape[1]) if i not in self.hide_obs]
            if not kept or not 0 <= min(self.hide_obs) <= max(self.hide_obs) < obs.shape[1]:
                raise SystemExit(f"--hide-obs {' '.join(map(str, self.hide_obs))}: columns are 0 to {obs.shape[1] - 1}")
            obs = obs[:, kept]
        return obs, flatten(groups["critic"]) if "critic" in groups else obs

    def restart(self, seed: int, steps: int = 0, stagger: bool = True, saved: dict | None = None) -> tuple[Tensor, Tensor]:
        """Starts one episode everywhere, or goes on from a saved state; the rest depends on arguments and actions alone.

        Args:
            seed: of starts and randomisation; each rank makes its own of it.
            steps: environment steps so far, for the task's curriculum.
            stagger: episodes have random ages, so that they do not time out together.
            saved: what `state` returned; one step is then taken and left out, see `done`.

        Returns:
            policy and critic observations.
        """
        self.base.common_step_counter = steps
        own = int(np.random.SeedSequence((seed, steps, self.ranks.rank)).generate_state(1)[0])
        self.running.zero_()
        if saved is None:  # sensors keep what they saw until a step is made: the same one always
            self.env.reset(seed=own)
            self.step(self.idle)
            groups, _ = self.env.reset(seed=own)
            if stagger:
                self.base.episode_length_buf.random_(0, self.horizon)
            obs, critic = self.read(groups)
        else:
            recall(self.base, saved["task"]["memory"])  # for the curriculum, which runs at resets
            self.env.reset(seed=own)
            restore(self.base, saved["task"])
            self.running.copy_(saved["running"])
            obs, critic, _, terminated, truncated, _ = self.step(self.idle)
            self.done = terminated | truncated
            self.running *= ~self.done
        self.base.extras["log"] = {}  # of the episodes before
        return obs, critic

    def state(self) -> dict[str, Any]:
        """What `restart` goes on from."""
        return {"task": snapshot(self.base), "running": self.running.cpu().clone()}

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Executes (N, C) actions: numbers, which are clipped here and nowhere else, or indices.

        Returns:
            policy and critic observation of the next step, reward, terminated, truncated (N,), and the critic
            observations from before the resets, valid where an episode ended (None: nowhere).
        """
        action = action.clamp(*self.bounds) if self.bounds else action
        groups, reward, terminated, truncated, extras = self.env.step(action)
        if self.finite:
            terminated, truncated = terminated | truncated, torch.zeros_like(truncated)
        final, new = None, extras.get("final_obs")
        if new is not self.final:  # it stays in extras; a new object means that an episode has just ended
            self.final, final = new, self.read(new)[1]
        return *self.read(groups), reward, terminated, truncated, final

    def episodes(self, rewards: Tensor, done: Tensor) -> Tensor:
        """Return and length of the running episodes after each step of a rollout: (T, N), (T, N) -> (2, T, N)."""
        after = []
        for reward, end in zip(rewards, done):
            after.append(self.running + torch.stack([reward, torch.ones_like(reward)]))
            self.running = after[-1] * ~end
        return torch.stack(after, 1)


@contextlib.contextmanager
def seeded_generators(seed: int):
    """Meanwhile, numpy generators that are made without a seed get this one.

    Some observation terms sample points on objects so, when a task is built: a policy would meet others at every start.
    """
    plain = np.random.default_rng
    with mock.patch("numpy.random.default_rng", lambda given=None: plain(seed if given is None else given)):
        yield


def task_memory(env: Any) -> dict[str, tuple[Any, str]]:
    """Where a task's terms keep tensors and numbers, beyond a step or an episode: name -> (object, attribute).

    Such are commands, difficulties, success rates and banks of starts. Tasks without managers have none that is known.
    """
    from isaaclab.managers import ManagerTermBase

    places = {}
    for kind in ("command", "event", "curriculum", "reward", "termination"):
        manager = getattr(env, f"{kind}_manager", None)
        owners, names = {"": manager} if manager else {}, getattr(manager, "active_terms", [])
        names = [name for mode in names.values() for name in mode] if isinstance(names, dict) else names
        for name in dict.fromkeys(names):
            if kind == "command":
                term = manager.get_term(name)
            else:  # curricula have no getter
                term = (getattr(manager.cfg, name) if kind == "curriculum" else manager.get_term_cfg(name)).func
            if isinstance(term, ManagerTermBase):
                own = ((key, x) for key, x in vars(term).items() if type(x).__module__.startswith("isaaclab_tasks"))
                owners |= {f".{name}": term} | {f".{name}.{key}": x for key, x in own}
        for path, owner in owners.items():
            for attribute, value in vars(owner).items():
                if isinstance(value, Tensor | bool | int | float):
                    places[f"{kind}{path}.{attribute}"] = (owner, attribute)
    return places


def recall(env: Any, memory: dict[str, Any]) -> None:
    """Puts back what `task_memory` finds."""
    for name, (owner, attribute) in task_memory(env).items():
        value, old = memory[name], getattr(owner, attribute)
        if isinstance(value, Tensor) and old.shape == value.shape and old.is_contiguous():
            old.copy_(value)  # others may hold it, too
        else:
            setattr(owner, attribute, value.to(env.device, copy=True) if isinstance(value, Tensor) else value)


def snapshot(env: Any) -> dict[str, Any]:
    """Where the bodies are, what their joints aim at, how old the episodes are and what the task remembers; on the CPU."""
    targets = {}
    for name, body in env.scene.articulations.items():
        kinds = {"position": body.data.joint_pos_target, "velocity": body.data.joint_vel_target}
        targets[name] = {kind: x.torch for kind, x in (kinds | {"effort": body.data.joint_effort_target}).items()}
    memory = {name: getattr(*place) for name, place in task_memory(env).items()}
    scene = env.scene.get_state(is_relative=True)
    return to_cpu({"scene": scene, "targets": targets, "memory": memory, "age": env.episode_length_buf})


def restore(env: Any, saved: dict[str, Any]) -> None:
    """Puts a snapshot back, right after a reset. Sensors follow at the next step."""
    env.scene.reset_to(saved["scene"], None, is_relative=True)  # sets targets that PD control would have
    for name, targets in saved["targets"].items():
        for kind, target in targets.items():
            getattr(env.scene.articulations[name], f"set_joint_{kind}_target_index")(target=target.to(env.device))
    env.sim.forward()
    recall(env, saved["memory"])
    env.episode_length_buf.copy_(saved["age"])


def to_cpu(tree: Any) -> Any:
    """A copy of all tensors in nested dicts."""
    if isinstance(tree, dict):
        return {name: to_cpu(value) for name, value in tree.items()}
    return tree.detach().to("cpu", copy=True) if isinstance(tree, Tensor) else tree


def flatten(group: Any) -> Tensor:
    """(N, d) from an observation group: a tensor, or terms in a dict or a tuple."""
    if isinstance(group, dict | tuple | list):
        return torch.cat([flatten(term) for term in (group.values() if isinstance(group, dict) else group)], 1)
    return group.reshape(len(group), -1).float()


def task_metrics(env: Any) -> dict[str, Tensor]:
    """What the task itself logs at resets (reward terms, success, ...), as of the latest one; on the device."""
    log = {f"task/{name}": torch.as_tensor(x, device=env.device) for name, x in env.extras.get("log", {}).items()}
    return {name: x for name, x in log.items() if x.numel() == 1}


def add_camera(cfg) -> None:
    """A camera in every environment that looks the way the task's viewer does, from within the environment."""
    import isaaclab.sim as sim_utils
    from isaaclab.assets import ArticulationCfg
    from isaaclab.sensors import CameraCfg
    from isaaclab.utils.math import create_rotation_matrix_from_view, quat_from_matrix
    from isaaclab_tasks.utils.presets import MultiBackendRendererCfg

    eye, at = torch.tensor([cfg.viewer.eye]).float(), torch.tensor([cfg.viewer.lookat]).float()
    robot = next((x for x in vars(cfg.scene).values() if isinstance(x, ArticulationCfg)), None)
    if robot is not None:
        eye, at = eye - at + torch.tensor([robot.init_state.pos]), torch.tensor([robot.init_state.pos])
    eye = at + (eye - at) / (eye - at).norm() * 0.8 * max(cfg.scene.env_spacing, 2.0)
    rotation = quat_from_matrix(create_rotation_matrix_from_view(eye, at, "Z"))[0].tolist()
    cfg.scene.video_camera = CameraCfg(
        prim_path="{ENV_REGEX_NS}/video_camera", height=128, width=128, data_types=["rgb"],
        renderer_cfg=MultiBackendRendererCfg().default, spawn=sim_utils.PinholeCameraCfg(clipping_range=(0.05, 50.0)),
        offset=CameraCfg.OffsetCfg(pos=eye[0].tolist(), rot=rotation, convention="opengl"),
    )  # fmt: skip
