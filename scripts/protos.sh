#!/usr/bin/env bash
# Generates the Python code of protos/ under a folder: `scripts/protos.sh OUT` (the repository root: in place).
#
# The generator is pinned to protoc 25 (grpcio-tools 1.62.3): code of a newer one refuses to load beside the
# older protobuf runtimes that Ray and vLLM pin. It needs a setuptools that still has pkg_resources, hence a
# .venv-protos of its own, apart from what the project runs in.
set -euo pipefail
cd "$(dirname "$0")/.."

out=$1
tools=.venv-protos/bin/python

if ! "$tools" -c 'import grpc_tools.protoc, pkg_resources' >/dev/null 2>&1; then
  echo "==> making .venv-protos (grpcio-tools 1.62.3)"
  .venv/bin/python -m venv --clear .venv-protos
  "$tools" -m pip install -q 'grpcio-tools==1.62.3' 'setuptools<81'
fi
"$tools" -W ignore -m grpc_tools.protoc -I protos --python_out="$out" --pyi_out="$out" protos/kvstore/v1/*.proto
