#!/bin/sh
# The agent for a machine without a network: a folder of wheels made on another one, every file pinned by its SHA-256.
#
#   wheelhouse.sh build FOLDER [EXTRA]     on a connected machine, from a checkout: all that fedpact[EXTRA] needs
#   wheelhouse.sh install FOLDER VENV      on the other: a new virtual environment, from the folder alone
#
# EXTRA is agent if not given; none is the base alone, with which an auditor verifies. Both machines have the same
# system, processor and minor version of Python (PYTHON=/path/to/python names one). `build` prints the SHA-256 of the
# list of hashes: tell it to the other machine's administrator by another way than the folder; `install` prints it too,
# and asks. YES=1 answers for scripts.
set -eu
PYTHON=${PYTHON:-python3}
usage() { sed -n '3,6p' "$0" | cut -c3- >&2; exit 2; }
list=requirements.txt

build() {
  root=$(cd "$(dirname "$0")/.." && pwd)
  extra=${2:-agent}
  torch=$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$root/constraints.txt")
  [ ! -e "$1" ] || { echo "$1 is there already: name a new folder" >&2; exit 2; }
  mkdir -p "$1.part"
  pip="$PYTHON -m pip --disable-pip-version-check -q"
  if [ "$extra" = none ]; then
    $pip wheel -w "$1.part" -c "$root/constraints.txt" "$root"
  else
    # The CPU build of torch by its own version: where pip's configuration looks, else at PyTorch.
    $pip wheel -w "$1.part" -c "$root/constraints.txt" "torch==$torch+cpu" 2>/dev/null ||
      $pip wheel -w "$1.part" -c "$root/constraints.txt" "torch==$torch+cpu" \
        --extra-index-url https://download.pytorch.org/whl/cpu
    $pip wheel -w "$1.part" --find-links "$1.part" -c "$root/constraints.txt" "$root[$extra]"
  fi
  (
    cd "$1.part"
    for file in *.whl; do
      rest=${file#*-}
      echo "${file%%-*}==${rest%%-*} --hash=sha256:$(sha256sum "$file" | cut -d' ' -f1)"
    done >$list
  )
  mv "$1.part" "$1"
  echo "$(ls "$1" | grep -c '\.whl$') wheels in $1, $(du -sm "$1" | cut -f1) MB; SHA-256 of $list:"
  sha256sum "$1/$list" | cut -d' ' -f1
}

install() {
  [ -f "$1/$list" ] || { echo "$1 has no $list: it is no wheelhouse" >&2; exit 2; }
  [ ! -e "$2" ] || { echo "$2 is there already: name a new folder" >&2; exit 2; }
  echo "SHA-256 of $list: $(sha256sum "$1/$list" | cut -d' ' -f1)"
  if [ "${YES:-}" != 1 ]; then
    printf 'Is it the one that you were told? [y/N] '
    read -r answer
    [ "$answer" = y ] || { echo "Nothing was installed." >&2; exit 5; }
  fi
  $PYTHON -m venv "$2"
  "$2/bin/python" -m pip --disable-pip-version-check -q install \
    --no-index --find-links "$1" --require-hashes --no-deps -r "$1/$list" || { rm -rf "$2"; exit 1; }
  "$2/bin/python" -m pip --disable-pip-version-check check
  "$2/bin/fedpact" --version
}

case "${1:-}" in
  build) [ $# -ge 2 ] && [ $# -le 3 ] || usage; build "$2" "${3:-agent}" ;;
  install) [ $# -eq 3 ] || usage; install "$2" "$3" ;;
  *) usage ;;
esac
