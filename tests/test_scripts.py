"""What all scripts share: command line, style, copies that do not drift, and one clear line for bad input."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from tests import copies

ROOT = Path(__file__).resolve().parents[1]


def defines(file: Path, name: str) -> bool:
    return copies.find(ast.parse(file.read_text()), name) is not None


COMMANDS = sorted(file.name for file in ROOT.glob("*.py") if defines(file, "Args"))
SCRIPTS = [script for script in COMMANDS if defines(ROOT / script, "train")]
GR00T = [script for script in SCRIPTS if "gr00t" in script]  # they start from a GR00T checkpoint, on the embedded task
STOCK = [script for script in SCRIPTS if script not in GR00T]  # they start from random weights, on Isaac Lab's own tasks
every_command = pytest.mark.parametrize("script", COMMANDS)
every_script = pytest.mark.parametrize("script", SCRIPTS)
every_gr00t_script = pytest.mark.parametrize("script", GR00T)
every_stock_script = pytest.mark.parametrize("script", STOCK)
BANNERS = ["imports", "Args", "env", "GR00T wrapper", "rollout", "loss", "train", "evaluate", "main"]
HOT = {"rollout", "update", "grpo_loss", "ppo_loss", "flow_matching_loss", "act", "denoise", "evaluate", "velocity", "value"}
HOT |= {"make_batch", "scaled_rewards", "log_prob", "entropy", "kl", "value_loss", "critic_input", "base_mean", "encode"}


def tree_of(script: str) -> ast.Module:
    return ast.parse((ROOT / script).read_text())


def fields_of(script: str) -> list[str]:
    body = copies.find(tree_of(script), "Args").body
    return [node.target.id for node in body if isinstance(node, ast.AnnAssign)]


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def scripts_with(*fields: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("script", [s for s in SCRIPTS if set(fields) <= set(fields_of(s))])


def run(script: str, *flags: str, cwd: Path, python: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *python, str(ROOT / script), *flags]
    env = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_the_scripts_are_there():
    assert {"grpo_gr00t.py", "sft_gr00t.py", "ppo_gr00t_frozen.py", "ppo_gr00t_lora.py"} <= set(GR00T)
    assert "ppo_isaac.py" in STOCK and "serve_gr00t.py" in set(COMMANDS) - set(SCRIPTS)


# ---------------------------------------------------------------- command line


@every_command
def test_help_is_instant_and_complete(script, tmp_path):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = run(script, "--help", cwd=tmp_path, python=("-X", "importtime"))
        seconds.append(time.perf_counter() - start)
        assert result.returncode == 0
    assert statistics.median(seconds) < 2, seconds
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")}
    assert "tyro" in imported and not imported & {"torch", "numpy", "gymnasium", "transformers", "isaaclab"}
    missing = [name for name in fields_of(script) if flag(name) not in result.stdout]
    assert not missing, f"not in --help: {missing}"


@every_command
def test_every_field_is_read(script):
    """As args.<name>, or by a getattr over a list of names; checking it before the run alone does not count."""
    tree = tree_of(script)
    modules = ("common", "gr00t_n1d5", "gr00t_tasks", "policies", "stock_tasks")
    before = ("Args", "resolve", "settle_args", "resumed_args", "run_name")
    before += ("check_numbers", "check_ranks", "check_task", "check_sampling")
    found: set[str] = set()
    statements, taken = list(tree.body), set()
    for statement in statements:  # and what they import from the modules, in turn
        name = next(iter(copies.names_of(statement)), None)
        if name in before:
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.ImportFrom) and node.module in modules:
                names = {(node.module, alias.name) for alias in node.names} - taken
                taken |= names
                statements += filter(None, (copies.find(tree_of(f"{module}.py"), each) for module, each in sorted(names)))
        calls = [n for n in ast.walk(statement) if isinstance(n, ast.Call) and ast.unparse(n.func) == "getattr"]
        by_name = any(ast.unparse(call.args[0]) in ("args", "self.args") for call in calls)
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("args", "self.args"):
                found.add(node.attr)
            elif by_name and isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.update(node.value.split())
    unread = set(fields_of(script)) - found
    assert not unread


@every_command
def test_every_field_is_explained(script):
    lines = (ROOT / script).read_text().split("\n")
    body = copies.find(tree_of(script), "Args").body
    bare = [n.target.id for n in body if isinstance(n, ast.AnnAssign) and "  # " not in lines[n.end_lineno - 1]]
    assert not bare


# ---------------------------------------------------------------- style


@every_script
def test_no_host_sync_in_hot_functions(script):
    """A transfer to the host in the inner loops would make a GPU wait; printing does not belong there either."""
    tree, found = tree_of(script), []
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in HOT - {"evaluate"}]
    for owner in (n for n in tree.body if isinstance(n, ast.ClassDef)):
        methods = [n for n in owner.body if isinstance(n, ast.FunctionDef)]
        if "act" in (m.name for m in methods):
            functions += [m for m in methods if m.name in HOT]
    assert len(functions) >= 2
    for function in functions:
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            if name in ("item", "tolist", "cpu", "numpy", "print"):
                found.append(f"{script}:{call.lineno} ({function.name}): {name}")
    assert not found


@every_script
def test_sections_stand_in_the_same_order(script):
    lines = (ROOT / script).read_text().split("\n")
    found = [line.strip("#= ") for line in lines if line.startswith("# ======== ")]
    wanted = [b for b in BANNERS if b in found or b != "GR00T wrapper" or "gr00t" in script]
    assert found == wanted
    assert len({len(line) for line in lines if line.startswith("# ======== ")}) == 1


@every_command
def test_length(script):
    """Without the marks of copies. The LoRA script holds a second algorithm, the schedule of stages."""
    lines = [line for line in (ROOT / script).read_text().splitlines() if "# Copied from " not in line]
    assert len(lines) <= {"ppo_gr00t_lora.py": 1100, "ppo_isaac.py": 600}.get(script, 900)


def test_ruff():
    beside = Path(sys.executable).with_name("ruff")
    ruff = str(beside) if beside.exists() else shutil.which("ruff")
    if not ruff:
        pytest.skip("ruff is not installed")
    result = subprocess.run([ruff, "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# ---------------------------------------------------------------- copies and line references


def test_copies_equal_their_sources():
    assert copies.check_copies(ROOT) == []


def test_documents_name_the_right_lines():
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


SOURCE = '''import functools

LIMIT: int = 3


@functools.cache
def square(x):
    """x * x."""
    return x * x


class Policy:
    def act(self):
        return 1

    def value(self):
        return 2
'''
COPYING = '''# Copied from source.py:LIMIT
LIMIT: int = 3


# Copied from source.py:square
@functools.cache
def square(x):
    """x * x."""
    return x * x


class Critic:
    # Copied from source.py:Policy.value
    def value(self):
        return 2

    def other(self):
        return 3
'''


def test_a_drifted_copy_fails_and_is_repaired(tmp_path):
    source, copying, document = tmp_path / "source.py", tmp_path / "copying.py", tmp_path / "README.md"
    source.write_text(SOURCE)
    copying.write_text(COPYING)
    document.write_text("`source.py:7` (`square`), `source.py:13` (`Policy.act`), `copying.py:17` (`Critic.other`)")
    assert copies.check(tmp_path) == []
    source.write_text(SOURCE.replace("return x * x", "y = x * x\n    return y").replace("return 2", "return 4"))
    problems = copies.check(tmp_path)
    assert problems[0].startswith("copying.py:13 ") and problems[1].startswith("copying.py:5 ")
    assert len(problems) == 3 and "line 14" in problems[2]
    command = [sys.executable, str(ROOT / "tests" / "copies.py"), str(tmp_path)]
    assert subprocess.run(command, capture_output=True).returncode == 1
    assert subprocess.run([*command, "--fix"], capture_output=True).returncode == 0
    assert "y = x * x\n    return y\n\n\nclass Critic" in copying.read_text()
    assert "        return 4\n\n    def other" in copying.read_text()
    assert document.read_text() == "`source.py:7` (`square`), `source.py:14` (`Policy.act`), `copying.py:18` (`Critic.other`)"
    for old, new in (("return x * x", "return x ** 2"), ("@functools.cache\n", ""), ("LIMIT: int = 3", "LIMIT = 3")):
        source.write_text(SOURCE)
        copying.write_text(COPYING.replace(old, new))
        document.write_text("")
        assert len(copies.check(tmp_path)) == 1
        assert copies.check(tmp_path, fix=True) == [] and copying.read_text() == COPYING


def test_what_cannot_be_repaired_is_said(tmp_path):
    (tmp_path / "source.py").write_text(SOURCE)
    (tmp_path / "copying.py").write_text("# Copied from source.py:cube\nx = 1\n# Copied from other.py:y\ny = 1\n")
    (tmp_path / "README.md").write_text("`source.py:1` (`cube`)")
    assert len(copies.check(tmp_path, fix=True)) == 3


# ---------------------------------------------------------------- bad input

SIMULATOR = "the simulator was started"


@pytest.fixture
def basics(request, tmp_path, monkeypatch):
    """What a script needs in order to get as far as the simulator, which is not started: there it fails."""
    monkeypatch.chdir(tmp_path)

    def make_env(*args, **kwargs):
        raise AssertionError(SIMULATOR)

    def given(script: str) -> dict:
        monkeypatch.setattr(importlib.import_module(Path(script).stem), "make_env", make_env)
        if script in STOCK:
            from isaaclab.utils import assets

            monkeypatch.setattr(assets, "check_file_path", lambda path: 1)  # as if all of them lay on this disk
        same = {"checkpoint": str(request.getfixturevalue("tiny_checkpoint"))} if script in GR00T else {}
        return {"device": "cpu", "track": False, **same}

    return given


@pytest.fixture
def refusal(basics):
    """Runs a script's main with bad input and returns its message; the simulator must not have been started."""

    def message(script: str, **overrides) -> str:
        module = importlib.import_module(Path(script).stem)
        with pytest.raises(module.UsageError) as caught:
            module.main(module.Args(**basics(script) | overrides))
        text = str(caught.value)
        assert text and "\n" not in text and "Traceback" not in text
        return text

    return message


