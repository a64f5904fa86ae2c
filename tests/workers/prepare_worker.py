"""Makes the same cache three times: undisturbed, by processes that are killed on the way, and by two processes at once.

test_prepare.py runs it as `prepare_worker.py PIPELINE FOLDER`. It imports the libraries once and forks every process.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401  # here, so that the forked processes need not import it
import torch
import transformers  # noqa: F401
from diffusers import CogVideoXPipeline  # noqa: F401

from fastunlearn.training.options import PrepareOptions
from fastunlearn.training.prepare import run

PIPELINE, FOLDER = sys.argv[1], Path(sys.argv[2])


def start(cache: Path, **environment: str) -> int:
    """Forks a process that makes the cache. Returns its process ID."""
    process = os.fork()
    if process:
        return process
    os.environ.update(environment)
    status = 1
    try:
        run(
            PrepareOptions(
                pretrained_model_name_or_path=PIPELINE,
                output_dir=cache,
                concept="circle",
                target_prompts=FOLDER / "target_prompts.txt",
                kept_prompts=FOLDER / "kept_prompts.txt",
                num_trajectories=6,
                timesteps_per_trajectory=2,
                num_inference_steps=6,
                guidance_scale=3.0,
                height=32,
                width=32,
                num_frames=9,
                mixed_precision="no",
                device="cpu",
            )
        )
        status = 0
    finally:
        os._exit(status)


def end(process: int) -> int:
    """Waits for a process. Returns its exit status, or the negative signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill(cache: Path, shards: int, wait: float) -> None:
    """Starts a process, and kills it `wait` seconds after the cache has `shards` shards."""
    process = start(cache)
    while len(list(cache.glob("shard-*.safetensors"))) < shards or not (cache / "index.json").exists():
        if os.waitpid(process, os.WNOHANG)[0]:
            raise RuntimeError("ended before it could be killed")
        time.sleep(0.001)
    time.sleep(wait)
    os.kill(process, signal.SIGKILL)
    if end(process) != -signal.SIGKILL:
        raise RuntimeError("was not killed")


def main() -> None:
    torch.set_num_threads(1)
    if end(start(FOLDER / "undisturbed")):
        raise RuntimeError("undisturbed: failed")
    for shards, wait in ((0, 0.0), (0, 0.05), (1, 0.1), (5, 0.01), (8, 0.0)):
        kill(FOLDER / "killed", shards, wait)
    if end(start(FOLDER / "killed")):
        raise RuntimeError("killed: failed to go on")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    launched = [start(FOLDER / "launched", RANK=str(rank), LOCAL_RANK=str(rank), **launcher) for rank in range(2)]
    ended = [end(process) for process in launched]
    if any(ended):
        raise RuntimeError("launched: failed")


if __name__ == "__main__":
    main()
