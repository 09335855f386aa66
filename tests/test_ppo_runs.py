"""Whole runs of ppo_isaac.py, by its command line: Isaac Lab's own tasks on a CPU, with stand-in assets.

Episodes are cut to a few steps, so that the shortest rollouts hold time-outs, resets and a whole evaluation.
"""

import functools
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests import assets, warm

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port")
SMALL = "--device cpu --num-envs 8 --num-steps 4 --eval-episodes 8".split()
# kind: name to ask for, name it has, flags. The flags beside the tasks' own let one run test several things.
TASKS = {
    "cartpole": ("Isaac-Cartpole-Direct", "Isaac-Cartpole-Direct", ""),
    "ant": ("Isaac-Ant-Direct", "Isaac-Ant-Direct", "--schedule linear --normalize-returns"),
    "humanoid": ("Isaac-Humanoid-Direct-v0", "Isaac-Humanoid-Direct", "--mixed-precision"),
    "reach": ("Isaac-Reach-Franka", "Isaac-Reach-Franka", "--recurrent --normalize-obs"),
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


def start(folder: Path, *flags: str, script: str = "ppo_isaac.py", port: int | None = None):
    """Starts a script in a folder of its own; with a port as two ranks, by torchrun."""
    env = os.environ | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
    launcher = (*TORCHRUN, str(port)) if port else ()
    return warm.start([*launcher, str(ROOT / script), *flags], folder, env, cold=port is not None)


def ppo(folder: Path, *flags: str, **kwargs) -> str:
    """Runs a script to its end and returns what it printed."""
    out, err = (process := start(folder, *flags, **kwargs)).communicate(timeout=900)
    assert process.returncode == 0, out[-3000:] + err[-3000:]
    return out


def metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("sps/", "time/"))} for row in rows]


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


SHORT = ("--overrides", "env.episode_length_s=0.2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A function that trains on a kind of task, once: (folder, what it printed); the run is runs/whole."""

    @functools.cache
    def train(kind: str) -> tuple[Path, str]:
        folder, (asked, _, flags) = tmp_path_factory.mktemp(kind), TASKS[kind]
        common = ["--task", asked, "--exp-name", "whole", "--iterations", "4", "--save-every", "2", *SMALL, *flags.split()]
        return folder, ppo(folder, *common, *SHORT, *OVERRIDES.get(kind, ()))

    return train


def check_resume(folder: Path, resumed: Path) -> None:
    weights = [(path / "runs/whole/checkpoints/step_000004/policy.safetensors").read_bytes() for path in (folder, resumed)]
    same = weights[0] == weights[1]
    assert same  # pytest would look for the differences of megabytes, for hours
    assert metrics(resumed / "runs/whole") == metrics(folder / "runs/whole")
    assert summary(resumed / "runs/whole")["eval"] == summary(folder / "runs/whole")["eval"]


def test_killed_and_resumed_equals_uninterrupted(trained, tmp_path):
    """By SIGKILL, right after a checkpoint; goes on in a new process, to the very same bits."""
    folder, out = trained("cartpole")
    check_healthy(folder / "runs/whole", 4)
    result = summary(folder / "runs/whole")
    assert "deterministic policy: return" in out and "is called" not in out
    assert result["env_steps"] == 4 * 8 * 4 and math.isfinite(result["eval"]["mean"])
    flags = ["--exp-name", "whole", "--iterations", "4", "--save-every", "2", *SMALL, *SHORT]
    process, deadline = start(tmp_path, *flags), time.monotonic() + 300
    while not (tmp_path / "runs/whole/checkpoints/step_000002").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(tmp_path / "runs/whole/checkpoints/step_000004", ignore_errors=True)  # it may have been quick
    ppo(tmp_path, "--resume", "runs/whole")
    check_resume(folder, tmp_path)


def test_saved_policy_evaluates_to_the_same_return(trained):
    """The flags of the run are needed again, those of the network are not."""
    folder, _ = trained("cartpole")
    flags = "--evaluate --checkpoint runs/whole/checkpoints/step_000004 --exp-name again".split()
    ppo(folder, *SMALL, *flags, *SHORT)
    assert summary(folder / "runs/again")["eval"] == summary(folder / "runs/whole")["eval"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(TASKS)[1:])
def test_stock_task_trains_and_resumes(trained, kind, tmp_path):
    """From the checkpoint in the middle, as if the run had been killed before the last one."""
    folder, out = trained(kind)
    asked, name, _ = TASKS[kind]
    rows = check_healthy(folder / "runs/whole", 4, 0.05 if kind in ("humanoid", "drawer") else 1e-3)
    assert sum(row["rollout/episodes"] for row in rows) > 0
    assert (f"{asked} is called {name} in this Isaac Lab" in out) == (asked != name)
    assert ("has no rewards: success earns 1" in out) == (kind == "stack")
    result = summary(folder / "runs/whole")
    assert result["task"] == name and result["env_steps"] == 4 * 8 * 4 and math.isfinite(result["eval"]["mean"])
    if kind == "ant":
        assert [row["update/learning_rate"] for row in rows] == pytest.approx([5e-4 * x for x in (1, 0.75, 0.5, 0.25)])
    shutil.copytree(folder / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/whole/checkpoints/step_000004")
    (tmp_path / "runs/whole/summary.json").unlink()
    ppo(tmp_path, "--resume", "runs/whole")
    check_resume(folder, tmp_path)


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_networks_train_and_are_filmed(tmp_path):
    from PIL import Image

    ppo(tmp_path, *SMALL, *"--compile --capture-video --iterations 2 --exp-name x".split(), *SHORT)
    check_healthy(tmp_path / "runs/x", 2)
    with Image.open(tmp_path / "runs/x/videos/policy.gif") as film:
        assert film.n_frames > 3
        colours = film.convert("RGB").getcolors(1 << 20)
    assert len(colours) > 4  # more than a border and a background


@pytest.mark.slow
def test_two_ranks_train(tmp_path):
    """torchrun splits environments; one run folder and one log, written by rank 0."""
    out = ppo(tmp_path, *SMALL, *"--iterations 2 --exp-name two".split(), port=29517)
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["two"]
    check_healthy(tmp_path / "runs/two", 2)
    result = summary(tmp_path / "runs/two")
    assert result["world_size"] == 2 and result["env_steps"] == 2 * 8 * 4 and result["eval"]["episodes"] == 8
    assert len(re.findall("^iteration 1/2 ", out, re.M)) == 1