NOT_POSITIVE = (
    "num_envs iterations steps demos frames_per_demo batch_size save_every keep_checkpoints denoise_steps "
    "noise_level learning_rate clip epochs minibatches micro_batch_size log_ratio_clamp max_grad_norm chunk "
    "max_memory_gb pad_prompt "
    "num_steps target_kl stop_kl clip_obs clip_rewards clip_actions init_std lstm_size frame_skip "
    "rollout_chunks critic_lr critic_epochs value_clip kl_target lora_rank lora_alpha llm_layers plateau unfreeze_kl"
).split()
NEGATIVE = "kl_coef lr_warmup lr_hold eval_every eval_episodes seed eval_seed weight_decay ema".split()
NEGATIVE += "entropy_coef value_coef gamma gae_lambda noop_max critic_warmup lora_dropout".split()
AT_MOST_ONE = "gamma gae_lambda lora_dropout".split()


SIZES = [*((f, v) for f in NOT_POSITIVE for v in (0, -1)), *((f, -1) for f in NEGATIVE)]


@pytest.mark.parametrize("script, field, value", [(s, f, v) for s in SCRIPTS for f, v in SIZES if f in fields_of(s)])
def test_sizes(script, field, value, refusal):
    assert refusal(script, **{field: value}).startswith(f"{flag(field)} {value}:")


