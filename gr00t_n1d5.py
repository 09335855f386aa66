"""GR00T N1.5 in plain torch and two stock transformers classes, in NVIDIA's checkpoint layout.

NVIDIA's `gr00t` package pins an old transformers and a compiled flash-attn and cannot be installed beside Isaac Lab
3.0. This file takes its place: the network, its config.json and weights (read and written), and the steps between raw
numbers and the network (prompt, images, normalisation). What it saves keeps NVIDIA's files and key names;
`from_gr00t` and `to_gr00t` copy weights from and to a model that NVIDIA's package holds in memory.

    observation -> SigLIP2 + Qwen3 -> features (B, L, D)                     `backbone`, once per observation
    features    -> self-attention -> cross-attention keys and values         `action_head.encode`, once as well
    noise       -> N Euler steps of a DiT's velocity -> actions (B, H, A)    `action_head.sample`

Flow matching: x_t = (1 - t) noise + t action; t = 0 is noise, t = 1 the action; the target velocity is action - noise.

Sources: NVIDIA Isaac-GR00T at its last N1.5 commit (4af2b62) and the config.json of nvidia/GR00T-N1.5-3B for layout
and values; lerobot 0.4.4's port (Apache-2.0), whose outputs are in tests/golden; arXiv 2503.14734 (GR00T N1),
2504.15271 (Eagle 2.5), 2210.02747 (flow matching).
"""

import functools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3Model, SiglipVisionConfig, SiglipVisionModel

# Rows of the category-specific layers. (RLinf puts its "new_embodiment" at 10, not at 31.)
EMBODIMENT_IDS = {
    "gr1": 24,
    "oxe_droid": 17,
    "agibot_genie1": 26,
    "new_embodiment": 31,
    "so100": 2,  # lerobot
    "unitree_g1": 3,  # lerobot
    "libero_franka": 31,  # this one and the rest: RLinf
    "isaaclab_franka": 31,
    "maniskill_widowx": 30,
    "libero_panda": 2,
    "robocasa_panda_omron": 13,
}
EAGLE_PROCESSOR = "lerobot/eagle2hg-processor-groot-n1p5"  # the tokenizer files, which no N1.5 checkpoint carries
DEFAULT_INSTRUCTION = "Perform the default behavior."  # NVIDIA's, where a sample has none


# --------------------------------------------------------------------------------------------------------------- config
_VISION, _TEXT = "eagle_cfg.vision_config.", "eagle_cfg.text_config."  # not backbone_cfg: those are NVIDIA's arguments
_HEAD, _DIT, _VL = "action_head_cfg.", "action_head_cfg.diffusion_model_cfg.", "action_head_cfg.vl_self_attention_cfg."
_PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{images}{instruction}<|im_end|>\n<|im_start|>assistant\n"
)


def _at(path: str, default):
    """A field and its place in config.json."""
    return field(default=default, metadata={"path": path})


