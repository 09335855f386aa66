"""What the scripts build their actors on: a checkpoint, its prompts and a device, and what training takes of memory."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from gr00t_n1d5.config import Gr00tConfig
from gr00t_n1d5.embodiment import choose_embodiment, refuse_checkpoint
from gr00t_n1d5.network import ActionContext, ActionHead, Gr00tN1d5, recompute
from gr00t_n1d5.processor import Augmentation, Gr00tProcessor, pad_prompts


class Gr00tPolicy(nn.Module):
    """GR00T N1.5 from a checkpoint, sliced to one embodiment, between raw numbers and the network's.

    Observations are TensorDicts of B samples: images (B, V, H, W, 3) uint8 or features (B, L, D), state (B, d) in the
    simulator's units, prompt (B,) int64, the index of the instruction. Velocities, means and log-probabilities are fp32.
    """

    trains_backbone = False  # gradients reach the backbone: features are of no use after an optimizer step

    def __init__(
        self,
        checkpoint: str,
        embodiment_tag: str | None,
        data_config: str | None,
        row: Any,
        texts: tuple[str, ...],
        device: str,
        precision: str = "fp32",
        parts: tuple[Gr00tN1d5, Gr00tProcessor] | None = None,
        rows: Sequence[Any] = (),
    ):
        """
        Args:
            checkpoint: a folder or a hub id.
            embodiment_tag, data_config: entry of its metadata.json, and how it is read: `read_embodiment`.
            row: of TASKS: what the task gives and takes (`modalities`, see `Gr00tProcessor.connect`), and the form of its
                prompts (`bracketed`, `pad_prompt`, see `Gr00tProcessor.prompt`).
            texts: the instructions.
            precision: fp32; bf16: the frozen backbone in bfloat16, fp32 products on a GPU in TF32; fp8: bf16, and the
                backbone's linear layers in float8.
            parts: a network and a processor in place of the checkpoint's.
            rows: of TASKS, which other processes have; their embodiments' layers are kept beside this one's.

        Raises SystemExit, in one line, where the checkpoint cannot be read or does not fit the task.
        """
        super().__init__()
        net, processor = parts or (None, None)
        with refuse_checkpoint(checkpoint):  # all that needs no weights comes first
            self.processor = processor or Gr00tProcessor.from_pretrained(checkpoint, None, embodiment_tag, data_config, row)
            self.processor.connect(row.modalities)
        views = len(row.modalities["video"])
        try:
            prompts = [self.processor.prompt(text, views, row.bracketed) for text in texts]
            prompts, lengths = pad_prompts(prompts, row.pad_prompt)
        except ValueError as error:
            raise SystemExit(f"--instruction: {error}") from error
        with refuse_checkpoint(checkpoint):
            net = net or Gr00tN1d5.from_pretrained(checkpoint, config=self.processor.config)
            metadata, config = self.processor.embodiment.metadata, self.processor.config
            others = [choose_embodiment(metadata, embodiment_tag, data_config, x).id(config) for x in rows if x is not row]
            self.embodiments = self.processor.embodiment_id, others
            self.net = net.slice_embodiment(*self.embodiments)
        self.texts, self.views, self.bf16 = texts, views, precision != "fp32"
        self.valid = self.processor.valid_action_dims
        self.padded = row.pad_prompt is not None  # the head sees the padding, as RLinf's does
        self.mixed = not self.padded and len(set(lengths.tolist())) > 1  # it does not
        self.net.backbone.requires_grad_(False).to(device)
        self.net.action_head.float().to(device)  # fp32: means, log-probabilities and optimizer decide
        self.processor.to(device)
        self.register_buffer("prompts", prompts.to(device), persistent=False)  # (P, L)
        self.register_buffer("lengths", lengths.to(device), persistent=False)  # (P,) without padding
        if torch.device(device).type == "cuda":
            torch.set_float32_matmul_precision("high" if self.bf16 else "highest")
            torch.backends.cudnn.allow_tf32 = self.bf16  # of the one convolution, too
            if precision == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
                raise SystemExit("--precision fp8: this GPU has no float8 products (those from Ada on have); use bf16")
        if precision == "fp8":
            self.net.backbone.to_fp8()

    @property
    def device(self) -> torch.device:
        return self.prompts.device

    @property
    def action_shape(self) -> tuple[int, int]:
        """(H, A): the model's action horizon, and its action dimensions with padding."""
        return self.net.config.action_horizon, self.net.config.action_dim

    @property
    def camera_size(self) -> int:
        """Height and width of the cameras [px]."""
        return self.processor.camera_size

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks that gradients pass through."""
        head = self.net.action_head
        return [*head.model.transformer_blocks, *head.vl_self_attention.transformer_blocks]

    def accelerate(self, compiled: bool, checkpointing: bool) -> None:
        """Recomputes activations in the backward pass; compiles all blocks, of which equal ones share one compilation."""
        if checkpointing:
            for block in self.blocks():
                recompute(block)
        if compiled:
            compile_blocks(self)

    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.net.parameters() if p.requires_grad]

    def embodiment(self, n: int) -> Tensor:
        """(n,) rows of the embodiment's own layers, which know theirs: `Gr00tN1d5.slice_embodiment`."""
        return torch.zeros(n, dtype=torch.long, device=self.device)

    def features(self, obs: TensorDict, augmentation: Augmentation | None = None) -> Tensor:
        """Backbone features (B, L, D): those that were kept, or computed from the images."""
        if "features" in obs.keys():
            return obs["features"]
        with torch.autocast(self.device.type, torch.bfloat16, self.bf16):
            lengths = self.lengths[obs["prompt"]] if self.padded else None
            pixels = self.processor.images(obs["images"], augmentation)
            features = self.net.backbone(self.prompts[obs["prompt"]], pixels, lengths)
        return features.bfloat16() if self.bf16 else features

    def feature_buffer(self, chunks: int, envs: int, cache: str) -> Tensor | None:
        """Where the features of a rollout wait for the update, (T, N, L, D); None where they are computed again.

        Args:
            cache: gpu, cpu (host memory, pinned where there is a GPU) or off.
        """
        if cache == "off" or self.trains_backbone:
            return None
        shape = chunks, envs, self.prompts.shape[1], self.net.config.text_hidden_size
        dtype = torch.bfloat16 if self.bf16 else next(self.net.backbone.parameters()).dtype
        if cache == "cpu":
            return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
        return torch.empty(shape, dtype=dtype, device=self.device)

    def encode(self, obs: TensorDict, head: ActionHead | None = None) -> ActionContext:
        """What the denoising steps need of an observation, by the policy's head or another one; in fp32.

        With a backbone in bfloat16, products are so here, too, as NVIDIA trained them: half of a call's head, two thirds of
        an update's. The denoising steps, whose means and densities make the ratio, are not.
        """
        lengths, state = self.lengths[obs["prompt"]] if self.mixed else None, self.processor.normalize_state(obs["state"])
        features, head = self.features(obs), head or self.net.action_head
        with torch.autocast(self.device.type, torch.bfloat16, self.bf16):
            return head.encode(features, state, self.embodiment(len(state)), lengths).float()

    def velocity(self, x: Tensor, k: Tensor, steps: int, context: ActionContext, head: ActionHead | None = None) -> Tensor:
        """Velocity (B, H, A) at chain states x (B, H, A) before denoising step k (B,) of `steps`."""
        head = head or self.net.action_head
        return head.velocity(x, (k * head.config.num_timestep_buckets) // steps, self.embodiment(len(x)), context)

    def unnormalize(self, x: Tensor) -> Tensor:
        """The network's actions (B, H, A) in the simulator's units (B, H, d)."""
        return self.processor.unnormalize_action(x)

    def save(self, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
        """Writes a checkpoint in NVIDIA's layout: weights (given ones, or its own), config.json, metadata.json, tokenizer."""
        self.net.save_pretrained(folder, weights=weights)
        self.processor.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Takes over the action head of what `save` wrote."""
        net = Gr00tN1d5.from_pretrained(folder).slice_embodiment(*self.embodiments)
        self.net.action_head.load_state_dict(net.action_head.state_dict())


# ------------------------------------------------------------------------------------------------------------------
# samples that wait for the update
# ------------------------------------------------------------------------------------------------------------------
def compile_blocks(module: nn.Module) -> None:
    """torch.compile of all transformer blocks, of which equal ones share one compilation."""
    # each kind of block for features, sampling, update and base model, with tails of batches: more than 8
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for block in module.modules():
        if type(block).__name__ in ("SiglipEncoderLayer", "Qwen3DecoderLayer", "DiTBlock", "SelfAttentionBlock"):
            block.compile()


def sample_buffer(chunk: TensorDict, length: int) -> TensorDict:
    """Empty samples (T, N) for `length` chunks like this one (N,)."""
    return TensorDict({name: x.new_empty(length, *x.shape) for name, x in chunk.items()}, (length, *chunk.batch_size))


def take(samples: TensorDict, rows: Tensor, device: str) -> TensorDict:
    """Samples (B,) with these indices (B,), which lie on the host, on the training device.

    Fields may lie on the host; what the device copies there has to have arrived.
    """
    found, cuda = {}, torch.device(device).type == "cuda"
    there = (rows.pin_memory() if cuda else rows).to(device, non_blocking=True)
    for name, x in samples.items():
        if x.device == there.device:
            found[name] = x[there]
        else:  # gathered in pinned memory, whose copy is queued: the host would wait for any other
            part = torch.empty(len(rows), *x.shape[1:], dtype=x.dtype, pin_memory=cuda)
            found[name] = torch.index_select(x, 0, rows, out=part).to(device, non_blocking=True)
    return TensorDict(found, len(rows))


def activation_bytes(config: Gr00tConfig, length: int, views: int, backbone: bool, checkpointing: bool) -> int:
    """Roughly what one sample's blocks keep for the backward pass [bytes, fp32], of a prompt of `length` tokens.

    Args:
        backbone: gradients go through the backbone, too.
        checkpointing: blocks keep their inputs alone.
    """
    tokens = 1 + config.num_target_vision_tokens + config.action_horizon
    blocks = [(config.dit_layers, tokens * config.dit_dim), (config.vl_layers, length * config.text_hidden_size)]
    if backbone:
        blocks += [(config.text_layers, length * config.text_hidden_size)]
        blocks += [(config.vision_layers, views * config.tokens_per_view * config.vision_hidden_size)]
    each = 1 if checkpointing else 20  # in units of a block's input: norms, q, k, v, attention, feed-forward's 4 + 4
    return 4 * sum(layers * size * each for layers, size in blocks)


def plan_memory(
    policy: Gr00tPolicy,
    envs: int,
    chunks: int,
    cache: str,
    micro_batch_size: int,
    budget: float | None,
    checkpointing: bool,
    compiled: bool,
    more: dict[str, float] | None = None,
) -> tuple[str, int, str]:
    """Where the features of a rollout wait, how large micro-batches are, and what that takes, estimated.

    With a budget, micro-batches get smaller and the features leave the GPU until the estimate is within it, and a GPU gives
    no more than that. Without one, what a rollout keeps has to fit what is free. Raises SystemExit where nothing fits.

    Args:
        envs, chunks: of this rank: what acts at once, and how often before an update.
        cache: gpu, cpu (host memory) or off (the features are computed again).
        micro_batch_size: the largest.
        budget: [GB].
        more: what else takes memory on the training device [bytes].

    Returns:
        cache, micro-batch size, and a line for the log.
    """
    config, length, device, samples = policy.net.config, policy.prompts.shape[1], policy.device, envs * chunks
    through = policy.trains_backbone
    element = 2 if policy.bf16 else next(policy.net.backbone.parameters()).element_size()
    chain = 8 * config.action_horizon * config.action_dim
    camera = math.ceil(config.image_size / config.image_crop)
    images, features = 3 * policy.views * camera**2, length * config.text_hidden_size * element
    one = activation_bytes(config, length, policy.views, through, checkpointing)
    graph = 4 * length * (config.dit_layers * config.dit_dim + 4 * config.text_hidden_size)  # its own keys, values, features
    on_cpu = device.type == "cpu"

    def sizes(cache: str, micro: int) -> dict[str, float]:
        """Bytes on the training device, by what takes them."""
        kept = images if through or cache == "off" else 0 if cache == "cpu" and not on_cpu else features
        return {
            "weights": sum(x.nbytes for x in (*policy.parameters(), *policy.buffers())),
            "gradients and AdamW": 12 * sum(p.numel() for p in policy.parameters() if p.requires_grad),  # three times fp32
            f"{samples} samples an iteration": samples * (chain + kept),
            "activations": min(micro, samples) * one,
            "base model's pass": min(micro, samples) * graph * hasattr(policy, "base_mean"),
            "images of two moments": 2 * envs * images,
            **(more or {}),
        } | ({"captured sampling": min(micro, samples) * graph} if compiled and not on_cpu else {})

    if budget:
        pinned = 1 << (samples * features - 1).bit_length()  # torch rounds it up to a power of two
        on_host = not on_cpu and pinned < psutil.virtual_memory().available
        caches = ["gpu", "cpu", "off"] if on_host else ["gpu", "off"]
        caches = caches[caches.index(cache) :] if cache in caches else [cache]
        micros = [max(micro_batch_size >> i, 1) for i in range(micro_batch_size.bit_length())]
        # first the largest micro-batches of 16 or more, wherever the features are, then smaller ones
        ways = sorted(((cache, micro) for cache in caches for micro in micros), key=lambda way: way[1] < min(16, micros[0]))
        totals = {way: sum(sizes(*way).values()) for way in ways}
        fitting = [way for way in ways if totals[way] <= budget * 1e9]
        if not fitting:
            least = math.ceil(min(totals.values()) / 1e8) / 10
            raise SystemExit(
                f"--max-memory-gb {budget:g}: an estimate of {least} GB at least; give more, or make the run smaller"
            )
        cache, micro_batch_size = fitting[0]
        if not on_cpu:
            share = budget * 1e9 / torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    planned = sizes(cache, micro_batch_size)
    plan = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in planned.items()) + " GB (estimated)"
    if budget:
        place = {"gpu": "kept", "cpu": "kept on the host", "off": "computed again"}[cache]
        return cache, micro_batch_size, f"{plan}; within {budget:g} GB: micro-batches of {micro_batch_size}, features {place}"
    host = on_cpu or (cache == "cpu" and not through)
    free = psutil.virtual_memory().available if host else torch.cuda.mem_get_info()[0]
    needed = samples * (chain + (images if through or cache == "off" else features))
    plan += f", {free / 1e9:.1f} GB free {'on the host' if host else 'on the GPU'}"
    if needed > free:
        raise SystemExit(f"too many samples: {plan}; use fewer --num-envs, or --feature-cache {'off' if host else 'cpu'}")
    return cache, micro_batch_size, plan
