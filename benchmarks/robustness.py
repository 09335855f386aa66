"""One policy, or several, under conditions that none was chosen for: an axis at a time, three strengths each.

    python benchmarks/robustness.py --checkpoints checkpoints/tiny runs/<name>/checkpoints/best
    python benchmarks/robustness.py --checkpoints A B --axes latency camera --strengths 0.25 0.5 1

How it is measured
- `grpo_gr00t.py --evaluate` on the same episodes everywhere, with `--randomize axis:s-s`: in every episode all of strength s,
  in a direction that is drawn (tasks/randomize.py says what strength 1 is). Latency at 0.25, 0.5, 1 is 1, 2, 4 control steps.
- Wording: the row's other words for each of its instructions (`Task.wordings`), ever further from its own; every instruction
  in a run of its own, their episodes together.
- Physics: another solver than the one that stepped the training, at the task's own parameters: sim-to-sim.
- Intervals are Wilson's 95%. The axes are about those of LIBERO-Plus (arXiv 2510.13626), whose scenes and policies are others.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import wilson_interval, write_json
from tasks.gr00t import TASKS, find_task
from tasks.randomize import AXES, parse_axes


@dataclass
class Args:
    checkpoints: tuple[str, ...]  # columns of the table
    task: str = "Tabletop-Lift-Cube-v0"
    axes: tuple[str, ...] = ()  # of tasks/randomize.py, and wording; all that the task has by default
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0)  # of each axis
    physics: tuple[str, ...] = ()  # other solvers: newton_mjwarp, mujoco_c, physx
    num_envs: int = 128
    eval_episodes: int = 512  # of each cell
    eval_seed: int = 9_000_000
    device: str = "auto"  # cpu, cuda or auto
    name: str = "robustness"  # runs/<name>; what is finished there is kept


Cell = tuple[int, int]  # successes, episodes


def evaluate(args: Args, out: Path, name: str, checkpoint: str, *flags: str) -> Cell:
    """Success of a checkpoint under some flags, unless it is known already."""
    file = out / "runs" / name / "summary.json"
    if not file.exists() or "ode_success" not in json.loads(file.read_text()):
        shutil.rmtree(file.parent, ignore_errors=True)  # what was cut short
        named = {"task": args.task, "num-envs": args.num_envs, "eval-episodes": args.eval_episodes, "device": args.device}
        named |= {"eval-seed": args.eval_seed, "checkpoint": checkpoint, "exp-name": name}
        command = [sys.executable, str(ROOT / "grpo_gr00t.py"), "--evaluate", *flags]
        command += [x for key, value in named.items() for x in (f"--{key}", str(value))]
        with open(out / f"{name}.log", "w") as log:
            code = subprocess.call(command, cwd=out, env=os.environ | {"WANDB_MODE": "disabled"}, stdout=log, stderr=log)
        if code:
            sys.exit(f"{name} failed; the end of {log.name}:\n{Path(log.name).read_text()[-2000:]}")
    found = json.loads(file.read_text())["ode_success"]
    print(f"{name}: {found['mean']:.3f}", flush=True)
    return round(found["mean"] * found["episodes"]), found["episodes"]


def conditions(args: Args) -> dict[tuple[str, str], list[tuple[str, ...]]]:
    """Flags of each (axis, strength): those of one run, or of several whose episodes count together."""
    task = TASKS[args.task]
    found: dict[tuple[str, str], list[tuple[str, ...]]] = {("none", ""): [()]}
    for axis in args.axes:
        if axis == "wording":
            for i in range(max(map(len, task.wordings.values()), default=0)):
                others = [texts[min(i, len(texts) - 1)] for texts in task.wordings.values()]
                found[axis, f'{i + 1}: "{others[0]}"'] = [("--instruction", text) for text in others]
        else:
            for s in args.strengths:
                found[axis, f"{s:g}"] = [("--randomize", f"{axis}:{s:g}-{s:g}")]
    return found | {("physics", name): [("--physics", name)] for name in args.physics}


def table(cells: dict[tuple[str, str], list[Cell]], names: list[str]) -> str:
    """Markdown; the last row has the mean over all conditions but `none`."""
    lines = [f"| condition | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for (axis, strength), row in cells.items():
        rates = [(won / of, *wilson_interval(won, of)) for won, of in row]
        lines.append(f"| {axis} {strength} | " + " | ".join("{:.3f} [{:.3f}, {:.3f}]".format(*rate) for rate in rates) + " |")
    means = [mean([row[i] for (axis, _), row in cells.items() if axis != "none"]) for i in range(len(names))]
    return "\n".join([*lines, f"| mean of the conditions | {' | '.join(f'{x:.3f}' for x in means)} |"]) + "\n"


def mean(cells: list[Cell]) -> float:
    """Of rates: every condition counts the same."""
    return sum(won / of for won, of in cells) / max(len(cells), 1)


def draw(cells: dict[tuple[str, str], list[Cell]], names: list[str], file: Path) -> None:
    """One panel per axis, from the plain condition to the strongest, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes = list(dict.fromkeys(axis for axis, _ in cells if axis != "none"))
    figure, panels = plt.subplots(1, len(axes), figsize=(1.7 * len(axes) + 1, 2.8), sharey=True, squeeze=False)
    for panel, axis in zip(panels[0], axes):
        keys = [("none", ""), *(key for key in cells if key[0] == axis)]
        for i, name in enumerate(names):
            rates = [(cells[key][i][0] / cells[key][i][1], *wilson_interval(*cells[key][i])) for key in keys]
            bars = [[m - low for m, low, _ in rates], [high - m for m, _, high in rates]]
            panel.errorbar(range(len(keys)), [rate[0] for rate in rates], bars, marker="o", markersize=3, capsize=2, label=name)
        panel.set_title(axis, fontsize=9)
        panel.set_xticks(range(len(keys)), ["0", *(strength.partition(":")[0] for _, strength in keys[1:])], fontsize=7)
        panel.set_ylim(0, 1)
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("success")
    panels[0][0].legend(fontsize=7, loc="lower left")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main(args: Args) -> None:
    args.task = find_task(args.task)
    task = TASKS[args.task]
    able = (*parse_axes(("all:1",), task), *(("wording",) if task.wordings else ()))
    args.axes = args.axes or able
    if wrong := [axis for axis in args.axes if axis not in able]:
        raise SystemExit(f"--axes {wrong[0]}: {args.task} has {', '.join(able)} (of {', '.join(AXES)}, wording)")
    if wrong := [s for s in args.strengths if not 0 < s <= 1]:
        raise SystemExit(f"--strengths {wrong[0]:g}: must be above 0 and at most 1")
    out, settings = Path("runs", args.name).resolve(), dataclasses.asdict(args)
    checkpoints = [str(Path(x).resolve()) if Path(x).exists() else x for x in args.checkpoints]  # else a hub id
    kept = {key: settings[key] for key in ("task", "num_envs", "eval_episodes", "eval_seed")} | {"checkpoints": checkpoints}
    known = json.loads((out / "args.json").read_text()) if (out / "args.json").exists() else kept
    for key, value in kept.items():
        if known[key] != value:
            raise SystemExit(f"--name {args.name}: was begun with other --{key.replace('_', '-')}; take another name")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "args.json", kept)

    cells: dict[tuple[str, str], list[Cell]] = {}
    for key, several in conditions(args).items():
        cells[key] = []
        for i, checkpoint in enumerate(checkpoints):
            stem = "-".join(filter(None, (f"c{i}", key[0], key[1].partition(":")[0])))
            runs = [evaluate(args, out, f"{stem}-{j}", checkpoint, *flags) for j, flags in enumerate(several)]
            cells[key].append(tuple(map(sum, zip(*runs))))
    text = table(cells, list(args.checkpoints))
    (out / "table.md").write_text(text)
    write_json(out / "table.json", {" ".join(key).strip(): row for key, row in cells.items()})
    draw(cells, list(args.checkpoints), out / "robustness.png")
    print(f"{text}\n{out / 'table.md'}, {out / 'robustness.png'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