@dataclass
class Gr00tConfig:
    """Sizes and constants. The defaults are nvidia/GR00T-N1.5-3B."""

    # vision: SigLIP2-So400m
    image_size: int = _at(_VISION + "image_size", 224)
    patch_size: int = _at(_VISION + "patch_size", 14)
    vision_hidden_size: int = _at(_VISION + "hidden_size", 1152)
    vision_intermediate_size: int = _at(_VISION + "intermediate_size", 4304)
    vision_layers: int = _at(_VISION + "num_hidden_layers", 27)
    vision_heads: int = _at(_VISION + "num_attention_heads", 16)
    # language: the first 12 of Qwen3-1.7B's 28 layers
    text_hidden_size: int = _at("hidden_size", 2048)
    text_intermediate_size: int = _at(_TEXT + "intermediate_size", 6144)
    text_layers: int = _at("backbone_cfg.select_layer", 12)
    text_heads: int = _at(_TEXT + "num_attention_heads", 16)
    text_kv_heads: int = _at(_TEXT + "num_key_value_heads", 8)
    text_head_dim: int = _at(_TEXT + "head_dim", 128)
    vocab_size: int = _at(_TEXT + "vocab_size", 151680)
    rope_theta: float = _at(_TEXT + "rope_theta", 1e6)
    max_position_embeddings: int = _at(_TEXT + "max_position_embeddings", 40960)
    initializer_range: float = _at(_TEXT + "initializer_range", 0.02)
    image_token_id: int = _at("eagle_cfg.image_token_index", 151669)
    # action head
    hidden_size: int = _at(_HEAD + "hidden_size", 1024)
    dit_layers: int = _at(_DIT + "num_layers", 16)
    dit_heads: int = _at(_DIT + "num_attention_heads", 32)
    dit_head_dim: int = _at(_DIT + "attention_head_dim", 48)
    vl_layers: int = _at(_VL + "num_layers", 4)
    vl_heads: int = _at(_VL + "num_attention_heads", 32)
    vl_head_dim: int = _at(_VL + "attention_head_dim", 64)
    num_target_vision_tokens: int = _at(_HEAD + "num_target_vision_tokens", 32)
    max_seq_len: int = _at(_HEAD + "max_seq_len", 1024)
    num_embodiments: int = _at(_HEAD + "max_num_embodiments", 32)
    action_dim: int = _at("action_dim", 32)
    state_dim: int = _at(_HEAD + "max_state_dim", 64)
    action_horizon: int = _at("action_horizon", 16)
    num_inference_timesteps: int = _at(_HEAD + "num_inference_timesteps", 4)
    num_timestep_buckets: int = _at(_HEAD + "num_timestep_buckets", 1000)
    noise_beta_alpha: float = _at(_HEAD + "noise_beta_alpha", 1.5)
    noise_beta_beta: float = _at(_HEAD + "noise_beta_beta", 1.0)
    noise_s: float = _at(_HEAD + "noise_s", 0.999)
    fan_in_init: bool = _at("init_cfg.fan_in_init", False)  # larger weights: a tiny network from scratch needs them
    # inputs
    image_crop: float = _at("input_cfg.image_crop", 0.95)
    prompt_template: str = _at("input_cfg.prompt_template", _PROMPT)
    image_template: str = _at("input_cfg.image_template", "<image {view}><img>{tokens}</img>")  # one per view
    image_token: str = _at("input_cfg.image_token", "<IMG_CONTEXT>")
    max_prompt_tokens: int = _at("input_cfg.max_prompt_tokens", 600)

    @property
    def tokens_per_view(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def dit_dim(self) -> int:
        return self.dit_heads * self.dit_head_dim

    @classmethod
    def tiny(cls, **overrides) -> "Gr00tConfig":
        """About 1M parameters: the same code for a 64 x 64 camera, a handful of words and a CPU.

        The text stands before the image tokens: under a causal mask the image features then depend on the instruction.
        """
        tiny = dict(
            image_size=64, patch_size=16,
            vision_hidden_size=64, vision_intermediate_size=128, vision_layers=2, vision_heads=4,
            text_hidden_size=96, text_intermediate_size=192, text_layers=2,
            text_heads=4, text_kv_heads=2, text_head_dim=24,
            vocab_size=32, max_position_embeddings=256, initializer_range=0.1, image_token_id=1,
            hidden_size=96, dit_layers=4, dit_heads=4, dit_head_dim=24, vl_layers=1, vl_heads=4, vl_head_dim=24,
            num_target_vision_tokens=2, max_seq_len=64, num_embodiments=1, action_dim=4, state_dim=8, action_horizon=8,
            fan_in_init=True, image_crop=1.0, prompt_template="{instruction}{images}", image_template="{tokens}",
            max_prompt_tokens=32,
        )  # fmt: skip
        return cls(**{**tiny, **overrides})

    def to_dict(self) -> dict:
        """NVIDIA's config.json. What the public file leaves to code or to Eagle's own config stands in extra keys."""
        out: dict = {"model_type": "gr00t_n1_5", "architectures": ["GR00T_N1_5"]}
        for path, value in {**_WRITTEN_ONLY, **self._implied()}.items():
            _put(out, path, value)
        for f in fields(self):
            _put(out, f.metadata["path"], getattr(self, f.name))
        return out

    @classmethod
    def from_dict(cls, config: Mapping) -> "Gr00tConfig":
        """Reads `to_dict`'s layout or NVIDIA's public file (absent sizes are full size, unknown keys are ignored).

        Raises ValueError where the file asks for a variant that this network does not build.
        """
        if config.get("model_type") != "gr00t_n1_5":
            raise ValueError(f"model_type is {config.get('model_type')!r}, not 'gr00t_n1_5'")
        values = {f.name: _get(config, f.metadata["path"]) for f in fields(cls)}
        self = cls(**{name: value for name, value in values.items() if value is not None})
        for path, value in self._implied().items():
            if _get(config, path) not in (None, value):
                raise ValueError(f"{path} is {_get(config, path)!r}; only {value!r} is supported here")
        return self

    def _implied(self) -> dict:
        """What config.json says besides the fields: a size a second time, or the variant that this file builds."""
        return {
            _HEAD + "action_dim": self.action_dim,
            _HEAD + "max_action_dim": self.action_dim,
            _HEAD + "action_horizon": self.action_horizon,
            _HEAD + "backbone_embedding_dim": self.text_hidden_size,
            _HEAD + "input_embedding_dim": self.dit_dim,
            _HEAD + "add_pos_embed": True,
            _HEAD + "use_vlln": True,
            _DIT + "cross_attention_dim": self.text_hidden_size,
            _DIT + "output_dim": self.hidden_size,
            _DIT + "interleave_self_attention": True,
            _DIT + "norm_type": "ada_norm",
            _DIT + "positional_embeddings": None,
            _VL + "positional_embeddings": None,
            "backbone_cfg.project_to_dim": None,
            "backbone_cfg.reproject_vision": False,
        }


# For NVIDIA's loader, whose own defaults differ. This file has no dropout anywhere: a policy gradient compares
# log-probabilities of one network at two moments, and a random mask in between would turn their ratio into noise.
_WRITTEN_ONLY = {
    "backbone_cfg.eagle_path": "NVEagle/eagle_er-qwen3_1_7B-Siglip2_400M_stage1_5_128gpu_er_v7_1mlp_nops",
    "backbone_cfg.load_bf16": False,
    "backbone_cfg.tune_llm": False,
    "backbone_cfg.tune_visual": True,
    "backbone_cfg.use_flash_attention": True,
    _DIT + "dropout": 0.2,
    _DIT + "final_dropout": True,
    _VL + "dropout": 0.2,
    _VL + "final_dropout": True,
}


def _put(tree: dict, path: str, value) -> None:
    *parents, leaf = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[leaf] = value


def _get(tree: Mapping, path: str):
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


# ------------------------------------------------------------------------------------------------------------- backbone
class Backbone(nn.Module):
    """Eagle 2.5: SigLIP2 patches, one linear layer, Qwen3; the features are taken after Qwen3's final RMSNorm.

    There is no language-model head: nothing reads its logits, and at full size it would cost 171 GFLOP per observation.
    """

    def __init__(self, config: Gr00tConfig):
        super().__init__()
        self.image_token_id = config.image_token_id
        self.vision_model = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=config.vision_hidden_size,
                intermediate_size=config.vision_intermediate_size,
                num_hidden_layers=config.vision_layers,
                num_attention_heads=config.vision_heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
                vision_use_head=False,  # the pooling head is in the checkpoint, but nothing uses it
                attn_implementation="sdpa",
            )
        )
        self.language_model = Qwen3Model(
            Qwen3Config(
                hidden_size=config.text_hidden_size,
                intermediate_size=config.text_intermediate_size,
                num_hidden_layers=config.text_layers,
                num_attention_heads=config.text_heads,
                num_key_value_heads=config.text_kv_heads,
                head_dim=config.text_head_dim,
                vocab_size=config.vocab_size,
                max_position_embeddings=config.max_position_embeddings,
                initializer_range=config.initializer_range,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                attn_implementation="sdpa",
            )
        )
        self.mlp1 = nn.Sequential(nn.Linear(config.vision_hidden_size, config.text_hidden_size))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Features (B, L, D) of token ids (B, L) and pixels (B*V, 3, S, S) in [-1, 1], sample-major.

        Prompts padded on the right keep their features: the language model is causal. At the padded positions stands
        what is of no use and has to be masked (`ActionHead.encode`), or, given the prompts' lengths (B,), what RLinf
        has there (`padding_feature`).
        """
        x = self.language_model.embed_tokens(input_ids)  # (B, L, D)
        if len(pixel_values):  # there are tasks without a camera
            image = self.mlp1(self.vision_model(pixel_values=pixel_values).last_hidden_state).to(x.dtype)  # (B*V, P, D)
            is_image = input_ids == self.image_token_id
            # masked_scatter says nothing when features are left over; this check does not wait for the device
            if not input_ids.is_meta:
                fits = is_image.sum() == image.shape[0] * image.shape[1]
                torch._assert_async(fits, "image tokens and image features differ in number")
            x = x.masked_scatter(is_image[..., None], image)
        # A mask of None is plainly causal; left to itself transformers looks for packed sequences, a host sync.
        causal = {"full_attention": None}
        x = self.language_model(inputs_embeds=x, attention_mask=causal, use_cache=False).last_hidden_state
        return x if lengths is None else torch.where(is_real(lengths, x.shape[1])[..., None], x, self.padding_feature())

    def padding_feature(self) -> Tensor:
        """The feature (D,) of a position that is padded with token 0 and masked, as in RLinf's rollouts.

        FlashAttention, which NVIDIA's config of Eagle asks for, skips masked positions, and transformers puts zeros in
        their place: attention adds nothing to them, and token 0 passes through the MLPs alone. So all padded positions
        of all prompts are equal. (With transformers' eager or SDPA attention they would look at the real tokens.)
        """
        x = self.language_model.embed_tokens.weight[0]
        for layer in self.language_model.layers:
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.language_model.norm(x)

    def to_fp8(self) -> None:
        """Computes the linear layers of all blocks in float8 from now on, which they have to be frozen for.

        The first call measures what that changes: `fp8_error` is then the norm of the features' difference over theirs.
        """
        rounding = []
        for name, module in list(self.named_modules()):
            if ".layers." in name and type(module) is nn.Linear and not any(n % 16 for n in module.weight.shape):
                rounding.append(Fp8Linear(module))
                self.set_submodule(name, rounding[-1])

        def measure(module: nn.Module, inputs: tuple, found: Tensor) -> None:
            handle.remove()
            for layer in rounding:
                layer.exact = True
            with torch.no_grad():
                expected = self(*inputs)
            for layer in rounding:
                layer.exact = False
            self.fp8_error = (found - expected).float().norm() / expected.float().norm()

        handle = self.register_forward_hook(measure)

    def fp8_report(self) -> str:
        """A line for the log, after the first call; waits for the device."""
        return f"float8 backbone: features differ by {float(self.fp8_error):.2%} of their norm"

    def _apply(self, fn, recurse=True):
        # .to(bfloat16) would round the rotary frequencies, and leaving the meta device would leave them uninitialised.
        super()._apply(fn, recurse)
        self.restore_buffers(next(self.parameters()).device)
        return self

    def restore_buffers(self, device: torch.device) -> None:
        """Recomputes the buffers that no checkpoint holds: rotary frequencies (fp32) and patch position ids."""
        rotary, embeddings = self.language_model.rotary_emb, self.vision_model.embeddings
        with torch.device(device):
            for name, buffer in type(rotary)(rotary.config, device).named_buffers():
                setattr(rotary, name, buffer)
            embeddings.position_ids = torch.arange(embeddings.num_positions).expand(1, -1)


class Fp8Linear(nn.Module):
    """A frozen linear layer with both factors in float8 (e4m3) and one scale per row: of the weight once, of x each time.

    The weight stays beside it, under its name, for checkpoints. Without a GPU the product is that of the same float8
    numbers, in fp32: right in value, not in speed.
    """

    LARGEST = torch.finfo(torch.float8_e4m3fn).max

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias, self.exact = linear.weight, linear.bias, False
        rounded, scale = self.quantize(linear.weight.detach())
        self.register_buffer("rounded", rounded, persistent=False)  # (N, K) e4m3
        self.register_buffer("scale", scale.t().contiguous(), persistent=False)  # (1, N)

    @classmethod
    def quantize(cls, x: Tensor) -> tuple[Tensor, Tensor]:
        """(M, K) -> e4m3 (M, K) and the scales (M, 1) to multiply it with."""
        scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / cls.LARGEST
        return (x.float() / scale).clamp(-cls.LARGEST, cls.LARGEST).to(torch.float8_e4m3fn), scale

    def forward(self, x: Tensor) -> Tensor:
        if self.exact:
            return F.linear(x, self.weight, self.bias)
        rows, scale = self.quantize(x.reshape(-1, x.shape[-1]))
        if x.is_cuda:  # scales per row come with bf16 outputs alone
            y = torch._scaled_mm(rows, self.rounded.t(), scale, self.scale, out_dtype=torch.bfloat16, use_fast_accum=True)
        else:
            y = (rows.float() @ self.rounded.float().t()) * scale * self.scale
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.to(x.dtype).unflatten(0, x.shape[:-1]) if x.dim() > 1 else y[0].to(x.dtype)


def recompute(block: nn.Module) -> None:
    """Activation checkpointing of a block, where gradients are wanted: rollouts keep nothing, and can be captured."""
    block.forward = functools.partial(_recomputed, block.forward)  # no closure: a copied block would call the old one


def _recomputed(plain: Callable, *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(*inputs, **named)
    return checkpoint(plain, *inputs, use_reentrant=False, **named)


def is_real(lengths: Tensor, length: int) -> Tensor:
    """(B, length) bool: which positions of prompts with these lengths (B,) are not padding."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


# ---------------------------------------------------------------------------------------------------------- action head
KeyValue = tuple[Tensor, Tensor]  # each (B, heads, L, head_dim)


class Attention(nn.Module):
    """Attention; `mask` (B, 1, 1, L) is True at keys that count. The names are diffusers', as in the checkpoint."""

    def __init__(self, dim: int, heads: int, head_dim: int, kv_dim: int | None = None):
        super().__init__()
        self.heads, inner = heads, heads * head_dim
        self.to_q = nn.Linear(dim, inner)
        self.to_k = nn.Linear(kv_dim or dim, inner)
        self.to_v = nn.Linear(kv_dim or dim, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, head_dim)

    def key_value(self, x: Tensor) -> KeyValue:
        return self.split_heads(self.to_k(x)), self.split_heads(self.to_v(x))

    def forward(self, x: Tensor, key_value: KeyValue | None = None, mask: Tensor | None = None) -> Tensor:
        key, value = self.key_value(x) if key_value is None else key_value
        out = F.scaled_dot_product_attention(self.split_heads(self.to_q(x)), key, value, mask)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # (B, L, D)


class TanhGELU(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Linear(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.net = nn.Sequential(TanhGELU(dim), nn.Identity(), nn.Linear(4 * dim, dim))  # [1] is NVIDIA's dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class AdaLayerNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.linear(F.silu(time))[:, None].chunk(2, -1)  # the DiT's last norm has shift first
        return F.layer_norm(x, x.shape[-1:], eps=1e-5) * (1 + scale) + shift


class DiTBlock(nn.Module):
    """Cross-attends with `kv_dim`, self-attends without."""

    def __init__(self, dim: int, heads: int, head_dim: int, kv_dim: int | None):
        super().__init__()
        self.norm1 = AdaLayerNorm(dim)
        self.attn1 = Attention(dim, heads, head_dim, kv_dim)
        self.norm3 = nn.LayerNorm(dim, eps=1e-5, elementwise_affine=False)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, time: Tensor, key_value: KeyValue | None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x, time), key_value, mask)
        return x + self.ff(self.norm3(x))


class SelfAttentionBlock(nn.Module):
    def __init__(self, dim: int, heads: int, head_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn1 = Attention(dim, heads, head_dim)
        self.norm3 = nn.LayerNorm(dim, eps=1e-5)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x), mask=mask)
        return x + self.ff(self.norm3(x))


