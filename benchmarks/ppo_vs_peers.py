"""ppo_isaac.py beside rsl_rl, skrl and rl_games on Isaac Lab tasks: speed, overhead, learning curves.

    python benchmarks/ppo_vs_peers.py --task Isaac-Cartpole-Direct --num-envs 512 --iterations 150 --seeds 1 2 3
    python benchmarks/ppo_vs_peers.py --task Isaac-Ant-Direct --same-settings      # ours at rsl_rl's network and batch
    python benchmarks/ppo_vs_peers.py --report runs/ppo_vs_peers/<time>            # table and plot again, no runs

rsl_rl comes with Isaac Lab. The others go beside it without changing a pinned version (rl-games declares psutil < 6 and
gymnasium's classic-control extra; it uses neither here, hence --no-deps):

    pip install skrl==2.1.1
    pip install --no-deps rl-games==1.6.5 && pip install setproctitle tensorboardX watchdog

What is compared
- Every library runs the task's own registered settings through Isaac Lab's own wrapper, in a process of its own, one
  after the other, interleaved by seed. --iterations counts rsl_rl's; the others get the same number of env steps.
- Their loggers and checkpoints are off. rl_games' TensorBoard file stays (it cannot be switched off); its minibatch size,
  an absolute number for 4096 environments, is scaled to keep the number of minibatches; it takes OMP_NUM_THREADS like the
  others instead of up to 4 threads; on a CPU its torch.compile is off, which recompiles for minutes there and gains nothing.

How it is measured
- From outside and the same for all: `gym.make` returns the environment inside `Recorder`. A row is written every T
  vectorised steps, T = the library's rollout length. The recorder's clock stands still while it does its sums.
- Overhead of an iteration = its wall time - its time in `env.step`: inference, storage, advantages, update, logging.
  The first SKIP rows count for the curves only. An update is part of the row after it; the last one is in none.
  What a library has the environment compute besides (ppo_isaac: final observations) is env time.
- CPU: `env.step` is timed as it is. CUDA: asynchronous work cannot be told apart without waiting for it, and waiting
  slows a library that overlaps the two. So every second row waits for the device before and after each step: env time and
  overhead come from those rows, end-to-end speed from the others, and the wall clock to a return from both.
- ATEN_CPU_CAPABILITY=avx2 in front of the command where AVX-512 is there: torch's expm1, hence ELU, has been seen to run
  at one of two speeds, 14-fold apart, from process to process; with AVX2 it does not. The table names the kernels.
- Return = undiscounted sum of the environment's rewards over an episode, of the exploring policy, whatever scaling a
  library applies afterwards. Episodes begin at random ages where a library does so (rsl_rl's stock script does).
- Smoothed return at a row = mean over the episodes that ended in the last --window rollouts (of rsl_rl's length; the
  window is in env steps, the same for all). Best = its maximum. Reached = first row at or above 98% of the best of
  rsl_rl in any seed: best - 2% of |best|.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Library = Literal["ppo_isaac", "rsl_rl", "skrl", "rl_games"]
PACKAGES = {"rsl_rl": "rsl-rl-lib", "skrl": "skrl", "rl_games": "rl-games"}
REFERENCE = "rsl_rl"
SKIP = 3  # rows that warm up: kernels, caches, compilation
ASSETS = {"mirror": "stand-in assets", "nvidia": "NVIDIA's assets", "given": "assets of ISAACSIM_ASSET_ROOT"}


# ======== Args ========================================================================================================
@dataclass
class Args:
    task: str = "Isaac-Cartpole-Direct"  # registered Isaac Lab task
    libs: tuple[Library, ...] = ("ppo_isaac", "rsl_rl", "skrl", "rl_games")  # the order within a seed
    num_envs: int = 512  # parallel environments
    iterations: int = 150  # rollouts of rsl_rl's length; the others get as many env steps
    seeds: tuple[int, ...] = (1, 2, 3)
    device: str = "cpu"  # cpu, cuda or cuda:N
    threads: int | None = None  # OMP_NUM_THREADS of every run; None: as it is
    warmup: bool = True  # begin with 2 rollouts of rsl_rl that are thrown away: Isaac Lab compiles its kernels
    same_settings: bool = False  # ppo_isaac with rsl_rl's network, batch and coefficients instead of its own
    overrides: tuple[str, ...] = ()  # Isaac Lab's key=value overrides of the task, for every library
    window: int = 10  # rollouts of rsl_rl that a smoothed return covers
    out_dir: Path | None = None  # default: runs/ppo_vs_peers/<time>
    report: Path | None = None  # make table.md and curves.png of that folder again, and nothing else

    # one run in this process: what the script starts itself with
    worker: Library | None = None  # train this library
    seed: int = 1  # with this seed
    out: Path | None = None  # rows go here
    assets: str = "assets unknown"  # label of the results


# heavy imports come after the command line, so --help is instant
ARGS = tyro.cli(Args, description=__doc__) if __name__ == "__main__" else None

import gymnasium as gym
import torch


# ======== recorder ====================================================================================================
class Recorder(gym.Wrapper):
    """Times `env.step` and adds up episodes, whoever drives the environment.

    A step copies rewards and ends into (T, N) buffers on the device. Every T steps, with the clock stopped, they become
    episode returns and go to the host: one row for `write`.

    Args:
        env: vectorised, `step` -> (obs, reward (N,), terminated (N,), truncated (N,), extras), with automatic resets.
        T: steps per row.
        write: receives each row: iteration, env_steps, wall [s since the end of the first step, which loads kernels],
            env_seconds [s, None where the device was not waited for], synced, episodes, return_mean, length_mean [steps].
            The means are None where no episode ended.
        sync: waits for the device; None where work is synchronous.
        clock: seconds.
    """

    def __init__(
        self,
        env: gym.Env,
        T: int,
        write: Callable[[dict[str, Any]], None],
        sync: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        super().__init__(env)
        self.T, self.write, self.sync, self.clock = T, write, sync, clock
        self.rows = self.t = 0
        self.start: float | None = None
        self.paused = self.env_seconds = 0.0
        self.rewards: torch.Tensor | None = None

    def _allocate(self, like: torch.Tensor) -> None:
        with torch.inference_mode(False):  # made in inference mode, they could not be written outside it
            self.N = like.shape[0]
            self.rewards = torch.zeros(self.T, self.N, device=like.device)
            self.ends = torch.zeros(2, self.T, self.N, dtype=torch.bool, device=like.device)  # terminated, truncated
            self.returns = torch.zeros(self.N, dtype=torch.float64, device=like.device)
            self.lengths = torch.zeros(self.N, dtype=torch.float64, device=like.device)

    def reset(self, **kwargs):
        """A full reset ends running episodes without counting them; before the first row, everything begins anew."""
        out = self.env.reset(**kwargs)
        if self.rewards is not None:
            if not self.rows:
                self.t, self.env_seconds, self.start = 0, 0.0, None
            if self.t or kwargs.get("env_ids") is not None:
                raise RuntimeError("Recorder: reset in the middle of a rollout, or of some environments only")
            self.returns.zero_()
            self.lengths.zero_()
        return out

    def step(self, action):
        synced = self.sync is not None and self.rows % 2 == 1
        if synced:
            self.sync()
        before = self.clock()
        out = self.env.step(action)
        if synced:
            self.sync()
        _, reward, terminated, truncated, _ = out
        if self.start is None:
            self._allocate(reward)
            self.start = self.clock()
        else:
            self.env_seconds += self.clock() - before
        with torch.no_grad():
            self.rewards[self.t].copy_(reward)
            self.ends[0, self.t].copy_(terminated)
            self.ends[1, self.t].copy_(truncated)
        self.t += 1
        if self.t == self.T:
            if self.sync is not None:
                self.sync()  # the rollout's work belongs to this row
            now = self.clock()
            self._row(now - self.start - self.paused, synced)
            self.paused += self.clock() - now
        return out

    @torch.no_grad()
    def _row(self, wall: float, synced: bool) -> None:
        sums = torch.zeros(3, dtype=torch.float64, device=self.rewards.device)  # episodes, returns, lengths
        for reward, ended in zip(self.rewards, self.ends[0] | self.ends[1]):
            self.returns += reward
            self.lengths += 1
            sums += torch.stack([ended.double(), self.returns * ended, self.lengths * ended]).sum(1)
            self.returns.masked_fill_(ended, 0.0)
            self.lengths.masked_fill_(ended, 0.0)
        episodes, total, length = sums.tolist()  # the only transfer
        self.rows += 1
        self.write(
            {
                "iteration": self.rows,
                "env_steps": self.rows * self.T * self.N,
                "wall": wall,
                "env_seconds": self.env_seconds if self.sync is None or synced else None,
                "synced": synced,
                "episodes": int(episodes),
                "return_mean": total / episodes if episodes else None,
                "length_mean": length / episodes if episodes else None,
            }
        )
        self.t, self.env_seconds = 0, 0.0


# ======== workers =====================================================================================================
def importable(lib: str) -> bool:
    """Whether a library is there, without importing it."""
    return importlib.util.find_spec(lib) is not None


def env_cfg(args: Args):
    """The task's environment settings; the same for every library."""
    from tasks.stock import task_config

    cfg = task_config(args.task, args.device, args.num_envs, None, args.overrides, {})
    cfg.compute_final_obs = False  # which ppo_isaac asks for itself
    cfg.seed = args.seed
    return cfg


