#!/bin/bash
# Stops what up.sh has started: containers, then dockerd by its own process id. STATE stays.
S=$(realpath -m "$1")
[ -f "$S/env.sh" ] || exit 0
# shellcheck source=/dev/null
. "$S/env.sh"
for tool in docker podman; do
    mapfile -t ids < <(timeout 10 "$tool" ps --all --quiet 2>/dev/null)
    [ ${#ids[@]} -eq 0 ] || timeout 60 "$tool" rm --force "${ids[@]}" >/dev/null
done
pid=$(cat "$S/d.pid" 2>/dev/null) || exit 0
# Another process may have the number by now.
tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF "$S/d.sock" || exit 0
kill "$pid"
for _ in $(seq 100); do
    case $(awk '{print $3}' "/proc/$pid/stat" 2>/dev/null) in '' | Z) break ;; esac
    sleep 0.1
done
umount "$S"/exec/netns/* 2>/dev/null
exit 0