@pytest.mark.parametrize("script, field", [(s, f) for s in SCRIPTS for f in AT_MOST_ONE if f in fields_of(s)])
def test_fractions(script, field, refusal):
    assert refusal(script, **{field: 1.01}).startswith(f"{flag(field)} 1.01:")


@every_script
def test_every_number_is_among_those_above(script):
    fields = [n for n in copies.find(tree_of(script), "Args").body if isinstance(n, ast.AnnAssign)]
    numbers = {n.target.id for n in fields if ast.unparse(n.annotation).split()[0] in ("int", "float")}
    assert len(numbers) > 10 and not numbers - {*NOT_POSITIVE, *NEGATIVE, "group_size"}


@every_script
def test_unknown_task(script, refusal):
    wrong, right = "Tabletop-Lift-Cup-v0", "Tabletop-Lift-Cube-v0"
    if script in STOCK:
        wrong, right = "Isaac-Kartpole-Direct", "Isaac-Cartpole-Direct"
    text = refusal(script, task=wrong)
    assert text.startswith(f"--task {wrong}:") and right in text


@every_script
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_absent_gpu(script, device, refusal):
    assert refusal(script, device=device).startswith(f"--device {device}:")


@every_script
def test_unknown_device(script, refusal):
    assert refusal(script, device="gpu").startswith("--device gpu:")


