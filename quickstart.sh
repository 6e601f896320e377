#!/usr/bin/env bash
# From a fresh clone to a tuned solver, on the shapes world, with nothing but Python, git and the package registry:
#   bash quickstart.sh [--override ppo.steps=20 ...]     options are those of training/ppo/launch.py
# Makes .venv, tunes a distilled table by reinforcement learning, exports it, replays it, and measures it on held-out
# prompts beside the table that it started from and the classical solvers.
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/make_environment.sh
make_environment ""

name="quickstart"
echo "== 1/4  tuning: the model stays frozen, the reward moves a table of a few numbers"
python -m training.ppo.launch --config training/ppo/cfgs/shapes.yaml --run-name "$name" "$@"
run="$(ls -d exps/*-"$name" | sort | tail -n 1)"

echo "== 2/4  exporting the best checkpoint"
python -m training.ppo.export_epd_predictor "$run" --best

echo "== 3/4  replaying it: one PNG for each prompt and seed"
python sample.py --predictor_path "$run" --seeds 0-3 --grid --outdir "$run/samples/replay" \
    --prompt "a large striped red star on a white background" \
    --prompt "a small blue ring left of a large shaded green heart on a gray background"

echo "== 4/4  measuring it on held-out prompts"
python evaluate.py --model shapes --solvers epd,ddim --nfe 4 --schedules polynomial:3,polynomial:5 \
    --predictor_path 1 --predictor_path "$run" --baseline epd-00001 --number 64 --outdir "$run/evaluation"

echo
echo "The run's page:        $run/report.html"
echo "Its images:            $run/samples/replay/grid.png"
echo "Beside other solvers:  $run/evaluation/report.md"
