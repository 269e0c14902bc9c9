#!/usr/bin/env bash
# Makes the checked-in stubs under protos/gen from protos/meshlm/v1, with the one pinned generator of requirements.txt.
# Usage: protos/generate.sh PYTHON [OUT]   (PYTHON has requirements.txt installed; OUT defaults to protos/gen)
set -euo pipefail
cd "$(dirname "$0")"
python=$1
out=${2:-gen}
mkdir -p "$out/meshlm/v1"
find "$out/meshlm/v1" -name '*_pb2*' -delete
PATH="$(dirname "$python"):$PATH" "$python" -m grpc_tools.protoc -I . \
    --python_out="$out" --mypy_out="quiet:$out" --grpc_python_out="$out" --mypy_grpc_out="quiet:$out" \
    meshlm/v1/*.proto
touch "$out/meshlm/v1/py.typed"
