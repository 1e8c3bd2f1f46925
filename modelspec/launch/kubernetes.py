"""Kubernetes: a JobSet, or a PyTorchJob where that operator is what the cluster has.

One pod is one machine. The manifest brings the spec along as a ConfigMap, and the run lives on a claim that all pods
mount at /runs. Programs are started without a shell. Kubernetes itself expands `$(NAME)` and reads `$$` as `$`, so
values write `$$`. An init container holds every pod until it is fit and reaches the first one.

In a JobSet the failure of all pods, or a disruption of one, fails the Job, and the whole set starts again, since ranks
cannot go on without one another: as often as it takes where a pod was preempted, evicted or drained (its condition is
DisruptionTarget), else `restarts` times.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from modelspec.launch.job import File, Job
from modelspec.launch.yaml import document

Kind = Literal["jobset", "pytorchjob"]

MOUNT = "/runs"
SPEC = "/etc/modelspec/spec.yaml"
_PORT = 29500
_PATIENCE = 1800  # seconds for all pods to find a machine
_SHARED_MEMORY = "16Gi"  # NCCL's and the data loaders'; containers have 64 MiB otherwise
# Of a name, so that those of pods, which JobSet derives, stay within 63 characters.
_LONGEST_NAME = 40


@dataclass(frozen=True, slots=True)
class Pods:
    """What pods are made of: an image with modelspec in it, the claim that holds runs, and further resources."""

    image: str
    claim: str = "runs"
    restarts: int = 3
    resources: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


def kubernetes_files(job: Job, pods: Pods, kind: Kind) -> list[File]:
    """jobset.yaml or pytorchjob.yaml: a ConfigMap with the spec, and the job."""
    name = object_name(job.name)
    spec = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"spec.yaml": job.spec},
    }
    manifest = _jobset(job, pods, name) if kind == "jobset" else _pytorchjob(job, pods, name)
    return [File(f"{kind}.yaml", "---\n".join(map(document, (spec, manifest))))]


def object_name(name: str) -> str:
    """The name of a spec as one of Kubernetes' objects may have it (RFC 1035)."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower())
    return re.sub(r"^(?![a-z])", "m-", plain)[:_LONGEST_NAME].strip("-")


def _jobset(job: Job, pods: Pods, name: str) -> dict[str, Any]:
    head = f"{name}-workers-0-0.{name}"
    template = {
        # When one pod is disrupted, all others save and end too, perhaps before it: they must not fail the Job first.
        "backoffLimit": job.nodes - 1,
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "podFailurePolicy": {
            "rules": [{"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
        },
        "template": {
            "spec": {
                "restartPolicy": "Never",
                **_pod(job, pods, name, head, str(_PORT), node="$(JOB_COMPLETION_INDEX)", reach=True),
            }
        },
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
            "failurePolicy": {
                "maxRestarts": pods.restarts,
                "rules": [
                    {
                        "name": "disrupted",
                        "action": "RestartJobSetAndIgnoreMaxRestarts",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "successPolicy": {"operator": "All"},
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": template}}],
        },
    }


def _pytorchjob(job: Job, pods: Pods, name: str) -> dict[str, Any]:
    # The operator gives the first pod's address, port and each pod's number to the container named pytorch alone,
    # and has an init container of its own that waits for the first pod's name.
    pod = _pod(job, pods, name, "$(MASTER_ADDR)", "$(MASTER_PORT)", node="$(RANK)", reach=False)
    replicas = {"Master": 1} | ({"Worker": job.nodes - 1} if job.nodes > 1 else {})
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": name},
        "spec": {
            "nprocPerNode": str(job.processes),
            "runPolicy": {"backoffLimit": pods.restarts, "cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": {
                role: {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}
                for role, count in replicas.items()
            },
        },
    }


def _pod(job: Job, pods: Pods, name: str, head: str, port: str, *, node: str, reach: bool) -> dict[str, Any]:
    """The spec of a pod: a look at the machine, then training."""
    resources = dict(pods.resources)
    if job.device == "cuda":
        resources = {"nvidia.com/gpu": str(job.processes)} | resources
    common = {
        "image": pods.image,
        **({"resources": {"limits": resources}} if resources else {}),
        "volumeMounts": [
            {"name": "spec", "mountPath": SPEC.rpartition("/")[0], "readOnly": True},
            {"name": "runs", "mountPath": MOUNT},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
        "env": _environment(job, pods),
    }
    doctor = ["python", *_literal(job.doctor(SPEC))]
    if reach:
        doctor += [f"--head={head}:{port}", f"--nodes={job.nodes}", f"--node={node}", f"--patience={_PATIENCE}"]
    train = [
        *("python", "-m", "torch.distributed.run"),
        *(f"--nnodes={job.nodes}", f"--nproc-per-node={job.processes}", "--max-restarts=0"),
        *(f"--node-rank={node}", f"--master-addr={head}", f"--master-port={port}"),
        *_literal(job.train(SPEC)),
    ]
    return {
        "terminationGracePeriodSeconds": job.grace,
        "initContainers": [{"name": "doctor", "command": doctor, **common}],
        "containers": [
            {"name": "pytorch", "command": train, "ports": [_port()], **common},
        ],
        "volumes": [
            {"name": "spec", "configMap": {"name": name}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": pods.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": _SHARED_MEMORY}},
        ],
    }


def _port() -> dict[str, Any]:
    return {"name": "pytorchjob-port", "containerPort": _PORT}


def _environment(job: Job, pods: Pods) -> list[dict[str, str]]:
    # Tokenizers and tokenized text are kept with the runs: a pod's own disk goes with it.
    found = {"MODELSPEC_CACHE": f"{MOUNT}/.cache", **job.variables()}
    if re.fullmatch(r"[1-9]\d*", cores := pods.resources.get("cpu", "")):
        found["OMP_NUM_THREADS"] = str(max(int(cores) // job.processes, 1))
    return [{"name": key, "value": value.replace("$", "$$")} for key, value in (found | dict(job.environment)).items()]


def _literal(words: list[str]) -> list[str]:
    """Words in which Kubernetes expands nothing."""
    return [word.replace("$", "$$") for word in words]
