# SPDX-License-Identifier: Apache-2.0
"""The way of a checkpoint: what is called in which order, and what is taken back when it fails."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cryoci.errors import CheckpointError, ConflictError, NotFoundError, PrivilegeError, SpaceError
from cryoci.shim import paths
from cryoci.shim.criu.options import CriuOptions
from cryoci.shim.engines import checkpoint as module
from cryoci.shim.engines import outlived, processes, restore
from cryoci.shim.engines.checkpoint import checkpoint, node_facts
from cryoci.shim.engines.container import Volume
from cryoci.shim.engines.options import DumpOptions
from tests.unit.live_runtime import LiveRuntime, running

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a checkpoint needs root")

LOG = (Path(__file__).parents[1] / "fixtures/criu-logs/file-locks.dump.log").read_text()
MOVING = DumpOptions(criu=CriuOptions(tcp_established=True))


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveRuntime]:
    with running(tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "made" / "checkpoint"


def left(live: LiveRuntime) -> list[str]:
    """What a checkpoint has left in the container's record, logs aside."""
    record = Path(paths.container_directory(None, "web"))
    return [name.name for name in record.iterdir() if name.suffix != ".log"] if record.exists() else []


def test_the_container_ends_only_after_the_block(live: LiveRuntime, directory: Path) -> None:
    with checkpoint(live.container(), directory, DumpOptions()) as done:
        assert live.status == "paused"
        assert done.directory == directory
        assert "kill" not in live.verbs
    assert live.verbs == ["pause", "checkpoint", "kill", "resume", "delete"]
    assert live.status == "gone"
    assert "--leave-running" in live.words("checkpoint")
    assert {path.name for path in directory.iterdir()} >= {
        "checkpoint", "config.dump", "spec.dump", "rootfs.tar", "cryoci.json",
    }  # fmt: skip
    with tarfile.open(directory / "rootfs.tar") as tar:
        assert "data/file" in tar.getnames()
    assert list(done.seconds) == ["freeze", "dump", "file system", "volumes", "stop"]
    assert directory.stat().st_mode & 0o777 == 0o700
    assert left(live) == []


def test_leave_running(live: LiveRuntime, directory: Path) -> None:
    with checkpoint(live.container(), directory, DumpOptions(leave_running=True)):
        assert live.status == "running"
    assert live.verbs == ["pause", "checkpoint", "resume"]
    assert live.status == "running"
    assert left(live) == []


def test_a_failed_dump_takes_all_back(live: LiveRuntime, directory: Path) -> None:
    live.wish(checkpoint={"log": LOG, "status": 1})
    with pytest.raises(CheckpointError) as caught:
        with checkpoint(live.container(), directory, DumpOptions()):
            pytest.fail("there is no checkpoint")
    assert caught.value.message.endswith("could not be dumped: processes of the container hold file locks")
    assert str(caught.value.hint).startswith("add --file-locks (log: ")
    kept = Path(str(caught.value.hint).rpartition("log: ")[2].rstrip(")"))
    assert kept.read_text() == LOG
    assert live.verbs == ["pause", "checkpoint", "resume"]
    assert live.status == "running"
    assert not directory.exists()
    assert left(live) == []


def test_a_failed_dump_without_a_log_says_what_the_runtime_said(live: LiveRuntime, directory: Path) -> None:
    live.wish(checkpoint={"say": "criu swrk: Segmentation fault", "status": 1})
    with pytest.raises(CheckpointError, match="Segmentation fault"):
        with checkpoint(live.container(), directory, DumpOptions()):
            pass
    assert live.status == "running" and not directory.exists()