class SelfAttentionTransformer(nn.Module):
    def __init__(self, heads: int, head_dim: int, layers: int):
        super().__init__()
        dim = heads * head_dim
        self.transformer_blocks = nn.ModuleList(SelfAttentionBlock(dim, heads, head_dim) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.transformer_blocks:
            x = block(x, mask)
        return x


class TimestepEncoder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.timestep_embedder = nn.ModuleDict({"linear_1": nn.Linear(256, dim), "linear_2": nn.Linear(dim, dim)})

    def forward(self, bucket: Tensor) -> Tensor:
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=bucket.device) / (128 - 1))
        angle = bucket.float()[:, None] * frequency
        first, second = self.timestep_embedder["linear_1"], self.timestep_embedder["linear_2"]
        return second(F.silu(first(torch.cat([angle.cos(), angle.sin()], -1).to(first.weight.dtype))))  # (B, dim)


class DiT(nn.Module):
    def __init__(self, config: Gr00tConfig):
        super().__init__()
        dim = config.dit_dim
        self.timestep_encoder = TimestepEncoder(dim)
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(dim, config.dit_heads, config.dit_head_dim, config.text_hidden_size if i % 2 == 0 else None)
            for i in range(config.dit_layers)
        )
        self.proj_out_1 = nn.Linear(dim, 2 * dim)
        self.proj_out_2 = nn.Linear(dim, config.hidden_size)

    def forward(self, x: Tensor, bucket: Tensor, key_values: Sequence[KeyValue], mask: Tensor | None = None) -> Tensor:
        time = self.timestep_encoder(bucket)
        for i, block in enumerate(self.transformer_blocks):
            x = block(x, time, key_values[i // 2], mask) if i % 2 == 0 else block(x, time, None)
        shift, scale = self.proj_out_1(F.silu(time))[:, None].chunk(2, -1)
        return self.proj_out_2(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)


class CategorySpecificLinear(nn.Module):
    """One linear layer per embodiment."""

    def __init__(self, categories: int, in_dim: int, out_dim: int):
        super().__init__()
        self.W = nn.Parameter(0.02 * torch.randn(categories, in_dim, out_dim))
        self.b = nn.Parameter(torch.zeros(categories, out_dim))

    def forward(self, x: Tensor, category: Tensor) -> Tensor:
        if len(self.W) == 1:  # one row: no copy of the weights per sample, and nothing to look up
            return x @ self.W[0] + self.b[0]
        return torch.baddbmm(self.b[category][:, None], x, self.W[category])


class CategorySpecificMLP(nn.Module):
    def __init__(self, categories: int, in_dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        self.layer1 = CategorySpecificLinear(categories, in_dim, hidden_dim)
        self.layer2 = CategorySpecificLinear(categories, hidden_dim, out_dim)

    def forward(self, x: Tensor, category: Tensor) -> Tensor:
        return self.layer2(F.relu(self.layer1(x, category)), category)


class ActionEncoder(nn.Module):
    def __init__(self, categories: int, action_dim: int, dim: int):
        super().__init__()
        self.dim = dim
        self.W1 = CategorySpecificLinear(categories, action_dim, dim)
        self.W2 = CategorySpecificLinear(categories, 2 * dim, dim)
        self.W3 = CategorySpecificLinear(categories, dim, dim)

    def forward(self, x: Tensor, bucket: Tensor, category: Tensor) -> Tensor:
        half = self.dim // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=bucket.device) / half)
        angle = bucket.float()[:, None] * frequency
        time = torch.cat([angle.sin(), angle.cos()], -1)  # sine first, unlike the TimestepEncoder
        action = self.W1(x, category)
        time = time[:, None].expand(-1, x.shape[1], -1).to(action.dtype)
        return self.W3(F.silu(self.W2(torch.cat([action, time], -1), category)), category)  # (B, H, dim)


class ActionContext(NamedTuple):
    """All that the denoising steps need of an observation; it does not depend on the step."""

    state_tokens: Tensor  # (B, 1, D)
    key_values: tuple[KeyValue, ...]  # of the cross-attention blocks, in order; (B, heads, L, head_dim) each
    mask: Tensor | None = None  # (B, 1, 1, L), True at keys that are not padding; None: there is no padding

    def repeat_interleave(self, n: int) -> "ActionContext":
        """Each observation n times in a row, for n action samples of one observation: B becomes B*n."""
        pairs = tuple((k.repeat_interleave(n, 0), v.repeat_interleave(n, 0)) for k, v in self.key_values)
        mask = None if self.mask is None else self.mask.repeat_interleave(n, 0)
        return ActionContext(self.state_tokens.repeat_interleave(n, 0), pairs, mask)


class ActionHead(nn.Module):
    """Flow-matching head. Inputs of any float type are cast to the head's own (bf16 backbone, fp32 head)."""

    def __init__(self, config: Gr00tConfig):
        super().__init__()
        self.config = config
        categories, dim, hidden = config.num_embodiments, config.dit_dim, config.hidden_size
        self.model = DiT(config)
        self.state_encoder = CategorySpecificMLP(categories, config.state_dim, hidden, dim)
        self.action_encoder = ActionEncoder(categories, config.action_dim, dim)
        self.action_decoder = CategorySpecificMLP(categories, hidden, hidden, config.action_dim)
        self.future_tokens = nn.Embedding(config.num_target_vision_tokens, dim)
        self.position_embedding = nn.Embedding(config.max_seq_len, dim)
        self.vlln = nn.LayerNorm(config.text_hidden_size)
        self.vl_self_attention = SelfAttentionTransformer(config.vl_heads, config.vl_head_dim, config.vl_layers)
        std = 0.2 if config.fan_in_init else 0.02
        nn.init.normal_(self.future_tokens.weight, std=std)
        nn.init.normal_(self.position_embedding.weight, std=std)
        if config.fan_in_init:
            for module in self.modules():
                if isinstance(module, CategorySpecificLinear):
                    nn.init.normal_(module.W, std=module.W.shape[1] ** -0.5)

    @property
    def dtype(self) -> torch.dtype:
        return self.vlln.weight.dtype

    def encode(
        self, features: Tensor, state: Tensor, embodiment_id: Tensor, lengths: Tensor | None = None
    ) -> ActionContext:
        """Features (B, L, D), normalised state (B, 1, state_dim), embodiment_id (B,): what `velocity` needs, once.

        With lengths (B,) the features behind them are ignored, so that prompts of several lengths fit in one batch.
        NVIDIA's head has no masks: it was trained to attend to whatever padding there was.
        """
        mask = None if lengths is None else is_real(lengths, features.shape[1])[:, None, None]  # (B, 1, 1, L)
        vl = self.vl_self_attention(self.vlln(features.to(self.dtype)), mask)
        key_values = tuple(block.attn1.key_value(vl) for block in self.model.transformer_blocks[::2])
        return ActionContext(self.state_encoder(state.to(self.dtype), embodiment_id), key_values, mask)

    def velocity(self, x: Tensor, bucket: Tensor, embodiment_id: Tensor, context: ActionContext) -> Tensor:
        """Velocity (B, H, A) at noisy actions x (B, H, A) and time bucket (B,) int64 in [0, num_timestep_buckets)."""
        action = self.action_encoder(x.to(self.dtype), bucket, embodiment_id)
        action = action + self.position_embedding.weight[: x.shape[1]]
        future = self.future_tokens.weight.expand(len(x), -1, -1)
        tokens = torch.cat([context.state_tokens, future, action], 1)  # (B, 1 + future + H, D)
        hidden = self.model(tokens, bucket, context.key_values, context.mask)[:, -x.shape[1] :]
        return self.action_decoder(hidden, embodiment_id)

    def sample(self, context: ActionContext, embodiment_id: Tensor, noise: Tensor, steps: int | None = None) -> Tensor:
        """Actions (B, H, A), normalised: `steps` Euler steps of the ODE from noise (B, H, A), in the noise's type."""
        steps, buckets, x = steps or self.config.num_inference_timesteps, self.config.num_timestep_buckets, noise
        for k in range(steps):
            bucket = torch.full((len(x),), int(k / steps * buckets), device=x.device)
            x = x + self.velocity(x, bucket, embodiment_id, context).to(x.dtype) / steps
        return x

    def sample_time(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Training times t = (s - Beta(alpha, beta)) / s, fp32 (n,), on the generator's device or else the head's.

        As in NVIDIA's code, t falls below 0 (by 0.001 at most) in 0.15% of the draws.
        """
        device = generator.device if generator is not None else self.vlln.weight.device
        alpha_beta = torch.tensor([self.config.noise_beta_alpha, self.config.noise_beta_beta], device=device)
        gamma = torch._standard_gamma(alpha_beta.expand(n, 2).contiguous(), generator)  # Beta.sample takes no generator
        return (self.config.noise_s - gamma[:, 0] / gamma.sum(1)) / self.config.noise_s

    def flow_matching_loss(
        self, context: ActionContext, embodiment_id: Tensor, action: Tensor, mask: Tensor, noise: Tensor, t: Tensor
    ) -> Tensor:
        """Mean squared velocity error where mask (B, H, A) is 1. Action and noise (B, H, A), t (B,) in fp32."""
        x = (1 - t)[:, None, None] * noise + t[:, None, None] * action
        bucket = (t * self.config.num_timestep_buckets).long()
        error = self.velocity(x, bucket, embodiment_id, context).float() - (action - noise)
        return (error.square() * mask).sum() / mask.sum()


# ---------------------------------------------------------------------------------------------------------------- model
class Gr00tN1d5(nn.Module):
    """The whole policy network: `backbone` and `action_head`."""

    def __init__(self, config: Gr00tConfig):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.action_head = ActionHead(config)
        self._tables: dict[str, Tensor] = {}  # after slice_embodiment: all rows, on the host
        self._row = 0

    @torch.no_grad()
    def get_action(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        state: Tensor,
        embodiment_id: Tensor,
        noise: Tensor | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Normalised actions (B, H, A) by the ODE. Shapes as in `backbone`, `encode` and `sample`."""
        context = self.action_head.encode(self.backbone(input_ids, pixel_values), state, embodiment_id)
        if noise is None:
            noise = torch.randn(len(state), self.config.action_horizon, self.config.action_dim, device=state.device)
        return self.action_head.sample(context, embodiment_id, noise, steps)

    def slice_embodiment(self, embodiment_id: int) -> Self:
        """Keeps one embodiment's row of the category-specific layers; id 0 then names it. Returns the model itself.

        At full size this leaves 763M of the head's 1069M parameters, and as much less optimizer state. All rows stay on
        the host, and `save_pretrained` writes them back with the trained row in its place. Call it before the optimizer
        is made: the parameters are new objects. Raises ValueError for an unknown row or a second call. A checkpoint with
        one row is left as it is.
        """
        if self._tables:
            raise ValueError(f"the model is already sliced to embodiment {self._row}")
        if self.config.num_embodiments == 1:
            return self
        if not 0 <= embodiment_id < self.config.num_embodiments:
            raise ValueError(f"embodiment id {embodiment_id} is not among {self.config.num_embodiments} rows")
        for prefix, module in self.named_modules():
            if isinstance(module, CategorySpecificLinear):
                for name, table in list(module.named_parameters()):
                    self._tables[f"{prefix}.{name}"] = table.detach().to("cpu", copy=True)
                    row = table.detach()[embodiment_id : embodiment_id + 1].clone()
                    setattr(module, name, nn.Parameter(row, requires_grad=table.requires_grad))
        self._row = embodiment_id
        self.config = self.action_head.config = replace(self.config, num_embodiments=1)
        return self

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        local_files_only: bool = False,
    ) -> "Gr00tN1d5":
        """Loads a local folder or a hub id; with dtype None every tensor keeps the type it has in the file.

        The tensors are read one by one, so the host never holds a second copy. Raises FileNotFoundError where there is
        no such folder or file, ValueError where a file is damaged, is not GR00T N1.5, or its keys or shapes do not fit.
        """
        folder = _resolve(path, local_files_only)
        config_file = folder / "config.json"
        content = _read_json(config_file)
        try:
            config = Gr00tConfig.from_dict(content)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{config_file}: not a GR00T N1.5 config ({error})") from error
        with torch.device("meta"):
            model = cls(config)
        sources = _find_tensors(folder, {name: tuple(p.shape) for name, p in model.named_parameters()})
        for file in sorted({file for file, _ in sources.values()}):
            with _open_safetensors(file) as tensors:
                for name, (source_file, key) in sources.items():
                    if source_file != file:
                        continue
                    model._put(name, tensors.get_tensor(key).to(device, dtype, copy=True))  # must not alias the file
        model.backbone.restore_buffers(torch.device(device))
        return model.eval()

    @classmethod
    def from_gr00t(
        cls, live: nn.Module, dtype: torch.dtype | None = None, config: Gr00tConfig | None = None
    ) -> "Gr00tN1d5":
        """A copy of a live model of NVIDIA's `gr00t` package (GR00T_N1_5) or of lerobot's port (GR00TN15).

        Args:
            live: a module with the checkpoint's parameter names; what else it has (a value head) is left alone.
            dtype: None: every tensor keeps its type.
            config: None: from `live.config`.

        Raises ValueError for another kind of model, and a list of missing and wrongly shaped parameters.
        """
        config = config or Gr00tConfig.from_dict(live.config.to_dict())
        with torch.device("meta"):
            model = cls(config)
        tensors = live.state_dict()
        for name, key in _match_live(model, tensors).items():
            model._put(name, tensors[key].to(dtype=dtype, copy=True))
        model.backbone.restore_buffers(next(model.parameters()).device)
        return model.eval()

    @torch.no_grad()
    def to_gr00t(self, live: nn.Module) -> None:
        """Writes the weights into such a live model, which keeps its types and devices; the inverse of `from_gr00t`.

        After `slice_embodiment` all rows are written, the trained one in its place. Adapters have to be merged before.
        Raises ValueError as `from_gr00t` does; then nothing has been written.
        """
        tensors, parameters = live.state_dict(), dict(self.named_parameters())
        for name, key in _match_live(self, tensors).items():
            tensors[key].copy_(self._full(name, parameters[name].detach()))
            if _plain_name(name) == _EMBED:  # an lm_head that is a tensor of its own follows, as tied weights would
                for other in (k for k in tensors if _plain_name(k) == _LM_HEAD):
                    tensors[other].copy_(parameters[name])

    def _put(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor))

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = 5_000_000_000) -> None:
        """Writes config.json and safetensors in NVIDIA's layout and key names, in shards above the limit.

        The files are written beside the folder and then moved: a crash while writing leaves an old checkpoint whole.
        """
        folder = Path(folder).absolute()
        shards: list[dict[str, Tensor]] = [{}]
        size = total = 0
        for name, parameter in self.named_parameters():
            tensor = self._tables.get(name, parameter.detach())
            if size + tensor.nbytes > max_shard_bytes and shards[-1]:
                shards.append({})
                size = 0
            size, total = size + tensor.nbytes, total + tensor.nbytes
            shards[-1][name] = parameter.detach()
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        config = self.config
        if self._tables:
            config = replace(config, num_embodiments=len(next(iter(self._tables.values()))))
        written = config.to_dict()
        written["torch_dtype"] = str(self.action_head.dtype).removeprefix("torch.")

        scratch = folder.with_name(f".{folder.name}.writing-{os.getpid()}")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            (scratch / "config.json").write_text(json.dumps(written, indent=2))
            index = {"metadata": {"total_size": total}, "weight_map": {}}
            for file_name, shard in zip(names, shards, strict=True):
                tensors = {_public_name(name): self._full(name, p).cpu().contiguous() for name, p in shard.items()}
                save_file(tensors, scratch / file_name, metadata={"format": "pt"})
                shutil.copymode(scratch / "config.json", scratch / file_name)  # safetensors makes it private
                index["weight_map"].update(dict.fromkeys(tensors, file_name))
            if len(shards) > 1:
                (scratch / _INDEX).write_text(json.dumps(index, indent=2))
            if not folder.exists():
                os.replace(scratch, folder)
                return
            new = {file.name for file in scratch.iterdir()}
            for name in new:
                os.replace(scratch / name, folder / name)
            for old in [*folder.glob("model*.safetensors"), folder / _INDEX]:  # of an earlier save with other shards
                if old.name not in new:
                    old.unlink(missing_ok=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _full(self, name: str, parameter: Tensor) -> Tensor:
        """The tensor to save: after slice_embodiment all rows, with the trained row in its place."""
        if name not in self._tables:
            return parameter
        table = self._tables[name].to(parameter.dtype, copy=True)
        table[self._row] = parameter[0].to(table.device)
        return table


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


def memory_plan(args, policy: nn.Module, samples: int, steps: int, views: int, length: int) -> tuple[str, str]:
    """What training takes, estimated, and which flag helps where it does not fit ("" if it does).

    With a budget, micro-batches get smaller and the features leave the GPU until the estimate is within it; `args` and
    `policy` are set so, and a GPU gives no more than that. Without one, what a rollout keeps has to fit what is free.

    Args:
        args: device, feature_cache, backbone_bf16, activation_checkpointing, micro_batch_size, max_memory_gb,
            compile.
        policy: with a Gr00tN1d5 as `net`.
        samples, steps: policy calls kept for an update, with so many denoising steps each.
        views, length: cameras and prompt tokens.
    """
    config = policy.net.config
    through = any(p.requires_grad for p in policy.net.backbone.parameters())  # gradients reach the backbone
    element = 2 if args.backbone_bf16 else next(policy.net.backbone.parameters()).element_size()
    chain = 8 * steps * config.action_horizon * config.action_dim
    images, features = 3 * views * config.image_size**2, length * config.text_hidden_size * element
    one = activation_bytes(config, length, views, through, args.activation_checkpointing)
    graph = 4 * length * (config.dit_layers * config.dit_dim + 4 * config.text_hidden_size)  # its own keys, values, features
    on_cpu, budget = args.device == "cpu", args.max_memory_gb

    def sizes(cache: str, micro: int) -> dict[str, float]:
        """Bytes on the training device, by what takes them."""
        kept = images if through or cache == "off" else 0 if cache == "cpu" and not on_cpu else features
        return {
            "weights": sum(x.nbytes for x in (*policy.parameters(), *policy.buffers())),
            "gradients and AdamW": 12 * sum(p.numel() for p in policy.parameters() if p.requires_grad),  # three times fp32
            f"{samples} samples an iteration": samples * (chain + kept),
            "activations": min(micro, samples) * one,
        } | ({"captured sampling": min(micro, samples) * graph} if args.compile and not on_cpu else {})

    if budget:
        on_host = not on_cpu and samples * features < psutil.virtual_memory().available
        caches = ["gpu", "cpu", "off"] if on_host else ["gpu", "off"]
        caches = caches[caches.index(args.feature_cache) :] if args.feature_cache in caches else [args.feature_cache]
        micros = [max(args.micro_batch_size >> i, 1) for i in range(args.micro_batch_size.bit_length())]
        # first the largest micro-batches of 16 or more, wherever the features are, then smaller ones
        ways = sorted(((cache, micro) for cache in caches for micro in micros), key=lambda way: way[1] < min(16, micros[0]))
        totals = {way: sum(sizes(*way).values()) for way in ways}
        fitting = [way for way in ways if totals[way] <= budget * 1e9]
        if not fitting:
            least = math.ceil(min(totals.values()) / 1e8) / 10
            return f"an estimate of {least} GB at least, above the budget of {budget:g} GB", f"--max-memory-gb {least}"
        args.feature_cache, args.micro_batch_size = fitting[0]
        policy.micro_batch_size = args.micro_batch_size
        if not on_cpu:
            index = torch.device(args.device).index  # None: the current one
            share = budget * 1e9 / torch.cuda.get_device_properties(index).total_memory
            torch.cuda.set_per_process_memory_fraction(min(share, 1.0), index)
    planned = sizes(args.feature_cache, args.micro_batch_size)
    plan = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in planned.items()) + " GB (estimated)"
    if budget:
        place = {"gpu": "kept", "cpu": "kept on the host", "off": "computed again"}[args.feature_cache]
        return f"{plan}; within {budget:g} GB: micro-batches of {args.micro_batch_size}, features {place}", ""
    host = on_cpu or (args.feature_cache == "cpu" and not through)
    free = psutil.virtual_memory().available if host else torch.cuda.mem_get_info()[0]
    needed = samples * (chain + (images if through or args.feature_cache == "off" else features))
    plan += f", {free / 1e9:.1f} GB free {'on the host' if host else 'on the GPU'}"
    return plan, f"--feature-cache {'off' if host else 'cpu'}" if needed > free else ""


# ----------------------------------------------------------------------------------------------------- checkpoint files
_INDEX = "model.safetensors.index.json"
_EMBED, _LM_HEAD = "backbone.language_model.embed_tokens.weight", "backbone.language_model.lm_head.weight"


def _plain_name(key: str) -> str:
    """One spelling for all: ours, NVIDIA's, transformers 4's (vision_model twice) and 5's (once)."""
    key = key.replace("backbone.eagle_model.", "backbone.", 1)
    key = key.replace("backbone.vision_model.vision_model.", "backbone.vision_model.", 1)
    return key.replace("backbone.language_model.model.", "backbone.language_model.", 1)


def _public_name(name: str) -> str:
    """NVIDIA's key for a parameter of ours."""
    name = _plain_name(name).replace("backbone.", "backbone.eagle_model.", 1)
    name = name.replace("eagle_model.vision_model.", "eagle_model.vision_model.vision_model.", 1)
    return name.replace("eagle_model.language_model.", "eagle_model.language_model.model.", 1)


def _find_tensors(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[Path, str]]:
    """Where each parameter lies: (file, key). One ValueError lists what is missing, unexpected or wrongly shaped."""
    files = [folder / "model.safetensors"]
    if (folder / _INDEX).is_file():
        try:
            files = sorted({folder / name for name in _read_json(folder / _INDEX)["weight_map"].values()})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / _INDEX}: not an index of safetensors shards ({error!r})") from error
    found: dict[str, tuple[int, ...]] = {}
    places: dict[str, Path] = {}
    for file in files:
        with _open_safetensors(file) as tensors:
            for key in tensors.keys():
                found[key], places[key] = tuple(tensors.get_slice(key).get_shape()), file
    keys = _match(f"{folder}: the weights do not fit the network of its config.json", shapes, found)
    return {name: (places[key], key) for name, key in keys.items()}


