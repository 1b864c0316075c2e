"""`kvstrata bench vllm`: options, and the run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.say import fail, note, one_json

if TYPE_CHECKING:
    from cli.bench.connectors.plan import Plan
    from cli.bench.connectors.run import Result

__all__ = ["vllm"]


def vllm(
    model: Annotated[str, typer.Option(metavar="NAME", help="As `kvstrata model list` shows it.")] = "",
    dtype: Annotated[str, typer.Option(help="What vLLM computes in: float32 or bfloat16.")] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, max=256, help="Of each vLLM; every core unless said.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, max=100, help="Rounds that count; one before them warms up.")
    ] = None,
    codecs: Annotated[
        str, typer.Option(metavar="NAME,...", help="What NVMe tiers encode with: all, none, or some.")
    ] = "all",
    quick: Annotated[
        bool, typer.Option("--quick", help="Prove that it runs, in minutes. The figures mean nothing.")
    ] = False,
    install_peers: Annotated[
        bool, typer.Option("--install-peers", help="First install vLLM's CPU build into its folder (3 GB).")
    ] = False,
    vllm_venv: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="vLLM's environment: $KVSTRATA_VLLM_VENV, or in the user's cache."),
    ] = None,
    json_out: Annotated[bool, typer.Option("--json", help="One JSON document; on an error none.")] = False,
) -> None:
    """vLLM's time to the first token: alone, with kvstrata's connector, and with another one.

    New prompts and prompts that hit: in vLLM's own cache, in shared memory, over gRPC, on NVMe with each
    codec. Who is compared is measured one after the other, with the same prompt.

    Takes half an hour and about 14 GiB of memory.
    """
    from cli.bench.peers.vllm_environment import install_vllm, vllm_folder, what_lacks

    environment = (vllm_venv or vllm_folder()).absolute()
    if dtype not in ("float32", "bfloat16"):
        raise typer.BadParameter("say float32 or bfloat16", param_hint="--dtype")
    plan = _plan(rounds, codecs, quick)
    if install_peers:
        install_vllm(environment, note)
    if (reason := what_lacks(environment)) is not None:
        fail(f"{reason}; or add --install-peers")
    result = _measured(plan, model, dtype, threads, environment)
    if json_out:
        from cli.bench.connectors.report import document

        one_json(document(result, dtype))
    else:
        from rich.console import Console

        from cli.bench.connectors.report import draw

        draw(result, dtype, Console())


def _plan(rounds: int | None, codecs: str, quick: bool) -> Plan:
    from cli.bench.connectors.plan import QUICK, Plan
    from kvstore.codecs import CODECS

    said = [name.strip() for name in codecs.split(",") if name.strip()]
    names = {"all": list(CODECS), "none": []}.get(codecs, said)
    if unknown := [name for name in names if name not in CODECS]:
        raise typer.BadParameter(f"{unknown[0]} is no codec: {', '.join(CODECS)}", param_hint="--codecs")
    plan = QUICK if quick else Plan()
    return dataclasses.replace(plan, rounds=rounds or plan.rounds, codecs=tuple(names))


def _measured(plan: Plan, model: str, dtype: str, threads: int | None, environment: Path) -> Result:
    from cli.bench.connectors.machine import Setup, ThisMachine
    from cli.bench.connectors.run import ConnectorBench
    from cli.bench.engines.run import threads_here
    from cli.bench.jsonlines import ChildFailed
    from cli.vllm_config import identity_of
    from engine.registry import DEFAULT_MODEL, resolve_model
    from kvstore.errors import KVStrataError

    try:
        folder = resolve_model(model or DEFAULT_MODEL)
        identity = identity_of(folder, dtype, folder.name)
        setup = Setup(folder, identity, environment, threads or threads_here())
        with ThisMachine(plan, setup) as machine:
            return ConnectorBench(plan, machine, note).run()
    except (ChildFailed, KVStrataError, OSError) as error:
        fail(str(error))
