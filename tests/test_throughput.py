"""benchmarks/throughput.py and baseline_path.py: every lever computes the same actions, costs are counted right. CPU, tiny."""

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks import throughput
from benchmarks.throughput import LEVERS, Args, Inputs, Policy, Results, cost, operations, resolve
from common import Noise
from gr00t_n1d5.network import ActionHead, Attention, Fp8Linear, Gr00tConfig, Gr00tN1d5, SelfAttentionBlock
from gr00t_n1d5.processor import Gr00tProcessor

torch.set_num_threads(1)
EXACT = [name for name in LEVERS if name not in ("cuda-graph", "fp8")]  # in fp32 they change nothing


def tiny(tmp_path, **flags) -> Args:
    """`eager`: what torch.compile traces is run without generating code for it, which takes a minute."""
    flags = {"views": (2,), "batch_sizes": (3,), "compile_backend": "eager", "repeats": 3, **flags}
    return Args(size="tiny", device="cpu", out=tmp_path / "out", **flags)


def rows_of(results: Results, what: str) -> dict[str, dict]:
    return {row["lever"]: row for row in results.rows.values() if row["what"] == what}


@pytest.fixture(scope="module")
def setting():
    """Network, processor and observations of two views, in fp32."""
    config = throughput.make_config("tiny")
    processor = throughput.make_processor(config)
    net = throughput.make_net(config, "cpu", torch.float32, seed=1)
    return config, net, processor, Inputs(config, processor, 2, 3, "cpu", seed=1)


def pulled(setting, *levers) -> Policy:
    config, net, processor, inputs = setting
    policy = Policy(copy.deepcopy(net), copy.deepcopy(processor), inputs.ids, torch.float32, "eager")
    for lever in levers:
        policy.pull(lever)
    return policy


# ---------------------------------------------------------------- the ladder


@pytest.fixture(scope="module")
def exact(tmp_path_factory):
    return throughput.main(tiny(tmp_path_factory.mktemp("exact"), what=("rollout",), dtype="float32"))


def test_every_lever_keeps_the_actions_in_fp32(exact):
    rows = rows_of(exact, "rollout")
    assert list(rows) == ["straightforward", *LEVERS]
    for name in ("straightforward", *EXACT):
        assert rows[name]["status"] == "ok" and rows[name]["max_difference"] < 1e-5, rows[name]
    assert rows["cuda-graph"]["status"] == "not run: needs a CUDA GPU"
    assert 1e-4 < rows["fp8"]["relative_difference"] < 0.1  # rounded, and by no more than float8 rounds


def test_rates_follow_from_the_time(exact):
    gflop, tflops = cost(throughput.make_config("tiny"), 2)["call"], exact.rows["what=matmul"]["tflops"]
    row = rows_of(exact, "rollout")["kv-once"]
    low, high = row["range"]
    assert 0 < low <= row["seconds"] <= high and row["repeats"] == 3
    assert row["observations_per_s"] == pytest.approx(3 / row["seconds"])
    assert row["env_steps_per_s"] == pytest.approx(8 * row["observations_per_s"])  # the tiny network's horizon
    assert all(ms > 0 for ms in row["stage_ms"].values()) and sum(row["stage_ms"].values()) > 300 * low
    assert row["mfu"] == pytest.approx(row["observations_per_s"] * gflop * 1e9 / (tflops * 1e12))


def test_bf16_changes_little(tmp_path):
    results = throughput.main(tiny(tmp_path, what=("rollout",), levers=[n for n in LEVERS if n != "compile"]))
    for name, row in rows_of(results, "rollout").items():
        if name != "cuda-graph":
            assert row["status"] == "ok" and 1e-4 < row["relative_difference"] < 0.1, (name, row)


def swapped(key_values):
    return tuple((k.flip(0), v) for k, v in key_values)


WRONG = {
    "kv-once": (ActionHead, "encode", lambda f: lambda *x: f(*x)._replace(key_values=swapped(f(*x).key_values))),
    "one-embodiment": (Gr00tN1d5, "slice_embodiment", lambda f: lambda net, row: f(net, row - 1)),
    "device-inputs": (Gr00tProcessor, "normalize_state", lambda f: lambda own, x: f(own, 1.1 * x)),
    "fp8": (Fp8Linear, "forward", lambda f: lambda layer, x: 1.2 * f(layer, x)),
}


