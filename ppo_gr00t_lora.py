"""PPO fine-tunes GR00T N1.5 in Isaac Lab through LoRA adapters, and unfreezes the network stage by stage.

    python ppo_gr00t_lora.py                                         # laptop: the shipped tiny GR00T, no GPU needed
    python ppo_gr00t_lora.py --unfreeze critic head:3 vl:60:5e-4
    python ppo_gr00t_lora.py --evaluate --checkpoint runs/<name>/checkpoints/best
    torchrun --nproc_per_node=8 ppo_gr00t_lora.py --checkpoint <folder>

How this differs from ppo_gr00t_frozen.py (what is not in `DIFFERS` is the same text):
- What is trained are low-rank adapters (Hu et al. 2021, arXiv 2106.09685, by the peft library) on attention and
  feed-forward layers, and the small layers of the embodiment: a few percent of the parameters, and of AdamW's memory.
- The base model of the KL is the same weights with the adapters off (`Gr00tActor.base_mean`); there is no second copy.
- `--unfreeze` trains in stages: critic, head, vl (the head's self-attention over the features), llm (the language model's
  top layers), vision. A stage begins at its iteration, with a warm-up of its own; earlier stages go on learning.
- Once a stage trains the backbone, features are computed again in the update instead of kept from the rollout.
- Checkpoints to resume from hold the adapters alone; the best one, and the last, also the merged network in NVIDIA's layout.

One iteration: `rollout` -> `advantages` -> `update` (`value_loss` and `ppo_loss` per micro-batch) -> `Run.log`.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import contextlib
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from common import Metrics, Noise, Ranks, Run, StageTimer, StartBank, gae, group_moments, merge_moments
from common import standardize, success_rates
from common import check_not_negative, check_positive, pick_device, run_name, saved_args
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
PARENT = "ppo_gr00t_frozen.py"
DIFFERS = {
    "Args", "check", "Gr00tActor.__init__", "Gr00tActor.blocks", "Gr00tActor.base_mean", "Gr00tActor.groups",
    "Gr00tActor.unfreeze", "Gr00tActor.merged", "Gr00tActor.save", "Gr00tActor.save_adapters", "Gr00tActor.load",
    "Gr00tActor.load_adapters", "learning_rate", "train",
}  # fmt: skip


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
    eval_every: int = 50  # iterations between evaluations by the ODE; 0: only before and after
    eval_episodes: int = 256  # episodes of an evaluation (rounded up to whole batches of environments); 0: none, no film
    eval_seed: int = 7_000_000  # of an evaluation's episode starts, the same for every evaluation
    save_every: int = 50  # iterations between checkpoints
    resume: str | None = None  # runs/<name>: goes on from its latest checkpoint, with its arguments where none are given
    exp_name: str | None = None  # the run's folder is runs/<exp-name>; made from script, task, seed and time by default

    # algorithm
    reward: Literal["sparse", "dense"] = "sparse"  # sparse: 1 at success, which ends an attempt; dense: the task's own
    gamma: float = 0.99  # discount per environment step
    gae_lambda: float = 0.95  # lambda of GAE, per chunk
    critic_obs: Literal["features", "privileged"] = "features"  # features: backbone and proprioception
    critic_lr: float = 1e-3  # AdamW's learning rate of the critic
    critic_epochs: int = 8  # passes of the critic over a rollout; those beyond --epochs leave the policy alone
    curriculum: Literal["uniform", "learnability"] = "uniform"  # how starts are drawn; by p(1-p) of what became of them
    bank_share: float = 0.0  # of the episodes that begin from earlier starts then; 0: instructions alone are chosen so
    critic_warmup: int = 3  # iterations in which only the critic learns (without --unfreeze)
    lora_targets: tuple[str, ...] = ("dit-attention", "dit-feed-forward", "vl-attention")  # what gets adapters, of TARGETS
    lora_rank: int = 16  # rank of an adapter, whose output is doubled: alpha is twice the rank
    llm_layers: int = 4  # how many of the language model's top layers llm-attention adapts
    category_layers: Literal["frozen", "lora", "train"] = "frozen"  # the embodiment's own layers, which are no nn.Linear
    adapter: str | None = None  # adapters to begin with: a checkpoint's folder of that name
    unfreeze: tuple[str, ...] = ()  # stages, each name[:first iteration][:learning rate]
    chunk: int | None = None  # actions executed per policy call (the model's action horizon by default)
    denoise_steps: int = 4  # K, denoising steps per policy call
    noise_level: float = 0.8  # a, exploration noise of the stochastic step
    learning_rate: float = 5e-4  # AdamW's, of the adapters
    lr_warmup: int = 10  # iterations of linear warm-up: AdamW's first steps are otherwise too large to survive
    lr_hold: float = 0.5  # share of the run at full learning rate; afterwards it falls linearly to a tenth
    clip: float = 0.2  # clip range of the ratio of summed log-probabilities
    epochs: int = 2  # passes over a rollout
    minibatches: int = 2  # optimizer steps per epoch
    kl_coef: float = 0.0  # weight of the KL to the base model (which is logged at 0, too)

    # memory and speed
    precision: Literal["fp32", "bf16", "fp8"] = "fp32"  # bf16: backbone and encoder, TF32 in the steps; fp8: the backbone
    micro_batch_size: int = 1024  # samples per forward pass, at most; gradients are accumulated over a minibatch
    feature_cache: Literal["gpu", "cpu", "off"] = "gpu"  # where backbone features wait for the update; off: recomputed
    max_memory_gb: float | None = None  # budget [GB]: micro-batches and the place of features are planned to fit it
    activation_checkpointing: bool = False  # recompute the blocks' activations in the backward pass: slower, smaller
    compile: bool = False  # torch.compile the transformer blocks; on a GPU, the sampler as CUDA graphs


# a full-size checkpoint's settings: conservative, from the literature
FULL = Args(
    num_envs=64, iterations=500, noise_level=0.5, learning_rate=5e-5, clip=0.1, minibatches=4, kl_coef=0.01, precision="bf16",
    micro_batch_size=128,
)  # fmt: skip
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-3, "bf16": 0.1, "fp8": 0.1}  # on |ratio - 1| before the first update: see `check_ratio`


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
        max_memory_gb=args.max_memory_gb, critic_lr=args.critic_lr, critic_epochs=args.critic_epochs,
        lora_rank=args.lora_rank, llm_layers=args.llm_layers,
    )  # fmt: skip
    check_not_negative(
        seed=args.seed, eval_seed=args.eval_seed, eval_every=args.eval_every, eval_episodes=args.eval_episodes,
        lr_warmup=args.lr_warmup, lr_hold=args.lr_hold, kl_coef=args.kl_coef, critic_warmup=args.critic_warmup,
        bank_share=args.bank_share,
    )  # fmt: skip
    parse_schedule(args)
    for name, value in (("gamma", args.gamma), ("gae-lambda", args.gae_lambda), ("bank-share", args.bank_share)):
        if not 0 <= value <= 1:
            raise SystemExit(f"--{name} {value}: must be from 0 to 1")
    for task in task_names(args.task):
        if args.critic_obs == "privileged" and not TASKS[task].privileged:
            raise SystemExit(f"--critic-obs privileged: {task} has no observation group for it; use features")
    if args.precision == "fp8" and {"llm-attention", "vision-attention"} & set(args.lora_targets):
        raise SystemExit("--precision fp8: is for a frozen backbone; use bf16, or leave out llm-attention and vision-attention")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.num_envs % world:
        raise SystemExit(f"--num-envs {args.num_envs}: must be a multiple of {world} ranks")
    for task in task_names(args.task):
        parse_axes(args.randomize, TASKS[task])
        check_checkpoint(args.checkpoint, args.embodiment_tag, args.data_config, task, TASKS)
    stem = "eval" if args.evaluate else "check" if args.check else Path(__file__).stem
    args.exp_name = run_name(args.exp_name, stem, "+".join(task_names(args.task)), args.seed, resume=args.resume)
    return args


class Stage(NamedTuple):
    """A step of `--unfreeze`."""

    name: str  # one of STAGES
    start: int  # its first iteration
    learning_rate: float


def parse_schedule(args: Args) -> list[Stage]:
    """The stages of a run, by their start; without --unfreeze first the critic, then all at once."""
    for name in args.lora_targets:
        if name not in TARGETS:
            raise SystemExit(f"--lora-targets {name}: there is no such target; they are {', '.join(TARGETS)}")
    trained = {TARGETS[name][0] for name in args.lora_targets} | ({"head"} if args.category_layers != "frozen" else set())
    if not trained:
        raise SystemExit("--lora-targets: without any, and with --category-layers frozen, there is nothing to train")
    names, stages = [name for name in STAGES if name in trained], []
    for text in args.unfreeze or ("critic", *(f"{name}:{args.critic_warmup}" for name in names)):
        name, start, rate = (*text.split(":"), "", "")[:3]
        try:
            stage = Stage(name, int(start or 0), float(rate or args.learning_rate))
            if text.count(":") > 2 or stage.start < 0 or not 0 < stage.learning_rate < math.inf:
                raise ValueError
        except ValueError:
            raise SystemExit(f"--unfreeze {text}: a stage is name[:first iteration][:learning rate], as vl:60:1e-4") from None
        if name not in ("critic", *names):
            raise SystemExit(f"--unfreeze {text}: what --lora-targets names has the stages critic, {', '.join(names)}")
        if name in (other.name for other in stages):
            raise SystemExit(f"--unfreeze {text}: {name} stands there twice; leave one out")
        stages.append(stage)
    missing = [name for name in names if name not in (stage.name for stage in stages)]
    if missing:
        raise SystemExit(f"--unfreeze: {', '.join(missing)} would never be trained; add a stage or take targets away")
    return sorted((stage for stage in stages if stage.name != "critic"), key=lambda stage: stage.start)


ARGS = parse() if __name__ == "__main__" else None  # heavy imports come after, so --help and refusals are instant

import numpy as np
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torch import Tensor, nn

from gr00t_n1d5.network import Gr00tN1d5, is_real
from gr00t_n1d5.policy import Gr00tPolicy, plan_memory, sample_buffer, take
from tasks.check import check_first_ratio, check_policy, check_success, check_task, costs, report
from tasks.stock import start_simulator


# ======== env =========================================================================================================
class ChunkEnv:
    """Isaac Lab in chunks of actions, over a fixed horizon: no resets inside, success is remembered and masks the rest.

    Images are rendered at chunk boundaries only. With the task's own reward, success ends nothing: it would be punished.
    """

    def __init__(self, args: Args, cfg):
        self.task, self.dense, self.gamma = TASKS[rank_task(args.task)], args.reward == "dense", args.gamma
        self.critic_group = "critic" if args.critic_obs == "privileged" else "policy"
        self.env, self.terminations = make_task(rank_task(args.task), cfg)
        self.prompts = Prompts(self.env, self.task, args.instruction)
        self.asked = all_instructions(args.task, args.instruction)
        self.varied = Randomization(self.env, self.task, parse_axes(args.randomize, self.task))
        self.num_envs, self.device = self.env.num_envs, self.env.device

    def reset(self, seed: int, bank: StartBank | None = None) -> TensorDict:
        """Starts one episode everywhere; the starts depend on the seed, the number of environments and the bank alone."""
        self.env.reset(seed=seed)
        self.prompts.fix()
        self.varied.draw(seed)
        if bank:
            start_from(self.env, self.task, bank.draw(self.states(), seed))
        refresh_observations(self.env)
        self.terminations.reset()
        self.success = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)  # (N,)
        self.failure = torch.zeros_like(self.success)  # (N,) of episodes without success before
        self.steps = 0  # of the episode so far
        return self.observe()

    def step_chunk(self, actions: Tensor, last: bool = False) -> TensorDict | None:
        """Executes (N, chunk, d) actions; updates `self.success` and the chunk's discounted reward, `self.reward` (N,).

        No image is rendered after the last.
        """
        self.reward = torch.zeros(self.num_envs, device=self.device)  # (N,)
        for i, action in enumerate(self.varied.delay(actions).unbind(1)):
            before, alive = self.success, ~self.ended
            _, dense, *_ = self.env.step(action)
            ended = self.terminations.compute()  # (N,)
            self.success = before | (self.terminations.get_term("success") & ~self.failure)
            self.failure = self.failure | (ended & ~self.success)
            self.reward += self.gamma**i * (dense.nan_to_num() * alive if self.dense else (self.success & ~before))
        self.steps += actions.shape[1]
        return None if last else self.observe()

    @property
    def ended(self) -> Tensor:
        """(N,) whether an attempt is over: with a failure, or with success, unless rewards go on after it."""
        return self.failure if self.dense else self.failure | self.success

    def states(self) -> TensorDict:
        """(N,) where everything is and what is asked for, to start from; `prompt` numbers the instructions of all ranks."""
        return scene_states(self.env, self.task).set("prompt", self.asked.number(self.prompts.index())[0])

    def observe(self) -> TensorDict:
        """images (N, V, H, W, 3) uint8, state (N, d) in the simulator's units, prompt (N,) index of the instruction, and
        critic (N, c): proprioception or the simulator's state, and time as a share of the horizon."""
        state, prompt = self.env.obs_buf["policy"].clone(), self.prompts.index()
        time = torch.full((self.num_envs, 1), self.steps / self.task.horizon, device=self.device)
        critic = torch.cat([self.env.obs_buf[self.critic_group], time], 1)
        obs = {"images": self.task.images(self.env), "state": state, "prompt": prompt, "critic": critic}
        return self.varied.spoil(TensorDict(obs, self.num_envs))


