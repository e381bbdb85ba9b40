#!/usr/bin/env bash
# Hosts for trying a cluster, on one Linux machine: network namespaces with a switch between them. As root, with iproute2.
#
#   hosts.sh up PREFIX NUM     PREFIX1 … PREFIXNUM with addresses 10.77.0.1 … and a switch, PREFIX0, which nothing else reaches
#   hosts.sh cut PREFIX N      pull the cable of host N out of the switch
#   hosts.sh mend PREFIX N     and put it back
#   hosts.sh down PREFIX       end what runs in them and remove them
#
# A command runs on a host by `ip netns exec PREFIX2 COMMAND`; files are shared, as on a shared disk.
set -euo pipefail

up() {
    local prefix=$1 num=$2 host
    ip netns add "${prefix}0"
    ip -n "${prefix}0" link add switch type bridge
    ip -n "${prefix}0" link set switch up
    for host in $(seq "$num"); do
        ip netns add "$prefix$host"
        ip -n "$prefix$host" link set lo up
        ip -n "${prefix}0" link add "port$host" type veth peer name eth0 netns "$prefix$host"
        ip -n "${prefix}0" link set "port$host" master switch
        ip -n "${prefix}0" link set "port$host" up
        ip -n "$prefix$host" address add "10.77.0.$host/24" dev eth0
        ip -n "$prefix$host" link set eth0 up
    done
}

cut() { ip -n "${1}0" link set "port$2" down; }

mend() { ip -n "${1}0" link set "port$2" up; }

down() {
    local name pids
    for name in $(ip netns list | awk -v prefix="$1" '$1 ~ "^" prefix "[0-9]+$" {print $1}'); do
        pids=$(ip netns pids "$name")
        # shellcheck disable=SC2086
        if [[ -n $pids ]]; then kill -KILL $pids 2>/dev/null || true; fi
        ip netns delete "$name"
    done
}

case ${1:-} in
up | cut | mend | down) "$@" ;;
*)
    sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
