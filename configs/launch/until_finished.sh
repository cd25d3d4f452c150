#!/bin/sh
# The restart loop of one host:  until_finished.sh WORKDIR COMMAND...
#
# headway-train exits with 0 when it has finished (then WORKDIR/finished is there) or has saved at a signal, with 2 for a
# wrong config or data; anything else is a crash or a lost host, and the same command continues at the last checkpoint.
# This script exits with 0 when the run has finished, 2 do not retry, 75 saved: start me again, or me elsewhere.
# SIGTERM to this script alone (kill, docker stop, Kubernetes) is handed on; a second one would end the run at once.
workdir=$1
shift
asked= told= child=
tell() { # once, and only when there is somebody to tell
    if [ -n "$asked" ] && [ -z "$told" ] && [ -n "$child" ]; then told=1; kill -TERM "$child" 2> /dev/null; fi
}
trap 'asked=1; tell' TERM
trap : INT # Ctrl-C reaches the command by itself
while :; do
    "$@" &
    child=$!
    tell
    wait "$child"
    code=$?
    while kill -0 "$child" 2> /dev/null; do # a signal interrupts `wait`
        wait "$child"
        code=$?
    done
    case $code in
        0) if [ -e "$workdir/finished" ]; then exit 0; else exit 75; fi ;;
        2 | 130) exit "$code" ;;
    esac
    [ -z "$asked" ] || exit "$code"
    echo "until_finished.sh: exit code $code; the same command again" >&2
    sleep "${HEADWAY_RETRY_SECONDS:-10}"
done
