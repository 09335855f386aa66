"""GRPO fine-tunes GR00T N1.5 in Isaac Lab: no critic, groups of episodes that start from one identical state.

    python grpo_gr00t.py                                             # laptop: the shipped tiny GR00T, no GPU needed
    python grpo_gr00t.py --checkpoint <folder or hub id> --num-envs 4096 --group-size 16
    python grpo_gr00t.py --evaluate --checkpoint runs/<name>/checkpoints/best          # --record <folder>: a LeRobot data set
    torchrun --nproc_per_node=8 grpo_gr00t.py --checkpoint <folder>

How this differs from GRPO for language models (DeepSeekMath, arXiv 2402.03300):
- A flow-matching head has no density of its own. One denoising step of each sample, drawn at random, is made stochastic
  with the ODE's marginals kept (Flow-GRPO, arXiv 2505.05470); the log-probability is that of this Gaussian step.
- An action is a chunk: log-probabilities are summed over the executed steps and the embodiment's real dimensions.
- The group's mean is subtracted, its std is not divided by (Dr. GRPO, arXiv 2503.20783); groups in which all succeed or
  all fail carry no gradient and are left out.
- Only the first success counts: what an episode does afterwards is masked, and every episode weighs the same however
  many chunks it has.
- The KL to the base model is between Gaussians of equal std, hence exact: |mean - base mean|^2 / (2 std^2).
- The backbone is frozen, so its features are kept from the rollout and never computed again in the update.

One iteration: `rollout` -> `advantages` -> `update` (`grpo_loss` per micro-batch) -> `Run.log`.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import contextlib
import copy
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from common import Metrics, Noise, Ranks, Run, StageTimer, StartBank, group_advantages, success_rates
from common import check_not_negative, check_positive, pick_device, run_name, saved_args
from gr00t_n1d5.dataset import LeRobotWriter, check_record
from gr00t_n1d5.embodiment import check_checkpoint
from gr00t_n1d5.files import is_full_size
from tasks.gr00t import (
    TASKS,
    Prompts,
    all_instructions,
    asking,
    check_instructions,
    find_tasks,
    make_task,
    rank_task,
    refresh_observations,
    scene_states,
    start_from,
    task_config,
    task_names,
)
from tasks.randomize import Randomization, parse_axes

HERE = Path(__file__).resolve().parent


# ======== Args ========================================================================================================
@dataclass
class Args:
    # general
    task: str | tuple[str, ...] = "Tabletop-Lift-Cube-v0"  # a row of TASKS in tasks/gr00t.py; or several, for ranks in turn
    instruction: str | tuple[str, ...] | None = None  # in place of the task's own: any sentence, or several of its own
    checkpoint: str = str(HERE / "checkpoints" / "tiny")  # GR00T N1.5: a local folder or a hub id
    embodiment_tag: str | None = None  # entry of the checkpoint's metadata.json; may be left out where one fits
    data_config: str | None = None  # which of its keys the network gets, and how: a row of DATA_CONFIGS, or a JSON file
    seed: int = 1  # of the episode starts, the sampler's noise and the minibatches
    device: str = "auto"  # cpu, cuda, cuda:N, or auto
    physics: str | None = None  # Isaac Lab physics preset (newton_mjwarp, ...), or mujoco_c: a CPU's default
    renderer: str | None = None  # Isaac Lab renderer preset (newton_renderer, isaacsim_rtx, ...)
    randomize: tuple[str, ...] = ()  # what differs between episodes: camera:0.5, or all:0.5 (axes in tasks/randomize.py)
    num_envs: int = 128  # parallel environments over all ranks
    iterations: int = 240  # rollout-and-update iterations
    evaluate: bool = False  # evaluate --checkpoint, and nothing else
    check: bool = False  # look before a long run: is the task sound, does the policy see it, what will it take; no training
    record: str | None = None  # folder that the episodes of --evaluate go to, of any script's checkpoint, as a LeRobot data set
    eval_every: int = 50  # iterations between evaluations by the ODE; 0: only before and after
    eval_episodes: int = 256  # episodes of an evaluation (rounded up to whole batches of environments); 0: none, no film
    eval_seed: int = 7_000_000  # of an evaluation's episode starts, the same for every evaluation
    save_every: int = 50  # iterations between checkpoints
    resume: str | None = None  # runs/<name>: goes on from its latest checkpoint, with its arguments where none are given
    exp_name: str | None = None  # the run's folder is runs/<exp-name>; made from script, task, seed and time by default

    # algorithm
    group_size: int = 16  # episodes that start from one identical state and instruction
    curriculum: Literal["uniform", "learnability"] = "uniform"  # how starts are drawn; by p(1-p) of what became of them
    bank_share: float = 0.0  # of the groups that begin from earlier starts then; 0: instructions alone are chosen so
    midway: bool = False  # those may be states in mid-episode, at a chunk's boundary
    chunk: int | None = None  # actions executed per policy call (the model's action horizon by default)
    denoise_steps: int = 4  # K, denoising steps per policy call
    noise_level: float = 0.8  # a, exploration noise of the stochastic step
    learning_rate: float = 1e-4  # AdamW's
    lr_warmup: int = 10  # iterations of linear warm-up: AdamW's first steps are otherwise too large to survive
    lr_hold: float = 0.5  # share of the run at full learning rate; afterwards it falls linearly to a tenth
    clip: float = 0.2  # clip range of the ratio of summed log-probabilities
    epochs: int = 2  # passes over a rollout
    minibatches: int = 2  # optimizer steps per epoch
    kl_coef: float = 0.0  # weight of the KL to the base model (which is logged at 0, too)
    normalize_std: bool = False  # divide group advantages by the group's std: GRPO as published

    # memory and speed
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"  # bf16: backbone and encoder, TF32 in the steps; fp8: the backbone
    micro_batch_size: int = 1024  # samples per forward pass, at most; gradients are accumulated over a minibatch
    feature_cache: Literal["gpu", "cpu", "off"] = "gpu"  # where backbone features wait for the update; off: recomputed
    max_memory_gb: float | None = None  # budget [GB]: micro-batches and the place of features are planned to fit it
    activation_checkpointing: bool = False  # recompute the blocks' activations in the backward pass: slower, smaller
    compile: bool = False  # torch.compile the transformer blocks; on a GPU, the sampler as CUDA graphs


# a full-size checkpoint's settings: conservative, from the literature
FULL = Args(
    num_envs=64, iterations=500, noise_level=0.5, learning_rate=1e-5, clip=0.1, minibatches=4, kl_coef=0.01, precision="bf16",
    micro_batch_size=128,
)  # fmt: skip
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3, "bf16": 0.1, "fp8": 0.1}  # on |ratio - 1| before the first update: see `check_ratio`


def parse() -> Args:
    """The command line, over the settings of the run to resume or of a checkpoint's size."""
    args = tyro.cli(Args)
    default = saved_args(args.resume, Args) if args.resume else FULL if is_full_size(args.checkpoint) else Args()
    return check(tyro.cli(Args, default=default))


