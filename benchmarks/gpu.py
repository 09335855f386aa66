"""The first hour on a GPU: everything that has to be measured there, most valuable first, in steps of at most 8 minutes.

    python benchmarks/gpu.py --rung 1                 # one rung
    python benchmarks/gpu.py --minutes 10             # as many steps as fit, from where the last call stopped
    python benchmarks/gpu.py --device cpu             # the same ladder with the tiny network: does every step run at all?

Rungs: 1 paths and exactness; 2 full-size rollout; 3 full-size update and memory; 4 the simulator; 5 the main job, tiny
network; 6 the main job at full size, random weights. Every step is a process of its own with a time limit; its line goes to
--out/results.jsonl as soon as it has ended, and the table beside it is written anew. A step that has succeeded on this
device is not repeated. Steps that need Isaac Lab say so where it is not installed; the others need gymnasium, tensordict
and tyro. benchmarks/parcels.py brings all of them to a machine without a network.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

Check = Literal["ratio", "sync", "again", "compiled", "ppo_isaac", "simulator"]
Script = Literal["grpo_gr00t", "grpo_gr00t_lora", "ppo_gr00t_frozen", "ppo_gr00t_lora"]
SCRIPTS: tuple[Script, ...] = get_args(Script)


@dataclass
class Args:
    rung: int | None = None  # 1 to 6; all of them by default
    minutes: float | None = None  # begin no step that may end later
    device: str = "auto"  # cpu: with the tiny network and small numbers
    out: Path = ROOT / "runs" / "gpu"  # results.jsonl, table.md
    check: Check | None = None  # what a step of rungs 1 and 4 does in its own process
    scripts: tuple[Script, ...] = SCRIPTS  # that the checks of rung 1 look at


class Step(NamedTuple):
    rung: int
    name: str
    command: str
    isaaclab: bool = False  # needs it


def steps(device: str) -> list[Step]:
    """The ladder; a CPU gets the tiny network and small numbers."""
    gpu = device != "cpu"
    many, random, size = (4096, "runs/random_3b", "full") if gpu else (32, "runs/random_tiny", "tiny")
    bench = f"benchmarks/throughput.py --device {device} --out runs/gpu/throughput_{device.replace(':', '')}"
    bench += " --what" if gpu else " --compile-backend eager --what"  # the compiler for CPUs takes minutes
    full = f"ppo_gr00t_frozen.py --device {device} --eval-episodes 0 --checkpoint {random} --num-envs {many} --iterations 1"
    full += " --critic-warmup 0 --exp-name gpu_full"  # random weights never succeed: GRPO would have no gradient
    demo = f"grpo_gr00t.py --device {device} --exp-name gpu_demo" + (
        "" if gpu else " --num-envs 32 --iterations 2 --eval-episodes 32"
    )
    demos = f"sft_gr00t.py --device {device} --demos {4 * many} --num-envs {many}"
    grpo, its = f"--device {device} --eval-episodes 0 --num-envs", 20 if gpu else 2
    tiny = [
        Step(
            5,
            f"{name}, tiny network, {n} environments",
            f"{name}.py {grpo} {n} --iterations {its} --exp-name gpu_{name}_{n}",
            True,
        )
        for name in ("grpo_gr00t", "grpo_gr00t_lora")
        for n in ((1024, 4096) if gpu else (32,))
    ]
    sizes, few, shape = ((64, 512, 4096), 20, "256 1 64 1024 4096") if gpu else ((8, 32), 4, "8 1 32")
    rates = [(n, "64") for n in sizes[:-1]] + [(many, "64 128 224" if gpu else "64 128")]
    body = "Isaac-Humanoid-Direct" if gpu else "Isaac-Cartpole-Direct"
    peers = f"benchmarks/ppo_vs_peers.py --task {body} --libs ppo_isaac rsl_rl --num-envs {many}"
    others = ("grpo_gr00t_lora", "ppo_gr00t_frozen", "ppo_gr00t_lora")
    checks = ("ratio", "sync", "again", "ppo_isaac")
    pytest, own = "-m pytest -q -n 0 tests/test_gpu_paths.py", f"benchmarks/gpu.py --device {device} --check"
    compiled = [  # minutes of the compiler for each script; the tests' own start needs the simulator's assets
        step
        for script in (SCRIPTS if gpu else SCRIPTS[:1])
        for step in (
            Step(1, f"compiled, {script}", f"{own} compiled --scripts {script}"),
            Step(1, f"captured, {script}", f"{pytest} -k 'captured and -{script}]'", True),
        )
    ]
    return [
        Step(1, "tests", f"{pytest} tests/test_common.py -k '(gpu or triton or float8) and not captured'", True),
        *(Step(1, name, f"{own} {name}") for name in checks),
        *compiled,
        Step(2, "the scripts' rollout and update", f"{bench} update --views 1 --scripts grpo_gr00t --row-seconds 5"),
        Step(2, "rollout, lever by lever", f"{bench} rollout --views 1 --row-seconds 5 --batch-sizes {shape}"),
        Step(3, "memory", f"{bench} memory --views 1"),
        Step(3, "update of the others", f"{bench} update --views 1 --precisions plain --scripts {' '.join(others)}"),
        Step(2, "rollout, 2 views", f"{bench} rollout --views 2 --row-seconds 5 --batch-sizes {shape.split()[0]}"),
        Step(4, "exactness of the simulator", f"benchmarks/gpu.py --check simulator --device {device}", True),
        Step(4, "expert", f"{demos} --steps 1 --eval-episodes 0 --exp-name gpu_expert", True),
        *(
            Step(4, f"simulator, {n} environments", f"{bench} newton --newton-envs {n} --newton-sizes {pixels}", True)
            for n, pixels in rates
        ),
        *tiny,
        Step(5, "README's command", demo, True),
        Step(5, "PPO beside rsl_rl", f"{peers} --iterations {few} --seeds 1 --device {device} --out-dir runs/gpu/peers", True),
        Step(6, "random weights", f"benchmarks/random_checkpoint.py --task Tabletop-Lift-Cube-v0 --out {random} --size {size}"),
        Step(6, "PPO, random weights, within 40 GB", f"{full}_40 --max-memory-gb 40", True),
        Step(6, "PPO, random weights", full, True),
    ]  # fmt: skip


LIMIT = 480  # seconds of a step
LINES = 2000  # that a step with a simulator may print: a warning of every world's every step is more


def figures(step: Step, output: str) -> dict[str, Any]:
    """What a step says of itself: the last line of JSON that it prints, and the figures of its run's last iteration."""
    found: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
        if "expert success" in line:
            found["expert"] = float(line.split()[-1])
    summary = run_folder(step) / "summary.json"
    if summary.is_file():
        content = json.loads(summary.read_text())
        found |= {key: content[key] for key in ("seconds", "steps_per_second", "peak_memory_gb") if key in content}
        after = content.get("ode_success_after") or {}
        found |= {"success": after["mean"]} if after else {}
    return found


