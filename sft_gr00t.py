"""Imitation for GR00T N1.5 in Isaac Lab: flow matching on a scripted expert's demonstrations, the warm start RL needs.

    python sft_gr00t.py                                              # laptop: a tiny GR00T from scratch
    python sft_gr00t.py --checkpoint nvidia/GR00T-N1.5-3B --embodiment-tag new_embodiment --device cuda
    python sft_gr00t.py --evaluate --checkpoint runs/<name>/checkpoints/last
    torchrun --nproc_per_node=8 sft_gr00t.py --checkpoint <folder> --fsdp

- Demonstrations come from the task's own expert on privileged state; half of them start from a random gripper pose, so
  that recoveries are seen. Only episodes that succeed are kept, and no frame after success.
- The loss is GR00T's: |v(x_t, t) - (action - noise)|^2 at t = (0.999 - Beta(1.5, 1)) / 0.999, masked to real dimensions
  (arXiv 2503.14734, section 2.1).
- State and action statistics of the demonstrations go into experiment_cfg/metadata.json, in NVIDIA's layout.
- An exponential moving average of the weights is what is evaluated and saved.
- With torchrun every rank has its own environments, demonstrations and share of a batch; gradients are averaged.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

HERE = Path(__file__).resolve().parent


# ======== Args ========================================================================================================
@dataclass
class Args:
    """Flags; defaults make the shipped tiny checkpoint's kind of network on a laptop."""

    # general
    task: str = "Tabletop-Lift-Cube-v0"  # Isaac Lab task with an expert, one of TASKS
    instruction: str | None = None  # overrides the task's own instruction(s)
    checkpoint: str | None = None  # what to start from (folder or hub id); left out: a tiny network from scratch
    embodiment_tag: str = "new_embodiment"  # entry of metadata.json to write
    seed: int = 1  # seed of demonstrations, initial weights and training
    device: str = "auto"  # cpu, cuda, cuda:N, or auto
    physics: str | None = None  # Isaac Lab physics preset of the task
    renderer: str | None = None  # Isaac Lab renderer preset of the task
    num_envs: int = 128  # parallel environments over all ranks
    evaluate: bool = False  # evaluate --checkpoint, and nothing else
    eval_every: int = 0  # training steps between ODE evaluations; 0: only at the end
    eval_episodes: int = 256  # episodes of an evaluation (rounded up to whole batches of environments); 0: none
    eval_seed: int = 7_000_000  # seed of the evaluation's episode starts
    track: bool = True  # log to Weights & Biases (offline when nobody is logged in)
    wandb_project: str = "gr00t-rl"  # Weights & Biases project
    exp_name: str | None = None  # the run's folder is runs/<exp-name>

    # demonstrations
    demos: int = 5120  # expert episodes (rounded up to whole batches of environments)
    frames_per_demo: int = 8  # observations kept per episode: the first one and some at random

    # algorithm
    steps: int = 1000  # optimizer steps
    batch_size: int = 128  # samples per step over all ranks
    learning_rate: float = 1e-3  # AdamW's learning rate; 100 steps of warm-up, then a cosine to 2%
    weight_decay: float = 1e-4  # on matrices only
    ema: float = 0.99  # decay of the weights' moving average
    max_grad_norm: float = 1.0  # global gradient norm
    tune: Literal["all", "head"] = "all"  # what is trained
    augment: Literal["auto", "on", "off"] = "auto"  # random crops and colour jitter of images; auto: at full size
    denoise_steps: int = 4  # K, denoising steps of the evaluation
    micro_batch_size: int = 128  # samples per forward pass; gradients are accumulated over a batch
    backbone_bf16: bool = False  # run the backbone under bfloat16 autocast; only where it is frozen (--tune head)
    activation_checkpointing: bool = False  # recompute the blocks' activations in the backward pass: slower, smaller
    fsdp: bool = False  # with torchrun: spread weights, gradients and AdamW's state over the ranks (FSDP2), no copy on each


ARGS = tyro.cli(Args) if __name__ == "__main__" else None

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from common import (
    Noise,
    Ranks,
    RunLogger,
    UsageError,
    check_numbers,
    check_ranks,
    pick_device,
    run_name,
    success_text,
    wilson_interval,
)
from gr00t_n1d5 import (
    Augmentation,
    Gr00tConfig,
    Gr00tN1d5,
    Gr00tProcessor,
    is_full_size,
    load_tokenizer,
    pad_prompts,
    recompute,
    tiny_tokenizer,
)
from gr00t_tasks import TASKS, check_columns, check_task, end_terms, refresh_sensors, task_config


