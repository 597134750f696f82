#!/usr/bin/env bash
# The networks in pretrained/: train, convert and fine-tune them, and write them there.
#
#     bash recipes/pretrained.sh digits             # two minutes on two cores
#     bash recipes/pretrained.sh quick              # CIFAR-10, T = 4: 42 minutes
#     bash recipes/pretrained.sh quick longer two_steps one_step  # the better ones at T = 4, 2 and 1: two hours more
#     EXTRA=--amp bash recipes/pretrained.sh max_pools one_level strided  # others, no file: on two cores with bfloat16
#     DATA='--dataset FOLDER --data_dir ~/Datasets/cifar10_jpeg' bash recipes/pretrained.sh quick
#
# If it was stopped, start it again: it resumes. Into another folder: PRETRAINED=DIR. EXTRA: flags for all runs, such as
# EXTRA=--amp on a processor with bfloat16. What ran to its end with other flags is not run again: move trained_models
# away first.
set -euo pipefail
cd "$(dirname -- "$(readlink -f -- "$0" 2>/dev/null || echo "$0")")/.."  # also through a link
eval "data=(${DATA:---dataset CIFAR10})"  # so that ~ is the home folder
folder=${PRETRAINED:-pretrained}
mkdir -p "$folder"

train() {  # train ann.py|snn.py FLAGS
    python "$1" --lr_schedule cosine --label_smoothing 0.1 --seed 0 --resume auto "${@:2}" ${EXTRA:-}
}

digits() {
    local network=(--architecture examples/network.py:small --dataset DIGITS --validation_fraction 0.1 --batch_size 16
                   --optimizer Adam --weight_decay 0)
    train ann.py "${network[@]}" --activation QCFS --levels 4 --learning_rate 3e-3 --epochs 10 \
                 --name small_digits
    train snn.py "${network[@]}" --pretrained_ann trained_models/ann/small_digits.pth --timesteps 4 \
                 --activation Linear --gamma 1 --learning_rate 1e-3 --epochs 6 --name small_digits_4
    python recipes/slim.py trained_models/snn/small_digits_4.pth "$folder/small_digits_4.pth"
}

cifar10=(--architecture examples/network.py:quick "${data[@]}" --validation_fraction 0.04)
pooled=(--architecture examples/network.py:max_pools "${data[@]}" --validation_fraction 0.04)
sgd=(--activation QCFS --optimizer SGD --weight_decay 5e-4 --batch_size 64)
tuned=(--activation Linear --gamma 1 --optimizer Adam --weight_decay 0 --learning_rate 1e-4 --epochs 1)

quick() {  # T = 4 in 42 minutes: an ANN of four levels, and 6,400 images of fine-tuning
    train ann.py "${cifar10[@]}" "${sgd[@]}" --levels 4 --learning_rate 0.08 --epochs 12 \
                 --crop 2 --name quick_qcfs
    train snn.py "${cifar10[@]}" "${tuned[@]}" --gamma 0.3 --train_samples 6400 --crop 2 \
                 --timesteps 4 --name quick_4 --pretrained_ann trained_models/ann/quick_qcfs.pth
    python recipes/slim.py trained_models/snn/quick_4.pth "$folder/quick_cifar10_4.pth"
}

longer() {  # T = 4, better: that ANN trained further, and a whole epoch of fine-tuning
    train ann.py "${cifar10[@]}" "${sgd[@]}" --levels 4 --learning_rate 0.08 --epochs 18 \
                 --cutout 8 --pretrained_ann trained_models/ann/quick_qcfs.pth --name quick_longer
    train snn.py "${cifar10[@]}" "${tuned[@]}" --timesteps 4 --name quick_longer_4 \
                 --pretrained_ann trained_models/ann/quick_longer.pth
    python recipes/slim.py trained_models/snn/quick_longer_4.pth "$folder/quick_cifar10_4.pth"
}

two_steps() {  # T = 2, no file: the ANN of `longer` trained further with two levels
    train ann.py "${cifar10[@]}" "${sgd[@]}" --levels 2 --learning_rate 0.05 --epochs 6 \
                 --pretrained_ann trained_models/ann/quick_longer.pth --name quick_two_levels
    train snn.py "${cifar10[@]}" "${tuned[@]}" --timesteps 2 --name quick_longer_2 \
                 --pretrained_ann trained_models/ann/quick_two_levels.pth
}

one_step() {  # T = 1: that ANN trained further with one level
    train ann.py "${cifar10[@]}" "${sgd[@]}" --levels 1 --learning_rate 0.05 --epochs 7 \
                 --pretrained_ann trained_models/ann/quick_two_levels.pth --name quick_one_level
    train snn.py "${cifar10[@]}" "${tuned[@]}" --timesteps 1 --name quick_longer_1 \
                 --pretrained_ann trained_models/ann/quick_one_level.pth
    python recipes/slim.py trained_models/snn/quick_longer_1.pth "$folder/quick_cifar10_1.pth"
}

max_pools() {  # T = 4, 2, 1, no file: batch norm's statistics taken anew, without training, and two fine-tunings
    train ann.py "${pooled[@]}" "${sgd[@]}" --levels 4 --learning_rate 0.08 --epochs 22 \
                 --name max_pools_qcfs
    for run in '4_norms 1e-12 1 --train_samples 6400' '2_norms 1e-12 1 --train_samples 6400' \
               '1_norms 1e-12 1 --train_samples 6400' '4_whole_epoch 1e-4 1' '4_longer 3e-4 2'; do
        read -r name rate epochs more <<< "$run"
        train snn.py "${pooled[@]}" "${tuned[@]}" --timesteps "${name%%_*}" --name "max_pools_$name" \
                     --pretrained_ann trained_models/ann/max_pools_qcfs.pth --learning_rate "$rate" \
                     --epochs "$epochs" $more
    done
}

strided() {  # T = 4, no file: twelve epochs with ReLU, then QCFS
    local network=(--architecture examples/network.py:strided "${data[@]}" --validation_fraction 0.04)
    train ann.py "${network[@]}" "${sgd[@]}" --activation ReLU --lr_schedule step --lr_interval 1 --learning_rate 0.08 \
                 --epochs 12 --cutout 8 --name strided_relu
    train ann.py "${network[@]}" "${sgd[@]}" --levels 4 --learning_rate 0.06 --epochs 22 --cutout 8 \
                 --pretrained_ann trained_models/ann/strided_relu.pth --name strided_qcfs
    train snn.py "${network[@]}" "${tuned[@]}" --timesteps 4 --name strided_4 \
                 --pretrained_ann trained_models/ann/strided_qcfs.pth
}

one_level() {  # T = 1, no file: that ANN trained further with one level
    train ann.py "${pooled[@]}" "${sgd[@]}" --levels 1 --learning_rate 0.05 --epochs 14 \
                 --pretrained_ann trained_models/ann/max_pools_qcfs.pth --name max_pools_one_level
    train snn.py "${pooled[@]}" "${tuned[@]}" --timesteps 1 --name max_pools_1 \
                 --pretrained_ann trained_models/ann/max_pools_one_level.pth
}

for each in ${@:-digits quick longer two_steps one_step}; do
    case " digits quick longer two_steps one_step max_pools strided one_level " in
        *" $each "*) "$each" ;;
        *) echo "$each: there is no such network" >&2; exit 2 ;;
    esac
done
