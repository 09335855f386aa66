"""What all scripts share: command line, refusals in one line, style, imports one way, copies that do not drift."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import copies

ROOT = Path(__file__).resolve().parents[1]
# by name: a copy that lies beside them is its owner's
RESUMABLE = (
    "grpo_gr00t.py", "grpo_gr00t_lora.py", "ppo_gr00t_frozen.py", "ppo_gr00t_lora.py", "ppo_isaac.py", "ppo_isaac_rgb.py"
)  # fmt: skip
TRAINING = (*RESUMABLE, "sft_gr00t.py")
SCRIPTS = (*TRAINING, "serve_gr00t.py")
FILES = [*ROOT.glob("tasks/*.py"), *ROOT.glob("gr00t_n1d5/*.py")]
MODULES = ("common.py", *(file.relative_to(ROOT).as_posix() for file in FILES))
every_script = pytest.mark.parametrize("script", SCRIPTS)


def tree_of(script: str) -> ast.Module:
    return ast.parse((ROOT / script).read_text())


def fields_of(script: str) -> list[str]:
    return [node.target.id for node in copies.find(tree_of(script), "Args").body if isinstance(node, ast.AnnAssign)]


def run(script: str, *flags: str, cwd: Path, python: tuple[str, ...] = (), seconds: float = 60, **env: str):
    """The finished process; it is given three tries to be done within `seconds`."""
    for _ in range(3):
        start, command = time.perf_counter(), [sys.executable, *python, str(ROOT / script), *flags]
        env = {**os.environ, "COLUMNS": "200", **env}
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
        took = time.perf_counter() - start
        if took < seconds:
            return done
    raise AssertionError(f"{script} {' '.join(flags)}: {took:.1f} s")


# ---------------------------------------------------------------- command line


@every_script
def test_help_is_instant_and_complete(script, tmp_path):
    result = run(script, "--help", cwd=tmp_path, python=("-X", "importtime"), seconds=2)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert result.returncode == 0 and "tyro" in imported
    assert not imported & {"torch", "numpy", "gymnasium", "transformers", "isaaclab"}
    assert not [name for name in fields_of(script) if f"--{name.replace('_', '-')}" not in result.stdout]


@every_script
def test_every_field_is_read_where_it_is_declared_and_explained(script):
    """As args.<name>, or by a getattr over a list of names; checking it alone does not count."""
    tree, lines, found = tree_of(script), (ROOT / script).read_text().split("\n"), set()
    for statement in tree.body:
        names = copies.names_of(statement)
        if {"Args", "check"} & set(names):
            continue
        calls = [n for n in ast.walk(statement) if isinstance(n, ast.Call) and ast.unparse(n.func) == "getattr"]
        listed = names == ["NETWORK"] or any(ast.unparse(call.args[0]) == "args" for call in calls)
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args", "asked"):
                found.add(node.attr)
            elif listed and isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update(node.value.split())
    assert not set(fields_of(script)) - found
    body = copies.find(tree, "Args").body
    assert not [n.target.id for n in body if isinstance(n, ast.AnnAssign) and "  # " not in lines[n.end_lineno - 1]]


REFUSALS = {
    "grpo_gr00t.py": [
        ("--group-size 1", "at least 2 members"),
        ("--num-envs 24", "multiple of --group-size 16"),
        ("--exp-name ../../x", "a folder under runs/"),
        ("--exp-name a/b", "a folder under runs/"),
        ("--task Tabletop-Lift-Cup-v0", "nearest: Tabletop-Lift-Cube-v0"),
        ("--learning-rate -0.1", "greater than 0"),
        ("--bank-share 2", "from 0 to 1"),
        ("--bank-share 0.1", "less than one group"),
        ("--midway --curriculum learnability", "add --curriculum learnability --bank-share"),
        ("--kl-coef -1", "0 or more"),
        ("--seed -1", "0 or more"),
        ("--resume runs/none", "name a folder like runs/<name>"),
        ("--check --evaluate", "leave out --evaluate and --resume"),
        ("--instruction red green", "'green': is not one that Tabletop-Lift-Cube-v0 draws"),
        ("--instruction red blue red", "'red': Tabletop-Lift-Cube-v0 is asked for that already"),
        ("--record data", "add --evaluate"),
        ("--checkpoint ./nowhere", "nowhere: no such folder"),
    ],
    "grpo_gr00t_lora.py": [
        ("--num-envs 24", "multiple of --group-size 16"),
        ("--unfreeze head:3 vl:5 llm:5 vision:5", "begin a stage at 0"),
        ("--unfreeze critic head", "has the stages head, vl, llm, vision"),
    ],
    "ppo_gr00t_frozen.py": [
        ("--critic-obs privileged --task Isaac-Humanoid", "use features"),
        ("--gamma 1.5", "from 0 to 1"),
        ("--checkpoint ./nowhere", "nowhere: no such folder"),
    ],
    "ppo_gr00t_lora.py": [
        ("--lora-targets dit", "dit-attention, dit-feed-forward"),
        ("--unfreeze head:x", "name[:first iteration][:learning rate]"),
        ("--unfreeze critic head", "vl would never be trained"),
        ("--precision fp8 --lora-targets llm-attention", "use bf16"),
    ],
    "sft_gr00t.py": [
        ("--demos 0", "greater than 0"),
        ("--evaluate", "--checkpoint"),
        ("--check --evaluate", "leave out --evaluate"),
        ("--task Isaac-Humanoid", "has no scripted expert"),
        ("--dataset ./nowhere", "nowhere: no such folder"),
        ("--checkpoint ./nowhere", "nowhere: no such folder"),
    ],
    "ppo_isaac.py": [
        ("--minibatches 999999", "use fewer"),
        ("--evaluate", "needs --checkpoint"),
        ("--export", "needs --checkpoint"),
        ("--checkpoint nowhere", "no policy of this script there"),
        ("--hidden 0", "at least one size"),
    ],
    "ppo_isaac_rgb.py": [("--num-steps -1", "greater than 0"), ("--evaluate", "needs --checkpoint")],
    "serve_gr00t.py": [("--port 70000", "between 0 and 65535"), ("--checkpoint ./nowhere", "nowhere: no such folder")],
}


@pytest.mark.parametrize("script, flags, remedy", [(s, *row) for s, rows in REFUSALS.items() for row in rows])
def test_what_cannot_work_is_refused_at_once(script, flags, remedy, tmp_path):
    """In one line that begins with the flag; a run's folder is not made."""
    result = run(script, *flags.split(), cwd=tmp_path, seconds=2)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith(flags.split()[0]) and result.stderr.count("\n") == 1 and remedy in result.stderr
    assert not (tmp_path / "runs").exists()