def run_folder(step: Step) -> Path:
    """Of a training run; of other steps one that there is not."""
    return ROOT / "runs" / (step.command.split("--exp-name ")[1].split()[0] if "--exp-name" in step.command else "gpu_no_run")


def table(rows: list[dict]) -> str:
    lines = ["| rung | step | device | result | seconds | figures |", "|---|---|---|---|---|---|"]
    for row in rows:
        shown = "; ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row["figures"].items()
        )
        cells = row["rung"], row["name"], row["device"], row["result"], f"{row['seconds']:.0f}", shown
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def climb(args: Args) -> None:
    from common import pick_device

    device, start = pick_device(args.device), time.monotonic()
    file = args.out / "results.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    done = {(row["name"], row["device"]) for row in rows if row["result"] == "ok"}
    for step in steps(device):
        if (args.rung and step.rung != args.rung) or (step.name, device) in done:
            continue
        left = args.minutes and args.minutes - (time.monotonic() - start) / 60
        if left is not None and left < 1:
            break
        began, output, result = time.monotonic(), "", "ok"
        if step.isaaclab and not importlib.util.find_spec("isaaclab"):
            result = "isaaclab is not installed"
        else:
            limit = min(LIMIT, 60 * left) if left else LIMIT
            shutil.rmtree(run_folder(step), ignore_errors=True)  # of a try that was cut off
            command, env = [sys.executable, *shlex.split(step.command)], os.environ | {"WANDB_MODE": "disabled"}
            if "Isaac-" in step.command and "ISAACSIM_ASSET_ROOT" not in env:
                from tests.assets import mirror

                env["ISAACSIM_ASSET_ROOT"] = str(mirror())  # stand-ins
            pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            run = subprocess.Popen(command, cwd=ROOT, env=env, **pipe)
            try:
                output, _ = run.communicate(timeout=limit)
                result = "ok" if run.returncode == 0 else f"failed: {(output.strip().splitlines() or ['no word'])[-1][:200]}"
            except subprocess.TimeoutExpired:
                run.kill()
                output, result = run.communicate()[0], f"longer than {limit:.0f} s"
            (args.out / f"{step.rung}_{step.name.replace(' ', '_').replace(',', '')}.log").write_text(output)
        if step.isaaclab and result == "ok":
            result = "ok" if output.count("\n") < LINES else f"failed: {output.count(chr(10))} lines printed"
        row = {"rung": step.rung, "name": step.name, "device": device, "result": result, "seconds": time.monotonic() - began}
        rows.append(row | {"figures": figures(step, output) if result == "ok" else {}, "command": step.command})
        with file.open("a") as lines:
            lines.write(json.dumps(rows[-1]) + "\n")
        (args.out / "table.md").write_text(table(rows))
        print(f"{step.rung} {step.name}: {result}, {rows[-1]['seconds']:.0f} s {rows[-1]['figures']}", flush=True)


