"""A checkpoint of full size on a machine without a GPU: host memory and seconds of loading, one policy call, saving.

    python benchmarks/full_size_cpu.py --folder runs/full_size     # 10 GB of disk, 8 GB of memory, minutes

The weights are random (bfloat16, in shards), so the actions mean nothing; sizes, keys and files are those of
nvidia/GR00T-N1.5-3B. Each stage has a process of its own, whose peak is the kernel's (files mapped into memory
included). Fails where loading takes 3 times the checkpoint's size or more, and where what was saved differs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SHARD = 1_000_000_000


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # GB


def write(folder: Path) -> int:
    """Writes random weights shard by shard; returns their bytes."""
    import torch
    from safetensors.torch import save_file

    from gr00t_n1d5.files import public_name
    from gr00t_n1d5.network import Gr00tConfig, Gr00tN1d5

    with torch.device("meta"):
        model = Gr00tN1d5(Gr00tConfig())
    shards, size = [[]], 0
    for name, p in model.named_parameters():
        if size + 2 * p.numel() > SHARD:
            shards.append([])
            size = 0
        size += 2 * p.numel()
        shards[-1].append((name, p.shape))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for i, shard in enumerate(shards, 1):
        file, tensors = f"model-{i:05d}-of-{len(shards):05d}.safetensors", {}
        for name, shape in shard:
            scale = 0.02 if len(shape) > 1 else 0.1
            center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            tensors[public_name(name)] = (center + scale * torch.randn(shape, generator=generator)).bfloat16()
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return 2 * sum(p.numel() for p in model.parameters())


def load(folder: Path, threads: int, copy: Path | None) -> dict:
    """Loads, acts once (one view, 4 denoising steps) and, with `copy`, saves; figures and actions."""
    import torch

    from gr00t_n1d5.network import Gr00tN1d5

    torch.set_num_threads(threads)
    found, start = {"peak_imports": peak()}, time.perf_counter()
    model = Gr00tN1d5.from_pretrained(folder)
    found |= {"seconds_load": time.perf_counter() - start, "peak_load": peak()}
    config, generator = model.config, torch.Generator().manual_seed(1)
    image = torch.full((config.tokens_per_view,), config.image_token_id)
    ids = torch.cat([torch.randint(1000, (20,), generator=generator), image])[None]  # (1, 276)
    pixels = torch.rand(1, 3, config.image_size, config.image_size, generator=generator).bfloat16() * 2 - 1
    state = torch.randn(1, 1, config.state_dim, generator=generator)
    noise = torch.randn(1, config.action_horizon, config.action_dim, generator=generator)
    start = time.perf_counter()
    actions = model.get_action(ids, pixels, state, torch.tensor([31]), noise)
    assert actions.isfinite().all() and (actions - noise).abs().max() > 0.01
    found |= {"seconds_act": time.perf_counter() - start, "peak_act": peak(), "actions": actions.numpy()}
    if copy:
        start = time.perf_counter()
        model.save_pretrained(copy, max_shard_bytes=SHARD)
        found |= {"seconds_save": time.perf_counter() - start, "peak_save": peak()}
    return found


def compare(folder: Path, copy: Path) -> int:
    """Number of tensors, all of which have to be equal; one pair is in memory at a time."""
    import torch
    from safetensors import safe_open

    first, second = (json.loads((f / "model.safetensors.index.json").read_text())["weight_map"] for f in (folder, copy))
    assert set(first) == set(second)
    for key in first:
        with safe_open(folder / first[key], "pt") as a, safe_open(copy / second[key], "pt") as b:
            x, y = a.get_tensor(key), b.get_tensor(key)
            assert x.dtype == y.dtype and torch.equal(x, y), key
    return len(first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="is made, and deleted at the end")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"--folder {args.folder}: exists; name a new one")
    free = shutil.disk_usage(args.folder.absolute().parent).free / 1e9
    if free < 12:
        sys.exit(f"--folder {args.folder}: {free:.0f} GB free, 12 needed")
    random, saved = args.folder / "random", args.folder / "saved"

    def alone(function, *given):  # a process of its own, for a peak of its own
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *given).result()

    try:
        size = alone(write, random) / 1e9
        first = alone(load, random, args.threads, saved)
        tensors = compare(random, saved)
        again = alone(load, saved, args.threads, None)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    same = bool((first["actions"] == again["actions"]).all())
    ratio = first["peak_load"] / size
    figures = {key: round(value, 2) for key, value in first.items() if key != "actions"}
    print(json.dumps({"checkpoint_gb": round(size, 3), "ratio_load": round(ratio, 2), **figures}, indent=2))
    print(f"{tensors} tensors equal after saving; actions equal after loading again: {same}")
    if ratio >= 3 or not same:
        sys.exit("failed")


if __name__ == "__main__":
    main()
