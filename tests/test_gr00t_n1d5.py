"""The GR00T N1.5 network, its checkpoint files and its processor. CPU only, a few seconds."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AttentionInterface

from gr00t_n1d5 import (
    EAGLE_PROCESSOR,
    EMBODIMENT_IDS,
    STATISTICS,
    Augmentation,
    CategorySpecificLinear,
    DataConfig,
    Embodiment,
    Gr00tConfig,
    Gr00tN1d5,
    Gr00tProcessor,
    load_tokenizer,
    pad_prompts,
    tiny_tokenizer,
)

GOLDEN = Path(__file__).parent / "golden" / "groot_n1d5.safetensors"
INDEX = "model.safetensors.index.json"
WORDS = ["lift", "the", "red", "blue", "cube"]
EAGLE = "backbone.eagle_model."
LANGUAGE, VISION = EAGLE + "language_model.", EAGLE + "vision_model."


@pytest.fixture(autouse=True)
def seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def golden():
    """The port's tensors: weights (its own keys), inputs, outputs, config.json."""
    with safe_open(GOLDEN, "pt") as f:
        config, tensors = json.loads(f.metadata()["config"]), {key: f.get_tensor(key) for key in f.keys()}
    groups: dict = {"inputs": {}, "outputs": {}, "weights": {}, "config": config}
    for key, tensor in tensors.items():
        group, _, name = key.partition(".")
        if group in ("inputs", "outputs"):
            groups[group][name] = tensor
        else:
            groups["weights"][key] = tensor
    return groups


@pytest.fixture
def folder(golden, tmp_path):
    """A checkpoint folder with the port's weights."""
    write_checkpoint(tmp_path / "checkpoint", golden["weights"], golden["config"])
    return tmp_path / "checkpoint"


def write_checkpoint(folder, weights, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")


def rewrite(folder, change):
    """Applies `change` to the dict of weights in the folder."""
    weights = load_file(folder / "model.safetensors")
    weights = change(dict(weights)) or weights
    save_file(weights, folder / "model.safetensors")


def run(model, inputs, **changes):
    x = {**inputs, **changes}
    names = ("input_ids", "pixel_values", "state", "embodiment_id", "noise")
    return model.get_action(*(x[name] for name in names))


def tiny_inputs(config, batch=3, embodiment=0):
    ids = torch.tensor([2, 3, 4] + [config.image_token_id] * config.tokens_per_view).expand(batch, -1)
    return {
        "input_ids": ids,
        "pixel_values": torch.rand(batch, 3, config.image_size, config.image_size) * 2 - 1,
        "state": torch.randn(batch, 1, config.state_dim),
        "embodiment_id": torch.full((batch,), embodiment),
        "noise": torch.randn(batch, config.action_horizon, config.action_dim),
    }


# -------------------------------------------------------------------------------------------------------------- network
def test_matches_the_port(golden, folder):
    assert len(golden["inputs"]["embodiment_id"].unique()) == 2
    same_as(folder, golden["inputs"], golden["outputs"])


@pytest.mark.parametrize("case", ["one_view", "three_views", "other_max_action_dim"])
def test_matches_nvidias_own_code(case, tmp_path):
    """Other sizes, numbers of views, steps and horizons; an action_dim that max_action_dim does not follow."""
    groups: dict = {"weights": {}, "inputs": {}, "outputs": {}}
    with safe_open(GOLDEN.with_name("nvidia_n1d5.safetensors"), framework="pt") as file:
        config = json.loads(file.metadata()["configs"])[case]
        for key in file.keys():
            if key.startswith(f"{case}/"):
                _, group, name = key.split("/")
                groups[group][name] = file.get_tensor(key)
    write_checkpoint(tmp_path / case, groups["weights"], config)
    same_as(tmp_path / case, groups["inputs"], groups["outputs"])


def same_as(folder, inputs, outputs):
    """Features, actions and loss of a checkpoint."""
    model, embodiment_id = Gr00tN1d5.from_pretrained(folder), inputs["embodiment_id"]
    head = model.action_head
    with torch.no_grad():
        features = model.backbone(inputs["input_ids"], inputs["pixel_values"])
        torch.testing.assert_close(features, outputs["features"], atol=1e-5, rtol=0)
        context = head.encode(features, inputs["state"], embodiment_id)
        actions = head.sample(context, embodiment_id, inputs["noise"])
        torch.testing.assert_close(actions, outputs["actions"], atol=1e-5, rtol=0)
        torch.testing.assert_close(run(model, inputs), actions, atol=0, rtol=0)
        loss = head.flow_matching_loss(
            context, embodiment_id, inputs["action"], inputs["action_mask"], inputs["noise"], inputs["t"]
        )
        torch.testing.assert_close(loss, outputs["loss"], atol=1e-5, rtol=0)


def test_full_size_parameter_counts():
    with torch.device("meta"):
        model = Gr00tN1d5(Gr00tConfig())
    head, backbone = model.action_head, model.backbone

    def count(module):
        return sum(p.numel() for p in module.parameters())

    pooling_head = 15_238_352  # in the checkpoint, not built here
    assert count(backbone.vision_model) == 427_680_704 - pooling_head
    assert count(backbone.mlp1) == 2_361_344
    assert count(backbone.language_model) == 914_674_688
    assert count(head.model) == 550_386_688
    assert count(head.vl_self_attention) == 201_433_088
    parts = (head.state_encoder, head.action_encoder, head.action_decoder)
    assert [round(count(part) / 1e6, 1) for part in parts] == [52.5, 228.2, 34.6]
    assert count(head) == 1_068_806_144
    assert count(model) == 2_413_522_880 - pooling_head
    assert len(model.state_dict()) == 898 - 11  # the pooling head's
    assert model.backbone.language_model.config.rope_parameters["rope_theta"] == 1e6


def test_forward_on_meta_gives_shapes():
    """A meta forward is how FLOPs are counted."""
    config = Gr00tConfig.tiny()
    inputs = {name: x.to("meta") for name, x in tiny_inputs(config).items()}
    with torch.device("meta"):
        assert run(Gr00tN1d5(config), inputs).shape == (3, config.action_horizon, config.action_dim)


def test_keys_and_values_once_equal_recomputing_every_step():
    config = Gr00tConfig.tiny(num_embodiments=2)
    model, inputs = Gr00tN1d5(config), tiny_inputs(config, embodiment=1)
    head, embodiment_id = model.action_head, inputs["embodiment_id"]
    with torch.no_grad():
        features = model.backbone(inputs["input_ids"], inputs["pixel_values"])
        x = inputs["noise"]
        for bucket in (0, 250, 500, 750):
            context = head.encode(features, inputs["state"], embodiment_id)
            x = x + 0.25 * head.velocity(x, torch.full((3,), bucket), embodiment_id, context)
        torch.testing.assert_close(head.sample(context, embodiment_id, inputs["noise"]), x, atol=1e-6, rtol=0)
        other = head.sample(context, embodiment_id, inputs["noise"], steps=3)
        x = inputs["noise"]
        for bucket in (0, 333, 666):
            x = x + head.velocity(x, torch.full((3,), bucket), embodiment_id, context) / 3
        torch.testing.assert_close(other, x, atol=1e-6, rtol=0)


def test_repeated_context_equals_single_samples():
    config = Gr00tConfig.tiny()
    model, inputs = Gr00tN1d5(config), tiny_inputs(config)
    head, embodiment_id = model.action_head, inputs["embodiment_id"]
    noise = torch.randn(6, config.action_horizon, config.action_dim)
    with torch.no_grad():
        features = model.backbone(inputs["input_ids"], inputs["pixel_values"])
        context = head.encode(features, inputs["state"], embodiment_id)
        both = head.sample(context.repeat_interleave(2), embodiment_id.repeat_interleave(2), noise)
        torch.testing.assert_close(both[0::2], head.sample(context, embodiment_id, noise[0::2]), atol=1e-5, rtol=0)
        torch.testing.assert_close(both[1::2], head.sample(context, embodiment_id, noise[1::2]), atol=1e-5, rtol=0)


def test_bf16_backbone_and_fp32_head():
    config = Gr00tConfig.tiny()
    model, inputs = Gr00tN1d5(config), tiny_inputs(config)
    full = run(model, inputs)
    rotary = model.backbone.language_model.rotary_emb.inv_freq.clone()
    model.backbone.to(torch.bfloat16)
    mixed = run(model, inputs, state=inputs["state"].double())
    assert model.backbone(inputs["input_ids"], inputs["pixel_values"]).dtype == torch.bfloat16
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - full).abs().max() < 0.2 * full.std()
    assert torch.equal(model.backbone.language_model.rotary_emb.inv_freq, rotary)  # bf16 would bend the positions
    model.action_head.to(torch.bfloat16)
    assert (
        model.action_head.sample(
            model.action_head.encode(model.backbone(inputs["input_ids"], inputs["pixel_values"]), inputs["state"], None),
            inputs["embodiment_id"],
            inputs["noise"],
        ).dtype
        == torch.float32
    )  # the chain stays in the noise's type