def registered(task: str, lib: str):
    """The settings that Isaac Lab registers for a task and a library (a copy: an object for rsl_rl, else a dict)."""
    import isaaclab_tasks  # noqa: F401
    from isaaclab_tasks.utils.hydra import resolve_presets
    from isaaclab_tasks.utils.parse_cfg import load_cfg_from_registry

    cfg = resolve_presets(load_cfg_from_registry(task, f"{lib}_cfg_entry_point"))
    if lib == "rsl_rl":
        from isaaclab_rl.rsl_rl import handle_deprecated_rsl_rl_cfg

        cfg = handle_deprecated_rsl_rl_cfg(cfg, importlib.metadata.version("rsl-rl-lib"))
    return cfg


def launcher(cfg, device: str):
    from isaaclab.app import launch_simulation

    return launch_simulation(cfg, argparse.Namespace(device=device, headless=True, enable_cameras=False))


class Plan(NamedTuple):
    """One run: its rollout length, the settings worth keeping, and the function that trains."""

    T: int
    settings: dict[str, Any]
    train: Callable[[int], None]  # of the number of iterations


def plan_rsl_rl(args: Args) -> Plan:
    """As Isaac Lab's stock train entry point, without a log folder."""
    agent = registered(args.task, "rsl_rl")
    agent.device, agent.seed = args.device, args.seed

    def train(iterations: int) -> None:
        from isaaclab.utils import to_dict
        from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper
        from rsl_rl.runners import OnPolicyRunner

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as the entry point does
        cfg = env_cfg(args)
        with launcher(cfg, args.device):
            env = RslRlVecEnvWrapper(gym.make(args.task, cfg=cfg), clip_actions=agent.clip_actions)
            runner = OnPolicyRunner(env, to_dict(agent), log_dir=None, device=args.device)
            runner.learn(num_learning_iterations=iterations, init_at_random_ep_len=True)
            env.close()

    return Plan(agent.num_steps_per_env, rsl_rl_settings(agent), train)