@contextlib.contextmanager
def make_env(args: Args, image_size: int, run_dir: Path, ranks: Ranks):
    """Starts the simulator and yields a ChunkEnv; what the simulator prints goes to a file."""
    task, num_envs, dense = rank_task(args.task), args.num_envs // ranks.world, args.reward == "dense"
    axes = parse_axes(args.randomize, TASKS[task])
    cfg = task_config(task, args.device, num_envs, image_size, args.physics, args.renderer, dense, axes=axes)
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


class Critic(nn.Module):
    """Value of a state from what `Gr00tActor.critic_input` makes of it; 10M parameters at full size."""

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


class Gr00tActor(Gr00tPolicy):
    """GR00T N1.5 as actor, with a critic: adapters on frozen weights; without the adapters it is the base model."""

    def __init__(self, args: Args):
        task = TASKS[rank_task(args.task)]
        super().__init__(
            args.checkpoint, args.embodiment_tag, args.data_config, task, task.texts(args.instruction), args.device,
            args.precision, rows=[TASKS[name] for name in task_names(args.task)],
        )  # fmt: skip
        self.net.requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            self.adapters = get_peft_model(self.net, lora_config(args, self.net)).eval()
        self.unfreeze(STAGES)
        self.chunk = args.chunk or self.action_shape[0]
        if self.chunk > self.action_shape[0] or task.horizon % self.chunk:
            most = f"the episode's {task.horizon} steps and not exceed the model's {self.action_shape[0]}"
            raise SystemExit(f"--chunk {self.chunk}: must divide {most}")
        self.steps, self.level, self.micro_batch_size = args.denoise_steps, args.noise_level, args.micro_batch_size
        self.privileged = args.critic_obs == "privileged"
        width, tasks = self.net.config.text_hidden_size, task_names(args.task)
        inputs = [x.privileged if self.privileged else width + x.sizes["state"] for x in map(TASKS.get, tasks)]
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            self.critics = nn.ModuleList(Critic(n + 1, max(width, 256)) for n in inputs).to(self.device)  # 1: time
        self.critic = self.critics[tasks.index(rank_task(args.task))]  # each task has one, of which every rank has all
        if args.adapter:
            try:
                self.load_adapters(Path(args.adapter))
            except Exception as error:  # safetensors and torch have many kinds
                raise SystemExit(f"--adapter {args.adapter}: does not fit ({' '.join(str(error).split())})") from error
        self.accelerate(args.compile, args.activation_checkpointing)
        if args.compile and self.device.type == "cuda":
            self.denoise = torch.compile(self.denoise, mode="reduce-overhead")

    @torch.no_grad()
    def act(self, obs: TensorDict, noise: Noise, explore: bool = False, features: Tensor | None = None) -> TensorDict:
        """Actions by the ODE, or with one stochastic step per sample, which is kept with its log-probability.

        `features` (N, L, D) is where those of the backbone go, if anywhere: they are too large to be held twice.

        Returns:
            action (N, chunk, d) in the simulator's units; with `explore` x, y (N, H, A) before and after the stochastic
            step, k (N,) its index, log_prob (N,), and what the critic reads (N, inputs).
        """
        drawn = {"start": noise.normal(len(obs), *self.action_shape)}  # (N, H, A)
        if explore:
            drawn |= {"k": noise.integers(len(obs), self.steps), "eps": noise.normal(len(obs), *self.action_shape)}
        found = []
        for i, part in enumerate(TensorDict({**obs, **drawn}, len(obs)).split(self.micro_batch_size)):
            out = self.denoise(part)
            if features is not None:  # which may lie on the host
                features[i * self.micro_batch_size :][: len(part)].copy_(out["features"], non_blocking=True)
            if explore:
                out["critic"] = self.critic_input(part.set("features", out["features"]))
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
        """The base model's mean (B, chunk, valid) of kept steps: that with the adapters off."""
        with self.adapters.disable_adapter():
            mean = self.evaluate(batch.exclude("features") if self.trains_backbone else batch)[1]
        self.unfreeze(self.begun)  # peft has thawed all adapters
        return mean

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks that gradients pass through."""
        backbone = self.net.backbone
        return [*super().blocks(), *backbone.language_model.layers, *backbone.vision_model.encoder.layers]

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """What each stage trains."""
        places = {"vision": "vision_model.", "llm": "language_model.", "vl": "vl_self_attention.", "head": ""}
        groups: dict[str, list[nn.Parameter]] = {}
        for name, p in self.net.named_parameters():
            if "lora_" in name or "modules_to_save." in name:
                groups.setdefault(next(stage for stage, place in places.items() if place in name), []).append(p)
        return groups

    def unfreeze(self, begun: tuple[str, ...]) -> None:
        """Trains the stages that have begun, and nothing else."""
        self.begun, self.trains_backbone = begun, False
        for stage, parameters in self.groups().items():
            self.trains_backbone |= stage in begun and stage in ("llm", "vision")
            for p in parameters:
                p.requires_grad_(stage in begun)

    @torch.no_grad()
    def critic_input(self, obs: TensorDict) -> Tensor:
        """(B, inputs), without gradients to the policy: the mean of the real features, or the simulator's state."""
        if self.privileged:
            return obs["critic"]
        features = obs["features"].float()  # (B, L, D)
        real = is_real(self.lengths[obs["prompt"]], features.shape[1])[..., None]  # (B, L, 1)
        return torch.cat([(features * real).sum(1) / real.sum(1), obs["critic"]], 1)

    def merged(self) -> Gr00tN1d5:
        """The network with the adapters added to its weights, which themselves stay as they are."""
        with torch.device("meta"):
            plain = Gr00tN1d5(self.net.config)
        plain._tables, plain._rows = self.net._tables, self.net._rows
        for name, _ in list(plain.named_parameters()):
            path, _, leaf = name.rpartition(".")
            layer = self.net.get_submodule(path)  # of a layer that is trained as a whole, the trained one
            weight = getattr(layer.get_base_layer() if isinstance(layer, LoraLayer) else layer, leaf).detach()
            if isinstance(layer, LoraLayer) and leaf in ("weight", "W"):
                weight = weight + layer.get_delta_weight("default").detach().to(weight.dtype)
            setattr(plain.get_submodule(path), leaf, nn.Parameter(weight))
        return plain

    def save(self, folder: Path) -> None:
        """Writes the adapters, the critic, and the merged network in NVIDIA's layout."""
        self.save_adapters(folder)
        self.merged().save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def save_adapters(self, folder: Path) -> None:
        """Writes the adapters as peft does, and the critic."""
        self.adapters.save_pretrained(folder / "adapter", save_embedding_layers=False)
        for i, critic in enumerate(self.critics):
            save_file(critic.state_dict(), folder / f"critic{i or ''}.safetensors")

    def load(self, folder: Path) -> None:
        """Takes over what `save` wrote; the base model stays."""
        self.load_adapters(folder / "adapter")
        for i, critic in enumerate(self.critics):
            critic.load_state_dict(load_file(folder / f"critic{i or ''}.safetensors"))

    def load_adapters(self, folder: Path) -> None:
        weights = load_file(folder / "adapter_model.safetensors")
        found = set_peft_model_state_dict(self.adapters, weights)
        if found.unexpected_keys or len(weights) != sum(map(len, self.groups().values())):
            raise ValueError("other layers than those of --lora-targets and --category-layers")


