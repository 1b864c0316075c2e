"""`kvstrata store`: shards for foreign engines, without Ray, in the foreground."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cli.say import note, one_json, reported

if TYPE_CHECKING:
    from kvstore.config import StoreConfig
    from kvstore.shard_processes import ProcessesStart
    from kvstore.store_file import ShardPlace, StoreFolder

__all__ = ["store"]

_UNITS: Final = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}
_SIZE: Final = re.compile(r"([0-9][0-9_]*)\s*([a-z]*)")


def store(
    config: Annotated[Path | None, typer.Argument(help="TOML file; its store section counts.")] = None,
    name: Annotated[
        str, typer.Option(help="What other commands call it; its files lie under it.")
    ] = "default",
    shards: Annotated[int | None, typer.Option(min=1, help="Shards, a process each.")] = None,
    capacity: Annotated[
        str | None, typer.Option(help="Memory for blocks, a shard: 4GiB, 512MiB or bytes.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 unless said.")] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="The first shard's port, the next take the next. 0: free ones."),
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(help="Host that clients are told, when it is not --host.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow listening beyond loopback without TLS.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM certificate of the shards.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM key of the shards.")] = None,
    tls_ca: Annotated[
        Path | None, typer.Option(help="PEM root that clients' certificates must come from (mTLS).")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token clients show. Made and kept unless given.")
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(help="File with the cluster's secret. Made and kept unless given."),
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds for running calls to finish at the end.")
    ] = 5.0,
    json_out: Annotated[
        bool, typer.Option("--json", help="One JSON document when it serves; on an error none.")
    ] = False,
) -> None:
    """Run shards for engines that are not kvstrata's own: no Ray, no model, Ctrl-C ends it.

    Secret, token and addresses are kept, for you alone, in ~/.local/state/kvstrata/stores/NAME, or below
    $KVSTRATA_STATE where that is set. Ctrl-C drains; a second one ends at once.
    """
    flags = {
        "store.shards": shards,
        "store.host": host,
        "store.port": port,
        "store.insecure": insecure or None,
        "store.tls_cert": tls_cert,
        "store.tls_key": tls_key,
        "store.tls_ca": tls_ca,
    }
    files = (token_file, secret_file)
    raise typer.Exit(
        reported(lambda: _store(config, flags, capacity, name, advertise, files, drain, json_out))
    )


def _store(
    path: Path | None,
    flags: dict[str, Any],
    capacity: str | None,
    name: str,
    advertise: str | None,
    files: tuple[Path | None, Path | None],
    drain_s: float,
    json_out: bool,
) -> int:
    from cli.settings import service_config
    from kvstore.shard_processes import ProcessesStart
    from kvstore.store_file import StoreFolder, read_private

    if capacity is not None:
        flags["store.capacity_nbytes"] = _nbytes(capacity)
    settings = service_config(path, flags).store
    folder = StoreFolder.of(name)
    with folder.running():
        _check_ports(settings)
        token_file = files[0] or folder.token_file()
        token = read_private(token_file).decode().strip()
        kept = read_private(files[1]).strip() if files[1] else settings.kept_secret()
        secret = kept or folder.secret()
        start = ProcessesStart(settings, secret, token, drain_s, _told_host(settings.host, advertise))
        used = {f"shard-{i}" for i in range(settings.shards)}
        for path in settings.nvme.left_out(used) if settings.nvme is not None else ():
            note(f"{path} is left out: what is purged from now on comes back with it, unless it is deleted")
        return asyncio.run(_serve(start, folder, token_file.absolute(), json_out))


async def _serve(start: ProcessesStart, folder: StoreFolder, token_file: Path, json_out: bool) -> int:
    """Until a signal ends it: 128 + the signal, as a shell says it."""
    import signal

    from kvstore.shard_processes import ShardProcesses
    from kvstore.store_file import StoreFile

    tls = start.store.client_files()

    def changed(places: list[ShardPlace]) -> None:
        StoreFile(folder.path.name, tuple(places), str(token_file), tls).write(folder.file)

    caught: list[int] = []
    asked, again = asyncio.Event(), asyncio.Event()

    def stop(signum: int) -> None:
        (again if caught else asked).set()
        caught.append(signum)

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signum, stop, signum)
    processes = ShardProcesses(start, note, changed)
    note(f"starting {_counted(start.store.shards)}")
    try:
        if await _unless(asked, processes.start()):
            _announce(StoreFile.read(folder.file), folder.file, start.store, json_out)
            await asked.wait()
            note(f"\ndraining, {start.drain_s:.0f} s at most; Ctrl-C again ends at once")
            await _unless(again, processes.drain())
    finally:
        processes.kill()
    return 128 + caught[0]


async def _unless(event: asyncio.Event, work: Any) -> bool:
    """Do the work, unless the event comes first: then it is cancelled. Whether it was done."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((working, waiting), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            await working
            return True
        return False
    finally:
        working.cancel()
        waiting.cancel()
        await asyncio.gather(working, waiting, return_exceptions=True)


def _announce(running: Any, file: Path, settings: StoreConfig, json_out: bool) -> None:
    if json_out:
        shards = [
            {"shard": s.shard, "address": s.address, "admin": s.admin, "pid": s.pid} for s in running.shards
        ]
        one_json(
            {"name": running.name, "file": str(file), "token_file": running.token_file, "shards": shards}
        )
        return
    at = "" if running.name == "default" else f'"{running.name}"'
    flag = "" if running.name == "default" else f" --store {running.name}"
    print(f"\nstore {running.name}: {_counted(len(running.shards))} of {_worded(settings.capacity_nbytes)}")
    for shard in running.shards:
        print(f"  {shard.shard}  {shard.address}  (admin {shard.admin})")
    print(f"  token    {running.token_file}")
    print(f"  python   StoreClient.connect_running({at})   on this machine")
    print(f'           StoreClient.connect_to(["{running.shards[0].address}"], token=...)   from anywhere')
    print(f"  shell    kvstrata status --store {running.name}; kvstrata epoch show MODEL{flag}", flush=True)


def _check_ports(settings: StoreConfig) -> None:
    """Told before anything starts. Raises ConfigError."""
    from kvstore.errors import ConfigError
    from router.listener import listen

    for base, host, flag in (
        (settings.port, settings.host, "--port"),
        (settings.admin_port, settings.admin_host, "store.admin_port"),
    ):
        if base + settings.shards - 1 > 65535:
            raise ConfigError(
                f"{flag} {base} leaves no room for {settings.shards} shards: choose a lower one"
            )
        for port in range(base, base + settings.shards) if base else ():
            listen(host, port).close()


def _told_host(host: str, advertise: str | None) -> str | None:
    """Whoever listens on all addresses is found under the machine's name."""
    import socket

    if advertise is None and host in ("0.0.0.0", "::"):  # noqa: S104
        return socket.getfqdn()
    return advertise


def _nbytes(text: str) -> int:
    from kvstore.errors import ConfigError

    found = _SIZE.fullmatch(text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise ConfigError(f"--capacity {text}: give 4GiB, 512MiB or a number of bytes")
    return int(found[1]) * _UNITS[found[2]]


def _counted(shards: int) -> str:
    return "1 shard" if shards == 1 else f"{shards} shards"


def _worded(nbytes: int) -> str:
    return f"{nbytes / (1 << 30):.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / (1 << 20):.0f} MiB"