def _match_live(model: Gr00tN1d5, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The live model's key of each of our parameters."""
    shapes = {name: tuple(model._tables.get(name, p).shape) for name, p in model.named_parameters()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    return _match("the live model does not fit the network", shapes, found, extra=True)


def _match(
    problem: str, shapes: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]], extra: bool = False
) -> dict[str, str]:
    """The public key of each of our parameters, given the shapes of both; with `extra`, other keys may be there, too."""
    keys = {_plain_name(key): key for key in found}
    lm_head = keys.pop(_LM_HEAD, None)
    if lm_head is not None:
        keys.setdefault(_EMBED, lm_head)  # tied weights: some fine-tunes keep only this one
    own = {_plain_name(name): name for name in shapes}
    unused = [name for name in keys if name not in own and not name.startswith("backbone.vision_model.head.")]
    fitting = {own[name]: key for name, key in keys.items() if name in own}
    problems = {
        "missing": [_public_name(name) for name in own if name not in keys],
        "unexpected": [] if extra else [keys[name] for name in unused],
        "wrong shape": [
            f"{key} {found[key]} instead of {shapes[name]}"
            for name, key in fitting.items()
            if found[key] != shapes[name]
        ],
    }
    if any(problems.values()):
        lines = [problem]
        for kind, names in problems.items():
            if names:
                more = f", and {len(names) - 20} more" if len(names) > 20 else ""
                lines.append(f"{len(names)} {kind}: {', '.join(sorted(names)[:20])}{more}")
        raise ValueError("\n".join(lines))
    return fitting


