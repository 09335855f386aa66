"""SFT alone, three kinds of GRPO and four of PPO on GR00T: success against episodes and against wall clock, over seeds.

    python benchmarks/ppo_vs_grpo.py                             # the embedded task, the shipped tiny checkpoint, a CPU
    python benchmarks/ppo_vs_grpo.py --methods grpo ppo --seeds 1 2 3 4 5 --checkpoint <folder>
    python benchmarks/ppo_vs_grpo.py --report runs/ppo_vs_grpo/<time>        # table and plot again, no runs

How it is measured
- Every run is a script of this repo in a process of its own, as a user starts it, with its own defaults; the number of
  episodes is the same for all. Runs come interleaved by seed: what disturbs the machine disturbs all methods.
- Success is the ODE's (the deterministic sampler's) on the same fixed episodes every time, which start from a seed that
  no setting was chosen on. Intervals are Wilson's, 95%, of the seeds' episodes together; they share the starts, so the
  spread over seeds is given as well.
- "Biggest drop": the largest fall between an evaluation and a later one of the same run.
- Seconds are those of training with its evaluations: without the start of the simulator, and what comes before and after.
- With --jobs above 1 runs share the machine: seconds are then for a share of it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

UNFREEZE = "--lora-targets dit-attention dit-feed-forward vl-attention llm-attention vision-attention"
# name: (script, flags)
METHODS: dict[str, tuple[str, str]] = {
    "sft": ("grpo_gr00t.py", "--evaluate"),
    "grpo": ("grpo_gr00t.py", ""),
    "grpo-lora": ("grpo_gr00t_lora.py", "--lora-targets dit-attention dit-feed-forward vl-attention --unfreeze head vl"),
    "grpo-unfreeze": ("grpo_gr00t_lora.py", "--unfreeze head vl:13.4% llm:26.7%:2e-4 vision:40%:2e-4"),  # its defaults at 150
    "ppo": ("ppo_gr00t_frozen.py", ""),
    "ppo-privileged": ("ppo_gr00t_frozen.py", "--critic-obs privileged"),
    "ppo-lora": ("ppo_gr00t_lora.py", ""),
    "ppo-unfreeze": ("ppo_gr00t_lora.py", f"{UNFREEZE} --unfreeze critic head:3 vl:20% llm:40%:1e-4 vision:60%:1e-4"),
}


@dataclass
class Args:
    methods: tuple[str, ...] = tuple(METHODS)  # the order within a seed
    seeds: tuple[int, ...] = (1, 2, 3)  # of training
    iterations: int = 150  # of --num-envs episodes each
    num_envs: int = 128  # parallel environments
    task: str = "Tabletop-Lift-Cube-v0"  # of every run
    checkpoint: str = str(ROOT / "checkpoints" / "tiny")  # the warm start
    device: str = "auto"  # cpu, cuda or auto
    eval_episodes: int = 256  # per evaluation
    eval_every: int = 15  # iterations between evaluations
    eval_seed: int = 9_000_000  # of the evaluation's starts
    jobs: int = 1  # runs at a time
    out: Path | None = None  # runs go here (default: runs/ppo_vs_grpo/<time>); what is there already is kept
    report: Path | None = None  # only write table and plot of such a folder
    extra: dict[str, str] = field(default_factory=dict)  # more flags for a method, as --extra ppo "--clip 0.1"


def command(args: Args, method: str, seed: int) -> list[str]:
    """What a user would type."""
    script, flags = METHODS[method]
    flags = f"{flags} {args.extra.get(method, '')}".split()
    for i, flag in enumerate(flags):  # stages of an unfreezing schedule, in shares of the run
        name, _, rest = flag.partition(":")
        share, _, rate = rest.partition(":")
        if share.endswith("%"):
            start = round(args.iterations * float(share[:-1]) / 100)
            flags[i] = f"{name}:{start}" + (f":{rate}" if rate else "")
    same = {"task": args.task, "checkpoint": args.checkpoint, "device": args.device, "num-envs": args.num_envs}
    same |= {"seed": seed, "eval-episodes": args.eval_episodes, "eval-seed": args.eval_seed, "exp-name": f"{method}-s{seed}"}
    if "--evaluate" not in flags:
        same |= {"iterations": args.iterations, "eval-every": args.eval_every, "save-every": args.iterations}
    own = [x for name, value in same.items() for x in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / script), *own, *flags]


def finished(folder: Path) -> dict | None:
    """The summary of a run that came to its end: a part of it is there before."""
    file = folder / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    return summary if summary.keys() & {"ode_success", "ode_success_after"} else None


def run_all(args: Args, out: Path) -> None:
    """Runs what is not finished, `jobs` at a time, from its beginning; stops at the first failure."""
    todo = [(m, s) for s in args.seeds for m in args.methods if m != "sft" or s == args.seeds[0]]
    todo = [(m, s) for m, s in todo if not finished(out / "runs" / f"{m}-s{s}")]
    running: dict[subprocess.Popen, tuple[str, float, Path]] = {}
    environment = os.environ | {"WANDB_MODE": "disabled"}
    while todo or running:
        while todo and len(running) < args.jobs:
            method, seed = todo.pop(0)
            shutil.rmtree(out / "runs" / f"{method}-s{seed}", ignore_errors=True)  # what was cut short
            log = out / f"{method}-s{seed}.log"
            with open(log, "w") as stream:
                process = subprocess.Popen(command(args, method, seed), cwd=out, env=environment, stdout=stream, stderr=stream)
            running[process] = (f"{method}-s{seed}", time.time(), log)
        time.sleep(0.1)
        for process in [p for p in running if p.poll() is not None]:
            name, start, log = running.pop(process)
            print(f"{name}: {time.time() - start:.0f} s", flush=True)
            if process.returncode:
                for other in running:
                    other.kill()
                sys.exit(f"{name} failed; the end of {log}:\n{log.read_text()[-2000:]}")


@dataclass
class Run:
    """One run's curve of evaluations and its figures."""

    method: str
    seed: int
    episodes: list[float]
    seconds: list[float]
    success: list[float]
    summary: dict
    explained: float  # mean explained variance of the value over the second half; nan without a critic


