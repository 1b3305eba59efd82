#!/usr/bin/env bash
# Builds an image where there is no registry, and lets it answer a request; then removes everything it made.
#
#     scripts/try_image.sh          # as root on Debian, with buildah and debootstrap; about 6 GB of disk
#     scripts/try_image.sh cuda     # the image for NVIDIA GPUs, about 20 GB of disk; it answers on the CPU
#
# The base is debootstrap's Debian 12, from the mirror of this machine ($MIRROR), or a folder of an earlier run ($ROOTFS). The
# packages come from pip's index as it is set up here, or from a folder of an earlier run ($WHEELS), with the hashes of
# deploy/images/requirements-*.txt.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
MIRROR=${MIRROR:-$(grep -rhoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d 2> /dev/null | head -1 || true)}
PORT=${PORT:-30111}
KIND=${1:-cpu}
NAME=kvist:$KIND

[ "$(id -u)" = 0 ] || { echo 'try_image.sh: run it as root' >&2; exit 1; }
[ -f "deploy/images/$KIND.Dockerfile" ] || { echo "try_image.sh: no image is called $KIND: cpu or cuda" >&2; exit 1; }
for needed in buildah curl "$PYTHON"; do
	command -v "$needed" > /dev/null || { echo "try_image.sh: $needed is missing" >&2; exit 1; }
done
work=$(mktemp -d "${TMPDIR:-/var/tmp}/kvist-image-XXXXXX")
server=
bud() { buildah --root "$work/storage" --runroot "$work/run" "$@"; }
clean_up() {
	if [ -n "$server" ]; then kill -- "-$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; fi
	bud rm --all > /dev/null 2>&1 || true
	bud rmi --all --force > /dev/null 2>&1 || true
	umount "$work/storage/overlay" 2> /dev/null || true
	rm -rf "$work"
}
trap clean_up EXIT
seconds() { echo "$1: $((SECONDS - since)) s"; since=$SECONDS; }
since=$SECONDS

if [ -z "${ROOTFS:-}" ]; then
	ROOTFS=$work/rootfs
	needs=python3,python3-venv,ca-certificates
	if [ "$KIND" = cuda ]; then needs=$needs,python3-dev; fi
	debootstrap --variant=minbase --include="$needs" bookworm "$ROOTFS" "$MIRROR" > "$work/log"
fi
rm -rf "$ROOTFS"/var/cache/apt/archives/*.deb
base=$(bud from scratch)
bud add --quiet "$base" "$ROOTFS" / > /dev/null
bud commit --quiet --rm "$base" kvist-base > /dev/null
seconds 'base'

"$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$work/context/dist" .
mkdir -p "$work/context/deploy"
cp -r deploy/images "$work/context/deploy/"
list=$work/context/deploy/images/requirements-$KIND.txt
if [ -z "${WHEELS:-}" ]; then
	WHEELS=$work/wheels
	"$PYTHON" -m pip download --quiet --quiet --quiet --no-deps --require-hashes -r "$list" --dest "$WHEELS"
fi
seconds 'wheels'

version=$("$PYTHON" -c 'import kvist; print(kvist.__version__)')
bud bud --quiet --isolation chroot --format docker --layers=false -f "deploy/images/$KIND.Dockerfile" -t "$NAME" \
	--volume "$WHEELS:/wheels:ro" --build-arg BASE=localhost/kvist-base --build-arg PIP_NO_INDEX=1 \
	--build-arg PIP_FIND_LINKS=/wheels --build-arg VERSION="$version" "$work/context" > /dev/null
seconds 'image'
bud images --format '{{.Name}}:{{.Tag}} {{.Size}}'

box=$(bud from --pull-never "$NAME")
bud run --isolation chroot --user 10001:10001 "$box" kvist --version
if [ "$KIND" = cuda ]; then bud run --isolation chroot --user 10001:10001 "$box" sh -c 'gcc --version | head -1; ls /usr/include/python3*/Python.h'; fi
# in a process group of its own: buildah does not pass signals on to the container
setsid buildah --root "$work/storage" --runroot "$work/run" run --isolation chroot --user 10001:10001 "$box" \
	kvist serve --host 127.0.0.1 --port "$PORT" --max-total-tokens 4096 --device cpu &
server=$!
for _ in $(seq 900); do
	curl --silent --fail "http://127.0.0.1:$PORT/ready" > /dev/null && break
	kill -0 "$server" || { echo 'try_image.sh: the server ended' >&2; exit 1; }
	sleep 1
done
seconds 'start'
answer=$(curl --silent --show-error --fail --max-time 120 "http://127.0.0.1:$PORT/v1/chat/completions" -H 'Content-Type: application/json' \
	-d '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 16}')
echo "$answer"
case $answer in *Paris*) echo 'The image answers.' ;; *) echo 'try_image.sh: a wrong answer' >&2; exit 1 ;; esac
