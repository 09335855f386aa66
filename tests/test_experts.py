"""The scripted experts in the real simulator, with stand-in assets; one simulator per process.

`python tests/test_experts.py ROW FOLDER PHYSICS SEED ...` prints the share of a row's episodes, 32 per seed, that its expert
solves, and the steps that it needs: median, 95%, longest. PHYSICS is mujoco_c or newton_mjwarp.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tasks.gr00t import TASKS
from tests import warm

N, SEED = 32, "77"
FLOORS = {
    "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor": 0.8,
    "Isaac-Open-Drawer-Franka": 0.9,
    "Isaac-Lift-Franka": 0.9,
}


def solved(name: str, folder: Path, physics: str, seeds: list[str]) -> tuple[float, list[int]]:
    import torch

    from tests.sim import chunk_env

    needed = []  # (N,) steps, of each seed; 0: not solved
    with chunk_env(folder, N, task=name, physics=physics) as env:
        for seed in seeds:
            env.reset(int(seed))
            needed.append(torch.zeros(N))
            for t in range(env.task.horizon):
                before = env.success
                env.step_chunk(env.task.expert(env.env)[:, None], last=True)
                needed[-1] += (t + 1) * (env.success & ~before)
        steps = torch.cat(needed)
        return (steps > 0).float().mean().item(), steps[steps > 0].quantile(torch.tensor([0.5, 0.95, 1.0])).int().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOORS)
def test_an_expert_solves_its_task(name, tmp_path):
    out, err = warm.start([__file__, name, str(tmp_path), "mujoco_c", SEED], ROOT, dict(os.environ)).communicate(timeout=600)
    assert out.startswith("solved "), err[-3000:]
    assert float(out.split()[1]) >= FLOORS[name]


def test_rows_with_an_expert():
    """Noise is for columns that the action has, an expert is done before the horizon, and rows of one task share it."""
    for name in ("Tabletop-Lift-Cube-v0", "RLinf-Stack-Cube", *FLOORS):
        task = TASKS[name]
        assert callable(task.expert) and set(task.demo_noise) <= set(task.action) and task.demo_steps < task.horizon
    assert TASKS["RLinf-Stack-Cube"].expert is TASKS["IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor"].expert


if __name__ == "__main__":
    print("solved", *solved(sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4:]), flush=True)
