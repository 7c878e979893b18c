# SPDX-License-Identifier: Apache-2.0
"""The same engine commands with a bare runtime and with cryoci-runtime, and what each of them said."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.nodes import workload
from tests.nodes.node import Node

IMAGE = workload.IMAGE
# Denies mkdir and nothing else.
SECCOMP = """{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
    {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}]}"""
_SHELL = 'trap "echo term; exit 5" TERM; trap "echo usr1" USR1; echo up; echo err >&2; while :; do sleep 0.1; done'


@dataclass(frozen=True)
class Answer:
    """What one command said, less what is different in each run: ids, times, names of runtimes.

    Engine, its monitor and container write to one stderr, and whose line comes first is chance: `err` is sorted.
    """

    words: str
    status: int
    out: str
    err: str


def podman(name: str, port: int) -> Iterator[str]:
    """Lines of shell: a container's life under podman, `name` its name; `port` is published."""
    main = f"""--name {name} --publish 127.0.0.1:{port}:80 --volume {name}:/vol --env A=b --label l=1
        --health-cmd "test -e /vol/well" --health-retries 1 --health-interval disable --hostname box"""
    yield f"podman create {' '.join(main.split())} {IMAGE} sh -c '{_SHELL}'"
    yield f"podman ps --all --filter name={name} --format '{{{{.Names}}}} {{{{.State}}}} {{{{.Ports}}}}'"
    yield f"podman init {name}"
    yield f"podman inspect --format '{{{{.State.Status}}}} {{{{.State.Running}}}}' {name}"
    yield f"podman start {name}"
    yield f"podman inspect --format '{{{{.State.Status}}}} {{{{.State.ExitCode}}}} {{{{.State.OOMKilled}}}}' {name}"
    yield f"podman port {name}"
    yield f"podman exec {name} sh -c 'echo out; echo err >&2; exit 7'"
    yield f"podman exec {name} /none"
    yield f"podman exec {name} /etc"
    yield f"podman exec --env X=y --workdir /tmp --user 1:2 {name} sh -c 'echo $A $X $PWD; id'"
    yield f"echo in | podman exec --interactive {name} cat"
    yield f"podman exec --tty {name} sh -c 'test -t 1 && echo terminal'"
    yield f"podman exec --detach {name} sh -c 'echo well >/vol/well'"
    yield f"sleep 0.5; podman exec {name} cat /vol/well"
    yield f"podman healthcheck run {name}"
    yield f"podman exec {name} rm /vol/well; podman healthcheck run {name}"
    yield f"podman logs {name}"
    yield f"podman logs --tail 1 {name}"
    yield f"podman top {name} comm | head -2"
    yield f"podman stats --no-stream --format '{{{{.Name}}}}' {name} 2>/dev/null"
    yield f"podman cp /etc/hostname {name}:/root/copied && podman exec {name} cat /root/copied"
    yield f"podman cp {name}:/root/copied - | tar -tf -"
    yield f"podman diff {name} | grep root"
    yield f"podman commit --quiet {name} localhost/{name}:1 && podman rmi localhost/{name}:1 | head -1"
    yield f"podman export {name} | tar -tf - | grep -e root/copied -e app/"
    yield f"podman pause {name}"
    yield f"podman ps --filter name={name} --format '{{{{.State}}}}'"
    yield f"podman exec {name} true"
    yield f"podman pause {name}"
    yield f"podman unpause {name}"
    yield f"podman unpause {name}"
    yield f"podman kill --signal USR1 {name}; sleep 0.5; podman logs --tail 1 {name}"
    yield f"podman rm {name}"
    yield f"podman stop --time 5 {name}"
    yield f"podman wait {name}"
    yield f"podman inspect --format '{{{{.State.Status}}}} {{{{.State.ExitCode}}}}' {name}"
    yield f"podman exec {name} true"
    yield f"podman start {name}"
    yield f"podman restart --time 5 {name}"
    yield f"podman kill {name}"
    yield f"podman wait {name}"
    events = f"podman events --stream=false --filter container={name} --format '{{{{.Status}}}}'"
    yield f"{events} | grep -v -e exec -e health -e cleanup | uniq"
    yield f"podman rm {name}"
    yield f"podman container inspect {name}"
    yield f"podman volume inspect --format '{{{{.Name}}}}' {name} && podman volume rm {name}"
    run = f"podman run --rm --name {name}"
    yield f"{run} {IMAGE} sh -c 'exit 3'"
    yield f"{run} {IMAGE} /none"
    yield f"{run} {IMAGE} /etc"
    yield f"echo in | {run} --interactive {IMAGE} cat"
    yield f"{run} --tty {IMAGE} sh -c 'test -t 0 && echo terminal'"
    yield f"{run} --read-only --read-only-tmpfs=false {IMAGE} touch /x"
    deny = "--security-opt seccomp=/srv/seccomp.json"
    yield f"{run} {deny} {IMAGE} sh -c 'mkdir /x; cat /proc/self/status' | grep Seccomp:"
    yield f"{run} --cap-drop all --security-opt no-new-privileges {IMAGE} cat /proc/self/status | grep -e Cap -e NoNew"
    yield f"{run} --user 7:8 --network none {IMAGE} sh -c 'id; cat /proc/net/dev | wc -l'"
    yield f"{run} --uidmap 0:100000:1000 --gidmap 0:100000:1000 {IMAGE} cat /proc/self/uid_map"
    yield f"{run} --init {IMAGE} true"
    yield f"{run} --sysctl net.none=1 {IMAGE} true"
    yield f"{run} --annotation run.example/a=b --ulimit nofile=99:99 {IMAGE} sh -c 'ulimit -n'"
    yield f"{run} --device /dev/none {IMAGE} true"


