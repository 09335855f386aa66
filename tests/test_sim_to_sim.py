"""benchmarks/sim_to_sim.py: its models and tasks in numpy against Isaac Lab itself, step by step, with stand-in assets."""

from __future__ import annotations

import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sim_to_sim

N, STEPS, ACTION = 8, 80, 2.0
BOUND = 1e-3  # on observations, six times what was seen: float32 against float64, amplified where a pole spins


def isaac_lab(task: str, actions: np.ndarray) -> tuple[dict, list[np.ndarray]]:
    """In a process of its own: deployment.json's content, and observations, rewards and failures of N environments."""
    import torch

    from common import Ranks
    from tasks import stock

    cfg = stock.task_config(task, "cpu", N, "mujoco_c", (), {})
    with stock.start_simulator(cfg, "cpu", False, Path(tempfile.mkdtemp()) / "log"):
        env = stock.VecEnv(task, cfg, Ranks(0, 1), 1)
        steps = [(env.restart(5, stagger=False)[0].clone(), torch.zeros(N), torch.zeros(N, dtype=torch.bool))]
        for action in torch.from_numpy(actions):
            obs, _, reward, terminated, _, final = env.step(action)
            seen = torch.where(terminated[:, None], final, obs) if final is not None else obs
            steps.append((seen.clone(), reward.clone(), terminated.clone()))
        told, _ = stock.deployment(cfg, env.spaces, ("policy",), (), None)
        env.env.close()
    return told, [torch.stack(x).numpy() for x in zip(*steps)]


@pytest.mark.parametrize("task", sim_to_sim.TASKS)
def test_plain_mujoco_goes_where_isaac_lab_goes(task):
    """The same starts and actions, until an episode fails; rewards and failures are told from Isaac Lab's observations."""
    robot = sim_to_sim.TASKS[task]()
    actions = np.random.default_rng(0).normal(0, ACTION, (STEPS, N, 1)).astype(np.float32)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        told, (obs, rewards, failed) = pool.submit(isaac_lab, task, actions).result()
    starts, first = robot.state(obs[0]), 0.0
    for i in range(N):
        world = sim_to_sim.World(robot, told)
        assert np.abs(world.reset(starts[i]) - obs[0, i]).max() < 1e-6
        for t in range(STEPS):
            difference = np.abs(world.step(actions[t, i]) - obs[t + 1, i]).max()
            first = max(first, difference) if t == 0 else first
            reward, end = robot.judge(obs[t + 1, i].astype(float), told["control_period"])
            assert difference < BOUND and end == failed[t + 1, i] and abs(reward - rewards[t + 1, i]) < 2e-6, (i, t)
            if end:
                break
    assert first < 5e-6 and 1 < failed.any(0).sum() < N