def check(args: Args) -> Args:
    """Refuses what cannot work, before anything is loaded; names the run."""
    args.task = find_tasks(args.task, int(os.environ.get("WORLD_SIZE", 1)))
    check_instructions(args.task, args.instruction)
    if args.check and (args.evaluate or args.resume):
        raise SystemExit("--check: looks at a run before it begins; leave out --evaluate and --resume")
    check_positive(
        num_envs=args.num_envs, iterations=args.iterations, save_every=args.save_every, chunk=args.chunk,
        denoise_steps=args.denoise_steps, noise_level=args.noise_level, learning_rate=args.learning_rate,
        clip=args.clip, epochs=args.epochs, minibatches=args.minibatches, micro_batch_size=args.micro_batch_size,
        max_memory_gb=args.max_memory_gb,
    )  # fmt: skip
    check_not_negative(
        seed=args.seed, eval_seed=args.eval_seed, eval_every=args.eval_every, eval_episodes=args.eval_episodes,
        lr_warmup=args.lr_warmup, lr_hold=args.lr_hold, kl_coef=args.kl_coef, bank_share=args.bank_share,
    )  # fmt: skip
    if args.record and not (args.evaluate and args.eval_episodes):
        raise SystemExit(f"--record {args.record}: writes the episodes of an evaluation; add --evaluate, and --eval-episodes")
    if args.record:
        check_record(args.record)
    if args.bank_share > 1:
        raise SystemExit(f"--bank-share {args.bank_share}: must be from 0 to 1")
    if args.midway and (args.curriculum == "uniform" or not args.bank_share):
        raise SystemExit("--midway: states in mid-episode come from the bank; add --curriculum learnability --bank-share 0.5")
    if args.group_size < 2:
        raise SystemExit(f"--group-size {args.group_size}: a group needs at least 2 members to compare")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.num_envs % (args.group_size * world):
        of = f"--group-size {args.group_size}" + (f" times {world} ranks" if world > 1 else "")
        raise SystemExit(f"--num-envs {args.num_envs}: must be a multiple of {of}")
    if 0 < args.bank_share * args.num_envs < args.group_size * world:
        raise SystemExit(f"--bank-share {args.bank_share}: is less than one group; give more, or more --num-envs")
    for task in task_names(args.task):
        parse_axes(args.randomize, TASKS[task])
        check_checkpoint(args.checkpoint, args.embodiment_tag, args.data_config, task, TASKS)
    stem = "eval" if args.evaluate else "check" if args.check else Path(__file__).stem
    args.exp_name = run_name(args.exp_name, stem, "+".join(task_names(args.task)), args.seed, resume=args.resume)
    return args


