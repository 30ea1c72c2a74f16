"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd with their own folder, key and ports.

It needs root. The nodes share the machine's CPUs (Slurm is configured with more than exist) and have no GPU.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.launch import ROOT

_DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmUser=root
SlurmdUser=root
# A job that is requeued waits until its credential has expired.
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
"""


def missing() -> str | None:
    """Return why Slurm cannot run here, or None if it can."""
    if os.geteuid() != 0:
        return "Slurm's daemons are started as root"
    absent = [name for name in _DAEMONS if shutil.which(name, path=_path()) is None]
    return f"Slurm is not installed (Debian: munge slurm-wlm): no {', '.join(absent)}" if absent else None


class Slurm:
    """The commands of a user of the cluster."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path(), "OMP_NUM_THREADS": "1"}

    def run(self, *words) -> str:
        done = subprocess.run([*map(str, words)], env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def train(self, *flags, options=(), nodes: int = 2, ranks: int = 1) -> int:
        """Submit examples/slurm/train.sbatch as on a cluster, but with 1 CPU per node and ranks without GPUs.

        Returns: the job's id; its log is `folder`/ID.log.
        """
        # All nodes are this machine, under any name.
        self.env |= {"RANKS_PER_NODE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        options = ["--cpus-per-task=1", f"--output={self.folder}/%j.log", f"--nodes={nodes}", *options]
        return int(self.run("sbatch", "--parsable", *options, ROOT / "examples/slurm/train.sbatch", *flags))

    def state(self, job: int | str) -> dict[str, str]:
        words = self.run("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: int | str, *states: str, seconds: float = 900) -> dict[str, str]:
        """Wait until the job is in one of the states, by default COMPLETED; fail if it ends in another state."""
        deadline, wanted = time.monotonic() + seconds, states or ("COMPLETED",)
        while (state := self.state(job))["JobState"] not in wanted:
            ended = state["JobState"] in ("FAILED", "CANCELLED", "TIMEOUT", "COMPLETED", "NODE_FAIL")
            assert not ended and time.monotonic() < deadline, f"{state}\n{self.log(job)[-6000:]}"
            time.sleep(0.3)
        return state

    def log(self, job: int | str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Run the cluster during the `with` block."""
    folder.chmod(0o755)  # munged requires that no other user may write there
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    (folder / "state").mkdir()
    for node in ("n0", "n1"):
        (folder / f"spool.{node}").mkdir()
    conf = _CONF.format(folder=folder, host=socket.gethostname(), ports=_free_ports(3))
    (folder / "slurm.conf").write_text(conf)
    cluster = Slurm(folder)
    munge = [f"--{name}={folder}/munge.{end}" for name, end in _MUNGE_FILES]
    commands = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D", "-c"]]
    commands += [["slurmd", "-D", "-N", node] for node in ("n0", "n1")]
    with contextlib.ExitStack() as stack:
        for command in commands:
            stack.enter_context(_daemon(command, cluster))
            if command[0] == "munged":
                _until((folder / "munge.socket").exists)
        _until(lambda: cluster.run("sinfo", "--noheader", "--partition=low", "--format=%T %D").split() == ["idle", "2"])
        try:
            yield cluster
        finally:
            subprocess.run(["scancel", "--user=root"], env=cluster.env)
            with contextlib.suppress(AssertionError):
                _until(lambda: not cluster.run("squeue", "--noheader"))


_MUNGE_FILES = [
    ("socket", "socket"),
    ("key-file", "key"),
    ("log-file", "log"),
    ("pid-file", "pid"),
    ("seed-file", "seed"),
]


@contextlib.contextmanager
def _daemon(command: list[str], cluster: Slurm) -> Iterator[None]:
    with open(cluster.folder / f"{command[0]}.out", "a") as out:
        process = subprocess.Popen(command, env=cluster.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(AssertionError):
            if condition():
                return
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _path() -> str:
    return os.environ["PATH"] + ":/usr/sbin:/sbin"