@pytest.mark.parametrize("lever", WRONG)
def test_a_wrong_lever_shows(lever, setting, monkeypatch):
    config, net, processor, inputs = setting
    expected = throughput.reference(net, processor, inputs, 3)
    owner, name, wrong = WRONG[lever]
    policy = pulled(setting)
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    policy.pull(lever)
    row = throughput.measure_call(policy, inputs, expected, tiny(Path()), 1.0, 1.0)
    assert row["relative_difference"] > (0.1 if lever == "fp8" else 1e-3)  # more than any right one


def test_levers_do_what_they_say(setting, monkeypatch):
    """Each is told from what runs: lm_head, keys and values, rows, where images are prepared, float8 weights."""
    config, net, processor, inputs = setting
    policy = pulled(setting)
    seen = {"lm_head": 0, "key_value": 0, "images": 0}
    linear, key_value, images = nn.functional.linear, Attention.key_value, Gr00tProcessor.images

    def counting_linear(x, weight, *rest):
        seen["lm_head"] += len(weight) == config.vocab_size
        return linear(x, weight, *rest)

    def counting_key_value(layer, x):
        seen["key_value"] += layer is cross
        return key_value(layer, x)

    def counting_images(own, x):
        seen["images"] += 1
        return images(own, x)

    cross = policy.net.action_head.model.transformer_blocks[0].attn1
    monkeypatch.setattr(nn.functional, "linear", counting_linear)
    monkeypatch.setattr(Attention, "key_value", counting_key_value)
    monkeypatch.setattr(Gr00tProcessor, "images", counting_images)

    def call() -> dict:
        seen.update(dict.fromkeys(seen, 0))
        policy(inputs.images, inputs.state, inputs.noise)
        return dict(seen)

    assert call() == {"lm_head": 1, "key_value": 4, "images": 0}
    policy.pull("no-lm-head")
    assert call() == {"lm_head": 0, "key_value": 4, "images": 0}
    policy.pull("kv-once")
    assert call()["key_value"] == 1
    policy.pull("device-inputs")
    assert call()["images"] == 1
    assert len(policy.net.action_head.state_encoder.layer1.W) == 32
    policy.pull("one-embodiment")
    assert len(policy.net.action_head.state_encoder.layer1.W) == 1 and policy.embodiment_id.tolist() == [0, 0, 0]
    policy.pull("fp8")
    kinds = [type(m) for block in policy.backbone_blocks() for m in block.modules() if hasattr(m, "bias")]
    assert Fp8Linear in kinds and nn.Linear not in kinds
    assert len([m for m in policy.net.modules() if isinstance(m, Fp8Linear)]) == 2 * 6 + 2 * 7  # tiny has two layers each


def test_the_compiled_call_is_one_graph(setting):
    """What the lever cuda-graph captures on a GPU, run by `eager`; float8's one-time measurement stays outside."""
    config, net, processor, inputs = setting
    policy, call = pulled(setting, *EXACT), (inputs.images, inputs.state, inputs.noise)
    whole = torch.compile(policy.denoise, backend="eager", fullgraph=True)
    with torch.no_grad():
        found, expected = whole(*call), policy(*call)
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(found, expected))


def test_autocast_ends_with_its_lever(setting, monkeypatch):
    config, net, processor, inputs = setting
    policy = Policy(copy.deepcopy(net).bfloat16(), copy.deepcopy(processor), inputs.ids, torch.bfloat16, "eager")
    seen, backbone = [], type(net.backbone).forward
    monkeypatch.setattr(type(net.backbone), "forward", lambda *x: seen.append(torch.is_autocast_enabled("cpu")) or backbone(*x))
    policy(inputs.images, inputs.state, inputs.noise)
    policy.pull("bf16-weights")
    policy(inputs.images, inputs.state, inputs.noise)
    assert seen == [True, False]


@pytest.mark.slow
def test_compile_shares_one_compilation_among_equal_blocks(setting):
    config, net, processor, inputs = setting
    policy = pulled(setting, *EXACT)
    counter = torch._dynamo.testing.CompileCounter()
    for block in policy.blocks():
        block.compile(backend=counter, dynamic=False)
    for _ in range(2):
        policy(inputs.images, inputs.state, inputs.noise)
    assert counter.frame_count == 5  # vision, language, the head's self-attention, and the DiT's two kinds