def test_backbone_is_causal():
    """A later token does not change an earlier feature, an earlier one changes the later ones."""
    config = Gr00tConfig.tiny()
    model, inputs = Gr00tN1d5(config), tiny_inputs(config)
    with torch.no_grad():
        before = model.backbone(inputs["input_ids"], inputs["pixel_values"])
        other_image = model.backbone(inputs["input_ids"], -inputs["pixel_values"])
        ids = inputs["input_ids"].clone()
        ids[:, 0] = 9
        other_word = model.backbone(ids, inputs["pixel_values"])
    assert torch.equal(before[:, :3], other_image[:, :3]) and not torch.allclose(before[:, 3:], other_image[:, 3:])
    assert ((before - other_word).abs().amax(-1) > 1e-3).all()


def padded_inputs(config, lengths):
    """tiny_inputs with words behind the image tokens, cut to these lengths and padded with a token that means something."""
    inputs = tiny_inputs(config, len(lengths))
    words = torch.randint(2, 9, (len(lengths), 8))
    ids = torch.cat([inputs["input_ids"], words], 1)[:, : max(lengths)]
    behind = torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None]
    return {**inputs, "input_ids": ids.masked_fill(behind, 5)}


def test_prompts_of_several_lengths_in_one_batch():
    """A padded row gives the actions that it gives alone and unpadded; so do its copies, and so does the loss."""
    config, lengths = Gr00tConfig.tiny(vl_layers=2), [20, 25, 23]
    model, inputs = Gr00tN1d5(config), padded_inputs(Gr00tConfig.tiny(), lengths)
    head = model.action_head
    with torch.no_grad():
        features = model.backbone(inputs["input_ids"], inputs["pixel_values"])
        given = (inputs["state"], inputs["embodiment_id"])
        context = head.encode(features, *given, torch.tensor(lengths))
        actions = head.sample(context, given[1], inputs["noise"])
        twice = head.sample(
            context.repeat_interleave(2), given[1].repeat_interleave(2), inputs["noise"].repeat_interleave(2, 0)
        )
        unmasked = head.sample(head.encode(features, *given), given[1], inputs["noise"])
        for i, n in enumerate(lengths):
            alone = {name: x[i : i + 1] for name, x in inputs.items()}
            expected = run(model, alone, input_ids=alone["input_ids"][:, :n])
            torch.testing.assert_close(actions[i : i + 1], expected, atol=1e-6, rtol=0)
            torch.testing.assert_close(twice[2 * i : 2 * i + 2], expected.expand(2, -1, -1), atol=1e-6, rtol=0)
            assert (unmasked[i] - expected[0]).abs().max() > 1e-3 or n == max(lengths)
    everywhere = features.clone().requires_grad_()
    head.velocity(
        inputs["noise"],
        torch.zeros(3, dtype=torch.long),
        given[1],
        head.encode(everywhere, *given, torch.tensor(lengths)),
    ).sum().backward()
    for row, n in zip(everywhere.grad, lengths, strict=True):
        assert (row[:n] != 0).any(1).all() and (row[n:] == 0).all()
    assert head.encode(features, *given).mask is None  # the fused kernels take no mask