def test_unknown_choices_and_ranks(tmp_path):
    result = run("grpo_gr00t.py", "--precision", "fp4", cwd=tmp_path, seconds=2)
    assert result.returncode == 2 and "--precision" in result.stderr and "Traceback" not in result.stderr
    for script, number, of in (("grpo_gr00t.py", 32, "16 times 4 ranks"), ("ppo_isaac.py", 30, "4 ranks")):
        flags = f"--num-envs {number}"
        result = run(script, *flags.split(), cwd=tmp_path, WORLD_SIZE="4")
        assert result.returncode == 1 and result.stderr.startswith(flags + ": must be a multiple of") and of in result.stderr


def resumable(folder: Path, **args) -> Path:
    (folder / "checkpoints/step_000001").mkdir(parents=True)
    (folder / "checkpoints/step_000001/trainer_state.pt").touch()
    (folder / "args.json").write_text(json.dumps({"args": args}))
    return folder


@pytest.mark.parametrize("script", RESUMABLE)
def test_resume_takes_the_runs_arguments_and_explicit_flags(script, tmp_path, monkeypatch):
    """A flag that is given counts even at its default value; what cannot work is refused as ever; an old run is named."""
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(script.removesuffix(".py"))
    folder = resumable(tmp_path / "runs/mine", learning_rate=0.5, seed=7, exp_name="mine")
    default = module.Args()

    def parse(*flags: str):
        monkeypatch.setattr(sys, "argv", [script, "--resume", str(folder), *flags])
        return module.parse()

    args = parse()
    assert (args.learning_rate, args.seed, args.exp_name, args.resume) == (0.5, 7, "mine", str(folder))
    assert parse("--seed", str(default.seed)).seed == default.seed and parse("--seed", "9").learning_rate == 0.5
    with pytest.raises(SystemExit, match="^--learning-rate -1.0: "):
        parse("--learning-rate", "-1")
    (folder / "args.json").write_text(json.dumps({"args": {"noise": "flow-sde"}}))  # of another version
    with pytest.raises(SystemExit, match="^--resume .* is not of this version of the script .*--checkpoint") as refused:
        parse()
    assert "\n" not in str(refused.value)


