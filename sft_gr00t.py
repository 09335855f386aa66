"""Imitation for GR00T N1.5 in Isaac Lab: flow matching on a scripted expert's demonstrations, the warm start RL needs.

    python sft_gr00t.py                                              # laptop: a tiny GR00T from scratch
    python sft_gr00t.py --checkpoint nvidia/GR00T-N1.5-3B            # a GPU of 80 GB: its head, in NVIDIA's recipe
    python sft_gr00t.py --checkpoint <folder> --dataset <LeRobot data set> --successes   # on data, of these its successes
    python sft_gr00t.py --evaluate --checkpoint runs/<name>/checkpoints/last
    torchrun --nproc_per_node=8 sft_gr00t.py --checkpoint <folder> --fsdp --tune all --precision fp32

How this differs from grpo_gr00t.py (what is not in `DIFFERS` is the same text):
- Demonstrations in the place of rollouts (`collect`): the task's own expert acts on privileged state; so that recoveries are
  seen, half of the episodes start from a random gripper pose, or the steps before an observation go astray, as its row says.
  Only episodes that succeed are kept, and no frame after success. Or they come from a LeRobot data set (`read`), where every
  step is a sample and the loss ends with the episode.
- The loss is GR00T's (`imitation_loss`): |v(x_t, t) - (action - noise)|^2 at t = (0.999 - Beta(1.5, 1)) / 0.999, masked to
  real dimensions (arXiv 2503.14734, section 2.1). There is no exploration, no base model and no critic.
- The whole network is trained, or its head alone (--tune head); from scratch, where no checkpoint is named.
- State and action statistics of the demonstrations go into experiment_cfg/metadata.json, in NVIDIA's layout; with a data set
  only where the checkpoint has none for the task: otherwise its own stay, and with them what it has learned.
- An exponential moving average of the weights is what is evaluated and saved.
- With torchrun every rank has its own environments, demonstrations and share of a batch; gradients are averaged, or, with
  --fsdp, weights, gradients and AdamW's state are spread over the ranks (`shard`).

A run: `collect` or `read` -> for each step `draw` -> `backward` (`imitation_loss` per micro-batch) -> AdamW -> moving
average -> `held_out_loss` now and then.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from common import (
    Metrics,
    Noise,
    Ranks,
    Run,
    StartBank,
    check_not_negative,
    check_positive,
    pick_device,
    run_name,
    success_rates,
)
from gr00t_n1d5.dataset import LeRobotData, LeRobotWriter, check_record, far_off, refuse_dataset
from gr00t_n1d5.embodiment import check_checkpoint, check_network, free_rows, refuse_checkpoint
from gr00t_n1d5.files import is_full_size
from tasks.gr00t import (
    TASKS,
    Prompts,
    Task,
    all_instructions,
    asking,
    check_instructions,
    find_task,
    find_tasks,
    make_task,
    own_observation,
    rank_task,
    refresh_observations,
    scene_states,
    start_from,
    task_config,
    task_names,
)
from tasks.randomize import Randomization, parse_axes

PARENT = "grpo_gr00t.py"
DIFFERS = {"Args", "parse", "check", "make_env", "Gr00tActor", "learning_rate", "train", "check_run", "main"}


# ======== Args ========================================================================================================
@dataclass
class Args:
    # general
    task: str | tuple[str, ...] = "Tabletop-Lift-Cube-v0"  # a row of TASKS that has an expert; or several, for ranks in turn
    instruction: str | tuple[str, ...] | None = None  # in place of the task's own: any sentence, or several of its own
    checkpoint: str | None = None  # what to start from: a folder or a hub id; left out: a tiny network from scratch
    embodiment_tag: str | None = None  # entry of metadata.json: to write (new_embodiment by default), or to evaluate
    seed: int = 1  # of the demonstrations, initial weights and training
    device: str = "auto"  # cpu, cuda, cuda:N, or auto
    physics: str | None = None  # Isaac Lab physics preset (newton_mjwarp, ...), or mujoco_c: a CPU's default
    renderer: str | None = None  # Isaac Lab renderer preset (newton_renderer, isaacsim_rtx, ...)
    randomize: tuple[str, ...] = ()  # what differs between episodes: camera:0.5, or all:0.5 (axes in tasks/randomize.py)
    num_envs: int = 128  # parallel environments over all ranks
    evaluate: bool = False  # evaluate --checkpoint, and nothing else
    check: bool = False  # look before a long run: does the task start, end and look as it should, does the expert succeed
    eval_every: int = 0  # optimizer steps between evaluations by the ODE, each of which leaves a checkpoint; 0: at the end
    eval_episodes: int = 256  # episodes of an evaluation (rounded up to whole batches of environments); 0: none
    eval_seed: int = 7_000_000  # of an evaluation's episode starts, the same for every evaluation
    exp_name: str | None = None  # the run's folder is runs/<exp-name>; made from script, task, seed and time by default

    # algorithm
    expert: str | None = None  # runs/<name> of ppo_isaac.py, whose policy demonstrates; None: the task's scripted expert
    demos: int = 5120  # expert episodes (rounded up to whole batches of environments)
    frames: int = 8  # observations kept of each, at most: the first one and some at random
    record: str | None = None  # folder that all of these episodes go to, too, as a LeRobot data set
    dataset: str | None = None  # a LeRobot data set in their place: a folder or a hub id; --task says which columns are meant
    successes: bool = False  # of it, the episodes that succeeded alone
    action_horizon: int = 8  # of a new network, where no checkpoint is named
    steps: int = 1000  # optimizer steps
    batch_size: int = 128  # samples per step over all ranks
    learning_rate: float = 1e-3  # AdamW's; 100 steps of warm-up, then a cosine to 2%
    tune: Literal["all", "head"] = "all"  # what is trained
    augment: bool = False  # random crops and colour jitter of the images
    denoise_steps: int = 4  # K, denoising steps of the evaluation

    # memory and speed
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: frozen backbone (--tune head), and TF32 in the head
    micro_batch_size: int = 128  # samples per forward pass; gradients are accumulated over a batch
    max_memory_gb: float | None = None  # budget [GB]: micro-batches are planned to fit it
    activation_checkpointing: bool = False  # recompute the blocks' activations in the backward pass: slower, smaller
    fsdp: bool = False  # with torchrun: spread weights, gradients and AdamW's state over the ranks (FSDP2), no copy on each


# a full-size checkpoint's settings: NVIDIA's recipe (head and DiT trained, backbone frozen), within a GPU of 80 GB
FULL = Args(
    num_envs=64, demos=1024, steps=10_000, batch_size=64, learning_rate=1e-4, tune="head", augment=True, precision="bf16",
    max_memory_gb=72.0,
)  # fmt: skip
WEIGHT_DECAY, MAX_GRAD_NORM = 1e-4, 1.0
ASTRAY = 4  # steps with noise before an observation, and none in the chunk that follows: nothing there would foretell it
EMA = 0.99  # decay of the weights' moving average


def parse() -> Args:
    """The command line, over the settings of a checkpoint's size."""
    args = tyro.cli(Args)
    default = FULL if args.checkpoint and is_full_size(args.checkpoint) else Args()
    return check(tyro.cli(Args, default=default))


