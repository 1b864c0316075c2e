"""The base install has no Ray: whoever needs it is told what to install."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.mark.parametrize("module", ["engine.actor", "prefill.actor", "decode.actor"])
def test_without_ray_the_error_names_the_extra(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("engine.actor", "prefill.actor", "decode.actor"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=r"kvstrata\[serve\]"):
        importlib.import_module(module)


@pytest.mark.parametrize("module", ["prefill.role", "decode.role", "engine.boot"])
def test_the_roles_themselves_need_no_ray(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.import_module(module)