def test_checkpoints_and_tasks_that_do_not_fit(tiny_checkpoint, tmp_path):
    """What takes torch to find out, of Gr00tPolicy and its actor."""
    import grpo_gr00t

    def refused(**flags) -> str:
        with pytest.raises(SystemExit) as caught:
            grpo_gr00t.Gr00tActor(grpo_gr00t.Args(**{"checkpoint": str(tiny_checkpoint), "device": "cpu", **flags}))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    truncated, other = (shutil.copytree(tiny_checkpoint, tmp_path / name) for name in ("truncated", "other"))
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    config = json.loads((other / "config.json").read_text())
    config["action_head_cfg"]["hidden_size"] += 8
    (other / "config.json").write_text(json.dumps(config))
    for folder in (truncated, other):
        assert refused(checkpoint=str(folder)).startswith(f"--checkpoint {folder}:")
    for text, why in (("lift the green cube", "green"), ("lift the red cube " * 8, "at most 16")):
        assert refused(instruction=text).startswith("--instruction: ") and why in refused(instruction=text)
    for chunk in (5, 16):  # does not divide the episode; is more than the model gives
        assert refused(chunk=chunk).startswith(f"--chunk {chunk}: must divide the episode's 32 steps")


def test_stock_tasks_that_cannot_be_trained(monkeypatch):
    from isaaclab.utils import assets

    from tasks import stock

    monkeypatch.setattr(assets, "check_file_path", lambda path: 1)  # as if all of them lay on this disk

    def refused(task: str, *overrides: str, physics: str | None = None, images: bool = False, groups=()) -> str:
        with pytest.raises(SystemExit) as caught:
            stock.task_config(stock.known_task(task), "cpu", 2, physics, overrides, dict(groups), images)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nearest: Isaac-Cartpole-Direct" in refused("Isaac-Kartpole-Direct")
    assert "single agent" in refused("Isaac-Pendulum-MARL-Direct")
    assert "Dict()" in refused("Isaac-Cartpole-Direct", "env.action_space={}")
    assert "ppo_isaac_rgb.py is for those" in refused("Isaac-Cartpole-Camera-Direct")
    assert "ppo_isaac.py is for those" in refused("Isaac-Cartpole-Direct", images=True)
    assert "newton_mjwarp" in refused("Isaac-Cartpole-Direct", physics="bullet")
    assert "presets=nonsense" in refused("Isaac-Cartpole-Direct", "presets=nonsense")
    assert "the task has no env.decimatoin" in refused("Isaac-Cartpole-Direct", "env.decimatoin=2")
    assert "env.decimation is a number" in refused("Isaac-Cartpole-Direct", "env.decimation=two")
    for task, known in (("Isaac-Cartpole-Direct", "policy"), ("Isaac-Lift-Franka", "proprio")):
        text = refused(task, groups={"--obs-groups": ("policy", "privileged")})
        assert text.startswith("--obs-groups privileged:") and known in text
        assert refused(task, groups={"--obs-groups": ()}).startswith("--obs-groups: needs at least one")
    monkeypatch.setattr(assets, "check_file_path", lambda path: 0)
    assert re.search(r"cannot reach .*\.usda?; .* ISAACSIM_ASSET_ROOT", refused("Isaac-Cartpole-Direct"))


# ---------------------------------------------------------------- style

HOT = set(
    "rollout advantages make_batch scaled_rewards update grpo_loss ppo_loss value_loss backward act denoise executed log_prob "
    "evaluate base_mean critic_input features encode velocity unnormalize value entropy kl step step_chunk observe take "
    "begin finished mean sum max".split()
)


@pytest.mark.parametrize("file", [*TRAINING, "common.py", "gr00t_n1d5/policy.py", "tasks/stock.py"])
def test_no_host_sync_in_hot_functions(file):
    """A transfer to the host in the inner loops would make a GPU wait; printing does not belong there either."""
    tree, found = tree_of(file), []
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in HOT and n.name != "evaluate"]
    for owner in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        functions += [m for m in owner.body if isinstance(m, ast.FunctionDef) and m.name in HOT]
    assert functions
    for function in functions:
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            method = isinstance(call.func, ast.Attribute)
            name = call.func.attr if method else getattr(call.func, "id", "")
            if name in (("item", "tolist", "cpu", "numpy") if method else ("print", "float", "bool")):
                found.append(f"{file}:{call.lineno} ({function.name}): {name}")
    assert not found


