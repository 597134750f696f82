#!/usr/bin/env bash
# Write scripts into this folder, two for each row of the paper's table: train the ANN, then convert and fine-tune.
#
#     bash recipes/make.sh && bash recipes/vgg5_cifar10_ann.sh && bash recipes/vgg5_cifar10_snn.sh
#
# RECIPES=DIR writes them there instead (relative to the project's folder).
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")/.."  # also through a link
folder=${RECIPES:-recipes}
mkdir -p "$folder"

row() {  # architecture, data set, time steps, then flags of snn.py alone
    local name=$1_$2 ann=trained_models/ann/ann_$1_$2.pth
    python ann_script.py --architecture "$1" --dataset "$2" --epochs 300 --seed 0 --log --resume auto \
                         --script "$folder/${name}_ann.sh"
    python snn_script.py --architecture "$1" --dataset "$2" --pretrained_ann "$ann" --timesteps "$3" --epochs 20 \
                         --scaling_factor auto --seed 0 --log --resume auto "${@:4}" \
                         --script "$folder/${name}_snn.sh"
}

row vgg5 cifar10 75
row vgg9 cifar10 100
row vgg16 cifar10 100
row resnet20 cifar10 250 --batch_size 32
row vgg11 cifar100 125