@scripts_with("group_size")
def test_groups(script, refusal, monkeypatch):
    assert refusal(script, num_envs=24, group_size=16).startswith("--num-envs 24:")
    for size in (1, 0, -4):
        assert refusal(script, num_envs=16, group_size=size).startswith(f"--group-size {size}:")
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = refusal(script, num_envs=32, group_size=16)
    assert text.startswith("--num-envs 32:") and "4 ranks" in text


@every_gr00t_script
@pytest.mark.parametrize("evaluate", [False, True])
def test_checkpoints(script, evaluate, refusal, tiny_checkpoint, write_checkpoint, tmp_path):
    def refused(folder: Path) -> str:
        text = refusal(script, checkpoint=str(folder), evaluate=evaluate)
        assert text.startswith(f"--checkpoint {folder}:")
        return text

    refused(tmp_path / "missing")
    truncated = shutil.copytree(tiny_checkpoint, tmp_path / "truncated")
    weights = next(truncated.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100_000])
    refused(truncated)
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["action_head_cfg"]["hidden_size"] += 8
    (other / "config.json").write_text(json.dumps(config))
    refused(other)
    if evaluate or script != "sft_gr00t.py":  # which fits the statistics to the task
        text = refused(write_checkpoint(tmp_path / "arm", {"arm": 3, "fingers": 2}, {"arm": 5, "gripper": 1}))
        assert "6 action dimensions" in text and "has 4" in text


@every_stock_script
def test_environments_and_minibatches(script, refusal, monkeypatch):
    text = refusal(script, num_envs=2, num_steps=3, minibatches=4)
    assert text.startswith("--minibatches 4:") and "6 steps" in text
    if "recurrent" in fields_of(script):
        text = refusal(script, num_envs=8, recurrent=True, minibatches=5)
        assert text.startswith("--minibatches 5:") and "8 environments" in text
    monkeypatch.setenv("WORLD_SIZE", "4")
    text = refusal(script, num_envs=30)
    assert text.startswith("--num-envs 30:") and "4 ranks" in text


@scripts_with("hidden")
@pytest.mark.parametrize("hidden", [(), (0,), (32, -1)])
def test_hidden(script, hidden, refusal):
    assert refusal(script, hidden=hidden).startswith(f"--hidden {' '.join(map(str, hidden))}:")


def write_policy(script: str, folder: Path, **changes) -> Path:
    """A checkpoint folder whose weights are those of no network."""
    module = importlib.import_module(Path(script).stem)
    args = module.resolve(module.Args(device="cpu", exp_name="any"))
    folder.mkdir()
    kept = {name: getattr(args, name) for name in ("task", *module.NETWORK)}
    (folder / "policy.json").write_text(json.dumps(kept | changes))
    (folder / "policy.safetensors").write_bytes(b"nothing")
    return folder


@every_stock_script
@pytest.mark.parametrize("evaluate", [False, True])
def test_policies(script, evaluate, refusal, tmp_path):
    def refused(folder: Path, **flags) -> str:
        text = refusal(script, checkpoint=str(folder), evaluate=evaluate, **flags)
        assert text.startswith(f"--checkpoint {folder}:")
        return text

    refused(tmp_path / "missing")
    folder = write_policy(script, tmp_path / "other", task="Isaac-Ant-Direct")
    task = json.loads((write_policy(script, tmp_path / "own") / "policy.json").read_text())["task"]
    text = refused(folder, task=task)
    assert "Isaac-Ant-Direct" in text and task in text
    for content in (json.dumps({"task": task}), "{"):  # of another script; cut short
        (folder / "policy.json").write_text(content)
        refused(folder)


@every_stock_script
def test_evaluation_of_nothing(script, refusal):
    text = refusal(script, evaluate=True)
    assert text.startswith("--evaluate:") and "--checkpoint" in text


@every_stock_script
def test_tasks_for_several_agents(script, refusal):
    text = refusal(script, task="Isaac-Pendulum-MARL-Direct")
    assert text.startswith("--task Isaac-Pendulum-MARL-Direct:") and "single agent" in text


@every_stock_script
def test_action_spaces(script, refusal):
    text = refusal(script, overrides=("env.action_space={}",))
    assert text.startswith("--task ") and "Dict()" in text and "MultiDiscrete" in text


