#!/bin/sh
# The whole line on the sample corpus: pre-train, search adapters and losses, learn from sessions, choose, index, promote.
# Minutes on two cores.
#   jobs/pipeline.sh [FOLDER [REGISTRY]]     where runs and bundles are kept (runs, FOLDER/registry)
#                                          where none of them is yet: another time name another folder
set -eu
here=$(dirname "$0")
folder=${1:-runs}
python=${PYTHON:-python}
registry="release.registry_uri=${2:-$folder/registry}"

# One cluster for all jobs: otherwise each starts, and stops, its own. It ends with this shell, however that ends.
if [ -z "${RAY_ADDRESS:-}" ]; then
  address=$(mktemp -t mlray-ray.XXXXXX)
  trap 'rm -f "$address"' EXIT
  "$python" -c 'import os, ray, sys, time
shell = int(sys.argv[1])
print(ray.init(logging_level="warning").address_info["gcs_address"], flush=True)
while os.getppid() == shell:
    time.sleep(1)' $$ > "$address" &
  until [ -s "$address" ]; do kill -0 $!; sleep 0.2; done
  RAY_ADDRESS=$(cat "$address")
  export RAY_ADDRESS
fi

"$python" "$here/pretrain.py" --config "$here/configs/pretrain_sample.yaml" "run.storage_uri=$folder"
weights=$("$python" -c 'import json, sys; print(json.load(open(sys.argv[1]))["weights"])' "$folder/demo/report.json")
"$python" "$here/sweep.py" --config "$here/configs/sweep_sample.yaml" "run.storage_uri=$folder" "model.path=$weights"
"$python" "$here/embed.py" --model "$weights" --input mlray/corpus/sample/products.jsonl --text title description \
  --id product_id --output "$folder/products.parquet"
"$python" "$here/finetune.py" --config "$here/configs/recommend_sample.yaml" "run.storage_uri=$folder" \
  "recommendation.vectors=$folder/products.parquet"
"$python" "$here/promote.py" --to challenger --run "$folder/sweep-sample" --recommender "$folder/recommend-sample" \
  --why "winner of the sweep" "$registry"
"$python" "$here/index.py" --input mlray/corpus/sample/products.jsonl --text title description --id product_id "$registry"
"$python" "$here/index.py" --knowledge --input mlray/corpus/sample/support.jsonl --text phrasings --shown answer --id intent \
  "$registry"
"$python" "$here/promote.py" --to champion --index auto --knowledge auto --why "the first" "$registry"
