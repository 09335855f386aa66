"""How fast and how large GR00T N1.5 is here: policy calls, updates, memory, simulator. RANDOM WEIGHTS throughout.

    python benchmarks/throughput.py --all                         # everything: full size on a GPU, tiny on a CPU
    python benchmarks/throughput.py --what rollout --views 1 --batch-sizes 256 --levers no-lm-head kv-once
    python benchmarks/throughput.py --what predict                # operations and bytes of the full size, no GPU needed
    python benchmarks/throughput.py --all --out runs/throughput/<time>     # goes on where it was stopped

Writes results.json and table.md to runs/throughput/<time>/ after every row; rows that ran out of memory or failed say so.

How it is measured
- rollout: one policy call (uint8 images and raw states on the device -> actions by the ODE) at a fixed batch. It begins
  with the straightforward path (`baseline_path.py`) and adds one lever after the other; a lever that failed or is not to
  be had here is left out of the rows below it. All have a row at the first batch size with the first number of views;
  elsewhere the straightforward path and the last two do. Time is the device's, between events, without a wait between
  calls; median of the repeats, with the smallest and the largest.
- Every row's actions are compared with the plain network in fp32 on the same inputs and weights (rounded to bf16
  before): largest difference, and norm of the difference over the norm of what the network adds to its noise.
- env steps/s = observations/s times the model's action horizon (16 at full size). The simulator is not in it.
- MFU: operations that a call needs at least (no lm_head, keys and values once; counted on the meta device, a
  multiplication and an addition are two) per second, over a measured product of two square bf16 matrices. fp8 rows
  are held against bf16, too.
- update: the scripts' own `rollout` and `update`, with generated observations in the simulator's place: plain (--precision
  bf16: the denoising steps in TF32; features kept from the rollout, or computed again), with --compile, with float8 and
  --compile, and with all of the head in bf16, which the scripts do not do.
- memory: two iterations of the same at --memory-envs, under a cap of --memory-cap-gb, with what the scripts' own
  --max-memory-gb plans for that cap, and with activation checkpointing; updates are cut short.
- newton: the embedded task in the real simulator, without a policy.
--all begins with what is asked first: update and memory of the scripts, with the first number of views.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import importlib
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

What = Literal["predict", "rollout", "update", "memory", "newton"]
Script = Literal["grpo_gr00t", "grpo_gr00t_lora", "ppo_gr00t_frozen", "ppo_gr00t_lora"]
Precision = Literal["plain", "compiled", "fp8", "bf16"]
LEVERS: dict[str, str] = {
    "no-lm-head": "no logits",
    "bf16-weights": "bf16 from end to end instead of bf16 autocast",
    "kv-once": "cross-attention's keys and values once per observation",
    "one-embodiment": "one embodiment's row of the category-specific layers",
    "device-inputs": "images and states prepared on the device",
    "compile": "torch.compile of every transformer block",
    "cuda-graph": 'the whole call by torch.compile(mode="reduce-overhead"), as --compile does with `Gr00tActor.denoise`',
    "fp8": "float8 products in the backbone's blocks, one scale per row",
}
Lever = Literal[*LEVERS]


# ======== Args ========================================================================================================
@dataclass
class Args:
    all: bool = False  # everything that --what can name
    what: tuple[What, ...] = ("rollout", "update")  # what to measure
    size: Literal["auto", "tiny", "full"] = "auto"  # of the network; auto: full on a GPU, tiny on a CPU
    device: str = "auto"  # cpu, cuda, cuda:N or auto
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of weights and autocast; float32 is for checks
    views: tuple[int, ...] = (1, 2)  # cameras
    batch_sizes: tuple[int, ...] | None = None  # observations per policy call (full: 256 1 64 1024 4096; tiny: 8 1 32)
    levers: tuple[Lever, ...] = tuple(LEVERS)  # what rollout adds to the straightforward path, in this order
    scripts: tuple[Script, ...] = ("grpo_gr00t", "ppo_gr00t_frozen", "ppo_gr00t_lora")  # of update and memory
    precisions: tuple[Precision, ...] = Precision.__args__  # of update; fp8 and bf16 for the first script alone
    update_envs: int | None = None  # environments of update (full: 64; tiny: 16), a whole episode of each
    memory_envs: int | None = None  # environments of memory and predict (full: 4096; tiny: 64)
    memory_cap_gb: float = 40.0  # GPU memory that memory may take
    newton_envs: int | None = None  # environments of newton (GPU: 4096; CPU: 64)
    newton_sizes: tuple[int, ...] = (64, 128, 224)  # image width and height of newton [px]
    repeats: int = 10  # timed calls per row; update and newton make 3
    row_seconds: float = 10.0  # fewer calls (2 at least) where they would take longer [s]
    minutes: float | None = None  # begin no row after so long; --out goes on later
    compile_backend: str = "inductor"  # of the lever compile
    seed: int = 1  # of weights and observations
    out: Path | None = None  # folder of the results; rows that are there already are kept
    worker: int | None = None  # newton at that image size in this process (what the script starts itself with) [px]


# heavy imports come after the command line, so --help is instant
ARGS = tyro.cli(Args, description=__doc__) if __name__ == "__main__" else None

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline_path import Straightforward
from common import Metrics, Ranks, StageTimer, atomic_write, check_positive, peak_memory_gb, pick_device, provenance
from gr00t_n1d5.network import Gr00tConfig, Gr00tN1d5
from gr00t_n1d5.policy import activation_bytes, plan_memory
from gr00t_n1d5.processor import Gr00tProcessor, tiny_tokenizer
from tasks.gr00t import TASKS

ALONE = Ranks(0, 1)
TAG = "new_embodiment"  # row 31 of the category-specific layers
TEXT = 20  # prompt tokens beside those of the images
WORDS = [f"word{i}" for i in range(TEXT)]
STATE, ACTION = TASKS["Tabletop-Lift-Cube-v0"].state, TASKS["Tabletop-Lift-Cube-v0"].action
# dense rates of one H200 [TFLOP/s], to predict with: bf16 measured on one (8192^3), the others from NVIDIA's data sheet
RATES = {"bf16": 790.0, "tf32": 494.0, "fp32": 67.0}
FP8_RATE = 1979.0  # of the backbone with float8 products, where a lever or --precision fp8 asks for them


def resolve(args: Args) -> Args:
    """Fills in what was left open; refuses, in one line, what cannot work."""
    args = dataclasses.replace(args, device=pick_device(args.device))
    cuda = args.device.startswith("cuda")
    if args.all:
        args.what = What.__args__
    if args.size == "auto":
        args.size = "full" if cuda else "tiny"
    full = args.size == "full"
    if full and not cuda and set(args.what) & {"rollout", "update", "memory"}:
        raise SystemExit("--size full: needs a CUDA GPU here (10 GB of weights in fp32); use --size tiny or --what predict")
    args.batch_sizes = args.batch_sizes or ((256, 1, 64, 1024, 4096) if full else (8, 1, 32))
    args.update_envs = args.update_envs or (64 if full else 16)
    args.newton_envs = args.newton_envs or (4096 if cuda else 64)
    names = "update_envs memory_envs newton_envs memory_cap_gb repeats row_seconds minutes"
    check_positive(**{name: getattr(args, name) for name in names.split()})
    for name in ("views", "batch_sizes", "newton_sizes"):
        check_positive(**{name: min(getattr(args, name), default=0)})
    for name in ("update_envs", "memory_envs"):
        if (getattr(args, name) or 0) % 16:
            raise SystemExit(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a multiple of 16, GRPO's group")
    return args


# ======== network and observations ====================================================================================
def make_config(size: str) -> Gr00tConfig:
    """Full or tiny, with a prompt of TEXT words. `fan_in_init`: weights so large that a wrong lever shows in the actions."""
    own = {"prompt_template": "{instruction}{images}", "image_template": "{tokens}", "max_text_tokens": 10_000}
    if size == "full":
        return Gr00tConfig(**own, fan_in_init=True)
    return Gr00tConfig.tiny(**own, num_embodiments=32, image_crop=0.95)


def make_net(config: Gr00tConfig, device: str, dtype: torch.dtype, seed: int) -> Gr00tN1d5:
    """A network with random weights, made on the device; all are rounded to bf16, as NVIDIA's checkpoint has them."""
    with torch.random.fork_rng([device] if device.startswith("cuda") else []), torch.device(device):
        torch.manual_seed(seed)
        return Gr00tN1d5(config).bfloat16().to(dtype).eval()


