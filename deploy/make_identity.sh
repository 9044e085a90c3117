#!/bin/sh
# Makes the identity keys under DIR/keys, once, and gives each service a folder with what it needs: its own
# private key and everybody's public ones. Safe to repeat. Usage: make_identity.sh DIR
set -eu
umask 077
root=$1
python -m svc_kit.identity "$root/keys"

# give SERVICE KIND...: the kinds of callers that the service vouches for
give() {
    folder="$root/$1"
    shift
    mkdir -p "$folder"
    cp "$root"/keys/*.pub "$folder"
    for kind in "$@"; do
        cp "$root/keys/$kind.key" "$folder"
    done
}

give dataset_svc dataset_svc
give job_svc job_svc
give trainer_svc trainer
give inference_svc inference_svc
# The auth check vouches for accounts, and calls job_svc in its own name.
give authz account authz
