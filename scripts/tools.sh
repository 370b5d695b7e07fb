# shellcheck shell=bash
# Where the scripts beside this file get their tools from. They read it from the root of the project.

tools=$PWD/target/test-tools
mkdir -p "$tools"
step() { printf '\n== %s\n' "$*"; }

install() {
  if ! command -v apt-get >/dev/null; then
    echo "Please install: $*" >&2
    exit 1
  fi
  local root=()
  [[ $(id -u) == 0 ]] || root=(sudo)
  "${root[@]}" apt-get update -qq
  "${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

python_environment() {
  python3 -c 'import ensurepip, venv' 2>/dev/null || install python3 python3-venv
}

# tool NAME PACKAGE==VERSION…: these Python packages in a folder of their own, $tools/NAME, made once.
tool() {
  local folder=$tools/$1
  shift
  if [[ $(cat "$folder/installed.txt" 2>/dev/null) == "$*" ]]; then return; fi
  python_environment >&2
  (
    # Two runs may want the same tool at the same time.
    flock 9
    if [[ $(cat "$folder/installed.txt" 2>/dev/null) == "$*" ]]; then exit; fi
    python3 -m venv --clear "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check "$@" >&2
    echo "$*" >"$folder/installed.txt"
  ) 9>"$folder.lock"
}
