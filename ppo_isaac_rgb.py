"""PPO on Isaac Lab's own tasks, from camera images: ppo_isaac.py with what images need, and nothing else changed.

    python ppo_isaac_rgb.py                                          # laptop: Isaac-Cartpole-Camera-Direct, no GPU needed
    python ppo_isaac_rgb.py --evaluate --checkpoint runs/<name>/checkpoints/best
    torchrun --nproc_per_node=8 ppo_isaac_rgb.py --num-envs 4096

The nine Atari details of "The 37 Implementation Details of PPO" (Huang et al., ICLR blog track 2022), for a robot's camera:
1. No-op starts: --noop-max. Off by default: episodes that start at random ages already come apart.
2. Frame skip: --frame-skip. 1 by default: a robot's task has chosen its control rate (decimation) already. No maximum
   over two frames: nothing flickers.
3. End of an episode at the loss of a life: robots have one.
4. FIRE to start: robots start by themselves.
5. Grey images of 84x84, kept as bytes.
6. Reward clipping to the sign: --sign-rewards. Off by default: rewards of robot tasks are scaled by their authors.
7. The last 4 frames stacked, which makes velocities visible.
8. The Nature-CNN, shared by policy and value: one network, where ppo_isaac.py has two. The critic sees what the policy
   sees, even if the task has critic observations.
9. Bytes become [0, 1] inside the network.
The learning rate does not follow the KL by default: early on the KL is small whatever the rate is, which ruins a CNN.
Left out of ppo_isaac.py: LSTM, observation normalisation, return scaling, observation groups and the choice of layers.

What is different is `CameraEnv`, which is new, and the names in `DIFFERS`; all else is the parent's text.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from common import check_not_negative, check_positive, run_name, saved_args
from tasks import current_name

PARENT = "ppo_isaac.py"
DIFFERS = {
    "Args", "check", "make_env",  # images, and no choice of layers
    "ActorCritic", "Network",  # one CNN for policy and value
    "Storage", "rollout", "make_batch",  # frames, each stored once
    "evaluate", "main",
}  # fmt: skip


# ======== Args ========================================================================================================
@dataclass
class Args:
    """Defaults are those for any task; what TASKS says about one goes before them, see `--help --task <name>`."""

    # general
    task: str = "Isaac-Cartpole-Camera-Direct"  # registered Isaac Lab task
    checkpoint: str | None = None  # folder of a saved policy: evaluated with --evaluate, trained further without
    seed: int = 1  # seed of the weights, the environments, the actions and the minibatches
    device: str = "auto"  # cpu, cuda, cuda:N, or auto
    physics: str | None = None  # Isaac Lab physics preset (newton_mjwarp, isaacsim_physx, ...), or mujoco_c: a CPU's default
    overrides: tuple[str, ...] = ()  # Isaac Lab overrides of the task, as presets=albedo or env.decimation=4
    num_envs: int = 64  # parallel environments over all ranks; a GPU takes 512
    iterations: int = 1000  # rollout-and-update iterations
    evaluate: bool = False  # evaluate --checkpoint, and nothing else
    eval_every: int = 0  # iterations between evaluations of the deterministic policy; 0: only at the end
    eval_episodes: int = 256  # episodes of an evaluation (at most one per environment); 0: none
    eval_seed: int = 7_000_000  # seed of the evaluation's episodes, the same for every evaluation
    save_every: int = 50  # iterations between checkpoints
    resume: str | None = None  # runs/<name>: goes on from its latest checkpoint, with its arguments
    exp_name: str | None = None  # runs/<exp-name>; made of script, task, seed and time by default
    capture_video: bool = False  # film the deterministic policy after training, with the task's own camera
    compile: bool = False  # torch.compile the network
    mixed_precision: bool = False  # network in bfloat16; log-probabilities, losses and optimizer stay in fp32

    # images
    frame_skip: int = 1  # environment steps that repeat each action; their rewards are summed
    noop_max: int = 0  # up to so many steps at the start of an episode execute a zero action instead of the policy's
    sign_rewards: bool = False  # learn from the signs of the rewards; logged returns are those of the task

    # algorithm
    num_steps: int = 32  # T, steps per environment and rollout
    epochs: int = 3  # passes over a rollout
    minibatches: int = 4  # optimizer steps per epoch
    learning_rate: float = 5e-4  # Adam's learning rate, the initial one of the adaptive schedule
    schedule: Literal["adaptive", "linear", "constant"] = "linear"  # adaptive: follows --target-kl; linear: down to 0
    target_kl: float = 0.01  # KL(old | new) that the adaptive schedule aims at
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # lambda of GAE
    clip: float = 0.2  # clip range of the ratio, and of the value's change
    clip_value: bool = True  # clip the value loss
    entropy_coef: float = 0.005  # weight of the entropy bonus
    value_coef: float = 1.0  # weight of the value loss, which has the 1/2
    max_grad_norm: float = 1.0  # global gradient norm
    clip_actions: float | None = None  # symmetric bound on actions, beside the action space's own
    stagger: bool = True  # first episodes of a rollout end at random ages, so time-outs are spread out
    init_std: float = 1.0  # initial std of the Gaussian policy


CARTPOLE = dict(iterations=300, frame_skip=2, epochs=4, schedule="constant", clip_value=False, init_std=0.5, entropy_coef=0.0)
TASKS: dict[str, dict] = {"Isaac-Cartpole-Camera-Direct": CARTPOLE}
# what makes a policy; a checkpoint keeps it
NETWORK = ("init_std", "frame_skip")
STACK, SIZE = 4, 84  # frames that the network sees, and their height and width


def parse(command: list[str] | None = None) -> Args:
    """The command line, over the run to resume, or over the task's settings and the checkpoint's network."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--task", "--checkpoint", "--resume"):
        early.add_argument(name)
    asked, _ = early.parse_known_args(command)
    default = saved_args(asked.resume, Args) if asked.resume else task_args(asked.task, asked.checkpoint)
    args = tyro.cli(Args, args=command, default=default)
    check(args)
    return args


