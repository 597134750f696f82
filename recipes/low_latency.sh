#!/usr/bin/env bash
# VGG5 on CIFAR-10 at T of 8, 4, 2 and 1: an ANN of QCFS, converted and fine-tuned with Linear.
#
#     bash recipes/low_latency.sh
#     DATA='--dataset FOLDER --data_dir ~/Datasets/cifar10_jpeg' SEEDS=0 bash recipes/low_latency.sh
#
# Stopped, it goes on where it was. On two cores with bfloat16 an epoch of the ANN took 90 s, the fine-tuning of all four
# 16 minutes: about an hour and a half a seed. SEEDS: of the ANN and what comes of it, one run after another ('0 1').
# EXTRA: flags for all runs, as --train_samples 5000. Leave --amp out (AMP=) on a processor without bfloat16.
set -euo pipefail
cd "$(dirname "$0")/.."
eval "data=(${DATA:---dataset CIFAR10})"  # so that ~ is one's home
read -ra seeds <<< "${SEEDS:-0 1}"
read -ra extra <<< "${AMP---amp} ${EXTRA:-}"
common=(--architecture VGG5 "${data[@]}" --validation_fraction 0.04 --dropout 0 --optimizer Adam --lr_schedule cosine
        --batch_size 128 --resume auto)
began=$(date +%s)
logs=()

for seed in "${seeds[@]}"; do
    ann=qcfs_adam_seed$seed
    python ann.py "${common[@]}" --activation QCFS --batch_norm --learning_rate 1e-3 --weight_decay 1e-4 --epochs 40 \
                  --seed "$seed" --name "$ann" "${extra[@]}"
    for run in '8 1 5e-5 --train_samples 6400' '4 1 1e-4' '2 2 1e-4' '1 4 3e-4'; do
        read -r steps epochs rate more <<< "$run"
        python snn.py "${common[@]}" --pretrained_ann "trained_models/ann/$ann.pth" --timesteps "$steps" \
                      --activation Linear --learning_rate "$rate" --weight_decay 1e-4 --epochs "$epochs" --seed "$seed" \
                      --name "low_latency_${steps}_seed$seed" $more "${extra[@]}"
        logs+=("logs/snn/low_latency_${steps}_seed$seed.jsonl")
    done
done
python snn_script.py --summarize "${logs[@]}"
echo "$(($(date +%s) - began)) s"