@every_stock_script
def test_numbers_and_images(script, refusal):
    """Each of the two scripts names the other one for a task that observes the other kind."""
    images = "rgb" in script
    task, other = ("Isaac-Cartpole-Direct", "ppo_isaac.py") if images else ("Isaac-Cartpole-Camera-Direct", "ppo_isaac_rgb.py")
    text = refusal(script, task=task)
    assert text.startswith(f"--task {task}:") and other in text.split()


@scripts_with("obs_groups")
@pytest.mark.parametrize("task, known", [("Isaac-Cartpole-Direct", "policy"), ("Isaac-Lift-Franka", "proprio")])
def test_observation_groups(script, task, known, refusal):
    text = refusal(script, task=task, obs_groups=("policy", "privileged"))
    assert text.startswith("--obs-groups privileged:") and known in text
    text = refusal(script, task=task, obs_groups=())
    assert text.startswith("--obs-groups: needs at least one") and known in text


@every_stock_script
def test_presets(script, refusal):
    text = refusal(script, overrides=("presets=nonsense",))
    assert "presets=nonsense" in text and "--overrides" in text
    text = refusal(script, physics="bullet")
    assert "physics=bullet" in text and "--physics" in text and "newton_mjwarp" in text


@every_stock_script
def test_assets_that_cannot_be_reached(script, tmp_path):
    """Isaac Lab reads the setting when it is imported, hence a process; what looks for a file has a say, too."""
    result = run(script, "--device", "cpu", "--no-track", cwd=tmp_path, ISAACSIM_ASSET_ROOT=str(tmp_path / "empty"))
    errors = [line for line in result.stderr.splitlines() if not line.startswith("I: ")]
    assert result.returncode == 1 and len(errors) == 1 and errors[0].startswith("error: --task ")
    assert f"cannot reach {tmp_path / 'empty'}/" in errors[0] and ".usd" in errors[0] and "ISAACSIM_ASSET_ROOT" in errors[0]
    assert not (tmp_path / "runs").exists()


@scripts_with("instruction")
@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("instruction", ["lift the green cube", "lift the red cube " * 8])
def test_instructions(script, instruction, evaluate, refusal):
    """A word that the tokenizer lacks; a prompt that is too long."""
    text = refusal(script, instruction=instruction, evaluate=evaluate)
    assert text.startswith("--instruction") and ("green" in text or "at most 32" in text)


@scripts_with("embodiment_tag")
def test_unknown_embodiment(script, refusal):
    text = refusal(script, embodiment_tag="octopus", evaluate=True)
    assert "octopus" in text and "embodiment" in text


@scripts_with("chunk")
def test_chunk(script, refusal):
    for chunk in (5, 16):  # does not divide the episode; is more than the model gives
        assert refusal(script, chunk=chunk).startswith(f"--chunk {chunk}:")


@scripts_with("feature_cache")
def test_memory(script, refusal, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: types.SimpleNamespace(available=100_000))
    text = refusal(script, num_envs=128)
    assert text.startswith("--num-envs 128:") and "512 samples" in text and "--feature-cache off" in text


@scripts_with("reward")
@pytest.mark.parametrize("reward", ["sparse", "dense"])
@pytest.mark.parametrize("rewards", ["none", "empty", "own"])
def test_dense_reward_of_a_task_without_any(script, reward, rewards, basics, monkeypatch):
    """A variant of the embedded task, through the script's own `make_env`; only what starts the simulator is cut off."""
    import gymnasium
    import isaaclab.app
    from gymnasium.envs.registration import EnvSpec

    import tabletop

    def start(*args, **kwargs):
        raise AssertionError(SIMULATOR)

    def without_rewards():
        cfg = tabletop.LiftEnvCfg()
        cfg.rewards = {"none": None, "empty": types.SimpleNamespace(), "own": cfg.rewards}[rewards]
        return cfg

    module, task = importlib.import_module(Path(script).stem), "Tabletop-Lift-Without-Rewards-v0"
    make_env, row = module.make_env, module.TASKS[tabletop.TASK_ID]
    given = basics(script)
    monkeypatch.setattr(module, "make_env", make_env)
    monkeypatch.setattr(isaaclab.app, "launch_simulation", start)
    monkeypatch.setitem(module.TASKS, task, row)
    spec = EnvSpec(task, "tabletop:LiftEnv", kwargs={"env_cfg_entry_point": without_rewards})
    monkeypatch.setitem(gymnasium.registry, task, spec)
    refused = reward == "dense" and rewards != "own"
    with pytest.raises(module.UsageError if refused else AssertionError) as caught:
        module.main(module.Args(**given, task=task, reward=reward))
    text = str(caught.value)
    assert text == (f"--reward dense: {task} has no rewards; use --reward sparse" if refused else SIMULATOR)


