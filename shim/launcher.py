#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
""":"
# cryoci-runtime: the OCI runtime that engines call. This file is two programs.
#
# The first is for /bin/sh, and a text to Python: the calls that make up a container's life and to which
# cryoci adds nothing become the runtime that the container's record names, within half a millisecond
# (Python alone needs 5 to 7 to start), and so do questions about the runtime where there is no config.toml.
# It takes only lines that it is sure of. Everything else, and every doubt, is for the second program, below.
_cryoci_default() {
    [ -e "${CRYOCI_CONFIG:-/etc/cryoci/config.toml}" ] && return
    set -f
    IFS=:
    for _cryoci_name in runc crun; do
        for _cryoci_path in $PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin; do
            _cryoci_path=$_cryoci_path/$_cryoci_name
            case $_cryoci_path in /*) ;; *) continue ;; esac
            [ -f "$_cryoci_path" ] && [ -x "$_cryoci_path" ] && ! [ "$_cryoci_path" -ef "$0" ] || continue
            _cryoci_runtime=$_cryoci_path
            return
        done
    done
}
_cryoci_look() {
    _cryoci_key=/run/runc # a default, which all defaults share
    while :; do
        case $1 in
        --root) [ $# -gt 1 ] || return; _cryoci_key=$2; shift 2 ;;
        --root=*) _cryoci_key=${1#*=}; shift ;;
        --log | --log-format) [ $# -gt 1 ] || return; shift 2 ;;
        --log=* | --log-format=* | --debug | --systemd-cgroup) shift ;;
        *) break ;;
        esac
    done
    _cryoci_verb=$1
    case ${CRYOCI_DEPTH:-0} in [0-3]) ;; *) return ;; esac
    case $_cryoci_verb:${2-} in
    --version: | -v: | --help: | -h: | features:* | list:* | checkpoint:--help | restore:--help)
        _cryoci_default; return ;;
    esac
    case $_cryoci_verb in
    state | start | kill | exec | pause | resume | ps | update) shift ;;
    *) return ;;
    esac
    while :; do
        case $_cryoci_verb:$1 in
        kill:--all | kill:-a | exec:--detach | exec:-d | exec:--tty | exec:-t) shift ;;
        exec:--process | exec:-p | exec:--console-socket | exec:--pid-file | ps:--format | update:--resources)
            [ $# -gt 1 ] || return; shift 2 ;;
        exec:--process=* | exec:--console-socket=* | exec:--pid-file=* | update:--resources=*) shift ;;
        *:-*) return ;;
        *) break ;;
        esac
    done
    case $1 in
    '' | . | .. | *[!A-Za-z0-9_+.,-]*) return ;;
    esac
    case $_cryoci_key in
    /run/runc | /run/crun) _cryoci_key=default ;;
    *//* | */. | */.. | */./* | */../* | */ | *[!A-Za-z0-9_+./-]*) return ;;
    /*)
        _cryoci_rest=$_cryoci_key
        _cryoci_key=
        while [ -n "$_cryoci_rest" ]; do
            _cryoci_rest=${_cryoci_rest#/}
            _cryoci_key=$_cryoci_key%2F${_cryoci_rest%%/*}
            _cryoci_rest=${_cryoci_rest#"${_cryoci_rest%%/*}"}
        done ;;
    *) return ;;
    esac
    _cryoci_record=${CRYOCI_RUN:-/run/cryoci}/containers/$_cryoci_key/$1
    [ -e "$_cryoci_record/waiting" ] && return
    read -r _cryoci_path <"$_cryoci_record/runtime" || return
    case $_cryoci_path in /*) ;; *) return ;; esac
    [ -f "$_cryoci_path" ] && [ -x "$_cryoci_path" ] && ! [ "$_cryoci_path" -ef "$0" ] || return
    _cryoci_runtime=$_cryoci_path
}
_cryoci_runtime=
_cryoci_look "$@" 2>/dev/null
if [ -n "$_cryoci_runtime" ]; then
    export CRYOCI_DEPTH=$((${CRYOCI_DEPTH:-0} + 1))
    exec "$_cryoci_runtime" "$@"
fi
exec /usr/bin/python3 -IS "$0" "$@"
"""

# The second program. A script is compiled at every start, so it only finds its package, from its own real
# path, and hands over to compiled modules. It works as an installed file behind a symlink
# (.../site-packages/cryoci/shim/launcher.py) and from a source tree (cryoci/shim links to ../shim).

import posix
import sys


def package_root(path: str) -> str:
    """The directory that holds package `cryoci`. `path` may be relative or a chain of symlinks."""
    if path[:1] != "/":
        path = posix.getcwd() + "/" + path
    for _ in range(40):
        try:
            target = posix.readlink(path)
        except OSError:
            break
        path = target if target[:1] == "/" else path.rpartition("/")[0] + "/" + target
    shim = path.rpartition("/")[0]
    for root in (shim + "/..", shim + "/../.."):
        try:
            posix.stat(root + "/cryoci/shim")
        except OSError:
            continue
        return root
    raise SystemExit(f"cryoci-runtime: no package cryoci beside {path}; reinstall cryoci")


if __name__ == "__main__":
    root = package_root(__file__)
    sys.path.insert(0, root)
    from cryoci.shim import dispatch

    # The standard library first again: whatever else lies beside the package must not shadow it.
    sys.path.append(sys.path.pop(0))
    dispatch.main(sys.argv, __file__)
