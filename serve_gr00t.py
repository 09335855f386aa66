"""Serves a GR00T N1.5 checkpoint by NVIDIA's policy protocol: ZeroMQ and msgpack, as its own inference service does.

    python serve_gr00t.py                                            # the shipped tiny GR00T on tcp://127.0.0.1:5555
    python serve_gr00t.py --checkpoint runs/<name>/checkpoints/best
    python serve_gr00t.py --checkpoint nvidia/GR00T-N1.5-3B --embodiment-tag gr1 --prompt nvidia --host 0.0.0.0 --api-token <t>

- A request is {"endpoint", "data", "api_token"?}; endpoints are get_action, get_modality_config, ping and kill; arrays are
  npy bytes, and nothing is ever unpickled. A bad request gets {"error": one line}, and the next one is answered.
- Observations and actions have the keys and shapes of NVIDIA's Gr00tPolicy.get_action: "video.<key>" (1, H, W, 3) uint8,
  "state.<key>" (1, d), one "annotation.<...>" list of sentences, all with a leading batch dimension B or all without;
  "action.<key>" (horizon, d), or (B, horizon, d). Images are cropped and resized, states and actions normalised here.
- NVIDIA's service writes the instruction of a single observation as "['sentence']" and those of a batch plainly. The
  training scripts of this repo write it plainly, so that is the default; `--prompt nvidia` does what NVIDIA's service does.
- Actions are those of the training scripts' ODE evaluation: fp32 head, no padding, noise from a generator of its own.

Source: Isaac-GR00T's gr00t/eval/service.py, gr00t/eval/robot.py and gr00t/model/policy.py of N1.5.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import contextlib
import errno
import hmac
import io
import json
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from common import check_not_negative, check_positive
from gr00t_n1d5.files import is_full_size

HERE = Path(__file__).resolve().parent


# ======== Args ========================================================================================================
@dataclass
class Args:
    checkpoint: str = str(HERE / "checkpoints" / "tiny")  # GR00T N1.5: a local folder or a hub id
    embodiment_tag: str | None = None  # entry of the checkpoint's metadata.json; may be left out where there is one
    cameras: tuple[str, ...] = ()  # camera keys in the order of training; left out: those of metadata.json
    prompt: Literal["plain", "bracketed", "nvidia"] = "plain"  # the instruction's form; nvidia: brackets unless batched
    denoise_steps: int | None = None  # K, denoising steps per request (the checkpoint's own by default)
    seed: int = 1  # of the noise that actions start from; one generator for all requests
    device: str = "auto"  # cpu, cuda, cuda:N, or auto
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: the backbone, under autocast
    micro_batch_size: int = 64  # observations per forward pass; larger batches take several
    host: str = "127.0.0.1"  # address to listen at; 0.0.0.0: every interface
    port: int = 5555  # TCP port; 0: a free one, printed at the start
    api_token: str | None = None  # what requests must carry as api_token


FULL = Args(precision="bf16")  # a full-size checkpoint's


def parse() -> Args:
    """The command line, over the settings of a checkpoint's size."""
    args = tyro.cli(Args)
    return check(tyro.cli(Args, default=FULL if is_full_size(args.checkpoint) else Args()))


def check(args: Args) -> Args:
    """Refuses what cannot work, before anything is loaded."""
    check_positive(denoise_steps=args.denoise_steps, micro_batch_size=args.micro_batch_size)
    check_not_negative(seed=args.seed)
    if not 0 <= args.port <= 65535:
        raise SystemExit(f"--port {args.port}: must be between 0 and 65535")
    if args.api_token == "":
        raise SystemExit("--api-token: it is empty; give a token or leave the flag out")
    return args


ARGS = parse() if __name__ == "__main__" else None  # heavy imports come after, so --help and refusals are instant

import msgpack
import numpy as np
import torch
import zmq
from torch import Tensor

from common import Noise, Ranks, pick_device
from gr00t_n1d5.network import Gr00tN1d5
from gr00t_n1d5.policy import refuse_checkpoint
from gr00t_n1d5.processor import Gr00tProcessor

LANGUAGE = "annotation.human.action.task_description"  # named to clients; any one "annotation." key is taken
MAX_MESSAGE_BYTES = 1 << 30  # a larger message ends its sender's connection before it fills the memory


# ======== GR00T wrapper ===============================================================================================
class RequestError(ValueError):
    """What a client did wrong, in one line that is sent back."""


class Request(NamedTuple):
    """Observations as the network's processor takes them."""

    images: list[Tensor]  # per camera (B, H, W, 3) uint8; cameras may differ in size
    state: Tensor  # (B, d) fp32 in the robot's units
    prompts: list[Tensor]  # token ids (L,) each
    batched: bool


