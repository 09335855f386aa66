"""PPO fine-tunes GR00T N1.5 in Isaac Lab through LoRA adapters, and unfreezes the network stage by stage.

    python ppo_gr00t_lora.py                                         # laptop: the shipped tiny GR00T, no GPU needed
    python ppo_gr00t_lora.py --unfreeze critic head:3 vl:plateau:5e-4
    python ppo_gr00t_lora.py --evaluate --checkpoint runs/<name>/checkpoints/best
    torchrun --nproc_per_node=8 ppo_gr00t_lora.py --checkpoint <folder>

How this differs from ppo_gr00t_frozen.py:
- What is trained are low-rank adapters (Hu et al. 2021, arXiv 2106.09685, by the peft library) on attention and
  feed-forward layers, and the small layers of the embodiment: a few percent of the parameters, and of AdamW's memory.
- The base model of the KL is the same weights with the adapters off; there is no second copy.
- `--unfreeze` trains in stages: critic, head, vl (the head's self-attention over the features), llm (the language model's
  top layers), vision. A stage begins at an iteration or when success stops improving, and not while the KL to the base
  is above a bound. Earlier stages go on learning.
- Once a stage trains the backbone, features are computed again in the update instead of kept from the rollout.
- A checkpoint holds the adapters alone and, unless asked not to, the merged network in NVIDIA's layout.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

HERE = Path(__file__).resolve().parent


# ======== Args ========================================================================================================
@dataclass
class Args:
    """Fields left at None get a value that suits the checkpoint's size and the device (`DEFAULTS`)."""

    # general
    task: str = "Tabletop-Lift-Cube-v0"  # Isaac Lab task, one of TASKS
    instruction: str | None = None  # overrides the task's own instruction(s)
    checkpoint: str = str(HERE / "checkpoints" / "tiny")  # GR00T N1.5: a local folder or a hub id
    bracketed: bool = False  # instructions as "['sentence']", which NVIDIA's unbatched inference does
    pad_prompt: int | None = None  # tokens that prompts are padded to, as RLinf's checkpoints have them: 570
    embodiment_tag: str | None = None  # which entry of the checkpoint's metadata.json; may be left out where there is one
    seed: int = 1  # seed of the episode starts, the sampler's noise and the minibatches
    device: str = "auto"  # cpu, cuda, cuda:N, or auto
    physics: str | None = None  # Isaac Lab physics preset (newton_mjwarp, ...; the embedded task has mujoco_c, too)
    renderer: str | None = None  # Isaac Lab renderer preset (newton_renderer, isaacsim_rtx, ...)
    num_envs: int | None = None  # parallel environments over all ranks
    iterations: int | None = None  # rollout-and-update iterations
    evaluate: bool = False  # evaluate --checkpoint, and nothing else
    eval_every: int = 50  # iterations between ODE evaluations; 0: only before and after
    eval_episodes: int = 256  # episodes of an evaluation (rounded up to whole batches of environments); 0: none
    eval_seed: int = 7_000_000  # seed of the evaluation's episode starts, the same for every evaluation
    save_every: int = 50  # iterations between checkpoints
    keep_checkpoints: int = 2  # how many of the latest checkpoints stay on disk, beside the best one
    resume: str | None = None  # runs/<name> of an interrupted run: goes on from its latest checkpoint, with its arguments
    track: bool = True  # log to Weights & Biases (offline when nobody is logged in)
    wandb_project: str = "gr00t-rl"  # Weights & Biases project
    exp_name: str | None = None  # the run's folder is runs/<exp-name>; made from task, seed and time by default
    capture_video: bool = True  # record a group of rollouts before and after
    compile: bool = False  # torch.compile the transformer blocks; on a GPU, sample actions in CUDA graphs

    # algorithm
    reward: Literal["sparse", "dense"] = "sparse"  # sparse: 1 at success, which ends an attempt; dense: the task's own
    rollout_chunks: int | None = None  # T, policy calls per environment and rollout (a whole episode by default)
    gamma: float = 0.99  # discount per environment step
    gae_lambda: float = 0.95  # lambda of GAE, per chunk
    critic_obs: Literal["features", "privileged"] = "features"  # features: backbone and proprioception
    critic_lr: float = 1e-3  # AdamW's learning rate of the critic
    critic_epochs: int = 8  # passes of the critic over a rollout; those beyond --epochs leave the policy alone
    critic_warmup: int = 3  # iterations in which only the critic learns (without --unfreeze)
    lora_targets: tuple[str, ...] = ("dit-attention", "dit-feed-forward", "vl-attention")  # what gets adapters, of TARGETS
    lora_rank: int = 16  # rank of an adapter
    lora_alpha: float = 32.0  # an adapter's output is multiplied by this over its rank
    lora_dropout: float = 0.0  # dropout before the adapters in the update; ratios then start from about 1 only
    llm_layers: int = 4  # how many of the language model's top layers llm-attention adapts
    category_layers: Literal["frozen", "lora", "train"] = "frozen"  # the embodiment's own layers, which are no nn.Linear
    adapter: str | None = None  # adapters to begin with: a checkpoint's folder of that name
    unfreeze: tuple[str, ...] = ()  # stages in order, each name[:iteration or plateau][:learning rate]
    plateau: int = 20  # iterations without better success after which a stage that waits for it begins
    unfreeze_kl: float = 100.0  # no stage begins while the KL to the base is above this
    merged_export: bool = True  # checkpoints hold the merged network, too
    value_clip: float | None = None  # clip range of the value's change, in units of the return
    normalize_advantages: bool = True  # to mean 0 and std 1 over a rollout's samples
    chunk: int | None = None  # actions executed per policy call (the model's action horizon by default)
    denoise_steps: int = 4  # K, denoising steps per policy call
    noise: Literal["flow-sde", "flow-sde-all", "flow-cps", "flow-cps-all"] = "flow-sde"  # without -all: one step per sample
    noise_level: float | None = None  # a, the sampler's exploration noise
    learning_rate: float | None = None  # AdamW's learning rate of the policy
    lr_warmup: int = 10  # iterations of linear warm-up: AdamW's first steps are otherwise too large to survive
    lr_hold: float = 0.5  # share of the run at full learning rate; afterwards it falls linearly to a tenth
    clip: float | None = None  # clip range of the ratio of summed log-probabilities (the docs compare conventions)
    epochs: int | None = None  # passes over a rollout
    minibatches: int | None = None  # optimizer steps per epoch
    micro_batch_size: int = 128  # samples per forward pass; gradients are accumulated over a minibatch
    kl_coef: float | None = None  # weight of the KL to the base model (which is logged at 0, too)
    kl_target: float | None = None  # KL to the base that --kl-coef adapts to: times or by 1.5 outside half to twice of it
    log_ratio_clamp: float = 20.0  # bound on |log ratio| before exp
    max_grad_norm: float = 1.0  # gradient norm, of policy and critic each
    feature_cache: Literal["gpu", "cpu", "off"] = "gpu"  # where backbone features wait for the update; off: recomputed
    backbone_bf16: bool | None = None  # run the frozen backbone under bfloat16 autocast, and keep its features so
    max_memory_gb: float | None = None  # budget [GB]: micro-batches and the place of features are planned to fit it
    backbone_fp8: bool = False  # float8 products in the frozen backbone (GPUs from Ada on); prints what it changes
    matmul_precision: Literal["highest", "high"] | None = None  # of fp32 products on a GPU; high: TF32, several times faster
    activation_checkpointing: bool = False  # recompute the blocks' activations in the backward pass: slower, smaller


