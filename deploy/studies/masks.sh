#!/usr/bin/env bash
# Cut the real, published images in DATA that have masks into the site folders of masks.yaml:
#     bash deploy/studies/masks.sh DATA OUT
# OUT gets one folder per site, and OUT/public with what the lab may train on without privacy. Nuclei: a stain and an
# image size is in practice one laboratory's experiment.
set -euo pipefail
data=${1:?usage: bash deploy/studies/masks.sh DATA OUT}
out=${2:?usage: bash deploy/studies/masks.sh DATA OUT}

cut() {
    local file=$1 site=$2 name=$3
    shift 3
    consilium-lab sites make --out "$out" "$data/$file.npz" --by site --only "$site" --name "$name" --masked-only "$@"
}
cut retina_vessels_two_sites HRF_Erlangen_DE_Brno_CZ hrf --test-fraction 0.3 --orientation free
cut retina_vessels_two_sites CHASE_DB1_London_UK chase --test-fraction 0 --orientation free
cut nuclei_dsb2018 fluor_256x256 fluorescence --test-fraction 0.3 --orientation free
cut nuclei_dsb2018 fluor_360x360 confluent --test-fraction 0.3 --orientation free
cut nuclei_dsb2018 HE_purple_320x256 histology --test-fraction 0 --orientation free
cut nuclei_dsb2018 fluor_696x520 sparse --test-fraction 0 --public-fraction 1 --orientation free
cut tb_cxr Shenzhen_No3_Hospital_CN shenzhen --test-fraction 0.3
cut tb_cxr Montgomery_County_TB_Program_US montgomery --test-fraction 0