def check(args: Args) -> Args:
    """Refuses what cannot work, before anything is loaded; names the run."""
    args.task = find_tasks(args.task, int(os.environ.get("WORLD_SIZE", 1)))
    check_instructions(args.task, args.instruction)
    if args.expert and not isinstance(args.task, str):
        raise SystemExit(f"--expert {args.expert}: is one task's; leave it out, or name one --task")
    if args.expert:
        find_teacher(args.expert, args.task)
    if args.record:
        check_record(args.record)
    if args.successes and not args.dataset:
        raise SystemExit("--successes: are those of a data set; name it with --dataset")
    for flag, given in (("expert", args.expert), ("record", args.record), ("evaluate", args.evaluate), ("check", args.check)):
        if args.dataset and given:
            raise SystemExit(f"--dataset {args.dataset}: takes the place of demonstrations; leave out --{flag}")
    if args.dataset and not isinstance(args.task, str):
        raise SystemExit(f"--dataset {args.dataset}: is one task's; name one --task")
    if args.dataset:
        with refuse_dataset(args.dataset):
            LeRobotData(args.dataset, TASKS[args.task].modalities, whole=False)
    for name in task_names(args.task):
        parse_axes(args.randomize, TASKS[name])
        if not (TASKS[name].expert or args.expert or args.evaluate or args.dataset):
            able = ", ".join(name for name, task in TASKS.items() if task.expert)
            raise SystemExit(
                f"--task {name}: has no scripted expert; name a run of ppo_isaac.py with --expert, or a --dataset ({able} "
                "have one)"
            )
    if args.check and args.evaluate:
        raise SystemExit("--check: looks at a run before it begins; leave out --evaluate")
    if args.evaluate and not args.checkpoint:
        raise SystemExit("--evaluate: name what to evaluate with --checkpoint")
    check_positive(
        num_envs=args.num_envs, demos=args.demos, steps=args.steps, batch_size=args.batch_size,
        learning_rate=args.learning_rate, denoise_steps=args.denoise_steps, micro_batch_size=args.micro_batch_size,
        max_memory_gb=args.max_memory_gb, frames=args.frames, action_horizon=args.action_horizon,
    )  # fmt: skip
    check_not_negative(seed=args.seed, eval_seed=args.eval_seed, eval_every=args.eval_every, eval_episodes=args.eval_episodes)
    world = int(os.environ.get("WORLD_SIZE", 1))
    for name, value in (("num-envs", args.num_envs), ("batch-size", args.batch_size)):
        if value % world:
            raise SystemExit(f"--{name} {value}: must be a multiple of {world} ranks")
    if args.fsdp and world == 1:
        raise SystemExit("--fsdp: one process has nobody to share with; start torchrun --nproc_per_node=2 (or more)")
    if args.fsdp and args.tune != "all":
        raise SystemExit(f"--fsdp: spreads what is trained with --tune all; leave it out with --tune {args.tune}")
    if args.precision != "fp32" and args.tune == "all" and not args.evaluate:
        raise SystemExit(
            f"--precision {args.precision}: the backbone is trained, in fp32; give --precision fp32, or --tune head"
        )
    kinds = len(set(embodiments(args.task).values()))
    if kinds > 1 and args.embodiment_tag and not args.evaluate:
        raise SystemExit(f"--embodiment-tag {args.embodiment_tag}: the tasks are of {kinds} embodiments; leave it out")
    for name in task_names(args.task):
        if args.evaluate:
            check_checkpoint(args.checkpoint, args.embodiment_tag, None, name, TASKS)
        elif args.checkpoint and check_network(args.checkpoint, TASKS[name].sizes).num_embodiments < kinds:
            raise SystemExit(f"--checkpoint {args.checkpoint}: has fewer embodiments than the tasks, {kinds}; leave it out")
    stem = "eval" if args.evaluate else "check" if args.check else Path(__file__).stem
    args.exp_name = run_name(args.exp_name, stem, "+".join(task_names(args.task)), args.seed)
    return args


