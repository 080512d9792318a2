"""The Kubernetes manifests: what the overlays come to is valid, and a typo is not."""

import copy
import json
import re
import shutil
import subprocess

import jsonschema
import kubernetes_validate
import pytest
from manifests import (
    KUBERAY,
    OVERLAYS,
    RENDERED,
    ROOT,
    containers,
    of,
    pod_templates,
    read,
    render,
    steps,
    walk,
)

SCHEMA = json.loads((ROOT / "cluster" / "schemas" / "kuberay.json").read_text())
KUBERNETES = "1.34"
EVERY = [
    pytest.param(d, id=f"{name}-{d['kind']}-{d['metadata']['name']}")
    for name, documents in RENDERED.items()
    for d in documents
]


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl to compare with")
def test_the_rendering_here_is_kustomizes(overlay):
    command = ["kubectl", "kustomize", str(KUBERAY / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    def keyed(documents):
        return {(d["kind"], d["metadata"]["name"]): d for d in documents}

    assert keyed(read(done.stdout)) == keyed(RENDERED[overlay])


def test_every_file_takes_part():
    for folder in [KUBERAY / "base", *(KUBERAY / "overlays" / name for name in OVERLAYS)]:
        plan = (folder / "kustomization.yaml").read_text()
        for file in folder.glob("*.yaml"):
            assert file.name == "kustomization.yaml" or re.search(rf"[ :]{file.name}\n", plan), file


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("../../base", "../../bass"),
        ("path: storage.yaml", "path: storrage.yaml"),
        ("kind: RayService, name: endpoint", "kind: RayService, name: endpiont"),
        ("fieldPath: spec}", "fieldPath: spek}"),
        ("patches:", "patchez:"),
        ("/spec/accessModes", "/spec/accessMode"),
    ],
)
def test_a_plan_that_names_what_is_not_there_is_refused(tmp_path, old, new):
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    folder = tmp_path / "kuberay" / "overlays" / "local"
    render(folder)
    texts = {file: file.read_text() for file in folder.glob("*.yaml")}
    assert sum(text.count(old) for text in texts.values()) == 1
    for file, text in texts.items():
        file.write_text(text.replace(old, new))
    with pytest.raises((AssertionError, FileNotFoundError, KeyError)):
        render(folder)


# --- the kinds ------------------------------------------------------------------------------------


def check(document):
    """Raises for what a server would refuse, or drop without a word."""
    kind = document["kind"]
    if document["apiVersion"] != "ray.io/v1":
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    jsonschema.Draft202012Validator(SCHEMA | {"$ref": f"#/$defs/{kind}"}).validate(document)
    for template in pod_templates(document["spec"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {}, **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


REFUSED = (jsonschema.ValidationError, kubernetes_validate.ValidationError)


@pytest.mark.parametrize("document", EVERY)
def test_a_document_is_valid(document):
    check(document)


@pytest.mark.parametrize(
    ("kind", "path", "typo"),
    [
        ("RayCluster", "", "specs"),
        ("RayCluster", "spec", "enableIntreeAutoscaling"),
        ("RayCluster", "spec.authOptions", "secret"),
        ("RayCluster", "spec.autoscalerOptions", "idleTimeoutSecond"),
        ("RayCluster", "spec.workerGroupSpecs.[groupName=cpu]", "minReplica"),
        ("RayCluster", "spec.headGroupSpec.template.spec", "volume"),
        ("RayCluster", "spec.headGroupSpec.template.spec.containers.[name=ray-head]", "livenes"),
        ("RayJob", "spec", "backOffLimit"),
        (
            "RayJob",
            "spec.rayClusterSpec.workerGroupSpecs.[groupName=gpu].template.spec",
            "toleration",
        ),
        ("RayService", "spec", "serveConfigV3"),
        ("RayService", "spec.upgradeStrategy", "typ"),
        ("RayService", "spec.rayClusterConfig.gcsFaultToleranceOptions", "redisAdress"),
        ("Deployment", "spec.template.spec.containers.[name=redis]", "readynessProbe"),
        ("Service", "spec", "selektor"),
        ("NetworkPolicy", "spec", "ingres"),
        ("PodDisruptionBudget", "spec", "minAvailible"),
        ("PersistentVolumeClaim", "spec", "accessMode"),
        ("Namespace", "metadata", "label"),
    ],
)
def test_a_misspelt_key_is_refused(kind, path, typo):
    document = copy.deepcopy(of(kind)[0])
    check(document)
    walk(document, steps(path))[typo] = {}
    with pytest.raises(REFUSED, match=typo):
        check(document)


@pytest.mark.parametrize("document", EVERY)
def test_containers_are_bounded_watched_and_unprivileged(document):
    for container in containers(document):
        resources = container["resources"]
        assert resources["requests"].keys() >= {"cpu", "memory"}
        assert resources["limits"].keys() >= {"memory"}
        assert container.keys() >= {"livenessProbe", "readinessProbe"}
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
    for template in pod_templates(document.get("spec", {})):
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
