#!/usr/bin/env bash
# What is to be seen on a GPU, in pieces that each end within four minutes; the output of each goes to
# results/gpu/PIECE.txt. First: pip install -r requirements.txt -r tests/requirements.txt -r tests/compare.txt
#
#     DATA='--dataset FOLDER --data_dir ~/Datasets/cifar10_jpeg' bash benchmarks/gpu.sh   # all; without DATA: CIFAR10
#     bash benchmarks/gpu.sh low_latency_VGG16 train_1                                    # these
#     RESULTS=DIR bash benchmarks/gpu.sh --device cpu  # tiny, to try it without a GPU; into another folder
#
# A piece whose output is there is skipped, but for tests. A training that is out of time keeps its checkpoint and resumes when this is
# run again; any other piece that fails or is out of time is done again. PIECE.part holds what was printed. The pieces
# behind it run all the same; the status is 1 then.
set -uo pipefail
cd "$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")/.."  # also through a link
device=cuda
if [ "${1:-}" = --device ]; then device=$2; shift 2; fi
wanted=" $* "
folder=$(mkdir -p "${RESULTS:-results/gpu}" && cd "${RESULTS:-results/gpu}" && pwd)
failed=() known=' '

if [ "$device" = cuda ]; then
    if ! python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        echo 'torch finds no CUDA device' >&2
        exit 1
    fi
    deep=(VGG16 RESNET20) rows=(VGG16:100:64 VGG16:4:128 RESNET20:4:64) repeats=5
    tests=(tests/test_*.py)
    export DATA=${DATA:---dataset CIFAR10} SEEDS=${SEEDS:-1}
    export NETWORK=VGG16 T=100 ANN='--epochs 111 --batch_size 128 --amp' SNN='--epochs 10 --train_samples 12800 --amp'
else
    deep=(VGG5) rows=(VGG5:12:2 VGG5:4:2) repeats=1
    tests=(tests/test_flags.py)
    export DATA='--dataset DIGITS' SEEDS=0 EPOCHS=1 FURTHER=1 AMP= EXTRA='--no-gpu --train_samples 256 --cutout 2'
    export NETWORK=VGG5 T=12 ANN='--no-gpu --epochs 1 --train_samples 256 --cutout 2'
    export SNN='--no-gpu --epochs 1 --train_samples 64 --calibration_samples 20 --calibration_timesteps 30'
fi

piece() {  # name, command
    local name=$1 status
    known+="$name "
    shift
    if [ "$wanted" != '  ' ] && [ "${wanted/ $name /}" = "$wanted" ]; then return; fi
    if [ -e "$folder/$name.txt" ] && [[ $name != test_[a-z]* ]]; then echo "$name: is there already"; return; fi
    echo "$name: ..."
    timeout 230 "$@" > "$folder/$name.part" 2>&1
    status=$?
    tail -n 3 "$folder/$name.part"
    if [ $status = 0 ]; then
        mv "$folder/$name.part" "$folder/$name.txt"
    else
        if [ $status = 124 ]; then echo "$name: out of time; run this again"; else echo "$name: failed"; fi
        failed+=("$name")
    fi
}

published() {  # train NETWORK's ANN, convert it and fine-tune it at T
    set -euo pipefail
    eval "data=(${DATA})"
    name=gpu_published_$NETWORK
    python ann.py -a "$NETWORK" "${data[@]}" --validation_fraction 0.04 -lr 0.05 --lr_schedule cosine --cutout 8 \
                  --seed 1 --name "$name" --resume auto $ANN
    python snn.py -a "$NETWORK" "${data[@]}" --validation_fraction 0.04 --timesteps "$T" -lr 2e-5 --dropout 0 \
                  --lr_schedule cosine --scaling_factor auto --seed 1 --name "$name" --resume auto \
                  --pretrained_ann "trained_models/ann/$name.pth" $SNN
}
export -f published

for network in "${deep[@]}"; do
    piece "low_latency_$network" env ARCHITECTURE="$network" bash recipes/low_latency.sh
done
for i in "${!rows[@]}"; do
    for task in train test; do
        piece "${task}_$((i + 1))" python benchmarks/compare.py --rows "${rows[i]}" --tasks $task --repeats $repeats \
              --device $device --amp --json "$folder/${task}_$((i + 1)).json"
    done
done
piece published bash -c published
for i in "${!rows[@]}"; do
    piece "shares_$((i + 1))" python benchmarks/compare.py --rows "${rows[i]}" --tasks kernels shares growth \
          --repeats $repeats --device $device --amp --json "$folder/shares_$((i + 1)).json"
done
for file in "${tests[@]}"; do
    piece "$(basename "$file" .py)" python -m pytest -rs "$file"
done

for name in $wanted; do
    if [[ $known != *" $name "* ]]; then echo "$name: there is no such piece" >&2; exit 1; fi
done
if [ ${#failed[@]} -gt 0 ]; then
    echo "to be run again: ${failed[*]}"
    exit 1
fi