def test_features_of_padding_as_flash_attention_leaves_them():
    """Every layer's attention skips the padding and leaves zeros there, as transformers' unpad_input and pad_input do."""
    config, lengths = Gr00tConfig.tiny(text_layers=3), [20, 25, 23]
    model, inputs = Gr00tN1d5(config), padded_inputs(Gr00tConfig.tiny(), lengths)
    ids, calls = inputs["input_ids"], 0
    for name, p in model.backbone.language_model.named_parameters():
        if "norm" in name:  # they start as ones
            p.data += 0.5 * torch.randn(p.shape)
    ids = ids.masked_fill(torch.arange(25) >= torch.tensor(lengths)[:, None], 0)
    with torch.no_grad():
        found = model.backbone(ids, inputs["pixel_values"], torch.tensor(lengths))
        plain = model.backbone(ids, inputs["pixel_values"])

        def unpadding(module, query, key, value, mask, **kwargs):
            nonlocal calls
            calls += 1
            out = torch.zeros(3, 25, *query.shape[1::2])
            for i, n in enumerate(lengths):
                row = (x[i, :, :n] for x in (query, key, value))
                out[i, :n] = F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True).transpose(0, 1)
            return out, None

        AttentionInterface.register("unpadding", unpadding)
        model.backbone.language_model.config._attn_implementation = "unpadding"
        expected = model.backbone(ids, inputs["pixel_values"])
    assert calls == config.text_layers
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for i, n in enumerate(lengths):
        assert torch.equal(found[i, :n], plain[i, :n])
        assert n == 25 or (found[i, n:] - plain[i, n:]).abs().max() > 0.1


def test_image_tokens_must_match_image_features():
    config = Gr00tConfig.tiny()
    model, inputs = Gr00tN1d5(config), tiny_inputs(config)
    with pytest.raises(RuntimeError, match="differ in number"):
        model.backbone(inputs["input_ids"], torch.cat([inputs["pixel_values"]] * 2))


def test_sample_time_is_the_shifted_beta():
    head = Gr00tN1d5(Gr00tConfig.tiny()).action_head
    t = head.sample_time(40_000, torch.Generator().manual_seed(1))
    assert torch.equal(t, head.sample_time(40_000, torch.Generator().manual_seed(1)))
    beta = 0.999 - 0.999 * t
    for q in (0.1, 0.3, 0.5, 0.7, 0.9):  # the distribution function of Beta(1.5, 1) is x^1.5
        assert beta.quantile(q) == pytest.approx(q ** (1 / 1.5), abs=0.01)


def test_loss_ignores_masked_dimensions():
    config = Gr00tConfig.tiny()
    model, inputs = Gr00tN1d5(config), tiny_inputs(config)
    head, embodiment_id = model.action_head, inputs["embodiment_id"]
    features = model.backbone(inputs["input_ids"], inputs["pixel_values"])
    context = head.encode(features, inputs["state"], embodiment_id)
    action, mask, t = torch.randn_like(inputs["noise"]), torch.ones_like(inputs["noise"]), torch.zeros(3)
    mask[..., 2:] = 0  # at t = 0 the network does not see the action, so a masked one is not seen at all
    loss = head.flow_matching_loss(context, embodiment_id, action, mask, inputs["noise"], t)
    changed = action + (1 - mask) * 5
    assert torch.equal(loss, head.flow_matching_loss(context, embodiment_id, changed, mask, inputs["noise"], t))
    v = head.velocity(inputs["noise"], torch.zeros(3, dtype=torch.long), embodiment_id, context)
    by_hand = (v - (action - inputs["noise"]))[..., :2].square().mean()
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters())


# --------------------------------------------------------------------------------------------------------------- config
def test_config_round_trip():
    for config in (Gr00tConfig(), Gr00tConfig.tiny(), Gr00tConfig.tiny(num_embodiments=5, noise_s=0.9)):
        written = json.loads(json.dumps(config.to_dict()))
        assert Gr00tConfig.from_dict(written) == config
        assert Gr00tConfig.from_dict({**written, "trainer": {"unknown": 1}}) == config
    head = Gr00tConfig().to_dict()["action_head_cfg"]
    assert (head["input_embedding_dim"], head["diffusion_model_cfg"]["output_dim"]) == (1536, 1024)


def test_public_config_is_full_size():
    """The public file, as far as it bears on the network; what it does not carry is full size."""
    public = {
        "model_type": "gr00t_n1_5", "action_dim": 32, "action_horizon": 16, "hidden_size": 2048,
        "backbone_cfg": {"eagle_path": "NVEagle/x", "select_layer": 12, "project_to_dim": None, "tune_visual": True},
        "action_head_cfg": {
            "action_dim": 32, "action_horizon": 16, "add_pos_embed": True, "backbone_embedding_dim": 2048,
            "hidden_size": 1024, "input_embedding_dim": 1536, "max_action_dim": 32, "max_state_dim": 64,
            "noise_beta_alpha": 1.5, "noise_s": 0.999, "num_inference_timesteps": 4, "num_timestep_buckets": 1000,
            "diffusion_model_cfg": {"num_attention_heads": 32, "attention_head_dim": 48, "num_layers": 16},
            "vl_self_attention_cfg": {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 4},
        },
    }  # fmt: skip
    assert Gr00tConfig.from_dict(public) == Gr00tConfig()
    public["action_head_cfg"]["num_inference_timesteps"] = 8
    assert Gr00tConfig.from_dict(public).num_inference_timesteps == 8
    public["backbone_cfg"]["project_to_dim"] = 1536
    with pytest.raises(ValueError, match="project_to_dim is 1536"):
        Gr00tConfig.from_dict(public)
    with pytest.raises(ValueError, match="model_type"):
        Gr00tConfig.from_dict({"model_type": "qwen3"})


def test_config_holds_nothing_that_nvidias_constructors_refuse():
    """NVIDIA's GR00T_N1_5 passes these dicts on as keyword arguments; an unknown one would stop it."""
    config = Gr00tConfig().to_dict()
    assert set(config["backbone_cfg"]) == {
        "tune_llm", "tune_visual", "select_layer", "reproject_vision", "use_flash_attention", "load_bf16", "eagle_path",
        "project_to_dim",
    }  # fmt: skip
    dit = {
        "num_attention_heads", "attention_head_dim", "output_dim", "num_layers", "dropout", "attention_bias",
        "activation_fn", "norm_type", "final_dropout", "positional_embeddings", "interleave_self_attention",
        "cross_attention_dim",
    }  # fmt: skip
    assert set(config["action_head_cfg"]["diffusion_model_cfg"]) <= dit
    assert set(config["action_head_cfg"]["vl_self_attention_cfg"]) <= dit - {"norm_type", "cross_attention_dim"}


# ---------------------------------------------------------------------------------------------------------- checkpoints
def test_saved_files_have_the_ports_keys_and_bytes(golden, folder, tmp_path):
    Gr00tN1d5.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    expected = {key: x for key, x in golden["weights"].items() if ".vision_model.head." not in key}
    assert set(saved) == set(expected)
    assert all(torch.equal(saved[key], expected[key]) for key in saved)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "float32"