# ---------------------------------------------------------------- operations and bytes


def test_operations_of_a_linear_layer_and_an_attention_block():
    rows, dim, heads, size = 7, 32, 4, 8
    with torch.device("meta"):
        assert operations(lambda: nn.Linear(24, 40)(torch.zeros(rows, 24))) == 2 * rows * 24 * 40
        block, x = SelfAttentionBlock(dim, heads, size), torch.zeros(3, rows, dim)
        # q, k, v, out: 4 dim^2; feed-forward: 8 dim^2; scores and their product with v: 2 rows dim each
        forward = 3 * rows * (2 * 12 * dim**2 + 4 * rows * dim)
        with torch.no_grad():
            assert operations(lambda: block(x)) == forward
        assert operations(lambda: block(x.requires_grad_()).sum().backward()) == 3 * forward


def by_hand(c: Gr00tConfig, views: int) -> dict[str, float]:
    """Vision and language from the config, term by term [GFLOP]."""
    P, D, E = views * c.tokens_per_view, c.vision_hidden_size, c.text_hidden_size
    L = P + throughput.TEXT
    layer = 2 * P * (4 * D * D + 2 * D * c.vision_intermediate_size) + 4 * P * c.tokens_per_view * D
    vision = 2 * P * 3 * c.patch_size**2 * D + c.vision_layers * layer + 2 * P * D * E
    q, kv = c.text_heads * c.text_head_dim, c.text_kv_heads * c.text_head_dim
    rotary = L * c.text_head_dim  # angles: positions times frequencies
    llm = rotary + c.text_layers * (2 * L * (2 * E * q + 2 * E * kv + 3 * E * c.text_intermediate_size) + 4 * L * L * q)
    vl = c.vl_layers * (2 * L * 12 * E * E + 4 * L * L * E)
    key_value = c.dit_layers // 2 * 2 * 2 * L * E * c.dit_dim
    found = {"vision": vision, "llm": llm, "vl": vl, "key_value": key_value, "lm_head": 2 * L * E * c.vocab_size}
    return {name: value / 1e9 for name, value in found.items()}


def test_operations_of_the_network():
    config = throughput.make_config("tiny")
    found, hand = cost(config, 2), by_hand(config, 2)
    for name, value in hand.items():
        assert found[name] == pytest.approx(value, rel=1e-6), name
    state = found["call"] - found["vision"] - found["llm"] - found["vl"] - found["key_value"] - 4 * found["step"]
    assert 0 < state < 0.001 * found["call"]  # the state encoder, once
    assert found["shipped"] == pytest.approx(found["call"] + found["lm_head"] + 3 * found["key_value"])


def test_prediction_of_the_full_size(tmp_path):
    """956 and 872 GFLOP were counted for the shipped head without lm_head, and with keys and values once."""
    results = throughput.main(tiny(tmp_path, what=("predict",), views=(1,), scripts=("grpo_gr00t", "ppo_gr00t_lora")))
    row = results.rows["what=predict views=1"]
    found = row["gflop"]
    assert found["shipped"] - found["lm_head"] == pytest.approx(956, rel=0.003)
    assert found["call"] == pytest.approx(872, rel=0.003)
    assert found["update"] == pytest.approx(551, rel=0.003) and found["lm_head"] == pytest.approx(171, rel=0.005)
    assert row["bound"]["bf16"]["observations_per_s"] == pytest.approx(790e3 / found["call"])
    assert row["bound"]["fp32"]["observations_per_s"] < 0.3 * row["bound"]["bf16"]["observations_per_s"]
    memory = {row["script"]: row for row in results.rows.values() if row["what"] == "predict-memory"}
    grpo, lora = memory["grpo_gr00t"], memory["ppo_gr00t_lora"]
    assert grpo["samples"] == 8192 and grpo["gb"]["features"] == pytest.approx(8192 * 276 * 2048 * 2 / 1e9)
    assert grpo["trained"] == pytest.approx(763e6, rel=0.002)  # one embodiment's head
    assert grpo["gb"]["gradients_and_adam"] == pytest.approx(12 * grpo["trained"] / 1e9)
    assert lora["gb"]["gradients_and_adam"] < 0.3 and lora["gb"]["weights"] < grpo["gb"]["weights"] - 2.9
    text = (tmp_path / "out" / "table.md").read_text()
    assert text.count("NOT MEASURED") == 2 and "RANDOM WEIGHTS" in text


