"""What the overlays of cluster/kuberay come to: Kustomize, as far as they use it."""

import copy
import json
import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
KUBERAY = ROOT / "cluster" / "kuberay"
DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
README = (ROOT / "cluster" / "README.md").read_text()
OVERLAYS = ("local", "gpu")


def read(text):
    """The documents of a YAML text, by the fast reader."""
    return list(yaml.load_all(text, Loader=yaml.CSafeLoader))


def steps(path):
    """A field path of a replacement: a.b.[name=x].c, or of a patch: /a/b/0/c."""
    if path.startswith("/"):
        return [int(x) if x.isdigit() else x for x in path[1:].split("/")]
    return re.findall(r"\[[^\]]*\]|[^.\[\]]+", path)


def child(node, step):
    if isinstance(step, str) and step.startswith("["):
        key, value = step[1:-1].split("=")
        (found,) = [item for item in node if item[key] == value]
        return found
    return node[step]


def walk(node, path):
    for step in path:
        node = child(node, step)
    return node


def patch(document, operation):
    """One operation of a JSON patch, on what must be there."""
    *way, last = steps(operation["path"])
    parent = walk(document, way)
    if operation["op"] != "add":
        child(parent, last)
    if operation["op"] == "remove":
        del parent[last]
    else:
        assert operation["op"] in ("add", "replace")
        parent[last] = operation["value"]


def containers(node):
    """Every container below a node, with those of pod templates within custom kinds."""
    if isinstance(node, dict):
        yield from node.get("containers", [])
        for value in node.values():
            yield from containers(value)
    elif isinstance(node, list):
        for item in node:
            yield from containers(item)


def render(folder):
    """What `kubectl kustomize` makes of a folder."""
    plan = read((folder / "kustomization.yaml").read_text())[0]
    assert (plan.pop("kind"), plan.pop("apiVersion").split("/")[0]) == (
        "Kustomization",
        "kustomize.config.k8s.io",
    )
    documents = []
    for name in plan.pop("resources"):
        path = (folder / name).resolve()
        documents += render(path) if path.is_dir() else read(path.read_text())
    # an alias is one object in Python, and a patch must not reach its twins
    documents = [json.loads(json.dumps(document)) for document in documents]

    def select(target):
        def fits(document):
            return document["kind"] == target["kind"] and target.get("name") in (
                None,
                document["metadata"]["name"],
            )

        found = [document for document in documents if fits(document)]
        assert found, f"nothing is {target}"
        return found

    for change in plan.pop("patches", []):
        source = (folder / change["path"]).read_text() if "path" in change else change["patch"]
        for document in select(change["target"]):
            for operation in read(source)[0]:
                patch(document, copy.deepcopy(operation))
    namespace = plan.pop("namespace", None)
    pairs = {k: v for entry in plan.pop("labels", []) for k, v in entry["pairs"].items()}
    for document in documents:
        if namespace and document["kind"] != "Namespace":
            document["metadata"]["namespace"] = namespace
        document["metadata"]["labels"] |= pairs
    for image in plan.pop("images", []):
        for container in containers(documents):
            name, _, _ = container["image"].partition(":")
            if name == image["name"]:
                container["image"] = f"{name}:{image['newTag']}"
    for change in plan.pop("replacements", []):
        (source,) = select({k: v for k, v in change["source"].items() if k != "fieldPath"})
        value = walk(source, steps(change["source"]["fieldPath"]))
        for target in change["targets"]:
            for document in select(target["select"]):
                for path in target["fieldPaths"]:
                    *way, last = steps(path)
                    parent = walk(document, way)
                    assert target.get("options", {}).get("create") or last in parent, path
                    parent[last] = copy.deepcopy(value)
    assert not plan, f"this is not read: {plan}"
    return documents


RENDERED = {name: render(KUBERAY / "overlays" / name) for name in OVERLAYS}


def of(kind, name=None, overlay="gpu"):
    found = [d for d in RENDERED[overlay] if d["kind"] == kind]
    return [d for d in found if name in (None, d["metadata"]["name"])]


def pod_templates(node):
    """The templates of Ray's groups."""
    if isinstance(node, dict):
        if "template" in node:
            yield node["template"]
        for value in node.values():
            yield from pod_templates(value)
    elif isinstance(node, list):
        for item in node:
            yield from pod_templates(item)


def values(node, key):
    """Every value of a key, at any depth."""
    if isinstance(node, dict):
        yield from ([node[key]] if key in node else [])
        for value in node.values():
            yield from values(value, key)
    elif isinstance(node, list):
        for item in node:
            yield from values(item, key)


def clusters(overlay):
    for document in RENDERED[overlay]:
        for key in ("rayClusterSpec", "rayClusterConfig"):
            if key in document.get("spec", {}):
                yield document["spec"][key]
        if document["kind"] == "RayCluster":
            yield document["spec"]