# ======== the checks of rung 1: in a process of their own, with the shipped checkpoint and generated observations =====
def check(name: Check, device: str, names: tuple[Script, ...] = SCRIPTS) -> None:
    import tempfile

    import torch
    import torch._dynamo
    from tensordict import TensorDict

    from common import Metrics, Noise, Ranks, pick_device
    from gr00t_n1d5.policy import take

    device, alone = pick_device(device), Ranks(0, 1)
    scripts = [importlib.import_module(module) for module in names]
    g = torch.Generator().manual_seed(0)

    def actor(script, **flags):
        own = script.Args(device=device, **flags)
        return own, script.Gr00tActor(own)

    def observed(n: int) -> TensorDict:
        seen = {
            "images": torch.randint(256, (n, 1, 64, 64, 3), generator=g, dtype=torch.uint8),
            "state": torch.randn(n, 5, generator=g),
        }
        seen |= {"critic": torch.randn(n, 6, generator=g), "prompt": torch.arange(n) % 2}
        return TensorDict(seen, n).to(device)

    def acted(own, policy, obs: TensorDict) -> TensorDict:
        features = policy.feature_buffer(1, len(obs), own.feature_cache)
        out = policy.act(obs, Noise(device, alone, 1), True, None if features is None else features[0])
        batch = TensorDict(
            {**obs, **out, "advantage": torch.ones_like(out["log_prob"]), "weight": torch.ones_like(out["log_prob"])}, len(obs)
        )
        return batch if features is None else batch.exclude("images").set("features", features[0])

    def loss(script, policy, batch: TensorDict, own, log: Metrics | None = None) -> torch.Tensor:
        function = script.grpo_loss if hasattr(script, "grpo_loss") else script.ppo_loss
        return function(policy, batch, own, log or Metrics(device, alone), True)

    found: dict[str, Any] = {}
    if name == "simulator":
        return simulate(device)
    if name == "ppo_isaac":
        found = ppo_update(device)
    elif name == "compiled":  # frames that dynamo has left to eager, and the ratio between compiled rollout and update
        for script in scripts:
            torch._dynamo.utils.counters.clear()
            own, policy = actor(script, compile=True, micro_batch_size=100)
            batch, log = acted(own, policy, observed(138)), Metrics(device, alone)
            for rows in torch.arange(138).split([1, 37, 100]):
                loss(script, policy, take(batch, rows, device), own, log).backward()
            frames = torch._dynamo.utils.counters["frames"]
            found[f"{script.__name__} frames left to eager"] = frames["total"] - frames["ok"]
            found[f"{script.__name__} ratio"] = log.read()["update/first_ratio_error"]
    elif name == "ratio":  # largest |ratio - 1| where nothing has been learned, in batches cut otherwise than the rollout's
        for script in scripts:
            for precision in ("fp32", "bf16"):
                for cache in ("gpu", "off"):
                    own, policy = actor(script, precision=precision, feature_cache=cache)
                    batch, worst = acted(own, policy, observed(138)), 0.0
                    for rows in torch.arange(138).split([1, 37, 100]):
                        part = take(batch, rows, device)
                        part["features"] = policy.features(part)
                        with torch.no_grad():
                            worst = max(worst, float((policy.evaluate(part)[0] - part["log_prob"]).expm1().abs().max()))
                    found[f"{script.__name__} {precision} {cache}"] = worst
    elif name == "sync":  # whether rollout or update waits for the device
        if device == "cpu":
            found["obstacle"] = "needs a GPU"
        else:
            for script in scripts:
                for cache in ("gpu", "cpu"):
                    own, policy = actor(script, feature_cache=cache)
                    obs, rows = observed(256), torch.arange(256)
                    for mode in ("default", "error"):
                        torch.cuda.set_sync_debug_mode(mode)
                        batch = acted(own, policy, obs)
                        torch.cuda.set_sync_debug_mode("default")
                        torch.cuda.synchronize()  # the one wait, for which samples to keep; host features have arrived
                        torch.cuda.set_sync_debug_mode(mode)
                        loss(script, policy, take(batch, rows, device), own).backward()
                        torch.cuda.set_sync_debug_mode("default")
                    found[f"{script.__name__} {cache}"] = "no wait"
    else:  # an update, saved, loaded, one more: equal to two updates
        for script in scripts:
            own, policy = actor(script)
            optimizer = torch.optim.SGD(policy.trainable(), 1e-2)
            batch = acted(own, policy, observed(64))
            for again in (False, True):
                optimizer.zero_grad()
                loss(script, policy, batch.copy(), own).backward()  # which adds features to it
                optimizer.step()
                if not again:
                    with tempfile.TemporaryDirectory() as folder:
                        _, other = actor(script)
                        (policy.save_adapters if hasattr(policy, "save_adapters") else policy.save)(Path(folder))
                        other.load(Path(folder))
            optimizer = torch.optim.SGD(other.trainable(), 1e-2)
            loss(script, other, batch.copy(), own).backward()
            optimizer.step()
            pairs = zip(policy.trainable(), other.trainable(), strict=True)
            found[script.__name__] = max(float((a - b).abs().max()) for a, b in pairs)
    print(json.dumps(found))


