"""Whole runs of ppo_isaac.py, by its command line: Isaac Lab's own tasks on a CPU, with stand-in assets.

Episodes are cut to a few steps, so that the shortest rollouts hold time-outs, resets and a whole evaluation.
"""

import functools
import json
import math
import re
import shutil
from pathlib import Path

import pytest

from tests import assets
from tests.test_runs import metrics, run, start

SMALL = "--device cpu --no-track --num-envs 8 --num-steps 4 --eval-episodes 8".split()
# kind: name to ask for, name it has, flags. The flags beside the tasks' own let one run test several things.
TASKS = {
    "cartpole": ("Isaac-Cartpole-Direct", "Isaac-Cartpole-Direct", "--stop-kl 0.01"),
    "ant": ("Isaac-Ant-Direct", "Isaac-Ant-Direct", "--schedule linear --normalize-returns True"),
    "humanoid": ("Isaac-Humanoid-Direct-v0", "Isaac-Humanoid-Direct", "--mixed-precision"),
    "reach": ("Isaac-Reach-Franka", "Isaac-Reach-Franka", "--recurrent --normalize-obs True --normalize-returns True"),
    "lift": ("Isaac-Lift-Cube-Franka-v0", "Isaac-Lift-Franka", ""),
    "drawer": ("Isaac-Open-Drawer-Franka-v0", "Isaac-Open-Drawer-Franka", "--recurrent --mixed-precision"),
    "stack": ("Isaac-Stack-Cube-Franka-IK-Rel-v0", "IsaacContrib-Stack-Cube-Franka-IK-Rel", ""),
}
OVERRIDES = {  # what a CPU needs to be fast
    "lift": (
        "env.sim.physics.collision_cfg.rigid_contact_max=10000",
        "env.events.conditional_reset.params.buffer_size_per_group=4",
    ),
    "stack": ("env.sim.physics.solver_cfg.cone=pyramidal",),
}


@pytest.fixture(autouse=True, scope="module")
def stand_ins():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ISAACSIM_ASSET_ROOT", str(assets.mirror()))
        yield


def ppo(folder: Path, *flags: str, **kwargs) -> str:
    """Runs ppo_isaac.py to its end and returns what it printed; never a traceback."""
    return run(folder, *flags, script="ppo_isaac.py", **kwargs)


