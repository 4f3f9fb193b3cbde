#!/usr/bin/env bash
# Cut the real, published images in DATA into the site folders of hospitals.yaml:
#     bash deploy/studies/hospitals.sh DATA OUT
# OUT gets one folder per hospital, and OUT/public with what the lab may train on without privacy.
set -euo pipefail
data=${1:?usage: bash deploy/studies/hospitals.sh DATA OUT}
out=${2:?usage: bash deploy/studies/hospitals.sh DATA OUT}

cut() {
    consilium-lab sites make --out "$out" "$@"
}
cut "$data/pneumonia_cxr.npz" --by dataset --name guangzhou --test-fraction 0.3
cut "$data/tb_cxr.npz" --by site --only Shenzhen_No3_Hospital_CN --name shenzhen --test-fraction 0.3
cut "$data/tb_cxr.npz" --by site --only Montgomery_County_TB_Program_US --name montgomery --test-fraction 0
cut "$data/nih_cxr_normal_abnormal.npz" --by dataset --name nih --test-fraction 0.3
cut "$data/malaria_cells.npz" --by dataset --name chittagong --test-fraction 0.3 --orientation free
cut "$data/bccd_blood_cells.npz" --by dataset --name blood --test-fraction 0.3 --public-fraction 0.3 --orientation free
cut "$data/brain_tumor_mri.npz" --by dataset --name brain --test-fraction 0.3 --public-fraction 0.3
cut "$data/mednist_modality.npz" --by dataset --name modalities --test-fraction 0 --public-fraction 1
cut "$data/lc25000_lung_histology.npz" --by dataset --name histology --test-fraction 0 --public-fraction 1 --orientation free