def task_args(task: str | None = None, checkpoint: str | None = None) -> Args:
    """The settings for a task, and for the network of a checkpoint, whose task is the default."""
    saved = {}
    if checkpoint:
        try:
            found = json.loads((Path(checkpoint) / "policy.json").read_text())
            saved = {name: tuple(x) if isinstance(x := found[name], list) else x for name in ("task", *NETWORK)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"--checkpoint {checkpoint}: no policy of this script there ({error!r})") from error
        if task and current_name(task) != current_name(saved["task"]):
            raise SystemExit(f"--checkpoint {checkpoint}: a policy for {saved['task']}, not for --task {task}")
    task = task or saved.get("task", Args.task)
    return Args(**{**TASKS.get(current_name(task), {}), **saved, "task": task, "checkpoint": checkpoint})


def check(args: Args) -> None:
    """Refuses what cannot work, or would ruin a run in silence."""
    check_positive(
        num_envs=args.num_envs, iterations=args.iterations, save_every=args.save_every, num_steps=args.num_steps,
        epochs=args.epochs, minibatches=args.minibatches, learning_rate=args.learning_rate, target_kl=args.target_kl,
        clip=args.clip, max_grad_norm=args.max_grad_norm, clip_actions=args.clip_actions, init_std=args.init_std,
        frame_skip=args.frame_skip,
    )  # fmt: skip
    check_not_negative(
        seed=args.seed, eval_seed=args.eval_seed, eval_every=args.eval_every, eval_episodes=args.eval_episodes,
        entropy_coef=args.entropy_coef, value_coef=args.value_coef, noop_max=args.noop_max,
    )  # fmt: skip
    for name, value in (("gamma", args.gamma), ("gae-lambda", args.gae_lambda)):
        if not 0 <= value <= 1:
            raise SystemExit(f"--{name} {value}: must be from 0 to 1")
    if args.evaluate and not args.checkpoint:
        raise SystemExit("--evaluate: needs --checkpoint, a folder like runs/<name>/checkpoints/best")
    if args.num_envs % (world := int(os.environ.get("WORLD_SIZE", 1))):
        raise SystemExit(f"--num-envs {args.num_envs}: must be a multiple of the {world} ranks")
    units = args.num_envs * args.num_steps
    if units < 2 * args.minibatches:
        what = "steps (--num-envs times --num-steps)"
        raise SystemExit(f"--minibatches {args.minibatches}: {units} {what} leave fewer than 2 for each; use fewer")
    args.exp_name = run_name(args.exp_name, Path(__file__).stem, args.task, args.seed, resume=args.resume)


ARGS = parse() if __name__ == "__main__" else None  # before the heavy imports, so --help is instant

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tensordict import TensorDict
from torch import Tensor, nn

from common import Metrics, Ranks, Run, StageTimer, gae, normalize_advantages, pick_device, seeded_generator
from tasks.stock import (
    Spaces, VecEnv, known_task, restore, seeded_generators, start_simulator, task_config, task_metrics, to_cpu,
)  # fmt: skip