# ---------------------------------------------------------------- the scripts' rollout and update


def test_update_and_memory_rows(tmp_path):
    flags = {"views": (1,), "precisions": ("plain", "compiled"), "scripts": ("grpo_gr00t",), "memory_envs": 16}
    flags["memory_cap_gb"] = 0.03
    results = throughput.main(tiny(tmp_path, what=("update", "memory"), dtype="float32", **flags))
    rows = [row for row in results.rows.values() if row["what"] == "update"]
    assert [(row["head"], row["cache"]) for row in rows] == [("plain", "gpu"), ("compiled", "gpu"), ("plain", "off")]
    for row in rows:
        if row["head"] == "compiled":
            assert row["status"] == "not run: needs a CUDA GPU"
            continue
        assert row["status"] == "ok", row
        assert row["samples"] == 16 * 4  # a whole episode of each environment, all groups mixed
        assert row["samples_per_s"] == pytest.approx(64 / row["seconds"])
        assert row["ratio_error"] < 1e-5 and row["features"] == row["cache"]  # the update sees what the rollout did
    memory = [row for row in results.rows.values() if row["what"] == "memory"]
    settings = [("planned", False), (128, True)]
    assert [(row["micro_batch"], row["checkpointing"]) for row in memory] == settings
    assert all(row["status"] == "ok" and row["peak_gb"] > 0 for row in memory), memory
    assert memory[0]["micro_batch_size"] < 32  # the budget is smaller than 32 samples' activations
    assert memory[1]["micro_batch_size"] == 128
    assert "cached over recomputed" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize("name", ["grpo_gr00t_lora", "ppo_gr00t_frozen", "ppo_gr00t_lora"])
def test_the_other_scripts_update(name, tmp_path):
    args = resolve(tiny(tmp_path, dtype="float32"))
    flags = {"micro_batch_size": 8, "feature_cache": "off"}
    row = throughput.measure_script(name, args, throughput.make_config("tiny"), 2, "plain", 1, 2, num_envs=16, **flags)
    assert row["samples"] == 16 and row["ratio_error"] < 1e-5 and row["observations_per_s"] > 0


def test_precisions_are_what_they_are_called(tmp_path):
    """Products of backbone, encoder and denoising steps, by the type of what they return."""
    args, config = resolve(tiny(tmp_path)), throughput.make_config("tiny")
    found = {}
    for precision in ("plain", "bf16"):
        script, own, policy = throughput.make_actor("grpo_gr00t", args, config, 1, num_envs=16)
        if precision == "bf16":
            throughput.steps_in_bf16(policy)
        obs = throughput.GeneratedEnv(script.TASKS[own.task], own, config, 1).reset(0)
        seen, head = found.setdefault(precision, {}), policy.net.action_head
        watched = {
            "backbone": policy.net.backbone.language_model.layers[0].mlp.down_proj,
            "encode": head.vl_self_attention.transformer_blocks[0].attn1.to_q,
            "step": head.model.transformer_blocks[0].attn1.to_q,
        }
        for name, layer in watched.items():
            layer.register_forward_hook(lambda _, x, y, name=name, seen=seen: seen.update({name: y.dtype}))
        assert policy.act(obs, Noise("cpu", throughput.ALONE, 1))["action"].dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in head.parameters())
    half, single = torch.bfloat16, torch.float32
    assert found["plain"] == {"backbone": half, "encode": half, "step": single}
    assert found["bf16"] == {"backbone": half, "encode": half, "step": half}


def test_every_lever_has_a_row_at_the_first_shape_alone(tmp_path):
    levers = ("no-lm-head", "kv-once", "one-embodiment", "device-inputs")
    flags = {"what": ("rollout",), "dtype": "float32", "levers": levers, "batch_sizes": (3, 2), "views": (1, 2)}
    rows = [row for row in throughput.main(tiny(tmp_path, **flags)).rows.values() if row["what"] == "rollout"]
    found = [(row["views"], row["batch"], row["lever"]) for row in rows]
    assert found[:5] == [(1, 3, lever) for lever in ("straightforward", *levers)]
    assert found[5:] == [(*at, lever) for at in ((1, 2), (2, 3), (2, 2)) for lever in ("straightforward", *levers[2:])]
    assert all(row["status"] == "ok" and row["max_difference"] < 1e-5 for row in rows)