def refused(folder: Path, *flags: str) -> str:
    """Runs ppo_isaac.py, which must refuse, and returns its one line."""
    process = start(folder, *flags, script="ppo_isaac.py")
    out, err = process.communicate(timeout=300)
    lines = [line for line in err.splitlines() if line.strip()]
    assert process.returncode not in (0, None) and len(lines) == 1 and lines[0].startswith("error: "), out[-2000:] + err[-2000:]
    return lines[0]


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def check_healthy(run_dir: Path, iterations: int, tolerance: float = 1e-3) -> list[dict]:
    """All rows are there and finite, and rollout and update agree on the policy of the first minibatch."""
    rows = metrics(run_dir)
    assert [row["iteration"] for row in rows] == list(range(iterations))
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
        assert {"update/loss", "update/policy_loss", "update/value_loss", "update/kl", "update/entropy"} <= row.keys()
        assert row["update/first_ratio_error"] < tolerance, row
    return rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that trains on a kind of task, once: (folder, what it printed); the run is runs/whole."""

    @functools.cache
    def train(kind: str) -> tuple[Path, str]:
        folder, (asked, _, flags) = tmp_path_factory.mktemp(kind), TASKS[kind]
        short = "env.episode_length_s=0.2"
        common = ["--task", asked, "--exp-name", "whole", "--iterations", "4", "--save-every", "2", *SMALL, *flags.split()]
        return folder, ppo(folder, *common, "--overrides", short, *OVERRIDES.get(kind, ()))

    return train


@pytest.mark.parametrize("kind", TASKS)
def test_stock_task_trains(trained, kind):
    folder, out = trained(kind)
    asked, name, _ = TASKS[kind]
    rows = check_healthy(folder / "runs/whole", 4, 0.05 if kind in ("humanoid", "drawer") else 1e-3)
    assert sum(row["rollout/episodes"] for row in rows) > 0
    assert (f"{asked} is called {name} in this Isaac Lab" in out) == (asked != name)
    result = summary(folder / "runs/whole")
    assert result["task"] == name and result["env_steps"] == 4 * 8 * 4 and math.isfinite(result["eval"]["mean"])


@pytest.mark.parametrize("kind", TASKS)
def test_resumed_equals_uninterrupted(trained, kind, tmp_path):
    """A run that was killed before its last checkpoint goes on in a new process, to the very same bits."""
    folder, _ = trained(kind)
    shutil.copytree(folder / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/whole/checkpoints/step_000004")
    (tmp_path / "runs/whole/summary.json").unlink()
    ppo(tmp_path, "--resume", "runs/whole")
    weights = [(path / "runs/whole/checkpoints/step_000004/policy.safetensors").read_bytes() for path in (folder, tmp_path)]
    assert weights[0] == weights[1]
    assert metrics(tmp_path / "runs/whole") == metrics(folder / "runs/whole")
    assert summary(tmp_path / "runs/whole")["eval"] == summary(folder / "runs/whole")["eval"]


def test_a_task_without_rewards_pays_for_success(trained):
    assert "has no rewards: success earns 1" in trained("stack")[1]
    assert "has no rewards" not in trained("lift")[1]


def test_the_learning_rate_falls_linearly(trained):
    rates = [row["update/learning_rate"] for row in metrics(trained("ant")[0] / "runs/whole")]
    assert rates == pytest.approx([5e-4 * share for share in (1, 0.75, 0.5, 0.25)])


def test_saved_policy_evaluates_to_the_same_return(trained):
    """The flags of the run are needed again, those of the network are not."""
    folder, _ = trained("reach")
    flags = "--evaluate --checkpoint runs/whole/checkpoints/step_000004 --exp-name again --overrides env.episode_length_s=0.2"
    ppo(folder, *SMALL, *flags.split())
    assert summary(folder / "runs/again")["eval"] == summary(folder / "runs/whole")["eval"]


def test_policy_of_another_task_is_refused(trained):
    line = refused(trained("cartpole")[0], "--checkpoint", "runs/whole/checkpoints/best", "--task", "Isaac-Ant-Direct", *SMALL)
    assert "--checkpoint runs/whole/checkpoints/best: a policy for Isaac-Cartpole-Direct, not for --task" in line


@pytest.mark.parametrize("space", ["box_discrete", "box_multidiscrete"])
def test_actions_by_number(space, tmp_path):
    flags = f"--task IsaacContrib-Cartpole-Showcase-Direct --iterations 2 --exp-name x --overrides presets={space}"
    ppo(tmp_path, *SMALL, *flags.split(), "env.episode_length_s=0.2")
    rows = check_healthy(tmp_path / "runs/x", 2)
    choices = {"box_discrete": [3], "box_multidiscrete": [3, 2]}[space]
    most = sum(map(math.log, choices))
    assert 0.9 * most < rows[0]["update/entropy"] <= most  # nearly uniform at first
    spaces = json.loads((tmp_path / "runs/x/checkpoints/best/policy.json").read_text())["spaces"]
    assert spaces["choices"] == choices and spaces["continuous"] == 0
    assert math.isfinite(summary(tmp_path / "runs/x")["eval"]["mean"])


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_networks_train(tmp_path):
    ppo(tmp_path, *SMALL, *"--compile --iterations 2 --exp-name x --overrides env.episode_length_s=0.2".split())
    check_healthy(tmp_path / "runs/x", 2)


def test_policy_is_filmed(tmp_path):
    from PIL import Image

    ppo(tmp_path, *SMALL, *"--capture-video --iterations 1 --exp-name x --overrides env.episode_length_s=0.2".split())
    with Image.open(tmp_path / "runs/x/videos/policy.gif") as film:
        assert film.n_frames > 3
        colours = film.convert("RGB").getcolors(1 << 20)
    assert len(colours) > 4  # more than a border and a background


def test_two_ranks_train(tmp_path):
    """torchrun splits environments; one run folder and one log, written by rank 0."""
    out = ppo(tmp_path, *SMALL, *"--iterations 2 --exp-name two".split(), port=29517)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["two"]
    check_healthy(tmp_path / "runs/two", 2)
    result = summary(tmp_path / "runs/two")
    assert result["world_size"] == 2 and result["env_steps"] == 2 * 8 * 4 and result["eval"]["episodes"] == 8
    assert len(re.findall("^iteration 1/2 ", out, re.M)) == 1