def podman_limits(name: str) -> Iterator[str]:
    """Lines of shell that need every cgroup controller: a life with limits, which are in force and change."""
    group = "/sys/fs/cgroup"
    own = f"{group}$(podman inspect --format '{{{{.State.CgroupPath}}}}' {name})"
    limits = "--memory 64m --pids-limit 50 --cpus 0.5"
    yield f"podman create --name {name} {limits} {IMAGE} sh -c '{_SHELL}'"
    yield f"podman start {name}"
    yield f"podman exec {name} sh -c 'cat {group}/memory.max {group}/pids.max {group}/cpu.max; echo err >&2; exit 7'"
    yield f"podman stats --no-stream --format '{{{{.Name}}}} {{{{.MemUsage}}}}' {name} | sed 's/ .* / /'"
    yield f"podman update --memory 96m {name} && cat {own}/memory.max"
    yield f"podman pause {name}"
    yield f"podman ps --filter name={name} --format '{{{{.Names}}}} {{{{.State}}}}'; cat {own}/cgroup.freeze"
    yield f"podman unpause {name}"
    yield f"podman kill --signal USR1 {name}; sleep 0.5; podman logs --tail 1 {name}"
    yield f"podman stop --time 5 {name}"
    yield f"podman inspect --format '{{{{.State.Status}}}} {{{{.State.ExitCode}}}}' {name}"
    yield f"podman restart --time 5 {name}"
    yield f"podman kill {name}"
    yield f"podman rm --force --time 0 {name}"
    yield f"podman run --rm --name {name} {IMAGE} sh -c 'exit 3'"
    yield f"podman run --rm --name {name} --memory 16m {IMAGE} python3 -c 'bytearray(64 << 20)'"