ARGS = parse() if __name__ == "__main__" else None  # heavy imports come after, so --help and refusals are instant

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from gr00t_n1d5.policy import Gr00tPolicy, plan_memory, sample_buffer, take
from tasks.check import check_first_ratio, check_groups, check_policy, check_success, check_task, costs, report
from tasks.stock import start_simulator


# ======== env =========================================================================================================
class ChunkEnv:
    """Isaac Lab in chunks of actions, over a fixed horizon: no resets inside, success is remembered and masks the rest.

    Images are rendered at chunk boundaries only. With `group_size`, consecutive environments start from the state and
    the instruction of the first of them.
    """

    def __init__(self, args: Args, cfg):
        self.task = TASKS[rank_task(args.task)]
        self.env, self.terminations = make_task(rank_task(args.task), cfg)
        self.prompts = Prompts(self.env, self.task, args.instruction)
        self.asked = all_instructions(args.task, args.instruction)
        self.varied = Randomization(self.env, self.task, parse_axes(args.randomize, self.task))
        self.num_envs, self.device = self.env.num_envs, self.env.device

    def reset(self, seed: int, group_size: int = 1, bank: StartBank | None = None) -> TensorDict:
        """Starts one episode everywhere; the starts depend on the seed, the number of environments and the bank alone."""
        self.env.reset(seed=seed)
        self.prompts.fix()
        self.varied.draw(seed, group_size)
        if group_size > 1 or bank:
            states = self.states()[::group_size]  # (groups,)
            states = bank.draw(states, seed) if bank else states
            start_from(self.env, self.task, states.repeat_interleave(group_size, 0))
        refresh_observations(self.env)
        self.terminations.reset()
        self.success = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)  # (N,)
        self.failure = torch.zeros_like(self.success)  # (N,) of episodes without success before
        return self.observe()

    def step_chunk(self, actions: Tensor, last: bool = False) -> TensorDict | None:
        """Executes (N, chunk, d) actions; `self.success` is up to date afterwards. No image is rendered after the last."""
        for action in self.varied.delay(actions).unbind(1):
            self.env.step(action)
            ended = self.terminations.compute()  # (N,)
            self.success = self.success | (self.terminations.get_term("success") & ~self.failure)
            self.failure = self.failure | (ended & ~self.success)
        return None if last else self.observe()

    @property
    def ended(self) -> Tensor:
        """(N,) whether an attempt is over: with its first success, or with a failure."""
        return self.success | self.failure

    def states(self) -> TensorDict:
        """(N,) where everything is and what is asked for, to start from; `prompt` numbers the instructions of all ranks."""
        return scene_states(self.env, self.task).set("prompt", self.asked.number(self.prompts.index())[0])

    def observe(self) -> TensorDict:
        """images (N, V, H, W, 3) uint8, state (N, d) in the simulator's units, prompt (N,) index of the instruction."""
        state, prompt = self.env.obs_buf["policy"].clone(), self.prompts.index()
        obs = {"images": self.task.images(self.env), "state": state, "prompt": prompt}
        return self.varied.spoil(TensorDict(obs, self.num_envs))


class RecordedEnv:
    """A ChunkEnv whose episodes are written up to their ends, every step of them rendered."""

    def __init__(self, args: Args, env: ChunkEnv, writer: LeRobotWriter):
        self.env, self.writer, self.texts = env, writer, env.task.texts(args.instruction)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def reset(self, seed: int) -> TensorDict:
        self.obs = self.env.reset(seed)
        self.writer.begin(seed, [self.texts[i] for i in self.obs["prompt"].tolist()])
        return self.obs

    def step_chunk(self, actions: Tensor, last: bool = False) -> TensorDict:
        for action in self.env.varied.overtake(actions).unbind(1):
            running, obs = ~self.env.ended, self.obs
            self.obs = self.env.step_chunk(action[:, None])
            self.writer.step(obs["images"], obs["state"], action, running, self.env.success)
        return self.obs