# what can have adapters: the stage that trains them, and a pattern of module names
ATTENTION = r"transformer_blocks\.\d+\.attn1\.(to_[qkv]|to_out\.0)"
TARGETS = {
    "dit-attention": ("head", r"action_head\.model\." + ATTENTION),
    "dit-feed-forward": ("head", r"action_head\.model\.transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)"),
    "vl-attention": ("vl", r"action_head\.vl_self_attention\." + ATTENTION),
    "llm-attention": ("llm", r"backbone\.language_model\.layers\.({top})\.self_attn\.[qkvo]_proj"),
    "vision-attention": ("vision", r"backbone\.vision_model\..*layers\.\d+\.self_attn\.([qkv]|out)_proj"),
}
STAGES = ("critic", "head", "vl", "llm", "vision")
CATEGORY = ("state_encoder", "action_encoder", "action_decoder")
# what None stands for: (small checkpoint on a CPU, small checkpoint on a GPU, full-size checkpoint)
DEFAULTS = {
    "num_envs": (128, 1024, 64),
    "iterations": (240, 240, 500),
    "noise_level": (0.8, 0.8, 0.5),
    "learning_rate": (5e-4, 5e-4, 5e-5),
    "clip": (0.2, 0.2, 0.1),
    "epochs": (2, 2, 2),
    "minibatches": (2, 2, 4),
    "kl_coef": (0.0, 0.0, 0.01),
    "backbone_bf16": (False, False, True),
    "matmul_precision": ("highest", "highest", "high"),
}
TOLERANCE = {"highest": 1e-5, "high": 0.1}  # on |ratio - 1| before the first update; TF32 rounds by batch size
# heavy imports come after the command line, so --help is instant
ARGS = tyro.cli(Args) if __name__ == "__main__" else None

import gymnasium as gym
import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common import (
    CudaGraphs, Noise, Ranks, RunLogger, StageTimer, UsageError, check_finite, check_numbers, check_ranks, close_iteration,
    explained_variance, gae, load_run, merge_moments, peak_memory_gb, per_step, run_name, run_summary, save_checkpoint,
    standardize, start_logger, step_means, success_text, to_host, wilson_interval,
)  # fmt: skip
from gr00t_n1d5 import Gr00tN1d5, is_real, recompute
from gr00t_tasks import (
    TASKS, check_columns, check_memory, check_sampling, end_terms, load_gr00t, refresh_sensors, settle_args, task_config,
)  # fmt: skip


def resolve(args: Args) -> Args:
    """Fills in what was left open and refuses what cannot work, before anything expensive starts.

    Raises:
        UsageError: names the flag and the remedy.
    """
    args = settle_args(args, DEFAULTS)
    positive = "num_envs iterations save_every keep_checkpoints denoise_steps noise_level learning_rate clip epochs"
    positive += " minibatches micro_batch_size log_ratio_clamp max_grad_norm chunk max_memory_gb pad_prompt"
    positive += " rollout_chunks critic_lr critic_epochs value_clip kl_target lora_rank lora_alpha"
    positive += " llm_layers plateau unfreeze_kl"
    others = "kl_coef lr_warmup lr_hold eval_every eval_episodes seed eval_seed critic_warmup"
    check_numbers(args, positive, others, "gamma gae_lambda lora_dropout")
    if args.kl_target and not args.kl_coef:
        raise UsageError(f"--kl-target {args.kl_target}: needs a --kl-coef greater than 0 to begin with")
    if args.critic_obs == "privileged" and not TASKS[args.task].privileged:
        raise UsageError(f"--critic-obs privileged: {args.task} has no observation group for it; use features")
    parse_schedule(args)
    if args.backbone_fp8 and {"llm-attention", "vision-attention"} & set(args.lora_targets):
        raise UsageError("--backbone-fp8: is for a frozen backbone; leave it out, or llm-attention and vision-attention")
    check_ranks(args, "num_envs")
    check_sampling(args)
    args.exp_name = run_name(args, "ppo_gr00t_lora")
    return args


class Stage(NamedTuple):
    """A step of `--unfreeze`."""

    name: str  # one of STAGES
    start: int | None  # iteration; None: when success has stopped improving
    learning_rate: float | None  # None: --learning-rate


def parse_schedule(args: Args) -> list[Stage]:
    """The stages of a run in order; without --unfreeze first the critic, then all at once.

    Raises:
        UsageError: an unknown target, a stage that cannot be read, stands twice or has nothing to train.
    """
    for name in args.lora_targets:
        if name not in TARGETS:
            raise UsageError(f"--lora-targets {name}: there is no such target; they are {', '.join(TARGETS)}")
    trained = {TARGETS[name][0] for name in args.lora_targets} | ({"head"} if args.category_layers != "frozen" else set())
    if not trained:
        raise UsageError("--lora-targets: without any, and with --category-layers frozen, there is nothing to train")
    if args.category_layers == "lora" and args.lora_dropout:
        raise UsageError("--lora-dropout: not with --category-layers lora; use train or frozen, or leave dropout at 0")
    names = [name for name in STAGES if name in trained]
    stages: list[Stage] = []
    for text in args.unfreeze or ("critic", *(f"{name}:{args.critic_warmup}" for name in names)):
        name, start, rate = (*text.split(":"), "", "")[:3]
        try:
            stage = Stage(name, None if start == "plateau" else int(start or 0), float(rate) if rate else None)
            if text.count(":") > 2 or (stage.start or 0) < 0 or not 0 <= (stage.learning_rate or 0) < math.inf:
                raise ValueError
        except ValueError:
            form = "name[:iteration or plateau][:learning rate], as vl:plateau:1e-4"
            raise UsageError(f"--unfreeze {text}: cannot be read; a stage is {form}") from None
        if name not in ("critic", *names):
            raise UsageError(f"--unfreeze {text}: what --lora-targets names has the stages critic, {', '.join(names)}")
        if name in (other.name for other in stages):
            raise UsageError(f"--unfreeze {text}: {name} stands there twice; leave one out")
        stages.append(stage)
    missing = [name for name in names if name not in (stage.name for stage in stages)]
    if missing:
        raise UsageError(f"--unfreeze: {', '.join(missing)} would never be trained; add a stage or take targets away")
    return stages


# ======== env =========================================================================================================
# Copied from ppo_gr00t_frozen.py:Observation
class Observation(NamedTuple):
    """What the policy sees at a chunk boundary."""

    images: Tensor  # (N, V, H, W, 3) uint8
    state: Tensor  # (N, d) in the simulator's units
    prompt: Tensor  # (N,) int64, index of the instruction
    critic: Tensor  # (N, c) proprioception or the simulator's state, and time as a share of the horizon
    features: Tensor | None = None  # (N, L, D) of the backbone, where they are kept