def test_only_scripts_take_their_arguments():
    """`Run` records them, and takes a dict; everything else is asked for by name."""
    found = []
    for file in MODULES:
        tree = tree_of(file)
        tree.body = [node for node in tree.body if "Run" not in copies.names_of(node)]
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.Lambda)):
            found += [f"{file}:{node.lineno}" for a in (*node.args.args, *node.args.kwonlyargs) if a.arg == "args"]
    assert not found


def test_imports_run_one_way():
    """Scripts know everything; tasks and gr00t_n1d5 know common at most, and common nobody."""
    own = {path.stem for path in ROOT.glob("*.py")} | {"tasks", "gr00t_n1d5", "benchmarks", "tests"}
    for file in MODULES:
        found = set()
        for node in ast.walk(tree_of(file)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            found |= {name.partition(".")[0] for name in names}
        folder = file.partition("/")[0]
        assert found & own <= ({"common", folder} if "/" in file else set()), file


def test_ruff():
    beside = Path(sys.executable).with_name("ruff")
    ruff = str(beside) if beside.exists() else shutil.which("ruff")
    if not ruff:
        pytest.skip("ruff is not installed")
    files = [*SCRIPTS, "common.py", "tasks", "gr00t_n1d5", "benchmarks", "tests"]
    result = subprocess.run([ruff, "check", *files], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ---------------------------------------------------------------- copies, and what documents name


@pytest.mark.parametrize("script", copies.CHILDREN)
def test_copies_are_true(script):
    assert copies.check_copies(ROOT / script) == []


def test_documents_name_what_there_is():
    assert copies.check_references(ROOT) == []


def test_every_one_of_the_37_details_has_a_row_with_its_code_and_its_test():
    """The numbers of details per category are those of the article; only what has no meaning here goes without."""
    table = [line.split("|")[1:-1] for line in (ROOT / "docs" / "ppo_isaac.md").read_text().splitlines()]
    rows = [[cell.strip() for cell in row] for row in table if len(row) == 5]
    details = {row[0].partition(":")[0]: row for row in rows}
    for category, number in {"core": 13, "image": 9, "continuous": 9, "LSTM": 5, "MultiDiscrete": 1}.items():
        for i in range(1, number + 1):
            _, _, here, code, test = details.pop(f"{category} {i}")
            assert here.split()[0].strip(":,;") in ("adopted", "changed", "n.a.")
            assert here.startswith("n.a.") or (copies.REFERENCE.match(code) and "tests/" in test and "`test_" in test)
    assert set(details) == {"detail", "---"}


PARENT = '''import functools


@functools.cache
def square(x):
    """x * x."""
    return x * x


class Policy:
    """The first."""

    steps: int = 4  # of denoising

    def act(self):
        return 1

    def value(self):
        return 2


def main():
    return 0
'''
DECLARED = 'import functools\n\nPARENT = "parent.py"\nDIFFERS = {"main", "Policy.act", "Policy.kl"}'
CHILD = (
    PARENT.replace("import functools", DECLARED)
    .replace("The first.", "The second.")
    .replace("        return 1", "        return 3\n\n    def kl(self):\n        return 5")
    .replace("return 0", "return square(2)")
)


def test_a_drifted_copy_fails_and_is_repaired(tmp_path):
    parent, child = tmp_path / "parent.py", tmp_path / "child.py"
    parent.write_text(PARENT)
    child.write_text(CHILD)
    command = [sys.executable, str(ROOT / "tests" / "copies.py"), str(child)]
    assert copies.check_copies(child) == []
    for old, new, name in (
        ("return x * x", "return x**2", "square"),
        ("@functools.cache\n", "", "square"),
        ("steps: int = 4  # of denoising", "steps: int = 4", "Policy.steps"),
        ("return 2", "y = 2\n        return y", "Policy.value"),
    ):
        child.write_text(CHILD.replace(old, new))
        assert copies.check_copies(child) == [f"child.py: {name} differs from parent.py's, and does not stand in DIFFERS"]
        assert subprocess.run(command, capture_output=True).returncode == 1
        assert subprocess.run([*command, "--fix"], capture_output=True).returncode == 0 and child.read_text() == CHILD


def test_a_copy_may_have_two_parents(tmp_path):
    """Either text will do; where they are two, `--fix` does not choose."""
    other = PARENT.replace("return x * x", "return x**2").replace("return 2", "return 9")
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "other.py").write_text(other)
    child = tmp_path / "child.py"
    declared = CHILD.replace('"parent.py"', '("parent.py", "other.py")')
    for text in (declared, declared.replace("return x * x", "return x**2"), declared.replace("return 2", "return 9")):
        child.write_text(text)
        assert copies.check_copies(child) == []
    whose = "differs from parent.py's and other.py's, and does not stand in DIFFERS"
    for old, new, name in (("return x * x", "return x**3", "square"), ("of denoising", "", "Policy.steps")):
        child.write_text(declared.replace(old, new))
        assert copies.check_copies(child) == [f"child.py: {name} {whose}"]
        repaired = copies.check_copies(child, fix=True) == []
        assert repaired == (name == "Policy.steps") == (child.read_text() == declared)
    child.write_text(declared.replace("other.py", "nobody.py"))
    assert "the name of no script" in copies.check_copies(child)[0]


def test_the_list_of_differences_stays_true(tmp_path):
    parent, child = tmp_path / "parent.py", tmp_path / "child.py"
    parent.write_text(PARENT)
    for differs, problem in (
        ('"main", "Policy.act", "Policy.kl", "square"', "square of DIFFERS does not differ"),
        ('"main", "Policy.act", "Policy.kl", "Policy.value"', "Policy.value of DIFFERS does not differ"),
        ('"main", "Policy.act", "Policy.kl", "cube"', "cube of DIFFERS does not exist"),
        ('"main", "Policy.act"', "Policy.kl differs from parent.py's, and does not stand in DIFFERS"),
        ('"main"', "Policy differs from parent.py's, and does not stand in DIFFERS"),
    ):
        child.write_text(CHILD.replace('"main", "Policy.act", "Policy.kl"', differs))
        assert copies.check_copies(child) == [f"child.py: {problem}"]
    child.write_text(CHILD.replace('"Policy.act", "Policy.kl"', '"Policy"'))  # a whole class
    assert copies.check_copies(child) == []
    child.write_text(PARENT)  # says nothing of a parent
    assert len(copies.check_copies(child)) == 1
    (tmp_path / "README.md").write_text("`parent.py` (`Policy.act`), `parent.py` (`Policy.kl`), `parent.py:4` (`square`)")
    missing, numbered = copies.check_references(tmp_path)
    assert missing.endswith("no Policy.kl in parent.py") and "line numbers go stale" in numbered


# ---------------------------------------------------------------- a copy by a user

MINE = {  # a reward, a flag and a task of one's own
    "    # algorithm\n": "    # algorithm\n    bonus: float = 2.0  # what a success is worth\n",
    "group_advantages(success.float(),": "group_advantages(args.bonus * success.float(),",
    "\n\n# ======== Args": 'TASKS["Mine"] = dataclasses.replace(\n'
    '    TASKS["Tabletop-Lift-Cube-v0"], isaac="Tabletop-Lift-Cube-v0", instructions=("lift the cube",), target=None\n'
    ")\n\n\n# ======== Args",
    "import copy\n": "import copy\nimport dataclasses\n",
}


@pytest.mark.slow
def test_a_copy_runs_and_disturbs_nobody(tmp_path):
    root = tmp_path / "checkout"
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).is_file(), names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    text = (root / "grpo_gr00t.py").read_text()
    for old, new in MINE.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (root / "mine.py").write_text(text)
    shutil.copyfile(root / "ppo_gr00t_frozen.py", root / "frozen_mine.py")  # which names a parent, and need not obey

    def python(*command: str, **env: str):
        given = {**os.environ, "WANDB_MODE": "disabled", **env}
        done = subprocess.run([sys.executable, *command], cwd=root, env=given, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    small = "--num-envs 16 --group-size 8 --iterations 1 --eval-episodes 0 --device cpu"
    python("mine.py", "--task", "Mine", "--bonus", "3", *small.split())
    (made,) = (root / "runs").iterdir()
    assert made.name.startswith("mine__Mine__1__") and (made / "source/mine.py").read_text() == text
    assert json.loads((made / "args.json").read_text())["args"]["bonus"] == 3
    assert len((made / "metrics.jsonl").read_text().splitlines()) == 1
    assert json.loads((made / "summary.json").read_text())["task"] == "Mine"
    tests = "-q -n 0 -p no:cacheprovider tests/test_scripts.py".split()
    python("-m", "pytest", *tests, "-k", "not stock and not fit and not refused", CI="false")
