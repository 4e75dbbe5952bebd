#!/usr/bin/env bash
# What a release job does with a checkpoint: compress, export, refuse to ship what is slower than float, keep the evidence.
# Usage: deployment_pipeline.sh CHECKPOINT FILE.py:FACTORY CALIBRATION EVALUATION OUT
set -euo pipefail
[ $# -eq 5 ] || { sed -n 2,3p "$0" >&2; exit 2; }
checkpoint=$1 model=$2 calibration=$3 evaluation=$4 out=$5

edgekit compress "$checkpoint" --model "$model" --calibration "$calibration" --evaluate "$evaluation" -o "$out"
edgekit export "$out" --target x86-onnxruntime --target x86-openvino --json > "$out/exports.json"
edgekit benchmark "$out" --fail-on-slower --json > "$out/latency.json"
echo "shipped: $(ls -d "$out"/x86-*/)"
