#!/bin/sh
# Serves the champion of a registry, asks it a question in each of eight languages, and stops.
#   serve_app/try.sh [REGISTRY] [PORT]     (runs/registry, 8000)
set -eu
registry=${1:-runs/registry}
port=${2:-8000}
python=${PYTHON:-python}
url=http://127.0.0.1:$port

if curl --silent --output /dev/null "$url/healthz"; then
  echo "$url is taken by another server; stop it, or name another port" >&2
  exit 1
fi
log=$(mktemp -t mlray-serve.XXXXXX)

"$python" -m serve_app "release.registry_uri=$registry" "serving.port=$port" > "$log" 2>&1 &
app=$!
trap 'kill $app 2>/dev/null; wait $app || true' EXIT
trap 'exit 130' INT TERM
until curl --silent --fail --output /dev/null "$url/readyz"; do
  kill -0 $app 2>/dev/null || { tail -n 3 "$log" >&2; exit 1; }
  waited=$((${waited:-0} + 1))
  [ $waited -lt 180 ] || { echo "no answer from $url/readyz: $(tail -n 3 "$log")" >&2; exit 1; }
  sleep 1
done
echo "serves      $url (log: $log)"

ask() {
  printf '%s  %s\n' "$1" "$2"
  curl --silent --fail --show-error "$url/v1/search" --header 'content-type: application/json' \
    --data "{\"query\": \"$2\", \"market\": \"$1\", \"k\": 1}" |
    "$python" -c 'import json, sys; told = json.load(sys.stdin); hit, by = told["results"][0], told["served_by"]
print("    {title}  ({score:.2f}; understood as {language}, {known_by})".format(**hit, **by))'
}

ask en "kettle with temperature control"
ask de "Wasserkocher mit Temperaturwahl"
ask fr "bouilloire à température réglable"
ask es "hervidor con control de temperatura"
ask ru "чайник с регулировкой температуры"
ask ar "غلاية كهربائية بدرجة حرارة قابلة للضبط"
ask ja "温度調節できる電気ケトル"
ask zh "可调温电热水壶"

curl --silent --fail --show-error "$url/v1/recommend" --header 'content-type: application/json' \
  --data '{"market": "fr", "products": ["p021", "p022"], "k": 1}' |
  "$python" -c 'import json, sys; told = json.load(sys.stdin)
print("fr  after p021 and p022\n    {}  (by {})".format(told["results"][0]["title"], told["results"][0]["by"]))'

curl --silent --fail --show-error "$url/v1/support" --header 'content-type: application/json' \
  --data '{"messages": [{"text": "Wo bleibt meine Bestellung?"}]}' |
  "$python" -c 'import json, sys; told = json.load(sys.stdin)
print("de  Wo bleibt meine Bestellung?\n    {}  ({:.2f})".format(told["answer"] or "a person takes over", told["confidence"]))'

if [ -t 0 ]; then
  echo "page        $url (Ctrl-C stops it)"
  trap 'kill $app 2>/dev/null || true' INT TERM
  wait $app || true  # until the signal
else
  kill $app
fi
wait $app  # a server that does not end well fails this script
trap - EXIT
echo "stopped     make serve starts it again; its page is $url"
