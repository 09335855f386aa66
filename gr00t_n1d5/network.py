"""The network of GR00T N1.5 in plain torch and two stock transformers classes, and its config.json.

What it saves keeps NVIDIA's files and key names; `from_gr00t` and `to_gr00t` copy weights from and to a model that
NVIDIA's package holds in memory.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config, Qwen3Model, SiglipVisionConfig, SiglipVisionModel

from gr00t_n1d5.config import Gr00tConfig
from gr00t_n1d5.files import (
    EMBED,
    INDEX,
    LM_HEAD,
    find_tensors,
    match_live,
    open_safetensors,
    plain_name,
    public_name,
    read_index,
    resolve_folder,
)


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
            # what is left over would go unnoticed; this check does not wait for the device
            if not input_ids.is_meta:
                fits = is_image.sum() == image.shape[0] * image.shape[1]
                torch._assert_async(fits, "image tokens and image features differ in number")
            place = is_image.flatten().cumsum(0).sub_(1).clamp_(min=0).view_as(input_ids)  # masked_scatter's backward waits
            x = torch.where(is_image[..., None], image.flatten(0, 1)[place], x)
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
        """Computes the linear layers of all blocks in float8 from now on, which they have to be frozen for."""
        for name, module in list(self.named_modules()):
            if ".layers." in name and type(module) is nn.Linear and not any(n % 16 for n in module.weight.shape):
                self.set_submodule(name, Fp8Linear(module))
                if module.weight.is_cuda:  # eager, the rounding moves 3.5 times the bytes of the product
                    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
                    self.get_submodule(name).compile()

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
        self.weight, self.bias = linear.weight, linear.bias
        rounded, scale = self.quantize(linear.weight.detach())
        self.register_buffer("rounded", rounded, persistent=False)  # (N, K) e4m3
        self.register_buffer("scale", scale.t().contiguous(), persistent=False)  # (1, N)

    @classmethod
    def quantize(cls, x: Tensor) -> tuple[Tensor, Tensor]:
        """(M, K) -> e4m3 (M, K) and the scales (M, 1) to multiply it with."""
        scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / cls.LARGEST
        return (x.float() / scale).clamp(-cls.LARGEST, cls.LARGEST).to(torch.float8_e4m3fn), scale

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = self.quantize(x.reshape(-1, x.shape[-1]))
        if x.is_cuda:  # scales per row come with bf16 outputs alone
            y = torch._scaled_mm(rows, self.rounded.t(), scale, self.scale, out_dtype=torch.bfloat16, use_fast_accum=True)
        else:
            y = (rows.float() @ self.rounded.float().t()) * scale * self.scale
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        device = x.device.type  # under autocast as a linear layer there: bf16, whatever x is
        y = y.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype)
        return y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y[0]


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
        self.row = 0 if categories == 1 else None  # that of all samples: `Gr00tN1d5.slice_embodiment`

    def forward(self, x: Tensor, category: Tensor) -> Tensor:
        if self.row is not None:  # no copy of the weights per sample, and nothing to look up
            return x @ self.W[self.row] + self.b[self.row]
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

    def float(self) -> "ActionContext":
        """In fp32."""
        return ActionContext(self.state_tokens.float(), tuple((k.float(), v.float()) for k, v in self.key_values), self.mask)


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

    def encode(self, features: Tensor, state: Tensor, embodiment_id: Tensor, lengths: Tensor | None = None) -> ActionContext:
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
        self._rows: list[int] = []

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

    def slice_embodiment(self, embodiment_id: int, others: Sequence[int] = ()) -> Self:
        """Keeps one embodiment's row of the category-specific layers, whatever id samples have. Returns the model itself.

        At full size this leaves 763M of the head's 1069M parameters, and as much less optimizer state. All rows stay on
        the host, and `save_pretrained` writes them back with the trained row in its place. Call it before the optimizer
        is made: the parameters are new objects. Raises ValueError for an unknown row or a second call. A checkpoint with
        one row is left as it is.

        Args:
            others: ids that other processes use, whose rows are kept, too: parameters are the same everywhere.
        """
        if self._tables:
            raise ValueError(f"the model is already sliced to embodiment {', '.join(map(str, self._rows))}")
        if self.config.num_embodiments == 1:
            return self
        rows = sorted({embodiment_id, *others})
        if not 0 <= rows[0] <= rows[-1] < self.config.num_embodiments:
            outside = next(i for i in rows if not 0 <= i < self.config.num_embodiments)
            raise ValueError(f"embodiment id {outside} is not among {self.config.num_embodiments} rows")
        for prefix, module in self.named_modules():
            if isinstance(module, CategorySpecificLinear):
                for name, table in list(module.named_parameters()):
                    self._tables[f"{prefix}.{name}"] = table.detach().to("cpu", copy=True)
                    setattr(module, name, nn.Parameter(table.detach()[rows], requires_grad=table.requires_grad))
                module.row = rows.index(embodiment_id)
        self._rows = rows
        self.config = self.action_head.config = replace(self.config, num_embodiments=len(rows))
        return self

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
        local_files_only: bool = False,
        config: Gr00tConfig | None = None,
    ) -> "Gr00tN1d5":
        """Loads a local folder or a hub id; with dtype None every tensor keeps the type it has in the file.

        The tensors are read one by one, so the host never holds a second copy; `config` may change what has no weights.
        Raises FileNotFoundError where there is no such folder or file, ValueError where a file is damaged, is not GR00T
        N1.5, or its keys or shapes do not fit.
        """
        folder = resolve_folder(path, local_files_only, weights=False)
        config = config or Gr00tConfig.read(folder)
        if (folder / INDEX).is_file():
            read_index(folder)
        with torch.device("meta"):
            model = cls(config)
        folder = resolve_folder(path, local_files_only)
        sources = find_tensors(folder, {name: tuple(p.shape) for name, p in model.named_parameters()})
        for file in sorted({file for file, _ in sources.values()}):
            with open_safetensors(file) as tensors:
                for name, (source_file, key) in sources.items():
                    if source_file != file:
                        continue
                    model._put(name, tensors.get_tensor(key).to(device, dtype, copy=True))  # must not alias the file
        model.backbone.restore_buffers(torch.device(device))
        return model.eval()

    @classmethod
    def from_gr00t(cls, live: nn.Module, dtype: torch.dtype | None = None, config: Gr00tConfig | None = None) -> "Gr00tN1d5":
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
        for name, key in match_live(model, tensors).items():
            model._put(name, tensors[key].to(dtype=dtype, copy=True))
        model.backbone.restore_buffers(next(model.parameters()).device)
        return model.eval()

    @torch.no_grad()
    def to_gr00t(self, live: nn.Module) -> None:
        """Writes the weights into such a live model, which keeps its types and devices; the inverse of `from_gr00t`.

        After `slice_embodiment` all rows are written, the trained ones in their places. Adapters have to be merged before.
        Raises ValueError as `from_gr00t` does; then nothing has been written.
        """
        tensors, parameters = live.state_dict(), dict(self.named_parameters())
        for name, key in match_live(self, tensors).items():
            tensors[key].copy_(self._full(name, parameters[name].detach()))
            if plain_name(name) == EMBED:  # an lm_head that is a tensor of its own follows, as tied weights would
                for other in (k for k in tensors if plain_name(k) == LM_HEAD):
                    tensors[other].copy_(parameters[name])

    def _put(self, name: str, tensor: Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(owner), leaf, nn.Parameter(tensor))

    def save_pretrained(
        self, folder: str | Path, max_shard_bytes: int = 5_000_000_000, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Writes config.json and safetensors in NVIDIA's layout and key names, in shards above the limit.

        `weights` are written in place of the parameters, where other processes hold a share of these.
        The files are written beside the folder and then moved: a crash while writing leaves an old checkpoint whole.
        """
        folder = Path(folder).absolute()
        shards: list[dict[str, Tensor]] = [{}]
        size = total = 0
        for name, parameter in self.named_parameters():
            parameter = weights[name] if weights else parameter.detach()
            tensor = self._tables.get(name, parameter)
            if size + tensor.nbytes > max_shard_bytes and shards[-1]:
                shards.append({})
                size = 0
            size, total = size + tensor.nbytes, total + tensor.nbytes
            shards[-1][name] = parameter
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
                tensors = {public_name(name): self._full(name, p).cpu().contiguous() for name, p in shard.items()}
                save_file(tensors, scratch / file_name, metadata={"format": "pt"})
                shutil.copymode(scratch / "config.json", scratch / file_name)  # safetensors makes it private
                index["weight_map"].update(dict.fromkeys(tensors, file_name))
            if len(shards) > 1:
                (scratch / INDEX).write_text(json.dumps(index, indent=2))
            if not folder.exists():
                os.replace(scratch, folder)
                return
            new = {file.name for file in scratch.iterdir()}
            for name in new:
                os.replace(scratch / name, folder / name)
            for old in [*folder.glob("model*.safetensors"), folder / INDEX]:  # of an earlier save with other shards
                if old.name not in new:
                    old.unlink(missing_ok=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _full(self, name: str, parameter: Tensor) -> Tensor:
        """The tensor to save: after slice_embodiment all rows, with the trained ones in their places."""
        if name not in self._tables:
            return parameter
        table = self._tables[name].to(parameter.dtype, copy=True)
        table[self._rows] = parameter.to(table.device)
        return table
