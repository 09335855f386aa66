"""benchmarks/forgetting.py without a simulator: its figures by hand, and what it runs, with a small script in place of ours."""

import importlib
import json
import math

import pytest
import tyro

from benchmarks import forgetting as bench

SCRIPTS = sorted({"grpo_gr00t.py", *(script for script, _ in bench.VARIANTS.values())})
LIFT, PUSH, STACK = "lift the red cube", "push the red cube to the left", "stack the red cube on the blue cube"
# notes its command line, and leaves what the script would: a summary of an evaluation, or a checkpoint
SCRIPT = """
import json, sys
from pathlib import Path
line = sys.argv
flags = dict(zip(line[1:], line[2:]))
with open("calls.jsonl", "a") as file:
    file.write(json.dumps(line) + "\\n")
folder = Path("runs") / flags["--exp-name"]
(folder / "checkpoints").mkdir(parents=True)
rates = {{text: {{"mean": 0.5, "episodes": 4}} for text in {texts!r}}}
result = {{"ode_success": {{"instructions": rates}}}} if "--evaluate" in line else {{"ode_success_before": {{}}}}
(folder / "summary.json").write_text(json.dumps(result))
if "--evaluate" not in line:
    assert int(flags["--iterations"]) < 99, "too long"
    (folder / "checkpoints" / f"step_{{int(flags['--iterations']):06d}}").mkdir()
"""


def test_figures_by_hand():
    order, other = (LIFT, PUSH, STACK), {"never seen": ("x",)}
    first = {LIFT: (8, 10), PUSH: (3, 10), STACK: (0, 20), "x": (1, 4)}
    second = {LIFT: (5, 10), PUSH: (9, 10), STACK: (1, 20), "x": (2, 4)}
    third = {LIFT: (4, 10), PUSH: (7, 10), STACK: (6, 20), "x": (3, 4)}
    found = bench.figures([first, second, third], order, order, other)
    assert found["final"]["mean"] == 17 / 40 and found["final"]["episodes"] == 40
    assert found["learned"]["mean"] == (8 + 9 + 6) / 40 and found["never seen"]["mean"] == 3 / 4
    # 17 of 20 right after their stages, 11 of 20 in the end; Wilson: [0.640, 0.948] and [0.342, 0.742]
    nbt = found["nbt"]
    assert math.isclose(nbt["mean"], 0.3)
    assert math.isclose(nbt["low"], 0.3 - math.hypot(0.2104, 0.1918), abs_tol=1e-3)
    assert math.isclose(nbt["high"], 0.3 + math.hypot(0.0976, 0.2079), abs_tol=1e-3)
    joint = bench.figures([third], (), order[:2], other)
    assert joint["final"]["mean"] == 11 / 20 and joint.keys() == {"final", "never seen"}


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """A function that runs the benchmark in a folder, with SCRIPT in place of ours, and returns new command lines."""
    for script in SCRIPTS:
        (tmp_path / script).write_text(SCRIPT.format(texts=bench.TASKS["Tabletop-Suite-v0"].instructions[1:]))
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "runs" / "forgetting" / "calls.jsonl"

    def run(**changed) -> list[list[str]]:
        file.unlink(missing_ok=True)
        given = dict(checkpoint="org/name", instructions=(LIFT, PUSH, STACK), iterations=2, num_envs=32, seed=5, device="cpu")
        bench.main(bench.Args(**given | changed))
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    return run


def test_stages_begin_where_the_one_before_ended(calls, tmp_path, capsys):
    lines = calls()
    runs = tmp_path / "runs" / "forgetting" / "runs"
    assert len(lines) == 1 + len(bench.VARIANTS) * 2 * 4  # an evaluation at first, then one after each run
    for line in lines:
        module = importlib.import_module(line[0].rpartition("/")[2].removesuffix(".py"))
        args = tyro.cli(module.Args, args=line[1:])  # every flag exists there
        assert (args.task, args.num_envs, args.device) == ("Tabletop-Suite-v0", 32, "cpu")
        variant, _, stage = args.exp_name.rpartition("-")
        if args.evaluate:
            trained = variant.removeprefix("eval-")
            steps = f"step_{6 if stage == 'joint' else 2:06d}"
            expected = "org/name" if stage == "before" else str(runs / f"{trained}-{stage}" / "checkpoints" / steps)
            assert args.checkpoint == expected and args.instruction is None and args.eval_episodes == 640
            continue
        assert args.seed == 5 and args.save_every == args.iterations and args.eval_episodes == args.eval_every == 0
        if stage == "joint":
            assert (args.checkpoint, args.iterations, args.instruction) == ("org/name", 6, None)
        else:
            before = runs / f"{variant}-{int(stage) - 1}" / "checkpoints" / "step_000002"
            assert args.checkpoint == ("org/name" if stage == "1" else str(before))
            assert args.iterations == 2 and args.instruction == (LIFT, PUSH, STACK)[int(stage) - 1]
        assert (getattr(args, "kl_coef", 0) > 0) == (variant == "head-kl")
    assert "| push the blue cube to the right | 4 | 0.500 |" in capsys.readouterr().out
    found = json.loads((runs.parent / "table.json").read_text())
    assert found["counts"]["head, in sequence"][2][PUSH] == [2, 4] and found["counts"]["before"][0][LIFT] == [0, 0]


def test_what_is_finished_is_not_run_again(calls, tmp_path):
    calls(variants=("head",))
    runs = tmp_path / "runs" / "forgetting" / "runs"
    assert calls(variants=("head",)) == []
    (runs / "head-2" / "checkpoints" / "step_000002").rmdir()  # killed in a stage: it has a summary already
    (runs / "eval-head-joint" / "summary.json").write_text("{}")
    names = [line[line.index("--exp-name") + 1] for line in calls(variants=("head",))]
    assert names == ["head-2", "eval-head-joint"]
    with pytest.raises(SystemExit, match="^--name forgetting: was begun with another --iterations; take another name$"):
        calls(variants=("head",), iterations=3)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"instructions": (LIFT, "push the blue cube to the right")}, "--instructions 'push the blue cube to the right': "),
        ({"instructions": (LIFT,)}, f"--instructions '{LIFT}': a sequence has at least two"),
        ({"variants": ("heads",)}, "--variants heads: choose of head, "),
        ({"iterations": 99}, "head-1 failed; the end of "),
    ],
)
def test_refuses_in_one_line(calls, wrong, says):
    with pytest.raises(SystemExit) as refused:
        calls(**wrong)
    assert str(refused.value).startswith(says)