# ---------------------------------------------------------------- rows that cannot be had, and going on


def results_at(tmp_path, minutes=None, **about) -> Results:
    same = {"size": "tiny", "dtype": "float32", "device_name": "a CPU", "torch": "2", "device": "cpu", "cpu_count": 1}
    same |= {"git_sha": "0", "git_dirty": False, "started": "now", "memory_cap_gb": 40.0}
    return Results(tmp_path / "out", same | about, minutes)


KEY = {"what": "newton", "envs": 4, "pixels": 64}
FIGURES = {"physics_steps_per_s": 1.0, "frames_per_s": 2.0, "env_steps_per_s": 3.0, "peak_gb": 4.0}


def fails(error: Exception):
    def measure() -> dict:
        raise error

    return measure


def test_a_row_without_memory_is_told_and_the_next_one_goes_on(tmp_path):
    results = results_at(tmp_path)
    assert results.run(KEY, fails(torch.OutOfMemoryError("CUDA out of memory")))["status"] == "out of memory"
    assert results.run(KEY | {"pixels": 1}, fails(RuntimeError("a bug")))["status"] == "failed: a bug"
    assert results.run(KEY | {"pixels": 2}, lambda: FIGURES)["status"] == "ok"
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| 4 | 64 | out of memory |" in table and "| 4 | 1 | failed: a bug |" in table
    assert "| 4 | 2 | 1 | 2 | 3 | 4 |" in table
    assert "a bug" in (tmp_path / "out" / "errors.log").read_text()


def test_every_row_is_on_disk_at_once_and_kept(tmp_path):
    results = results_at(tmp_path)
    results.run(KEY, lambda: FIGURES)
    results.run(KEY | {"pixels": 1}, fails(RuntimeError("a bug")))
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["rows"]) == 2
    again = results_at(tmp_path)
    assert again.run(KEY, fails(AssertionError("measured twice")))["frames_per_s"] == 2.0
    assert again.run(KEY | {"pixels": 1}, lambda: FIGURES)["status"] == "ok"  # what failed is tried again
    with pytest.raises(SystemExit, match="--out .*made with torch 2; take another folder"):
        results_at(tmp_path, torch="3")


def test_no_row_begins_when_the_time_is_over(tmp_path):
    results = results_at(tmp_path, minutes=1e-9)
    time.sleep(0.01)
    assert results.run(KEY, lambda: FIGURES)["status"] == "not run: --minutes were over"


def test_a_lever_that_fails_is_left_out_of_the_next_rows(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Policy, "blocks", lambda self: [SimpleNamespace(compile=lambda **_: None)])
    args = tiny(tmp_path, what=("rollout",), dtype="float32", levers=("no-lm-head", "compile", "kv-once"))
    call = Policy.actions
    monkeypatch.setattr(Policy, "actions", lambda p, *x: broken() if "compile" in p.pulled else call(p, *x))
    rows = rows_of(throughput.main(args), "rollout")
    assert rows["compile"]["status"] == "failed: no such kernel"
    assert rows["kv-once"]["status"] == "ok" and rows["kv-once"]["max_difference"] < 1e-5


@pytest.mark.parametrize("flags", [{"size": "full"}, {"views": ()}, {"update_envs": 20}, {"repeats": 0}])
def test_bad_input_gets_one_line_that_names_the_flag(flags):
    with pytest.raises(SystemExit, match=f"^--{next(iter(flags)).replace('_', '-')} [^\\n]*$"):
        resolve(Args(device="cpu", **flags))


def test_help_needs_no_torch():
    code = "import runpy, sys; sys.argv = ['x', '--help']; sys.path.insert(0, '.')\n"
    code += "try: runpy.run_path('benchmarks/throughput.py', run_name='__main__')\n"
    code += "except SystemExit: print('torch' in sys.modules)"
    root = Path(throughput.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60)
    assert "--batch-sizes" in done.stdout and done.stdout.endswith("False\n")
