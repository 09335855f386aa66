"""The scripted experts in the real simulator, with stand-in assets; one simulator per process.

`python tests/test_experts.py ROW FOLDER` prints the share of a row's episodes that its expert solves.
"""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tasks.gr00t import TASKS
from tests import warm

N, SEED = 32, 77
FLOORS = {
    "IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor": 0.8,
    "Isaac-Open-Drawer-Franka": 0.9,
    "Isaac-Lift-Franka": 0.9,
}


def solved(name: str, folder: Path) -> float:
    from tests.sim import chunk_env

    with chunk_env(folder, N, task=name) as env:
        env.reset(SEED)
        for _ in range(env.task.horizon):
            env.step_chunk(env.task.expert(env.env)[:, None], last=True)
        return env.success.float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOORS)
def test_an_expert_solves_its_task(name, tmp_path):
    out, err = warm.start([__file__, name, str(tmp_path)], ROOT, dict(os.environ)).communicate(timeout=1800)
    assert out.startswith("solved "), err[-3000:]
    assert float(out.split()[1]) >= FLOORS[name]


def test_rows_with_an_expert():
    """Noise is for columns that the action has, an expert is done before the horizon, and rows of one task share it."""
    for name in ("Tabletop-Lift-Cube-v0", "RLinf-Stack-Cube", *FLOORS):
        task = TASKS[name]
        assert callable(task.expert) and set(task.demo_noise) <= set(task.action) and task.demo_steps < task.horizon
    assert TASKS["RLinf-Stack-Cube"].expert is TASKS["IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor"].expert


if __name__ == "__main__":
    print("solved", solved(sys.argv[1], Path(sys.argv[2])), flush=True)
