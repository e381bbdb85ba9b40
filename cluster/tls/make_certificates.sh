#!/usr/bin/env bash
# Certificates for one Dask cluster: an authority of its own, and one certificate each for scheduler, workers and clients.
#
#   make_certificates.sh FOLDER [DAYS]
#
# writes FOLDER/{ca,scheduler,worker,client}{,-key}.pem and FOLDER/tls.yaml, a Dask configuration that names them and refuses
# connections without encryption: DASK_CONFIG=FOLDER is all that scheduler, workers and clients need.
set -euo pipefail
umask 077

if [[ $# -lt 1 || $# -gt 2 ]]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
days=${2:-365}
if [[ -e $folder/ca.pem ]]; then
    echo "error: $folder/ca.pem exists; certificates of a new authority would not fit those in use. Give another folder." >&2
    exit 2
fi

new_key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
openssl req -x509 "${new_key[@]}" -keyout "$folder/ca-key.pem" -out "$folder/ca.pem" -days "$days" \
    -subj "/CN=ntkpipe cluster authority" -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null

# A client only connects; scheduler and workers connect and listen. With this a client's certificate cannot pose as a scheduler.
sign() {
    local role=$1 usage=$2
    openssl req "${new_key[@]}" -keyout "$folder/$role-key.pem" -subj "/CN=ntkpipe $role" 2>/dev/null |
        openssl x509 -req -CA "$folder/ca.pem" -CAkey "$folder/ca-key.pem" -CAcreateserial -days "$days" \
            -out "$folder/$role.pem" -extfile <(printf 'keyUsage=critical,digitalSignature\nextendedKeyUsage=%s\n' "$usage") \
            2>/dev/null
}
sign scheduler serverAuth,clientAuth
sign worker serverAuth,clientAuth
sign client clientAuth
rm -f "$folder/ca.srl"

cat >"$folder/tls.yaml" <<YAML
distributed:
  comm:
    default-scheme: tls
    require-encryption: true
    tls:
      min-version: 1.3
      ca-file: $folder/ca.pem
      scheduler: {cert: $folder/scheduler.pem, key: $folder/scheduler-key.pem}
      worker: {cert: $folder/worker.pem, key: $folder/worker-key.pem}
      client: {cert: $folder/client.pem, key: $folder/client-key.pem}
YAML

echo "$folder: valid for $days days. Keep ca-key.pem off the cluster."
echo "Now, for scheduler, workers and clients: export DASK_CONFIG=$folder"