@contextmanager
def _open_safetensors(file: Path) -> Iterator[safe_open]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such weight file (only safetensors are read)")
    try:
        tensors = safe_open(file, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{file}: damaged or not a safetensors file ({error})") from error
    with tensors as opened:
        yield opened


def _read_json(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; is this a GR00T N1.5 checkpoint folder?")
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object")
    return content


def _resolve(path: str | Path, local_files_only: bool = False) -> Path:
    """A local folder as it is; any other owner/name is taken for a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or len(folder.parts) != 2 or folder.parts[0] in (".", ".."):
        raise FileNotFoundError(f"{path}: no such folder")
    try:
        patterns = ["*.safetensors", "*.json", "*.txt"]  # never pickles
        return Path(snapshot_download(str(path), allow_patterns=patterns, local_files_only=local_files_only))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"{path}: no such folder, and nothing from the Hugging Face hub ({reason}); "
            f"where there is a network: hf download {path} --local-dir <folder>, then name that folder here"
        ) from error


def is_full_size(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has the full network (a hub id is taken to)."""
    try:
        return json.loads((Path(checkpoint) / "config.json").read_text())["action_head_cfg"]["hidden_size"] >= 512
    except (OSError, ValueError, KeyError):
        return True


# ------------------------------------------------------------------------------------------------------------ processor
STATISTICS = ("max", "min", "mean", "std", "q01", "q99")


class Normalizer:
    """Normalises the last dimension of (..., d) tensors by key and mode, after Isaac-GR00T's transform/state_action.py.

    | mode     | forward                              | degenerate range | inverse                     |
    |----------|--------------------------------------|------------------|-----------------------------|
    | min_max  | 2 (x - min) / (max - min) - 1        | 0                | (y + 1)/2 (max - min) + min |
    | q99      | the same with q01, q99, then clipped | x, then clipped  | the same with q01, q99      |
    | mean_std | (x - mean) / std                     | x                | y std + mean                |
    | binary   | x > 0.5                              |                  | y > 0.5                     |
    """

    def __init__(self, statistics: Mapping[str, Mapping[str, Sequence[float]]], modes: Mapping[str, str]):
        columns: dict[str, list[Tensor]] = {}
        for key, values in statistics.items():
            mode = modes.get(key, "min_max")
            if mode not in ("min_max", "q99", "mean_std", "binary"):
                raise ValueError(f"normalisation mode {mode!r} of {key!r} is not one of min_max, q99, mean_std, binary")
            stat = {name: torch.tensor(values[name], dtype=torch.float32).flatten() for name in STATISTICS}
            low, high = (stat["q01"], stat["q99"]) if mode == "q99" else (stat["min"], stat["max"])
            symmetric = mode in ("min_max", "q99")
            for name, value in {
                "shift": stat["mean"] if mode == "mean_std" else low,
                "range": stat["std"] if mode == "mean_std" else high - low,
                "gain": 2.0 if symmetric else 1.0,
                "bias": -1.0 if symmetric else 0.0,
                "keep": 0.0 if mode == "min_max" else 1.0,  # what is left of x where the range is 0
                "clip": float(mode == "q99"),
                "binary": float(mode == "binary"),
            }.items():
                columns.setdefault(name, []).append(torch.zeros_like(low) + value)
        self.columns = {name: torch.cat(values) for name, values in columns.items()}  # (d,) each

    def __len__(self) -> int:
        return len(self.columns["shift"])

    def _columns(self, x: Tensor) -> dict[str, Tensor]:
        if x.shape[-1] != len(self):
            raise ValueError(f"{x.shape[-1]} dimensions, the statistics have {len(self)}")
        return self.columns

    def to(self, device: str | torch.device) -> "Normalizer":
        self.columns = {name: column.to(device) for name, column in self.columns.items()}
        return self

    def forward(self, x: Tensor) -> Tensor:
        c, x = self._columns(x), x.float()
        degenerate = c["range"] == 0
        y = c["gain"] * (x - c["shift"]) / torch.where(degenerate, 1.0, c["range"]) + c["bias"]
        y = torch.where(degenerate, c["keep"] * x, y)
        y = torch.where(c["clip"] > 0, y.clamp(-1, 1), y)
        return torch.where(c["binary"] > 0, (x > 0.5).float(), y)

    def inverse(self, y: Tensor) -> Tensor:
        c, y = self._columns(y), y.float()
        x = (y - c["bias"]) / c["gain"] * c["range"] + c["shift"]
        return torch.where(c["binary"] > 0, (y > 0.5).float(), x)


class Augmentation(NamedTuple):
    """How B samples' images are changed in training, one draw for all views of a sample. On the host."""

    crop: Tensor  # (B, 2) in [0, 1): where the crop lies between top and bottom, left and right
    factors: Tensor  # (B, 4) of brightness, contrast, saturation, and the shift of hue
    order: Tensor  # (B, 4) in which these four come

    @classmethod
    def draw(cls, n: int, generator: torch.Generator) -> "Augmentation":
        """NVIDIA's RandomCrop and ColorJitter(0.3, 0.4, 0.5, 0.08), for n samples; the generator is a CPU one."""
        uniform = torch.rand(n, 10, generator=generator)
        center, width = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.3, 0.4, 0.5, 0.08]])
        return cls(uniform[:, :2], center + width * (2 * uniform[:, 2:6] - 1), uniform[:, 6:].argsort(1))


