"""Serve a fine-tuned policy to robots, as openpi's clients ask for it.

    python experiments/serve.py --checkpoint finetune_self_flow --port 8000
    SELFFLOW_TOKEN=... python experiments/serve.py --host 0.0.0.0 --cert server.pem --key server.key
    python experiments/eval_simpler.py --policy remote --server 127.0.0.1:8000       success of what is served

Requests of several clients are planned together; each keeps its own history. /healthz and /metrics (Prometheus) answer
on the same port. Ctrl-C or SIGTERM: requests in work are answered first. Protocol and safety: docs/serving.md.
"""

import asyncio
import os
import signal
from pathlib import Path

from selfflow_robot.config import ServeConfig, run
from selfflow_robot.interfaces import PROPRIO_DIM

LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(cfg: ServeConfig) -> None:
    """Until a signal. Raises ValueError or OSError with the remedy."""
    token = read_token(cfg.token_file)
    if cfg.key and not cfg.cert:
        raise ValueError("--key is the private key of --cert: give both")

    import torch

    from policies.flow_policy import FlowPolicy
    from policies.server import Limits, PolicyServer, describe, tls_context
    from selfflow_robot import checkpoint

    limits = Limits(
        max_batch=cfg.max_batch,
        wait=cfg.wait_ms / 1e3,
        queue=cfg.queue,
        clients=cfg.clients,
        message=cfg.message_mb << 20,
        plan=cfg.plan_timeout,
        idle=cfg.idle_timeout,
    )
    tls = tls_context(cfg.cert, cfg.key) if cfg.cert else None
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    path = checkpoint.chosen(cfg.checkpoint)
    settings = dict(imagination=cfg.imagination, temperature=cfg.temperature, compiled=cfg.compile)
    policy = FlowPolicy.load(path, steps=cfg.sample_steps, **settings)
    warm_up(policy)
    metadata = describe(policy, Path(path).resolve().name)
    server = PolicyServer(policy, metadata, cfg.host, cfg.port, token, tls, limits)
    if warning := exposed(cfg.host, token, tls is not None):
        print(f"warning: {warning}", flush=True)
    try:
        asyncio.run(server.run(lambda: announce(server, path), signals=(signal.SIGINT, signal.SIGTERM)))
    except (OSError, OverflowError) as error:  # a port that cannot be had, or is none
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{cfg.host} port {cfg.port}: {reason}. Choose another --port or --host") from error
    print("stopped")


def warm_up(policy) -> None:
    """One plan before the first robot asks: the first is the slowest, and a broken checkpoint shows here."""
    import numpy as np

    layout = policy.layout
    image = np.zeros((layout.height, layout.width, 3), np.uint8)
    blank = {"images": {layout.view: image}, "proprio": np.zeros(PROPRIO_DIM, np.float32), "instruction": ""}
    policy.plan([blank] * len(layout.past), (0, 0))


def read_token(path: str | None) -> str | None:
    """From a file, or the environment: on a command line every user of the machine could read it."""
    from policies.remote import TOKEN_VARIABLE

    token = Path(path).read_text() if path else os.environ.get(TOKEN_VARIABLE)
    if token is None:
        return None
    if not (token := token.strip()) or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(f"{path or TOKEN_VARIABLE}: a token is one word of printable ASCII")
    return token


def exposed(host: str, token: str | None, tls: bool) -> str | None:
    """What is unsafe about the address, in words."""
    if host in LOCAL:
        return None
    if token is None:
        return f"{host} without a token: whoever reaches this machine can use the policy. Set SELFFLOW_TOKEN"
    return None if tls else f"{host} without TLS: token and pictures can be read on the way. Give --cert and --key"


def announce(server, path) -> None:
    metadata, policy = server.metadata, server.policy
    layout, action = policy.layout, metadata["action"]
    ours = f'ChunkedPolicy(RemotePlanner("{server.address}"), execute=4)'
    scheme, _, where = server.address.partition("://")
    api_key = ", api_key=TOKEN" if server.token else ""
    host, _, port = where.rpartition(":")
    openpi = (
        f'WebsocketClientPolicy("{server.address}"{api_key})'
        if scheme == "wss"
        else (f'WebsocketClientPolicy("{host}", {port}{api_key})')
    )
    print(f"{server.address} serves {path} ({str(metadata['checkpoint_hash'])[:16]})")
    print(f"  sees     {layout.view}: uint8 ({layout.height}, {layout.width}, 3), at {list(layout.past)} control steps")
    print(f"  reads    proprio float32 ({len(metadata['proprio'])},): {' '.join(metadata['proprio'])}")
    print(f"           prompt: at most {layout.text_bytes} bytes")
    print(f"  answers  actions float32 ({layout.horizon}, {len(action['names'])}): {' '.join(action['names'])}")
    print(f"           {action['units']}; {layout.fps} steps a second")
    print(f"  connect  {ours}, or openpi's {openpi}")
    print(f"  watch    {server.address.replace('ws', 'http', 1)}/healthz and /metrics", flush=True)


if __name__ == "__main__":
    run(ServeConfig, serve)
