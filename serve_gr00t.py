"""Serves a GR00T N1.5 checkpoint by NVIDIA's policy protocol: ZeroMQ and msgpack, as its own inference service does.

    python serve_gr00t.py                                            # the shipped tiny GR00T on tcp://127.0.0.1:5555
    python serve_gr00t.py --checkpoint runs/<name>/checkpoints/best
    python serve_gr00t.py --checkpoint nvidia/GR00T-N1.5-3B --embodiment-tag gr1 --data-config fourier_gr1_arms_waist
    python serve_gr00t.py --http --port 8000                         # POST /act, arrays as json_numpy writes them

- A request is {"endpoint", "data", "api_token"?}; endpoints are get_action, get_modality_config, ping and kill; arrays are
  npy bytes, and nothing is ever unpickled. A bad request gets {"error": one line}, and the next one is answered.
- Observations and actions have the keys and shapes of NVIDIA's Gr00tPolicy.get_action: "video.<key>" (1, H, W, 3) uint8,
  "state.<key>" (1, d), one "annotation.<...>" list of sentences, all with a leading batch dimension B or all without;
  "action.<key>" (horizon, d), or (B, horizon, d). Which keys, in which order and form, says the checkpoint's data config.
- NVIDIA's service writes the instruction of a single observation as "['sentence']" and those of a batch plainly. The
  training scripts of this repo write it plainly, so that is the default; `--prompt nvidia` does what NVIDIA's service does.
- Actions are those of the training scripts' ODE evaluation: fp32 head, no padding, noise from a generator of its own.

Source: Isaac-GR00T's gr00t/eval/service.py, http_service.py, robot.py and gr00t/model/policy.py of N1.5.
"""

# ======== imports =====================================================================================================
from __future__ import annotations

import base64
import contextlib
import errno
import hmac
import io
import json
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import tyro

from common import check_not_negative, check_positive
from gr00t_n1d5.embodiment import check_checkpoint, refuse_checkpoint
from gr00t_n1d5.files import is_full_size

HERE = Path(__file__).resolve().parent


# ======== Args ========================================================================================================
@dataclass
class Args:
    checkpoint: str = str(HERE / "checkpoints" / "tiny")  # GR00T N1.5: a local folder or a hub id
    embodiment_tag: str | None = None  # entry of the checkpoint's metadata.json; may be left out where there is one
    data_config: str | None = None  # which of its keys the network gets, and how: a row of DATA_CONFIGS, or a JSON file
    prompt: Literal["plain", "bracketed", "nvidia"] = "plain"  # the instruction's form; nvidia: brackets unless batched
    denoise_steps: int | None = None  # K, denoising steps per request (the checkpoint's own by default)
    seed: int = 1  # of the noise that actions start from; one generator for all requests
    device: str = "auto"  # cpu, cuda, cuda:N, or auto
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: backbone and encoder, not the steps
    compile: bool = False  # torch.compile the transformer blocks; the first requests of a size take long
    micro_batch_size: int = 64  # observations per forward pass; larger batches take several
    host: str = "127.0.0.1"  # address to listen at; 0.0.0.0: every interface
    port: int = 5555  # TCP port; 0: a free one, printed at the start
    http: bool = False  # HTTP in place of ZeroMQ
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
    check_checkpoint(args.checkpoint, args.embodiment_tag, args.data_config)
    return args


ARGS = parse() if __name__ == "__main__" else None  # heavy imports come after, so --help and refusals are instant

import msgpack
import numpy as np
import torch
import zmq
from torch import Tensor

from common import Noise, Ranks, pick_device
from gr00t_n1d5.network import Gr00tN1d5
from gr00t_n1d5.policy import compile_blocks
from gr00t_n1d5.processor import DEFAULT_INSTRUCTION, Gr00tProcessor

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