@contextlib.contextmanager
def make_env(args: Args, image_size: int, run_dir: Path, ranks: Ranks):
    """Starts the simulator and yields a ChunkEnv; what the simulator prints goes to a file."""
    task, num_envs = rank_task(args.task), args.num_envs // ranks.world
    axes = parse_axes(args.randomize, TASKS[task])
    cfg = task_config(task, args.device, num_envs, image_size, args.physics, args.renderer, axes=axes)
    log = run_dir / f"simulator{ranks.rank or ''}.log"
    with start_simulator(cfg, args.device, cameras=bool(TASKS[task].cameras), log=log) as ready:
        env = ChunkEnv(args, cfg)
        env.reset(seed=0)
        ready()
        yield env
        env.env.close()


# ======== GR00T wrapper ===============================================================================================
def stochastic_step(x: Tensor, v: Tensor, k: Tensor, steps: int, level: float) -> tuple[Tensor, Tensor]:
    """Mean (B, H, A) and std (B, 1, 1) of denoising step k (B,) of `steps`; t = 0 is noise, t = 1 the action.

    Flow-SDE: Flow-GRPO, arXiv 2505.05470, eq. 9 in GR00T's time. x, v: (B, H, A) chain state and velocity; level: a.
    """
    dt = 1.0 / steps
    t = (k.float() * dt)[:, None, None]  # (B, 1, 1)
    next_t = t + dt
    x0, x1 = x - t * v, x + (1 - t) * v  # estimates of the noise and of the action
    sigma = level * ((1 - t) / t.clamp(min=dt)).sqrt()
    mean = (1 - next_t - sigma**2 * dt / (2 * (1 - t))) * x0 + next_t * x1
    return mean, sigma * math.sqrt(dt)