class ServedPolicy:
    """GR00T N1.5 behind the keys of NVIDIA's Gr00tPolicy; acts by the ODE."""

    def __init__(self, args: Args):
        self.args, self.bf16 = args, args.precision == "bf16"
        with refuse_checkpoint(args.checkpoint):
            net = Gr00tN1d5.from_pretrained(args.checkpoint)
            self.processor = Gr00tProcessor.from_pretrained(args.checkpoint, net.config, args.embodiment_tag)
            self.net = net.slice_embodiment(self.processor.embodiment_id)
        entry = self.processor.metadata[self.processor.tag]
        cameras = args.cameras or entry.get("modalities", {}).get("video", {})
        if not cameras:
            raise SystemExit(f"--checkpoint {args.checkpoint}: its metadata.json names no camera; name them with --cameras")
        self.video = [f"video.{key}" for key in cameras]
        self.state, self.action = (
            {f"{kind}.{key}": np.size(values["max"]) for key, values in entry["statistics"][kind].items()}
            for kind in ("state", "action")
        )
        self.net.backbone.to(args.device, None if self.bf16 else torch.float32)
        self.net.action_head.to(args.device, torch.float32)  # as in training
        self.processor.to(args.device)
        self.noise = Noise(args.device, Ranks(0, 1), args.seed)

    def modality_config(self) -> dict[str, dict]:
        """What a request holds and what a reply will, per modality, as NVIDIA's clients read a ModalityConfig."""
        horizon = list(range(self.net.config.action_horizon))
        keys = {"video": self.video, "state": list(self.state), "action": list(self.action), "language": [LANGUAGE]}
        configs = {k: {"delta_indices": horizon if k == "action" else [0], "modality_keys": v} for k, v in keys.items()}
        return {kind: {"__ModalityConfig_class__": True, "as_json": json.dumps(c)} for kind, c in configs.items()}

    def read(self, data: Any) -> Request:
        """Checks and converts the data of a get_action request; RequestError for keys, types or shapes that do not fit."""
        known = [*self.video, *self.state]
        if not isinstance(data, dict):
            raise RequestError(f"data: not a map with {', '.join(known)} and {LANGUAGE}")
        language = [key for key in data if str(key).startswith("annotation.")]
        absent = [key for key in known if key not in data]
        unknown = [key for key in data if key not in known and key not in language]
        for found, word in ((absent, "absent"), (unknown, "unknown"), (language[1:], "more than one instruction")):
            if found:
                raise RequestError(f"{word}: {', '.join(map(repr, found))}; needed are {', '.join(known)} and {LANGUAGE}")
        arrays = {key: unpack_array(key, data[key]) for key in known}
        batched = all(arrays[key].ndim >= 3 for key in self.state)  # as NVIDIA's policy decides it
        n = len(arrays[next(iter(self.state))]) if batched else 1
        lead = (n, 1) if batched else (1,)
        for key, array in arrays.items():
            video = key in self.video
            tail = (*array.shape[-3:-1], 3) if video else (self.state[key],)
            if array.shape != (*lead, *tail) or not array.size:
                form = "1, H, W, 3" if video else f"1, {self.state[key]}"
                raise RequestError(f"{key}: its shape is {array.shape}, not ({form}), or (B, {form}) with one B for all")
            if not np.issubdtype(array.dtype, np.uint8 if video else np.floating):
                raise RequestError(f"{key}: its type is {array.dtype}, not {'uint8' if video else 'a float'}")
        images = [torch.from_numpy(arrays[key].reshape(n, *arrays[key].shape[-3:])) for key in self.video]
        state = np.concatenate([arrays[key].reshape(n, -1) for key in self.state], 1).astype(np.float64)
        state = torch.from_numpy(state).float()
        if not state.isfinite().all():
            raise RequestError("state: it holds nan, inf, or what is inf in fp32")
        key = language[0] if language else LANGUAGE
        return Request(images, state, self.prompts(key, data.get(key, [""] * n), n, batched), batched)

    def prompts(self, key: str, value: Any, n: int, batched: bool) -> list[Tensor]:
        """Token ids of n instructions, a list or an array of strings; an empty one is NVIDIA's default instruction."""
        texts = unpack_array(key, value).ravel().tolist() if isinstance(value, dict) else value
        if not isinstance(texts, list) or len(texts) != n or not all(isinstance(text, str) for text in texts):
            raise RequestError(f"{key}: must be a list of strings, one per observation ({n})")
        form = self.args.prompt
        bracketed = form == "bracketed" or (form == "nvidia" and not batched)
        try:
            known = {text: self.processor.prompt(text, len(self.video), bracketed) for text in dict.fromkeys(texts)}
        except ValueError as error:
            raise RequestError(f"{key}: {error}") from error
        return [known[text] for text in texts]

    @torch.no_grad()
    def act(self, request: Request) -> Tensor:
        """Actions (B, horizon, d) in the robot's units. All noise is drawn at once, whatever the forward passes are."""
        config, device, n = self.net.config, self.args.device, len(request.state)
        noise = self.noise.normal(n, config.action_horizon, config.action_dim)  # (B, H, A)
        actions = torch.empty_like(noise)
        lengths = torch.tensor([len(tokens) for tokens in request.prompts])
        for length in lengths.unique().tolist():  # apart: the head has no mask for padding
            for rows in (lengths == length).nonzero()[:, 0].split(self.args.micro_batch_size):
                views = [self.processor.images(x[rows, None].to(device)) for x in request.images]
                pixels = torch.stack(views, 1).flatten(0, 1)  # (b * V, 3, S, S), sample-major
                ids = torch.stack([request.prompts[row] for row in rows]).to(device)
                state = self.processor.normalize_state(request.state[rows].to(device))
                embodiment = torch.zeros(len(rows), dtype=torch.long, device=device)  # one row is left
                with torch.autocast(torch.device(device).type, torch.bfloat16, self.bf16):
                    features = self.net.backbone(ids, pixels)
                features = features.bfloat16() if self.bf16 else features
                context = self.net.action_head.encode(features, state, embodiment)
                actions[rows] = self.net.action_head.sample(context, embodiment, noise[rows], self.args.denoise_steps)
        return self.processor.unnormalize_action(actions)

    def get_action(self, data: Any) -> dict[str, np.ndarray]:
        """{"action.<key>": (horizon, d) or, of a batch, (B, horizon, d) fp32}."""
        request = self.read(data)
        actions = self.act(request).split(list(self.action.values()), -1)
        return {key: (x if request.batched else x[0]).cpu().numpy() for key, x in zip(self.action, actions)}