def rsl_rl_settings(agent) -> dict[str, Any]:
    """rsl_rl's settings under ppo_isaac's names.

    Two have no flag: rsl_rl clips the gradients of actor and critic apart, and normalises advantages over the rollout.

    Raises:
        ValueError: actor and critic differ, which ppo_isaac has no flags for.
    """
    actor, critic, a = agent.actor, agent.critic, agent.algorithm
    same = ("hidden_dims", "activation", "obs_normalization")
    if any(getattr(actor, name) != getattr(critic, name) for name in same):
        raise ValueError("--same-settings: rsl_rl's actor and critic differ here; ppo_isaac has one set of flags for both")
    return {
        "num_steps": agent.num_steps_per_env,
        "epochs": a.num_learning_epochs,
        "minibatches": a.num_mini_batches,
        "hidden": tuple(actor.hidden_dims),
        "activation": actor.activation,
        "learning_rate": a.learning_rate,
        "schedule": "adaptive" if a.schedule == "adaptive" else "constant",
        "target_kl": a.desired_kl,
        "gamma": a.gamma,
        "gae_lambda": a.lam,
        "entropy_coef": a.entropy_coef,
        "clip": a.clip_param,
        "clip_value": a.use_clipped_value_loss,
        "value_coef": 2 * a.value_loss_coef,  # ppo_isaac's value loss has the 1/2, rsl_rl's does not
        "max_grad_norm": a.max_grad_norm,
        "normalize_obs": actor.obs_normalization,
        "normalize_returns": False,
        "init_std": actor.distribution_cfg.init_std,
        "clip_actions": agent.clip_actions,
    }