class Latency:
    """How long get_action took, from the request's arrival to the reply; the latest 10,000 count."""

    def __init__(self, every: float = 10.0):
        """
        Args:
            every: seconds between printed lines, while there are requests.
        """
        self.seconds, self.every, self.told = deque(maxlen=10_000), every, time.perf_counter()

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)
        if time.perf_counter() - self.told > self.every:
            self.tell()

    def tell(self) -> None:
        self.told = time.perf_counter()
        if self.seconds:
            median, high = np.quantile(self.seconds, (0.5, 0.95)) * 1e3
            print(f"latency {median:.1f} ms (median), {high:.1f} ms (95%) of {len(self.seconds)} requests", flush=True)


class ServedPolicy:
    """GR00T N1.5 behind the keys of NVIDIA's Gr00tPolicy; acts by the ODE."""

    def __init__(self, args: Args):
        self.args, self.bf16 = args, args.precision == "bf16"
        with refuse_checkpoint(args.checkpoint):
            self.processor = Gr00tProcessor.from_pretrained(args.checkpoint, None, args.embodiment_tag, args.data_config)
            net = Gr00tN1d5.from_pretrained(args.checkpoint, config=self.processor.config)
            self.net = net.slice_embodiment(self.processor.embodiment_id)
        robot = self.processor.embodiment
        self.video = [f"video.{key}" for key in robot.data.video]
        self.state, self.action = (
            {f"{kind}.{key}": size for key, size in robot.sizes[kind].items()} for kind in ("state", "action")
        )
        self.language = robot.data.language  # named to clients; any one "annotation." key is taken
        self.net.backbone.to(args.device, None if self.bf16 else torch.float32)
        self.net.action_head.to(args.device, torch.float32)  # as in training
        self.processor.to(args.device)
        self.noise, self.latency = Noise(args.device, Ranks(0, 1), args.seed), Latency()
        if args.compile:
            compile_blocks(self.net)

    def __str__(self) -> str:
        return f"{self.args.checkpoint} ({self.processor.embodiment.tag}) on {self.args.device}"

    def modality_config(self) -> dict[str, dict]:
        """What a request holds and what a reply will, per modality, as NVIDIA's clients read a ModalityConfig."""
        horizon = list(range(self.net.config.action_horizon))
        keys = {"video": self.video, "state": list(self.state), "action": list(self.action), "language": [self.language]}
        configs = {k: {"delta_indices": horizon if k == "action" else [0], "modality_keys": v} for k, v in keys.items()}
        return {kind: {"__ModalityConfig_class__": True, "as_json": json.dumps(c)} for kind, c in configs.items()}

    def read(self, data: Any) -> Request:
        """Checks and converts the data of a get_action request; RequestError for keys, types or shapes that do not fit."""
        known = [*self.video, *self.state]
        if not isinstance(data, dict):
            raise RequestError(f"data: not a map with {', '.join(known)} and {self.language}")
        language = [key for key in data if str(key).startswith("annotation.")]
        absent = [key for key in known if key not in data]  # there may be others: a robot sends all that it has
        for found, word in ((absent, "absent"), (language[1:], "more than one instruction")):
            if found:
                raise RequestError(f"{word}: {', '.join(map(repr, found))}; needed are {', '.join(known)} and {self.language}")
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
            if not (array.dtype == np.uint8 if video else array.dtype.kind in "fiu"):
                raise RequestError(f"{key}: its type is {array.dtype}, not {'uint8' if video else 'a number'}")
        images = [torch.from_numpy(arrays[key].reshape(n, *arrays[key].shape[-3:])) for key in self.video]
        state = np.concatenate([arrays[key].reshape(n, -1) for key in self.state], 1).astype(np.float64)
        state = torch.from_numpy(state).float()
        if not state.isfinite().all():
            raise RequestError("state: it holds nan, inf, or what is inf in fp32")
        key = language[0] if language else self.language
        return Request(images, state, self.prompts(key, data.get(key, [DEFAULT_INSTRUCTION] * n), n, batched), batched)

    def prompts(self, key: str, value: Any, n: int, batched: bool) -> list[Tensor]:
        """Token ids of n instructions: an array or a list of strings, of shape (n,) or (n, 1), or one string for all."""
        texts = (
            unpack_array(key, value).tolist() if isinstance(value, dict) else [value] * n if isinstance(value, str) else value
        )
        nested = isinstance(texts, list) and all(isinstance(text, list) and len(text) == 1 for text in texts)
        texts = [text for (text,) in texts] if nested else texts
        if not isinstance(texts, list) or len(texts) != n or not all(isinstance(text, str) for text in texts):
            raise RequestError(f"{key}: must be strings, one per observation ({n})")
        form = self.args.prompt
        bracketed = form == "bracketed" or (form == "nvidia" and (nested or not batched))
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
                    context = self.net.action_head.encode(features, state, embodiment).float()
                actions[rows] = self.net.action_head.sample(context, embodiment, noise[rows], self.args.denoise_steps)
        return self.processor.unnormalize_action(actions)

    def get_action(self, data: Any) -> dict[str, np.ndarray]:
        """{"action.<key>": (horizon, d) or, of a batch, (B, horizon, d) fp32}."""
        request = self.read(data)
        actions = self.act(request).split(list(self.action.values()), -1)
        return {key: (x if request.batched else x[0]).cpu().numpy() for key, x in zip(self.action, actions)}


