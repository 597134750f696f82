#!/usr/bin/env bash
# The networks in pretrained/: train, convert and fine-tune them, and write them there.
#
#     bash recipes/pretrained.sh digits             # two minutes on two cores
#     DATA='--dataset FOLDER --data_dir ~/Datasets/cifar10_jpeg' bash recipes/pretrained.sh network
#
# Stopped, it resumes where it was. Into another folder: PRETRAINED=DIR.
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")/.."  # also through a link
eval "data=(${DATA:---dataset CIFAR10})"  # so that ~ is one's home
folder=${PRETRAINED:-pretrained}
common=(--optimizer Adam --weight_decay 0 --lr_schedule cosine --label_smoothing 0.1 --seed 0
        --resume auto)
mkdir -p "$folder"

digits() {
    local network=(--architecture examples/network.py:small --dataset DIGITS --validation_fraction 0.1 --batch_size 16)
    python ann.py "${network[@]}" "${common[@]}" --activation QCFS --levels 4 --learning_rate 3e-3 --epochs 10 \
                  --name small_digits
    python snn.py "${network[@]}" "${common[@]}" --pretrained_ann trained_models/ann/small_digits.pth --timesteps 4 \
                  --activation Linear --gamma 1 --learning_rate 1e-3 --epochs 6 --name small_digits_4
    python recipes/slim.py trained_models/snn/small_digits_4.pth "$folder/small_digits_4.pth"
}

network() {
    local network=(--architecture examples/network.py:network "${data[@]}" --validation_fraction 0.04)
    # T = 4: an ANN of four levels
    python ann.py "${network[@]}" "${common[@]}" --activation QCFS --levels 4 --learning_rate 2e-3 --epochs 8 \
                  --batch_size 128 --name network_qcfs
    python snn.py "${network[@]}" "${common[@]}" --pretrained_ann trained_models/ann/network_qcfs.pth --timesteps 4 \
                  --activation Linear --learning_rate 1e-4 --epochs 1 --train_samples 6400 --name network_4
    # T = 1: that ANN trained further with one level
    python ann.py "${network[@]}" "${common[@]}" --activation QCFS --levels 1 --learning_rate 1e-3 --epochs 1 \
                  --batch_size 128 --pretrained_ann trained_models/ann/network_qcfs.pth --name network_one_level
    python snn.py "${network[@]}" "${common[@]}" --pretrained_ann trained_models/ann/network_one_level.pth \
                  --timesteps 1 --activation Linear --learning_rate 1e-4 --epochs 1 --train_samples 6400 \
                  --name network_1
    for steps in 4 1; do
        python recipes/slim.py trained_models/snn/network_$steps.pth "$folder/network_cifar10_$steps.pth"
    done
}

for each in ${@:-digits network}; do
    "$each"
done