def plan_ppo_isaac(args: Args) -> Plan:
    """This repository's script, with its own settings for the task or with rsl_rl's."""
    import ppo_isaac

    settings = rsl_rl_settings(registered(args.task, "rsl_rl"))
    names, settings = list(settings), settings if args.same_settings else {}
    ours = dataclasses.replace(
        ppo_isaac.task_args(args.task),
        num_envs=args.num_envs,
        seed=args.seed,
        device=args.device,
        overrides=args.overrides,
        exp_name="run",
        eval_episodes=0,
        save_every=10**9,
        **settings,
    )

    def train(iterations: int) -> None:
        ours.iterations = iterations
        ppo_isaac.main(ours)

    return Plan(ours.num_steps, {name: getattr(ours, name) for name in names}, train)


def plan_skrl(args: Args) -> Plan:
    """As Isaac Lab's stock train entry point, without writer and checkpoints."""
    agent = registered(args.task, "skrl")
    agent["seed"] = args.seed
    agent["agent"]["experiment"] |= {"directory": str(Path.cwd()), "write_interval": 0, "checkpoint_interval": 0}
    T = agent["agent"]["rollouts"]

    def train(iterations: int) -> None:
        from isaaclab_rl.skrl import SkrlVecEnvWrapper
        from skrl.utils.runner.torch import Runner

        agent["trainer"] |= {"timesteps": iterations * T, "close_environment_at_exit": False, "disable_progressbar": True}
        cfg = env_cfg(args)
        with launcher(cfg, args.device):
            env = SkrlVecEnvWrapper(gym.make(args.task, cfg=cfg), ml_framework="torch")
            Runner(env, agent).run()
            env.close()

    return Plan(T, {"rollouts": T, "mini_batches": agent["agent"]["mini_batches"]}, train)


