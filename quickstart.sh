#!/usr/bin/env bash
# The whole method on 1,797 handwritten digits: no download, no GPU, a few minutes on two cores.
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")"  # also through a link

# 1. Train an ANN: no biases, average pooling.
python ann.py --architecture VGG5 --dataset DIGITS --optimizer Adam --learning_rate 1e-3 --epochs 20 --lr_interval 0.8

# 2. Copy its weights into spiking layers, balance their thresholds, and fine-tune with STDB over 12 time steps.
python snn.py --pretrained_ann trained_models/ann/ann_vgg5_digits.pth --timesteps 12 --scaling_factor auto \
              --calibration_timesteps 100 --epochs 3

# 3. For 4 time steps: train a QCFS ANN, whose activations have few levels like a spiking neuron's rate. Convert it
#    without balancing, and fine-tune with the surrogate Linear, which also reaches neurons before their first spike.
python ann.py --architecture VGG5 --dataset DIGITS --activation QCFS --batch_norm --optimizer Adam --learning_rate 1e-3 \
              --epochs 8 --lr_schedule cosine --name ann_vgg5_digits_qcfs
python snn.py --pretrained_ann trained_models/ann/ann_vgg5_digits_qcfs.pth --timesteps 4 --activation Linear --epochs 1