def ppo_update(device: str) -> dict[str, Any]:
    """An update of ppo_isaac.py from one generated rollout, here and on a CPU; on a GPU, nothing may wait for it."""
    from types import SimpleNamespace

    import torch

    import ppo_isaac as script
    from common import Metrics, Ranks

    spaces, T, N, alone, ends = script.Spaces((24,), (), 6, ()), 16, 256, Ranks(0, 1), []
    for place in ("cpu", device):
        own = script.Args(task="generated", device=place, num_envs=N, num_steps=T)
        g, log = torch.Generator().manual_seed(0), Metrics(place, alone)
        torch.manual_seed(0)
        policy = script.ActorCritic(spaces, own).to(place)
        flat = script.flat_parameter(policy)
        optimizer = torch.optim.Adam([flat], torch.tensor(own.learning_rate, device=place), eps=1e-5, fused=True)
        env = SimpleNamespace(num_envs=N, spaces=spaces, base=SimpleNamespace(extras={}))
        env.episodes = lambda reward, done: (reward, reward)
        store = script.Storage(own, env)
        drawn = {key: torch.randn(x.shape, generator=g) for key, x in store.samples.items()}
        store.samples.update_({key: x > 1.5 if store.samples[key].dtype == torch.bool else x for key, x in drawn.items()})
        store.log_std, store.before = policy.log_std.detach().clone(), []
        with torch.no_grad():
            store.samples["params"].copy_(policy(policy.obs_norm(store.samples["obs"]))[0])
        batch = script.make_batch(env, policy, store, own, alone, log)
        plan = script.plan_minibatches(store.units, 0, dataclasses.replace(own, device="cpu"), alone)
        plan = [(rows.to(place), n) for rows, n in plan]
        if place != "cpu":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        script.update(policy, optimizer, batch, store, plan, own, alone, log)
        if place != "cpu":
            torch.cuda.set_sync_debug_mode("default")
        ends.append(flat.detach().cpu())
        figures = log.read()
    return {"difference": float((ends[0] - ends[1]).abs().max()), "first ratio": figures["update/first_ratio_error"]}