def make_processor(config: Gr00tConfig, views: int = 0) -> Gr00tProcessor:
    g = torch.Generator().manual_seed(0)
    data = [{key: torch.randn(100, n, generator=g) for key, n in sizes.items()} for sizes in (STATE, ACTION)]
    video = {f"view_{i}": {"resolution": [64, 64], "channels": 3, "fps": 10} for i in range(views)}
    return Gr00tProcessor.from_statistics(config, TAG, *data, video, tiny_tokenizer(WORDS, config))


class Inputs:
    """Generated observations of a batch, and the noise that the ODE starts from."""

    def __init__(self, config: Gr00tConfig, processor: Gr00tProcessor, views: int, batch: int, device: str, seed: int):
        g = torch.Generator(device).manual_seed(seed)
        size, horizon = config.image_size, (config.action_horizon, config.action_dim)
        self.images = torch.randint(256, (batch, views, size, size, 3), generator=g, device=device, dtype=torch.uint8)
        self.state = torch.randn(batch, sum(STATE.values()), generator=g, device=device)  # (B, d)
        self.noise = torch.randn(batch, *horizon, generator=g, device=device)  # (B, H, A)
        self.ids = processor.prompt(" ".join(WORDS), views).to(device).expand(batch, -1)  # (B, L)

    def first(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.images[:n], self.state[:n], self.noise[:n], self.ids[:n]


@torch.no_grad()
def reference(net: Gr00tN1d5, processor: Gr00tProcessor, inputs: Inputs, rows: int) -> Tensor:
    """Actions (rows, H, A) of the first observations by the plain network in fp32."""
    images, state, noise, ids = inputs.first(rows)
    exact = copy.deepcopy(net).float()
    embodiment_id = torch.full((rows,), processor.embodiment_id, device=ids.device)
    torch.backends.cudnn.allow_tf32 = False  # the default would round the one convolution
    return exact.get_action(ids, processor.images(images), processor.normalize_state(state), embodiment_id, noise)


# ======== levers ======================================================================================================
class Policy(Straightforward):
    """The straightforward path with levers pulled one after the other, for one batch size."""

    def __init__(self, net: Gr00tN1d5, processor: Gr00tProcessor, input_ids: Tensor, dtype: torch.dtype, backend: str):
        super().__init__(net, processor, input_ids, autocast=dtype == torch.bfloat16)
        self.backend, self.pulled = backend, set()
        self.graph = torch.compile(self.denoise, mode="reduce-overhead")

    def obstacle(self, lever: str) -> str:
        """Why a lever cannot be pulled here; "" if it can."""
        cuda = self.device.type == "cuda"
        if lever == "cuda-graph" and not cuda:
            return "needs a CUDA GPU"
        if lever == "cuda-graph" and "device-inputs" not in self.pulled:
            return "needs device-inputs"
        if lever == "fp8" and cuda and torch.cuda.get_device_capability(self.device) < (8, 9):
            return "needs a GPU with float8 (Ada, Hopper or later)"
        return ""

    def backbone_blocks(self) -> list[nn.Module]:
        return [*self.net.backbone.vision_model.encoder.layers, *self.net.backbone.language_model.layers]

    def blocks(self) -> list[nn.Module]:
        head = self.net.action_head
        own = [*head.model.transformer_blocks, *head.vl_self_attention.transformer_blocks]
        return self.backbone_blocks() + own

    def pull(self, lever: str) -> None:
        self.pulled.add(lever)
        if lever == "bf16-weights":
            self.autocast = False
        elif lever == "one-embodiment":
            self.net.slice_embodiment(self.processor.embodiment_id)
            self.embodiment_id = torch.zeros_like(self.embodiment_id)
        elif lever == "compile":
            for block in self.blocks():  # equal blocks share one compilation; the whole network would take minutes
                block.compile(backend=self.backend, dynamic=False)
        elif lever == "fp8":
            self.net.backbone.to_fp8()

    def drop(self, lever: str) -> None:
        """Goes on without a lever that failed, where that can be undone."""
        if lever == "compile":
            for block in self.blocks():
                block._compiled_call_impl = None
        if lever in ("compile", "cuda-graph", "no-lm-head", "kv-once", "device-inputs"):
            self.pulled.discard(lever)

    def __call__(self, images: Tensor, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        if "cuda-graph" not in self.pulled:
            return super().__call__(images, state, noise)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, self.autocast), self.timer("all"):
            return self.graph(images, state, noise)

    def denoise(self, images: Tensor, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The call without its timers, which a graph cannot hold."""
        actions = self.actions(self.features(self.pixels(images)), self.state(state), noise)
        return actions, self.processor.unnormalize_action(actions)

    def pixels(self, images: Tensor) -> Tensor:
        return self.processor.images(images) if "device-inputs" in self.pulled else super().pixels(images)

    def state(self, state: Tensor) -> Tensor:
        return self.processor.normalize_state(state) if "device-inputs" in self.pulled else super().state(state)

    def features(self, pixels: Tensor) -> Tensor:
        return self.net.backbone(self.input_ids, pixels) if "no-lm-head" in self.pulled else super().features(pixels)

    def actions(self, features: Tensor, state: Tensor, noise: Tensor) -> Tensor:
        if "kv-once" not in self.pulled:
            return super().actions(features, state, noise)
        head = self.net.action_head
        return head.sample(head.encode(features, state, self.embodiment_id), self.embodiment_id, noise)


# ======== results =====================================================================================================
class Results:
    """results.json and table.md, written after every row. Rows that are there already are kept."""

    SAME = ("size", "dtype", "device_name", "torch")  # what all rows of a folder share

    def __init__(self, folder: Path, about: dict, minutes: float | None):
        self.folder, self.about, self.rows, self.failed = folder, about, {}, False  # the last: in this call
        self.until = time.monotonic() + 60 * minutes if minutes else float("inf")
        file = folder / "results.json"
        if file.is_file():
            found = json.loads(file.read_text())
            for name in self.SAME:
                if found["about"][name] != about[name]:
                    raise SystemExit(f"--out {folder}: made with {name} {found['about'][name]}; take another folder")
            self.about, self.rows = found["about"], {self.name(row): row for row in found["rows"]}
        folder.mkdir(parents=True, exist_ok=True)

    KEYS = ("what", "script", "views", "batch", "lever", "envs", "cache", "head", "micro_batch", "checkpointing", "pixels")

    @classmethod
    def name(cls, row: dict) -> str:
        return " ".join(f"{key}={row[key]}" for key in cls.KEYS if key in row)

    def done(self, key: dict) -> bool:
        return self.rows.get(self.name(key), {"status": ""})["status"] in ("ok", "out of memory")

    def run(self, key: dict, measure: Callable[[], dict], obstacle: str = "") -> dict:
        """One row: measured, found, or why there is none. What went wrong does not stop the next row."""
        name = self.name(key)
        if self.done(key):
            return self.rows[name]
        begin, figures = time.monotonic(), {}
        if obstacle:
            status = f"not run: {obstacle}"
        elif begin > self.until:
            status = "not run: --minutes were over"
        else:
            try:
                status, figures = "ok", measure()
            except (Exception, SystemExit) as error:  # the scripts refuse with the latter
                status = "out of memory" if out_of_memory(error) else "failed: " + " ".join(str(error).split())[:200]
                with open(self.folder / "errors.log", "a") as log:
                    log.write(f"{name}\n{traceback.format_exc()}\n")
        self.failed |= status.startswith("failed")
        clear_memory()
        self.rows[name] = row = {**key, "status": status, **figures}
        self.save()
        print(f"{name}: {status}, {time.monotonic() - begin:.1f} s", flush=True)
        return row

    def save(self) -> None:
        rows = list(self.rows.values())
        text = json.dumps({"about": self.about, "rows": rows}, indent=1)
        for name, content in (("results.json", text), ("table.md", table(self.about, rows))):
            atomic_write(self.folder / name, lambda tmp, content=content: tmp.write_text(content))


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in str(error)  # the latter: a CPU's


def clear_memory() -> None:
    """For the next row, to which what was compiled would count as recompilations; graphs hold memory, too."""
    torch.compiler.reset()
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def seconds_of(call: Callable[[], Any], args: Args) -> list[float]:
    """Seconds of each of several calls, of the device; the host waits before the first and after the last."""
    synchronize(args.device)
    begin = time.perf_counter()
    call()
    synchronize(args.device)
    repeats = max(2, min(args.repeats, int(args.row_seconds / (time.perf_counter() - begin))))
    timers = [StageTimer(args.device) for _ in range(repeats)]
    for timer in timers:
        with timer("call"):
            call()
    return [timer.seconds()["call"] for timer in timers]


def spread(seconds: list[float]) -> dict:
    return {"seconds": statistics.median(seconds), "range": [min(seconds), max(seconds)], "repeats": len(seconds)}


# ======== what a call costs ===========================================================================================
def operations(function: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions in a function, backward passes included."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def cost(config: Gr00tConfig, views: int) -> dict[str, float]:
    """Operations per observation, counted on the meta device with one embodiment's row [GFLOP].

    Returns:
        vision, llm, vl (the head's self-attention over the features), key_value (of the cross-attentions), step (one
        denoising step without them), lm_head, call (a policy call at its cheapest), shipped (with the lm_head, keys
        and values at every step), update (forward and backward of the head for one step), base (the same step of the
        base model, forward).
    """
    config = dataclasses.replace(config, num_embodiments=1)
    with torch.device("meta"):
        net = Gr00tN1d5(config)
        head, length = net.action_head, views * config.tokens_per_view + TEXT
        ids, zero = torch.zeros(1, length, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        pixels = torch.zeros(views, 3, config.image_size, config.image_size)
        features, state = torch.zeros(1, length, config.text_hidden_size), torch.zeros(1, 1, config.state_dim)
        x = torch.zeros(1, config.action_horizon, config.action_dim)
        embedding = net.backbone.language_model.embed_tokens.weight
        with torch.no_grad():
            context, vl = head.encode(features, state, zero), head.vlln(features)
            vision = operations(lambda: net.backbone.mlp1(net.backbone.vision_model(pixel_values=pixels).last_hidden_state))
            found = {
                "vision": vision,
                "llm": operations(lambda: net.backbone(ids, pixels)) - vision,
                "vl": operations(lambda: head.vl_self_attention(vl)),
                "key_value": operations(lambda: [b.attn1.key_value(vl) for b in head.model.transformer_blocks[::2]]),
                "step": operations(lambda: head.velocity(x, zero, zero, context)),
                "lm_head": operations(lambda: nn.functional.linear(features, embedding)),
                "call": operations(lambda: net.get_action(ids, pixels, state, zero)),
                "base": operations(lambda: head.velocity(x, zero, zero, head.encode(features, state, zero))),
            }
        net.backbone.requires_grad_(False)
        found["update"] = operations(lambda: head.velocity(x, zero, zero, head.encode(features, state, zero)).sum().backward())
    found["shipped"] = found["call"] + found["lm_head"] + (config.num_inference_timesteps - 1) * found["key_value"]
    return {name: value / 1e9 for name, value in found.items()}


def matmul_rate(args: Args) -> dict:
    """The rate of a square matrix product of random numbers, the same way as everything else is timed."""
    n = 8192 if args.device.startswith("cuda") else 1024
    g = torch.Generator(args.device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=g, device=args.device).to(getattr(torch, args.dtype)) for _ in range(2))
    out = torch.empty_like(a)
    timing = spread(seconds_of(lambda: torch.mm(a, b, out=out), args))
    return timing | {"size": n, "tflops": 2 * n**3 / timing["seconds"] / 1e12}


# ======== rollout =====================================================================================================
def measure_call(policy: Policy, inputs: Inputs, expected: Tensor, args: Args, gflop: float, tflops: float) -> dict:
    """A row of the ladder."""
    reset_peak(args.device)
    batch, noise, horizon = len(inputs.state), inputs.noise[: len(expected)], inputs.noise.shape[1]
    call = functools.partial(policy, inputs.images, inputs.state, inputs.noise)
    error = call()[0][: len(expected)] - expected  # the first call compiles and captures
    policy.timer.seconds()
    timing = spread(seconds_of(call, args))
    calls, rate = timing["repeats"] + 1, batch / timing["seconds"]
    return timing | {
        "stage_ms": {name: 1e3 * x / calls for name, x in policy.timer.seconds().items()},
        "observations_per_s": rate,
        "env_steps_per_s": rate * horizon,
        "mfu": rate * gflop / 1e3 / tflops,
        "peak_gb": peak_memory_gb(args.device),
        "max_difference": float(error.abs().max()),
        "relative_difference": float(error.norm() / (expected - noise).norm()),
    }


def ladder(args: Args, results: Results, config: Gr00tConfig, views: int, batch: int, gflop: float, tflops: float) -> None:
    """The straightforward path, then one lever after the other, for one shape."""
    first = {"what": "rollout", "views": args.views[0], "batch": args.batch_sizes[0]}
    whole, levers = (views, batch) == (first["views"], first["batch"]), args.levers
    if not whole:  # what has failed there would fail here
        levers = [x for x in levers if not results.rows[results.name(first | {"lever": x})]["status"].startswith("failed")]
    rungs = ("straightforward", *levers)
    measured = rungs if whole else ("straightforward", *levers[-2:])
    keys = {name: {"what": "rollout", "views": views, "batch": batch, "lever": name} for name in rungs}
    if all(results.done(keys[name]) for name in measured):
        return
    try:
        dtype, processor = getattr(torch, args.dtype), make_processor(config).to(args.device)
        net = make_net(config, args.device, dtype, args.seed)
        inputs = Inputs(config, processor, views, batch, args.device, args.seed)
        expected = reference(net, processor, inputs, min(batch, 32))
        policy = Policy(net, processor, inputs.ids, dtype, args.compile_backend)
    except Exception as error:
        results.run(keys["straightforward"], functools.partial(fail, error))
        return
    measure = functools.partial(measure_call, policy, inputs, expected, args, gflop, tflops)
    for lever, key in keys.items():
        obstacle = policy.obstacle(lever)
        if lever != "straightforward" and not obstacle:
            policy.pull(lever)
        if lever not in measured:
            continue
        row = results.run(key, measure, obstacle)
        larger = row["status"] == "out of memory" and lever == "cuda-graph"  # its buffers stay; other levers need less
        if row["status"].startswith("failed") or larger:
            policy.drop(lever)


def fail(error: Exception) -> dict:
    raise error


# ======== the scripts' own rollout and update =========================================================================
class GeneratedEnv:
    """What the GR00T scripts' `rollout` needs of their ChunkEnv: random images and states, every second episode succeeds."""

    def __init__(self, task: Any, args: Any, config: Gr00tConfig, views: int):
        self.task, self.num_envs = task, args.num_envs
        self.inputs = Inputs(config, make_processor(config), views, args.num_envs, args.device, args.seed)

    def reset(self, seed: int, *_: Any) -> TensorDict:
        self.steps, self.success = 0, torch.zeros_like(self.inputs.state[:, 0], dtype=torch.bool)  # (N,)
        return self.observe()

    @property
    def ended(self) -> Tensor:
        return self.success

    def step_chunk(self, actions: Tensor, last: bool = False) -> TensorDict | None:
        self.steps += actions.shape[1]
        if last:
            self.success = torch.arange(self.num_envs, device=self.success.device) % 2 == 1
        self.reward = self.success.float()
        return None if last else self.observe()

    def observe(self) -> TensorDict:
        state, prompt = self.inputs.state, torch.zeros_like(self.success, dtype=torch.long)
        critic = torch.cat([state, torch.full_like(state[:, :1], self.steps / self.task.horizon)], 1)
        seen = {"images": self.inputs.images, "state": state, "prompt": prompt, "critic": critic}
        return TensorDict(seen, self.num_envs)


def make_actor(name: str, args: Args, config: Gr00tConfig, views: int, **flags: Any) -> tuple[Any, Any, Any]:
    """A script, its arguments and its policy, with random weights in the place of a checkpoint.

    Args:
        flags: of the script; the others are its settings for a full-size checkpoint, with one epoch of one minibatch.
    """
    script = importlib.import_module(name)
    usual = {"device": args.device, "instruction": " ".join(WORDS), "seed": args.seed, "epochs": 1, "minibatches": 1}
    usual |= {"checkpoint": "random-weights", "precision": "bf16" if args.dtype == "bfloat16" else "fp32"}
    flags = usual | flags
    flags |= {"critic_epochs": 1} if hasattr(script.FULL, "critic_epochs") else {}
    own = dataclasses.replace(script.FULL, **flags)
    task = dataclasses.replace(script.TASKS[own.task], cameras={f"view_{i}": "camera" for i in range(views)})
    net = make_net(config, own.device, getattr(torch, args.dtype), args.seed)
    with (
        mock.patch.dict(script.TASKS, {own.task: task}),
        mock.patch.object(Gr00tN1d5, "from_pretrained", lambda *_, **__: net),
        mock.patch.object(Gr00tProcessor, "from_pretrained", lambda *_: make_processor(config, views)),
    ):
        policy = script.Gr00tActor(own)
    return script, own, policy


def steps_in_bf16(policy: nn.Module) -> None:
    """The denoising steps' products under autocast; weights, gradients and log-probabilities stay fp32."""
    plain, kind = policy.velocity, policy.device.type

    def velocity(*inputs: Any) -> Tensor:
        with torch.autocast(kind, torch.bfloat16):
            return plain(*inputs).float()

    policy.velocity = velocity


def measure_script(
    name: str, args: Args, config: Gr00tConfig, views: int, precision: str, rounds: int, micro_batches: int | None, **flags: Any
) -> dict:
    """Rollout and update of a script, as its `train` calls them; the first round warms up.

    Args:
        micro_batches: that an update takes at most.
        flags: of the script.
    """
    flags |= {"compile": precision in ("compiled", "fp8")} | ({"precision": "fp8"} if precision == "fp8" else {})
    before = torch.get_float32_matmul_precision()  # which scripts set
    script, own, policy = make_actor(name, args, config, views, **flags)
    if precision == "bf16":
        steps_in_bf16(policy)
    env = GeneratedEnv(script.TASKS[own.task], own, config, views)
    calls = own.num_envs * (env.task.horizon // policy.chunk)
    if own.max_memory_gb:
        own.feature_cache, own.micro_batch_size, _ = plan_memory(
            policy, own.num_envs, env.task.horizon // policy.chunk, own.feature_cache, own.micro_batch_size, own.max_memory_gb,
            own.activation_checkpointing, own.compile,
        )  # fmt: skip
        policy.micro_batch_size = own.micro_batch_size
    limit = micro_batches and micro_batches * own.micro_batch_size
    critic = list(policy.critic.parameters()) if hasattr(policy, "critic") else []
    optimizer = torch.optim.AdamW([*policy.trainable(), *critic], own.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    moving = (True,) if critic else ()
    timer, seconds, ratios = StageTimer(args.device), [], []
    reset_peak(args.device)
    for i in range(rounds + 1):
        log = Metrics(args.device, ALONE)
        samples = script.rollout(env, policy, own, i, ALONE, timer)
        keep = script.advantages(samples, env.success, own, ALONE, log)
        plan = [(rows[:limit], *rest) for rows, *rest in script.plan_minibatches(keep, own, i, ALONE, *moving)]
        with timer("update"):
            script.update(policy, optimizer, samples, plan, own, ALONE, log)
        seconds.append(timer.seconds())
        ratios.append(log.read()["update/first_ratio_error"])
        del samples  # as `train` does
    torch.set_float32_matmul_precision(before)
    learned = sum(len(rows) for rows, *_ in plan)
    update = spread([s["update"] for s in seconds[1:]])
    return update | {
        "samples": learned,
        "samples_per_s": learned / update["seconds"],
        "observations_per_s": calls / statistics.median(s["policy"] for s in seconds[1:]),
        "env_steps_per_s": calls * policy.chunk / statistics.median(s["policy"] for s in seconds[1:]),
        "peak_gb": peak_memory_gb(args.device),
        "ratio_error": max(ratios),
        "micro_batch_size": own.micro_batch_size,
        "features": own.feature_cache,
    }


def update_rows(args: Args, results: Results, config: Gr00tConfig, views: int) -> None:
    ways = [(precision, "gpu") for precision in args.precisions] + [("plain", "off")] * ("plain" in args.precisions)
    for name in args.scripts:
        for precision, cache in ways:
            if name != args.scripts[0] and precision in ("fp8", "bf16"):
                continue
            key = {"what": "update", "script": name, "views": views, "envs": args.update_envs, "head": precision}
            flags = {"num_envs": args.update_envs, "feature_cache": cache}
            measure = functools.partial(measure_script, name, args, config, views, precision, 3, None, **flags)
            obstacle = "needs a CUDA GPU" if precision in ("compiled", "fp8") and args.device == "cpu" else ""
            results.run(key | {"cache": cache}, measure, obstacle)


@contextlib.contextmanager
def memory_cap(device: str, gb: float) -> Iterator[None]:
    """Lets torch take so much of the GPU and no more."""
    if not device.startswith("cuda"):
        yield
        return
    share = gb * 1e9 / torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def memory_rows(args: Args, results: Results, config: Gr00tConfig, views: int) -> None:
    envs = args.memory_envs or (4096 if args.size == "full" else 64)

    def measure(name: str, **flags: Any) -> dict:
        with memory_cap(args.device, args.memory_cap_gb):  # more than two micro-batches would take time, not memory
            return measure_script(name, args, config, views, "plain", 1, 2, num_envs=envs, **flags)

    for name in args.scripts:
        for micro_batch, checkpointing in (("planned", False), (128, True)):
            flags = {"micro_batch_size": micro_batch, "activation_checkpointing": checkpointing}
            if micro_batch == "planned":
                flags = {"max_memory_gb": args.memory_cap_gb}
            key = {"what": "memory", "script": name, "views": views, "envs": envs}
            key |= {"micro_batch": micro_batch, "checkpointing": checkpointing}
            results.run(key, functools.partial(measure, name, **flags))


# ======== prediction ==================================================================================================
def predict_cost(config: Gr00tConfig, views: int) -> dict:
    """GFLOP of a call, and what RATES allow at most."""
    found = cost(config, views)
    backbone, head = found["vision"] + found["llm"], found["call"] - found["vision"] - found["llm"]
    bound = {}
    for precision, rate in RATES.items():
        call = 1e3 / (backbone / RATES["bf16"] + head / rate)
        kept, again = (found["update"] + found["base"]) / rate, backbone / RATES["bf16"]
        own = {"observations_per_s": call, "samples_per_s": 1e3 / kept, "cache_gain": (kept + again) / kept}
        fp8 = 1e3 / (backbone / FP8_RATE + head / rate)
        steps = {"env_steps_per_s": call * config.action_horizon, "env_steps_per_s_fp8": fp8 * config.action_horizon}
        bound[precision] = own | steps
    shipped = 1e3 * RATES["bf16"] / found["shipped"]
    return {"gflop": found, "bound": bound, "shipped_observations_per_s": shipped}


def predict_memory(name: str, args: Args, config: Gr00tConfig, views: int) -> dict:
    """Bytes of a script at --memory-envs, of its own policy on the meta device; activations are an estimate [GB]."""
    config = dataclasses.replace(config, num_embodiments=1)  # the others' rows stay on the host
    envs, args = args.memory_envs or 4096, dataclasses.replace(args, dtype="bfloat16")
    script, own, policy = make_actor(name, args, config, views, device="meta", num_envs=envs)
    length, samples = policy.prompts.shape[1], envs * (script.TASKS[own.task].horizon // policy.chunk)
    trained = [*policy.trainable(), *(policy.critic.parameters() if hasattr(policy, "critic") else ())]
    sample = {checkpointing: activation_bytes(config, length, views, False, checkpointing) for checkpointing in (False, True)}
    found = {
        "weights": sum(p.nbytes for p in policy.parameters()),
        "gradients_and_adam": sum(3 * p.nbytes for p in trained),
        "features": samples * length * config.text_hidden_size * 2,
        "activations_128": 128 * sample[False],
        "activations_32": 32 * sample[False],
        "activations_128_checkpointed": 128 * sample[True],
    }
    parameters = {"parameters": sum(p.numel() for p in policy.parameters()), "trained": sum(p.numel() for p in trained)}
    return {"samples": samples, **parameters, "gb": {key: value / 1e9 for key, value in found.items()}}


def predict_rows(args: Args, results: Results, views: int) -> None:
    """Of the full size, whatever --size says: nothing is run."""
    config = make_config("full")
    results.run({"what": "predict", "views": views}, lambda: predict_cost(config, views))
    for name in args.scripts:
        key = {"what": "predict-memory", "script": name, "views": views, "envs": args.memory_envs or 4096}
        results.run(key, functools.partial(predict_memory, name, args, config, views))


# ======== newton ======================================================================================================
def newton_worker(args: Args, pixels: int) -> dict:
    """The embedded task with random actions: physics alone, one image of every environment, and both per chunk of 16."""
    import grpo_gr00t

    own, seconds = grpo_gr00t.Args(num_envs=args.newton_envs, device=args.device), []
    with tempfile.TemporaryDirectory() as folder, grpo_gr00t.make_env(own, pixels, Path(folder), ALONE) as env:
        actions = torch.rand(env.num_envs, 16, sum(env.task.action.values()), device=args.device) * 2 - 1
        for i in range(4):
            env.reset(seed=i)
            marks = []
            for part in (lambda: None, lambda: env.step_chunk(actions, last=True), env.observe):
                part()
                synchronize(args.device)
                marks.append(time.perf_counter())
            seconds.append([b - a for a, b in zip(marks, marks[1:])])
        physics, camera = (statistics.median(column) for column in zip(*seconds[1:]))
        rates = {"physics_steps_per_s": 16 / physics, "frames_per_s": 1 / camera, "env_steps_per_s": 16 / (physics + camera)}
        row = spread([sum(s) for s in seconds[1:]]) | {name: env.num_envs * rate for name, rate in rates.items()}
        row["peak_gb"] = peak_memory_gb(args.device)
        print(json.dumps(row), flush=True)  # before the simulator shuts down
    return row


def newton_rows(args: Args, results: Results) -> None:
    """Each image size in a process of its own: a process holds one simulator."""
    obstacle = "" if importlib.util.find_spec("isaaclab") else "isaaclab is not installed"
    for pixels in args.newton_sizes:

        def measure(pixels: int = pixels) -> dict:
            flags = {"worker": pixels, "newton-envs": args.newton_envs, "device": args.device}
            command = [sys.executable, __file__, *(x for name, value in flags.items() for x in (f"--{name}", str(value)))]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            rows = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
            if not rows:
                raise RuntimeError((done.stderr.strip().splitlines() or ["the simulator said nothing"])[-1])
            return json.loads(rows[-1])

        results.run({"what": "newton", "envs": args.newton_envs, "pixels": pixels}, measure, obstacle)


# ======== table =======================================================================================================
def table(about: dict, rows: list[dict]) -> str:
    """The results in markdown."""
    lines = [
        f"# Throughput of GR00T N1.5, {about['size']} size, RANDOM WEIGHTS, generated observations",
        "",
        f"{about['device_name']}, {about['cpu_count']} CPU threads seen, torch {about['torch']}, {about['dtype']}, "
        f"commit {about['git_sha']}{' (modified)' if about['git_dirty'] else ''}, {about['started']}.",
    ]
    for row in rows:
        if row["what"] == "matmul" and row["status"] == "ok":
            n = row["size"]
            lines.append(f"Measured matrix product ({n} x {n} x {n}, {about['dtype']}): {row['tflops']:.4g} TFLOP/s.")
    fastest: dict[int, float] = {}  # of the straightforward path, by views
    plain = {}
    for row in rows:
        if row["what"] == "rollout" and row.get("lever") == "straightforward" and row["status"] == "ok":
            plain[row["views"], row["batch"]] = row["observations_per_s"]
            fastest[row["views"]] = max(fastest.get(row["views"], 0.0), row["observations_per_s"])
    again = {key_of_update(row): row for row in rows if row.get("cache") == "off" and row["status"] == "ok"}

    def times_plain(row: dict) -> str:
        views, batch = row["views"], row["batch"]
        if (views, batch) in plain:
            return f"{row['observations_per_s'] / plain[views, batch]:.2f}"
        return f"{row['observations_per_s'] / fastest[views]:.2f} (its best batch)" if views in fastest else ""

    def cache_gain(row: dict) -> str:
        other = again.get(key_of_update(row))
        return f"{row['samples_per_s'] / other['samples_per_s']:.2f}" if other and row["cache"] == "gpu" else ""

    def ms(row: dict) -> str:
        return f"{1e3 * row['seconds']:.4g} ({1e3 * row['range'][0]:.4g} to {1e3 * row['range'][1]:.4g})"

    def stages(row: dict) -> str:
        return " / ".join(f"{ms:.3g}" for ms in row["stage_ms"].values())

    def gb(*names: str) -> Callable[[dict], str]:
        return lambda row: " / ".join(f"{row['gb'][name]:.2f}" for name in names)

    def bounds(name: str) -> Callable[[dict], str]:
        return lambda row: " / ".join(f"{row['bound'][p][name]:.4g}" for p in RATES)

    def figure(name: str, digits: int = 4) -> Callable[[dict], str]:
        return lambda row: f"{row[name]:.{digits}g}"

    def gflop(*names: str) -> Callable[[dict], str]:
        return lambda row: " / ".join(f"{row['gflop'][name]:.1f}" for name in names)

    cpu = about["device"] == "cpu"
    memory = "peak GB of the process" if cpu else "peak GB"
    rate = " / ".join(RATES)
    # (what, heading, columns that say which row it is, columns of figures)
    sections: list[tuple[str, str, list[str], dict[str, Callable[[dict], str]]]] = [
        (
            "predict",
            "Prediction, full size: operations [GFLOP per observation], and what the rates of an H200 allow at most "
            f"({', '.join(f'{name} {value:g}' for name, value in RATES.items())} TFLOP/s; backbone in bf16). NOT MEASURED",
            ["views"],
            {
                "vision / llm / vl": gflop("vision", "llm", "vl"),
                "K, V / step": gflop("key_value", "step"),
                "call / as shipped, with lm_head": gflop("call", "shipped"),
                "update / base": gflop("update", "base"),
                "as shipped, obs/s": figure("shipped_observations_per_s"),
                f"obs/s, head in {rate}": bounds("observations_per_s"),
                "env steps/s": bounds("env_steps_per_s"),
                f"env steps/s, backbone in fp8 ({FP8_RATE:g})": bounds("env_steps_per_s_fp8"),
                "update samples/s, cached": bounds("samples_per_s"),
                "gain of the cache": bounds("cache_gain"),
            },
        ),
        (
            "predict-memory",
            "Prediction, full size: bytes [GB], one rollout's features once. NOT MEASURED; activations are estimates",
            ["script", "views", "envs"],
            {
                "samples": figure("samples", 6),
                "parameters / trained [M]": lambda row: f"{row['parameters'] / 1e6:.1f} / {row['trained'] / 1e6:.1f}",
                "weights": gb("weights"),
                "gradients and Adam": gb("gradients_and_adam"),
                "features": gb("features"),
                "activations at micro-batch 128 / 32 / 128 checkpointed": gb(
                    "activations_128", "activations_32", "activations_128_checkpointed"
                ),
            },
        ),
        (
            "rollout",
            "Policy calls: each row adds its lever to those above it",
            ["views", "batch", "lever"],
            {
                "obs/s": figure("observations_per_s"),
                "env steps/s": figure("env_steps_per_s"),
                "x straightforward": times_plain,
                "ms per call (range)": ms,
                "inputs / backbone / head [ms]": stages,
                "MFU": lambda row: f"{row['mfu']:.1%}",
                memory: figure("peak_gb", 3),
                "largest difference of an action": figure("max_difference", 2),
                "relative": figure("relative_difference", 2),
            },
        ),
        (
            "update",
            "Rollout and update of the scripts, with generated observations in the simulator's place",
            ["script", "views", "envs", "head", "cache"],
            {
                "update, samples/s": figure("samples_per_s"),
                "ms per update (range)": ms,
                "cached over recomputed": cache_gain,
                "rollout, obs/s": figure("observations_per_s"),
                "env steps/s": figure("env_steps_per_s"),
                memory: figure("peak_gb", 3),
                "first ratio - 1": figure("ratio_error", 2),
            },
        ),
        (
            "memory",
            f"Memory of the scripts, allowed: {about['memory_cap_gb']:g} GB" + " (no limit on a CPU)" * cpu,
            ["script", "views", "envs", "micro_batch", "checkpointing"],
            {
                "micro-batch": figure("micro_batch_size"),
                "features": lambda row: row["features"],
                memory: figure("peak_gb", 3),
                "rollout, obs/s": figure("observations_per_s"),
                "env steps/s": figure("env_steps_per_s"),
                "update, samples/s": figure("samples_per_s"),
            },
        ),
        (
            "newton",
            "The embedded task in the simulator, random actions, no policy",
            ["envs", "pixels"],
            {
                "env steps/s, physics": figure("physics_steps_per_s"),
                "frames/s": figure("frames_per_s"),
                "env steps/s with a frame per 16": figure("env_steps_per_s"),
                memory: figure("peak_gb", 3),
            },
        ),
    ]
    for what, heading, keys, figures in sections:
        own = [row for row in rows if row["what"] == what]
        if not own:
            continue
        lines += ["", f"## {heading}", "", f"| {' | '.join([*keys, *figures])} |", "|---" * (len(keys) + len(figures)) + "|"]
        for row in own:
            cells = [show(row) for show in figures.values()] if row["status"] == "ok" else [row["status"]]
            lines.append(f"| {' | '.join([*(str(row[key]) for key in keys), *cells])} |")
    calls = [row for row in rows if row["what"] == "rollout"]
    for views, plainest in fastest.items():
        best = max((r for r in calls if r["views"] == views and r["status"] == "ok"), key=lambda r: r["observations_per_s"])
        how = f"{best['env_steps_per_s']:.4g} env steps/s ({best['lever']}, batch {best['batch']})"
        ratio = best["observations_per_s"] / plainest
        lines += ["", f"Fastest, views = {views}: {how}, {ratio:.2f} times the straightforward path at its best batch."]
    if calls:
        lines += ["", "Levers:", "", *(f"- `{name}`: {text}" for name, text in LEVERS.items())]
    return "\n".join(lines) + "\n"


def key_of_update(row: dict) -> tuple:
    return tuple(row.get(name) for name in ("what", "script", "views", "envs", "head"))


# ======== main ========================================================================================================
def main(args: Args) -> Results:
    """Measures what is asked for."""
    args = resolve(args)
    folder = args.out or ROOT / "runs" / "throughput" / time.strftime("%Y%m%d-%H%M%S")
    about = provenance(ROOT, args.device)
    about |= {"torch": torch.__version__, "size": args.size, "dtype": args.dtype, "memory_cap_gb": args.memory_cap_gb}
    about |= {"weights": "random", "observations": "generated"}
    results = Results(folder, about, args.minutes)
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    config = make_config(args.size)
    for views in args.views if "predict" in args.what else ():
        predict_rows(args, results, views)
    rate = results.run({"what": "matmul"}, lambda: matmul_rate(args)) if "rollout" in args.what else {}
    for views in args.views:
        if "update" in args.what:
            update_rows(args, results, config, views)
        if "memory" in args.what:
            memory_rows(args, results, config, views)
        for batch in args.batch_sizes if "rollout" in args.what else ():
            ladder(args, results, config, views, batch, cost(config, views)["call"], rate.get("tflops", float("nan")))
            clear_memory()
        if "newton" in args.what and views == args.views[0]:
            newton_rows(args, results)
    print(f"{folder}/table.md")
    return results


if __name__ == "__main__":
    if ARGS.worker:
        newton_worker(resolve(ARGS), ARGS.worker)
    else:
        sys.exit(main(ARGS).failed)