# ======== protocol ====================================================================================================
def unpack_array(key: str, value: Any) -> np.ndarray:
    """The array of {"__ndarray_class__": true, "as_npy": bytes}; RequestError for anything else, pickled objects included."""
    if not isinstance(value, dict) or not isinstance(value.get("as_npy"), bytes):
        raise RequestError(f'{key}: not an array, {{"__ndarray_class__": true, "as_npy": bytes}}')
    try:
        array = np.load(io.BytesIO(value["as_npy"]), allow_pickle=False)
    except Exception as error:  # numpy has many kinds
        raise RequestError(f"{key}: not an npy array ({error})") from error
    if not isinstance(array, np.ndarray):
        raise RequestError(f"{key}: not an npy array but an archive")
    return array


def pack_array(value: Any) -> dict:
    """The form of an array for `msgpack.packb(default=...)`."""
    data = io.BytesIO()
    np.save(data, value, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": data.getvalue()}


def answer(parts: list[bytes], policy: ServedPolicy, api_token: str | None) -> tuple[dict, bool]:
    """The reply to a message, and whether the server goes on. Whatever a client sends, this raises nothing."""
    try:
        try:
            (message,) = parts
            request = msgpack.unpackb(message)
        except Exception as error:  # msgpack has many kinds
            raise RequestError(f"not a msgpack message of one part ({error})") from error
        if not isinstance(request, dict):
            raise RequestError('a request is a map {"endpoint", "data", "api_token"}')
        if api_token is not None:  # before anything of the request is used
            given = request.get("api_token")
            if not isinstance(given, str) or not hmac.compare_digest(given.encode(), api_token.encode()):
                raise RequestError("Unauthorized: Invalid API token")
        match request.get("endpoint", "get_action"):
            case "get_action":
                return policy.get_action(request.get("data")), True
            case "get_modality_config":
                return policy.modality_config(), True
            case "ping":
                return {"status": "ok", "message": "Server is running"}, True
            case "kill":
                return {"status": "ok", "message": "Server stops"}, False
            case other:
                raise RequestError(f"unknown endpoint {other!r}; there are get_action, get_modality_config, ping and kill")
    except RequestError as error:
        line = " ".join(str(error).split())[:500]
        print(f"refused a request: {line}", file=sys.stderr, flush=True)
    except Exception as error:  # a bug, or no memory for so large a batch: other clients are still to be served
        line = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        traceback.print_exc()
    return {"error": line}, True


def bind(args: Args, socket: zmq.Socket) -> str:
    """Starts to listen, and returns the address; requests wait until the network is loaded."""
    host = "127.0.0.1" if args.host == "localhost" else args.host  # ZeroMQ binds to no names
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.LINGER, 1000)  # ms for the last reply to leave
    try:
        socket.bind(f"tcp://{host}:{args.port}")
    except zmq.ZMQError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise SystemExit(f"--port {args.port}: {error.strerror}; choose another, or 0 for a free one") from error
        raise SystemExit(f"--host {args.host}: {error.strerror}; give an address of this machine, or 0.0.0.0") from error
    if not host.startswith("127.") and args.api_token is None:
        warning = f"warning: --host {args.host} without --api-token: whoever reaches the port may use and stop this server"
        print(warning, file=sys.stderr, flush=True)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


# ======== main ========================================================================================================
def main(args: Args) -> None:
    args.device = pick_device(args.device)
    with contextlib.suppress(KeyboardInterrupt), zmq.Context() as context, context.socket(zmq.REP) as socket:
        address = bind(args, socket)
        policy = ServedPolicy(args)
        print(f"serving {args.checkpoint} ({policy.processor.tag}) on {args.device} at {address}", flush=True)
        on = True
        while on:
            reply, on = answer(socket.recv_multipart(), policy, args.api_token)
            socket.send(msgpack.packb(reply, default=pack_array))


if __name__ == "__main__":
    main(ARGS)
