"""The process of one rank but the first: its share of the weights and of the pool, and what rank 0 says.

    python -m engine.parallel.rank FD      FD: its end of the link (link.py), where everything is told

It ends when the link does, which is when rank 0 ends, however that happens. What goes wrong here is said on
the link, then it ends: rank 0 tells (processes.py). Ctrl-C is for rank 0.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.errors import RanksLost
from engine.models.config import ModelConfig
from engine.parallel.group import RankGroup
from engine.parallel.link import Head, RankLink, checked, with_checksum
from engine.parallel.processes import RankStart
from engine.parallel.shares import HeadShare
from engine.parallel.step import unpacked_step
from engine.runner import ModelRunner
from engine.weights import DTYPES, load_weights
from kvstore.memory import keep_freed_buffers

__all__ = ["main"]


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    keep_freed_buffers()
    with socket.socket(fileno=int(sys.argv[1])) as end:
        greeting = RankLink(end, timeout_s=60.0)
        try:
            head, _ = greeting.receive(60.0)
            _serve(end, RankStart(**{name: head[name] for name in RankStart.__slots__}))
        except RanksLost:
            return 0  # rank 0 has ended, or another rank has, which rank 0 tells
        except Exception as error:
            greeting.send({"error": str(error), "kind": type(error).__name__})
            raise
    return 0


def _serve(end: socket.socket, start: RankStart) -> None:
    config = EngineConfig.model_validate_json(start.config)
    link = RankLink(end, config.rank_timeout_s)
    share = HeadShare(start.rank, config.tensor_parallel)
    group = RankGroup(share.rank, share.ranks, config.rank_timeout_s)
    torch.set_num_threads(config.compute_threads)
    folder = Path(start.folder)
    model_config = ModelConfig.from_folder(folder)
    weights = load_weights(folder, model_config, DTYPES[config.dtype], share.tensor)
    own = share.config(model_config)
    layout = share.layout(own.kv_layout(config.dtype, config.block_tokens))
    runner = ModelRunner(
        config, own, weights, layout, start.n_slots, start.max_model_len, sum_parts=group.sum
    )
    link.send({"digest": weights.digest})
    _Rank(link, group, runner).run()


class _Rank:
    """One command after another."""

    def __init__(self, link: RankLink, group: RankGroup, runner: ModelRunner) -> None:
        self._link = link
        self._group = group
        self._runner = runner

    def run(self) -> None:
        """Until the link ends. Raises RanksLost then, or what went wrong."""
        while True:
            head, body = self._link.receive(None)
            match head["command"]:
                case "connect":
                    self._group.connect(Path(head["rendezvous"]))
                case "step":
                    self._runner.compute(unpacked_step(head, body))
                case "write":
                    self._runner.pool.write_tail(head["slot"], checked(head, body), head["tokens"])
                case "copy":
                    self._runner.pool.copy_block(head["source"], head["target"], head["tokens"])
                case "read":
                    self._read(head)
                case command:
                    raise ValueError(f"rank 0 says {command!r}, which no rank knows")

    def _read(self, head: Head) -> None:
        pool = self._runner.pool
        parts = [pool.read_tail(slot, head["tokens"]).data for slot in head["slots"]]
        body = memoryview(b"".join(parts))
        self._link.send(with_checksum({}, body), body)


if __name__ == "__main__":
    code = main()
    os._exit(code)  # threads of gloo may wait for a rank that is gone