def load(folder: Path, method: str, seed: int) -> Run:
    summary = finished(folder)
    if method == "sft":
        return Run(method, seed, [0], [0], [summary["ode_success"]["mean"]], summary, math.nan)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [row for row in rows if "eval/ode_success" in row]
    begin = rows[0]["time/elapsed"] - sum(rows[0][f"time/{stage}"] for stage in ("env", "policy", "update"))
    explained = [row["update/explained_variance"] for row in rows[len(rows) // 2 :] if "update/explained_variance" in row]
    return Run(
        method,
        seed,
        [0.0, *(row["episodes"] for row in evaluated)],
        [0.0, *(row["time/elapsed"] - begin for row in evaluated)],
        [summary["ode_success_before"]["mean"], *(row["eval/ode_success"] for row in evaluated)],
        summary,
        statistics.fmean(explained) if explained else math.nan,
    )


def at(xs: list[float], ys: list[float], x: float) -> float:
    """Piecewise linear; the last value beyond the end."""
    for i in range(1, len(xs)):
        if x <= xs[i]:
            return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[-1]


def biggest_drop(success: list[float]) -> float:
    """Largest fall from one evaluation to a later one."""
    return max((max(success[: i + 1]) - y for i, y in enumerate(success)), default=0.0)


def table(runs: list[Run], args: Args) -> str:
    """Markdown."""
    from common import wilson_interval

    methods = [m for m in METHODS if any(r.method == m for r in runs)]
    trained = [r for r in runs if r.method != "sft"]
    shortest = min((r.seconds[-1] for r in trained), default=0.0)

    def spread(values: list[float], form: str = "{:.3f}") -> str:
        mean = form.format(statistics.fmean(values))
        return mean if len(values) < 2 else f"{mean} ± {form.format(statistics.stdev(values))}"

    lines = [
        f"| method | seeds | success after | 95% interval | per seed | at {shortest:.0f} s | mean of the curve | "
        "biggest drop | KL to base | explained variance | seconds | peak memory, GB |",
        "|---" * 12 + "|",
    ]
    for method in methods:
        own = [r for r in runs if r.method == method]
        episodes = sum((r.summary.get("ode_success_after") or r.summary["ode_success"])["episodes"] for r in own)
        final = [r.success[-1] for r in own]
        low, high = wilson_interval(round(statistics.fmean(final) * episodes), episodes)
        cells = [method, ", ".join(str(r.seed) for r in own), spread(final), f"{low:.3f} to {high:.3f}"]
        cells.append(" / ".join(f"{x:.3f}" for x in final))
        if method == "sft":
            cells += [""] * 7
        else:
            cells.append(spread([at(r.seconds, r.success, shortest) for r in own]))
            area = [statistics.fmean(at(r.episodes, r.success, r.episodes[-1] * i / 100) for i in range(101)) for r in own]
            cells += [spread(area), f"{max(biggest_drop(r.success) for r in own):.3f}"]
            cells.append(spread([r.summary["kl_to_base"] for r in own], "{:.1f}"))
            explained = [r.explained for r in own if not math.isnan(r.explained)]
            cells.append(spread(explained, "{:.2f}") if explained else "")
            cells.append(spread([r.seconds[-1] for r in own], "{:.0f}"))
            cells.append(f"{max(r.summary['peak_memory_gb'] for r in own):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(runs: list[Run], path: Path, title: str) -> None:
    """Mean over seeds with each seed's curve; left against episodes, right against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), sharey=True, constrained_layout=True)
    colours = dict(zip(METHODS, ["black", *pyplot.rcParams["axes.prop_cycle"].by_key()["color"]]))
    for axis, name, label in ((axes[0], "episodes", "episodes"), (axes[1], "seconds", "wall clock [s]")):
        for method in METHODS:
            own = [r for r in runs if r.method == method]
            if method == "sft":
                for r in own:
                    axis.axhline(r.success[0], color="black", linestyle=":", label=f"sft ({r.success[0]:.3f})")
                continue
            if not own:
                continue
            end = min(getattr(r, name)[-1] for r in own)
            grid = [end * i / 60 for i in range(61)]
            curves = [[at(getattr(r, name), r.success, x) for x in grid] for r in own]
            for curve in curves:
                axis.plot(grid, curve, color=colours[method], linewidth=0.6, alpha=0.4)
            axis.plot(grid, [statistics.fmean(y) for y in zip(*curves)], color=colours[method], linewidth=2, label=method)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ODE success")
    axes[0].legend(loc="lower right")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def report(out: Path) -> str:
    """Writes table.md and curves.png of what has been run."""
    saved = json.loads((out / "args.json").read_text())
    args = Args(**{name: saved[name] for name in ("iterations", "num_envs", "task", "checkpoint", "device", "jobs")})
    runs = []
    for folder in sorted((out / "runs").iterdir()):
        method, _, seed = folder.name.rpartition("-s")
        if method in METHODS and finished(folder):
            runs.append(load(folder, method, int(seed)))
    if not runs:
        sys.exit(f"--report {out}: no finished run there")
    shipped = Path(args.checkpoint) == ROOT / "checkpoints" / "tiny"
    title = f"{args.task}, {'the shipped tiny checkpoint' if shipped else args.checkpoint}, {args.num_envs} environments"
    text = f"{title}, {args.iterations} iterations, {args.jobs} run(s) at a time\n\n{table(runs, args)}"
    (out / "table.md").write_text(text)
    plot(runs, out / "curves.png", title)
    return f"{text}\n{out / 'table.md'}, {out / 'curves.png'}"


def main(args: Args) -> None:
    if args.report:
        if not (args.report / "args.json").is_file():
            sys.exit(f"--report {args.report}: no such folder of this benchmark")
        print(report(args.report))
        return
    for flag, given in (("--methods", args.methods), ("--extra", args.extra)):
        unknown = [m for m in given if m not in METHODS]
        if unknown:
            sys.exit(f"{flag} {' '.join(unknown)}: choose of {', '.join(METHODS)}")
    if Path(args.checkpoint).exists():  # else a hub id; runs have a working directory of their own
        args.checkpoint = str(Path(args.checkpoint).resolve())
    out = (args.out or Path("runs") / "ppo_vs_grpo" / time.strftime("%Y%m%d-%H%M%S")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    saved = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(args).items()}
    (out / "args.json").write_text(json.dumps(saved, indent=2))
    run_all(args, out)
    print(report(out))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