def test_shards_and_index(folder, tmp_path, golden):
    model = Gr00tN1d5.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved", max_shard_bytes=100_000)
    files = sorted(file.name for file in (tmp_path / "saved").iterdir())
    index = json.loads((tmp_path / "saved" / INDEX).read_text())
    assert files[1] == f"model-00001-of-{len(files) - 2:05d}.safetensors" and len(files) > 4
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())
    for file in files[1:-1]:
        tensors = load_file(tmp_path / "saved" / file)
        assert sum(x.nbytes for x in tensors.values()) <= 100_000
        assert all(index["weight_map"][key] == file for key in tensors)
    again = Gr00tN1d5.from_pretrained(tmp_path / "saved")
    assert torch.equal(run(again, golden["inputs"]), run(model, golden["inputs"]))
    (tmp_path / "saved" / files[2]).rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=files[2]):
        Gr00tN1d5.from_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved")  # one file over shards: none of the old ones may stay
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["away", "checkpoint", "saved"]  # no scratch left


def test_a_failed_save_leaves_the_old_checkpoint(folder, golden, monkeypatch):
    before = run(Gr00tN1d5.from_pretrained(folder), golden["inputs"])
    model = Gr00tN1d5.from_pretrained(folder)
    model.action_head.vlln.weight.data.zero_()

    def full_disk(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("gr00t_n1d5.network.save_file", full_disk)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    assert torch.equal(run(Gr00tN1d5.from_pretrained(folder), golden["inputs"]), before)
    assert [file.name for file in folder.parent.iterdir()] == ["checkpoint"]


def test_both_spellings_and_lm_head_only(golden, folder):
    before = run(Gr00tN1d5.from_pretrained(folder), golden["inputs"])

    def transformers_5(weights):
        assert any(key.startswith(VISION + "vision_model.") for key in weights)
        return {key.replace("vision_model.vision_model.", "vision_model."): x for key, x in weights.items()}

    rewrite(folder, transformers_5)
    assert torch.equal(run(Gr00tN1d5.from_pretrained(folder), golden["inputs"]), before)

    def lm_head_only(weights):
        weights[LANGUAGE + "lm_head.weight"] = weights.pop(LANGUAGE + "model.embed_tokens.weight")
        return weights

    rewrite(folder, lm_head_only)
    assert torch.equal(run(Gr00tN1d5.from_pretrained(folder), golden["inputs"]), before)

    def both(weights):  # then embed_tokens counts
        weights[LANGUAGE + "model.embed_tokens.weight"] = weights[LANGUAGE + "lm_head.weight"].clone()
        weights[LANGUAGE + "lm_head.weight"].zero_()
        return weights

    rewrite(folder, both)
    assert torch.equal(run(Gr00tN1d5.from_pretrained(folder), golden["inputs"]), before)


def test_misfits_are_listed_together(folder):
    def change(weights):
        del weights["action_head.vlln.bias"]
        weights["action_head.lora_A"] = torch.zeros(1)
        weights["action_head.vlln.weight"] = torch.zeros(3)
        return weights

    rewrite(folder, change)
    with pytest.raises(ValueError) as error:
        Gr00tN1d5.from_pretrained(folder)
    text = str(error.value)
    assert str(folder) in text
    assert "1 missing: action_head.vlln.bias" in text
    assert "1 adapters that are not merged: action_head.lora_A" in text
    assert "1 wrong shape: action_head.vlln.weight (3,) instead of (24,)" in text
    rewrite(folder, lambda weights: {f"x{i}": torch.zeros(1) for i in range(25)})
    with pytest.raises(ValueError, match="missing: .*, and [0-9]+ more"):
        Gr00tN1d5.from_pretrained(folder)


def test_what_others_save_beside_the_network(golden, folder, caplog):
    """NVIDIA warns of keys that it has no use for; some are known and not worth a word."""
    expected = run(Gr00tN1d5.from_pretrained(folder), golden["inputs"])
    rotary, head = "backbone.eagle_model.language_model.model.rotary_emb.inv_freq", "action_head.value_head.mlp.0.weight"
    rewrite(folder, lambda weights: weights | {rotary: torch.zeros(2), head: torch.zeros(2, 2)})
    assert torch.equal(run(Gr00tN1d5.from_pretrained(folder), golden["inputs"]), expected) and not caplog.text
    rewrite(folder, lambda weights: weights | {f"x{i}": torch.zeros(1) for i in range(7)})
    Gr00tN1d5.from_pretrained(folder)
    assert "left out 7 tensors that this network has no place for: x0, x1, x2, x3, x4, and 2 more" in caplog.text


def test_from_before_the_future_tokens(folder, tmp_path):
    """Single file or shards; of shards the index tells it before they are there."""
    Gr00tN1d5.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_bytes=100_000)
    rewrite(folder, lambda weights: {key: x for key, x in weights.items() if "future_tokens" not in key})
    index = tmp_path / "shards" / INDEX
    content = json.loads(index.read_text())
    del content["weight_map"]["action_head.future_tokens.weight"]
    index.write_text(json.dumps(content))
    for shard in (tmp_path / "shards").glob("*.safetensors"):
        shard.unlink()
    for path in (folder, tmp_path / "shards"):
        with pytest.raises(ValueError, match="no action_head.future_tokens.weight: checkpoints from before July 2025"):
            Gr00tN1d5.from_pretrained(path)


