"""The simulator's wheels in parcels, for a GPU machine that has torch but no network.

    python benchmarks/parcels.py pack --folder parcels        # here, with a network: parcels/0, parcels/1, ...
    python benchmarks/parcels.py join --folder parcels        # there, once all parcels have arrived

`pack` takes the packages that one short run loads, in the versions that are installed, but what such a machine has
(`THERE`). `join` installs what is missing, with nothing but these wheels, and says what it was. It needs Python and pip
alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
THERE = "torch torchvision triton transformers numpy scipy sympy mpmath setuptools".split()  # too large, and there already
MORE = "rsl-rl-lib gitpython gitdb smmap trimesh pytest pytest-xdist execnet iniconfig pluggy".split()  # what other steps load
PARCEL = 55 << 20  # bytes
RUN = "grpo_gr00t.py --device cpu --num-envs 16 --iterations 1 --eval-episodes 16 --exp-name parcels"
LOADED = """
import json, runpy, sys
from importlib import metadata
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
of, names = metadata.packages_distributions(), {name.partition(".")[0] for name in sys.modules}
print("\\n" + json.dumps(sorted({package for name in names for package in of.get(name, [])})))
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pack(folder: Path) -> None:
    """Fetches the wheels of installed packages, and cuts one archive of them into pieces."""
    if not importlib.util.find_spec("pip"):
        raise SystemExit("pack: needs pip in this environment; install it, or start this with uv run --with pip")
    packages = sorted({normal(name) for name in (*loaded(), *MORE)} - set(THERE))
    wanted = [f"{name}=={metadata.version(name)}" for name in packages]
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("[0-9]*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        # builds those that are no wheels yet; all dependencies are in the list
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", f"{scratch}/wheels", *wanted]
        subprocess.run(command, check=True)
        archive = Path(scratch) / "wheels.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(f"{scratch}/wheels", "wheels")
        with archive.open("rb") as content:
            for i, piece in enumerate(iter(lambda: content.read(PARCEL), b"")):
                (folder / str(i)).write_bytes(piece)
    sizes = [file.stat().st_size for file in sorted(folder.glob("[0-9]*"))]
    print(f"{len(wanted)} packages, {len(sizes)} parcels, {sum(sizes) / 2**20:.0f} MiB, in {folder}")


def join(folder: Path) -> None:
    """Puts the pieces together, and installs the packages that are not there."""
    pieces = sorted(folder.glob("[0-9]*"), key=lambda file: int(file.name))
    names = [file.name for file in pieces]
    if not names or names != [str(i) for i in range(len(names))]:
        raise SystemExit(f"--folder {folder}: has {', '.join(names) or 'no parcels'}; 0, 1, ... are needed")
    code = "from importlib.metadata import distributions as d; print(*(x.metadata['Name'] for x in d()))"
    listed = [sys.executable, "-c", code]
    there = {normal(name) for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split()}
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "wheels.tar"
        with archive.open("wb") as whole:
            for file in pieces:
                whole.write(file.read_bytes())
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(scratch, filter="data")
        except tarfile.ReadError as error:
            raise SystemExit(f"--folder {folder}: a parcel is missing or damaged; bring all of them again") from error
        wheels = sorted(Path(scratch, "wheels").glob("*.whl"))
        missing = [wheel for wheel in wheels if normal(wheel.name.partition("-")[0]) not in there]
        if missing:
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *map(str, missing)]
            subprocess.run(command, check=True)
    print(f"{len(missing)} of {len(wheels)} installed: {', '.join(wheel.name.partition('-')[0] for wheel in missing)}")


def loaded() -> list[str]:
    """The packages of a short run in a process of its own."""
    env = os.environ | {"WANDB_MODE": "disabled"}
    shutil.rmtree(ROOT / "runs" / "parcels", ignore_errors=True)
    run = subprocess.run([sys.executable, "-c", LOADED, *RUN.split()], cwd=ROOT, env=env, capture_output=True, text=True)
    lines = run.stdout.strip().splitlines()
    if run.returncode or not lines or not lines[-1].startswith("["):
        raise SystemExit(f"the run that shows what is loaded failed: {(run.stderr.strip().splitlines() or ['no word'])[-1]}")
    return [str(name) for name in json.loads(lines[-1])]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pack", "join"])
    parser.add_argument("--folder", type=Path, default=Path("parcels"))
    given = parser.parse_args()
    {"pack": pack, "join": join}[given.action](given.folder)