def test_success_without_an_image_is_a_failure(live: LiveRuntime, directory: Path) -> None:
    live.wish(checkpoint={"empty": True})
    with pytest.raises(CheckpointError):
        with checkpoint(live.container(), directory, DumpOptions()):
            pass
    assert live.status == "running" and not directory.exists()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(143), ConflictError("no"), OSError(28, "x")]
)
@pytest.mark.parametrize("leave", [False, True])
def test_whatever_fails_in_the_block_lets_it_run_on(
    live: LiveRuntime, directory: Path, error: BaseException, leave: bool
) -> None:
    with pytest.raises(type(error)):
        with checkpoint(live.container(), directory, DumpOptions(leave_running=leave)):
            raise error
    assert live.verbs == ["pause", "checkpoint", "resume"]
    assert live.status == "running"
    assert not directory.exists()
    assert left(live) == []


def test_both_reasons_are_said_when_it_cannot_run_on(live: LiveRuntime, directory: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        with checkpoint(live.container(), directory, DumpOptions()):
            live.wish(resume={"say": "no cgroup", "status": 1})
            raise ConflictError("the name is taken")
    assert "the name is taken; and then:" in caught.value.message
    assert "no cgroup" in caught.value.message
    assert not directory.exists()


def test_the_reason_survives_a_container_that_vanished(live: LiveRuntime, directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lost the registry; and then: .*knows no container"):
        with checkpoint(live.container(), directory, DumpOptions()):
            live.set_status("gone")
            raise ConflictError("lost the registry")


def test_a_user_s_pause_stays(live: LiveRuntime, directory: Path) -> None:
    live.set_status("paused")
    with checkpoint(live.container(), directory, DumpOptions(leave_running=True)):
        pass
    assert live.verbs == ["checkpoint"]
    assert live.status == "paused"
    with pytest.raises(KeyboardInterrupt):
        with checkpoint(live.container(), directory.with_name("second"), DumpOptions()):
            raise KeyboardInterrupt
    assert live.status == "paused"
    assert "resume" not in live.verbs


def test_the_freeze_of_a_killed_cryoci_is_no_pause(
    live: LiveRuntime, directory: Path, tmp_path: Path
) -> None:
    """A real cryoci, killed between freeze and storing; the next one puts the container back to running."""
    script = f"""
import json, os, signal, sys
from pathlib import Path
from cryoci.shim.engines.checkpoint import checkpoint
from cryoci.shim.engines.container import Container
from cryoci.shim.engines.options import DumpOptions
spec = json.loads(Path({str(live.bundle)!r}, "config.json").read_text())
c = Container("runc", "web", "web", {str(live.program)!r}, None, Path({str(live.bundle)!r}),
              Path({str(live.bundle)!r}, "rootfs"), None, spec, dumps={{"config.dump": {{}}}})
with checkpoint(c, Path({str(tmp_path / "first")!r}), DumpOptions()):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert live.status == "paused"
    with checkpoint(live.container(), directory, DumpOptions(leave_running=True)):
        assert live.status == "running"
    assert live.status == "running"
    assert left(live) == []


def test_one_at_a_time(live: LiveRuntime, directory: Path) -> None:
    with checkpoint(live.container(), directory, DumpOptions(leave_running=True)):
        with pytest.raises(ConflictError, match="another checkpoint"):
            with checkpoint(live.container(), directory.with_name("second"), DumpOptions()):
                pass
        assert not directory.with_name("second").exists()
    with checkpoint(live.container(), directory.with_name("third"), DumpOptions(leave_running=True)):
        pass
    assert live.status == "running"


@pytest.mark.parametrize("status", ["created", "stopped", "gone"])
def test_only_a_running_container(live: LiveRuntime, directory: Path, status: str) -> None:
    live.set_status(status)
    with pytest.raises(NotFoundError if status == "gone" else ConflictError):
        with checkpoint(live.container(), directory, DumpOptions()):
            pass
    assert live.verbs == [] and not directory.exists()


def test_a_directory_that_is_in_use(live: LiveRuntime, directory: Path) -> None:
    directory.mkdir(parents=True)
    with checkpoint(live.container(), directory, DumpOptions(leave_running=True)):
        pass
    with pytest.raises(ConflictError, match="not an empty directory"):
        with checkpoint(live.container(), directory, DumpOptions(leave_running=True)):
            pass
    assert (directory / "cryoci.json").is_file(), "what was there stays"
    (directory.parent / "file").write_text("x")
    with pytest.raises(ConflictError):
        with checkpoint(live.container(), directory.parent / "file", DumpOptions()):
            pass
    assert live.status == "running"


def test_no_space_is_seen_before_the_freeze(
    live: LiveRuntime, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "private_memory", lambda pid: 1 << 60)
    with pytest.raises(SpaceError, match="MiB free"):
        with checkpoint(live.container(), directory, DumpOptions()):
            pass
    assert live.verbs == [] and not directory.exists()


def test_needs_root(live: LiveRuntime, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(PrivilegeError):
        with checkpoint(live.container(), directory, DumpOptions()):
            pass


def test_stored_is_stored(live: LiveRuntime, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that does not end afterwards is an error, but its checkpoint stays."""
    monkeypatch.setattr(module, "_STOP_SECONDS", 0.3)
    with pytest.raises(CheckpointError, match="did not end"):
        with checkpoint(live.container(), directory, DumpOptions()):
            live.wish(kill={"status": 1})
    assert (directory / "cryoci.json").is_file()
    assert left(live) == []


@pytest.mark.parametrize("error", [CheckpointError("no private memory"), ProcessLookupError(3, "gone")])
def test_killed_while_frozen_its_checkpoint_is_kept(live: LiveRuntime, error: Exception) -> None:
    """Its memory could not be put back, as it was killed meanwhile; the freezer has runtimes call it paused still."""

    def thaw() -> None:
        os.kill(int(str(live.state["pid"])), signal.SIGKILL)
        os.waitpid(int(str(live.state["pid"])), 0)
        raise error

    live.set_status("paused")
    warnings: list[str] = []
    began = time.monotonic()
    assert not outlived.goes_on(live.container(), thaw, warnings)
    assert time.monotonic() - began < 4
    assert live.verbs == ["resume"] and "brings it back" in warnings[0]


def test_one_that_lives_on_is_no_loss(live: LiveRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    def thaw() -> None:
        raise CheckpointError("the disk is away")

    monkeypatch.setattr(outlived, "_SETTLE", 0.3)
    live.set_status("paused")
    with pytest.raises(CheckpointError, match="the disk is away"):
        outlived.goes_on(live.container(), thaw, [])
    assert live.verbs == []


def test_diff_needs_an_overlay(live: LiveRuntime, directory: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        with checkpoint(live.container(), directory, DumpOptions(rootfs="diff")):
            pass
    assert caught.value.hint == "use --rootfs full"
    assert live.status == "running"


def test_rootfs_none_shm_volumes_and_log(live: LiveRuntime, directory: Path, tmp_path: Path) -> None:
    for name in ("shm", "vol"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    (tmp_path / "ctr.log").write_text("said")
    container = live.container(
        shm=tmp_path / "shm", volumes=(Volume("data", tmp_path / "vol", "/data"),), log=tmp_path / "ctr.log"
    )
    with checkpoint(container, directory, DumpOptions(leave_running=True, rootfs="none", volumes=True)):
        pass
    assert not (directory / "rootfs.tar").exists()
    for name in ("devshm-checkpoint.tar", "volumes/data.tar"):
        with tarfile.open(directory / name) as tar:
            assert "./x" in tar.getnames()
    assert (directory / "ctr.log").read_text() == "said"
    assert json.loads((directory / "cryoci.json").read_text())["volumes"] == ["data"]


def test_what_the_checkpoint_says(live: LiveRuntime, directory: Path) -> None:
    options = DumpOptions(leave_running=True, criu=CriuOptions(file_locks=True, ghost_limit=9, timeout=7))
    with checkpoint(live.container(), directory, options):
        pass
    own = json.loads((directory / "cryoci.json").read_text())
    assert (own["version"], own["engine"], own["container"]) == (1, "runc", {"id": "web", "name": "web"})
    assert own["criu"] == {"file-locks": True, "ghost-limit": 9, "timeout": 7}
    assert own["annotations"]["host.arch"] == os.uname().machine
    assert own["annotations"]["criu.version"] == "4.2.1"
    assert all(own["annotations"].values())
    assert json.loads((directory / "spec.dump").read_text()) == live.spec
    config = json.loads((directory / "config.dump").read_text())
    assert config["checkpointedTime"] == own["annotations"]["checkpointed"]
    assert node_facts()["host.kernel"] == os.uname().release


def test_an_old_criu(live: LiveRuntime, directory: Path) -> None:
    live.program.with_name("criu").write_text("#!/bin/sh\necho Version: 3.17.1\n")
    with pytest.raises(CheckpointError, match=r"criu 3\.17\.1 cannot dump a frozen container"):
        with checkpoint(live.container(), directory, DumpOptions()):
            pass
    assert live.status == "running"


# -- established connections that move: CRIU itself ends the processes


def test_moving(live: LiveRuntime, directory: Path, tmp_path: Path) -> None:
    """The engine unmounts /dev/shm when the processes are gone: it is saved before."""
    (tmp_path / "shm").mkdir()
    with checkpoint(live.container(shm=tmp_path / "shm"), directory, MOVING) as done:
        assert live.status == "stopped"
        assert list(done.seconds) == ["freeze", "volumes", "dump", "file system"]
    assert "--leave-running" not in live.words("checkpoint")
    assert live.verbs == ["pause", "checkpoint", "delete"]


def test_moving_is_undone_by_a_restore_in_place(live: LiveRuntime, directory: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        with checkpoint(live.container(), directory, MOVING):
            raise KeyboardInterrupt
    assert live.verbs == ["pause", "checkpoint", "restore"]
    assert live.status == "running"
    assert not directory.exists()
    assert not {"held.json", "checkpoint.lock"} & set(left(live)), "the record is the restored container's"


def test_moving_whose_dump_fails_lets_it_run_on(live: LiveRuntime, directory: Path) -> None:
    live.wish(checkpoint={"log": LOG, "status": 1})
    with pytest.raises(CheckpointError, match="hold file locks"):
        with checkpoint(live.container(), directory, MOVING):
            pass
    assert live.verbs == ["pause", "checkpoint", "resume"] and live.status == "running"


@pytest.mark.parametrize("durable", [True, False])
def test_what_was_dumped_is_kept_when_nothing_else_is_left(
    live: LiveRuntime, directory: Path, durable: bool
) -> None:
    """Also when the directory is scratch of the caller, who removes it."""
    with pytest.raises(CheckpointError) as caught:
        with checkpoint(live.container(), directory, DumpOptions(durable=durable, criu=MOVING.criu)):
            live.wish(restore={"status": 1})
            raise ConflictError("the registry is gone")
    if not durable:
        shutil.rmtree(directory.parent)
    kept = Path(str(caught.value.hint).partition("cryoci restore ")[2].rstrip("`"))
    assert (kept / "checkpoint/inventory.img").is_file()
    assert isinstance(caught.value.__context__, Exception)


def test_moving_and_removed_by_the_engine(live: LiveRuntime, directory: Path) -> None:
    with pytest.raises(ConflictError, match="--rm"):
        with checkpoint(live.container(auto_remove=True), directory, MOVING):
            pass
    assert live.verbs == []


def test_in_place_is_probed(live: LiveRuntime, directory: Path) -> None:
    live.set_status("stopped")
    live.wish(restore={"status": 0})
    with pytest.raises(CheckpointError, match="is stopped after the restore in place"):
        restore.in_place(live.container(), directory, CriuOptions())