@scripts_with("noise")
def test_noise_without_a_stochastic_step(script, refusal):
    text = refusal(script, noise="flow-cps", denoise_steps=1)
    assert text.startswith("--noise flow-cps:") and "--denoise-steps" in text


@every_script
def test_run_folder(script, refusal, tmp_path):
    (tmp_path / "runs").touch()
    assert refusal(script, exp_name="mine").startswith("--exp-name mine:")
    (tmp_path / "runs").unlink()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "metrics.jsonl").touch()
    assert refusal(script, exp_name="mine").startswith("--exp-name mine:")


def interrupted_run(script: str, folder: Path, given: dict, **overrides) -> Path:
    """A run folder as `--resume` reads it."""
    module = importlib.import_module(Path(script).stem)
    args = module.resolve(module.Args(**given, exp_name=folder.name))
    content = {**dataclasses.asdict(args), **overrides}
    (folder / "checkpoints" / "step_000001").mkdir(parents=True)
    (folder / "checkpoints" / "step_000001" / "trainer_state.pt").touch()
    (folder / "args.json").write_text(json.dumps({"args": content}))
    return folder


@scripts_with("resume")
def test_resume(script, refusal, basics, tmp_path):
    missing = f"--resume {tmp_path / 'runs'}:"
    assert refusal(script, resume=str(tmp_path / "runs")).startswith(missing)
    folder = interrupted_run(script, tmp_path / "runs" / "mine", basics(script))
    text = refusal(script, resume=str(folder), learning_rate=0.5)
    assert text.startswith("--learning-rate 0.5:")
    assert refusal(script, resume=str(folder), num_envs=4096).startswith("--num-envs 4096:")
    (folder / "args.json").write_text(json.dumps({"args": {"group": 1}}))
    assert refusal(script, resume=str(folder)).startswith(f"--resume {folder}:")
    shutil.rmtree(folder)
    folder = interrupted_run(script, tmp_path / "runs" / "mine", basics(script))
    shutil.rmtree(folder / "checkpoints" / "step_000001")
    assert refusal(script, resume=str(folder)).startswith(f"--resume {folder}:")


@scripts_with("resume")
def test_resume_of_a_damaged_checkpoint(script, refusal, basics, tmp_path):
    folder = interrupted_run(script, tmp_path / "runs" / "mine", basics(script))
    assert refusal(script, resume=str(folder)).startswith(f"--resume {folder}:")


@scripts_with("resume")
def test_a_resumed_rank_takes_its_own_gpu(script, basics, tmp_path, monkeypatch):
    module = importlib.import_module(Path(script).stem)
    folder = interrupted_run(script, tmp_path / "runs" / "mine", basics(script), device="cuda:0")  # rank 0 wrote it
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert module.resolve(module.Args(resume=str(folder), track=False)).device == "cuda:1"


@every_script
def test_defaults_are_accepted(script, basics):
    """What the tests above refuse is refused for the reason given: without it the run goes on to the simulator."""
    module = importlib.import_module(Path(script).stem)
    with pytest.raises(AssertionError, match=SIMULATOR):
        module.main(module.Args(**basics(script)))


def test_message_and_exit_code(tmp_path):
    """The same through the command line: one line on stderr, no traceback."""
    result = run("grpo_gr00t.py", "--task", "Tabletop-Lift-Cup-v0", "--device", "cpu", cwd=tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: --task Tabletop-Lift-Cup-v0:") and result.stderr.count("\n") == 1


@every_command
def test_errors_end_alike(script):
    """torch takes seconds to import, so only one script is started for this; the others end in the same lines."""
    assert ast.unparse(tree_of(script).body[-1]) == ast.unparse(tree_of("grpo_gr00t.py").body[-1])


@every_script
def test_unknown_choice(script, tmp_path):
    choice = next(flag(name) for name in ("noise", "tune", "schedule") if name in fields_of(script))
    result = run(script, choice, "brown", cwd=tmp_path)
    assert result.returncode == 2 and choice in result.stderr and "Traceback" not in result.stderr
