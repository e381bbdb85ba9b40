#!/usr/bin/env bash
# A kernel into a bucket of a local S3 server, its process killed again and again, then resumed, verified and certified,
# and compared with one on a disk, chunk by chunk. Needs `pip install 'ntkpipe[compute,objects,examples,dev]'`.
set -euo pipefail

for tool in weed ntkpipe python openssl; do
    command -v "$tool" >/dev/null || { echo "there is no $tool on the PATH: activate the virtual environment" >&2; exit 2; }
done
kills=${1:-4}
folder=$(mktemp -d)
workflow=$(dirname "$0")/../../workflows/digits/pntk.yaml
options=(--set kernel.kind=ntk --set kernel.tile=64 --set 'steps=[]')

export AWS_ACCESS_KEY_ID=drill AWS_SECRET_ACCESS_KEY=$(openssl rand -hex 16)
export AWS_ENDPOINT_URL=http://127.0.0.1:${PORT:-8333} AWS_ALLOW_HTTP=true AWS_REGION=us-east-1
url=s3://kernels/digits.zarr

mkdir "$folder/server"
weed -logdir="$folder/server" mini -dir="$folder/server" -ip=127.0.0.1 -ip.bind=127.0.0.1 -s3.port="${PORT:-8333}" \
    -bucket=kernels -admin.ui=false -webdav=false >"$folder/server/out.log" 2>&1 &
server=$!
trap 'kill "$server"; wait "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
for _ in $(seq 100); do
    grep -qs "S3 *ready" "$folder/server/out.log" && break
    kill -0 "$server"
    sleep 0.3
done

tiles() { ntkpipe info "$url" --json | python -c 'import json, sys; print(json.load(sys.stdin)["progress"]["tiles_done"])'; }

for kill in $(seq "$kills"); do
    before=$(tiles 2>/dev/null || echo 0)
    ntkpipe run "$workflow" --set "store=$url" "${options[@]}" >"$folder/run.log" 2>&1 &
    run=$!
    # Not before the run has got further than the one before it.
    while [ "$(tiles 2>/dev/null || echo 0)" -le "$before" ]; do kill -0 "$run"; done
    kill -KILL "$run"
    wait "$run" 2>/dev/null || true
    echo "kill $kill: $(tiles) tiles are in $url"
done

time ntkpipe run "$workflow" --set "store=$url" "${options[@]}"
time ntkpipe run "$workflow" --set "store=$folder/local.zarr" "${options[@]}"
ntkpipe verify "$url" --workflow "$workflow" "${options[@]}"
python - "$url" "$folder/local.zarr" <<'PYTHON'
import sys
from ntkpipe import open_kernel

left, right = (open_kernel(where).store.medium for where in sys.argv[1:])
chunks = sorted(name for name, _ in right.sizes("") if "/c/" in name)
assert chunks == sorted(name for name, _ in left.sizes("") if "/c/" in name)
different = [name for name in chunks if left.get(name, 2**30) != right.get(name, 2**30)]
print(f"{len(chunks)} chunks in the bucket and on the disk, {len(different)} differ")
sys.exit(bool(different))
PYTHON
