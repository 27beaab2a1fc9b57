#!/usr/bin/env bash
# Publishes an adapter and fetches its prefix. Needs curl 7.76 or later, bash and the usual tools.
#
#     export PREFIX_URL=http://127.0.0.1:8080 PREFIX_API_KEY=pfx_…
#     bash prefix.sh acme/capitals@prod               # fetches what the reference names
#     bash prefix.sh acme/capitals folder             # first publishes the folder that PEFT's save_pretrained wrote
#     bash prefix.sh acme/capitals folder --http2     # further arguments are options of curl
#
# Prints each tensor's name, dtype, shape, first element and the SHA-256 of its bytes, as JSON. On an error it prints
# the service's reason on standard error and ends with status 1.
set -euo pipefail

url=${PREFIX_URL:-http://127.0.0.1:8080}
adapter=/v1/tenants/${1%%/*}/adapters/${1#*/}
folder=${2:-}
options=("${@:3}")
work=$(mktemp --directory)
trap 'rm -r "$work"' EXIT

# send PATH OPTIONS…: the answer's body goes to $work/body, its header to $work/header. The key comes from a file
# descriptor, since everyone on this machine can read the arguments of a process.
send() {
    curl --silent --show-error --fail-with-body --output "$work/body" --dump-header "$work/header" \
        --header @<(printf 'Authorization: Bearer %s' "${PREFIX_API_KEY:-}") \
        "${options[@]}" "${@:2}" "$url$1" 2>"$work/error" || fail
}

# Prints the `detail` of a problem document (RFC 9457), or what curl says of the connection.
fail() {
    local detail
    detail=$(sed -n '/"detail": "/{s/.*"detail": "\(.*\)", "code": .*/\1/; s/\\"/"/g; p}' "$work/body" 2>/dev/null || true)
    printf '%b\n' "${detail:-$(cat "$work/error")}" >&2 # %b knows JSON's other escapes
    exit 1
}

# Prints the tensors of the safetensors file in $work/body: eight bytes of header length, a JSON header, then the bytes.
# The service writes the header without blanks, with these keys in this order; jq reads it too.
describe() {
    local length entry name dtype shape start stop separator=''
    length=$(od --address-radix=n --format=u8 --read-bytes=8 "$work/body")
    printf '['
    while read -r name dtype shape start stop; do
        piece $((8 + length + start)) $((stop - start)) >"$work/tensor"
        printf '%s{"name": "%s", "dtype": "%s", "shape": [%s], "first": %s, "sha256": "%s"}' "$separator" \
            "$name" "$dtype" "$shape" "$(first "$dtype")" "$(sha256sum <"$work/tensor" | cut --characters=1-64)"
        separator=', '
    done < <(piece 8 "$length" | grep --only-matching --extended-regexp \
        '"[^"]+":\{"dtype":"[A-Z0-9_]+","shape":\[[0-9,]*\],"data_offsets":\[[0-9]+,[0-9]+\]\}' |
        sed --regexp-extended 's/"(.+)":\{"dtype":"(.+)","shape":\[(.*)\],"data_offsets":\[(.+),(.+)\]\}/\1 \2 \3 \4 \5/')
    printf ']'
}

# piece OFFSET COUNT: bytes of $work/body.
piece() {
    dd if="$work/body" iflag=skip_bytes,count_bytes skip="$1" count="$2" status=none
}

first() {
    case $1 in
        F32) od --address-radix=n --format=f4 --read-bytes=4 "$work/tensor" ;;
        I64) od --address-radix=n --format=d8 --read-bytes=8 "$work/tensor" ;;
        *) echo null ;; # od has no half precision: ask for dtype=float32
    esac
}

if [ -n "$folder" ]; then
    send "$adapter/versions" \
        --form "adapter_config.json=@$folder/adapter_config.json" \
        --form "adapter_model.safetensors=@$folder/adapter_model.safetensors" # in this order
    adapter=$(sed -n 's/^location: *\([^\r]*\)\r*$/\1/Ip' "$work/header")
fi
send "$adapter/prefix?batch_size=2"
rows=$(describe)
# Not --json: with it curl accepts nothing but JSON, and the answer is a safetensors file.
send "$adapter/prefix" --header 'Content-Type: application/json' --data '{"attention_mask": [[0, 1, 1], [1, 1, 1]]}'
printf '{"adapter": "%s", "rows": %s, "masked": %s}\n' "$adapter" "$rows" "$(describe)"