# ======== protocol ====================================================================================================
def unpack_array(key: str, value: Any) -> np.ndarray:
    """The array of {"__ndarray_class__": true, "as_npy": bytes} or, over HTTP, of json_numpy's {"__numpy__", "dtype", "shape"}.

    RequestError for anything else, pickled objects included.
    """
    if isinstance(value, dict) and isinstance(value.get("__numpy__"), str):
        try:
            data, dtype = base64.b64decode(value["__numpy__"], validate=True), np.lib.format.descr_to_dtype(value["dtype"])
            if dtype.hasobject:
                raise ValueError("objects")
            return np.frombuffer(data, dtype).reshape(value["shape"]).copy()
        except Exception as error:  # numpy has many kinds
            raise RequestError(f"{key}: not an array of json_numpy ({error})") from error
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


def unpack_message(parts: list[bytes]) -> Any:
    """The request of a ZeroMQ message; RequestError where it is none."""
    try:
        (message,) = parts
        return msgpack.unpackb(message)
    except Exception as error:  # msgpack has many kinds
        if is_torch_save(parts):
            raise RequestError("torch.save is not read; use a client of Isaac-GR00T from September 2025 or later") from error
        raise RequestError(f"not a msgpack message of one part ({error})") from error


def is_torch_save(parts: list[bytes]) -> bool:
    """Clients from before September 2025 send and read archives of torch.save, which would have to be unpickled."""
    return len(parts) == 1 and parts[0].startswith(b"PK\x03\x04")


def answer(read: Callable[[], Any], policy: ServedPolicy, api_token: str | None) -> tuple[dict, bool]:
    """The reply to the request that `read` returns, and whether the server goes on. This raises nothing."""
    start = time.perf_counter()
    try:
        request = read()
        if not isinstance(request, dict):
            raise RequestError('a request is a map {"endpoint", "data", "api_token"}')
        if api_token is not None:  # before anything of the request is used
            given = request.get("api_token")
            if not isinstance(given, str) or not hmac.compare_digest(given.encode(), api_token.encode()):
                raise RequestError("Unauthorized: Invalid API token")
        match request.get("endpoint", "get_action"):
            case "get_action":
                reply = policy.get_action(request.get("data"))  # on the host: the device has finished
                policy.latency.add(time.perf_counter() - start)
                return reply, True
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


def torch_saved(reply: dict) -> bytes:
    """A reply that a client of torch.save can read."""
    data = io.BytesIO()
    torch.save(reply, data)
    return data.getvalue()


