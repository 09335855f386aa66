"""RL on one instruction after the other, against all of them at once: what is forgotten, and what is kept for other words.

    python benchmarks/forgetting.py --checkpoint runs/suite/checkpoints/last     # of sft_gr00t.py --task Tabletop-Suite-v0
    python benchmarks/forgetting.py --name forgetting --variants head lora       # goes on where runs/forgetting stopped

How it is measured
- In sequence: a run for each instruction, from the checkpoint of the run before. Jointly: one run on all instructions that the
  task trains, also those that `--instructions` leaves out of the sequence, with as many environment steps as the sequence.
- The base model of the KL is what a stage began with: in sequence, --kl-coef holds on to the stage before, not to the first.
- After each stage the deterministic sampler on the same episodes of all the task's instructions, also those not trained.
- NBT, negative backward transfer: success right after its stage minus that in the end, of all instructions but the last
  (Lopez-Paz and Ranzato 2017, arXiv:1706.08840, with the sign turned). Intervals are 95%: Wilson's, of differences Newcombe's.
- A small network forgets more than a large one that was trained on much (Ramasesh et al. 2022, ICLR, "Effect of scale on
  catastrophic forgetting"): of a network of 1 M parameters these are no figures of the 3B.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common import wilson_interval, write_json
from tasks.gr00t import TASKS, find_task

HEAD_ADAPTERS = "--lora-targets dit-attention dit-feed-forward vl-attention --unfreeze head vl"  # at once: stages are short
# name: (script, flags)
VARIANTS: dict[str, tuple[str, str]] = {
    "head": ("grpo_gr00t.py", ""),
    "head-kl": ("grpo_gr00t.py", "--kl-coef 0.1"),
    "lora": ("grpo_gr00t_lora.py", HEAD_ADAPTERS),
}
Counts = dict[str, tuple[int, int]]  # of an evaluation: successes and episodes of each instruction


@dataclass
class Args:
    checkpoint: str  # the warm start
    variants: tuple[str, ...] = tuple(VARIANTS)  # of VARIANTS
    task: str = "Tabletop-Suite-v0"  # with several instructions
    instructions: tuple[str, ...] = ()  # of the sequence, in this order; all that the task trains by default
    joint: bool = True  # the joint runs, too
    iterations: int = 30  # of each stage
    num_envs: int = 128  # episodes of an iteration
    lr_warmup: int = 3  # iterations, of each run
    seed: int = 1
    device: str = "auto"  # cpu, cuda or auto
    eval_episodes: int = 640  # of each evaluation, of all instructions together
    eval_seed: int = 9_000_000  # of the evaluations' starts
    name: str = "forgetting"  # runs/<name>; what is finished there is kept


def train(args: Args, out: Path, variant: str, stage: str, checkpoint: Path | str, iterations: int, *flags: str) -> Path:
    """A training run, unless it is finished; its last checkpoint."""
    script, own = VARIANTS[variant]
    name = f"{variant}-{stage}"
    last = out / "runs" / name / "checkpoints" / f"step_{iterations:06d}"
    if not last.exists():  # it appears whole, or not at all
        rates = {"lr-warmup": args.lr_warmup, "save-every": iterations, "eval-every": 0, "eval-episodes": 0}
        run(args, out, name, script, checkpoint, *own.split(), *flags, iterations=iterations, seed=args.seed, **rates)
    return last


def evaluate(args: Args, out: Path, stage: str, checkpoint: Path | str) -> Counts:
    """Success of a checkpoint, unless it is known already; adapters were merged into it."""
    file = out / "runs" / f"eval-{stage}" / "summary.json"
    if not file.exists() or "ode_success" not in json.loads(file.read_text()):
        flags = {"eval-episodes": args.eval_episodes, "eval-seed": args.eval_seed}
        run(args, out, f"eval-{stage}", "grpo_gr00t.py", checkpoint, "--evaluate", **flags)
    rates = json.loads(file.read_text())["ode_success"]["instructions"]
    found = {text: (round(rate["mean"] * rate["episodes"]), rate["episodes"]) for text, rate in rates.items()}
    return {text: found.get(text, (0, 0)) for text in TASKS[args.task].instructions}  # some had no episode


def run(args: Args, out: Path, name: str, script: str, checkpoint: Path | str, *flags: str, **more: Any) -> None:
    """What a user would type, in `out`; stops with the end of what it printed if it fails."""
    shutil.rmtree(out / "runs" / name, ignore_errors=True)  # what was cut short
    more |= {"task": args.task, "num-envs": args.num_envs, "device": args.device, "checkpoint": checkpoint, "exp-name": name}
    named = [x for key, value in more.items() for x in (f"--{key.replace('_', '-')}", str(value))]
    with open(out / f"{name}.log", "w") as log:
        command = [sys.executable, str(ROOT / script), *named, *flags]
        code = subprocess.call(command, cwd=out, env=os.environ | {"WANDB_MODE": "disabled"}, stdout=log, stderr=log)
    print(f"{name}: {'failed' if code else 'done'}", flush=True)
    if code:
        sys.exit(f"{name} failed; the end of {log.name}:\n{Path(log.name).read_text()[-2000:]}")


def share(counts: Counts, texts: tuple[str, ...]) -> dict[str, float]:
    """Success of some instructions, their episodes together: mean, low, high, episodes."""
    won, of = (sum(column) for column in zip(*(counts[text] for text in texts))) if texts else (0, 0)
    low, high = wilson_interval(won, of)
    return {"mean": won / max(of, 1), "low": low, "high": high, "episodes": of}


def figures(counts: list[Counts], order: tuple[str, ...], trained: tuple[str, ...], other: dict[str, tuple[str, ...]]) -> dict:
    """What the successes after each stage of a sequence say.

    Args:
        counts: after each stage; of a joint run one.
        order: the instruction of each stage; of a joint run none.
        trained: the instructions whose final success counts.
        other: more instructions under a name.

    Returns:
        final, learned (right after each one's own stage) and every name of `other`, as of `share`; nbt: mean, low, high.
    """
    found = {"final": share(counts[-1], trained)} | {name: share(counts[-1], texts) for name, texts in other.items()}
    if order:
        found["learned"] = share({text: at[text] for text, at in zip(order, counts)}, order)
    if order[:-1]:  # the last one had no time to be forgotten
        then, now = share({text: at[text] for text, at in zip(order, counts)}, order[:-1]), share(counts[-1], order[:-1])
        drop = then["mean"] - now["mean"]
        below = math.hypot(then["mean"] - then["low"], now["high"] - now["mean"])
        above = math.hypot(then["high"] - then["mean"], now["mean"] - now["low"])
        found["nbt"] = {"mean": drop, "low": drop - below, "high": drop + above}
    return found


def report(before: Counts, runs: dict[str, list[Counts]], order: tuple[str, ...], task: Any) -> tuple[str, dict]:
    """Markdown and figures of runs, "<variant>, in sequence" (after each stage) or "<variant>, jointly"."""
    other = {"imitation alone": task.untrained, "never seen": task.unseen}
    other = {name: texts for name, texts in other.items() if texts}
    found = {"before": figures([before], (), order, other)}
    for name, counts in runs.items():
        found[name] = figures(counts, order if len(counts) > 1 else (), order, other)
    columns = {"final": "these instructions", "learned": "right after each stage", "nbt": "NBT"} | {
        name: name for name in other
    }

    def cell(rate: dict | None) -> str:
        return "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**rate) if rate else ""

    lines = [f"| run | {' | '.join(columns.values())} |", "|---" * (1 + len(columns)) + "|"]
    lines += [f"| {name} | {' | '.join(cell(row.get(key)) for key in columns)} |" for name, row in found.items()]
    for name, counts in runs.items():
        stages = [f"after {i + 1}" for i in range(len(counts))] if len(counts) > 1 else ["after"]
        head = ["instruction", "episodes", "before", *stages]
        lines += ["", f"{name}:", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for text, (_, of) in before.items():
            rates = [f"{won / max(n, 1):.3f}" for won, n in (at[text] for at in (before, *counts))]
            if len(counts) > 1 and text in order:
                rates[1 + order.index(text)] = f"**{rates[1 + order.index(text)]}**"  # its own stage
            lines.append(f"| {text} | {of} | {' | '.join(rates)} |")
    return "\n".join(lines) + "\n", found


def main(args: Args) -> None:
    args.task = find_task(args.task)
    task = TASKS[args.task]
    able = tuple(text for text in task.instructions if text not in task.kept_out)
    args.instructions = args.instructions or able
    if wrong := [text for text in args.instructions if text not in able]:
        raise SystemExit(f"--instructions {wrong[0]!r}: {args.task} trains {', '.join(map(repr, able))}")
    if len(args.instructions) < 2:
        raise SystemExit(f"--instructions {args.instructions[0]!r}: a sequence has at least two; name more, or another --task")
    if wrong := [name for name in args.variants if name not in VARIANTS]:
        raise SystemExit(f"--variants {wrong[0]}: choose of {', '.join(VARIANTS)}")
    if Path(args.checkpoint).exists():  # else a hub id; runs have a working directory of their own
        args.checkpoint = str(Path(args.checkpoint).resolve())
    out, settings = Path("runs", args.name).resolve(), dataclasses.asdict(args)
    known = json.loads((out / "args.json").read_text()) if (out / "args.json").exists() else {}
    for name in settings.keys() & known.keys() - {"variants", "joint"}:
        if known[name] != json.loads(json.dumps(settings[name])):
            raise SystemExit(f"--name {args.name}: was begun with another --{name.replace('_', '-')}; take another name")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "args.json", settings)

    runs: dict[str, list[Counts]] = {}
    before = evaluate(args, out, "before", args.checkpoint)
    for variant in args.variants:
        checkpoint: Path | str = args.checkpoint
        after = runs[f"{variant}, in sequence"] = []
        for i, text in enumerate(args.instructions):
            stage = str(i + 1)
            checkpoint = train(args, out, variant, stage, checkpoint, args.iterations, "--instruction", text)
            after.append(evaluate(args, out, f"{variant}-{stage}", checkpoint))
        if args.joint:
            checkpoint = train(args, out, variant, "joint", args.checkpoint, args.iterations * len(args.instructions))
            runs[f"{variant}, jointly"] = [evaluate(args, out, f"{variant}-joint", checkpoint)]
        text, found = report(before, runs, args.instructions, task)
        (out / "table.md").write_text(text)
        write_json(out / "table.json", {"figures": found, "counts": {"before": [before], **runs}})
    print(f"{text}\n{out / 'table.md'}, {out / 'table.json'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
