#!/usr/bin/env bash
# The RL job with Stable Diffusion v1.5; all options are those of training/ppo/launch.py:
#   bash launch_rl.sh --dry-run
#   bash launch_rl.sh --config training/ppo/cfgs/shapes.yaml
#   bash launch_rl.sh --override run.num_devices=4 ppo.steps=200
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ -f .venv/bin/activate ]]; then
  source .venv/bin/activate
fi
exec python -m training.ppo.launch "$@"
