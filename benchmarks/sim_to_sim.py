"""A policy of ppo_isaac.py in plain MuJoCo, outside of Isaac Lab: does it keep its return in another simulator?

    python ppo_isaac.py --export --checkpoint runs/<name>/checkpoints/best
    python benchmarks/sim_to_sim.py --policy runs/<name>/checkpoints/best/exported

The idea is Humanoid-Gym's (Gu et al. 2024, arXiv 2404.05695). Here, the model is written anew as MJCF, and observations,
rewards and ends of episodes in numpy, from what Isaac Lab's task says; of the policy there are only the ONNX file and
deployment.json. Isaac Lab's side is ppo_isaac.py's own evaluation of the checkpoint; MuJoCo gets its starts, and then as many
of its own. Models are those of the **stand-in assets** of tests/assets.py, so both sides have to run on these:

    ISAACSIM_ASSET_ROOT=$(python tests/assets.py) python benchmarks/sim_to_sim.py --policy ...
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    policy: str  # folder that ppo_isaac.py --export wrote
    episodes: int = 512  # in each simulator
    seed: int = 20_261_127  # of the starts
    physics: tuple[str, ...] = ("mujoco_c",)  # of Isaac Lab's evaluation of the same checkpoint; newton_mjwarp: slow on a CPU


ARGS = tyro.cli(Args) if __name__ == "__main__" else None

import mujoco
import numpy as np


class Cartpole:
    """Isaac-Cartpole-Direct."""

    xml = """
    <mujoco model="cartpole">
      <option timestep="0.008333333333333333" gravity="0 0 -9.81" integrator="implicitfast"/>
      <worldbody>
        <body pos="0 0 2">
          <joint name="slider_to_cart" type="slide" axis="0 1 0" limited="true" range="-4 4" damping="10"/>
          <geom type="box" size="0.1 0.125 0.1" mass="1"/>
          <body pos="0.12 0 0">
            <joint name="cart_to_pole" type="hinge" axis="1 0 0"/>
            <geom type="box" pos="0 0 0.47" size="0.02 0.03 0.5" mass="1" contype="0"/>
          </body>
        </body>
      </worldbody>
      <actuator><motor joint="slider_to_cart"/></actuator>
    </mujoco>
    """
    seconds = 5.0  # of an episode
    low, high = np.array([[-1, -np.pi / 4, -0.5, -np.pi / 4], [1, np.pi / 4, 0.5, np.pi / 4]])  # of a start

    def start(self, rng: np.random.Generator) -> np.ndarray:
        """Positions and velocities of cart [m] and pole [rad]."""
        return rng.uniform(self.low, self.high)

    def state(self, obs: np.ndarray) -> np.ndarray:
        """Positions and velocities (N, 4) that observations (N, 4) at a start tell."""
        return obs.astype(float)

    def observe(self, data: mujoco.MjData) -> np.ndarray:
        return np.concatenate([data.qpos, data.qvel])

    def judge(self, obs: np.ndarray, path: np.ndarray, period: float) -> tuple[float, bool]:
        """Reward of the step that led to an observation, and whether the episode failed there; path (2, nq): where it led."""
        cart, pole, cart_speed, pole_speed = obs
        failed, pole = bool(abs(cart) > 3), (pole + np.pi) % (2 * np.pi) - np.pi
        return period * ((-2 if failed else 1) - pole**2 - 0.01 * abs(cart_speed) - 0.005 * abs(pole_speed)), failed


def ant_leg(name: str, x: int, y: int) -> str:
    """A leg of the ant, towards x, y = +-1; the site has the axes of the foot's joint and lies in the foot's centre of mass."""
    low, high = (30, 100) if x > 0 else (-100, -30)
    return f"""
          <geom fromto="0 0 0 {0.2 * x} {0.2 * y} 0"/>
          <body pos="{0.2 * x} {0.2 * y} 0">
            <joint name="{name}_leg" axis="0 0 1" range="-40 40" solreflimit="0.463299 0.024867"/>
            <geom fromto="0 0 0 {0.2 * x} {0.2 * y} 0"/>
            <body pos="{0.2 * x} {0.2 * y} 0">
              <joint name="{name}_foot" axis="{-x * y} 1 0" range="{low} {high}" solreflimit="0.382727 0.027359"/>
              <geom fromto="0 0 0 {0.4 * x} {0.4 * y} 0"/>
              <site name="{name}" pos="{0.2 * x} {0.2 * y} 0" euler="0 0 {90 + 45 * x * y}"/>
            </body>
          </body>"""


LEGS = {"front_left": (1, 1), "front_right": (-1, 1), "left_back": (-1, -1), "right_back": (1, -1)}


class Ant:
    """Isaac-Ant-Direct. Armature and damping are those of Isaac Lab's robot, `solreflimit` is what Newton makes of the asset's
    limits; for friction and contacts it has MuJoCo's defaults."""

    xml = f"""
    <mujoco model="ant">
      <option timestep="0.008333333333333333" gravity="0 0 -9.81" integrator="implicitfast"/>
      <default>
        <joint armature="0.05" damping="0.1"/>
        <geom type="capsule" size="0.08" density="5" conaffinity="0"/>
        <motor gear="15" ctrlrange="-0.5 0.5"/>
      </default>
      <worldbody>
        <geom type="plane" size="0 0 1" contype="0" conaffinity="1"/>
        <body name="torso" pos="0 0 0.5">
          <freejoint/>
          <geom type="sphere" size="0.25"/>{"".join(ant_leg(name, *leg) for name, leg in LEGS.items())}
        </body>
      </worldbody>
      <actuator>{"".join(f'<motor joint="{name}_{part}"/>' for name in LEGS for part in ("leg", "foot"))}</actuator>
      <sensor>{"".join(f'<force site="{name}"/><torque site="{name}"/>' for name in LEGS)}</sensor>
    </mujoco>
    """
    seconds = 16.0  # of an episode
    sides = np.array([0, 1, 0, -1, 0, -1, 0, 1])  # of the ankles; 0: a hip
    middle, half = np.radians(65 * sides), np.radians([40, 35] * 4)  # of the joints' ranges [rad]
    arms = np.outer(-sides[1::2], [0, 0.08**0.5, 0])  # of the feet's centres of mass, in the joints' axes [m]
    target = np.array([1000.0, 0.0])  # [m]

    def start(self, rng: np.random.Generator) -> np.ndarray:
        """Positions and velocities of torso (quaternion w, x, y, z) and joints."""
        joints = np.radians(45 * self.sides) + rng.uniform(-0.2, 0.2, 8)
        return np.concatenate([[0, 0, 0.5, 1, 0, 0, 0], joints, np.zeros(6), rng.uniform(-0.1, 0.1, 8)])

    def state(self, obs: np.ndarray) -> np.ndarray:
        """Positions and velocities (N, 29) that observations (N, 60) at a start tell."""
        torso, still = np.tile([0, 0, 0.5, 1, 0, 0, 0], (len(obs), 1)), np.zeros((len(obs), 6))
        return np.concatenate([torso, self.middle + self.half * obs[:, 12:20], still, obs[:, 20:28] / 0.2], 1)

    def observe(self, data: mujoco.MjData) -> np.ndarray:
        before = data.site_xmat.reshape(4, 3, 3).copy()
        mujoco.mj_kinematics(data.model, data)
        torso, after = data.body("torso").xmat.reshape(3, 3), data.site_xmat.reshape(4, 3, 3)
        # Isaac Lab has the wrench at the last physics step's beginning, in the world's axes, and the frames at its end
        force, torque = np.einsum("fwa,fwb,fkb->kfa", after, before, data.sensordata.reshape(4, 2, 3))
        torque += np.cross(self.arms, force)  # about the joint
        yaw, roll = np.arctan2([torso[1, 0], torso[2, 1]], [torso[0, 0], torso[2, 2]])
        away = self.target - data.qpos[:2]
        angle = (np.arctan2(away[1], away[0]) - yaw + np.pi) % (2 * np.pi) - np.pi
        return np.concatenate([
            data.qpos[2:3], data.qvel[:3] @ torso, data.qvel[3:6], [yaw, roll, angle],
            [torso[2, 2], torso[:2, 0] @ away / np.linalg.norm(away)],
            (data.qpos[7:] - self.middle) / self.half, 0.2 * data.qvel[6:],
            0.1 * np.stack([force, torque], 1).ravel(), data.ctrl / 0.5,
        ])  # fmt: skip

    def judge(self, obs: np.ndarray, path: np.ndarray, period: float) -> tuple[float, bool]:
        """Reward of the step that led to an observation, and whether the episode failed there; path (2, nq): where it led."""
        up, heading, joints, speeds, actions = obs[10], obs[11], np.abs(obs[12:20]), obs[20:28] / 0.2, obs[52:60]
        failed, away = bool(obs[0] < 0.31), np.linalg.norm(self.target - path[:, :2], axis=1)
        rate = 0.5 * (not failed) + 0.1 * (up > 0.93) + 0.5 * min(heading / 0.8, 1)
        rate -= 0.005 * (actions**2).sum() + 0.05 * np.abs(actions * speeds).sum()
        rate -= 0.1 * ((joints - 0.99) / 0.01 * (joints > 0.99)).sum()
        return away[0] - away[1] + period * rate - 2 * failed, failed


