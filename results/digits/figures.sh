#!/bin/sh
# Figures 1 and 2 of the paper in small, on the digits as they are (8×8): figures.sh OUT [SEED …]
# Trains and evaluates what is not in OUT yet, then draws. Square needs the extra `eval`.
set -eu
out=$1 && shift
seeds=${*:-0}
train() { # NAME OPTIONS: train, then PGD-20 on all test images
    name=$1 && shift
    [ -f "$out/pgd/$name.json" ] && return
    [ -f "$out/$name/last.safetensors" ] && set -- "$@" --resume
    edge-bcs train --data digits --model resnet18 --width 0.25 --input-size 8 --channels 1 --batch-size 64 \
        --no-augment --epochs 40 --engine sparse --threads 1 -o "$out/$name" "$@"
    edge-bcs evaluate "$out/$name" --data digits --attack-steps 20 --threads 1 --json "$out/pgd/$name.json"
}

mkdir -p "$out/pgd" "$out/square"
for seed in $seeds; do
    for sparsity in 0.99 0.9 0.97; do
        at="$sparsity-$seed"
        train "bcs-$at" --sparsity $sparsity --seed $seed
        train "fixed-$at" --method fixed --counts-from "$out/bcs-$at" --seed $seed
        train "random-$at" --method random --sparsity $sparsity --seed $seed
    done
done
for name in bcs fixed random; do
    for seed in $seeds; do
        report="$out/square/$name-$seed.json"
        [ -f "$report" ] || edge-bcs evaluate "$out/$name-0.99-$seed" --data digits --epsilon 24/255 --threads 1 \
            --attack square --queries 50 --queries 100 --queries 200 --queries 500 --queries 1000 \
            --resume "$report.counts" --json "$report"
    done
done
edge-bcs plot "$out"/pgd/*.json "$out"/square/*.json -o "$out/plots"
first=${seeds%% *}
edge-bcs plot "$out/bcs-0.99-$first" "$out/fixed-0.99-$first" "$out/random-0.99-$first" -o "$out/plots"
