"""Who calls a shard, and what they may name.

    cluster token                   -> trusted: names the tenant it acts for, uses any namespace
    a tenant's token or certificate -> that tenant: only namespaces that it opened, nobody's else

A shard without any token is open to whoever reaches it: a listener beyond loopback should have one. Tokens
are kept and compared as digests, all of them each time, in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from kvstore.errors import ConfigError, NotFound, OverLimit, PermissionDenied, Unauthenticated
from kvstore.nouns import NamespaceId, NamespaceSpec

DEFAULT_TENANT: Final = "default"
"""Whom a trusted caller acts for that names nobody. From a tenant's own callers it says nothing."""
TENANT_CHARS_MAX: Final = 256
NAMESPACES_A_TENANT: Final = 256
"""What one tenant's own callers may open: well below what a core keeps, so that others find room."""
_SCHEME: Final = "Bearer "


@dataclass(frozen=True, slots=True)
class Caller:
    """`tenant` None is the trusted role."""

    tenant: str | None = None
    may_bind_epochs: bool = True

    @property
    def trusted(self) -> bool:
        return self.tenant is None


TRUSTED: Final = Caller()


@dataclass(frozen=True, slots=True)
class Tenant:
    """How a tenant is known. `certificate`: a common or alternative name of its client certificate (mTLS)."""

    name: str
    token: str | None = field(default=None, repr=False)
    certificate: str | None = None
    may_bind_epochs: bool = False

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= TENANT_CHARS_MAX:
            raise ConfigError(f"a tenant's name has 1 to {TENANT_CHARS_MAX} characters, not {len(self.name)}")
        if self.name == "default":
            raise ConfigError(
                "a tenant named default would share namespaces with every trusted worker that names nobody: "
                "choose another name"
            )
        if not self.token and not self.certificate:
            raise ConfigError(
                f"tenant {self.name} cannot be told from others: give it a token or certificate"
            )


class Callers:
    """Raises ConfigError for tenants without a cluster token, or two callers that nothing tells apart."""

    def __init__(self, cluster_token: str | None, tenants: Iterable[Tenant] = ()) -> None:
        known = list(tenants)
        if known and not cluster_token:
            raise ConfigError(
                "tenants need a cluster token beside their own: without one everybody is trusted"
            )
        self._open = not cluster_token
        self._tokens = [(_digest(cluster_token or ""), TRUSTED)]
        self._certificates: dict[str, Caller] = {}
        for tenant in known:
            caller = Caller(tenant.name, tenant.may_bind_epochs)
            if tenant.token:
                self._tokens.append((_digest(tenant.token), caller))
            if tenant.certificate:
                if tenant.certificate in self._certificates:
                    raise ConfigError(f"two tenants with one certificate name {tenant.certificate!r}")
                self._certificates[tenant.certificate] = caller
        if len({digest for digest, _ in self._tokens}) != len(self._tokens):
            raise ConfigError("two callers with one token: give each tenant, and the cluster, its own")
        if len({tenant.name for tenant in known}) != len(known):
            raise ConfigError("a tenant is listed twice")

    @property
    def take_certificates(self) -> bool:
        return bool(self._certificates)

    def by_token(self, authorization: str) -> Caller | None:
        """Whose token that is; None where nobody's. Always as many comparisons as there are tokens."""
        shown = _digest(authorization.removeprefix(_SCHEME))
        found = None
        for digest, caller in self._tokens:
            if hmac.compare_digest(shown, digest):
                found = caller
        if self._open:
            return TRUSTED
        return found if authorization.startswith(_SCHEME) else None

    def identify(self, authorization: str, peer_names: Iterable[str] = ()) -> Caller:
        """Raises Unauthenticated where neither token nor certificate is known, or they name two tenants."""
        by_name = {self._certificates[name] for name in peer_names if name in self._certificates}
        if len(by_name) > 1:
            raise Unauthenticated("the certificate names more than one tenant: use one of a single tenant")
        certified = next(iter(by_name), None)
        if not authorization and certified is not None:
            return certified
        caller = self.by_token(authorization)
        if caller is None:
            raise Unauthenticated("show the cluster's token, or a tenant's")
        if not caller.trusted and certified is not None and certified != caller:
            raise Unauthenticated("token and certificate are two tenants': show those of one")
        return caller


def acting_tenant(caller: Caller, asked: str) -> str:
    """Whom a call is made for. Raises PermissionDenied for another's name, or ConfigError."""
    if len(asked) > TENANT_CHARS_MAX:
        raise ConfigError(f"a tenant's name of {len(asked)} characters: at most {TENANT_CHARS_MAX}")
    if caller.tenant is None:
        return asked or DEFAULT_TENANT
    if asked not in ("", DEFAULT_TENANT, caller.tenant):
        raise PermissionDenied(f"tenant {caller.tenant} cannot act for another: leave the tenant empty")
    return caller.tenant


class NamespaceOwners:
    """Which tenant's a namespace is, for as long as the shard runs: opening is what tells."""

    def __init__(self) -> None:
        self._owners: dict[NamespaceId, str] = {}
        self._specs: dict[str, set[NamespaceSpec]] = {}

    def admit(self, caller: Caller, spec: NamespaceSpec) -> None:
        """Before a namespace is opened. Raises OverLimit for a tenant that has too many open."""
        known = self._specs.get(caller.tenant, ()) if caller.tenant is not None else ()
        if len(known) >= NAMESPACES_A_TENANT and spec not in known:
            raise OverLimit(f"tenant {caller.tenant} has {len(known)} namespaces open: that is the most")

    def opened(self, namespace: NamespaceId, tenant: str, spec: NamespaceSpec) -> None:
        """The shard did open it: what is kept here is bounded by what it keeps."""
        self._owners[namespace] = tenant
        self._specs.setdefault(tenant, set()).add(spec)

    def check_model(self, caller: Caller, model_id: str) -> None:
        """Raises PermissionDenied unless the tenant has a namespace of the model open: what others run is
        theirs to know."""
        if caller.tenant is not None and all(
            spec.model_id != model_id for spec in self._specs.get(caller.tenant, ())
        ):
            raise PermissionDenied(f"tenant {caller.tenant} has no namespace of {model_id} open: open one")

    def check(self, caller: Caller, namespace: NamespaceId) -> None:
        """Raises NotFound for a namespace that nobody opened here, PermissionDenied for another tenant's."""
        if caller.tenant is None:
            return
        owner = self._owners.get(namespace)
        if owner is None:
            raise NotFound(f"namespace {namespace.hex()} is not open on this shard: open it first")
        if owner != caller.tenant:
            raise PermissionDenied(f"namespace {namespace.hex()} is not tenant {caller.tenant}'s")


def text_in(metadata: Iterable[tuple[str, str | bytes]] | None, name: str) -> str:
    """One entry of a call's metadata, the last of that name; empty where there is none."""
    shown = dict(metadata or ()).get(name, "")
    return shown if isinstance(shown, str) else shown.decode("utf-8", "replace")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