TASKS = {"Isaac-Cartpole-Direct": Cartpole, "Isaac-Ant-Direct": Ant}


class World:
    """One robot, stepped with actions from starts that are given."""

    def __init__(self, task: Cartpole | Ant, told: dict):
        """
        Args:
            told: deployment.json.
        """
        self.task, self.model = task, mujoco.MjModel.from_xml_string(task.xml)
        self.data, self.scale = mujoco.MjData(self.model), told["action"]["scale"]
        self.substeps = round(told["control_period"] / self.model.opt.timestep)
        if abs(self.substeps * self.model.opt.timestep - told["control_period"]) > 1e-9:
            raise SystemExit(f"--policy: its control period {told['control_period']} s is no multiple of the model's step")

    def reset(self, state: np.ndarray) -> np.ndarray:
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:], self.data.qvel[:] = np.split(state, [self.model.nq])
        return self.task.observe(self.data)

    def step(self, action: np.ndarray) -> np.ndarray:
        self.data.ctrl[:], before = self.scale * action, self.data.qpos.copy()
        mujoco.mj_step(self.model, self.data, self.substeps)
        self.path = np.array([before, self.data.qpos])  # (2, nq)
        return self.task.observe(self.data)


def in_mujoco(folder: Path, starts: np.ndarray) -> dict[str, float]:
    """The policy's episodes (N,) in plain MuJoCo, from states (N, positions and velocities); one thread.

    Returns:
        mean and std of the return, mean length, share that failed, largest action.
    """
    import onnxruntime

    told, n = json.loads((folder / "deployment.json").read_text()), len(starts)
    task, period = TASKS[told["task"]](), told["control_period"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    policy, worlds = onnxruntime.InferenceSession(folder / "policy.onnx", options), [World(task, told) for _ in starts]
    obs = np.array([world.reset(state) for world, state in zip(worlds, starts)], np.float32)
    sums, alive, largest = np.zeros((2, n)), np.ones(n, bool), 0.0  # return, length
    for _ in range(round(task.seconds / period)):
        (actions,) = policy.run(["action"], {"obs": obs})
        largest = max(largest, np.abs(actions[alive]).max(initial=0))
        for i in np.flatnonzero(alive):
            obs[i] = after = worlds[i].step(actions[i])
            reward, failed = task.judge(after, worlds[i].path, period)
            sums[:, i] += reward, 1
            alive[i] = not failed
    return {
        "mean": sums[0].mean(),
        "std": sums[0].std(),
        "length": sums[1].mean(),
        "failed": 1 - alive.mean(),
        "action": largest,
    }


def in_isaac_lab(folder: Path, episodes: int, seed: int, physics: str) -> tuple[dict[str, float], np.ndarray]:
    """ppo_isaac.py's evaluation of the same checkpoint, and the observations (N, d) that its episodes begin with."""
    import torch

    import ppo_isaac
    from tasks.stock import task_config

    ranks, checkpoint = ppo_isaac.Ranks(0, 1), str(folder.parent)
    args = dataclasses.replace(
        ppo_isaac.task_args(None, checkpoint), device="cpu", num_envs=episodes, eval_episodes=episodes, eval_seed=seed
    )
    torch.set_num_threads(1)
    cfg = task_config(args.task, "cpu", episodes, physics, (), {"--obs-groups": args.obs_groups})
    with tempfile.TemporaryDirectory() as scratch, ppo_isaac.make_env(args, cfg, ranks, Path(scratch) / "log") as env:
        policy = ppo_isaac.ActorCritic(env.spaces, args)
        policy.load(checkpoint)
        starts, _ = env.restart(seed, stagger=False)
        starts = starts.numpy().copy()
        return ppo_isaac.evaluate(args, env, policy, ranks), starts


def main(args: Args) -> None:
    folder = Path(args.policy).absolute()
    try:
        task = json.loads((folder / "deployment.json").read_text())["task"]
    except (OSError, ValueError, KeyError) as error:
        raise SystemExit(
            f"--policy {args.policy}: no export there ({error!r}); python ppo_isaac.py --export writes one"
        ) from error
    if task not in TASKS:
        raise SystemExit(f"--policy {args.policy}: a policy for {task}; there are models for {', '.join(TASKS)}")
    rng = np.random.default_rng(args.seed)
    starts = {"its own": np.array([TASKS[task]().start(rng) for _ in range(args.episodes)])}
    print(f"{task}, stand-in assets, {args.episodes} episodes each, seed {args.seed}")
    print(
        "| simulator | starts | return, mean ± std of episodes | length | failed | largest action |\n|---|---|---|---|---|---|"
    )

    def show(name: str, of: str, row: dict[str, float]) -> None:
        more = f"{row['failed']:.4f} | {row['action']:.2f}" if "failed" in row else " | "
        print(f"| {name} | {of} | {row['mean']:.4f} ± {row['std']:.4f} | {row['length']:.1f} | {more} |", flush=True)

    for physics in args.physics:  # one simulator per process
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            row, obs = pool.submit(in_isaac_lab, folder, args.episodes, args.seed, physics).result()
        show(f"Isaac Lab, {physics}", physics, row)
        starts[physics] = TASKS[task]().state(obs)
    for of, states in starts.items():
        show(f"MuJoCo {mujoco.__version__}", of, in_mujoco(folder, states))


if __name__ == "__main__":
    main(ARGS)
