"""Promise: the connector is what vLLM 0.32 and 0.33 call. Held against their base classes' signatures, kept
in signatures.json, so that it runs where no vLLM is; where one is, the kept ones are held against it."""

from __future__ import annotations

import pytest

from cli.bench.peers.vllm_environment import vllm_folder
from tests.vllm.engines import REPO
from tests.vllm.signatures import Signature, bases_in, derived_in, kept, methods_of

CONNECTOR = (REPO / "kvstore/integrations/vllm/connector.py").read_text(encoding="utf-8")
VERSIONS = kept()


@pytest.fixture(scope="module")
def ours() -> dict[str, Signature]:
    return methods_of(derived_in(CONNECTOR))


@pytest.mark.parametrize("version", VERSIONS)
def test_every_public_method_is_one_of_the_base_class(ours: dict[str, Signature], version: str) -> None:
    theirs = VERSIONS[version]
    unknown = ours.keys() - set().union(*VERSIONS.values())
    assert unknown == set(), "nobody calls these"
    wrong = {
        name: (ours[name].parameters, theirs[name].parameters)
        for name in ours.keys() & theirs.keys()
        if not ours[name].is_called_as(theirs[name])
    }
    assert wrong == {}


@pytest.mark.parametrize("version", VERSIONS)
def test_every_abstract_method_is_there(ours: dict[str, Signature], version: str) -> None:
    abstract = {name for name, theirs in VERSIONS[version].items() if theirs.abstract}
    assert len(abstract) == 8  # the seven of every connector, and SupportsHMA's
    assert abstract - ours.keys() == set()


def test_a_method_of_another_name_or_with_other_parameters_is_seen() -> None:
    source = "class C(KVConnectorBase_V1):\n def wait_for_save(self, layer): ...\n def nobody(self): ..."
    ours = methods_of(derived_in(source))
    assert not ours["wait_for_save"].is_called_as(VERSIONS["0.32"]["wait_for_save"])
    assert ours.keys() - VERSIONS["0.32"].keys() == {"nobody"}


@pytest.mark.vllm
def test_the_kept_signatures_are_those_of_the_installed_version() -> None:
    (base,) = vllm_folder().glob(
        "lib/python3*/site-packages/vllm/distributed/kv_transfer/kv_connector/v1/base.py"
    )
    assert methods_of(bases_in(base.read_text(encoding="utf-8"))) == VERSIONS["0.32"]
