"""Environment steps per second of Newton's tasks on a CPU: Warp's kernels against C MuJoCo, random actions.

python benchmarks/physics.py                 # a table; one process per measurement, the two interleaved
ISAACSIM_ASSET_ROOT=$(python tests/assets.py) python benchmarks/physics.py --threads 1 2    # with stand-in assets
"""

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass
class Args:
    """How fast a CPU steps Newton's tasks."""

    tasks: tuple[str, ...] = (
        "Isaac-Ant-Direct:64", "Isaac-Humanoid-Direct:64", "Isaac-Open-Drawer-Franka:64",
        "gr00t/IsaacContrib-Stack-Cube-Franka-IK-Rel-Visuomotor:32",
    )  # fmt: skip
    """Tasks and numbers of environments; `gr00t/`: a row of tasks/gr00t.py, as the GR00T scripts step it, without images."""
    threads: tuple[int, ...] = (1,)  # of PyTorch and of C MuJoCo
    repeats: int = 3  # processes per figure, which is their median
    seconds: float = 5.0  # of stepping that are timed, after three steps
    physics: str | None = None  # measures this one in this process, and prints the rate


def measure(task: str, num_envs: int, physics: str, threads: int, seconds: float) -> float:
    """Environment steps per second, Isaac Lab's managers included."""
    import tempfile

    import gymnasium as gym
    import torch

    from tasks import gr00t, stock

    torch.set_num_threads(threads)
    name, row = task.removeprefix("gr00t/"), task.startswith("gr00t/")
    if row:
        cfg, gym_id = gr00t.task_config(name, "cpu", num_envs, 64, physics, None), gr00t.TASKS[name].isaac or name
    else:
        cfg, gym_id = stock.task_config(name, "cpu", num_envs, physics, (), {}), name
    with stock.start_simulator(cfg, "cpu", row, Path(tempfile.mkdtemp()) / "simulator.log") as ready:
        env = gym.make(gym_id, cfg=cfg).unwrapped
        env.reset(seed=0)
        ready()
        steps, start = -3, 0.0
        while steps <= 0 or time.perf_counter() - start < seconds:
            if steps == 0:
                start = time.perf_counter()
            env.step(torch.rand(num_envs, env.single_action_space.shape[0]) * 2 - 1)
            steps += 1
        return num_envs * steps / (time.perf_counter() - start)


if __name__ == "__main__":
    args = tyro.cli(Args)
    jobs = [(task, threads) for task in args.tasks for threads in args.threads]
    if args.physics:
        for task, threads in jobs:
            print(f"rate {measure(*task.split(':')[:1], int(task.split(':')[1]), args.physics, threads, args.seconds):.1f}")
        sys.exit()
    print("| task:environments | threads | Warp | C MuJoCo | ratio |\n|---|---|---|---|---|")
    for task, threads in jobs:
        rates: dict[str, list[float]] = {"newton_mjwarp": [], "mujoco_c": []}
        for _ in range(args.repeats):
            for physics, found in rates.items():
                command = [sys.executable, __file__, "--tasks", task, "--threads", str(threads), "--physics", physics]
                out = subprocess.run([*command, "--seconds", str(args.seconds)], capture_output=True, text=True, check=True)
                found.append(float(out.stdout.split("rate ")[1].split()[0]))
        warp, c = (statistics.median(found) for found in rates.values())
        print(f"| {task} | {threads} | {warp:,.0f} | {c:,.0f} | {c / warp:.1f} |", flush=True)
