#!/usr/bin/env bash
# Six phantom hospitals learn together and two others adapt the result: environment, warm start, federation, report.
# A second call goes on with an unfinished run, or shows where the finished one's report is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=deploy/environment.sh
source deploy/environment.sh
prepare_environment ""

plan=deploy/studies/demo.yaml
public=runs/demo-public
if [ ! -e "${plan%.yaml}.safetensors" ]; then # the lab's warm start: other phantoms, which nobody needs to protect
    rm -rf "$public"
    consilium-lab sites phantoms --out "$public" --name hazel --name oak --name pine --name rowan \
        --patients 150 --image-size 32
    consilium-lab pretrain "$plan" --sites "$public" --steps 300
fi
consilium-lab simulate "$plan" --out "$PWD/runs/demo" --resume --jobs 2
