#!/usr/bin/env bash
# From a fresh clone to a tuned solver, on the shapes world, with nothing but Python, git and the package registry:
#   bash quickstart.sh [--override ppo.steps=20 ...]     options are those of training/ppo/launch.py
# Makes .venv, tunes a distilled and an untrained table by reinforcement learning, exports the results, replays one, and
# measures them on held-out prompts beside the tables that they started from and DDIM at its better guidance.
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/make_environment.sh
make_environment ""

runs=()
for start in 1 0; do
    echo "== 1/4  tuning table 0000$start: the model stays frozen, the reward moves a table of a few numbers"
    name="quickstart-from-$start"
    python -m training.ppo.launch --config training/ppo/cfgs/shapes.yaml --run-name "$name" \
        --override "data.predictor_snapshot=$start" "$@"
    run="$(ls -d exps/*-"$name" | sort | tail -n 1)"
    runs+=("$run")

    echo "== 2/4  exporting the best checkpoint"
    python -m training.ppo.export_epd_predictor "$run" --best
done

echo "== 3/4  replaying the last: one PNG for each prompt and seed"
python sample.py --predictor_path "$run" --seeds 0-3 --grid --outdir "$run/samples/replay" \
    --prompt "a large striped red star on a white background" \
    --prompt "a small blue ring left of a large shaded green heart on a gray background"

echo "== 4/4  measuring them on held-out prompts"
# Guidance 3 suits this small model, 7.5 is what the tables were made for: DDIM may have either.
python evaluate.py --model shapes --solvers epd,ddim --nfe 4 --schedules polynomial:4,polynomial:5 --guidances 3,7.5 \
    --predictor_path "${runs[1]}" --predictor_path "${runs[0]}" --predictor_path 0 --predictor_path 1 \
    --baseline classical --baseline epd-00000 --baseline epd-00001 \
    --reference-steps 50 --number 64 --outdir "$run/evaluation"

echo
echo "The runs' pages:       ${runs[0]}/report.html ${runs[1]}/report.html"
echo "Replayed images:       $run/samples/replay/grid.png"
echo "Beside other solvers:  $run/evaluation/index.html"
