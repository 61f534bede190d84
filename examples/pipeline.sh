#!/usr/bin/env bash
# The whole job as a shell pipeline. Run it in a workspace (a folder with a retex.toml) that has a task called cars and
# no artefacts yet:
#
#     cd my-workspace && bash pipeline.sh [GATE]
#
# GATE is the mean accuracy under protocol K, in percent of the experts' own, that is good enough (default 99).
# Exit status: 0 good enough, 3 worse than the gate, anything else broken.
set -euo pipefail
gate=${1:-99}

value() { # one value of a JSON object on standard input: value KEY [KEY...]
    python3 -c 'import functools, json, sys; print(functools.reduce(lambda o, k: o[k], sys.argv[1:], json.load(sys.stdin)))' "$@"
}

# Every command reads retex.toml and needs no further flags.
retex merge --method ties
retex fit-offsets --json > fit-offsets.json
retex build-signatures --quiet
retex recover --task cars -o cars.safetensors

# Programs read --json: exactly one object on standard output, whatever happens.
echo "cars costs $(value tasks cars offset_bytes < fit-offsets.json) bytes"
echo "made by $(retex inspect cars.safetensors --json | value recipe command)"

# Weights stream through standard output into anything: a checksum here; zstd, ssh or an upload work the same way.
retex recover --task cars -o - | sha256sum | cut -c 1-64 > cars.sha256

# The exit status tells "worse" from "broken".
status=0
retex eval --fail-under "$gate" --json > eval.json || status=$?
case $status in
    0) echo "recovered: $(value mean normalised K < eval.json) of the experts' accuracy" ;;
    3) echo "not good enough: $(value error < eval.json)" >&2 ;;
    *) echo "broken: $(value error < eval.json)" >&2 ;;
esac
exit "$status"
