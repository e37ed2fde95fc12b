"""Two hosts, as two network namespaces with a cable between them: torchrun on each, the example across them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.examples.test_example import SCRIPT, SMALL, losses, summary, train
from tests.helpers.harness import HANG
from tests.helpers.paths import JOBS, ROOT
from tests.helpers.stacks import on_one_stack

STEPS, INTERVAL = 10, 4
DIES_IN = 7  # between two checkpoints
CABLE = "ep0"

pytestmark = pytest.mark.slow


class Host:
    """A network namespace: processes in it see their own loopback and one end of the cable."""

    def __init__(self, name: str, address: str):
        self.name, self.address = name, address

    def start(self, command: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Run a command on this host; what it says is added to the log."""
        here = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        # torchrun keeps the address of its shared store from the first round, so that a new agent never hears of it.
        here |= {"GLOO_SOCKET_IFNAME": CABLE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with log.open("ab") as out:
            inside = ["ip", "netns", "exec", self.name, *command]
            return subprocess.Popen(inside, env=os.environ | here, stdout=out, stderr=out, stdin=subprocess.DEVNULL)

    def kill(self) -> int:
        """End all processes of this host at once, as when its power fails. Returns how many there were."""
        pids = [int(pid) for pid in ip("netns", "pids", self.name).split()]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=HANG, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("network namespaces need Linux and the ip command (Debian, Ubuntu: apt install iproute2)")
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    pair = tuple(Host(f"ep-{os.getpid()}-{number}", f"10.87.0.{number}") for number in (1, 2))
    try:
        try:
            ip("netns", "add", pair[0].name)
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here, although this is root: {error}")
        ip("netns", "add", pair[1].name)
        ip("link", "add", CABLE, "netns", pair[0].name, "type", "veth", "peer", "name", CABLE, "netns", pair[1].name)
        for host in pair:
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", CABLE)
            for link in ("lo", CABLE):
                ip("-n", host.name, "link", "set", link, "up")
        yield pair
    finally:
        there = ip("netns", "list")
        for host in pair:
            if host.name in there:
                host.kill()
                ip("netns", "del", host.name)


def torchrun(host: Host, first: Host, folder: Path) -> list[str]:
    """One process a host; the rendezvous is held by the first one. It gives a silent host up after ten seconds."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.address}:29400", "--rdzv-id", folder.name]
    # is_host: torch would tell it from the host's name, which both namespaces share.
    patience = f"is_host={int(host is first)},keep_alive_interval=1,keep_alive_max_attempt=10"
    launcher += ["--rdzv-conf", patience, "--local-addr", host.address]
    launcher += ["--max-restarts", "1", "--no-python", str(JOBS / "train_or_resume.sh"), str(folder / "save")]
    launcher += [sys.executable, str(JOBS / "wait_in_step.py"), str(DIES_IN), str(folder / "waits")]
    save = ["--save", str(folder / "save"), "--save-interval", str(INTERVAL)]
    return [*launcher, str(SCRIPT), *SMALL, "--steps", str(STEPS), "--out", str(folder / "out"), *save]


@on_one_stack
def test_a_host_that_dies_and_comes_back(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    """The job restarts from its last checkpoint and ends with the losses of an undisturbed run."""
    first, second = hosts
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    broken.mkdir()
    log = broken / "log"

    job = [host.start(torchrun(host, first, broken), log) for host in hosts]
    deadline = time.monotonic() + HANG
    while not (broken / "waits").exists():
        assert time.monotonic() < deadline and job[0].poll() is None, log.read_text()[-4000:]
        time.sleep(0.05)
    assert second.kill() >= 2, "torchrun and its process"
    job[1].wait(HANG)
    assert len(losses(broken)) < DIES_IN

    with ThreadPoolExecutor(1) as pool:  # the first host waits for the second one meanwhile
        undisturbed = pool.submit(train, whole, "--steps", str(STEPS))
        job[1] = second.start(torchrun(second, first, broken), log)
        for process in job:
            assert process.wait(HANG) == 0, log.read_text()[-4000:]
        summary(undisturbed.result())
    assert f"resumed from {broken / 'save'}/step_{DIES_IN // INTERVAL * INTERVAL:08d}" in log.read_text()
    assert losses(broken) == losses(whole) and len(losses(whole)) == STEPS