def test_damaged_or_absent_files(folder, tmp_path, monkeypatch):
    def fails(error, match, path=folder):
        with pytest.raises(error, match=match) as caught:
            Gr00tN1d5.from_pretrained(path, local_files_only=True)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)

    weights, config = folder / "model.safetensors", folder / "config.json"
    content, text = weights.read_bytes(), config.read_text()
    for damaged in (content[: len(content) // 2], b"", b"\x80\x04pickle"):
        weights.write_bytes(damaged)
        fails(ValueError, "model.safetensors: damaged or not a safetensors file")
    weights.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")  # never read
    fails(FileNotFoundError, "only safetensors")
    weights.write_bytes(content)
    (folder / INDEX).write_text("{}")
    fails(ValueError, "not an index")
    config.write_text(text[:20])
    fails(ValueError, "not valid JSON")
    config.write_text('{"model_type": "llama"}')
    fails(ValueError, "not a GR00T N1.5 config")
    config.unlink()
    fails(FileNotFoundError, "config.json: no such file")
    fails(FileNotFoundError, "no such folder", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    remedy = "nothing from the Hugging Face hub .*: hf download checkpoints/nowhere --local-dir <folder>"
    fails(FileNotFoundError, remedy, "checkpoints/nowhere")


def test_tokenizer_that_cannot_be_had(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError) as error:
        load_tokenizer(tmp_path)
    text = str(error.value)
    assert text.startswith(f"{tmp_path}: has no tokenizer") and f"hf download {EAGLE_PROCESSOR}" in text
    assert "\n" not in text


def test_buffers_and_types_after_loading(folder, golden):
    built = Gr00tN1d5(Gr00tConfig.from_dict(golden["config"]))
    loaded = Gr00tN1d5.from_pretrained(folder, dtype=torch.bfloat16)
    buffers = dict(loaded.named_buffers())
    assert any("inv_freq" in name for name in buffers) and any("position_ids" in name for name in buffers)
    for name, buffer in built.named_buffers():
        assert torch.equal(buffers[name], buffer) and buffers[name].dtype == buffer.dtype, name
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    with torch.device("meta"):
        empty = Gr00tN1d5(built.config)
    empty.to_empty(device="cpu")
    for name, buffer in built.named_buffers():
        assert torch.equal(dict(empty.named_buffers())[name], buffer), name


def test_mixed_types_survive_saving(folder, tmp_path):
    model = Gr00tN1d5.from_pretrained(folder)
    model.backbone.to(torch.bfloat16)
    model.save_pretrained(tmp_path / "saved")
    again = Gr00tN1d5.from_pretrained(tmp_path / "saved")
    assert {p.dtype for p in again.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in again.action_head.parameters()} == {torch.float32}


def test_slice_embodiment(golden, folder, tmp_path):
    model = Gr00tN1d5.from_pretrained(folder)
    inputs = golden["inputs"]
    expected = run(model, inputs, embodiment_id=torch.full((3,), 3))
    sliced = copy.deepcopy(model)
    sliced.slice_embodiment(3)
    assert sliced.config.num_embodiments == 1 and model.config.num_embodiments == 4
    torch.testing.assert_close(run(sliced, inputs, embodiment_id=torch.zeros(3, dtype=torch.long)), expected, atol=1e-5, rtol=0)
    tables = [m for m in sliced.modules() if isinstance(m, CategorySpecificLinear)]
    assert len(tables) == 7 and all(len(m.W) == len(m.b) == 1 and m.W.requires_grad for m in tables)
    with torch.no_grad():
        for parameter in sliced.action_head.action_decoder.parameters():
            parameter.add_(1)
    sliced.save_pretrained(tmp_path / "saved")
    again = Gr00tN1d5.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    old, new = dict(model.named_parameters()), dict(again.named_parameters())
    assert list(old) == list(new)
    for name in old:
        trained = old[name].detach().clone()
        if "action_decoder" in name:
            trained[3] += 1
        assert torch.equal(new[name], trained), name
    with pytest.raises(ValueError, match="already sliced to embodiment 3"):
        sliced.slice_embodiment(0)
    with pytest.raises(ValueError, match="embodiment id 4"):
        model.slice_embodiment(4)


# -------------------------------------------------------------------------------------------------------- live exchange
def live_model(weights, config, dtype=None):
    """A stand-in for GR00T_N1_5: modules and parameters with the public names, lm_head tied, a head of its own."""
    live = nn.Module()
    live.config = SimpleNamespace(to_dict=lambda: config)

    def put(key, parameter):
        owner, (*path, leaf) = live, key.split(".")
        for name in path:
            if name not in dict(owner.named_children()):
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.register_parameter(leaf, parameter)
        return parameter

    for key, x in weights.items():
        parameter = put(key, nn.Parameter(x.to(dtype or x.dtype, copy=True)))
        if key == LANGUAGE + "model.embed_tokens.weight":
            put(LANGUAGE + "lm_head.weight", parameter)
    put("action_head.value_head.weight", nn.Parameter(torch.full((2,), 7.0)))
    return live


def test_from_a_live_model(golden, folder):
    expected = run(Gr00tN1d5.from_pretrained(folder), golden["inputs"])
    live = live_model(golden["weights"], golden["config"])
    model = Gr00tN1d5.from_gr00t(live)
    assert torch.equal(run(model, golden["inputs"]), expected) and not model.training
    for parameter in live.parameters():  # a copy: what the live model does later is its own affair
        parameter.data.zero_()
    assert torch.equal(run(model, golden["inputs"]), expected)
    flat = {key.replace("vision_model.vision_model.", "vision_model."): x for key, x in golden["weights"].items()}
    assert torch.equal(run(Gr00tN1d5.from_gr00t(live_model(flat, golden["config"])), golden["inputs"]), expected)
    live = live_model(golden["weights"], golden["config"], torch.bfloat16)
    assert {p.dtype for p in Gr00tN1d5.from_gr00t(live).parameters()} == {torch.bfloat16}
    model = Gr00tN1d5.from_gr00t(live, torch.float32, Gr00tConfig.from_dict(golden["config"]))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 0 < (run(model, golden["inputs"]) - expected).abs().max() < 0.1


def test_to_a_live_model(golden, folder):
    model = Gr00tN1d5.from_pretrained(folder)
    blank = {key: torch.full_like(x, 5) for key, x in golden["weights"].items()}
    for rename in (str, lambda key: key.replace("vision_model.vision_model.", "vision_model.")):
        live = live_model({rename(key): x for key, x in blank.items()}, golden["config"], torch.bfloat16)
        model.to_gr00t(live)
        found = live.state_dict()
        for key, x in golden["weights"].items():
            unused = ".vision_model.head." in key
            assert torch.equal(found[rename(key)], (blank[key] if unused else x).bfloat16()), key
        assert torch.equal(found["action_head.value_head.weight"], torch.full((2,), 7.0))
        tied = golden["weights"][LANGUAGE + "model.embed_tokens.weight"].bfloat16()
        assert torch.equal(found[LANGUAGE + "lm_head.weight"], tied)
    live = live_model(blank, golden["config"])
    head = live.get_submodule(LANGUAGE + "lm_head")
    head.weight = nn.Parameter(head.weight.detach().clone())  # untied
    model.to_gr00t(live)
    assert torch.equal(head.weight, golden["weights"][LANGUAGE + "model.embed_tokens.weight"])
    assert torch.equal(run(Gr00tN1d5.from_gr00t(live), golden["inputs"]), run(model, golden["inputs"]))


def test_a_sliced_model_writes_all_rows_to_a_live_one(golden, folder):
    model = Gr00tN1d5.from_pretrained(folder)
    model.slice_embodiment(3)
    with torch.no_grad():
        model.action_head.action_decoder.layer2.b.add_(1)
    live = live_model({key: torch.zeros_like(x) for key, x in golden["weights"].items()}, golden["config"])
    model.to_gr00t(live)
    found, key = live.state_dict(), "action_head.action_decoder.layer2.b"
    expected = golden["weights"][key].clone()
    expected[3] += 1
    assert torch.equal(found[key], expected)
    assert torch.equal(found["action_head.state_encoder.layer1.W"], golden["weights"]["action_head.state_encoder.layer1.W"])


def test_a_live_model_that_does_not_fit_is_refused(golden, folder):
    weights = dict(golden["weights"])
    del weights["action_head.vlln.bias"]
    weights["action_head.vlln.weight"] = torch.zeros(3)
    live = live_model(weights, golden["config"])
    before = {key: x.clone() for key, x in live.state_dict().items()}
    model = Gr00tN1d5.from_pretrained(folder)
    for attempt in (lambda: Gr00tN1d5.from_gr00t(live), lambda: model.to_gr00t(live)):
        with pytest.raises(ValueError) as error:
            attempt()
        assert "1 missing: action_head.vlln.bias" in str(error.value)
        assert "1 wrong shape: action_head.vlln.weight (3,) instead of (24,)" in str(error.value)
        assert "value_head" not in str(error.value)
    assert all(torch.equal(x, before[key]) for key, x in live.state_dict().items())
    with pytest.raises(ValueError, match="model_type is 'gr00t_n1_6'"):
        Gr00tN1d5.from_gr00t(live_model(weights, {"model_type": "gr00t_n1_6"}))


# ------------------------------------------------------------------------------------------------------------ processor
@pytest.fixture
def processor():
    return make_processor(Gr00tConfig.tiny())


def make_processor(config, encodings=None):
    state = {"joints": torch.randn(500, 3) * 4 + 1, "gripper": torch.rand(500, 1)}
    action = {"arm": torch.randn(500, 2) * 3 - 2, "hand": (torch.rand(500, 1) > 0.5).float()}
    video = {"front": {"resolution": [64, 64], "channels": 3, "fps": 10}}
    return Gr00tProcessor.from_statistics(config, "gr1", state, action, video, tiny_tokenizer(WORDS, config), encodings)


def test_statistics_and_padding(processor):
    entry = processor.embodiment.metadata["gr1"]
    assert set(entry) == {"statistics", "modalities", "embodiment_tag"} and entry["embodiment_tag"] == "gr1"
    assert set(entry["statistics"]["action"]["arm"]) == set(STATISTICS)
    assert entry["modalities"]["state"]["joints"]["shape"] == [3]
    stats = entry["statistics"]["state"]["joints"]
    top = torch.tensor([[*stats["max"], 1.0]])
    assert processor.normalize_state(top).shape == (1, 1, 8)
    torch.testing.assert_close(processor.normalize_state(top)[0, 0, :3], torch.ones(3))
    assert processor.normalize_state(top)[0, 0, 4:].abs().max() == 0
    assert processor.valid_action_dims == 3
    action = torch.randn(5, 8, 3)
    assert processor.normalize_action(action).shape == (5, 8, 4)
    back = processor.unnormalize_action(processor.normalize_action(action))
    assert back.shape == (5, 8, 3)
    torch.testing.assert_close(back, action, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="5 dimensions, the statistics have 4"):
        processor.normalize_state(torch.zeros(1, 5))


@pytest.mark.parametrize("mode", ["min_max", "q99", "mean_std", "binary", "none"])
def test_normalisation_modes(mode):
    stats = {"min": [-2.0, 3.0], "max": [6.0, 3.0], "mean": [1.0, 3.0], "std": [2.0, 0.0]}  # the second is constant
    stats |= {"q01": [-1.0, 3.0], "q99": [5.0, 3.0]}
    config = Gr00tConfig.tiny()
    metadata = {"gr1": {"statistics": {"state": {"s": stats}, "action": {"a": stats}}, "modalities": {}}}
    data_config = DataConfig((), {"s": mode}, {"a": mode})
    processor = Gr00tProcessor(config, tiny_tokenizer(WORDS, config), Embodiment(metadata, "gr1", data_config))
    x = torch.tensor([[4.0, 0.7], [-3.0, 0.2]])
    expected = {
        "min_max": [[2 * 6 / 8 - 1, 0.0], [2 * -1 / 8 - 1, 0.0]],
        "q99": [[2 * 5 / 6 - 1, 0.7], [-1.0, 0.2]],
        "mean_std": [[1.5, 0.7], [-2.0, 0.2]],
        "binary": [[1.0, 1.0], [0.0, 0.0]],
        "none": [[4.0, 0.7], [-3.0, 0.2]],
    }[mode]
    torch.testing.assert_close(processor.normalize_state(x)[:, 0, :2], torch.tensor(expected))
    y = torch.tensor([[[0.5, 0.3, 9.0, 9.0]]])
    inverse = {"min_max": [4.0, 3.0], "q99": [3.5, 3.0], "mean_std": [2.0, 3.0], "binary": [0.0, 0.0]}
    inverse = inverse.get(mode, [0.5, 0.3])
    torch.testing.assert_close(processor.unnormalize_action(y)[0, 0], torch.tensor(inverse))
    if mode != "binary":
        inside = torch.tensor([[[4.0, 3.0]]])
        torch.testing.assert_close(processor.unnormalize_action(processor.normalize_action(inside)), inside)


def test_processor_files(processor, tmp_path):
    processor.embodiment.metadata["other"] = {"kept": True}
    processor.save_pretrained(tmp_path)
    for tag, why in ((None, "--embodiment-tag: needed for"), ("gr2", "--embodiment-tag gr2: is not in")):
        with pytest.raises(SystemExit, match=f"{why}.*metadata.json, which has gr1, other"):
            Gr00tProcessor.from_pretrained(tmp_path, processor.config, tag)
    again = Gr00tProcessor.from_pretrained(tmp_path, processor.config, "gr1")
    assert again.embodiment.to_dict() == processor.embodiment.to_dict()
    x = torch.randn(4, 4)
    assert torch.equal(again.normalize_state(x), processor.normalize_state(x))
    assert torch.equal(again.prompt("lift the red cube"), processor.prompt("lift the red cube"))
    binary = make_processor(processor.config, {"action.hand": "binary"})
    binary.save_pretrained(tmp_path / "binary")
    again = Gr00tProcessor.from_pretrained(tmp_path / "binary", processor.config)
    assert again.embodiment.data.action == {"arm": "min_max", "hand": "binary"}
    assert again.unnormalize_action(torch.full((1, 1, 4), 0.6))[0, 0, 2] == 1
    file = tmp_path / "binary" / "experiment_cfg" / "metadata.json"
    content = json.loads(file.read_text())
    del content["gr1"]["statistics"]["state"]["joints"]["q99"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="state.joints lack q99"):
        Gr00tProcessor.from_pretrained(tmp_path / "binary", processor.config)
    content["gr1"]["statistics"]["state"]["joints"]["q99"] = [1.0, 2.0]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"gr1: statistics of state.joints differ .*q01 3, q99 2"):
        Gr00tProcessor.from_pretrained(tmp_path / "binary", processor.config)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="metadata.json"):
        Gr00tProcessor.from_pretrained(tmp_path / "binary", processor.config)
    with pytest.raises(ValueError, match="unknown keys: action.foot"):
        make_processor(processor.config, {"action.foot": "binary"})
    with pytest.raises(ValueError, match="'minmax'.* is not one of"):
        make_processor(processor.config, {"action.hand": "minmax"})
    with pytest.raises(ValueError, match="4 state dimensions, the network has 2"):
        make_processor(Gr00tConfig.tiny(state_dim=2))


def test_embodiment_ids(processor):
    assert processor.embodiment_id == 0  # one row
    assert make_processor(Gr00tConfig.tiny(num_embodiments=32)).embodiment_id == 24
    assert {EMBODIMENT_IDS[tag] for tag in ("new_embodiment", "oxe_droid", "agibot_genie1")} == {31, 17, 26}


def reference_images(image, size, crop):
    """Slow and independent: antialiased bilinear resampling as a weighted mean under a triangle, one axis at a time."""
    height, width = image.shape[:2]
    h, w = int(crop * height), int(crop * width)
    top, left = int(round((height - h) / 2)), int(round((width - w) / 2))
    x = image[top : top + h, left : left + w].double() / 255

    def resample(x, n):  # along the first axis
        scale = len(x) / n
        support, out = max(scale, 1.0), []
        for i in range(n):
            center = (i + 0.5) * scale
            weights = [max(0.0, 1 - abs(j + 0.5 - center) / support) for j in range(len(x))]
            out.append(sum(weight * x[j] for j, weight in enumerate(weights) if weight) / sum(weights))
        return torch.stack(out)

    x = resample(resample(x, size).transpose(0, 1), size).transpose(0, 1)
    return (x * 255).permute(2, 0, 1)


@pytest.mark.parametrize("shape, views", [((75, 90), 2), ((20, 31), 1), ((256, 256), 1), ((64, 48), 2)])
def test_images_against_a_slow_formula(shape, views):
    config = Gr00tConfig.tiny(image_size=32, image_crop=0.95)
    images = torch.randint(0, 256, (2, views, *shape, 3), dtype=torch.uint8)
    pixels = make_processor(config).images(images)
    assert pixels.shape == (2 * views, 3, 32, 32) and pixels.dtype == torch.float32
    values = (pixels + 1) * 127.5
    whole = values.round()
    torch.testing.assert_close(values, whole, atol=1e-4, rtol=0)  # truncated to uint8
    for i in range(2 * views):  # sample-major
        exact = reference_images(images[i // views, i % views], 32, 0.95)
        safe = (exact - exact.round()).abs() > 1e-3  # fp32 may fall on either side of a whole number
        assert safe.float().mean() > 0.95
        assert torch.equal(whole[i][safe].double(), exact.floor()[safe])


@pytest.mark.parametrize("shape", [(256, 256), (224, 224), (480, 640), (300, 200)])
def test_images_against_torchvision(shape):
    """The transforms of NVIDIA's data configs, at full size."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    height, width = shape
    images = torch.randint(0, 256, (1, 2, height, width, 3), dtype=torch.uint8)
    crop = transforms.CenterCrop((int(height * 0.95), int(width * 0.95)))
    resize = transforms.Resize((224, 224), interpolation=transforms.InterpolationMode.BILINEAR, antialias=True)
    expected = resize(crop(images[0].permute(0, 3, 1, 2).float() / 255)) * 255
    config = Gr00tConfig.tiny(image_size=224, image_crop=0.95)
    found = (make_processor(config).images(images) + 1) * 127.5
    torch.testing.assert_close(found, expected.to(torch.uint8).float(), atol=1e-4, rtol=0)


def test_augmentation_against_torchvision():
    """RandomCrop, Resize and ColorJitter with the drawn parameters, one draw for all views of a sample."""
    transforms = pytest.importorskip("torchvision.transforms.v2")
    images = torch.randint(0, 256, (3, 2, 40, 60, 3), dtype=torch.uint8)
    draws = Augmentation(
        torch.tensor([[0.0, 0.999999], [0.999999, 0.0], [0.4, 0.6]]),  # a free margin of 2 and 3 pixels
        torch.tensor([[0.8, 1.3, 0.6, 0.05], [1.2, 0.7, 1.4, -0.08], [1.0, 1.0, 1.0, 0.0]]),
        torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3], [2, 3, 1, 0]]),
    )
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    jitter = transforms.ColorJitter(0.3, 0.4, 0.5, 0.08)
    resize = transforms.Resize((32, 32), interpolation=transforms.InterpolationMode.BILINEAR, antialias=True)
    config = Gr00tConfig.tiny(image_size=32, image_crop=0.95)
    found = ((make_processor(config).images(images, draws) + 1) * 127.5).unflatten(0, (3, 2))
    for i, (top, left) in enumerate([(0, 3), (2, 0), (1, 2)]):
        x = transforms.functional.crop(images[i].permute(0, 3, 1, 2), top, left, 38, 57)
        params = {"fn_idx": draws.order[i], **dict(zip(names, draws.factors[i].tolist(), strict=True))}
        expected = (jitter.transform(resize(x.float() / 255), params) * 255).to(torch.uint8)
        torch.testing.assert_close(found[i], expected.float(), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="zip"):
        make_processor(config).images(images[:2], draws)


def test_draws_of_the_augmentation():
    """NVIDIA's ranges, evenly, and nothing but the generator decides."""
    draws = Augmentation.draw(20_000, torch.Generator().manual_seed(1))
    again = Augmentation.draw(20_000, torch.Generator().manual_seed(1))
    assert all(torch.equal(x, y) for x, y in zip(draws, again, strict=True))
    state = torch.get_rng_state()
    Augmentation.draw(5, torch.Generator().manual_seed(2))
    assert torch.equal(torch.get_rng_state(), state)
    low, high = torch.tensor([0.7, 0.6, 0.5, -0.08]), torch.tensor([1.3, 1.4, 1.5, 0.08])
    uniform = torch.cat([draws.crop, (draws.factors - low) / (high - low)], 1)
    assert uniform.min() >= -1e-5 and uniform.max() <= 1 + 1e-5 and draws.crop.max() < 1
    for q in (0.001, 0.25, 0.5, 0.75, 0.999):
        torch.testing.assert_close(uniform.quantile(q, 0), torch.full((6,), q), atol=0.02, rtol=0)
    assert torch.equal(draws.order.sort(1).values, torch.arange(4).expand(20_000, 4))
    assert len(draws.order.unique(dim=0)) == 24
    everything = torch.cat([uniform, draws.order[:, :3]], 1).T.corrcoef() - torch.eye(9)
    everything[6:, 6:] = 0  # what comes first does not come second
    assert everything.abs().max() < 0.03


def test_images_pass_untouched_where_nothing_is_due(processor):
    images = torch.randint(0, 256, (2, 1, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(processor.images(images), images[:, 0].permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert processor.images(images[..., :50, :]).shape == (2, 3, 64, 64)
    for wrong in (images.float(), images[0]):
        with pytest.raises(ValueError, match="not uint8"):
            processor.images(wrong)


def test_tiny_prompt(processor):
    config, tokenizer = processor.config, processor.tokenizer
    prompt = processor.prompt("lift the red cube")
    words = [tokenizer.token_to_id(word) for word in ("lift", "the", "red", "cube")]
    assert prompt.tolist() == words + [config.image_token_id] * 16 and prompt.dtype == torch.int64
    with pytest.raises(ValueError, match="'lift the green cube'.*'green'"):
        processor.prompt("lift the green cube")
    with pytest.raises(ValueError, match="'lift lift .*20 tokens beside the images, at most 16"):
        processor.prompt("lift " * 20)
    with pytest.raises(ValueError, match="kept for image features"):
        processor.prompt("lift <IMG_CONTEXT>")
    with pytest.raises(ValueError, match="do not fit a vocabulary of 4"):
        tiny_tokenizer(WORDS, Gr00tConfig.tiny(vocab_size=4))
    with pytest.raises(ValueError, match="tokenizer has <IMG_CONTEXT> at 1, the config at 2"):
        Gr00tProcessor(Gr00tConfig.tiny(image_token_id=2), tokenizer, processor.embodiment)


def test_padded_prompts(processor):
    short, long = processor.prompt("lift cube"), processor.prompt("lift the red cube")
    assert processor.prompt("lift cube", pad_to=21).tolist() == short.tolist() + [0] * 3
    assert torch.equal(processor.prompt("lift cube", pad_to=18), short)
    with pytest.raises(ValueError, match="'lift the red cube'.* 20 prompt tokens cannot be padded to 19"):
        processor.prompt("lift the red cube", pad_to=19)
    ids, lengths = pad_prompts([short, long])
    assert lengths.tolist() == [18, 20] and ids[0].tolist() == short.tolist() + [0, 0] and torch.equal(ids[1], long)
    assert pad_prompts([short, long], 24)[0].shape == (2, 24)
    with pytest.raises(ValueError, match="20 tokens cannot be padded to 19"):
        pad_prompts([short, long], 19)


SPECIAL = {
    "<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645, "<IMG_CONTEXT>": 151669, "<img>": 151670,
    "</img>": 151671,
}  # fmt: skip
PREFIX = [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]
SUFFIX = [151645, 198, 151644, 77091, 198]


def eagle_stand_in():
    """Qwen's pieces of the fixed text, with their true ids; the real tokenizer files cannot be had offline."""
    pieces = ["system", "\n", "You", " are", " a", " helpful", " assistant", "."]
    pieces += ["user", "assistant", "<", "image", " "]
    ids = [8948, 198, 2610, 525, 264, 10950, 17847, 13, 872, 77091, 27, 1805, 220]
    vocabulary = {**dict(zip(pieces, ids, strict=True)), "1": 16, "2": 17, "3": 18, ">": 29, **SPECIAL}
    vocabulary |= {"lift": 1, " the": 2, " cube": 3, "['": 4, "']": 5}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|endoftext|>"))
    split = Regex(r"\n|<|>|[0-9]|\.| (?=[0-9])| ?[A-Za-z]+| ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(split, "isolated")
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def test_full_size_prompt_layout():
    config = Gr00tConfig()
    stats = {name: [0.0] for name in STATISTICS}
    metadata = {"gr1": {"statistics": {"state": {"s": stats}, "action": {"a": stats}}, "modalities": {}}}
    data_config = DataConfig((), {"s": "min_max"}, {"a": "min_max"})
    processor = Gr00tProcessor(config, eagle_stand_in(), Embodiment(metadata, "gr1", data_config))
    for views in (1, 2, 3):
        ids = processor.prompt("lift the cube", views).tolist()
        images = [[27, 1805, 220, 16 + view, 29, 151670] + [151669] * 256 + [151671] for view in range(views)]
        assert ids == PREFIX + sum(images, []) + [1, 2, 3] + SUFFIX
        assert len(ids) == 19 + 263 * views + 3
    bracketed = PREFIX + sum(images, []) + [4, 1, 2, 3, 5] + SUFFIX
    assert processor.prompt("lift the cube", 3, bracketed=True).tolist() == bracketed
    assert processor.prompt("lift the cube", 3, pad_to=850).tolist() == ids + [0] * 39  # Isaac Lab's for Assemble-Trocar
    with pytest.raises(ValueError, match="131 tokens beside the images, at most 128"):
        processor.prompt("lift" + " the" * 104, 1)


def test_eagle_tokenizer_files(processor, tmp_path):
    """vocab.json, merges.txt and tokenizer_config.json, as the Eagle processor has them."""
    processor.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    vocabulary = {"l": 0, "i": 1, "f": 2, "t": 3, "li": 4, "ft": 5, "lift": 6}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nl i\nf t\nli ft\n")
    token = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    added = {str(i): {"content": text, **token} for i, text in ((7, "<|endoftext|>"), (8, "<IMG_CONTEXT>"))}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added, "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "pad_token": "<|endoftext|>"}))
    config = Gr00tConfig.tiny(image_token_id=8)
    prompt = Gr00tProcessor.from_pretrained(tmp_path, config).prompt("lift")
    assert prompt.tolist() == [6] + [8] * 16
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="unusable tokenizer files"):
        Gr00tProcessor.from_pretrained(tmp_path, config)