# ======== env =========================================================================================================
class CameraEnv(VecEnv):
    """An Isaac Lab task as plain tensors, observed through its camera.

    The camera's bytes take the place of the task's own observation, which has each image's mean subtracted (so grey levels
    depend on what else is in view), stacks a frame twice where another environment's episode ends, and costs more
    than rendering does. A direct task's `_get_observations` changes nothing, so it can be left out.
    """

    def __init__(self, task: str, cfg: Any, ranks: Ranks, args: Args):
        self.frame_skip, self.noop_max = args.frame_skip, args.noop_max
        super().__init__(task, cfg, ranks, args.seed, args.clip_actions)

    def prepare(self, task: str, cfg: Any) -> None:
        name, self.kind = colour_camera(task, cfg)
        self.camera, self.hidden, self.base._get_observations = self.base.scene.sensors[name], False, self.look
        self.noops = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)  # zero actions still to come

    def image(self) -> Tensor:
        """What the camera sees, (N, H, W, 3) uint8."""
        return self.camera.data.output[self.kind].torch[..., :3]

    def look(self) -> dict[str, Tensor]:
        """What the task returns as its observations: (N, 84, 84) uint8. Nothing is rendered that nobody will see."""
        if self.hidden and not self.base.reset_buf.any():
            return {}
        return {"policy": grey(self.image())}

    def restart(self, seed: int, steps: int = 0, stagger: bool = True, saved: dict | None = None) -> tuple[Tensor, Tensor]:
        """As in `VecEnv`; policy and critic observation are the same stacked frames."""
        self.base.common_step_counter = steps
        groups, _ = self.env.reset(seed=int(np.random.SeedSequence((seed, steps, self.ranks.rank)).generate_state(1)[0]))
        self.running.zero_()
        self.stack = groups["policy"][:, None].repeat(1, STACK, 1, 1)  # (N, 4, 84, 84)
        self.noops = self.draw_noops()
        if saved:
            restore(self.base, saved["task"])
            self.running.copy_(saved["running"])
            self.stack, self.noops = saved["stack"].to(self.device), saved["noops"].to(self.device)
            _, _, terminated, truncated, _ = self.step(self.idle)
            self.running *= ~(terminated | truncated)
        elif stagger:
            self.base.episode_length_buf.random_(0, self.horizon)
        self.base.extras["log"] = {}  # of the episodes before
        return self.stack, self.stack

    def state(self) -> dict:
        """What `restart` goes on from."""
        return super().state() | to_cpu({"stack": self.stack, "noops": self.noops})

    def draw_noops(self) -> Tensor:
        """(N,) how many steps a new episode ignores the policy: part of the task, so all samples are on-policy."""
        return torch.randint_like(self.noops, self.noop_max + 1) if self.noop_max else self.noops

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Executes (N, C) actions --frame-skip times: numbers, which are clipped here and nowhere else, or indices.

        The task itself is stepped again, rather than with a larger decimation: its rewards, its time limit and its
        checks for an end stay as they are. After an end the sum is complete; the new episode gets the rest of the repeats.

        Returns:
            stacked frames of the next step (N, 4, 84, 84), reward, terminated, truncated (N,), and the frame (N, 84, 84)
            from before the resets, valid where an episode ended (None: nowhere).
        """
        action = action.clamp(*self.bounds) if self.bounds else action
        if self.noop_max:
            action = action * (self.noops == 0)[:, None]
            self.noops = (self.noops - 1).clamp(min=0)
        final, total = None, torch.zeros_like(self.running[0])
        terminated, truncated = torch.zeros_like(total, dtype=torch.bool), torch.zeros_like(total, dtype=torch.bool)
        for repeat in range(self.frame_skip):
            self.hidden = repeat + 1 < self.frame_skip
            groups, reward, end, late, extras = self.env.step(action)
            if self.finite:
                end, late = end | late, torch.zeros_like(late)
            going, new = ~(terminated | truncated), extras.get("final_obs")
            total = total + reward * going
            terminated, truncated = terminated | (end & going), truncated | (late & going)
            if new is not self.final:  # it stays in extras; a new object means that an episode has just ended
                self.final, frame = new, new["policy"]
                final = frame if final is None else torch.where(going[:, None, None], frame, final)
        self.hidden = False
        starts, frame = terminated | truncated, groups["policy"][:, None]
        self.stack = torch.where(starts[:, None, None, None], frame, torch.cat([self.stack[:, 1:], frame], 1))
        if self.noop_max:
            self.noops = torch.where(starts, self.draw_noops(), self.noops)
        return self.stack, total, terminated, truncated, final


def colour_camera(task: str, cfg: Any) -> tuple[str, str]:
    """Name and data type of the first camera in colour of a task."""
    found = [(name, kind) for name, x in vars(cfg.scene).items() for kind in getattr(x, "data_types", None) or ()]
    for name, kind in found:
        if kind.startswith(("rgb", "albedo", "simple_shading")):
            return name, kind
    kinds = ", ".join(kind for _, kind in found) or "no camera"
    raise SystemExit(f"--task {task}: needs a camera in colour (rgb, albedo, ...), its scene has {kinds}; see --overrides")


def grey(images: Tensor) -> Tensor:
    """(N, H, W, 3) bytes as grey bytes (N, 84, 84): ITU-R 601 luma, each pixel the mean over the area that it covers."""
    luma = images.float() @ torch.tensor([0.299, 0.587, 0.114], device=images.device)  # (N, H, W)
    rows, columns = (covered(size).to(images.device) for size in luma.shape[1:])
    return (rows @ luma @ columns.T).round().to(torch.uint8)


@functools.cache
def covered(size: int) -> Tensor:
    """(84, size): share of each of `size` pixels in each of 84 new ones."""
    edges, pixels = torch.arange(SIZE + 1.0)[:, None] * size / SIZE, torch.arange(float(size))
    share = torch.minimum(edges[1:], pixels + 1) - torch.maximum(edges[:-1], pixels)
    return share.clamp(min=0) * SIZE / size


@contextlib.contextmanager
def make_env(args: Args, cfg: Any, ranks: Ranks, log: Path):
    """Starts the simulator and yields a CameraEnv; what the simulator prints goes to a file."""
    cfg.seed = args.seed + ranks.rank
    with start_simulator(cfg, args.device, True, log) as ready:
        with seeded_generators(args.seed):
            env = CameraEnv(args.task, cfg, ranks, args)
        ready()
        yield env
        env.env.close()


# ======== policy ======================================================================================================
class Policy(nn.Module):
    """Gaussian or categorical actions with independent components; networks and `log_std` (C,) are the subclass's.

    The parameters (..., P) of the distribution are the mean, or the log-probabilities of all components side by side.
    """

    def __init__(self, spaces: Spaces, args: Args):
        super().__init__()
        self.spaces, self.args = spaces, args

    def save(self, folder: Path) -> None:
        """Weights and running statistics, and what they are for: the task and the network's arguments."""
        save_file({name: x.contiguous() for name, x in self.state_dict().items()}, folder / "policy.safetensors")
        about = {name: getattr(self.args, name) for name in ("task", *NETWORK)} | {"spaces": self.spaces._asdict()}
        (folder / "policy.json").write_text(json.dumps(about, indent=2) + "\n")

    def load(self, folder: str | Path) -> None:
        self.load_state_dict(load_file(Path(folder) / "policy.safetensors"))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.log_std.device.type, torch.bfloat16, self.args.mixed_precision)

    def distribution(self, out: Tensor) -> Tensor:
        """Parameters (..., P) from a network's outputs (..., P)."""
        if self.spaces.choices:
            return torch.cat([part.log_softmax(-1) for part in out.split(self.spaces.choices, -1)], -1)
        return out

    def noise(self, steps: int, n: int, ranks: Ranks, *seeds: int) -> Tensor:
        """(T, N, P) standard normal or Gumbel numbers; every rank draws all columns and keeps its own."""
        x = torch.empty(steps, n * ranks.world, self.spaces.outputs, device=self.log_std.device)
        generator = seeded_generator(x.device, *seeds)
        x = -x.exponential_(generator=generator).log() if self.spaces.choices else x.normal_(generator=generator)
        return x[:, ranks.rank * n : (ranks.rank + 1) * n]

    def sample(self, params: Tensor, noise: Tensor | None) -> Tensor:
        """Actions (N, C), drawn with noise (N, P), or the most likely ones for None."""
        if self.spaces.choices:  # the largest of log-probability plus Gumbel noise is a sample
            scores = params if noise is None else params + noise
            return torch.stack([s.argmax(-1) for s in scores.split(self.spaces.choices, -1)], -1)
        return params if noise is None else torch.addcmul(params, noise, self.log_std.exp())

    def log_prob(self, params: Tensor, action: Tensor) -> Tensor:
        """Log-probability of actions (..., C), summed over the independent components: (...,)."""
        if self.spaces.choices:
            parts = zip(params.split(self.spaces.choices, -1), action.long().split(1, -1))
            return sum(p.gather(-1, a).squeeze(-1) for p, a in parts)
        z = (action - params) * torch.exp(-self.log_std)
        return -0.5 * z.square().sum(-1) - (self.log_std.sum() + 0.5 * math.log(2 * math.pi) * len(self.log_std))

    def entropy(self, params: Tensor) -> Tensor:
        """Entropy, summed over components: (...,)."""
        if self.spaces.choices:
            return -(params.exp() * params).sum(-1)
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(params.shape[:-1])

    def kl(self, old: Tensor, old_log_std: Tensor, new: Tensor) -> Tensor:
        """KL(old | new) in closed form: (...,)."""
        if self.spaces.choices:
            return (old.exp() * (old - new)).sum(-1)
        change = self.log_std - old_log_std  # (C,)
        fixed = (change + 0.5 * torch.exp(-2 * change) - 0.5).sum()
        return fixed + 0.5 * ((new - old) * torch.exp(-self.log_std)).square().sum(-1)


