#!/usr/bin/env bash
# Runs of ann.py: 1, at most 1 at a time. Written by: python ann_script.py --architecture vgg5 --dataset cifar10 --epochs 300 --seed 0 --log --resume auto --script recipes/vgg5_cifar10_ann.sh
# PYTHON=... names another Python than the one in PATH.
set -u
CDPATH= cd -- "$(dirname -- "$0")/.." || exit 1
limit=1 total=1

PYTHON=${PYTHON:-python}
pids=() commands=()

run() {  # start a run as soon as fewer than $limit are going
    local running words
    while running=($(jobs -rp)) && [ "${#running[@]}" -ge "$limit" ]; do sleep 0.2; done
    printf -v words '%q ' "$@"
    commands+=("$words")
    echo "run ${#commands[@]} of $total: $words"
    "$@" </dev/null &
    pids+=($!)
}

stop() {  # Ctrl-C does not reach what runs in the background: end every run, and start no other
    trap - INT TERM HUP
    kill $(jobs -rp) 2>/dev/null
    wait
    echo "stopped after starting ${#pids[@]} of $total runs" >&2
    exit "$1"
}
trap 'stop 130' INT
trap 'stop 143' TERM
trap 'stop 129' HUP

run "$PYTHON" ann.py --architecture vgg5 --dataset cifar10 --epochs 300 --seed 0 --log --resume auto

failed=0 report=
for i in "${!pids[@]}"; do
    wait "${pids[i]}" && continue
    report+="  status $?: ${commands[i]}"$'\n'
    failed=$((failed + 1))
done
[ "$failed" -eq 0 ] && exit 0
printf '%d of %d runs failed:\n%s' "$failed" "$total" "$report" >&2
exit 1
