#!/usr/bin/env bash
# VGG5 (or ARCHITECTURE) on CIFAR-10 at T of 8, 4, 2 and 1: a QCFS ANN, converted and fine-tuned with Linear. For T of 2
# and 1, the ANN is first trained further with four levels. ARCHITECTURE may be your own network, FILE.py:NAME, with the
# path relative to the project's folder.
#
#     bash recipes/low_latency.sh
#     ARCHITECTURE=VGG9 EPOCHS=46 bash recipes/low_latency.sh
#     DATA='--dataset FOLDER --data_dir ~/Datasets/cifar10_jpeg' SEEDS=1 bash recipes/low_latency.sh
#
# If it was stopped, start it again: it resumes. Time on two cores with bfloat16, and on an H200 (a GPU, which ran two
# seeds and another training at once):
#                                two cores    H200
#     an epoch of the ANN           62 s       3 s
#     fine-tuning, T = 4, 2, 1     213, 128, 88 s an epoch; on the H200 6 s at T = 4
#     a seed                     2 h 45 min    (its ANN, T = 8 and 4: 7 min)
# With VGG9 an epoch of the ANN took 110 s, T = 8 and 4 ten minutes.
# EPOCHS: of the ANN; default 100. With EPOCHS=46 a seed takes 1 h 50 min and gets a point less at T of 8 and 4.
# FURTHER: epochs of the ANN's training with four levels; default 46. SEEDS: of the ANN and its SNNs, run one after
# another; default '0 1'. EXTRA: flags for all runs, such as --train_samples 5000. EPOCHS, FURTHER and EXTRA are part of
# the names, if given; DATA and AMP are not: for others move trained_models and logs away first. AMP= leaves --amp out,
# for a processor without bfloat16.
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")/.."  # also through a link
eval "data=(${DATA:---dataset CIFAR10})"  # so that ~ is the home folder
read -ra seeds <<< "${SEEDS:-0 1}"
read -ra extra <<< "${AMP---amp} ${EXTRA:-}"
architecture=${ARCHITECTURE:-VGG5}
network=$(sed 's|.*/||; s|\.py:|_|' <<< "$architecture" | tr 'A-Z ' 'a-z_')${EPOCHS:+_$EPOCHS}  # in names
if [ -n "${EXTRA:-}" ]; then network+=_$(tr -cs 'a-zA-Z0-9.\n' _ <<< "${EXTRA#--}"); fi
common=(--architecture "$architecture" "${data[@]}" --validation_fraction 0.04 --optimizer Adam --lr_schedule cosine
        --resume auto)
began=$(date +%s)
logs=()

train_ann() {
    python ann.py "${common[@]}" --activation QCFS --batch_norm --weight_decay 2e-4 --dropout 0.2 --cutout 12 \
                  --label_smoothing 0.1 --batch_size 256 --seed "$seed" "$@" ${extra[@]+"${extra[@]}"}
}

for seed in "${seeds[@]}"; do
    eight=${network}_qcfs_seed$seed
    four=${network}_qcfs_four_levels${FURTHER:+_$FURTHER}_seed$seed
    train_ann --learning_rate 1.5e-3 --epochs "${EPOCHS:-100}" --name "$eight"
    train_ann --learning_rate 1e-3 --epochs "${FURTHER:-46}" --name "$four" --levels 4 \
              --pretrained_ann "trained_models/ann/$eight.pth"
    for run in "8 1 5e-5 $eight --train_samples 6400" "4 1 1e-4 $eight" "2 1 1e-4 $four" "1 3 1e-4 $four"; do
        read -r steps epochs rate ann more <<< "$run"
        snn=${network}_low_latency_${steps}
        if [ "$ann" = "$four" ]; then snn+=${FURTHER:+_$FURTHER}; fi
        snn+=_seed$seed
        python snn.py "${common[@]}" --pretrained_ann "trained_models/ann/$ann.pth" --timesteps "$steps" \
                      --activation Linear --learning_rate "$rate" --weight_decay 1e-4 --dropout 0 --batch_size 128 \
                      --epochs "$epochs" --seed "$seed" --name "$snn" $more ${extra[@]+"${extra[@]}"}
        logs+=("logs/snn/$snn.jsonl")
    done
done
python snn_script.py --summarize "${logs[@]}"
echo "$(($(date +%s) - began)) s"