def embodiments(tasks: str | tuple[str, ...]) -> dict[str, str]:
    """The tasks of a run, and the first one of each that has the same cameras and columns: they share an embodiment."""
    kinds = {name: str(TASKS[name].modalities) for name in task_names(tasks)}
    return {name: next(other for other in kinds if kinds[other] == kind) for name, kind in kinds.items()}


def find_teacher(run: str, task: str) -> tuple[Path, dict]:
    """The best checkpoint of a run of ppo_isaac.py, or a checkpoint itself, and its policy.json; refuses what does not fit."""
    folders = [folder for folder in (Path(run) / "checkpoints" / "best", Path(run)) if (folder / "policy.json").is_file()]
    if not folders:
        raise SystemExit(
            f"--expert {run}: no policy of ppo_isaac.py there (policy.json); leave out --expert for the scripted one"
        )
    try:
        about = json.loads((folders[0] / "policy.json").read_text())
        row, actions, recurrent = find_task(about["task"], say=False), about["spaces"]["continuous"], about["recurrent"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"--expert {run}: no policy of ppo_isaac.py there ({error!r})") from error
    except SystemExit as error:
        raise SystemExit(f"--expert {run}: {error}") from error
    if row != task or actions != TASKS[task].sizes["action"]:
        found = f"{about['task']} with {actions} actions"
        raise SystemExit(f"--expert {run}: a policy for {found}, not for {task} with {TASKS[task].sizes['action']}")
    if recurrent:
        raise SystemExit(f"--expert {run}: has an LSTM, and experts have no memory here; train one without --recurrent")
    return folders[0], about


ARGS = parse() if __name__ == "__main__" else None  # heavy imports come after, so --help and refusals are instant

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from gr00t_n1d5.config import Gr00tConfig
from gr00t_n1d5.network import Gr00tN1d5
from gr00t_n1d5.policy import Gr00tPolicy, plan_memory, take
from gr00t_n1d5.processor import Augmentation, Gr00tProcessor, load_tokenizer, tiny_tokenizer
from tasks.check import check_expert, check_task, report
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