def lora_config(args: Args, net: Gr00tN1d5) -> LoraConfig:
    """Where adapters go; module names and parameters are those of the network before there are any."""
    layers = net.config.text_layers
    top = "|".join(str(i) for i in range(max(layers - args.llm_layers, 0), layers))
    own = [f"action_head.{name}" for name in CATEGORY]
    tables = [name for name, _ in net.named_parameters() if name.startswith(tuple(own)) and name.endswith("W")]
    return LoraConfig(
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules="|".join(TARGETS[name][1].replace("{top}", top) for name in args.lora_targets) or [],
        target_parameters=tables if args.category_layers == "lora" else None,
        modules_to_save=own if args.category_layers == "train" else None,
    )


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
    """One episode per environment: (T, N) samples, T chunks per episode."""
    noise, T = Noise(args.device, ranks, args.seed, iteration), env.task.horizon // policy.chunk
    with timer("env"), asking(env, tuple(env.task.kept_out), bank and bank.asked()):
        obs = env.reset(episode_seed(args.seed, iteration * T, ranks), bank)
    features = policy.feature_buffer(T, len(obs), args.feature_cache)  # (T, N, L, D)
    for t in range(T):
        with timer("policy"):
            out = policy.act(obs, noise, True, None if features is None else features[t])
            kept = out.exclude("action").update({"state": obs["state"], "prompt": obs["prompt"], "valid": ~env.ended})
            kept["value"] = policy.critic(kept["critic"])
            kept.update({"reward": torch.zeros_like(kept["value"]), "ended": env.ended})  # known after the chunk
            if features is None:
                kept["images"] = obs["images"]
            if t == 0:
                samples = sample_buffer(kept, T)
            samples[t] = kept
        with timer("env"):
            obs = env.step_chunk(out["action"], last=t + 1 == T)
            samples["reward"][t], samples["ended"][t] = env.reward, env.ended
    return samples if features is None else samples.set("features", features)