class ChunkEnv:
    """Isaac Lab in chunks of actions, over a fixed horizon: no resets inside, success is remembered and masks the rest.

    Images are rendered at chunk boundaries only. With the task's own reward, success ends nothing: it would be punished.
    """

    # Copied from ppo_gr00t_frozen.py:ChunkEnv.__init__
    def __init__(self, args: Args, cfg):
        from isaaclab.managers import TerminationManager

        self.task, instruction, self.dense, self.gamma = TASKS[args.task], args.instruction, args.reward == "dense", args.gamma
        self.critic_group = "critic" if args.critic_obs == "privileged" else "policy"
        ends = end_terms(cfg, self.task)
        cfg.terminations = {}  # episodes end at the horizon, all at once
        self.env = gym.make(self.task.isaac or args.task, cfg=cfg).unwrapped
        self.terminations = TerminationManager(ends, self.env)
        check_columns(self.env, args.task)
        self.num_envs, self.device = self.env.num_envs, self.env.device
        self.instructions = (instruction,) if instruction else self.task.instructions
        # an instruction of the task's own fixes what is asked for; any other wording leaves that to the task
        self.asked = self.task.instructions.index(instruction) if instruction in self.task.instructions else None
        self.success = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)  # (N,)
        self.failure = torch.zeros_like(self.success)  # (N,) of episodes without success before
        self.steps, self.latest = self.task.horizon, None  # of the episode under way, and what was seen last

    # Copied from ppo_gr00t_frozen.py:ChunkEnv.reset
    def reset(self, seed: int) -> Observation:
        """Starts one episode everywhere; the starts depend on the seed and the number of environments alone."""
        env = self.env
        env.reset(seed=seed)
        if self.asked is not None and self.task.target:
            getattr(env, self.task.target).fill_(self.asked)
        refresh_sensors(env)
        env.obs_buf = env.observation_manager.compute()
        self.terminations.reset()
        self.success, self.failure, self.steps = torch.zeros_like(self.success), torch.zeros_like(self.success), 0
        return self.observe()

    # Copied from ppo_gr00t_frozen.py:ChunkEnv.step_chunk
    def step_chunk(self, actions: Tensor, last: bool = False, frames: list | None = None) -> Observation | None:
        """Executes (N, chunk, d) actions; updates `self.success` and the chunk's discounted reward, `self.reward`.

        No image is rendered after the last. With `frames`, appends one of every environment after every second step.
        """
        self.reward = torch.zeros(self.num_envs, device=self.device)  # (N,)
        for i in range(actions.shape[1]):
            before, alive = self.success, ~self.ended
            _, dense, *_ = self.env.step(actions[:, i])
            over = self.terminations.compute()  # (N,)
            self.success = before | (self.terminations.get_term("success") & ~self.failure)
            self.failure = self.failure | (over & ~self.success)
            self.reward += self.gamma**i * (dense * alive if self.dense else (self.success & ~before))
            if frames is not None and i % 2:
                frames.append((self.images()[:, 0], self.success.clone()))
        self.steps += actions.shape[1]
        return None if last else self.observe()

    # Copied from ppo_gr00t_frozen.py:ChunkEnv.ended
    @property
    def ended(self) -> Tensor:
        """(N,) whether an attempt is over: with a failure, or with success, unless rewards go on after it."""
        return self.failure if self.dense else self.failure | self.success

    # Copied from grpo_gr00t.py:ChunkEnv.images
    def images(self) -> Tensor:
        """(N, V, H, W, 3) uint8; renders if the scene has moved since the last call."""
        sensors = self.env.scene.sensors
        views = [sensors[name].data.output["rgb"].torch[..., :3] for name in self.task.cameras]
        return torch.stack(views, 1) if views else torch.empty(self.num_envs, 0, 1, 1, 3, dtype=torch.uint8, device=self.device)

    def observe(self) -> Observation:
        own = self.task.target is not None and len(self.instructions) > 1
        prompt = getattr(self.env, self.task.target).clone() if own else torch.zeros_like(self.success, dtype=torch.long)
        time = torch.full((self.num_envs, 1), self.steps / self.task.horizon, device=self.device)
        critic = torch.cat([self.env.obs_buf[self.critic_group], time], 1)
        self.latest = Observation(self.images(), self.env.obs_buf["policy"].clone(), prompt, critic)
        return self.latest