class ActorCritic(Policy):
    """One network for policy and value."""

    def __init__(self, spaces: Spaces, args: Args):
        super().__init__(spaces, args)
        self.network = Network()
        self.actor, self.critic = orthogonal(nn.Linear(512, spaces.outputs), 0.01), orthogonal(nn.Linear(512, 1), 1.0)
        self.log_std = nn.Parameter(torch.full((spaces.continuous,), math.log(args.init_std)))
        if args.compile:
            self.network.compile()

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters of the distribution (B, P) and values (B,) for stacked frames (B, 4, 84, 84)."""
        with self.autocast():
            features = self.network(obs)
            out, value = self.actor(features).float(), self.critic(features).float()
        return self.distribution(out), value.squeeze(-1)

    def outputs(self, batch: TensorDict, states: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Parameters (B, P) and values (B,) for the samples of a minibatch."""
        return self(batch["obs"])

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (N, C) for stacked frames: drawn with `noise` (N, P), or the most likely ones for None.

        Returns:
            action, parameters (N, P), value (N,).
        """
        params, value = self(obs)
        return self.sample(params, noise), params, value


class Network(nn.Sequential):
    """The CNN of Mnih et al. 2015 (Nature 518), from bytes to 512 features; orthogonal weights, zero biases."""

    def __init__(self):
        sizes, layers = ((STACK, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)), []  # channels in and out, kernel, stride
        for size in sizes:
            layers += [orthogonal(nn.Conv2d(*size), math.sqrt(2)), nn.ReLU()]
        super().__init__(*layers, nn.Flatten(), orthogonal(nn.Linear(64 * 7 * 7, 512), math.sqrt(2)), nn.ReLU())

    def forward(self, frames: Tensor) -> Tensor:
        return super().forward(frames.to(torch.float32, memory_format=torch.channels_last) / 255)  # a faster layout


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def flat_parameter(module: nn.Module) -> nn.Parameter:
    """All parameters of a module side by side: one small optimizer step, norm and sum over ranks instead of many.

    Returns:
        (P,); the module's own parameters and their gradients become views of it and its gradient.
    """
    parameters = sorted(module.parameters(), key=lambda p: -p.numel())  # small ones last, for the others' alignment
    flat = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    flat.grad = torch.zeros_like(flat)
    nn.utils.vector_to_parameters(flat.data, parameters)
    for p, grad in zip(parameters, flat.grad.split([p.numel() for p in parameters])):
        p.grad = grad.view_as(p)
    return flat


# ======== rollout =====================================================================================================
class Storage:
    """A rollout, and what goes over from one to the next.

    Attributes:
        samples: (T, N).
        frames: (T + 4, N, 84, 84) each frame once, with the 4 before the first step.
        first: (T, N) row of `frames` that is the first one to be seen at step t.
        log_std: (C,) of the rollout's policy.
        units: samples over all ranks: what minibatches are drawn from.
    """

    def __init__(self, args: Args, env: CameraEnv):
        T, N, spaces = args.num_steps, env.num_envs, env.spaces
        zeros = functools.partial(torch.zeros, T, N, device=args.device)
        fields = {"action": zeros(spaces.continuous or len(spaces.choices)), "params": zeros(spaces.outputs)}
        fields |= {"reward": zeros(), "value": zeros(), "final": zeros(SIZE, SIZE, dtype=torch.uint8)}
        fields |= {"terminated": zeros(dtype=torch.bool), "truncated": zeros(dtype=torch.bool)}
        self.samples = TensorDict(fields, [T, N], device=args.device)
        self.frames = torch.zeros(T + STACK, N, SIZE, SIZE, dtype=torch.uint8, device=args.device)
        self.units = args.num_envs * T

    def begin(self, env: CameraEnv, args: Args, iteration: int, carried: dict | None) -> None:
        """Starts the environments, or goes on where a checkpoint left them: a run and its continuation do so alike."""
        env.restart(args.seed, iteration * args.num_steps, args.stagger, carried)

    def put(self, t: int, **fields: Tensor) -> None:
        for name, x in fields.items():
            self.samples[name][t] = x

    def carry(self, env: CameraEnv) -> dict:
        """What `begin` goes on from."""
        return env.state()

    def stacked(self, rows: Tensor) -> Tensor:
        """Frames (B, 4, 84, 84) of samples t * N + n (B,), as the rollout saw them."""
        t, n = rows // self.first.shape[1], rows % self.first.shape[1]
        seen = torch.maximum(t[:, None] + torch.arange(STACK, device=t.device), self.first[t, n][:, None])
        return self.frames[seen, n[:, None]]

    def pick(self, batch: TensorDict, rows: Tensor) -> tuple[TensorDict, list[Tensor]]:
        """Some samples of a batch, with their frames."""
        return batch[rows].set("obs", self.stacked(rows)), []

    def finish(self, policy: ActorCritic, args: Args, ranks: Ranks) -> None:
        """Images need no statistics."""


@torch.no_grad()
def rollout(env: CameraEnv, policy: ActorCritic, store: Storage, args: Args, iteration: int, ranks: Ranks, timer) -> None:
    """T steps everywhere, across episodes, into `store`."""
    with timer("policy"):
        obs, store.log_std = env.stack, policy.log_std.clone()
        store.frames[:STACK] = obs.transpose(0, 1)
        noise = policy.noise(args.num_steps, env.num_envs, ranks, args.seed, 1, iteration)
    for t in range(args.num_steps):
        with timer("policy"):
            action, params, value = policy.act(obs, noise[t])
        with timer("env"):
            obs, reward, terminated, truncated, final = env.step(action)
        with timer("policy"):
            store.put(t, action=action, params=params, value=value, reward=reward, terminated=terminated, truncated=truncated)
            store.frames[t + STACK] = obs[:, -1]
            if final is not None:
                store.put(t, final=final)


@torch.no_grad()
def make_batch(env: CameraEnv, policy: ActorCritic, store: Storage, args: Args, ranks: Ranks, log: Metrics) -> TensorDict:
    """Log-probabilities and advantages of a rollout, all steps at once.

    Returns:
        (T * N,) samples: action, params, log_prob, advantage, target, value; `Storage.pick` adds the frames.
    """
    samples, (T, N) = store.samples, store.samples.shape
    reward, value, terminated, truncated = (samples[name] for name in ("reward", "value", "terminated", "truncated"))
    done = terminated | truncated
    starts = torch.arange(STACK, T + STACK - 1, device=done.device)[:, None] * done[:-1]  # (T - 1, N) rows of `frames`
    store.first = torch.cat([torch.zeros(1, N, dtype=torch.long, device=done.device), starts]).cummax(0).values
    final_values = torch.zeros_like(reward)
    late = (truncated & ~terminated).flatten().nonzero()[:, 0]  # (E,) waits for the device
    # N at a time, as in the rollout: for every size of a batch, cuDNN tries out its convolutions again
    for rows in torch.cat([late, late[:1].expand(-len(late) % N)]).split(N):
        t, n = rows // N, rows % N
        last = torch.cat([store.stacked(rows)[:, 1:], samples["final"][t, n][:, None]], 1)  # (N, 4, 84, 84)
        final_values[t, n] = policy(last)[1]
    learned, flags = reward.sign() if args.sign_rewards else reward, (terminated, truncated)
    advantage, target = gae(learned, value, *flags, final_values, policy(env.stack)[1], args.gamma, args.gae_lambda)
    returns, lengths = env.episodes(reward, done)
    log.mean("rollout/return", returns, where=done)
    log.mean("rollout/length", lengths, where=done)
    log.sum("rollout/episodes", done)
    log.mean("rollout/reward", reward)
    log.mean("rollout/value", value)
    log.mean("update/explained_variance", 1 - (target - value).var() / target.var().clamp(min=1e-12))
    for name, x in task_metrics(env.base).items():
        log.mean(name, x)
    batch = samples.select("action", "params", "value")
    batch.update({"log_prob": policy.log_prob(batch["params"], batch["action"]), "advantage": advantage, "target": target})
    return batch.flatten(0, 1)


# ======== loss ========================================================================================================
def ppo_loss(policy: ActorCritic, batch: TensorDict, states: list, old_log_std: Tensor, size: int, args: Args, log: Metrics):
    """Clipped surrogate, clipped value loss and entropy bonus of a minibatch.

    Args:
        batch: (B,) samples, or (T, n) for an LSTM, with its states (2, n, H) of actor and critic before the rollout.
        size: samples of the minibatch over all ranks; sums are divided by it.

    Returns:
        loss, KL(old | new), and the ratio.
    """
    params, value = policy.outputs(batch, states)
    ratio = torch.exp(policy.log_prob(params, batch["action"]) - batch["log_prob"])
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    surrogate = torch.minimum(batch["advantage"] * ratio, batch["advantage"] * clipped)
    error = (value - batch["target"]).square()
    if args.clip_value:
        near = batch["value"] + (value - batch["value"]).clamp(-args.clip, args.clip)
        error = torch.maximum(error, (near - batch["target"]).square())
    policy_loss, value_loss, entropy = -surrogate.sum() / size, 0.5 * error.sum() / size, policy.entropy(params)
    with torch.no_grad():
        kl = policy.kl(batch["params"], old_log_std, params)
        log.mean("update/loss", args.value_coef * 0.5 * error - surrogate - args.entropy_coef * entropy)
        log.mean("update/policy_loss", -surrogate)
        log.mean("update/value_loss", 0.5 * error)
        log.mean("update/entropy", entropy)
        log.mean("update/clip_frac", ratio != clipped)
        log.mean("update/kl", kl)
    loss = policy_loss - args.entropy_coef * (entropy.sum() / size) + args.value_coef * value_loss
    return loss, kl.sum() / size, ratio.detach()


# ======== train =======================================================================================================
def plan_minibatches(units: int, iteration: int, args: Args, ranks: Ranks) -> list[tuple[Tensor, int]]:
    """For every epoch, a new permutation of all samples (of the environments for an LSTM), cut into minibatches.

    Every rank draws the same permutation and keeps its own.

    Returns:
        Per minibatch: indices (n,) of this rank's units, and the number of samples over all ranks.
    """
    generator = seeded_generator(args.device, args.seed, 2, iteration)
    total, own, plan = args.num_envs, args.num_envs // ranks.world, []
    for _ in range(args.epochs):
        order = torch.randperm(units, generator=generator, device=args.device)
        for rows in order.tensor_split(args.minibatches):
            size = len(rows) * args.num_envs * args.num_steps // units
            if ranks.world > 1:  # sample t * total + n belongs to the rank of environment n
                rows = rows[rows % total // own == ranks.rank]
                rows = rows // total * own + rows % own
            plan.append((rows, size))
    return plan


def update(
    policy: ActorCritic, optimizer, batch: TensorDict, store: Storage, plan: list, args: Args, ranks: Ranks, log: Metrics
) -> None:  # fmt: skip
    """Epochs over a rollout, one optimizer step per minibatch of the plan."""
    rate, (flat,) = optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["params"]
    for i, (rows, size) in enumerate(plan):
        part, states = store.pick(batch, rows)
        normalize_advantages(part["advantage"], size, ranks)
        loss, kl, ratio = ppo_loss(policy, part, states, store.log_std, size, args, log)
        flat.grad.zero_()
        loss.backward()
        ranks.reduce(flat.grad)
        log.max("update/grad_norm", torch.nn.utils.clip_grad_norm_(flat, args.max_grad_norm))
        if i == 0:  # nothing is learned yet: rollout and update must agree
            log.max("update/first_ratio_error", (ratio - 1).abs().max() if ratio.numel() else loss)
        elif args.schedule == "adaptive":
            kl = ranks.reduce(kl)
            factor = torch.where(kl > 2 * args.target_kl, 1 / 1.5, torch.where(kl > args.target_kl / 2, 1.0, 1.5))
            rate.mul_(factor).clamp_(1e-5, 1e-2)
        optimizer.step()
    log.max("update/learning_rate", rate)
    log.max("update/action_std", policy.log_std.exp().sum() / max(len(policy.log_std), 1))


def train(args: Args, env: VecEnv, policy: ActorCritic, run: Run, ranks: Ranks) -> None:
    """The whole run: iterate, evaluate, summarise."""
    rate = torch.tensor(args.learning_rate, device=args.device)  # on the device, where the adaptive schedule changes it
    optimizer = run.restore_optimizer(torch.optim.Adam([flat_parameter(policy)], rate, eps=1e-5, fused=True))
    rate = optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"].to(args.device)
    store, timer, result, latest = Storage(args, env), StageTimer(args.device), {}, None
    begin, everywhere = run.state["iteration"], run.state.pop("carried", [None] * ranks.world)
    if len(everywhere) != ranks.world or (everywhere[0] and everywhere[0]["running"].shape[1] != env.num_envs):
        raise SystemExit(f"--resume {args.resume}: has other --num-envs or ranks; start a run with --checkpoint")
    carried = everywhere[ranks.rank]
    for iteration in range(begin, args.iterations):
        if carried or iteration == 0:
            store.begin(env, args, iteration, carried)
            carried = None
        if args.schedule != "adaptive":
            rate.fill_(args.learning_rate * (1 - iteration / args.iterations if args.schedule == "linear" else 1))
        log = Metrics(args.device, ranks)
        rollout(env, policy, store, args, iteration, ranks, timer)
        with timer("update"):
            batch = make_batch(env, policy, store, args, ranks, log)
            update(policy, optimizer, batch, store, plan_minibatches(store.units, iteration, args, ranks), args, ranks, log)
            store.finish(policy, args, ranks)
            metrics = log.read()  # the one transfer to the host
        if iteration == 0 and metrics["update/first_ratio_error"] > (0.05 if args.mixed_precision else 1e-3):
            raise SystemExit(f"the first ratio is off 1 by {metrics['update/first_ratio_error']:.1e}: a bug in this script")
        last = iteration + 1 == args.iterations
        save, test = (last or (every > 0 and (iteration + 1) % every == 0) for every in (args.save_every, args.eval_every))
        if save or test:
            carried = store.carry(env)
        if test and args.eval_episodes:
            result = evaluate(args, env, policy, ranks)
            metrics |= {"eval/return": result["mean"], "eval/length": result["length"]}
        run.log(iteration, metrics, timer.seconds(), args.num_envs * args.num_steps)
        latest = metrics.get("eval/return", metrics.get("rollout/return", latest))
        by_test = args.eval_every and args.eval_episodes  # else by the latest rollout
        score = metrics.get("eval/return" if by_test else "rollout/return", -math.inf)
        if (test if by_test else save) and run.improved(score):
            run.save("best", policy.save)
        if save:
            run.save(f"step_{iteration + 1:06d}", policy.save, optimizer, carried=ranks.gather(carried))
    if result:
        run.event(f"deterministic policy: {RESULT.format(**result)}")
    if args.capture_video:
        evaluate(args, env, policy, ranks, run)
    run.result(**{"return": latest, "eval": result, "assets": os.environ.get("ISAACSIM_ASSET_ROOT", "NVIDIA's")})


# ======== evaluate ====================================================================================================
RESULT = "return {mean:.2f} +- {std:.2f} over {episodes} episodes of {length:.0f} steps"


@torch.no_grad()
def evaluate(args: Args, env: CameraEnv, policy: ActorCritic, ranks: Ranks, film: Run | None = None) -> dict[str, float]:
    """Return of the deterministic policy in the first episode of each environment, from fixed starts.

    Args:
        film: gets a GIF of what up to 16 environments look like after every second step.

    Returns:
        mean, std (over episodes), length, episodes.
    """
    obs, _ = env.restart(args.eval_seed, stagger=False)
    count = max(1, min(args.eval_episodes, args.num_envs) // ranks.world)
    alive = torch.arange(env.num_envs, device=obs.device) < count  # (N,)
    sums, frames = torch.zeros(2, env.num_envs, device=obs.device), []  # (2, N) return, length
    for t in range(env.horizon):
        action, _, _ = policy.act(obs, None)
        obs, reward, terminated, truncated, _ = env.step(action)
        sums += alive * torch.stack([reward, torch.ones_like(reward)])
        alive &= ~(terminated | truncated)
        if film and t % 2 == 0 and len(frames) < 200:
            frames.append(env.image()[:16].clone())
        if t % 50 == 49 and not alive.any():  # no message between ranks is left out by this
            break
    if film:
        film.gif("policy", torch.stack(frames), every=2 * args.frame_skip, fps=0.5 / (args.frame_skip * env.base.step_dt))
    total = ranks.reduce(torch.stack([sums[0].sum(), sums[0].square().sum(), sums[1].sum()]))
    mean, square, length = (total / (count * ranks.world)).tolist()
    return {"mean": mean, "std": max(square - mean**2, 0) ** 0.5, "length": length, "episodes": count * ranks.world}


# ======== main ========================================================================================================
def main(args: Args) -> None:
    args.device, asked, args.task = pick_device(args.device), args.task, known_task(args.task)
    ranks = Ranks.start(args.device)
    cfg = task_config(args.task, args.device, args.num_envs // ranks.world, args.physics, args.overrides, {}, images=True)
    colour_camera(args.task, cfg)  # refuses a task that has none
    with Run(vars(args), __file__, ranks, args.exp_name, args.iterations, args.device, args.resume) as run:
        run.event(f"{run.dir}: {args.task} on {args.device}, {args.num_envs} envs, {args.num_steps} steps a rollout")
        if asked != args.task:
            run.event(f"{asked} is called {args.task} in this Isaac Lab")
        run.event(f"starting the simulator (its own output: {run.dir}/simulator.log)")
        with make_env(args, cfg, ranks, run.dir / f"simulator{ranks.rank or ''}.log") as env:
            torch.manual_seed(args.seed)  # of the weights
            policy = ActorCritic(env.spaces, args).to(args.device)
            if args.checkpoint and not args.resume:
                try:
                    policy.load(args.checkpoint)
                except Exception as error:  # safetensors and torch have many kinds
                    why = " ".join(str(error).split())
                    raise SystemExit(f"--checkpoint {args.checkpoint}: does not fit ({why})") from error
            run.restore(policy.load)
            if args.evaluate:
                result = evaluate(args, env, policy, ranks, run if args.capture_video else None)
                run.event(f"deterministic policy of {args.checkpoint}: {RESULT.format(**result)}")
                run.result(eval=result)
            else:
                train(args, env, policy, run, ranks)


if __name__ == "__main__":
    main(ARGS)
