"""How commands talk to a running service."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer

from kvstore.errors import ConfigError, KVStrataError, Unavailable

__all__ = ["ApiKey", "Url", "service"]

_TIMEOUT_S: Final = 120.0

Url = Annotated[
    str, typer.Option(help="Where the service listens, like http://HOST:8000.", envvar="KVSTRATA_URL")
]
ApiKey = Annotated[str | None, typer.Option(help="Its bearer token.", envvar="KVSTRATA_API_KEY")]


@contextlib.contextmanager
def service(url: str, api_key: str | None) -> Iterator[Any]:
    """An httpx client of the service; what goes wrong is raised as KVStrataError that says what to do."""
    import httpx

    url = _base(url)
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S) as client:
            yield client
    except httpx.HTTPStatusError as error:
        raise KVStrataError(_told_by(error.response)) from None
    except httpx.ConnectError:
        raise Unavailable(
            f"nothing answers at {url}: start a service with `kvstrata up`, or name another with --url"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise KVStrataError(
            f"{url}: {error or type(error).__name__}. Is it a kvstrata service? Its log says more"
        ) from None


def _base(url: str) -> str:
    """Without the /v1 that OpenAI's clients are given. Raises ConfigError for what is no URL."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is not a URL: write http://{url.rpartition('://')[2] or 'HOST:PORT'}")
    return url.rstrip("/").removesuffix("/v1")


def _told_by(response: Any) -> str:
    """The service's own words, if it is one."""
    try:
        response.read()
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answered {response.status_code}: is it a kvstrata service? See --url"
