#!/usr/bin/env bash
# Tests and measurements on a GPU, in pieces of under ten minutes; the output of each goes to results/gpu/PIECE.txt.
#
#     bash benchmarks/gpu.sh                            # all; a piece that has its output already is skipped
#     bash benchmarks/gpu.sh tests_neurons kernels      # these
#     RESULTS=DIR bash benchmarks/gpu.sh --device cpu   # tiny networks, to try it without a GPU; into another folder
#
# A piece that fails or takes too long leaves PIECE.part, is done again the next time, and keeps none of the others from
# running; the status is 1 then.
set -uo pipefail
cd "$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")/.."  # also through a link
device=cuda
if [ "${1:-}" = --device ]; then device=$2; shift 2; fi
wanted=" $* "
folder=$(mkdir -p "${RESULTS:-results/gpu}" && cd "${RESULTS:-results/gpu}" && pwd)
failed=()

if [ "$device" = cuda ]; then
    published=VGG16:100:64 low_latency=VGG16:4:128 repeats=5
    fast_tests=(-m 'not slow') slow_tests=(-m slow)
    neuron_tests=(tests/test_{cuda,kernels,neuron,spiking,balancing,low_latency,benchmarks}.py)
    export NETWORK=VGG16 T=100 TRAIN=2000 TEST=200 FLAGS='--gpu --amp --batch_size 64' CALIBRATION=
else
    published=VGG5:12:2 low_latency=VGG5:4:2 repeats=1
    fast_tests=(tests/test_flags.py) slow_tests=(tests/test_flags.py) neuron_tests=(tests/test_kernels.py)
    export NETWORK=VGG5 T=12 TRAIN=20 TEST=5 FLAGS='--no-gpu --amp --batch_size 50'
    export CALIBRATION='--calibration_samples 20 --calibration_timesteps 30'
fi

piece() {  # name, command
    local name=$1
    shift
    if [ "$wanted" != '  ' ] && [ "${wanted/ $name /}" = "$wanted" ]; then return; fi
    if [ -e "$folder/$name.txt" ]; then echo "$name: is there already"; return; fi
    echo "$name: ..."
    if timeout 590 "$@" > "$folder/$name.part" 2>&1; then
        mv "$folder/$name.part" "$folder/$name.txt"
        tail -n 3 "$folder/$name.txt"
    else
        echo "$name: failed, see $folder/$name.part"
        tail -n 3 "$folder/$name.part"
        failed+=("$name")
    fi
}

compare() {  # name, row, tasks
    piece "$1" python benchmarks/compare.py --rows "$2" --tasks "${@:3}" --repeats $repeats --device $device --amp \
                                            --json "$folder/$1.json"
}

epochs() {  # flags of ann.py, then of snn.py: an epoch of each, on pictures made for it, TRAIN and TEST of each class
    set -euo pipefail
    local root=$PWD
    scratch=$(mktemp -d)  # not local: the trap runs after the function
    trap 'rm -rf "$scratch"' EXIT
    cd "$scratch"
    python - "$TRAIN" "$TEST" <<'END'
import pathlib, sys
import numpy
from PIL import Image
random = numpy.random.default_rng(0)
for kind, count in zip(('train', 'test'), map(int, sys.argv[1:])):
    for label in range(10):
        folder = pathlib.Path('pictures', kind, f'class{label}')
        folder.mkdir(parents=True)
        for i in range(count):  # a stripe tells the class
            image = random.integers(0, 256, (32, 32, 3), dtype=numpy.uint8)
            image[3 * label:3 * label + 5] |= 192
            Image.fromarray(image).save(folder / f'{i}.png')
END
    local data="-a $NETWORK --dataset FOLDER --data_dir pictures --image_size 32 --epochs 1"
    python "$root/ann.py" $data $FLAGS --batch_norm --name ann $1
    python "$root/snn.py" $data $FLAGS --pretrained_ann trained_models/ann/ann.pth --name snn $2
    cat logs/ann/ann.jsonl logs/snn/snn.jsonl
}
export -f epochs

piece tests_neurons python -m pytest -rs "${neuron_tests[@]}"
piece kernels python benchmarks/compare.py --rows $published $low_latency --tasks kernels --repeats $repeats \
                                           --device $device --json "$folder/kernels.json"
compare train_published $published train
compare test_published $published test
compare train_low_latency $low_latency train
compare test_low_latency $low_latency test
compare shares_published $published shares growth
compare shares_low_latency $low_latency shares growth
piece epochs_published bash -c 'epochs "" "--timesteps $T $CALIBRATION"'
piece epochs_low_latency bash -c 'epochs "--activation QCFS" "--timesteps 4 --activation Linear"'
piece tests_fast python -m pytest -rs "${fast_tests[@]}"
piece tests_slow python -m pytest -rs "${slow_tests[@]}"

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
