"""Imitation's gradients, through sft_gr00t.py's own functions: a tiny random GR00T, no simulator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gr00t_n1d5 import Augmentation
from sft_gr00t import Args, Demonstrations, Gr00tPolicy, UsageError, backward, make_policy, resolve

torch.set_num_threads(1)
TEXTS = ("lift the red cube", "lift the blue cube")


def make(checkpoint, **overrides) -> Gr00tPolicy:
    args = resolve(Args(checkpoint=str(checkpoint), device="cpu", num_envs=8, **overrides))
    policy = make_policy(args, TEXTS)
    policy.net.backbone.requires_grad_(args.tune == "all")
    return policy


def gradients(policy: Gr00tPolicy, rows: int = 13, augment: bool = False) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a batch of generated demonstrations; it is no multiple of the micro-batches below."""
    g = torch.Generator().manual_seed(3)
    images = torch.randint(256, (20, 1, 64, 64, 3), generator=g, dtype=torch.uint8)
    action = torch.randn(20, policy.chunk, 4, generator=g)
    demos = Demonstrations(images, torch.randn(20, 5, generator=g), torch.arange(20) % 2, action)
    noise = torch.randn(rows, policy.chunk, policy.net.config.action_dim, generator=g)
    batch = (torch.randint(20, (rows,), generator=g), noise, torch.rand(rows, generator=g))
    loss = backward(policy, demos, *batch, Augmentation.draw(rows, g) if augment else None)
    return float(loss), {name: p.grad for name, p in policy.net.named_parameters() if p.grad is not None}


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in found.values()])


@pytest.mark.parametrize("tune", ["all", "head"])
@pytest.mark.parametrize("flags", [{"micro_batch_size": 4}, {"activation_checkpointing": True}])
def test_memory_options_do_not_change_the_gradient(tiny_checkpoint, tune, flags):
    loss, plain = gradients(make(tiny_checkpoint, tune=tune))
    other, found = gradients(make(tiny_checkpoint, tune=tune, **flags))
    assert other == pytest.approx(loss, rel=1e-5) and found.keys() == plain.keys()
    assert flat(plain).norm() > 0 and (flat(found) - flat(plain)).norm() < 1e-5 * flat(plain).norm()


def test_what_is_trained(tiny_checkpoint):
    """--tune head trains all of the head, the layers that read the features included, and nothing of the backbone."""
    _, found = gradients(make(tiny_checkpoint, tune="head"))
    assert all(name.startswith("action_head.") for name in found)
    for part in ("vlln", "vl_self_attention", "model.transformer_blocks.0.attn1.to_k", "state_encoder", "action_decoder"):
        own = [x for name, x in found.items() if name.startswith(f"action_head.{part}")]
        assert own and any(x.abs().max() > 0 for x in own), part  # the stand-in statistics make the state 0
    _, found = gradients(make(tiny_checkpoint, tune="all"))
    assert any(name.startswith("backbone.vision_model") and x.abs().max() > 0 for name, x in found.items())


def test_bfloat16_backbone(tiny_checkpoint):
    _, plain = gradients(make(tiny_checkpoint, tune="head"))
    _, found = gradients(make(tiny_checkpoint, tune="head", backbone_bf16=True))
    assert not torch.equal(flat(found), flat(plain))
    assert torch.cosine_similarity(flat(found), flat(plain), 0) > 0.99
    with pytest.raises(UsageError, match="--backbone-bf16.*--tune head"):
        make(tiny_checkpoint, tune="all", backbone_bf16=True)


def test_augmentation_is_drawn_once_per_sample(tiny_checkpoint):
    """It changes the gradient; how a batch is cut does not: every sample keeps its own draw."""
    _, plain = gradients(make(tiny_checkpoint))
    loss, found = gradients(make(tiny_checkpoint), augment=True)
    other, cut = gradients(make(tiny_checkpoint, micro_batch_size=4), augment=True)
    assert (flat(found) - flat(plain)).norm() > 0.05 * flat(plain).norm()
    assert other == pytest.approx(loss, rel=1e-5) and (flat(cut) - flat(found)).norm() < 1e-5 * flat(found).norm()


def test_augmentation_by_default_at_full_size(tiny_checkpoint):
    def resolved(**flags):
        return resolve(Args(device="cpu", **flags)).augment

    assert resolved() == resolved(checkpoint=str(tiny_checkpoint)) == "off"
    assert resolved(checkpoint="nvidia/GR00T-N1.5-3B") == "on"
    assert resolved(checkpoint=str(tiny_checkpoint), augment="on") == "on"
    assert resolved(checkpoint="nvidia/GR00T-N1.5-3B", augment="off") == "off"