class Gr00tProcessor:
    """Between raw numbers and the network: prompt, images, normalisation, and the files that describe them.

    `metadata` is NVIDIA's experiment_cfg/metadata.json, `tag` the entry in use; keys are concatenated in its order.
    NVIDIA's file does not name the normalisation modes (its data configs do): `modes` gives them by "state.key" or
    "action.key", absent ones are min_max, and other ones are kept in the file under "normalization_modes".
    """

    def __init__(
        self,
        config: Gr00tConfig,
        tokenizer: Tokenizer,
        metadata: dict,
        tag: str,
        modes: Mapping[str, str] | None = None,
    ):
        self.config, self.tokenizer, self.metadata, self.tag = config, tokenizer, metadata, tag
        found, wanted = tokenizer.token_to_id(config.image_token), config.image_token_id
        if found != wanted:
            raise ValueError(f"the tokenizer has {config.image_token} at {found}, the config at {wanted}")
        try:
            statistics = {m: metadata[tag]["statistics"][m] for m in ("state", "action")}
            self.modes = dict(modes if modes is not None else metadata[tag].get("normalization_modes", {}))
            unknown = set(self.modes) - {f"{m}.{key}" for m in statistics for key in statistics[m]}
            if unknown:
                raise ValueError(f"normalisation modes for unknown keys: {', '.join(sorted(unknown))}")
            for modality, keys in statistics.items():
                for key, values in keys.items():
                    absent = [name for name in STATISTICS if name not in values]
                    if absent:
                        raise ValueError(f"{tag}: statistics of {modality}.{key} lack {', '.join(absent)}")
                    sizes = {name: np.size(values[name]) for name in STATISTICS}
                    if len(set(sizes.values())) > 1:
                        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
                        raise ValueError(f"{tag}: statistics of {modality}.{key} differ in dimensions ({listed})")
            self.normalizers = {
                m: Normalizer(keys, {k: self.modes[f"{m}.{k}"] for k in keys if f"{m}.{k}" in self.modes})
                for m, keys in statistics.items()
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{tag}: incomplete metadata ({error!r})") from error
        for modality, limit in (("state", config.state_dim), ("action", config.action_dim)):
            found = len(self.normalizers[modality])
            if found > limit:
                raise ValueError(f"{tag}: {found} {modality} dimensions, the network has {limit}")

    # files
    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: Gr00tConfig,
        embodiment_tag: str | None = None,
        modes: Mapping[str, str] | None = None,
        tokenizer: Tokenizer | None = None,
        local_files_only: bool = False,
    ) -> "Gr00tProcessor":
        """Reads experiment_cfg/metadata.json and the tokenizer of a checkpoint (folder or hub id).

        The tag may be None where the file has exactly one. Without tokenizer files the hub's Eagle processor is used.
        Raises FileNotFoundError for absent files, ValueError for an unknown tag or unusable content.
        """
        folder = _resolve(folder, local_files_only)
        file = folder / "experiment_cfg" / "metadata.json"
        metadata = _read_json(file)
        if embodiment_tag is None and len(metadata) == 1:
            embodiment_tag = next(iter(metadata))
        if embodiment_tag not in metadata:
            raise ValueError(f"{file}: embodiment tag {embodiment_tag!r} is not one of {', '.join(sorted(metadata))}")
        tokenizer = tokenizer or load_tokenizer(folder, local_files_only)
        try:
            return cls(config, tokenizer, metadata, embodiment_tag, modes)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes experiment_cfg/metadata.json and tokenizer.json; other tags' entries are kept as they were read."""
        folder = Path(folder)
        entry = {key: value for key, value in self.metadata[self.tag].items() if key != "normalization_modes"}
        if self.modes:
            entry["normalization_modes"] = self.modes
        texts = {
            folder / "experiment_cfg" / "metadata.json": json.dumps({**self.metadata, self.tag: entry}, indent=2),
            folder / "tokenizer.json": self.tokenizer.to_str(pretty=False),
        }
        for file, text in texts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            scratch = file.with_name(f".{file.name}.writing-{os.getpid()}")
            scratch.write_text(text)
            os.replace(scratch, file)

    @classmethod
    def from_statistics(
        cls,
        config: Gr00tConfig,
        tag: str,
        state: Mapping[str, Tensor],
        action: Mapping[str, Tensor],
        video: Mapping[str, Mapping],
        tokenizer: Tokenizer,
        modes: Mapping[str, str] | None = None,
    ) -> "Gr00tProcessor":
        """Statistics of data {key: (N, d)}; video {key: {"resolution": [W, H], "channels", "fps"}} goes along."""
        statistics: dict = {"state": {}, "action": {}}
        modalities: dict = {"video": {key: dict(value) for key, value in video.items()}, "state": {}, "action": {}}
        for modality, data in (("state", state), ("action", action)):
            for key, values in data.items():
                x = values.detach().double().cpu().numpy()  # numpy: torch.quantile stops at 16M elements
                q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
                found = {"max": x.max(0), "min": x.min(0), "mean": x.mean(0), "std": x.std(0), "q01": q01, "q99": q99}
                statistics[modality][key] = {name: value.tolist() for name, value in found.items()}
                described = {"absolute": True, "rotation_type": None, "shape": [x.shape[1]], "continuous": True}
                modalities[modality][key] = described
        metadata = {tag: {"statistics": statistics, "modalities": modalities, "embodiment_tag": tag}}
        return cls(config, tokenizer, metadata, tag, modes)

    def to(self, device: str | torch.device) -> "Gr00tProcessor":
        """Moves the statistics, in place."""
        for normalizer in self.normalizers.values():
            normalizer.to(device)
        return self

    @property
    def embodiment_id(self) -> int:
        """The tag's row of the category-specific layers; 0 in a network with one row."""
        if self.config.num_embodiments == 1:
            return 0
        if self.tag not in EMBODIMENT_IDS:
            raise ValueError(f"embodiment tag {self.tag!r} has no id; known: {', '.join(EMBODIMENT_IDS)}")
        return EMBODIMENT_IDS[self.tag]

    @property
    def camera_size(self) -> int:
        """Height and width [px] of a camera whose images have the network's size once they are cropped."""
        return math.ceil(self.config.image_size / self.config.image_crop)

    # inputs
    def prompt(self, instruction: str, views: int = 1, bracketed: bool = False, pad_to: int | None = None) -> Tensor:
        """Token ids (L,) of an instruction and its camera views.

        Args:
            bracketed: "['sentence']". NVIDIA trains on the plain sentence and serves single observations so.
            pad_to: L, with zeros on the right; None: no padding. RLinf pads ids and mask so (its padding_value, 570 for
                the cube stacking checkpoint); its head attends to the padding, which changes the actions. A policy that
                continues from RLinf's weights needs these ids, and the unpadded lengths for `Backbone.forward`. Read
                off RLinf's code: ids, mask, a head without a mask. Inferred from transformers' code, not run: the
                features of the padding (`Backbone.padding_feature`). Not matched: instructions of different lengths in
                one batch, which RLinf's tokenizer first pads on the left.

        Raises ValueError for a word unknown to a word-level tokenizer and for more than max_prompt_tokens tokens, or
        more than pad_to.
        """
        config = self.config
        instruction = instruction if instruction.strip() else DEFAULT_INSTRUCTION
        text = f"['{instruction}']" if bracketed else instruction
        tokens = config.image_token * config.tokens_per_view
        images = "".join(config.image_template.format(view=view, tokens=tokens) for view in range(1, views + 1))
        text = config.prompt_template.replace("{images}", images).replace("{instruction}", text)
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        unknown_id = self.tokenizer.token_to_id(getattr(self.tokenizer.model, "unk_token", None) or "<unk>")
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id == unknown_id:
                raise ValueError(f"instruction {instruction!r}: the word {text[start:end]!r} is not in the vocabulary")
        if encoding.ids.count(config.image_token_id) != views * config.tokens_per_view:
            raise ValueError(f"instruction {instruction!r}: holds {config.image_token}, kept for image features")
        length, limit = len(encoding.ids), config.max_prompt_tokens
        if length > limit:
            raise ValueError(f"instruction {instruction!r}: {length} prompt tokens, at most {limit} are allowed")
        if pad_to is not None and length > pad_to:
            raise ValueError(f"instruction {instruction!r}: {length} prompt tokens cannot be padded to {pad_to}")
        return pad_prompts([torch.tensor(encoding.ids)], pad_to)[0][0]

    def images(self, images: Tensor, augmentation: Augmentation | None = None) -> Tensor:
        """Pixels (B*V, 3, S, S) in [-1, 1] from uint8 images (B, V, H, W, 3), on their device.

        NVIDIA's evaluation transform: centre crop, antialiased bilinear resize, truncation to uint8. Where neither crop
        nor resize is due the bytes are taken as they are. With an `augmentation`, NVIDIA's training transform: the crop
        is a random one, and colours are jittered after the resize.
        """
        if images.dtype != torch.uint8 or images.ndim != 5 or images.shape[-1] != 3:
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, not uint8 (B, V, H, W, 3)")
        size, crop = self.config.image_size, self.config.image_crop
        x = images.permute(0, 1, 4, 2, 3)  # (B, V, 3, H, W)
        height, width = x.shape[-2:]
        if not x.shape[1]:  # no camera
            return x.new_empty(0, 3, size, size, dtype=torch.float32)
        h, w = int(crop * height), int(crop * width)
        if augmentation is not None:
            x = torch.stack([self._augmented(*sample) for sample in zip(x, *augmentation, strict=True)])
        elif (h, w) != (height, width) or (h, w) != (size, size):
            # torchvision's center_crop
            x = self._resized(x.flatten(0, 1), round((height - h) / 2), round((width - w) / 2), h, w)
            x = (x * 255).to(torch.uint8)  # truncates, as in the reference
        return x.reshape(-1, 3, size, size).float() / 127.5 - 1

    def _resized(self, x: Tensor, top: int, left: int, h: int, w: int) -> Tensor:
        """A crop of uint8 images (..., 3, H, W), in [0, 1], at the network's size."""
        size = self.config.image_size
        x = x[..., top : top + h, left : left + w].float() / 255
        if (h, w) != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
        return x

    def _augmented(self, x: Tensor, crop: Tensor, factors: Tensor, order: Tensor) -> Tensor:
        """One sample's views, uint8 (V, 3, H, W), as uint8 (V, 3, S, S)."""
        from torchvision.transforms.v2 import functional as jitter  # takes seconds, and only imitation needs it

        height, width = x.shape[-2:]
        h, w = int(self.config.image_crop * height), int(self.config.image_crop * width)
        top, left = (int(u * (free + 1)) for u, free in zip(crop.tolist(), (height - h, width - w)))
        x, values = self._resized(x, top, left, h, w), factors.tolist()
        adjust = (jitter.adjust_brightness, jitter.adjust_contrast, jitter.adjust_saturation, jitter.adjust_hue)
        for i in order.tolist():
            x = adjust[i](x, values[i])
        return (x * 255).to(torch.uint8)

    def normalize_state(self, state: Tensor) -> Tensor:
        """Raw state (B, d) -> (B, 1, state_dim), zero-padded on the right."""
        state = self.normalizers["state"].forward(state)
        return F.pad(state, (0, self.config.state_dim - state.shape[-1]))[:, None]

    def normalize_action(self, action: Tensor) -> Tensor:
        """Raw actions (B, H, d) -> (B, H, action_dim), zero-padded on the right."""
        action = self.normalizers["action"].forward(action)
        return F.pad(action, (0, self.config.action_dim - action.shape[-1]))

    def unnormalize_action(self, action: Tensor) -> Tensor:
        """The network's actions (B, H, action_dim) -> raw actions (B, H, d), not clipped."""
        return self.normalizers["action"].inverse(action[..., : self.valid_action_dims])

    @property
    def valid_action_dims(self) -> int:
        """d: the leading action dimensions that are not padding."""
        return len(self.normalizers["action"])