def plan_rl_games(args: Args) -> Plan:
    """As Isaac Lab's stock train entry point, without checkpoints."""
    agent = registered(args.task, "rl_games")
    agent["params"] |= {"seed": args.seed, "torch_threads": 0}  # 0: as the others, not up to 4 against OMP_NUM_THREADS
    config = agent["params"]["config"]
    T, minibatches = config["horizon_length"], max(1, config["horizon_length"] * 4096 // config["minibatch_size"])
    config |= {
        "device": args.device,
        "device_name": args.device,
        "num_actors": args.num_envs,
        "minibatch_size": T * args.num_envs // minibatches,
        "mixed_precision": config.get("mixed_precision", False) and args.device != "cpu",
        "torch_compile": args.device != "cpu",
        "train_dir": str(Path.cwd()),
        "full_experiment_name": "run",
        "print_stats": False,
        "save_frequency": 0,
        "save_best_after": 10**9,
    }

    def train(iterations: int) -> None:
        sys.modules.setdefault("gym", gym)  # Isaac Lab's wrapper wants the predecessor's spaces, rl_games gymnasium's
        sys.modules.setdefault("gym.spaces", gym.spaces)
        from isaaclab_rl.rl_games import RlGamesVecEnvWrapper, register_rl_games_env
        from rl_games.common.algo_observer import IsaacAlgoObserver
        from rl_games.torch_runner import Runner

        config["max_epochs"] = iterations
        cfg = env_cfg(args)
        with launcher(cfg, args.device):
            env = RlGamesVecEnvWrapper.from_agent_cfg(gym.make(args.task, cfg=cfg), agent)
            register_rl_games_env(env)
            runner = Runner(IsaacAlgoObserver())
            runner.load(agent)
            runner.reset()
            runner.run({"train": True, "play": False, "sigma": None})
            env.close()

    return Plan(T, {"horizon_length": T, "minibatches": minibatches}, train)


PLANS = {"ppo_isaac": plan_ppo_isaac, "rsl_rl": plan_rsl_rl, "skrl": plan_skrl, "rl_games": plan_rl_games}


def work(args: Args) -> None:
    """Trains one library with one seed; its rows go to `args.out`, behind a line that says what ran where."""
    plan = PLANS[args.worker](args)
    budget = args.iterations * registered(args.task, REFERENCE).num_steps_per_env  # vectorised steps
    iterations = math.ceil(budget / plan.T)
    cuda = args.device.startswith("cuda")
    meta = {
        "lib": args.worker,
        "version": importlib.metadata.version(PACKAGES[args.worker]) if args.worker in PACKAGES else "",
        "task": args.task,
        "seed": args.seed,
        "num_envs": args.num_envs,
        "T": plan.T,
        "iterations": iterations,
        "same_settings": args.same_settings,
        "settings": plan.settings,
        "assets": args.assets,
        "machine": machine(args.device),
        "command": shlex.join(sys.orig_argv),
    }
    with open(args.out, "w", encoding="utf-8") as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        make, recorders = gym.make, []

        def recorded(*a, **k):
            sync = (lambda: torch.cuda.synchronize(args.device)) if cuda else None
            recorders.append(Recorder(make(*a, **k), plan.T, write, sync))
            return recorders[-1]

        gym.make = recorded
        write({"meta": meta})
        plan.train(iterations)
        if [r.rows for r in recorders] != [iterations]:
            raise RuntimeError(f"{args.worker}: rows per environment {[r.rows for r in recorders]}, expected [{iterations}]")
        write({"done": True})


def machine(device: str) -> str:
    """CPU, cores, torch, its kernels and threads, GPU, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        cpu = platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    kernels = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{cpu}, {os.cpu_count()} cores, torch {torch.__version__} ({kernels}, {threads} threads){gpu}"


# ======== report ======================================================================================================
class Run(NamedTuple):
    """One finished run, as read from its file."""

    meta: dict[str, Any]
    rows: list[dict[str, Any]]


class Point(NamedTuple):
    """Smoothed return after so many env steps and seconds."""

    env_steps: int
    wall: float
    value: float


def load(folder: Path) -> dict[str, list[Run]]:
    """Finished runs by library, in the order of `PLANS` and of the seeds."""
    found: dict[str, list[Run]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if not lines or "meta" not in lines[0] or not lines[-1].get("done"):
            print(f"{path.name}: not finished, left out")
            continue
        found.setdefault(lines[0]["meta"]["lib"], []).append(Run(lines[0]["meta"], lines[1:-1]))
    return {lib: sorted(found[lib], key=lambda run: run.meta["seed"]) for lib in PLANS if lib in found}


def window_rows(window: int, T: int, reference_T: int) -> int:
    """Rows of T steps that cover `window` rollouts of the reference."""
    return max(1, round(window * reference_T / T))


def smooth(rows: list[dict[str, Any]], k: int) -> list[Point]:
    """Mean return of the episodes that ended in the last k rows; no point before k rows, or without an episode."""
    k = min(k, len(rows))
    points = []
    for i in range(k, len(rows) + 1):
        ended = [row for row in rows[i - k : i] if row["episodes"]]
        if ended:
            n = sum(row["episodes"] for row in ended)
            mean = sum(row["episodes"] * row["return_mean"] for row in ended) / n
            points.append(Point(rows[i - 1]["env_steps"], rows[i - 1]["wall"], mean))
    return points


def reach(points: list[Point], target: float) -> Point | None:
    """First point at or above the target."""
    return next((point for point in points if point.value >= target), None)


class Speed(NamedTuple):
    """Per row after the first SKIP [s]; the lists may differ in length (see Recorder)."""

    env: list[float]  # in env.step
    wall: list[float]  # of the whole iteration
    overhead: list[float]  # the difference


def speed(rows: list[dict[str, Any]]) -> Speed:
    skip = min(SKIP, len(rows) - 2)
    out = Speed([], [], [])
    for before, row in list(zip(rows, rows[1:]))[max(skip - 1, 0) :]:
        wall = row["wall"] - before["wall"]
        if not row["synced"]:
            out.wall.append(wall)
        if row["env_seconds"] is not None:
            out.env.append(row["env_seconds"])
            out.overhead.append(wall - row["env_seconds"])
    return out


def number(x: float) -> str:
    """Four significant digits, thousands grouped."""
    digits = 3 - math.floor(math.log10(abs(x))) if x else 0
    return f"{round(x, digits):,.{max(digits, 0)}f}"


def per_seed(found: list[Point | None], text: Callable[[Point], str]) -> str:
    return ", ".join("not reached" if point is None else text(point) for point in found)


def label(run: Run) -> str:
    lib, version = run.meta["lib"], run.meta["version"]
    return f"{lib} {version}".strip() + (" (rsl_rl's settings)" if lib == "ppo_isaac" and run.meta["same_settings"] else "")


def curves(runs: dict[str, list[Run]], window: int) -> dict[str, list[list[Point]]]:
    """Smoothed curves of every library and seed; the window is the same in env steps."""
    first = {lib: group[0].meta["T"] for lib, group in runs.items()}
    T = first.get(REFERENCE)
    return {
        lib: [smooth(run.rows, window_rows(window, first[lib], T or first[lib])) for run in group]
        for lib, group in runs.items()
    }


def table(runs: dict[str, list[Run]], window: int) -> str:
    """The comparison in markdown."""
    smoothed = curves(runs, window)
    best = {lib: max((p.value for points in group for p in points), default=None) for lib, group in smoothed.items()}
    target = None if best.get(REFERENCE) is None else best[REFERENCE] - 0.02 * abs(best[REFERENCE])
    speeds = {lib: [speed(run.rows) for run in group] for lib, group in runs.items()}

    def pooled(lib: str, what: str) -> float:
        return statistics.median(x for s in speeds[lib] for x in getattr(s, what))

    def overhead(lib: str) -> float:  # per env step: rollout lengths differ
        return pooled(lib, "overhead") / runs[lib][0].meta["T"]

    meta = next(iter(runs.values()))[0].meta
    reached = f"{number(target)}" if target is not None else f"98% of {REFERENCE}'s best"
    lines = [
        f"{meta['task']}, N = {meta['num_envs']:,}, {meta['assets']}",
        "",
        "| library | seeds | T | env only, steps/s | end to end, steps/s | overhead, ms per iteration (seeds' medians) "
        f"| overhead per step against {REFERENCE} | best return | final return "
        f"| env steps to {reached} | seconds to {reached} |",
        "|" + "---|" * 11,
    ]
    for lib, group in runs.items():
        steps = group[0].meta["T"] * group[0].meta["num_envs"]
        medians = [statistics.median(s.overhead) * 1e3 for s in speeds[lib]]
        final = [points[-1].value for points in smoothed[lib] if points]
        spread = f" ± {number(statistics.stdev(final))}" if len(final) > 1 else ""
        found = [reach(points, target) if target is not None else None for points in smoothed[lib]]
        ratio = f"{overhead(lib) / overhead(REFERENCE):.2f}x" if REFERENCE in runs else "-"
        lines.append(
            f"| {label(group[0])} | {', '.join(str(run.meta['seed']) for run in group)} | {group[0].meta['T']} "
            f"| {number(steps / pooled(lib, 'env'))} | {number(steps / pooled(lib, 'wall'))} "
            f"| {number(pooled(lib, 'overhead') * 1e3)} ({number(min(medians))}-{number(max(medians))}) | {ratio} "
            f"| {number(best[lib]) if best[lib] is not None else '-'} "
            f"| {number(statistics.mean(final)) + spread if final else '-'} "
            f"| {per_seed(found, lambda p: f'{p.env_steps:,}')} | {per_seed(found, lambda p: f'{p.wall:.1f}')} |"
        )
    lines += [
        "",
        f"Speeds and overhead: medians over iterations and seeds, the first {SKIP} rows left out. Returns: mean over the "
        f"episodes of the last {window} rollouts; final: mean ± standard deviation over seeds. The last two columns: the "
        f"first time at 98% of the best return of {REFERENCE} in any seed, per seed.",
    ]
    return "\n".join(lines) + "\n"


def plot(runs: dict[str, list[Run]], window: int, path: Path) -> None:
    """Return against env steps and against the wall clock: mean and min-max band over seeds, thin lines per seed."""
    import numpy as np
    from matplotlib.figure import Figure  # no pyplot: no global state, Agg without asking

    meta = next(iter(runs.values()))[0].meta
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    figure.suptitle(f"{meta['task']}, N = {meta['num_envs']:,}, {meta['assets']}")
    for i, (lib, group) in enumerate(curves(runs, window).items()):
        group = [points for points in group if points]
        for ax, axis in zip(axes, ("env_steps", "wall")):
            lines = [([getattr(p, axis) for p in points], [p.value for p in points]) for points in group]
            for x, y in lines:
                ax.plot(x, y, color=f"C{i}", lw=0.6, alpha=0.5)
            low, high = max((x[0] for x, _ in lines), default=0), min((x[-1] for x, _ in lines), default=0)
            if low < high:  # where every seed has a value
                grid = np.linspace(low, high, 400)
                values = np.stack([np.interp(grid, x, y) for x, y in lines])
                ax.plot(grid, values.mean(0), color=f"C{i}", lw=1.8, label=label(runs[lib][0]))
                ax.fill_between(grid, values.min(0), values.max(0), color=f"C{i}", alpha=0.15, lw=0)
    for ax, text in zip(axes, ("env steps", "wall clock [s]")):
        ax.set(xlabel=text)
        ax.grid(alpha=0.3)
    axes[0].set(ylabel=f"return, mean over {window} rollouts")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def report(folder: Path, window: int) -> None:
    """table.md and curves.png from the rows in a folder."""
    runs = load(folder)
    if not runs:
        sys.exit(f"{folder}: no finished run")
    group = next(iter(runs.values()))
    command = (folder / "command.txt").read_text().strip() if (folder / "command.txt").exists() else ""
    text = table(runs, window) + f"\n{group[0].meta['machine']}\n" + (f"\n    {command}\n" if command else "")
    (folder / "table.md").write_text(text, encoding="utf-8")
    plot(runs, window, folder / "curves.png")
    print(f"\n{text}\n{folder / 'table.md'}, {folder / 'curves.png'}")


# ======== main ========================================================================================================
def available(libs: tuple[str, ...]) -> list[str]:
    """The libraries that can run; says once which cannot."""
    for lib in libs:
        if not importable(lib):
            print(f"{lib}: not installed, skipped" if lib != "ppo_isaac" else "ppo_isaac.py: not found, skipped")
    return [lib for lib in libs if importable(lib)]


def main(args: Args) -> None:
    if args.worker:
        return work(args)
    if args.report:
        return report(args.report, args.window)
    from tests.assets import STAMP, use

    source = use()
    if source == "given" and (Path(os.environ["ISAACSIM_ASSET_ROOT"]) / STAMP).is_file():
        source = "mirror"
    assets = ASSETS[source]
    folder = (args.out_dir or Path("runs") / "ppo_vs_peers" / time.strftime("%Y%m%d-%H%M%S")).resolve()
    if list(folder.glob("*.jsonl")):
        sys.exit(f"--out-dir {folder}: holds runs already; take another one, or --report it")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "command.txt").write_text(shlex.join(["python", *sys.argv]) + "\n")
    env = os.environ | {"WANDB_MODE": "disabled"} | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})
    libs = available(args.libs)

    def run(lib: str, seed: int, iterations: int, out: Path) -> None:
        scratch = folder / "scratch" / out.stem
        scratch.mkdir(parents=True)
        flags = f"--task {args.task} --num-envs {args.num_envs} --device {args.device} --iterations {iterations} --seed {seed}"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", lib, *flags.split()]
        command += ["--out", str(out), "--assets", assets, *(["--same-settings"] if args.same_settings else [])]
        command += ["--overrides", *args.overrides] if args.overrides else []
        print(f"{out.stem} ...", end=" ", flush=True)
        start, log = time.monotonic(), folder / f"{out.stem}.log"
        with open(log, "w", encoding="utf-8") as file:
            code = subprocess.run(command, cwd=scratch, env=env, stdout=file, stderr=subprocess.STDOUT).returncode
        print(f"{time.monotonic() - start:.0f} s" + (f", FAILED ({code}): see {log}" if code else ""), flush=True)

    if args.warmup and importable(REFERENCE):
        run(REFERENCE, 0, 2, folder / "scratch" / "warmup.jsonl")
    for seed in args.seeds:
        for lib in libs:
            run(lib, seed, args.iterations, folder / f"{lib}-s{seed}.jsonl")
    report(folder, args.window)


if __name__ == "__main__":
    main(ARGS)
