"""Writes a checkpoint with random weights that fits a task: to try commands and measure speed, not to get anything done.

    python benchmarks/random_checkpoint.py --task Isaac-Open-Drawer-Franka --out runs/random
    python benchmarks/random_checkpoint.py --task Isaac-Open-Drawer-Franka --out runs/random_3b --size full

Full size has the layout of nvidia/GR00T-N1.5-3B; its tokenizer knows little more than bytes.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.gr00t import TASKS, find_task


@dataclass
class Args:
    task: str  # a row of TASKS in tasks/gr00t.py
    out: Path  # the checkpoint's folder
    size: Literal["tiny", "full"] = "tiny"
    seed: int = 0  # of the weights


def write_random(name: str, folder: Path, size: Literal["tiny", "full"] = "tiny", seed: int = 0) -> None:
    """A checkpoint with random weights for a row of TASKS; its statistics leave numbers as they are."""
    import torch

    from gr00t_n1d5.network import Gr00tConfig, Gr00tN1d5
    from gr00t_n1d5.processor import Gr00tProcessor, load_tokenizer, tiny_tokenizer

    task, tiny = TASKS[name], size == "tiny"
    torch.manual_seed(seed)
    dims = {f"{kind}_dim": n for kind, n in task.sizes.items()}
    config = (
        Gr00tConfig.tiny(**dims, vocab_size=64, max_position_embeddings=1024, max_text_tokens=64) if tiny else Gr00tConfig()
    )
    with tempfile.TemporaryDirectory() as own:
        words = " ".join(task.instructions).split()
        tokenizer = tiny_tokenizer(words, config) if tiny else load_tokenizer(small_tokenizer(Path(own)))
    ends = torch.tensor([-1.0, 1.0])[:, None]
    data = [{key: ends.expand(2, n) for key, n in columns.items()} for columns in (task.state, task.action)]
    views = {key: {"resolution": [config.image_size] * 2, "channels": 3, "fps": 10} for key in task.cameras}
    processor = Gr00tProcessor.from_statistics(config, "new_embodiment", *data, views, tokenizer)
    net = Gr00tN1d5(config)
    (net if tiny else net.bfloat16()).save_pretrained(folder)
    processor.save_pretrained(folder)


def small_tokenizer(folder: Path) -> Path:
    """Writes a part of the tokenizer (tests/golden), its gaps filled, which nothing has to be fetched for."""
    source = Path(__file__).resolve().parents[1] / "tests" / "golden" / "tokenizer"
    shutil.copytree(source, folder, dirs_exist_ok=True)
    known = json.loads((source / "vocab.json").read_text())
    unused = set(range(max(known.values()))) - set(known.values())
    (folder / "vocab.json").write_text(json.dumps(known | {f"<unused {i}>": i for i in unused}))
    return folder


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    args.task = find_task(args.task, runs=False)
    write_random(args.task, args.out, args.size, args.seed)
    print(f"{args.out}: random weights for {args.task}")