def podman_verbs(name: str, port: int) -> Iterator[str]:
    """Lines of shell: more of podman, no more than a slow machine can do in half a minute."""
    main = f"--name {name} --publish 127.0.0.1:{port}:80 --volume {name}:/vol --health-cmd true"
    yield f"podman run --detach {main} --health-interval disable {IMAGE} sh -c '{_SHELL}'"
    yield f"podman port {name}"
    yield f"podman logs {name}"
    yield f"podman top {name} comm | head -2"
    yield f"podman cp /etc/hostname {name}:/root/copied"
    yield f"podman diff {name} | grep root"
    yield f"podman commit --quiet {name} localhost/{name}:1 && podman rmi localhost/{name}:1 | head -1"
    yield f"podman healthcheck run {name}"
    yield f"podman rm {name}"
    yield f"podman kill {name}; podman wait {name}"
    events = f"podman events --stream=false --filter container={name} --format '{{{{.Status}}}}'"
    # podman says "stop" only where it comes before its own cleanup, which on a slow machine is chance
    yield f"{events} | grep -v -e exec -e health -e cleanup -e stop | uniq"
    yield f"podman rm {name}"
    yield f"podman volume rm {name}"
    yield f"podman run --rm --name {name} {IMAGE} /etc"


def containerd(name: str, binary: str) -> Iterator[str]:
    """Lines of shell: a container's life under containerd."""
    running = f"while ctr task ls | grep '^{name} ' | grep -q RUNNING;"
    run = f"ctr run --runc-binary {binary} --cpu-shares 0"
    yield f"{run} --detach --env A=b {IMAGE} {name} sh -c '{_SHELL}' >/dev/null 2>&1"
    yield f"ctr task ls | grep '^{name} ' | tr -s ' ' | cut -d' ' -f3"
    yield f"ctr task exec --exec-id a {name} sh -c 'echo $A; echo err >&2; exit 7'"
    yield f"ctr task exec --exec-id b {name} /none"
    yield f"ctr task exec --exec-id c --cwd /tmp --user 1:2 {name} sh -c 'pwd; id'"
    yield f"echo in | ctr task exec --exec-id d {name} cat"
    yield f"ctr task ps {name} | head -1"
    yield f"ctr task pause {name}; ctr task ls | grep '^{name} ' | tr -s ' ' | cut -d' ' -f3"
    yield f"ctr task exec --exec-id e {name} true"
    yield f"ctr task resume {name}; ctr task ls | grep '^{name} ' | tr -s ' ' | cut -d' ' -f3"
    yield f"ctr task metrics {name} | head -2 | tail -1 | cut -c-{len(name)}"
    yield f"ctr task rm {name}"
    yield f"ctr task kill --signal TERM {name}; {running} do sleep 0.1; done"
    yield f"ctr task rm {name}"
    yield f"ctr container rm {name}; ctr container info {name}"
    yield f"{run} --rm {IMAGE} {name} sh -c 'echo out; exit 3'"
    yield f"{run} --rm {IMAGE} {name} /none"
    yield f"{run} --rm --read-only {IMAGE} {name} touch /x"


def answers(node: Node, lines: Iterable[str], *own: str, timeout: float = 120) -> list[Answer]:
    """Run shell lines one after another; `own` are words that only this run has (names, ports, programs)."""
    found = []
    for line in lines:
        result = node.run(["/bin/sh", "-c", line], check=False, timeout=timeout)
        out, err = (_plain(text.decode(), own) for text in (result.stdout, result.stderr))
        err = "".join(sorted(err.splitlines(keepends=True)))
        found.append(Answer(_plain(line, own), result.returncode, out, err))
    return found


def _plain(text: str, own: tuple[str, ...]) -> str:
    # first, as an ID may have a port's digits in it
    text = re.sub(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{12}\b", "ID", text)
    for word in sorted(own, key=len, reverse=True):
        text = text.replace(word, "OWN")
    text = re.sub(r'time="[^"]*"', "time", text)
    text = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d[^ ,\"]*", "TIME", text)
    # of one message two programs make: bare runc and crun put their own name before it
    return re.sub(r"\b(?:cryoci-runtime|/usr/s?bin/(?:runc|crun)|runc|crun): ", "RUNTIME: ", text)