def resolve(args: Args) -> Args:
    """Refuses what cannot work, before anything expensive starts.

    Raises:
        UsageError: names the flag and the remedy.
    """
    args.device = pick_device(args.device)
    check_ranks(args, "num_envs", "batch_size")
    if args.fsdp and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise UsageError("--fsdp: one process has nobody to share with; start torchrun --nproc_per_node=2 (or more)")
    if args.fsdp and args.tune != "all":
        raise UsageError(f"--fsdp: spreads what is trained with --tune all; leave it out with --tune {args.tune}")
    check_task(args.task)
    if not TASKS[args.task].expert and not args.evaluate:
        able = ", ".join(name for name, task in TASKS.items() if task.expert)
        raise UsageError(f"--task {args.task}: has no expert to learn from; {able} has")
    if args.evaluate and not args.checkpoint:
        raise UsageError("--evaluate: name what to evaluate with --checkpoint")
    positive = "num_envs demos frames_per_demo steps batch_size learning_rate max_grad_norm denoise_steps micro_batch_size"
    check_numbers(args, positive, "seed eval_every eval_episodes eval_seed weight_decay ema")
    if args.backbone_bf16 and args.tune == "all":
        raise UsageError("--backbone-bf16: the backbone is trained, in fp32; use it with --tune head")
    if args.augment == "auto":
        args.augment = "on" if args.checkpoint and is_full_size(args.checkpoint) else "off"
    args.exp_name = run_name(args, "sft_gr00t")
    return args


# ======== env =========================================================================================================
# Copied from grpo_gr00t.py:Observation
class Observation(NamedTuple):
    """What the policy sees at a chunk boundary."""

    images: Tensor  # (N, V, H, W, 3) uint8
    state: Tensor  # (N, d) in the simulator's units
    prompt: Tensor  # (N,) int64, index of the instruction
    features: Tensor | None = None  # (N, L, D) of the backbone, where they are kept


# Copied from grpo_gr00t.py:ChunkEnv
class ChunkEnv:
    """Isaac Lab in chunks of actions, over a fixed horizon: no resets inside, success is remembered and masks the rest.

    Images are rendered at chunk boundaries only. With `group_size`, consecutive environments start from the state and
    the instruction of the first of them.
    """

    def __init__(self, args: Args, cfg):
        from isaaclab.managers import TerminationManager

        self.task, instruction = TASKS[args.task], args.instruction
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

    def reset(self, seed: int, group_size: int = 1) -> Observation:
        """Starts one episode everywhere; the starts depend on the seed and the number of environments alone."""
        env = self.env
        env.reset(seed=seed)
        if self.asked is not None and self.task.target:
            getattr(env, self.task.target).fill_(self.asked)
        if group_size > 1:
            leader = torch.arange(self.num_envs, device=self.device) // group_size * group_size  # (N,)

            def of_leader(tree):
                return {k: of_leader(v) if isinstance(v, dict) else v[leader].clone() for k, v in tree.items()}

            state = of_leader(env.scene.get_state(is_relative=True))
            target = getattr(env, self.task.target)[leader].clone() if self.task.target else None
            env.reset_to(state, None, is_relative=True)  # draws new starts, then overwrites them
            env.action_manager.reset()  # some actions begin at the joints as they were drawn
            if target is not None:
                getattr(env, self.task.target)[:] = target
        refresh_sensors(env)
        env.obs_buf = env.observation_manager.compute()
        self.terminations.reset()
        self.success.zero_()
        self.failure.zero_()
        return self.observe()

    def step_chunk(self, actions: Tensor, last: bool = False, frames: list | None = None) -> Observation | None:
        """Executes (N, chunk, d) actions; `self.success` is up to date afterwards. No image is rendered after the last.

        With `frames`, appends an image of every environment after every second step.
        """
        for i in range(actions.shape[1]):
            self.env.step(actions[:, i])
            ended = self.terminations.compute()  # (N,)
            self.success |= self.terminations.get_term("success") & ~self.failure
            self.failure |= ended & ~self.success
            if frames is not None and i % 2:
                frames.append((self.images()[:, 0], self.success.clone()))
        return None if last else self.observe()

    @property
    def ended(self) -> Tensor:
        """(N,) whether an attempt is over: with its first success, or with a failure."""
        return self.success | self.failure

    def images(self) -> Tensor:
        """(N, V, H, W, 3) uint8; renders if the scene has moved since the last call."""
        sensors = self.env.scene.sensors
        views = [sensors[name].data.output["rgb"].torch[..., :3] for name in self.task.cameras]
        return torch.stack(views, 1) if views else torch.empty(self.num_envs, 0, 1, 1, 3, dtype=torch.uint8, device=self.device)

    def observe(self) -> Observation:
        own = self.task.target is not None and len(self.instructions) > 1
        prompt = getattr(self.env, self.task.target).clone() if own else torch.zeros_like(self.success, dtype=torch.long)
        return Observation(self.images(), self.env.obs_buf["policy"].clone(), prompt)


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
class PolicyOutput(NamedTuple):
    """What one policy call returns."""

    action: Tensor  # (N, chunk, d) in the simulator's units


