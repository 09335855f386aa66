"""The straightforward way to ask GR00T N1.5 for actions: what `throughput.py` measures first, in the same process.

As in NVIDIA's own inference (Isaac-GR00T at 4af2b62, `Gr00tPolicy.get_action`) and in what builds on it:
- the images leave the device; crop, resize and scaling run on the CPU, through numpy;
- bf16 weights under bf16 autocast;
- Eagle is a causal language model: logits of all tokens over the whole vocabulary are computed, and dropped;
- each denoising step projects the features to keys and values again;
- the category-specific layers hold every embodiment's row, and look theirs up per sample.

Left out in its favour: the tokenizer (prompts are tokenised once), Eagle's list of hidden states, and its image processor,
which takes one image at a time (here the batch is one array, on all cores). Attention is torch's
scaled_dot_product_attention, not flash-attn's package.
`throughput.py` subclasses `Straightforward` and exchanges its methods one at a time.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import StageTimer
from gr00t_n1d5.network import ActionContext, Gr00tN1d5
from gr00t_n1d5.processor import Gr00tProcessor


class Straightforward:
    """One policy call for a fixed batch: `policy(images, state, noise)` -> normalised and raw actions.

    Args:
        net: on one device, with all embodiments' rows.
        input_ids: (B, L), on that device.
        autocast: run under bf16 autocast.
    """

    def __init__(self, net: Gr00tN1d5, processor: Gr00tProcessor, input_ids: Tensor, autocast: bool):
        self.net, self.input_ids, self.autocast = net, input_ids, autocast
        self.device = input_ids.device
        self.processor, self.host = processor.to(self.device), copy.deepcopy(processor).to("cpu")
        self.embodiment_id = torch.full((len(input_ids),), processor.embodiment_id, device=self.device)
        self.timer = StageTimer(str(self.device))

    @torch.no_grad()
    def __call__(self, images: Tensor, state: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised actions (B, H, A) and raw ones (B, H, d).

        Args:
            images: (B, V, H, W, 3) uint8, on the device.
            state: (B, d) in the simulator's units.
            noise: (B, H, A) fp32, what the ODE starts from.
        """
        with torch.autocast(self.device.type, torch.bfloat16, self.autocast):
            with self.timer("inputs"):
                pixels, state = self.pixels(images), self.state(state)
            with self.timer("backbone"):
                features = self.features(pixels)
            with self.timer("head"):
                actions = self.actions(features, state, noise)
                return actions, self.processor.unnormalize_action(actions)

    def pixels(self, images: Tensor) -> Tensor:
        """(B, V, H, W, 3) -> (B*V, 3, S, S) in [-1, 1]."""
        size, crop = self.host.config.image_size, self.host.config.image_crop
        x = images.flatten(0, 1).cpu().numpy()  # (B*V, H, W, 3)
        height, width = x.shape[1:3]
        h, w = int(crop * height), int(crop * width)
        top, left = round((height - h) / 2), round((width - w) / 2)
        x = x[:, top : top + h, left : left + w].astype(np.float32) / 255
        if (h, w) != (size, size):
            planes = torch.from_numpy(x).permute(0, 3, 1, 2)
            planes = F.interpolate(planes, (size, size), mode="bilinear", antialias=True, align_corners=False)
            x = planes.permute(0, 2, 3, 1).numpy()
        x = (x * 255).astype(np.uint8)  # truncates, as in the reference
        x = np.moveaxis(x, 3, 1).astype(np.float32) / 127.5 - 1
        return torch.from_numpy(x).to(self.device)

    def state(self, state: Tensor) -> Tensor:
        """(B, d) -> (B, 1, state_dim), normalised."""
        return self.host.normalize_state(state.cpu()).to(self.device)

    def features(self, pixels: Tensor) -> Tensor:
        """(B, L, D); the tied lm_head turns them into logits (B, L, vocabulary) that nobody reads."""
        features = self.net.backbone(self.input_ids, pixels)
        F.linear(features, self.net.backbone.language_model.embed_tokens.weight)
        return features

    def actions(self, features: Tensor, state: Tensor, noise: Tensor) -> Tensor:
        """(B, H, A) by the ODE, normalised."""
        head, x = self.net.action_head, noise
        steps, buckets = head.config.num_inference_timesteps, head.config.num_timestep_buckets
        vl = head.vl_self_attention(head.vlln(features.to(head.dtype)))
        state_tokens = head.state_encoder(state.to(head.dtype), self.embodiment_id)
        for k in range(steps):
            key_values = tuple(block.attn1.key_value(vl) for block in head.model.transformer_blocks[::2])
            bucket = torch.full((len(x),), int(k / steps * buckets), device=x.device)
            v = head.velocity(x, bucket, self.embodiment_id, ActionContext(state_tokens, key_values))
            x = x + v.to(x.dtype) / steps
        return x
