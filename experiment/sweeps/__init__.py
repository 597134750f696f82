"""The scripts that run many: script.sh, plain or as an array of Slurm jobs."""