class Gr00tPolicy(nn.Module):
    """GR00T N1.5 with its processor; acts by the ODE."""

    def __init__(self, args: Args, net: Gr00tN1d5, processor: Gr00tProcessor, instructions: tuple[str, ...]):
        super().__init__()
        self.net, self.processor = net.to(args.device), processor.to(args.device)
        self.chunk, self.steps, self.micro_batch_size = net.config.action_horizon, args.denoise_steps, args.micro_batch_size
        self.bf16, head, backbone = args.backbone_bf16, net.action_head, net.backbone
        if args.activation_checkpointing:
            own = [*backbone.language_model.layers, *backbone.vision_model.encoder.layers] if args.tune == "all" else []
            for block in [*head.model.transformer_blocks, *head.vl_self_attention.transformer_blocks, *own]:
                recompute(block)
        try:
            prompts = [processor.prompt(text, len(TASKS[args.task].cameras)) for text in instructions]
            prompts, lengths = pad_prompts(prompts)  # (P, L), (P,)
        except ValueError as error:
            raise UsageError(f"--instruction: {error}") from error
        self.register_buffer("prompts", prompts.to(args.device), persistent=False)
        self.register_buffer("lengths", lengths.to(args.device), persistent=False)
        self.mixed = len(set(lengths.tolist())) > 1

    def embodiment(self, n: int) -> Tensor:
        return torch.full((n,), self.processor.embodiment_id, dtype=torch.long, device=self.prompts.device)

    def context(self, images: Tensor, state: Tensor, prompt: Tensor, augmentation: Augmentation | None = None):
        """What the denoising steps need of raw observations: images (B, V, H, W, 3), state (B, d), prompt (B,)."""
        with torch.autocast(self.prompts.device.type, torch.bfloat16, self.bf16):
            features = self.net.backbone(self.prompts[prompt], self.processor.images(images, augmentation))
        state = self.processor.normalize_state(state)
        return self.net.action_head.encode(
            features, state, self.embodiment(len(state)), self.lengths[prompt] if self.mixed else None
        )

    @torch.no_grad()
    def act(self, obs: Observation, noise: Noise | None = None, explore: bool = False) -> PolicyOutput:
        """Actions by the ODE; an imitated policy does not explore."""
        config, actions, noise = self.net.config, [], noise or Noise(self.prompts.device, Ranks(0, 1), 0)
        start = noise.normal(len(obs.state), config.action_horizon, config.action_dim)  # (N, H, A)
        for i in range(0, len(start), self.micro_batch_size):
            rows = slice(i, i + self.micro_batch_size)
            context = self.context(obs.images[rows], obs.state[rows], obs.prompt[rows])
            x = self.net.action_head.sample(context, self.embodiment(len(start[rows])), start[rows], self.steps)
            actions.append(self.processor.unnormalize_action(x))
        return PolicyOutput(torch.cat(actions))

    def save(self, folder: Path, ranks: Ranks) -> None:
        """Rank 0 writes the checkpoint in NVIDIA's layout: weights, config.json, metadata.json, tokenizer."""
        net = self.net
        if isinstance(net.backbone, FSDPModule):  # whole on rank 0's host; every rank has to send its part
            state = get_model_state_dict(net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            if ranks.rank == 0:
                with torch.device("meta"):
                    net = Gr00tN1d5(net.config)
                net.load_state_dict(state, assign=True)
        if ranks.rank == 0:
            net.save_pretrained(folder)
            self.processor.save_pretrained(folder)


def shard(net: Gr00tN1d5, device: str, ranks: Ranks) -> None:
    """Spreads the parameters over the ranks (FSDP2); a block is gathered while it runs, and freed afterwards."""
    head, backbone = net.action_head, net.backbone
    cross = [block.attn1 for block in head.model.transformer_blocks[::2]]  # `encode` asks them for keys and values
    blocks = [*head.model.transformer_blocks, *head.vl_self_attention.transformer_blocks]
    blocks += [*backbone.language_model.layers, *backbone.vision_model.encoder.layers]
    mesh = init_device_mesh(device.partition(":")[0], (ranks.world,))
    for module in (*cross, *blocks, head, backbone):
        # also the outermost ones: what stays gathered would miss a change of the shards (the moving average)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in cross:
        register_fsdp_forward_method(module, "key_value")
    for name in ("encode", "sample", "flow_matching_loss"):
        register_fsdp_forward_method(head, name)


def make_policy(args: Args, instructions: tuple[str, ...]) -> Gr00tPolicy:
    """The network to train or to evaluate, and its processor; `train` puts the demonstrations' statistics in."""
    task = TASKS[args.task]
    try:
        if args.checkpoint:
            net = Gr00tN1d5.from_pretrained(args.checkpoint, dtype=None if args.evaluate else torch.float32)
        else:
            torch.manual_seed(args.seed)
            net = Gr00tN1d5(Gr00tConfig.tiny()).eval()
        if args.evaluate:
            tag = args.embodiment_tag if args.embodiment_tag != "new_embodiment" else None
            processor = Gr00tProcessor.from_pretrained(args.checkpoint, net.config, tag)
        else:
            words = sorted({word for text in instructions for word in text.split()})
            tokenizer = load_tokenizer(args.checkpoint) if args.checkpoint else tiny_tokenizer(words, net.config)
            blank = (torch.zeros(1, sum(sizes.values())) for sizes in (task.state, task.action))
            processor = make_processor(args, net.config, *blank, {}, tokenizer)
        processor.embodiment_id  # noqa: B018  (raises for an unknown tag)
    except (OSError, ValueError) as error:
        raise UsageError(f"--checkpoint {args.checkpoint}: {error}") from error
    for kind, sizes in (("state", task.state), ("action", task.action)):
        found = len(processor.normalizers[kind])
        if found != sum(sizes.values()):
            raise UsageError(
                f"--checkpoint {args.checkpoint}: it has {found} {kind} dimensions, {args.task} has {sum(sizes.values())}"
            )
    return Gr00tPolicy(args, net, processor, instructions)


def make_processor(args: Args, config: Gr00tConfig, state: Tensor, action: Tensor, video: dict, tokenizer) -> Gr00tProcessor:
    """A processor with the statistics of states (S, d) and actions (S, d)."""

    def by_key(x: Tensor, sizes: dict[str, int]) -> dict[str, Tensor]:
        return dict(zip(sizes, x.split(list(sizes.values()), dim=1)))

    task = TASKS[args.task]
    state, action = by_key(state, task.state), by_key(action, task.action)
    return Gr00tProcessor.from_statistics(config, args.embodiment_tag, state, action, video, tokenizer)


# ======== rollout =====================================================================================================
# Copied from grpo_gr00t.py:episode_seed
def episode_seed(seed: int, iteration: int, ranks: Ranks) -> int:
    """Seed of an iteration's starts; differs by rank."""
    return int(np.random.SeedSequence((seed, iteration, ranks.rank)).generate_state(1)[0] >> 1)


class Demonstrations(NamedTuple):
    """Observations of successful expert episodes, each with the actions that followed."""

    images: Tensor  # (S, V, H, W, 3) uint8
    state: Tensor  # (S, d)
    prompt: Tensor  # (S,)
    action: Tensor  # (S, horizon, d)


def collect(args: Args, env: ChunkEnv, action_horizon: int, logger: RunLogger, ranks: Ranks) -> Demonstrations:
    """Runs the task's expert and keeps `frames_per_demo` observations of every successful episode of this rank."""
    expert = getattr(importlib.import_module(env.task.module), env.task.expert)
    events, usual = env.env.event_manager, {}
    for name, params in env.task.demo_params.items():
        usual[name] = dict(events.get_term_cfg(name).params)
        events.get_term_cfg(name).params.update(params)
    rng, parts, successes = np.random.default_rng(args.seed), [], 0
    batches = math.ceil(args.demos / args.num_envs)
    for b in range(batches):
        obs = env.reset(episode_seed(args.seed, b, ranks))
        # an expert is done by half time; a chunk of actions must follow every kept observation
        latest = min(env.task.horizon // 2, env.task.horizon - action_horizon)
        times = {0, *rng.choice(np.arange(1, latest + 1), min(args.frames_per_demo - 1, latest), replace=False).tolist()}
        kept, actions = [], []
        for t in range(env.task.horizon):
            if t in times:
                kept.append((t, env.observe() if t else obs, ~env.success))
            actions.append(expert(env.env))
            env.step_chunk(actions[-1][:, None], last=True)
        actions = torch.stack(actions, 1)  # (N, horizon, d)
        for t, seen, before in kept:
            rows = before & env.success
            sample = (seen.images, seen.state, seen.prompt, actions[:, t : t + action_horizon])
            parts.append(Demonstrations(*(x[rows] for x in sample)))
        successes += int(env.success.sum())
        if b % 10 == 9 or b + 1 == batches:
            count, all_successes = (b + 1) * args.num_envs, sum(ranks.gather(successes))
            logger.event(f"demonstrations: {count}, expert success {all_successes / count:.3f}")
    for name, params in usual.items():
        events.get_term_cfg(name).params.update(params)
    return Demonstrations(*(torch.cat(x) for x in zip(*parts)))


# ======== loss ========================================================================================================
def flow_matching_loss(
    policy: Gr00tPolicy,
    demos: Demonstrations,
    rows: Tensor,
    noise: Tensor,
    t: Tensor,
    augmentation: Augmentation | None = None,
) -> Tensor:
    """GR00T's imitation loss, a scalar, on some demonstrations: row indices (B,), noise (B, H, A), times (B,)."""
    device = policy.prompts.device
    images, state, prompt, action = (x[rows].to(device) for x in demos)
    context = policy.context(images, state, prompt, augmentation)  # without gradients in the backbone where it is frozen
    target = policy.processor.normalize_action(action)  # (B, H, A)
    mask = torch.zeros_like(target)
    mask[..., : policy.processor.valid_action_dims] = 1.0
    row = policy.embodiment(len(rows))
    return policy.net.action_head.flow_matching_loss(context, row, target, mask, noise.to(device), t.to(device))


def backward(
    policy: Gr00tPolicy,
    demos: Demonstrations,
    rows: Tensor,
    noise: Tensor,
    t: Tensor,
    augmentation: Augmentation | None = None,
) -> Tensor:
    """Adds a batch's gradients up, one micro-batch at a time; the loss without its graph."""
    total = torch.zeros((), device=policy.prompts.device)
    for micro in torch.arange(len(rows)).split(policy.micro_batch_size):
        own = rows[micro].to(demos.state.device)
        part = augmentation and Augmentation(*(x[micro] for x in augmentation))
        loss = flow_matching_loss(policy, demos, own, noise[micro], t[micro], part) * (len(micro) / len(rows))
        loss.backward()
        total += loss.detach()
    return total


# ======== train =======================================================================================================
def train(args: Args, env: ChunkEnv, policy: Gr00tPolicy, logger: RunLogger, ranks: Ranks, instructions: tuple) -> None:
    """Collects, trains, evaluates and saves."""
    start = time.time()
    demos = collect(args, env, policy.net.config.action_horizon, logger, ranks)
    size = env.images().shape[2]
    video = {name: {"resolution": [size, size], "channels": 3, "fps": 25} for name in env.task.cameras}
    every = ranks.gather((demos.state.cpu(), demos.action.flatten(0, 1).cpu()))  # statistics are those of all ranks
    (state, action), tokenizer = (torch.cat(x) for x in zip(*every)), policy.processor.tokenizer
    policy.processor = make_processor(args, policy.net.config, state, action, video, tokenizer).to(args.device)
    policy.net.backbone.requires_grad_(args.tune == "all")
    average = copy.deepcopy(policy).requires_grad_(False)
    if args.fsdp:
        shard(policy.net, args.device, ranks)
        shard(average.net, args.device, ranks)
    parameters = [p for p in policy.net.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.99))
    smooth = [p for p, q in zip(average.net.parameters(), policy.net.parameters()) if q.requires_grad]
    generator = torch.Generator().manual_seed(args.seed + 1_000_003 * ranks.rank)  # a rank draws of its own samples
    logger.event(f"{len(state)} samples, {sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters")
    running, result, began = None, None, time.time()
    for step in range(args.steps):
        warmup, progress = min(1.0, (step + 1) / 100), step / args.steps
        rate = args.learning_rate * warmup * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = torch.randint(len(demos.state), (args.batch_size // ranks.world,), generator=generator)
        noise = torch.randn(len(rows), policy.chunk, policy.net.config.action_dim, generator=generator)
        t = policy.net.action_head.sample_time(len(rows), generator)
        augmentation = Augmentation.draw(len(rows), generator) if args.augment == "on" else None
        optimizer.zero_grad()
        loss = backward(policy, demos, rows, noise, t, augmentation)
        if ranks.world > 1 and not args.fsdp:  # which averages by itself
            ranks.sum_gradients(parameters)
            torch._foreach_div_([p.grad for p in parameters], ranks.world)
        torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(smooth, [p.detach() for p in parameters], 1 - decay)
        running = loss if running is None else torch.lerp(running, loss, 0.02)
        last = step + 1 == args.steps
        evaluated = last or (args.eval_every and (step + 1) % args.eval_every == 0)
        if evaluated or (step + 1) % 50 == 0:
            value = ranks.reduce(running.clone()).item() / ranks.world
            if not math.isfinite(value):
                raise UsageError(f"the loss became nan or inf at step {step}: lower --learning-rate")
            metrics = {"update/loss": value, "update/learning_rate": rate, "time/elapsed": time.time() - start}
            if evaluated:
                result = evaluate(args, env, average, ranks)
                if result:
                    metrics |= {"eval/ode_success": result["mean"], "eval/episodes": result["episodes"]}
                logger.event(f"step {step + 1}: ODE success {success_text(result)}")
                average.save(logger.run_dir / "checkpoints" / ("last" if last else f"step_{step + 1:06d}"), ranks)
            logger.log(step, metrics)
    logger.curve_png()
    logger.summary(
        {
            "algorithm": "sft",
            **{name: getattr(args, name) for name in ("task", "seed", "steps", "device", "demos")},
            "samples": len(state),
            "world_size": ranks.world,
            "seconds": time.time() - start,
            "seconds_training": time.time() - began,
            "instructions": instructions,
            "loss": value,
            "ode_success": result,
        }
    )


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


# ======== main ========================================================================================================
def main(args: Args) -> None:
    args = resolve(args)
    ranks, task = Ranks.start(args.device), TASKS[args.task]
    args.exp_name = ranks.broadcast(args.exp_name)
    run_dir = Path("runs") / args.exp_name
    instructions = (args.instruction,) if args.instruction else task.instructions
    policy = make_policy(args, instructions)
    try:
        logger = RunLogger(
            run_dir, dataclasses.asdict(args), script=__file__, total_iterations=args.steps,
            track=args.track, wandb_project=args.wandb_project,
            is_main=ranks.rank == 0,
            device=args.device,
            sources=[HERE / f"{name}.py" for name in ("gr00t_n1d5", "gr00t_tasks", task.module or "stock_tasks")],
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"--exp-name {args.exp_name}: {error}") from error
    logger.listen("gr00t_tasks", task.module or "stock_tasks")
    logger.event(f"{run_dir}: {args.task} on {args.device}, {args.num_envs} envs")
    logger.event(f"instructions: {'; '.join(instructions)}")
    logger.event(f"starting the simulator (its own output: {run_dir}/simulator.log)")
    failure = None
    with make_env(args, policy.processor.camera_size, run_dir, ranks) as env:
        try:
            if args.evaluate:
                result = evaluate(args, env, policy, ranks)
                logger.event(f"ODE success of {args.checkpoint}: {success_text(result)}")
                logger.summary({"task": args.task, "checkpoint": args.checkpoint, "ode_success": result})
            else:
                train(args, env, policy, logger, ranks, instructions)
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
