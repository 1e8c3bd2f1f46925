"""The manifests: against a schema of the fields that they use, and what they say to Kubernetes."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from modelspec.cli import app
from modelspec.launch import Job, Kubernetes, Pods, files, job_of
from modelspec.launch.kubernetes import Kind, object_name
from modelspec.validate import load

NANO = str(Path(__file__).parents[2] / "specs/deepseek-v3-nano.yaml")
KINDS: list[Kind] = ["jobset", "pytorchjob"]
Schema = dict[str, Any]


def map_of(required: str = "", **properties: Schema) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def list_of(items: Schema, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


# The fields in use of jobset.x-k8s.io/v1alpha2, kubeflow.org/v1 and core/v1, with the types that their servers ask for.
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
LABEL: Schema = {"type": "string", "pattern": "^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$"}
QUANTITY: Schema = {"type": "string", "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"}
CONTAINER = map_of(
    "name image command",
    name=LABEL,
    image=TEXT,
    command=list_of(TEXT),
    env=list_of(map_of("name value", name={"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"}, value=TEXT)),
    ports=list_of(map_of("containerPort", name={"type": "string", "maxLength": 15}, containerPort=COUNT)),
    resources=map_of(limits={"type": "object", "additionalProperties": QUANTITY}),
    volumeMounts=list_of(map_of("name mountPath", name=LABEL, mountPath=TEXT, readOnly=FLAG)),
)
VOLUME = map_of(
    "name",
    name=LABEL,
    configMap=map_of("name", name=LABEL),
    persistentVolumeClaim=map_of("claimName", claimName=TEXT),
    emptyDir=map_of(medium=one_of("", "Memory"), sizeLimit=QUANTITY),
)
POD = map_of(
    "containers",
    restartPolicy=one_of("Never", "OnFailure"),
    terminationGracePeriodSeconds=COUNT,
    initContainers=list_of(CONTAINER),
    containers=list_of(CONTAINER),
    volumes=list_of(VOLUME),
)
FAILURE_RULE = map_of(
    "action",
    action=one_of("FailJob", "FailIndex", "Ignore", "Count"),
    onPodConditions=list_of(map_of("type", type=TEXT, status=one_of("True", "False", "Unknown"))),
)
BATCH_JOB = map_of(
    "template",
    backoffLimit=COUNT,
    completionMode=one_of("Indexed", "NonIndexed"),
    completions=COUNT,
    parallelism=COUNT,
    podFailurePolicy=map_of("rules", rules=list_of(FAILURE_RULE)),
    template=map_of("spec", spec=POD),
)
SET_RULE = map_of(
    "action",
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]{0,126}[A-Za-z0-9_])?$"},
    action=one_of("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"),
    onJobFailureReasons=list_of(
        one_of("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "PodFailurePolicy")
    ),
)
REPLICATED = map_of("name template", name=LABEL, replicas=COUNT, template=map_of("spec", spec=BATCH_JOB))
ROLE = map_of(
    "template",
    replicas={**COUNT, "minimum": 1},
    restartPolicy=one_of("Always", "OnFailure", "Never", "ExitCode"),
    template=map_of("spec", spec=POD),
)
SCHEMAS: dict[Kind, Schema] = {
    "jobset": map_of(
        "apiVersion kind metadata spec",
        apiVersion=one_of("jobset.x-k8s.io/v1alpha2"),
        kind=one_of("JobSet"),
        metadata=map_of("name", name=LABEL),
        spec=map_of(
            "replicatedJobs",
            network=map_of(enableDNSHostnames=FLAG, publishNotReadyAddresses=FLAG, subdomain=LABEL),
            failurePolicy=map_of(maxRestarts=COUNT, rules=list_of(SET_RULE)),
            successPolicy=map_of("operator", operator=one_of("All", "Any")),
            replicatedJobs=list_of(REPLICATED),
        ),
    ),
    "pytorchjob": map_of(
        "apiVersion kind metadata spec",
        apiVersion=one_of("kubeflow.org/v1"),
        kind=one_of("PyTorchJob"),
        metadata=map_of("name", name=LABEL),
        spec=map_of(
            "pytorchReplicaSpecs",
            nprocPerNode=TEXT,
            runPolicy=map_of(backoffLimit=COUNT, cleanPodPolicy=one_of("All", "Running", "None")),
            pytorchReplicaSpecs=map_of(
                "Master", Master={**ROLE, "properties": {**ROLE["properties"], "replicas": {"const": 1}}}, Worker=ROLE
            ),
        ),
    ),
}


def written(*arguments: str) -> list[dict[str, Any]]:
    """The documents of the manifest that the command writes in the working directory."""
    given = ["launch", NANO, "--on", "kubernetes", "--image", "registry/modelspec:1", *arguments]
    done = CliRunner().invoke(app, [*given, "--format", "json"])
    assert done.exit_code == 0, done.output
    return list(yaml.safe_load_all(Path(json.loads(done.stdout)["files"][-1]).read_text()))


def pods(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The specs of the pods of a manifest."""
    match manifest["kind"]:
        case "JobSet":
            return [each["template"]["spec"]["template"]["spec"] for each in manifest["spec"]["replicatedJobs"]]
        case _:
            return [each["template"]["spec"] for each in manifest["spec"]["pytorchReplicaSpecs"].values()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_manifest_fits_the_schema_of_its_kind(
    kind: Kind, world: int, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec, manifest = written(
        *("--kind", kind, "--nproc", str(world), "--set", "parallelism.gpus_per_node=4", "--device", device),
        *("--resource", "memory=900Gi", "--resource", "rdma/ib=4", "--env", "NCCL_DEBUG=INFO"),
    )
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[kind])
    jsonschema.validate(manifest, SCHEMAS[kind])
    assert (spec["kind"], list(spec["data"])) == ("ConfigMap", ["spec.yaml"])
    (tmp_path / "frozen.yaml").write_text(spec["data"]["spec.yaml"])
    assert load(tmp_path / "frozen.yaml").parallelism.world_size == world
    for pod in pods(manifest):
        mounted = {mount["name"] for each in pod["containers"] for mount in each["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert {"name": "NCCL_DEBUG", "value": "INFO"} in container["env"]
        gpus = {"nvidia.com/gpu": "4" if world == 8 else "1"} if device == "cuda" else {}
        assert container["resources"]["limits"] == {**gpus, "memory": "900Gi", "rdma/ib": "4"}


def test_a_jobset_has_a_pod_for_each_machine_and_forgives_disruptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _, manifest = written("--nproc", "8", "--set", "parallelism.gpus_per_node=2", "--restarts", "5", "--grace", "300")
    (workers,) = manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (4, 4, "Indexed")
    # All other pods may fail before the one that is disrupted; a crash fails all.
    assert job["backoffLimit"] == 3
    (disrupted,) = job["podFailurePolicy"]["rules"]
    assert disrupted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = manifest["spec"]["failurePolicy"]["rules"]
    assert (disrupted["action"], rule["onJobFailureReasons"]) == ("FailJob", ["PodFailurePolicy"])
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 5
    (pod,) = pods(manifest)
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 300)
    (doctor,), (training,) = pod["initContainers"], pod["containers"]
    head = f"{manifest['metadata']['name']}-workers-0-0.{manifest['spec']['network']['subdomain']}"
    assert f"--head={head}:29500" in doctor["command"] and "--node=$(JOB_COMPLETION_INDEX)" in doctor["command"]
    assert f"--master-addr={head}" in training["command"]
    assert {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": "280"} in training["env"]


def test_a_pytorchjob_has_one_master_and_the_rest_as_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, manifest = written("--kind", "pytorchjob", "--nproc", "8", "--set", "parallelism.gpus_per_node=2")
    roles = manifest["spec"]["pytorchReplicaSpecs"]
    assert {role: each["replicas"] for role, each in roles.items()} == {"Master": 1, "Worker": 3}
    # The operator gives its variables to containers of this name alone.
    assert all(pod["containers"][0]["name"] == "pytorch" for pod in pods(manifest))
    _, alone = written("--kind", "pytorchjob", "-o", "alone")
    assert list(alone["spec"]["pytorchReplicaSpecs"]) == ["Master"]


def expanded(text: str) -> str:
    """A value as Kubernetes gives it to a container in which no variable is set: `$$` is `$`, `$(NAME)` stays."""
    return re.sub(r"\$\$|\$\([^)]*\)|\$", lambda match: "$" if match[0] == "$$" else f"<{match[0]}>", text)


@given(
    run=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30) | st.just("$(PATH)$$x"),
    value=st.text("$() abc'\"\n\\", max_size=30),
)
@settings(max_examples=20, deadline=None)
def test_no_value_is_expanded(run: str, value: str) -> None:
    spec = load(NANO)
    job = job_of(spec, Path("job"), f"/runs/{run}", environment={"A": value})
    for kind in KINDS:
        _, manifest = yaml.safe_load_all(files(job, Kubernetes(Pods("image"), kind))[-1].content)
        (container,) = pods(manifest)[0]["containers"]
        assert f"--out=/runs/{run}" in [expanded(word) for word in container["command"]]
        assert value in [expanded(each["value"]) for each in container["env"] if each["name"] == "A"]


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True))
def test_every_name_of_a_spec_becomes_one_of_an_object(name: str) -> None:
    made = object_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", made)
    # A pod of a JobSet is called like this, and must stay a label.
    assert len(f"{made}-workers-0-999999-xxxxx") <= 63


def test_threads_follow_from_the_processors_of_a_pod() -> None:
    job: Job = job_of(load(NANO, overrides=["parallelism.world_size=4"]), Path("job"))
    _, manifest = yaml.safe_load_all(files(job, Kubernetes(Pods("image", resources={"cpu": "48"})))[-1].content)
    assert {"name": "OMP_NUM_THREADS", "value": "12"} in pods(manifest)[0]["containers"][0]["env"]