@contextlib.contextmanager
def make_env(args: Args, image_size: int, run_dir: Path, ranks: Ranks):
    """Starts the simulator and yields a ChunkEnv; what the simulator prints goes to a file."""
    own_groups = tuple(find_teacher(args.expert, args.task)[1]["obs_groups"]) if args.expert else ()
    task, num_envs = rank_task(args.task), args.num_envs // ranks.world
    axes = parse_axes(args.randomize, TASKS[task])
    cfg = task_config(task, args.device, num_envs, image_size, args.physics, args.renderer, own_groups=own_groups, axes=axes)
    log = run_dir / f"simulator{ranks.rank or ''}.log"
    with start_simulator(cfg, args.device, cameras=bool(TASKS[task].cameras), log=log) as ready:
        env = ChunkEnv(args, cfg)
        env.reset(seed=0)
        ready()
        yield env
        env.env.close()


# ======== GR00T wrapper ===============================================================================================
class Gr00tActor(Gr00tPolicy):
    """GR00T N1.5 to train or to evaluate; acts by the ODE."""

    def __init__(self, args: Args, data: LeRobotData | None = None):
        task = TASKS[rank_task(args.task)]
        super().__init__(
            args.checkpoint, args.embodiment_tag, None, task, known_texts(args, task, data), args.device,
            args.precision, None if args.evaluate else initial(args, data), [TASKS[name] for name in task_names(args.task)],
        )  # fmt: skip
        self.trains_backbone = args.tune == "all"
        self.net.backbone.requires_grad_(self.trains_backbone)
        self.chunk, self.steps, self.micro_batch_size = self.action_shape[0], args.denoise_steps, args.micro_batch_size
        self.accelerate(compiled=False, checkpointing=args.activation_checkpointing)

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks that gradients pass through."""
        backbone = self.net.backbone
        own = [*backbone.language_model.layers, *backbone.vision_model.encoder.layers] if self.trains_backbone else []
        return [*super().blocks(), *own]

    @torch.no_grad()
    def act(self, obs: TensorDict, noise: Noise, explore: bool = False) -> TensorDict:
        """Actions by the ODE: action (N, chunk, d) in the simulator's units; an imitated policy does not explore."""
        start, actions = noise.normal(len(obs), *self.action_shape), []  # (N, H, A)
        for part, x in zip(obs.split(self.micro_batch_size), start.split(self.micro_batch_size)):
            x = self.net.action_head.sample(self.encode(part), self.embodiment(len(x)), x, self.steps)
            actions.append(self.unnormalize(x))
        return TensorDict({"action": torch.cat(actions)}, len(obs))

    def weights(self) -> dict[str, Tensor] | None:
        """What `shard` has spread, whole, on rank 0's host; every rank has to send its part. None: nothing is spread."""
        if not isinstance(self.net.backbone, FSDPModule):
            return None
        return get_model_state_dict(self.net, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def known_texts(args: Args, task: Task, data: LeRobotData | None) -> tuple[str, ...]:
    """The task's, which evaluations number, and those that a data set has besides."""
    return tuple(dict.fromkeys([*task.texts(args.instruction), *(data.texts if data else ())]))


def knows_task(args: Args) -> bool:
    """Whether the checkpoint has statistics for the task's columns, by which a data set is read then."""
    if args.dataset and args.checkpoint:
        with contextlib.suppress(SystemExit):
            check_checkpoint(args.checkpoint, args.embodiment_tag, None, args.task, TASKS)
            return True
    return False


def initial(args: Args, data: LeRobotData | None = None) -> tuple[Gr00tN1d5, Gr00tProcessor]:
    """What training starts from; its statistics are blank until there are demonstrations, or the checkpoint's."""
    tasks = [TASKS[name] for name in task_names(args.task)]
    if not args.checkpoint:
        torch.manual_seed(args.seed)
        words = sorted({word for task in tasks for text in known_texts(args, task, data) for word in text.split()})
        sizes = {f"{kind}_dim": max(least, *(x.sizes[kind] for x in tasks)) for kind, least in (("action", 4), ("state", 8))}
        sizes |= {"vocab_size": max(32, len(words) + 16), "max_text_tokens": max(16, len(words) + 8)}
        sizes |= {"num_embodiments": len(set(embodiments(args.task).values()))}
        net = Gr00tN1d5(Gr00tConfig.tiny(**sizes, action_horizon=args.action_horizon)).eval()
        return net, blank_processor(args, net.config, tiny_tokenizer(words, net.config))
    with refuse_checkpoint(args.checkpoint):
        if knows_task(args):
            processor = Gr00tProcessor.from_pretrained(args.checkpoint, None, args.embodiment_tag, None, tasks[0])
        else:
            processor = blank_processor(args, check_network(args.checkpoint), load_tokenizer(args.checkpoint))
        dtype = torch.float32 if args.precision == "fp32" else None
        return Gr00tN1d5.from_pretrained(args.checkpoint, dtype, config=processor.config), processor


def blank_processor(args: Args, config: Gr00tConfig, tokenizer) -> Gr00tProcessor:
    """A processor for this rank's task that knows the embodiments of all of a run's, without statistics."""
    found = {}
    for name in task_names(args.task):
        blank = (torch.zeros(1, TASKS[name].sizes[kind]) for kind in ("state", "action"))
        found[name] = make_processor(args, config, tokenizer, *blank, task=name)
    processor = found[rank_task(args.task)]
    for other in found.values():
        processor.embodiment.metadata.update(other.embodiment.to_dict())
    return processor


def make_processor(
    args: Args, config: Gr00tConfig, tokenizer, state: Tensor, action: Tensor, size: int = 1, task: str | None = None
) -> Gr00tProcessor:
    """A processor with the statistics of states (S, d) and actions (S, d), for cameras of `size` pixels.

    Several embodiments have entries called after their tasks, and layers that no known tag has.
    """
    task = task or rank_task(args.task)
    kinds = embodiments(args.task)
    tags, tag, row = list(dict.fromkeys(kinds.values())), args.embodiment_tag or "new_embodiment", None
    if len(tags) > 1:
        tag, row = kinds[task], free_rows(config)[tags.index(kinds[task])]
    task = TASKS[task]
    data = [dict(zip(keys, x.split(list(keys.values()), 1))) for keys, x in ((task.state, state), (task.action, action))]
    video = {name: {"resolution": [size, size], "channels": 3, "fps": 25} for name in task.cameras}
    return Gr00tProcessor.from_statistics(config, tag, *data, video, tokenizer, embodiment_id=row)


def shard(policy: Gr00tActor, ranks: Ranks) -> None:
    """Spreads the parameters over the ranks (FSDP2); a block is gathered while it runs, and freed afterwards."""
    head, backbone = policy.net.action_head, policy.net.backbone
    cross = [block.attn1 for block in head.model.transformer_blocks[::2]]  # `encode` asks them for keys and values
    mesh = init_device_mesh(policy.device.type, (ranks.world,))
    for module in (*cross, *policy.blocks(), head, backbone):
        # also the outermost ones: what stays gathered would miss a change of the shards (the moving average)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for module in cross:
        register_fsdp_forward_method(module, "key_value")
    for name in ("encode", "sample", "flow_matching_loss"):
        register_fsdp_forward_method(head, name)


# ======== rollout =====================================================================================================
def episode_seed(seed: int, iteration: int, ranks: Ranks) -> int:
    """Seed of an iteration's starts; differs by rank."""
    return int(np.random.SeedSequence((seed, iteration, ranks.rank)).generate_state(1)[0] >> 1)


def teacher(args: Args) -> Callable:
    """The policy of a run of ppo_isaac.py as an expert: the most likely actions (N, d) for the task's own observations."""
    import ppo_isaac

    folder, about = find_teacher(args.expert, args.task)
    own = dataclasses.replace(ppo_isaac.task_args(checkpoint=str(folder)), device=args.device)
    spaces = {name: tuple(x) if isinstance(x, list) else x for name, x in about["spaces"].items()}
    policy = ppo_isaac.ActorCritic(ppo_isaac.Spaces(**spaces), own).to(args.device)
    policy.load(folder)

    def act(env) -> Tensor:
        obs = own_observation(env, own.obs_groups)
        obs = obs[:, [i for i in range(obs.shape[1]) if i not in own.hide_obs]]
        if obs.shape[1:] != policy.spaces.obs:
            raise SystemExit(f"--expert {args.expert}: observes {policy.spaces.obs[0]} columns, {args.task} has {obs.shape[1]}")
        return policy.act(obs, None)[0]

    return act


def collect(
    args: Args, env: ChunkEnv, horizon: int, run: Run, ranks: Ranks, writer: LeRobotWriter | None = None
) -> tuple[TensorDict, TensorDict]:
    """Runs the task's expert, or a teacher; some observations of each success, with the `horizon` actions that followed.

    A writer gets all steps of all episodes up to their ends, and the actions that are to be imitated.

    Returns:
        demonstrations to train on, and those of one more batch of environments to hold out: images, state and prompt as in
        `ChunkEnv.observe`, action (S, horizon, d), this rank's, on the host.
    """
    task, expert = env.task, teacher(args) if args.expert else env.task.expert
    done = min(task.demo_steps or task.horizon, task.horizon)
    T = min(2 * done, task.horizon)
    off = torch.cat([torch.full((n,), task.demo_noise.get(key, 0.0), device=args.device) for key, n in task.action.items()])
    terms = {name: env.env.event_manager.get_term_cfg(name).params for name in task.demo_params}
    usual = {name: dict(params) for name, params in terms.items()}
    for name, params in terms.items():
        params.update(task.demo_params[name])
    latest = min(done, T - horizon)  # a chunk of actions must follow every kept observation
    rng, samples, successes, batches = np.random.default_rng(args.seed), [], 0, math.ceil(args.demos / args.num_envs)
    apart = horizon + ASTRAY if task.demo_noise else 1
    for b in range(batches + 1):
        seed, kept, actions = episode_seed(args.seed, b, ranks), [], []
        with asking(env, task.unseen):
            obs, noise = env.reset(seed), torch.Generator(args.device).manual_seed(seed)
        if writer:
            writer.begin(seed, [task.texts(args.instruction)[i] for i in obs["prompt"].tolist()])
        moments = np.arange(apart + rng.integers(apart), latest + 1, apart)
        times = {0, *rng.choice(moments, min(args.frames - 1, len(moments)), replace=False).tolist()}
        for t in range(T):
            running, obs = ~env.ended, env.observe() if t and (writer or t in times) else obs
            if t in times:
                kept.append((t, obs, ~env.success))
            action = expert(env.env)
            actions.append(action.clamp(-task.action_limit, task.action_limit) if task.action_limit else action)
            executed = actions[-1]
            if task.demo_noise and any(t < moment <= t + ASTRAY for moment in times):
                executed = executed + off * torch.randn(executed.shape, device=args.device, generator=noise)
            env.step_chunk(executed[:, None], last=True)
            if writer:
                writer.step(obs["images"], obs["state"], actions[-1], running, env.success)
            if t + 1 >= kept[-1][0] + horizon and env.ended.all():  # nobody has more to show
                break
        actions = torch.stack(actions, 1)  # (N, T, d)
        whole = [seen.set("action", actions[:, t : t + horizon])[before & env.success] for t, seen, before in kept]
        samples.append(torch.cat(whole).cpu())  # all of them are large
        successes += int(env.success.sum()) if b < batches else 0
        if b < batches and (b % 10 == 9 or b + 1 == batches):
            count, all_successes = (b + 1) * args.num_envs, sum(ranks.gather(successes))
            run.event(f"demonstrations: {count}, expert success {all_successes / count:.3f}")
    for name, params in terms.items():
        params.update(usual[name])
    return torch.cat(samples[:-1]), samples[-1]


def read(args: Args, data: LeRobotData, policy: Gr00tActor, run: Run, ranks: Ranks) -> tuple[TensorDict, TensorDict]:
    """This rank's share of a data set as `collect` has it, with `real`: the actions before an episode's end.

    A twentieth of the episodes is held out, unless there are fewer than 20 for each rank.
    """
    order = np.random.default_rng(args.seed).permutation(len(data.episodes)).tolist()
    held = len(order) // 20 if len(order) >= 20 * ranks.world else 0
    if len(order) < ranks.world:
        raise SystemExit(f"--dataset {args.dataset}: {len(order)} episodes are too few for {ranks.world} ranks; start fewer")
    size = TASKS[args.task].image_size or policy.camera_size
    prompts = torch.tensor([policy.texts.index(text) for text in data.texts])
    parts = []
    for rows in (order[held:], order[:held]):
        episodes = [data.episodes[i] for i in sorted(rows[ranks.rank :: ranks.world])]
        with refuse_dataset(args.dataset):
            samples = data.samples(episodes, policy.action_shape[0], size, run.dir) if episodes else TensorDict({}, 0)
        parts.append(samples.set("prompt", prompts[samples["prompt"]]) if episodes else samples)
    run.event(f"{args.dataset}: {len(order)} episodes, {held} of them held out; {'; '.join(data.texts)}")
    if knows_task(args) and (keys := far_off(policy.processor.embodiment, data)):
        run.event(f"warning: the data are far from what the checkpoint was trained on: {keys}")
    return parts[0], parts[1]


# ======== loss ========================================================================================================
def draw(args: Args, policy: Gr00tActor, samples: int, n: int, generator: torch.Generator) -> TensorDict:
    """The random numbers of n samples, on the host: row of the demonstrations, noise (n, H, A), time, augmentation."""
    drawn = {
        "row": torch.randint(samples, (n,), generator=generator),
        "noise": torch.randn(n, *policy.action_shape, generator=generator),
        "t": policy.net.action_head.sample_time(n, generator),
    }
    return TensorDict(drawn | (Augmentation.draw(n, generator)._asdict() if args.augment else {}), n)


def imitation_loss(policy: Gr00tActor, batch: TensorDict, drawn: TensorDict) -> Tensor:
    """GR00T's flow-matching loss, a scalar, of demonstrations (B,) with these random numbers."""
    augmentation = Augmentation(*(drawn[name] for name in Augmentation._fields)) if "crop" in drawn.keys() else None
    features = policy.features(batch, augmentation)  # (B, L, D); without a graph where the backbone is frozen
    context = policy.encode(TensorDict({**batch, "features": features}, len(batch)))
    target = policy.processor.normalize_action(batch["action"])  # (B, H, A)
    mask = torch.zeros_like(target)
    mask[..., : policy.valid] = batch["real"][..., None].float() if "real" in batch.keys() else 1.0
    noise, t = (drawn[name].to(policy.device) for name in ("noise", "t"))
    return policy.net.action_head.flow_matching_loss(context, policy.embodiment(len(batch)), target, mask, noise, t)


def backward(policy: Gr00tActor, demos: TensorDict, drawn: TensorDict) -> Tensor:
    """Adds a batch's gradients up, one micro-batch at a time; the loss without its graph."""
    total = torch.zeros((), device=policy.device)
    for part in drawn.split(policy.micro_batch_size):
        loss = imitation_loss(policy, take(demos, part["row"], policy.device), part) * (len(part) / len(drawn))
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def held_out_loss(policy: Gr00tActor, unseen: TensorDict, drawn: TensorDict) -> Tensor:
    """The loss, a scalar, of demonstrations that nothing was trained on: when it rises, more steps only overfit."""
    parts = drawn.split(policy.micro_batch_size)
    losses = [imitation_loss(policy, take(unseen, part["row"], policy.device), part) * len(part) for part in parts]
    return torch.stack(losses).sum() / len(drawn)


# ======== train =======================================================================================================
def learning_rate(args: Args, step: int) -> float:
    """Linear warm-up over 100 steps, then a cosine to 2%."""
    return args.learning_rate * min(1.0, (step + 1) / 100) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / args.steps)))


