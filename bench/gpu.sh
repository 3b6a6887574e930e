#!/usr/bin/env bash
# Measures on one GPU, in eight minutes, what docs/performance.md has for CPUs. Each row has a time limit; one
# that is not reached in time is missing, the others stand. Writes a text file for each into $OUT:
#
#     OUT=runs/gpu bash bench/gpu.sh
#     OUT=runs/try SIZE=small DEVICE=cpu LIMIT=5 bash bench/gpu.sh    # whether it runs; a CPU has no graphs
#
# LIMIT: times the time limits.
set -u
export OMP_NUM_THREADS=1
export TORCHINDUCTOR_CACHE_DIR=$(mktemp -d)  # one that nobody has left half-written
trap 'rm -rf "$TORCHINDUCTOR_CACHE_DIR"' EXIT
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu} SIZE=${SIZE:-sd15} DEVICE=${DEVICE:-cuda} LIMIT=${LIMIT:-1}
if [ "$SIZE" = small ]; then PIXELS=64 BATCHES="1 2" BATCH=2 STEPS=2 REPEATS=1; else
    PIXELS=512 BATCHES="1 2 8" BATCH=8 STEPS=20 REPEATS=5; fi
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

row() {  # name, seconds at most, benchmark, its flags
    local name=$1 limit=$(($2 * LIMIT)) module=$3 started=$SECONDS
    shift 3
    timeout "$limit" python -m "bench.$module" --output "$OUT/$name" "$@" > "$OUT/$name.txt" 2>&1
    echo "$name: exit $?, $((SECONDS - started)) of $limit seconds" | tee -a "$OUT/rows.txt"
}
common=(--size "$SIZE" --device "$DEVICE")

# Calls: base against diffusers, dense and sparse MoA against the base, people.
row calls_bf16 55 unet "${common[@]}" --dtype bf16 --questions base moa --pixels $PIXELS --batches $BATCHES \
    --thresholds 0.1 --repeats $REPEATS
row calls_fp16 55 unet "${common[@]}" --dtype fp16 --questions base moa --pixels $PIXELS --batches $BATCHES \
    --thresholds 0.1 --repeats $REPEATS
# Whole pictures.
row pictures 50 sampling "${common[@]}" --dtype bf16 --pixels $PIXELS --steps $STEPS --thresholds 0.1 --repeats 2
# Training: seconds and peak memory of a step at SD1.5's size, and the small world's as a CUDA graph.
row training 95 training "${common[@]}" --batch-size $BATCH --steps 4 --rows "with a cache" \
    "with a cache, no checkpointing" "the preset" FastComposer
row graph 25 graph --batch-sizes 36 256 --samples 512
# Peak memory of a picture.
row memory 40 sampling "${common[@]}" --dtype bf16 --pixels $PIXELS --steps 2 --memory
# Compiled calls, last: compiling is what takes long.
for variant in compiled reduce-overhead; do
    row $variant 80 unet "${common[@]}" --dtype bf16 --questions base --pixels $PIXELS --variants $variant \
        --repeats $REPEATS
done
grep -h "^|" "$OUT"/*.txt > "$OUT/tables.md"