def episode_seed(seed: int, iteration: int, ranks: Ranks) -> int:
    """Seed of an iteration's starts; differs by rank."""
    return int(np.random.SeedSequence((seed, iteration, ranks.rank)).generate_state(1)[0] >> 1)


@torch.no_grad()
def advantages(samples: TensorDict, success: Tensor, args: Args, ranks: Ranks, log: Metrics) -> Tensor:
    """Gives samples (T, N) their advantages and the critic's targets; (T, N) whether they belong to an attempt."""
    keep, reward, value = samples["valid"], samples["reward"], samples["value"]
    none, gamma = torch.zeros_like(reward), args.gamma ** (TASKS[rank_task(args.task)].horizon // len(reward))
    # nothing is worth anything after the horizon: it is an end of the task, not a time-out
    advantage, target = gae(reward, value, samples["ended"], none, none, none[0], gamma, args.gae_lambda)
    prompt, count = all_instructions(args.task, args.instruction).number(samples["prompt"])  # (T, N), of so many
    own = keep & (prompt == torch.arange(count, device=prompt.device)[:, None, None])  # (K, T, N), each instruction's
    n, mean, var = group_moments(advantage, own, ranks)  # (K,)
    # within each instruction: that one is easier than another is no action's merit
    samples["advantage"], samples["target"] = (advantage - mean[prompt]) / (var.sqrt()[prompt] + 1e-3), target
    groups = torch.cat([keep[None], own])  # (1 + K, T, N)
    spread, rest = (group_moments(x, groups, ranks)[2] for x in (target, target - value))  # (1 + K,)
    explained = torch.where(spread > 1e-8, 1 - rest / spread, 0.0)
    log.mean("update/explained_variance", explained[0])
    for k in range(count if count > 1 else 0):
        log.mean(f"update/explained_variance_k{k}", explained[1 + k], where=n[k] > 0)
    log.mean("rollout/success", success, by=(prompt[0], count))
    log.mean("rollout/reward", reward, where=keep)
    log.mean("rollout/value", value, where=keep)
    log.sum("rollout/samples", keep)
    log.mean("rollout/log_prob", samples["log_prob"])  # not a number if the policy is lost
    return keep


# ======== loss ========================================================================================================
def ppo_loss(policy: Gr00tActor, batch: TensorDict, args: Args, log: Metrics, first: bool) -> Tensor:
    """Clipped surrogate plus KL to the base model, summed over samples (B,).

    `first`: the policy is still that of the rollout: ratios have to be 1, and the KL is measured even if it weighs nothing.
    """
    batch["features"] = policy.features(batch)  # as kept, or computed again
    log_prob, mean, std = policy.evaluate(batch)
    log_ratio = (log_prob - batch["log_prob"]).clamp(-20, 20)  # (B,)
    ratio, advantage = log_ratio.exp(), batch["advantage"]
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - args.clip, 1 + args.clip) * advantage)
    loss = -surrogate
    by = (batch["k"], policy.steps)
    if first or args.kl_coef:
        kl = ((mean - policy.base_mean(batch)) ** 2 / (2 * std**2)).sum((1, 2))  # (B,) closed form: equal std
        loss = loss + args.kl_coef * kl
        log.mean("update/kl_base", kl, by=by)
    log.mean("update/loss", loss)
    log.mean("update/clip_frac", (ratio - 1).abs() > args.clip, by=by)
    log.mean("update/approx_kl", ratio - 1 - log_ratio, by=by)  # k3 estimator of the KL to the rollout's policy
    if first:
        log.max("update/first_ratio_error", (ratio - 1).abs())
    return loss.sum()