def train(
    args: Args, env: ChunkEnv | None, policy: Gr00tActor, run: Run, ranks: Ranks, data: LeRobotData | None = None
) -> None:
    """Collects, or reads; trains, evaluates and saves."""
    if data:
        demos, unseen = read(args, data, policy, run, ranks)
    else:
        writes = (
            LeRobotWriter(args.record, env.task.modalities, 1 / env.env.step_dt) if args.record else contextlib.nullcontext()
        )
        with writes as writer:
            demos, unseen = collect(args, env, policy.chunk, run, ranks, writer)
    tag = policy.processor.embodiment.tag
    action = demos["action"][demos["real"]] if data else demos["action"].flatten(0, 1)
    every = ranks.gather((tag, demos["state"], action))
    samples = sum(len(state) for _, state, _ in every)
    state, action = (torch.cat(x) for x in zip(*(x for of, *x in every if of == tag)))  # of all ranks with this embodiment
    if not len(demos):
        raise SystemExit(f"--demos {args.demos}: no demonstration of this process succeeded; give more, or a better --expert")
    tokenizer, size = policy.processor.tokenizer, demos["images"].shape[2]
    if not knows_task(args):
        policy.processor = make_processor(args, policy.processor.config, tokenizer, state, action, size).to(args.device)
    for entries in ranks.gather(policy.processor.embodiment.to_dict()):
        policy.processor.embodiment.metadata.update(entries)
    shared = {} if policy.trains_backbone else {id(policy.net.backbone): policy.net.backbone}  # nothing to average there
    average = copy.deepcopy(policy, shared).requires_grad_(False)
    if args.fsdp:
        shard(policy, ranks)
        shard(average, ranks)
    parameters = policy.trainable()
    smooth = [p for p, q in zip(average.net.parameters(), policy.net.parameters()) if q.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = policy.device.type == "cuda"  # without temporaries of the weights' size
    optimizer = torch.optim.AdamW(groups, args.learning_rate, betas=(0.9, 0.99), fused=fused)
    generator = torch.Generator().manual_seed(args.seed + 1_000_003 * ranks.rank)  # a rank draws of its own samples
    fixed = None
    if all(ranks.gather(len(unseen))):
        n = 4 * args.batch_size // ranks.world
        fixed = draw(args, policy, len(unseen), n, torch.Generator().manual_seed(args.seed)).select("row", "noise", "t")
    run.event(f"{samples} samples, {sum(p.numel() for p in parameters) / 1e6:.2f} M trained parameters")
    log, result, began = Metrics(args.device, ranks), {}, time.monotonic()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        optimizer.zero_grad()
        drawn = draw(args, policy, len(demos), args.batch_size // ranks.world, generator)
        log.mean("update/loss", backward(policy, demos, drawn))
        if ranks.world > 1 and not args.fsdp:  # which averages by itself
            ranks.sum_gradients(parameters)
            torch._foreach_div_([p.grad for p in parameters], ranks.world)
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        decay = min(EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_(smooth, [p.detach() for p in parameters], 1 - decay)
        last = step + 1 == args.steps
        evaluated = last or (args.eval_every and (step + 1) % args.eval_every == 0)
        if evaluated or (step + 1) % 50 == 0:
            if fixed is not None:
                log.mean("eval/loss", held_out_loss(average, unseen, fixed))
            metrics = log.read() | {"update/learning_rate": learning_rate(args, step)}
            log, seconds = Metrics(args.device, ranks), {"update": time.monotonic() - began}
            if evaluated and args.eval_episodes:
                result = evaluate(args, env, average, ranks)
                metrics |= {"eval/ode_success": result["mean"], "eval/episodes": result["episodes"]}
            run.log(step, metrics, seconds, steps=0)
            began = time.monotonic()
        if evaluated:
            weights = average.weights()
            run.save("last" if last else f"step_{step + 1:06d}", lambda folder, weights=weights: average.save(folder, weights))
    instructions = all_instructions(args.task, args.instruction).names
    run.result(ode_success=result, loss=metrics["update/loss"], samples=samples, instructions=instructions)


def check_run(args: Args, env: ChunkEnv, policy: Gr00tActor, run: Run, ranks: Ranks) -> None:
    """A look before a long run: a line per check, exit status 1 where one fails. Nothing is trained."""
    expert, began = teacher(args) if args.expert else env.task.expert, time.monotonic()
    episode, found = check_task(env, expert, None, policy.chunk, episode_seed(args.seed, 0, ranks))
    batches, seconds = math.ceil(args.demos / args.num_envs) + 1, time.monotonic() - began
    report(found + check_expert(episode, policy.texts, batches, seconds), run, ranks)


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


# ======== main ========================================================================================================
def main(args: Args) -> None:
    args.device = pick_device(args.device)
    ranks, data = Ranks.start(args.device), None
    if args.dataset:
        with refuse_dataset(args.dataset):
            data = LeRobotData(args.dataset, TASKS[args.task].modalities).load(args.successes)
    policy = Gr00tActor(args, data)
    plan = "evaluation" if args.evaluate else "spread over the ranks"
    if not args.evaluate and not args.fsdp:
        average = {"moving average": 4 * sum(p.numel() for p in policy.trainable())}
        _, policy.micro_batch_size, plan = plan_memory(
            policy, args.batch_size // ranks.world, 1, "off", args.micro_batch_size, args.max_memory_gb,
            args.activation_checkpointing, False, average,
        )  # fmt: skip
    with Run(vars(args), __file__, ranks, args.exp_name, args.steps, args.device) as run:
        run.event(f"{run.dir}: {' and '.join(task_names(args.task))} on {args.device}, {args.num_envs} envs; {plan}")
        run.event(f"instructions: {'; '.join(all_instructions(args.task, args.instruction).names)}")
        if data and not args.eval_episodes:
            train(args, None, policy, run, ranks, data)
            return
        run.event(f"starting the simulator (its own output: {run.dir}/simulator.log)")
        with make_env(args, policy.camera_size, run.dir, ranks) as env:
            if args.check:
                check_run(args, env, policy, run, ranks)
            elif args.evaluate:
                run.result(ode_success=evaluate(args, env, policy, ranks))
            else:
                train(args, env, policy, run, ranks, data)


if __name__ == "__main__":
    main(ARGS)