def gaussian_log_prob(y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of y under N(mean, std^2), summed over the last two dimensions: (B, H, A) -> (B,)."""
    z = (y - mean) / std
    return (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).sum((-2, -1))


class Gr00tActor(Gr00tPolicy):
    """GR00T N1.5 as a stochastic policy: frozen backbone, trained action head, frozen copy of the head as the base."""

    def __init__(self, args: Args):
        task = TASKS[rank_task(args.task)]
        super().__init__(
            args.checkpoint, args.embodiment_tag, args.data_config, task, task.texts(args.instruction), args.device,
            args.precision, rows=[TASKS[name] for name in task_names(args.task)],
        )  # fmt: skip
        self.base_head = copy.deepcopy(self.net.action_head).requires_grad_(False)
        self.chunk = args.chunk or self.action_shape[0]
        if self.chunk > self.action_shape[0] or task.horizon % self.chunk:
            most = f"the episode's {task.horizon} steps and not exceed the model's {self.action_shape[0]}"
            raise SystemExit(f"--chunk {self.chunk}: must divide {most}")
        self.steps, self.level, self.micro_batch_size = args.denoise_steps, args.noise_level, args.micro_batch_size
        self.accelerate(args.compile, args.activation_checkpointing)
        if args.compile and self.device.type == "cuda":
            self.denoise = torch.compile(self.denoise, mode="reduce-overhead")

    @torch.no_grad()
    def act(self, obs: TensorDict, noise: Noise, explore: bool = False, features: Tensor | None = None) -> TensorDict:
        """Actions by the ODE, or with one stochastic step per sample, which is kept with its log-probability.

        `features` (N, L, D) is where those of the backbone go, if anywhere: they are too large to be held twice.

        Returns:
            action (N, chunk, d) in the simulator's units; with `explore` x, y (N, H, A) before and after the stochastic
            step, k (N,) its index, log_prob (N,).
        """
        drawn = {"start": noise.normal(len(obs), *self.action_shape)}  # (N, H, A)
        if explore:
            drawn |= {"k": noise.integers(len(obs), self.steps), "eps": noise.normal(len(obs), *self.action_shape)}
        found = []
        for i, part in enumerate(TensorDict({**obs, **drawn}, len(obs)).split(self.micro_batch_size)):
            out = self.denoise(part)
            if features is not None:  # which may lie on the host
                features[i * self.micro_batch_size :][: len(part)].copy_(out["features"], non_blocking=True)
            found.append(out.exclude("features").clone())  # the next call of a CUDA graph overwrites its outputs
        return torch.cat(found)

    def denoise(self, obs: TensorDict) -> TensorDict:
        """K denoising steps from obs["start"]; step obs["k"], where there is one, is stochastic, with noise obs["eps"]."""
        features = self.features(obs)
        context, x, explore = self.encode(TensorDict({**obs, "features": features}, len(obs))), obs["start"], "k" in obs.keys()
        before, after, mean, std = x, x, torch.zeros_like(x), torch.ones_like(x[:, :1, :1])
        for step in range(self.steps):
            k = torch.full((len(obs),), step, device=x.device)
            v = self.velocity(x, k, self.steps, context)
            y = x + v / self.steps
            if explore:
                chosen, (m, s) = (obs["k"] == k)[:, None, None], stochastic_step(x, v, k, self.steps, self.level)
                y = torch.where(chosen, m + s * obs["eps"], y)
                before, after = torch.where(chosen, x, before), torch.where(chosen, y, after)
                mean, std = torch.where(chosen, m, mean), torch.where(chosen, s, std)
            x = y
        out = {"action": self.unnormalize(x)[:, : self.chunk], "features": features}
        if explore:
            out |= {"x": before, "y": after, "k": obs["k"], "log_prob": self.log_prob(after, mean, std)}
        return TensorDict(out, len(obs))

    def executed(self, x: Tensor) -> Tensor:
        """What of a chunk reaches the simulator: (B, H, A) -> (B, chunk, valid)."""
        return x[:, : self.chunk, : self.valid]

    def log_prob(self, y: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return gaussian_log_prob(self.executed(y), self.executed(mean), std)

    def evaluate(self, batch: TensorDict, head=None) -> tuple[Tensor, Tensor, Tensor]:
        """Kept steps under the present weights (or another head's): log-probability (B,), mean (B, chunk, valid), std."""
        v = self.velocity(batch["x"], batch["k"], self.steps, self.encode(batch, head), head)
        mean, std = stochastic_step(batch["x"], v, batch["k"], self.steps, self.level)
        return self.log_prob(batch["y"], mean, std), self.executed(mean), std

    @torch.no_grad()
    def base_mean(self, batch: TensorDict) -> Tensor:
        """The base model's mean (B, chunk, valid) of kept steps."""
        return self.evaluate(batch, self.base_head)[1]


# ======== rollout =====================================================================================================
@torch.no_grad()
def rollout(
    env: ChunkEnv,
    policy: Gr00tActor,
    args: Args,
    iteration: int,
    ranks: Ranks,
    timer: StageTimer,
    bank: StartBank | None = None,
) -> TensorDict:
    """One episode per environment, in groups from one start: (T, N) samples, T chunks per episode."""
    noise, T = Noise(args.device, ranks, args.seed, iteration), env.task.horizon // policy.chunk
    seed = episode_seed(args.seed, iteration, ranks)
    with timer("env"), asking(env, tuple(env.task.kept_out), bank and bank.asked()):
        obs = env.reset(seed, args.group_size, bank)
    midway = 1 + seed % (T - 1) if args.midway and T > 1 else T  # the chunk before which states are noted
    features = policy.feature_buffer(T, len(obs), args.feature_cache)  # (T, N, L, D)
    for t in range(T):
        if t == midway:
            bank.note(env.states(), ~env.ended)
        with timer("policy"):
            out = policy.act(obs, noise, True, None if features is None else features[t])
            kept = out.exclude("action").update({"state": obs["state"], "prompt": obs["prompt"], "valid": ~env.ended})
            if features is None:
                kept["images"] = obs["images"]
            if t == 0:
                samples = sample_buffer(kept, T)
            samples[t] = kept
        with timer("env"):
            obs = env.step_chunk(out["action"], last=t + 1 == T)
    return samples if features is None else samples.set("features", features)


def episode_seed(seed: int, iteration: int, ranks: Ranks) -> int:
    """Seed of an iteration's starts; differs by rank."""
    return int(np.random.SeedSequence((seed, iteration, ranks.rank)).generate_state(1)[0] >> 1)


def advantages(samples: TensorDict, success: Tensor, args: Args, ranks: Ranks, log: Metrics) -> Tensor:
    """Gives samples (T, N) their advantages and weights; (T, N) whether they carry a gradient."""
    advantage, mixed = group_advantages(success.float(), args.group_size, normalize_std=args.normalize_std)  # (N,), (N,)
    keep = samples["valid"] & mixed
    weight = torch.where(keep, 1.0 / samples["valid"].sum(0), 0.0)  # every episode weighs the same
    total, count = ranks.reduce(torch.stack([weight.sum(), keep.sum()]))
    samples["weight"] = weight * (count / total.clamp(min=1e-12))  # mean 1 over all ranks
    samples["advantage"] = advantage.expand_as(keep)
    asked = all_instructions(args.task, args.instruction).number(samples["prompt"][0])  # (N,), of so many
    log.mean("rollout/success", success, by=asked)
    log.mean("rollout/zero_variance_share", ~mixed, by=asked)
    log.sum("rollout/samples", keep)
    log.mean("rollout/log_prob", samples["log_prob"])  # not a number if the policy is lost
    return keep


# ======== loss ========================================================================================================
def grpo_loss(policy: Gr00tActor, batch: TensorDict, args: Args, log: Metrics, first: bool) -> Tensor:
    """Clipped surrogate plus KL to the base model, summed over samples (B,) with their weights.

    `first`: the policy is still that of the rollout: ratios have to be 1, and the KL is measured even if it weighs nothing.
    """
    batch["features"] = policy.features(batch)  # as kept, or computed again
    log_prob, mean, std = policy.evaluate(batch)
    log_ratio = (log_prob - batch["log_prob"]).clamp(-20, 20)  # (B,)
    ratio, advantage, weight = log_ratio.exp(), batch["advantage"], batch["weight"]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage)
    loss = -(weight * surrogate)
    by = (batch["k"], policy.steps)
    if first or args.kl_coef:
        kl = ((mean - policy.base_mean(batch)) ** 2 / (2 * std**2)).sum((1, 2))  # (B,) closed form: equal std
        loss = loss + args.kl_coef * (weight * kl)
        log.mean("update/kl_base", kl, by=by)
    log.mean("update/loss", loss)
    log.mean("update/clip_frac", (ratio - 1).abs() > args.clip, by=by)
    log.mean("update/approx_kl", ratio - 1 - log_ratio, by=by)  # k3 estimator of the KL to the rollout's policy
    if first:
        log.max("update/first_ratio_error", (ratio - 1).abs())
    return loss.sum()


# ======== train =======================================================================================================
def plan_minibatches(keep: Tensor, args: Args, iteration: int, ranks: Ranks) -> list[tuple[Tensor, Tensor]]:
    """Draws the update's minibatches from the samples to keep (T, N). The one transfer between rollout and update.

    Returns:
        One (rows of this rank, on the host, size over all ranks) per optimizer step; none where no rank has samples.
    """
    rows = keep.flatten().cpu().nonzero()[:, 0].numpy()
    rng = np.random.default_rng((args.seed, iteration, ranks.rank))
    parts = [p for _ in range(args.epochs) for p in np.array_split(rng.permutation(rows), args.minibatches)]
    sizes = ranks.reduce(torch.tensor([float(len(p)) for p in parts], device=args.device))
    total = sizes.cpu() if ranks.world > 1 else torch.tensor([len(p) for p in parts])
    return [(torch.from_numpy(p), n) for p, n, m in zip(parts, sizes, total) if m > 0]


def update(policy: Gr00tActor, optimizer, samples: TensorDict, plan: list, args: Args, ranks: Ranks, log: Metrics) -> None:
    """One optimizer step per minibatch; a rank without samples adds zero."""
    samples, parameters = samples.flatten(0, 1), policy.trainable()
    for step, (rows, size) in enumerate(plan):
        optimizer.zero_grad(set_to_none=False)
        for micro in rows.split(args.micro_batch_size) if len(rows) else ():
            (grpo_loss(policy, take(samples, micro, args.device), args, log, first=step == 0) / size).backward()
        ranks.sum_gradients(parameters)
        log.max("update/grad_norm", torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()


def learning_rate(args: Args, iteration: int) -> float:
    """Linear warm-up, full rate for the first --lr-hold of the run, then linearly down to a tenth."""
    past = (iteration / args.iterations - args.lr_hold) / max(1 - args.lr_hold, 1e-9)
    warm = min(1.0, (iteration + 1) / (args.lr_warmup + 1))
    return args.learning_rate * warm * (1 - 0.9 * min(max(past, 0.0), 1.0))


def ratio_tolerance(args: Args) -> float:
    """On |ratio - 1| before the first update: see `check_ratio`."""
    return TOLERANCE[torch.device(args.device).type if args.precision == "fp32" else args.precision]


def check_ratio(metrics: dict[str, float], args: Args) -> None:
    """Stops a run whose update does not see the policy of the rollout.

    Rollout and update cut their batches differently, and a GPU picks its kernels by a batch's size: the same sums in
    another order, which shifts a log-probability, a sum over hundreds of numbers, by 1e-5 in fp32 and by 1e-2 in TF32.
    """
    error = metrics.get("update/first_ratio_error", 0.0)
    if error > ratio_tolerance(args):
        raise SystemExit(f"ratio on the first minibatch is off by {error:.1e}: rollout and update disagree; a bug")


def make_bank(args: Args, run: Run, ranks: Ranks) -> StartBank | None:
    """The bank of starts, that of the run to resume; None where starts are drawn uniformly."""
    if args.curriculum == "uniform":
        return None
    groups = args.num_envs // ranks.world // args.group_size
    asked = all_instructions(args.task, args.instruction)
    bank = StartBank(len(asked.names), groups, args.bank_share, args.device, ranks)
    if run.state.get("bank"):
        bank.load(run.state["bank"][ranks.rank])
    return bank


def train(args: Args, env: ChunkEnv, policy: Gr00tActor, run: Run, ranks: Ranks) -> None:
    """The whole run: evaluate, iterate, evaluate."""
    fused = policy.device.type == "cuda"  # without temporaries of the weights' size
    optimizer = torch.optim.AdamW(policy.trainable(), args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    run.restore_optimizer(optimizer)
    timer, asked, metrics, result = StageTimer(args.device), all_instructions(args.task, args.instruction), {}, None
    steps = sum(ranks.gather(args.num_envs // ranks.world * env.task.horizon))
    bank = make_bank(args, run, ranks)
    if run.state["iteration"] == 0:
        run.result(ode_success_before=evaluate(args, env, policy, ranks), instructions=asked.names)
        record(args, env, policy, run, ranks, "before")
    for iteration in range(run.state["iteration"], args.iterations):
        optimizer.param_groups[0]["lr"] = learning_rate(args, iteration)
        log = Metrics(args.device, ranks)
        samples = rollout(env, policy, args, iteration, ranks, timer, bank)
        if bank:
            bank.record(env.success, args.group_size, log)
        log.mean("rollout/broken", env.terminations.get_term("broken"))  # worlds whose physics blew up; they failed
        with timer("update"):
            keep = advantages(samples, env.success, args, ranks, log)
            update(policy, optimizer, samples, plan_minibatches(keep, args, iteration, ranks), args, ranks, log)
            metrics = log.read()
            del samples  # before there are others
        if iteration == 0:
            check_ratio(metrics, args)
        metrics |= {"episodes": (iteration + 1) * args.num_envs, "update/learning_rate": learning_rate(args, iteration)}
        last = iteration + 1 == args.iterations
        if args.eval_episodes and (last or (args.eval_every and (iteration + 1) % args.eval_every == 0)):
            result = evaluate(args, env, policy, ranks)
            metrics |= {"eval/ode_success": result["mean"], "eval/episodes": result["episodes"]}
        run.log(iteration, metrics, timer.seconds(), steps)
        if "eval/ode_success" in metrics and run.improved(result["mean"]):
            run.save("best", policy.save)
        if last or (iteration + 1) % args.save_every == 0:
            run.save(f"step_{iteration + 1:06d}", policy.save, optimizer, bank=bank and ranks.gather(bank.state()))
    run.result(
        ode_success_after=result or evaluate(args, env, policy, ranks),
        sde_success=evaluate(args, env, policy, ranks, explore=True),
        kl_to_base=metrics.get("update/kl_base"),
        zero_variance_share=metrics.get("rollout/zero_variance_share"),
    )
    record(args, env, policy, run, ranks, "after")


def check_run(args: Args, env: ChunkEnv, policy: Gr00tActor, run: Run, ranks: Ranks, plan: str) -> None:
    """A look before a long run: a line per check, exit status 1 where one fails. Nothing is learned: the rate is 0."""
    seed, texts = episode_seed(args.seed, 0, ranks), policy.texts
    timer, log = StageTimer(args.device), Metrics(args.device, ranks)

    def act(obs: TensorDict, draw: int, explore: bool = False) -> Tensor:
        return policy.act(obs, Noise(args.device, ranks, args.seed, draw), explore)["action"]

    expert = env.task.expert
    episode, found = check_task(env, expert, act, policy.chunk, seed)
    found += check_policy(env, episode, act, policy.processor, texts, expert is not None)
    found += check_groups(env, lambda: env.reset(seed, args.group_size), act, args.group_size, policy.chunk)
    samples = rollout(env, policy, args, 0, ranks, timer, make_bank(args, run, ranks))
    with timer("update"):
        advantages(samples, env.success, args, ranks, log)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, 0.0, weight_decay=0.0, fused=policy.device.type == "cuda")
        update(policy, optimizer, samples, plan_minibatches(samples["valid"], args, 0, ranks), args, ranks, log)
        metrics = log.read()
    won = episode.success if expert else None
    found.append(check_success(won, env.success, samples["prompt"][0], texts, args.group_size))
    found.append(check_first_ratio(metrics.get("update/first_ratio_error"), ratio_tolerance(args)))
    report(found + costs(plan, args.device, timer.seconds(), args.iterations), run, ranks)


# ======== evaluate ====================================================================================================
@torch.no_grad()
def evaluate(args: Args, env: ChunkEnv, policy: Gr00tActor, ranks: Ranks, explore: bool = False) -> dict[str, Any]:
    """Success on fixed episodes, by the ODE (or the exploring sampler), with its Wilson 95% interval.

    Returns:
        mean, low, high, episodes; the same for each of several instructions; empty with --eval-episodes 0.
    """
    if not args.eval_episodes:
        return {}
    batches, T = math.ceil(args.eval_episodes / args.num_envs), env.task.horizon // policy.chunk
    asked = all_instructions(args.task, args.instruction)
    tally = torch.zeros(2, len(asked.names), device=args.device)  # successes and episodes of each instruction
    for b in range(batches):
        obs, noise = env.reset(episode_seed(args.eval_seed, b, ranks)), Noise(args.device, ranks, args.eval_seed, b)
        prompt, _ = asked.number(obs["prompt"])
        for t in range(T):
            obs = env.step_chunk(policy.act(obs, noise, explore)["action"], last=t + 1 == T)
        tally.index_add_(1, prompt, torch.stack([env.success, torch.ones_like(env.success)]).float())
    return success_rates(asked.names, *ranks.reduce(tally).tolist(), asked.notes)


@torch.no_grad()
def record(args: Args, env: ChunkEnv, policy: Gr00tActor, run: Run, ranks: Ranks, name: str) -> None:
    """Films the first group as the rollout sees it: one start, different noise."""
    if not args.eval_episodes or not env.task.cameras:
        return
    obs, noise = env.reset(episode_seed(args.eval_seed, 0, ranks), args.group_size), Noise(args.device, ranks, args.eval_seed)
    shown, frames, success = min(args.group_size, 16), [], []
    for t in range(env.task.horizon):
        if t % policy.chunk == 0:
            actions = policy.act(obs, noise, explore=True)["action"]
        obs = env.step_chunk(actions[:, t % policy.chunk, None], last=t % 2 == 0 and (t + 1) % policy.chunk > 0)
        if t % 2:
            frames.append(obs["images"][:shown, 0].clone())  # of the first camera
            success.append(env.success[:shown])
    texts = [policy.texts[i] for i in obs["prompt"][:shown].tolist()]
    run.gif(name, torch.stack(frames), torch.stack(success), texts, every=2)


# ======== main ========================================================================================================
def main(args: Args) -> None:
    args.device = pick_device(args.device)
    ranks, task = Ranks.start(args.device), TASKS[rank_task(args.task)]
    policy = Gr00tActor(args)
    args.feature_cache, args.micro_batch_size, plan = plan_memory(
        policy, args.num_envs // ranks.world, task.horizon // policy.chunk, args.feature_cache, args.micro_batch_size,
        args.max_memory_gb, args.activation_checkpointing, args.compile,
    )  # fmt: skip
    policy.micro_batch_size = args.micro_batch_size
    with Run(vars(args), __file__, ranks, args.exp_name, args.iterations, args.device, args.resume) as run:
        run.restore(policy.load)
        run.event(f"{run.dir}: {' and '.join(task_names(args.task))} on {args.device}, {args.num_envs} envs; {plan}")
        run.event(f"instructions: {'; '.join(all_instructions(args.task, args.instruction).names)}")
        run.event(f"starting the simulator (its own output: {run.dir}/simulator.log)")
        with make_env(args, policy.camera_size, run.dir, ranks) as env:
            odd = ranks.gather(policy.processor.unusual(env.env.obs_buf["policy"]))[: len(task_names(args.task))]  # of each
            for keys in filter(None, odd):
                run.event(f"warning: states are far from what the checkpoint was trained on: {keys}")
            if args.check:
                check_run(args, env, policy, run, ranks, plan)
            elif args.record:
                with LeRobotWriter(args.record, env.task.modalities, 1 / env.env.step_dt) as writer:
                    run.result(ode_success=evaluate(args, RecordedEnv(args, env, writer), policy, ranks))
            elif args.evaluate:
                run.result(ode_success=evaluate(args, env, policy, ranks))
            else:
                train(args, env, policy, run, ranks)


if __name__ == "__main__":
    main(ARGS)