def pad_prompts(prompts: Sequence[Tensor], length: int | None = None) -> tuple[Tensor, Tensor]:
    """Token ids (P, L), padded with zeros on the right to `length` or the longest, and the lengths (P,) before.

    Raises ValueError where a prompt is longer than `length`.
    """
    lengths = [len(prompt) for prompt in prompts]
    length = max(lengths) if length is None else length
    if max(lengths) > length:
        raise ValueError(f"a prompt of {max(lengths)} tokens cannot be padded to {length}")
    return torch.stack([F.pad(prompt, (0, length - len(prompt))) for prompt in prompts]), torch.tensor(lengths)


def load_tokenizer(path: str | Path, local_files_only: bool = False) -> Tokenizer:
    """tokenizer.json if there is one, else the Eagle processor's vocab.json and merges.txt, here or on the hub."""
    folder = _resolve(path, local_files_only)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        try:
            folder = _resolve(EAGLE_PROCESSOR, local_files_only)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder}: has no tokenizer, and the hub's cannot be had; where there is a network: hf download "
                f"{EAGLE_PROCESSOR} --local-dir <folder>, then copy its .json and .txt files, config.json excepted, here"
            ) from error
    try:
        if (folder / "tokenizer.json").is_file():
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        return Qwen2TokenizerFast.from_pretrained(folder).backend_tokenizer
    except Exception as error:  # tokenizers raises a bare Exception
        raise ValueError(f"{folder}: unusable tokenizer files ({error})") from error


def tiny_tokenizer(words: Sequence[str], config: Gr00tConfig) -> Tokenizer:
    """One token per word, split at whitespace: for a network that knows only its task's words.

    Raises ValueError where the words do not fit the config's vocabulary.
    """
    vocabulary = {config.image_token: config.image_token_id}
    free = (i for i in range(config.vocab_size) if i != config.image_token_id)
    for word, token_id in zip(dict.fromkeys(["<unk>", *words]), free, strict=False):
        vocabulary[word] = token_id
    if not set(words) <= set(vocabulary):
        raise ValueError(f"{len(set(words))} words do not fit a vocabulary of {config.vocab_size}")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", config.image_token])
    return tokenizer
