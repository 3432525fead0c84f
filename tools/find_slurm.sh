#!/usr/bin/env bash
# Succeeds where the commands are that a test needs to run a Slurm of its own; else says on standard
# error what to install. Daemons may lie in /usr/sbin, which is not on everybody's PATH.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
if ! type -P slurmctld slurmd sbatch munged >/dev/null; then
    echo "Slurm is missing: apt-get install --no-install-recommends" \
        "slurmctld slurmd slurm-client munge" >&2
    exit 1
fi
