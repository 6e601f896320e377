#!/usr/bin/env bash
# From a fresh clone to a tuned solver, on the shapes world, with nothing but Python, git and the package registry:
#   bash quickstart.sh [--override ppo.steps=20 ...]     options are those of training/ppo/launch.py
# Makes .venv, tunes a solver of four network evaluations along a reward's gradient, exports the result, replays it, and
# measures it on held-out prompts beside its start and the classical solvers, each at its best schedule and guidance.
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ " $* " == *" --help "* ]]; then
    sed -n '2,5s/^# //p' quickstart.sh
    exit
fi
source scripts/make_environment.sh
make_environment ""

echo "== 1/4  tuning solver 00000: the model stays frozen, the reward moves noise levels, guidance and history"
python -m training.ppo.launch --config training/ppo/cfgs/shapes.yaml --run-name quickstart \
    --override search.method=reward_gradient ppo.steps=20 "$@"
[[ " $* " == *" --dry-run "* ]] && exit
run="$(ls -d exps/*-quickstart | sort | tail -n 1)"

echo "== 2/4  exporting the best checkpoint"
python -m training.ppo.export_epd_predictor "$run" --best

echo "== 3/4  replaying it: one PNG for each prompt and seed"
python sample.py --predictor_path "$run" --seeds 0-3 --grid --outdir "$run/samples/replay" \
    --prompt "a large striped red star on a white background" \
    --prompt "four small yellow moons and a large green heart on a striped navy background"

echo "== 4/4  measuring it on held-out prompts"
python evaluate.py --model shapes --solvers epd,ddim,dpmpp:2 --nfe 4 --schedules polynomial:4,discrete,discrete@7 \
    --guidances 1.5,2,3 --validation-number 24 --reference-steps 20 --number 64 \
    --predictor_path 0 --predictor_path "$run" --baseline epd-00000 --outdir "$run/evaluation"

echo
echo "The run's page:        $run/report.html"
echo "Replayed images:       $run/samples/replay/grid.png"
echo "Beside other solvers:  $run/evaluation/index.html"