def value_loss(policy: Gr00tActor, batch: TensorDict, log: Metrics) -> Tensor:
    """Half the squared error of the values, summed over samples (B,)."""
    loss = 0.5 * (policy.critic(batch["critic"]) - batch["target"]).square()
    log.mean("update/value_loss", loss)
    return loss.sum()


# ======== train =======================================================================================================
def plan_minibatches(
    keep: Tensor, args: Args, iteration: int, ranks: Ranks, moving: bool = True
) -> list[tuple[Tensor, Tensor, bool]]:
    """Draws the update's minibatches from the samples to keep (T, N). The one transfer between rollout and update.

    Returns:
        One (rows of this rank, on the host, size over all ranks, whether the policy learns: not with `moving` off) per step.
    """
    rows = keep.flatten().cpu().nonzero()[:, 0].numpy()
    rng, moves = np.random.default_rng((args.seed, iteration, ranks.rank)), args.epochs if moving else 0
    epochs = range(max(args.epochs, args.critic_epochs))
    parts = [(p, e < moves) for e in epochs for p in np.array_split(rng.permutation(rows), args.minibatches)]
    sizes = ranks.reduce(torch.tensor([float(len(p)) for p, _ in parts], device=args.device))
    total = sizes.cpu() if ranks.world > 1 else torch.tensor([len(p) for p, _ in parts])
    return [(torch.from_numpy(p), n, moves) for (p, moves), n, m in zip(parts, sizes, total) if m > 0]