def simulate(device: str) -> None:
    """Prints whether members of a group stay alike and a seed gives the same episode twice, in the state of all bodies.

    Largest differences over an episode of random actions; 0 is what the scripts hope for. On a GPU, also by how much its
    free memory shrank, torch's own left out.
    """
    import tempfile

    import torch

    import grpo_gr00t
    from common import Ranks

    N, group = (1024, 16) if device != "cpu" else (32, 16)
    before = torch.cuda.mem_get_info()[0] if device != "cpu" else 0  # other processes may be there

    def leaves(tree: Any) -> list[torch.Tensor]:
        return [leaf for value in tree.values() for leaf in leaves(value)] if isinstance(tree, dict) else [tree.flatten(1)]

    with tempfile.TemporaryDirectory() as folder:
        with grpo_gr00t.make_env(grpo_gr00t.Args(num_envs=N, device=device), 64, Path(folder), Ranks(0, 1)) as env:
            T, d, episodes, images = env.task.horizon, sum(env.task.action.values()), [], []
            g = torch.Generator().manual_seed(0)
            actions = (torch.rand(N // group, T, d, generator=g) * 2 - 1).repeat_interleave(group, 0).to(device)
            for _ in range(2):
                env.reset(1, group)
                states = []
                for t in range(T):
                    env.step_chunk(actions[:, t : t + 1], last=True)
                    states.append(torch.cat(leaves(env.env.scene.get_state(is_relative=True)), 1))
                episodes.append(torch.stack(states))  # (T, N, D)
                images.append(env.observe()["images"])
            lost = [int((~episode.isfinite()).any(0).any(1).sum()) for episode in episodes]
            episodes = [episode.nan_to_num() for episode in episodes]
            leaders = episodes[0][:, ::group].repeat_interleave(group, 1)
            found = {
                "worlds not finite": lost,
                "members differ by": float((episodes[0] - leaders).abs().max()),
                "pixels of members": int((images[0] != images[0][::group].repeat_interleave(group, 0)).sum()),
                "repeated episode": float((episodes[0] - episodes[1]).abs().max()),
                "its pixels": int((images[0] != images[1]).sum()),
            }
            if device != "cpu":
                taken = before - torch.cuda.mem_get_info()[0]
                found["GB beside torch"] = (taken - torch.cuda.memory_reserved()) / 1e9
            print(json.dumps(found), flush=True)  # before the simulator shuts down


if __name__ == "__main__":
    given = tyro.cli(Args, description=__doc__)
    check(given.check, given.device, given.scripts) if given.check else climb(given)
