#!/bin/sh
# train_or_resume.sh CHECKPOINTS COMMAND...: the command, with --resume once there is a checkpoint. A launcher that
# restarts a job starts it with the arguments of the first time.
checkpoints=$1
shift
if [ -e "$checkpoints/latest" ]; then set -- "$@" --resume; fi
exec "$@"