def update(policy: Gr00tActor, optimizer, samples: TensorDict, plan: list, args: Args, ranks: Ranks, log: Metrics) -> None:
    """One optimizer step per minibatch; a rank without samples adds zero."""
    samples = samples.flatten(0, 1)
    for step, (rows, size, moving) in enumerate(plan):
        optimizer.zero_grad()
        for micro in rows.split(args.micro_batch_size) if len(rows) else ():
            batch = take(samples if moving else samples.select("critic", "target"), micro, args.device)
            (value_loss(policy, batch, log) / size).backward()
            if moving:
                (ppo_loss(policy, batch, args, log, first=step == 0) / size).backward()
        learning = {"critic_grad_norm": list(policy.critics.parameters())}
        learning |= {"grad_norm": policy.trainable()} if moving else {}
        for name, parameters in learning.items():
            ranks.sum_gradients(parameters)
            log.max(f"update/{name}", torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        optimizer.step()  # leaves alone what has no gradient


def learning_rate(args: Args, iteration: int, stage: Stage) -> float:
    """Linear warm-up of a stage, full rate for the first --lr-hold of the run, then linearly down to a tenth."""
    past = (iteration / args.iterations - args.lr_hold) / max(1 - args.lr_hold, 1e-9)
    warm = min(1.0, max(iteration + 1 - stage.start, 0) / (args.lr_warmup + 1))
    return stage.learning_rate * warm * (1 - 0.9 * min(max(past, 0.0), 1.0))


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
    asked, share = all_instructions(args.task, args.instruction), args.num_envs // ranks.world
    bank = StartBank(len(asked.names), share, args.bank_share, args.device, ranks)
    if run.state.get("bank"):
        bank.load(run.state["bank"][ranks.rank])
    return bank


def train(args: Args, env: ChunkEnv, policy: Gr00tActor, run: Run, ranks: Ranks) -> None:
    """The whole run: evaluate, iterate, evaluate."""
    stages, own = parse_schedule(args), policy.groups()
    groups = [{"params": own[stage.name]} for stage in stages]
    groups += [{"params": list(policy.critics.parameters()), "lr": args.critic_lr}]
    fused = policy.device.type == "cuda"  # without temporaries of the weights' size
    optimizer = torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
    run.restore_optimizer(optimizer)
    timer, asked, metrics, result = StageTimer(args.device), all_instructions(args.task, args.instruction), {}, None
    steps = sum(ranks.gather(args.num_envs // ranks.world * env.task.horizon))
    bank = make_bank(args, run, ranks)
    if run.state["iteration"] == 0:
        run.result(ode_success_before=evaluate(args, env, policy, ranks), instructions=asked.names)
        record(args, env, policy, run, ranks, "before")
    for iteration in range(run.state["iteration"], args.iterations):
        for stage, group in zip(stages, optimizer.param_groups):
            group["lr"] = learning_rate(args, iteration, stage)
            if iteration == stage.start:
                run.event(f"iteration {iteration}: stage {stage.name} begins")
        optimizer.param_groups[-1]["lr"] = args.critic_lr
        begun = tuple(stage.name for stage in stages if iteration >= stage.start)  # before, only the critic learns
        policy.unfreeze(begun)
        log = Metrics(args.device, ranks)
        samples = rollout(env, policy, args, iteration, ranks, timer, bank)
        if bank:
            bank.record(env.success, 1, log)
        log.mean("rollout/broken", env.terminations.get_term("broken"))  # worlds whose physics blew up; they failed
        with timer("update"):
            keep = advantages(samples, env.success, args, ranks, log)
            plan = plan_minibatches(keep, args, iteration, ranks, moving=bool(begun))
            update(policy, optimizer, samples, plan, args, ranks, log)
            for critic in policy.critics:  # where a rank has another, it adds no rows
                rows = samples["critic"] if critic is policy.critic else critic.moments[:0].float()
                critic.moments.copy_(merge_moments(critic.moments, rows, ranks))
            metrics = log.read()
            del samples  # before there are others
        if iteration == stages[0].start:
            check_ratio(metrics, args)
        metrics |= {"episodes": (iteration + 1) * args.num_envs, "update/stage": len(begun)}
        metrics["update/learning_rate"] = optimizer.param_groups[0]["lr"]
        last = iteration + 1 == args.iterations
        if args.eval_episodes and (last or (args.eval_every and (iteration + 1) % args.eval_every == 0)):
            result = evaluate(args, env, policy, ranks)
            metrics |= {"eval/ode_success": result["mean"], "eval/episodes": result["episodes"]}
        run.log(iteration, metrics, timer.seconds(), steps)
        if "eval/ode_success" in metrics and run.improved(result["mean"]):
            run.save("best", policy.save)
        if last or (iteration + 1) % args.save_every == 0:
            write, kept = policy.save if last else policy.save_adapters, bank and ranks.gather(bank.state())
            run.save(f"step_{iteration + 1:06d}", write, optimizer, bank=kept)
    run.result(
        ode_success_after=result or evaluate(args, env, policy, ranks),
        sde_success=evaluate(args, env, policy, ranks, explore=True),
        kl_to_base=metrics.get("update/kl_base"),
        explained_variance=metrics.get("update/explained_variance"),
        trainable_parameters=sum(p.numel() for parameters in own.values() for p in parameters),
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
    samples = rollout(env, policy, args, 0, ranks, timer, make_bank(args, run, ranks))
    with timer("update"):
        advantages(samples, env.success, args, ranks, log)
        parameters = [p for p in policy.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, 0.0, weight_decay=0.0, fused=policy.device.type == "cuda")
        update(policy, optimizer, samples, plan_minibatches(samples["valid"], args, 0, ranks), args, ranks, log)
        metrics = log.read()
    won = episode.success if expert else None
    found.append(check_success(won, env.success, samples["prompt"][0], texts, dense=args.reward == "dense"))
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
    """Films the first episodes as the rollout sees them."""
    if not args.eval_episodes or not env.task.cameras:
        return
    obs, noise = env.reset(episode_seed(args.eval_seed, 0, ranks)), Noise(args.device, ranks, args.eval_seed)
    shown, frames, success = min(env.num_envs, 16), [], []
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
            elif args.evaluate:
                run.result(ode_success=evaluate(args, env, policy, ranks))
            else:
                train(args, env, policy, run, ranks)


if __name__ == "__main__":
    main(ARGS)
