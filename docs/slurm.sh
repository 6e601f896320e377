#!/usr/bin/env bash
# A run on two nodes of four GPUs each: sbatch docs/slurm.sh --config training/ppo/cfgs/sd15_base.yaml
# To go on after the time limit: sbatch docs/slurm.sh --resume exps/<timestamp>-sd15_base
# One machine without SLURM needs none of this: python -m training.ppo.launch --override run.num_devices=4
#SBATCH --job-name=rlepd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4     # one process a GPU: run.num_devices
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300       # five minutes before the limit the step is finished and a checkpoint saved
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
source .venv/bin/activate
# The prompts of a step are split among all processes: ppo.rollout_batch_size is what all of them make together.
srun --kill-on-bad-exit=1 python -m training.ppo.launch "$@" \
  --override run.num_devices="$SLURM_NTASKS_PER_NODE" run.num_nodes="$SLURM_NNODES"