class HttpHandler(BaseHTTPRequestHandler):
    """POST /act {"observation": data} gives the actions, GET /health a word; arrays as json_numpy writes them."""

    server: HttpServer

    def do_GET(self) -> None:
        found = self.path == "/health"
        self.reply(200 if found else 404, {"status": "healthy", "model": "GR00T"} if found else {"detail": "Not Found"})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/act" or not length.isdigit() or int(length) > MAX_MESSAGE_BYTES:
            self.close_connection = True  # what follows is not read
            return self.reply(404, {"detail": f"there is POST /act with at most {MAX_MESSAGE_BYTES} bytes, and GET /health"})
        body = self.rfile.read(int(length))
        reply, _ = answer(partial(self.request_of, body), self.server.policy, self.server.api_token)
        self.reply(400 if "error" in reply else 200, {"detail": reply["error"]} if "error" in reply else reply)

    @staticmethod
    def request_of(body: bytes) -> dict:
        """The get_action request of a body, which may have been encoded twice."""
        try:
            payload = json.loads(body)
            payload = json.loads(payload["encoded"]) if "encoded" in payload else payload
            return {"endpoint": "get_action", "data": payload["observation"], "api_token": payload.get("api_token")}
        except Exception as error:  # json has many kinds
            raise RequestError(f'not JSON with "observation" ({error!r})') from error

    def reply(self, status: int, content: dict) -> None:
        data = json.dumps(content, default=json_array).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Says nothing for each request."""


class HttpServer(HTTPServer):
    """One request at a time."""

    policy: ServedPolicy
    api_token: str | None


def json_array(value: np.ndarray) -> dict:
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"__numpy__": data, "dtype": np.lib.format.dtype_to_descr(value.dtype), "shape": value.shape}


def bind(args: Args, socket: zmq.Socket) -> str:
    """Starts to listen, and returns the address; requests wait until the network is loaded."""
    host = "127.0.0.1" if args.host == "localhost" else args.host  # ZeroMQ binds to no names
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.LINGER, 1000)  # ms for the last reply to leave
    try:
        socket.bind(f"tcp://{host}:{args.port}")
    except zmq.ZMQError as error:
        refuse_address(args, error)
    warn_of(args)
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)


def refuse_address(args: Args, error: OSError | zmq.ZMQError) -> NoReturn:
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
        raise SystemExit(f"--port {args.port}: {error.strerror}; choose another, or 0 for a free one") from error
    raise SystemExit(f"--host {args.host}: {error.strerror}; give an address of this machine, or 0.0.0.0") from error


def warn_of(args: Args) -> None:
    if args.host != "localhost" and not args.host.startswith("127.") and args.api_token is None:
        warning = f"warning: --host {args.host} without --api-token: whoever reaches the port may use and stop this server"
        print(warning, file=sys.stderr, flush=True)


def serve_zmq(args: Args) -> None:
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        address = bind(args, socket)
        policy, on = ServedPolicy(args), True
        print(f"serving {policy} at {address}", flush=True)
        try:
            while on:
                parts = socket.recv_multipart()
                reply, on = answer(partial(unpack_message, parts), policy, args.api_token)
                socket.send(torch_saved(reply) if is_torch_save(parts) else msgpack.packb(reply, default=pack_array))
        finally:
            policy.latency.tell()


def serve_http(args: Args) -> None:
    try:
        server = HttpServer((args.host, args.port), HttpHandler)
    except OSError as error:
        refuse_address(args, error)
    warn_of(args)
    with server:
        server.policy, server.api_token = ServedPolicy(args), args.api_token
        print(f"serving {server.policy} at http://{args.host}:{server.server_port}/act", flush=True)
        try:
            server.serve_forever()
        finally:
            server.policy.latency.tell()


# ======== main ========================================================================================================
def main(args: Args) -> None:
    args.device = pick_device(args.device)
    with contextlib.suppress(KeyboardInterrupt):
        (serve_http if args.http else serve_zmq)(args)


if __name__ == "__main__":
    main(ARGS)
