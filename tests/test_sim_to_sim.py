"""benchmarks/sim_to_sim.py: its models and tasks in numpy against Isaac Lab itself, step by step, with stand-in assets."""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import mujoco
import numpy as np
import pytest

from benchmarks import sim_to_sim

N, STEPS, FREE, ACTION = 16, 100, 5, 2.0  # after FREE steps the model is put into Isaac Lab's state again
# Steps for which an action is held, so that some robots fail and some do not; bounds on observations after the first step and
# after any, and on rewards. Seen were 1e-6, 1e-5, 1e-7, and of the ant 6e-6, 4e-4 (a wrench, where a foot lands), 1.6e-4: Isaac
# Lab rounds states to float32 after each physics step, and the way to a target 1000 m off. 1 % more damping shows as 3e-3.
TASKS = {"Isaac-Cartpole-Direct": (1, 5e-6, 5e-5, 2e-6), "Isaac-Ant-Direct": (16, 3e-5, 2e-3, 3e-4)}


def isaac_lab(task: str, actions: np.ndarray) -> tuple[dict, list[np.ndarray]]:
    """In a process of its own: deployment.json; N environments' observations, rewards, failures, and states after each step."""
    import torch
    from isaaclab_newton.physics import NewtonManager

    from common import Ranks
    from tasks import stock

    cfg = stock.task_config(task, "cpu", N, "mujoco_c", (), {})
    cfg.scene.env_spacing = 0.0  # all have the same origin, so positions are the task's own
    with stock.start_simulator(cfg, "cpu", False, Path(tempfile.mkdtemp()) / "log"):
        env = stock.VecEnv(task, cfg, Ranks(0, 1), 1)
        solver, states = NewtonManager._solver, []
        steps = [(env.restart(5, stagger=False)[0].clone(), torch.zeros(N), torch.zeros(N, dtype=torch.bool))]
        for action in torch.from_numpy(actions):
            obs, _, reward, terminated, _, final = env.step(action)
            seen = torch.where(terminated[:, None], final, obs) if final is not None else obs
            steps.append((seen.clone(), reward.clone(), terminated.clone()))
            states.append(np.concatenate([solver.qpos, solver.qvel], 1))
        told, _ = stock.deployment(cfg, env.spaces, ("policy",), (), None)
        env.env.close()
    return told, [*(torch.stack(x).numpy() for x in zip(*steps)), np.array(states)]


@pytest.mark.parametrize("task", sim_to_sim.TASKS)
def test_plain_mujoco_goes_where_isaac_lab_goes(task):
    """The same starts and actions, until an episode fails; rewards and failures are told from Isaac Lab's observations."""
    robot, (hold, first, bound, reward_bound) = sim_to_sim.TASKS[task](), TASKS[task]
    size = N, mujoco.MjModel.from_xml_string(robot.xml).nu
    actions = np.random.default_rng(0).normal(0, ACTION, (STEPS, *size)).astype(np.float32)
    actions = actions[np.arange(STEPS) // hold]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        told, (obs, rewards, failed, states) = pool.submit(isaac_lab, task, actions).result()
    states = np.concatenate([robot.state(obs[0])[None], states])
    for i in range(N):
        world = sim_to_sim.World(robot, told)
        assert np.abs(world.reset(states[0, i]) - obs[0, i]).max() < 1e-6
        for t in range(STEPS):
            if t % FREE == 0:
                world.reset(states[t, i])
            difference = np.abs(world.step(actions[t, i]) - obs[t + 1, i]).max()
            reward, end = robot.judge(obs[t + 1, i].astype(float), world.path, told["control_period"])
            assert difference < (bound if t else first), (i, t, difference)
            assert end == failed[t + 1, i] and abs(reward - rewards[t + 1, i]) < reward_bound, (i, t)
            if end:
                break
    assert 1 < failed.any(0).sum() < N