# Copied from grpo_gr00t.py:make_env
@contextlib.contextmanager
def make_env(args: Args, image_size: int, run_dir: Path, ranks: Ranks):
    """Starts the simulator and yields a ChunkEnv; what the simulator prints goes to a file."""
    run_dir.mkdir(parents=True, exist_ok=True)  # ranks other than 0 may be here first
    log = open(run_dir / f"simulator{ranks.rank or ''}.log", "a")
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        from isaaclab.app import launch_simulation

        cfg = task_config(args, args.num_envs // ranks.world, image_size)
        launcher = argparse.Namespace(device=args.device, headless=True, enable_cameras=bool(TASKS[args.task].cameras))
        simulation = contextlib.ExitStack()
        simulation.enter_context(launch_simulation(cfg, launcher))
        env = ChunkEnv(args, cfg)
        env.reset(seed=0)
    with simulation:
        yield env
        env.env.close()


# ======== GR00T wrapper ===============================================================================================
# Copied from grpo_gr00t.py:Chain
class Chain(NamedTuple):
    """The stochastic denoising steps of a policy call: J = 1 (one step per sample) or all of them."""

    x: Tensor  # (N, J, H, A) before the step
    y: Tensor  # (N, J, H, A) after it
    k: Tensor  # (N, J) int64, index of the step
    log_prob: Tensor  # (N, J) summed over executed steps and valid dimensions


# Copied from grpo_gr00t.py:PolicyOutput
class PolicyOutput(NamedTuple):
    """What one policy call returns."""

    action: Tensor  # (N, chunk, d) in the simulator's units
    features: Tensor  # (N, L, D) backbone features
    chain: Chain | None  # None for the ODE


# Copied from grpo_gr00t.py:stochastic_step
def stochastic_step(x: Tensor, v: Tensor, k: Tensor, steps: int, cps: bool, level: float) -> tuple[Tensor, Tensor]:
    """Mean and std of the Gaussian denoising step k of `steps`; t = 0 is noise, t = 1 the action.

    Flow-SDE (Flow-GRPO, arXiv 2505.05470, eq. 9 in GR00T's time) or Flow-CPS (arXiv 2509.05952).

    Args:
        x, v: (B, H, A) chain state and velocity.
        k: (B,) int64.
        level: a.

    Returns:
        mean (B, H, A), std (B, 1, 1); fp32.
    """
    dt = 1.0 / steps
    t = (k.float() * dt)[:, None, None]  # (B, 1, 1)
    next_t = t + dt
    x0, x1 = x - t * v, x + (1 - t) * v  # estimates of the noise and of the action
    if cps:
        std = (1 - next_t) * math.sin(math.pi * level / 2)
        return (1 - next_t) * math.cos(math.pi * level / 2) * x0 + next_t * x1, std
    sigma = level * ((1 - t) / t.clamp(min=dt)).sqrt()
    mean = (1 - next_t - sigma**2 * dt / (2 * (1 - t))) * x0 + next_t * x1
    return mean, sigma * math.sqrt(dt)


# Copied from grpo_gr00t.py:gaussian_log_prob
def gaussian_log_prob(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of y under N(mean, std^2), summed over the last two dimensions: (..., H, A) -> (...)."""
    z = (y - mean) / std
    return (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).sum((-2, -1))


# Copied from ppo_gr00t_frozen.py:Critic
class Critic(nn.Module):
    """Value of a state from what `Gr00tActorCritic.critic_input` makes of it; 10M parameters at full size."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.register_buffer("moments", torch.zeros(3, inputs, dtype=torch.float64))  # of the inputs so far
        sizes = itertools.pairwise((inputs, width, width, width // 4))
        self.layers = nn.Sequential(*(layer for a, b in sizes for layer in (nn.Linear(a, b), nn.SiLU())))
        self.value = nn.Linear(width // 4, 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Values (B,) of inputs (B, inputs)."""
        return self.value(self.layers(standardize(x, self.moments))).squeeze(-1)


class Gr00tActorCritic(nn.Module):
    """GR00T N1.5 as actor and critic: adapters on frozen weights; without the adapters it is the base model."""

    def __init__(self, args: Args):
        super().__init__()
        self.net, self.processor, prompts, lengths = load_gr00t(args)  # prompts (P, L), their lengths (P,)
        task, config = TASKS[args.task], self.net.config
        self.instructions = (args.instruction,) if args.instruction else task.instructions
        self.chunk = args.chunk or config.action_horizon
        self.steps, self.level = args.denoise_steps, args.noise_level
        self.cps, self.all_steps = args.noise.startswith("flow-cps"), args.noise.endswith("-all")
        self.stochastic_steps = self.steps - self.cps  # the last step of Flow-CPS has std 0
        self.valid = self.processor.valid_action_dims
        self.rollout_chunks = args.rollout_chunks or task.horizon // self.chunk
        self.micro_batch_size, self.bf16 = args.micro_batch_size, args.backbone_bf16

        head_device = torch.device(args.device)
        if head_device.type == "cuda":
            torch.set_float32_matmul_precision(args.matmul_precision)
        self.net.requires_grad_(False).to(head_device)
        self.net.action_head.float()  # fp32: means, log-probabilities and optimizer decide
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            self.adapters = get_peft_model(self.net, lora_config(args, self.net)).eval()
        self.merged_export, self.begun, self.trains_backbone = args.merged_export, (), False
        self.unfreeze(STAGES)
        self.processor.to(head_device)
        self.privileged = args.critic_obs == "privileged"
        own = task.privileged if self.privileged else config.text_hidden_size + sum(task.state.values())
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            self.critic = Critic(own + 1, max(config.text_hidden_size, 256)).to(head_device)  # 1: time
        self.register_buffer("prompts", prompts.to(head_device), persistent=False)
        self.register_buffer("lengths", lengths.to(head_device), persistent=False)
        self.padded = args.pad_prompt is not None  # the head sees the padding, as RLinf's does
        self.mixed = not self.padded and len(set(lengths.tolist())) > 1  # it does not
        if args.adapter:
            try:
                self.load_adapter(Path(args.adapter))
            except Exception as error:  # safetensors and torch have many kinds
                raise UsageError(f"--adapter {args.adapter}: does not fit ({' '.join(str(error).split())})") from error
        self.sampler = CudaGraphs(self.sample) if args.compile and head_device.type == "cuda" else self.sample
        if args.backbone_fp8:
            self.net.backbone.to_fp8()
        if args.activation_checkpointing:
            for block in self.blocks():
                recompute(block)
        for name, block in self.named_modules() if args.compile else ():
            if re.fullmatch(r"(net|base_head)\..*\.(layers|transformer_blocks)\.\d+", name):
                block.compile()  # equal blocks share one compilation

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks that gradients pass through."""
        head, backbone = self.net.action_head, self.net.backbone
        own = [*backbone.language_model.layers, *backbone.vision_model.encoder.layers]
        return [*head.model.transformer_blocks, *head.vl_self_attention.transformer_blocks, *own]

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What each stage trains."""
        places = {"vision": "vision_model.", "llm": "language_model.", "vl": "vl_self_attention.", "head": ""}
        groups: dict[str, list[nn.Parameter]] = {}
        for name, p in self.net.named_parameters():
            if "lora_" in name or "modules_to_save." in name:
                groups.setdefault(next(stage for stage, place in places.items() if place in name), []).append(p)
        return groups

    def unfreeze(self, begun: Iterable[str]) -> None:
        """Trains the stages that have begun, and nothing else."""
        self.begun = tuple(begun)
        self.trains_backbone = not {"llm", "vision"}.isdisjoint(self.begun)
        for stage, parameters in self.groups().items():
            for p in parameters:
                p.requires_grad_(stage in self.begun)

    # Copied from grpo_gr00t.py:Gr00tActor.trainable
    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.net.parameters() if p.requires_grad]

    # Copied from grpo_gr00t.py:Gr00tActor.embodiment
    def embodiment(self, n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.long, device=self.prompts.device)

    # Copied from grpo_gr00t.py:Gr00tActor.features
    def features(self, obs: Observation) -> Tensor:
        """Backbone features (B, L, D): those that were kept, or computed from the images."""
        if obs.features is not None:
            return obs.features
        with torch.autocast(self.prompts.device.type, torch.bfloat16, self.bf16):
            lengths = self.lengths[obs.prompt] if self.padded else None
            features = self.net.backbone(self.prompts[obs.prompt], self.processor.images(obs.images), lengths)
        return features.bfloat16() if self.bf16 else features

    # Copied from ppo_gr00t_frozen.py:Gr00tActorCritic.critic_input
    @torch.no_grad()
    def critic_input(self, obs: Observation) -> Tensor:
        """(B, inputs), without gradients to the policy: the mean of the real features, or the simulator's state."""
        if self.privileged:
            return obs.critic
        features = self.features(obs).float()  # (B, L, D)
        real = is_real(self.lengths[obs.prompt], features.shape[1])[..., None]  # (B, L, 1)
        return torch.cat([(features * real).sum(1) / real.sum(1), obs.critic], 1)

    # Copied from ppo_gr00t_frozen.py:Gr00tActorCritic.value
    def value(self, obs: Observation) -> Tensor:
        """Values (B,) of observations."""
        parts = torch.arange(len(obs.state), device=obs.state.device).split(self.micro_batch_size)
        each = (Observation(*(x if x is None else x[rows] for x in obs)) for rows in parts)
        return torch.cat([self.critic(self.critic_input(part)) for part in each])

    # Copied from grpo_gr00t.py:Gr00tActor.act
    @torch.no_grad()
    def act(self, obs: Observation, noise: Noise | None = None, explore: bool = False) -> PolicyOutput:
        """Actions for an observation: by the ODE, or with stochastic steps and their log-probability (`explore`)."""
        n, config, noise = len(obs.state), self.net.config, noise or Noise(self.prompts.device, Ranks(0, 1), 0)
        shape = (config.action_horizon, config.action_dim)
        start = noise.normal(n, *shape)  # (N, H, A)
        drawn = eps = None
        if explore:
            count = self.stochastic_steps
            if self.all_steps:
                drawn = torch.arange(count, device=start.device).expand(n, count)  # (N, J)
            else:
                drawn = noise.integers(n, count)[:, None]
            eps = noise.normal(n, drawn.shape[1], *shape)  # (N, J, H, A)
        parts = []
        for i in range(0, n, self.micro_batch_size):
            rows = slice(i, i + self.micro_batch_size)
            part = Observation(*(x if x is None else x[rows] for x in obs))
            part = part._replace(features=self.features(part))
            chosen = (drawn[rows], eps[rows]) if explore else (None, None)
            x, chain = self.sampler(part._replace(images=None), start[rows], *chosen)
            parts.append(PolicyOutput(self.processor.unnormalize_action(x)[:, : self.chunk], part.features, chain))
        chain = Chain(*(torch.cat(x) for x in zip(*(p.chain for p in parts)))) if explore else None
        return PolicyOutput(*(torch.cat(x) for x in list(zip(*parts))[:2]), chain)

    # Copied from grpo_gr00t.py:Gr00tActor.sample
    def sample(self, obs: Observation, start: Tensor, drawn: Tensor | None, eps: Tensor | None) -> tuple[Tensor, Chain | None]:
        """Actions (N, H, A), normalised: by the ODE, or given drawn steps and their noise as `denoise` does."""
        context = self.encode(self.net.action_head, obs)
        if drawn is None:
            return self.net.action_head.sample(context, self.embodiment(len(start)), start, self.steps), None
        return self.denoise(context, start, drawn, eps)

    # Copied from grpo_gr00t.py:Gr00tActor.encode
    def encode(self, head: nn.Module, obs: Observation):
        """What the denoising steps need of an observation."""
        lengths, state = self.lengths[obs.prompt] if self.mixed else None, self.processor.normalize_state(obs.state)
        return head.encode(self.features(obs), state, self.embodiment(len(state)), lengths)

    # Copied from grpo_gr00t.py:Gr00tActor.denoise
    def denoise(self, context, x: Tensor, drawn: Tensor, eps: Tensor) -> tuple[Tensor, Chain]:
        """K denoising steps, those in `drawn` (B, J) stochastic with noise eps (B, J, H, A)."""
        rows = torch.arange(len(x), device=x.device)
        xs, ys, means = (torch.zeros_like(eps) for _ in range(3))
        stds = torch.ones_like(eps[..., :1, :1])
        for k in range(self.steps):
            step = torch.full_like(rows, k)
            v = self.velocity(self.net.action_head, x, step, context)
            y = x + v / self.steps
            if k < self.stochastic_steps:
                mean, std = stochastic_step(x, v, step, self.steps, self.cps, self.level)
                for j in range(drawn.shape[1]):
                    chosen = (drawn[:, j] == k)[:, None, None]  # (B, 1, 1)
                    y = torch.where(chosen, mean + std * eps[:, j], y)
                    xs[:, j], ys[:, j] = torch.where(chosen, x, xs[:, j]), torch.where(chosen, y, ys[:, j])
                    means[:, j] = torch.where(chosen, mean, means[:, j])
                    stds[:, j] = torch.where(chosen, std, stds[:, j])
            x = y
        return x, Chain(xs, ys, drawn, self.log_prob(ys, means, stds))

    # Copied from grpo_gr00t.py:Gr00tActor.velocity
    def velocity(self, head: nn.Module, x: Tensor, k: Tensor, context) -> Tensor:
        bucket = (k * head.config.num_timestep_buckets) // self.steps
        return head.velocity(x, bucket, self.embodiment(len(x)), context)

    # Copied from grpo_gr00t.py:Gr00tActor.executed
    def executed(self, x: Tensor) -> Tensor:
        """What of a chunk reaches the simulator: (..., H, A) -> (..., chunk, valid)."""
        return x[..., : self.chunk, : self.valid]

    # Copied from grpo_gr00t.py:Gr00tActor.log_prob
    def log_prob(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return gaussian_log_prob(self.executed(y), self.executed(mean), std)

    # Copied from grpo_gr00t.py:Gr00tActor.evaluate
    def evaluate(self, obs: Observation, chain: Chain, head: nn.Module | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probability of stored steps under the present weights, with gradients.

        Args:
            obs: fields (B, ...).
            chain: fields (B, J, ...).
            head: the action head by default, or the base model's.

        Returns:
            log_prob (B, J), mean (B, J, chunk, valid), std (B, J, 1, 1).
        """
        head = head or self.net.action_head
        b, j = chain.k.shape
        context = self.encode(head, obs)
        if j > 1:
            context = context.repeat_interleave(j)
        x, k = chain.x.flatten(0, 1), chain.k.flatten()  # (B J, H, A), (B J,)
        v = self.velocity(head, x, k, context)
        mean, std = stochastic_step(x, v, k, self.steps, self.cps, self.level)
        mean, std = mean.unflatten(0, (b, j)), std.unflatten(0, (b, j))
        return self.log_prob(chain.y, mean, std), self.executed(mean), std

    @torch.no_grad()
    def base_mean(self, obs: Observation, chain: Chain) -> Tensor:
        """The base model's mean (B, J, chunk, valid) of stored steps: that with the adapters off."""
        with self.adapters.disable_adapter():
            mean = self.evaluate(obs._replace(features=None) if self.trains_backbone else obs, chain)[1]
        self.unfreeze(self.begun)  # peft has thawed all adapters
        return mean

    def merged(self) -> Gr00tN1d5:
        """The network with the adapters added to its weights, which themselves stay as they are."""
        with torch.device("meta"):
            plain = Gr00tN1d5(self.net.config)
        plain._tables, plain._row = self.net._tables, self.net._row
        for name, _ in list(plain.named_parameters()):
            path, _, leaf = name.rpartition(".")
            layer = self.net.get_submodule(path)  # of a layer that is trained as a whole, the trained one
            weight = getattr(layer.get_base_layer() if isinstance(layer, LoraLayer) else layer, leaf).detach()
            if isinstance(layer, LoraLayer) and leaf in ("weight", "W"):
                weight = weight + layer.get_delta_weight("default").detach().to(weight.dtype)
            setattr(plain.get_submodule(path), leaf, nn.Parameter(weight))
        return plain

    def load(self, folder: Path) -> None:
        """Takes over what `save` wrote; the base model stays."""
        self.load_adapter(folder / "adapter")
        self.critic.load_state_dict(load_file(folder / "critic.safetensors"))

    def load_adapter(self, folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        found = set_peft_model_state_dict(self.adapters, weights)
        if found.unexpected_keys or len(weights) != sum(map(len, self.groups().values())):
            raise ValueError("other layers than those of --lora-targets and --category-layers")

    def save(self, folder: Path) -> None:
        """Writes the adapters as peft does, the critic, and the merged network in NVIDIA's layout."""
        self.adapters.save_pretrained(folder / "adapter", save_embedding_layers=False)
        save_file(self.critic.state_dict(), folder / "critic.safetensors")
        if self.merged_export:
            self.merged().save_pretrained(folder)
            self.processor.save_pretrained(folder)


def lora_config(args: Args, net: Gr00tN1d5) -> LoraConfig:
    """Where adapters go; module names and parameters are those of the network before there are any."""
    layers = net.config.text_layers
    top = "|".join(str(i) for i in range(max(layers - args.llm_layers, 0), layers))
    own = [f"action_head.{name}" for name in CATEGORY]
    tables = [name for name, _ in net.named_parameters() if name.startswith(tuple(own)) and name.endswith("W")]
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="|".join(TARGETS[name][1].replace("{top}", top) for name in args.lora_targets) or [],
        target_parameters=tables if args.category_layers == "lora" else None,
        modules_to_save=own if args.category_layers == "train" else None,
    )


# ======== rollout =====================================================================================================
class Batch:
    """One iteration's samples, flattened from (T, N, ...) to (T N, ...); T chunks per rollout."""

    def __init__(self, args: Args, chunks: int, trains_backbone: bool):
        self.cache, self.device, self.chunks = "off" if trains_backbone else args.feature_cache, args.device, chunks
        self.flat, self.rows = {}, 0

    # Copied from ppo_gr00t_frozen.py:Batch.add
    def add(self, obs: Observation, out: PolicyOutput, critic_input: Tensor) -> None:
        """One chunk of every environment."""
        kept = {"images": obs.images} if self.cache == "off" else {"features": out.features}
        kept |= {"state": obs.state, "prompt": obs.prompt, "critic": critic_input}
        for name, x in (kept | out.chain._asdict()).items():
            self.put(name, x)
        self.rows += len(obs.state)

    # Copied from grpo_gr00t.py:Batch.put
    def put(self, name: str, x: Tensor) -> None:
        """Writes a chunk's rows (N, ...) to their place: there is one copy of a rollout's samples."""
        if name not in self.flat:
            host = name == "features" and self.cache == "cpu"
            place = {"device": "cpu" if host else x.device, "pin_memory": host and x.is_cuda}
            self.flat[name] = torch.empty(self.chunks * len(x), *x.shape[1:], dtype=x.dtype, **place)  # (T N, ...)
        self.flat[name][self.rows : self.rows + len(x)].copy_(x, non_blocking=True)  # to the host beside the next steps

    # Copied from ppo_gr00t_frozen.py:Batch.finish
    def finish(self, steps: list[tuple], last_value: Tensor, successes: list[Tensor], args: Args, chunk: int) -> Batch:
        """Adds advantages and returns.

        Args:
            steps: per chunk reward, value, whether it ended the attempt, and whether it belongs to one, (N,) each.
            last_value: (N,) of the state after the rollout.
            successes: (N,) for each episode that ended.
        """
        rewards, values, ended, valid = (torch.stack(x) for x in zip(*steps))  # (T, N)
        none, gamma = torch.zeros_like(rewards), args.gamma**chunk
        advantage, target = gae(rewards, values, ended, none, none, last_value, gamma, args.gae_lambda)
        own = {"advantage": advantage, "target": target, "old_value": values, "keep": valid}
        self.flat |= {name: x.flatten() for name, x in own.items()}
        self.successes, self.figures = successes, {"samples": valid.sum()}
        self.figures |= {"reward": (rewards * valid).sum(), "value": (values * valid).sum()}
        for name, x in (("target", target * valid), ("error", (target - values) * valid)):
            self.figures[f"{name}_moments"] = torch.stack([x.sum(), x.square().sum()])
        return self

    # Copied from grpo_gr00t.py:Batch.select
    def select(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a field, on the training device."""
        source = self.flat[name]
        return source[rows.to(source.device)].to(self.device, non_blocking=True)

    # Copied from grpo_gr00t.py:Batch.samples
    def samples(self, rows: Tensor) -> tuple[Observation, Chain]:
        """Observations and stochastic steps of some rows."""
        kept = {name: self.select(name, rows) for name in (*Observation._fields, *Chain._fields) if name in self.flat}
        obs = Observation(**{name: kept.get(name) for name in Observation._fields})
        return obs, Chain(**{name: kept[name] for name in Chain._fields})


@torch.no_grad()
def rollout(env: ChunkEnv, policy: nn.Module, args: Args, iteration: int, ranks: Ranks, timer: StageTimer) -> Batch:
    """T chunks in every environment, from where the last rollout stopped; a new episode where one is over."""
    noise = Noise(args.device, ranks, args.seed, iteration)
    batch, steps, successes = Batch(args, policy.rollout_chunks, policy.trains_backbone), [], []
    for t in range(policy.rollout_chunks):
        if env.steps >= env.task.horizon:
            with timer("env"):
                env.reset(episode_seed(args.seed, iteration * policy.rollout_chunks + t, ranks))
        with timer("policy"):
            obs, valid = env.latest, ~env.ended  # valid (N,)
            out = policy.act(obs, noise, explore=True)
            critic_input = policy.critic_input(obs._replace(features=out.features))
            batch.add(obs, out, critic_input)
        with timer("env"):
            env.step_chunk(out.action, last=env.steps + policy.chunk >= env.task.horizon)
        over = env.steps >= env.task.horizon
        steps.append((env.reward, policy.critic(critic_input), env.ended | over, valid))
        successes += [env.success] if over else []
    with timer("policy"):
        last_value = torch.zeros_like(env.reward) if over else policy.value(env.latest)
        return batch.finish(steps, last_value, successes, args, policy.chunk)


# Copied from grpo_gr00t.py:episode_seed
def episode_seed(seed: int, iteration: int, ranks: Ranks) -> int:
    """Seed of an iteration's starts; differs by rank."""
    return int(np.random.SeedSequence((seed, iteration, ranks.rank)).generate_state(1)[0] >> 1)


# ======== loss ========================================================================================================
# Copied from ppo_gr00t_frozen.py:ppo_loss
def ppo_loss(policy: nn.Module, batch: Batch, rows: Tensor, args: Args, with_kl: bool) -> tuple[Tensor, dict, Tensor]:
    """Clipped surrogate plus KL to the base model, summed over rows.

    Args:
        rows: (B,) indices into the batch.
        with_kl: whether to run the base model; always true when --kl-coef is not 0.

    Returns:
        The loss, summed (divide by the minibatch's size); sums for the log; the largest |ratio - 1|.
    """
    obs, chain = batch.samples(rows)
    obs = obs._replace(features=policy.features(obs))
    log_prob, mean, std = policy.evaluate(obs, chain)
    step_log_ratio = log_prob - chain.log_prob  # (B, J)
    log_ratio = step_log_ratio.sum(1).clamp(-args.log_ratio_clamp, args.log_ratio_clamp)  # (B,)
    ratio = log_ratio.exp()
    advantage = batch.select("advantage", rows)  # (B,)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage)
    loss = -surrogate.sum()
    sums = {}
    if with_kl:
        kl = ((mean - policy.base_mean(obs, chain)) ** 2 / (2 * std**2)).sum((2, 3))  # (B, J) closed form: equal std
        if args.kl_coef > 0:
            loss = loss + args.kl_coef * kl.sum()
        sums |= {"kl_samples": torch.full_like(loss.detach(), len(rows)), "base_per_step": per_step(policy.steps, chain.k, kl)}
    with torch.no_grad():
        step_log_ratio = step_log_ratio.clamp(-args.log_ratio_clamp, args.log_ratio_clamp)
        step_ratio = step_log_ratio.exp()  # (B, J)
        outside = ((step_ratio - 1).abs() > args.clip).float()
        sums |= {
            "loss": loss.detach(),
            "policy_samples": torch.full_like(loss.detach(), len(rows)),
            "clip_frac": ((ratio - 1).abs() > args.clip).float().sum(),
            "approx_kl": ((ratio - 1) - log_ratio).sum(),  # k3 estimator of the KL to the rollout's policy
            "per_step": per_step(policy.steps, chain.k, outside, step_ratio, (step_ratio - 1) - step_log_ratio),
        }
        ratio_error = (ratio - 1).abs().max()
    return loss, sums, ratio_error


# Copied from ppo_gr00t_frozen.py:value_loss
def value_loss(policy: nn.Module, batch: Batch, rows: Tensor, args: Args) -> Tensor:
    """Half the squared error of the values, summed over rows (B,); clipped with --value-clip."""
    value, target = policy.critic(batch.select("critic", rows)), batch.select("target", rows)  # (B,)
    error = (value - target).square()
    if args.value_clip:
        old = batch.select("old_value", rows)
        error = torch.maximum(error, (old + (value - old).clamp(-args.value_clip, args.value_clip) - target).square())
    return 0.5 * error.sum()


# ======== train =======================================================================================================
# Copied from ppo_gr00t_frozen.py:plan_minibatches
def plan_minibatches(batch: Batch, args: Args, iteration: int, ranks: Ranks, moving: bool) -> list:
    """Normalises the advantages over all ranks' samples and draws the update's minibatches from these.

    Samples after the end of an attempt count nowhere. This is the one transfer between rollout and update.

    Returns:
        One (rows, size over all ranks, whether the policy learns) per optimizer step; never with `moving` False.
    """
    keep, advantage = batch.flat["keep"], batch.flat["advantage"]
    if args.normalize_advantages:
        n, total = ranks.reduce(torch.stack([keep.sum(), (advantage * keep).sum()]))
        advantage = (advantage - total / n) * keep
        std = (ranks.reduce(advantage.square().sum()) / n).sqrt()
        batch.flat["advantage"] = advantage / (std + 1e-3)
    rows = torch.nonzero(keep.cpu())[:, 0].numpy()
    rng = np.random.default_rng((args.seed, iteration, ranks.rank))
    epochs = range(max(args.epochs, args.critic_epochs))
    parts = [(p, e) for e in epochs for p in np.array_split(rng.permutation(rows), args.minibatches)]
    sizes = ranks.reduce(torch.tensor([float(len(p)) for p, _ in parts], device=args.device))
    total = sizes.cpu() if ranks.world > 1 else torch.tensor([len(p) for p, _ in parts])
    moves = args.epochs if moving else 0
    own = [(torch.from_numpy(p).to(args.device), e < moves) for p, e in parts]
    return [(p, n, moving) for (p, moving), n, m in zip(own, sizes, total) if m > 0]


# Copied from ppo_gr00t_frozen.py:update
def update(policy: nn.Module, optimizer, batch: Batch, plan, args: Args, ranks: Ranks) -> tuple[dict, dict]:
    """One optimizer step per minibatch; returns sums and maxima for the log, on the device."""
    critic, zero = list(policy.critic.parameters()), torch.zeros((), device=args.device)
    sums = dict.fromkeys(("loss", "value_loss", "clip_frac", "approx_kl", "kl_samples", "policy_samples"), zero)
    sums |= {"per_step": zero.expand(policy.steps, 4), "base_per_step": zero.expand(policy.steps, 2)}
    extremes = dict.fromkeys(("grad_norm", "critic_grad_norm", "first_ratio_error"), zero)
    for step, (rows, size, moving) in enumerate(plan):
        optimizer.zero_grad()
        with_kl = args.kl_coef > 0 or step == 0
        for micro in rows.split(args.micro_batch_size) if len(rows) else ():
            error = value_loss(policy, batch, micro, args)
            (error / size).backward()
            new = {"value_loss": error.detach()}
            if moving:
                loss, figures, ratio_error = ppo_loss(policy, batch, micro, args, with_kl)
                (loss / size).backward()
                new |= figures
                if step == 0:
                    extremes["first_ratio_error"] = torch.maximum(extremes["first_ratio_error"], ratio_error)
            sums = {name: value + new[name] if name in new else value for name, value in sums.items()}
        for name, parameters in (("critic_grad_norm", critic), *((("grad_norm", policy.trainable()),) if moving else ())):
            ranks.sum_gradients(parameters)
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            extremes[name] = torch.maximum(extremes[name], norm)
        optimizer.step()  # leaves alone what has no gradient
    return sums, extremes


# Copied from ppo_gr00t_frozen.py:describe_iteration
def describe_iteration(batch: Batch, sums: dict, extremes: dict, args: Args, ranks: Ranks) -> dict[str, float]:
    """The metrics of one iteration."""
    counts = batch.figures | {"success": torch.stack(batch.successes).sum()} if batch.successes else batch.figures
    counts["log_prob"] = batch.flat["log_prob"].sum(1).mean() / ranks.world  # not a number if the policy is lost
    host = to_host(counts | sums, extremes, ranks)
    samples = max(host["samples"][0], 1.0)
    metrics = {
        "rollout/samples": host["samples"][0],
        "rollout/reward": host["reward"][0] / samples,
        "rollout/value": host["value"][0] / samples,
        "rollout/log_prob": host["log_prob"][0],
        "update/explained_variance": explained_variance(host["target_moments"], host["error_moments"], samples),
    }
    if batch.successes:
        metrics["rollout/success"] = host["success"][0] / (args.num_envs * len(batch.successes))
    metrics["update/value_loss"] = host["value_loss"][0] / (samples * max(args.epochs, args.critic_epochs))
    metrics["update/critic_grad_norm"] = host["critic_grad_norm"][0]
    if moved := host["policy_samples"][0]:
        for name in ("loss", "clip_frac", "approx_kl"):
            metrics[f"update/{name}"] = host[name][0] / moved
        metrics |= {f"update/{name}": host[name][0] for name in extremes}
        metrics["update/kl_base"] = sum(host["base_per_step"][::2]) / host["kl_samples"][0]
        metrics |= step_means(host["per_step"], ("clip_frac", "ratio", "approx_kl"))
        metrics |= step_means(host["base_per_step"], ("kl_base",))
    return metrics


def learning_rate(args: Args, iteration: int, stage: Stage, begun: dict[str, int]) -> float:
    """Linear warm-up of a stage, full rate for the first --lr-hold of the run, then linearly down to a tenth."""
    past = (iteration / args.iterations - args.lr_hold) / max(1 - args.lr_hold, 1e-9)
    warm = min(1.0, (iteration + 1 - begun.get(stage.name, iteration + 1)) / (args.lr_warmup + 1))
    return (stage.learning_rate or args.learning_rate) * warm * (1 - 0.9 * min(max(past, 0.0), 1.0))


def advance(schedule: list[Stage], run: dict, iteration: int, args: Args, logger: RunLogger) -> None:
    """Begins the stages that are due; `run` remembers which did when, so that a resumed run knows."""
    while len(run["begun"]) < len(schedule):
        stage = schedule[len(run["begun"])]
        due = iteration - run["peak_at"] >= args.plateau if stage.start is None else iteration >= stage.start
        if due and run["kl_base"] > args.unfreeze_kl:
            if run["held"] != stage.name:
                logger.event(f"iteration {iteration}: {stage.name} waits, KL to the base is {run['kl_base']:.3g}")
            run["held"], due = stage.name, False
        if not due:
            return
        run["begun"][stage.name] = iteration
        run |= {"smooth": None, "peak": -1.0, "peak_at": iteration}
        logger.event(f"iteration {iteration}: stage {stage.name} begins")


def watch(run: dict, metrics: dict[str, float], iteration: int) -> None:
    """Follows what `advance` asks for: the KL to the base, and since when success (its moving average) has not risen."""
    run["kl_base"] = metrics.get("update/kl_base", run["kl_base"])
    if "rollout/success" in metrics:
        new = metrics["rollout/success"]
        run["smooth"] = new if run["smooth"] is None else 0.9 * run["smooth"] + 0.1 * new
        if run["smooth"] > run["peak"] + 0.005:
            run |= {"peak": run["smooth"], "peak_at": iteration + 1}


def train(args: Args, env: ChunkEnv, policy: nn.Module, logger: RunLogger, ranks: Ranks, state: dict | None) -> None:
    """The whole run: evaluate, iterate, evaluate, summarise."""
    schedule, own = [stage for stage in parse_schedule(args) if stage.name != "critic"], policy.groups()
    groups = [{"params": own[stage.name]} for stage in schedule]
    groups += [{"params": list(policy.critic.parameters()), "lr": args.critic_lr}]
    optimizer = torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    run = state or {"iteration": 0, "elapsed": 0.0, "stages": {}, "before": None, "best": -1.0, "kl_coef": args.kl_coef}
    run = {"begun": {}, "held": "", "smooth": None, "peak": -1.0, "peak_at": 0, "kl_base": 0.0} | run
    if state:
        optimizer.load_state_dict(run.pop("optimizer"))
        args.kl_coef = run["kl_coef"]
    timer, begin = StageTimer(args.device), time.time() - run["elapsed"]
    per_iteration = args.num_envs * policy.rollout_chunks * policy.chunk
    if run["before"] is None:
        run["before"] = evaluate(args, env, policy, ranks)
        logger.event(f"ODE success before: {success_text(run['before'])}")
        if args.capture_video:
            record(args, env, policy, ranks, logger, "before")
    metrics, result = {}, None
    env.steps = env.task.horizon  # the first rollout begins with new episodes
    for iteration in range(run["iteration"], args.iterations):
        advance(parse_schedule(args), run, iteration, args, logger)
        policy.unfreeze(run["begun"])
        for stage, group in zip(schedule, optimizer.param_groups):
            group["lr"] = learning_rate(args, iteration, stage, run["begun"])
        moving = bool(policy.trainable())  # else only the critic learns
        batch = rollout(env, policy, args, iteration, ranks, timer)
        with timer("update"):
            plan = plan_minibatches(batch, args, iteration, ranks, moving)
            policy.adapters.train(args.lora_dropout > 0)  # nothing else in the network behaves differently
            sums, extremes = update(policy, optimizer, batch, plan, args, ranks)
            policy.adapters.eval()
            policy.critic.moments.copy_(merge_moments(policy.critic.moments, batch.flat["critic"], ranks))
            metrics = describe_iteration(batch, sums, extremes, args, ranks)
            del batch  # before there is another
        first = moving and iteration == run["begun"][schedule[0].name] and not args.lora_dropout
        check_finite(metrics, iteration, logger, TOLERANCE[args.matmul_precision] if first else math.inf)
        if args.backbone_fp8 and iteration == 0:
            logger.event(policy.net.backbone.fp8_report())
        watch(run, metrics, iteration)
        metrics |= close_iteration(run, timer, iteration, per_iteration)
        metrics |= {
            "episodes": (iteration + 1) * per_iteration / env.task.horizon,
            "update/learning_rate": optimizer.param_groups[0]["lr"],
            "update/stage": len(run["begun"]) - 1,
            "update/kl_coef": args.kl_coef,
        }
        if args.kl_target and "update/kl_base" in metrics:
            share = metrics["update/kl_base"] / args.kl_target
            args.kl_coef = run["kl_coef"] = args.kl_coef * (1.5 if share > 2 else 1 / 1.5 if share < 0.5 else 1.0)
        last = iteration + 1 == args.iterations
        if args.eval_episodes and (last or (args.eval_every and (iteration + 1) % args.eval_every == 0)):
            result = evaluate(args, env, policy, ranks)
            metrics |= {"eval/ode_success": result["mean"], "eval/episodes": result["episodes"]}
            if result["mean"] > run["best"]:
                run["best"] = result["mean"]
                save_checkpoint(args, policy, None, run, "best", logger)
        run["elapsed"] = time.time() - begin
        logger.log(iteration, metrics | {"time/elapsed": run["elapsed"]})
        if last or (iteration + 1) % args.save_every == 0:
            save_checkpoint(args, policy, optimizer, run, f"step_{iteration + 1:06d}", logger)
            logger.curve_png()
            env.steps = env.task.horizon  # a run and its continuation go on with new episodes
    after = result or evaluate(args, env, policy, ranks)
    sde = evaluate(args, env, policy, ranks, explore=True)
    logger.event(f"ODE success after: {success_text(after)} (before: {success_text(run['before'])})")
    logger.event(f"peak memory: {peak_memory_gb(args.device):.2f} GB")
    if args.capture_video:
        record(args, env, policy, ranks, logger, "after")
    about = {
        "stages_begun": run["begun"],
        "trainable_parameters": sum(p.numel() for group in own.values() for p in group),
        "episodes": args.iterations * per_iteration / env.task.horizon,
        "instructions": env.instructions,
        "ode_success_before": run["before"],
        "ode_success_after": after,
        "sde_success": sde,
        "kl_to_base": metrics.get("update/kl_base"),
        "explained_variance": metrics.get("update/explained_variance"),
    }
    logger.summary(run_summary(args, "ppo_lora", run, per_iteration, ranks) | about)


# ======== evaluate ====================================================================================================
# Copied from grpo_gr00t.py:evaluate
@torch.no_grad()
def evaluate(args: Args, env: ChunkEnv, policy: nn.Module, ranks: Ranks, explore: bool = False) -> dict[str, float]:
    """Success on fixed episodes, by the ODE (or the exploring sampler), with its Wilson 95% interval.

    Returns:
        mean, low, high, episodes; empty with --eval-episodes 0.
    """
    if not args.eval_episodes:
        return {}
    successes, batches = [], math.ceil(args.eval_episodes / args.num_envs)
    for b in range(batches):
        obs = env.reset(episode_seed(args.eval_seed, b, ranks))
        noise = Noise(args.device, ranks, args.eval_seed, b)
        chunks = env.task.horizon // policy.chunk
        for t in range(chunks):
            obs = env.step_chunk(policy.act(obs, noise, explore).action, last=t + 1 == chunks)
        successes.append(env.success.sum())
    count, episodes = float(ranks.reduce(torch.stack(successes).sum())), batches * args.num_envs
    low, high = wilson_interval(count, episodes)
    return {"mean": count / episodes, "low": low, "high": high, "episodes": episodes}


# Copied from ppo_gr00t_frozen.py:record
@torch.no_grad()
def record(args: Args, env: ChunkEnv, policy: nn.Module, ranks: Ranks, logger: RunLogger, name: str) -> None:
    """Records the first episodes as the rollout sees them."""
    obs = env.reset(episode_seed(args.eval_seed, 0, ranks))
    noise = Noise(args.device, ranks, args.eval_seed)
    frames = [(obs.images[:, 0], env.success.clone())]
    chunks = env.task.horizon // policy.chunk
    for t in range(chunks):
        obs = env.step_chunk(policy.act(obs, noise, explore=True).action, last=t + 1 == chunks, frames=frames)
    shown = min(env.num_envs, 16)
    images = torch.stack([image[:shown] for image, _ in frames]).cpu().numpy()  # (F, n, H, W, 3)
    success = torch.stack([done[:shown] for _, done in frames]).cpu().numpy()  # (F, n)
    first = np.where(success.any(0), success.argmax(0), len(frames))
    logger.save_gif(name, images, success[-1], first)


# ======== main ========================================================================================================
# Copied from ppo_gr00t_frozen.py:main
def main(args: Args) -> None:
    args = resolve(args)
    ranks = Ranks.start(args.device)
    args.exp_name = ranks.broadcast(args.exp_name)
    run_dir = Path(args.resume or Path("runs") / args.exp_name)
    policy = Gr00tActorCritic(args)
    plan, state = check_memory(args, policy, ranks), load_run(args, run_dir, policy.load)
    sources = [HERE / f"{name}.py" for name in ("gr00t_n1d5", "gr00t_tasks", TASKS[args.task].module or "stock_tasks")]
    logger = start_logger(args, run_dir, __file__, sources, state, ranks)
    logger.listen("gr00t_tasks", TASKS[args.task].module or "stock_tasks")
    logger.event(f"{run_dir}: {args.task} on {args.device}, {args.num_envs} envs; {plan}")
    logger.event(f"instructions: {'; '.join(policy.instructions)}")
    logger.event(f"starting the simulator (its own output: {run_dir}/simulator.log)")
    failure = None
    with make_env(args, policy.processor.camera_size, run_dir, ranks) as env:
        try:
            if args.evaluate:
                result = evaluate(args, env, policy, ranks)
                if args.backbone_fp8 and result:
                    logger.event(policy.net.backbone.fp8_report())
                logger.event(f"ODE success of {args.checkpoint}: {success_text(result)}")
                logger.summary({"task": args.task, "checkpoint": args.checkpoint, "ode_success": result})
            else:
                train(args, env, policy, logger, ranks, state)
        except UsageError as error:  # the simulator would print a traceback
            failure = error
    logger.close()
    ranks.stop()
    if failure:
        raise failure


if __name__ == "__main__":
    try:
        main(ARGS)
    except UsageError as error:
        sys.exit(f"error: {error}")
