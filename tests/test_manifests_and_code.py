"""The Kubernetes manifests name only what the code has."""

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import ray
import yaml
from manifests import (
    DOCKERFILE,
    OVERLAYS,
    README,
    RENDERED,
    ROOT,
    clusters,
    containers,
    of,
    values,
    walk,
)
from pydantic import BaseModel
from ray._private import ray_constants
from ray.serve.schema import ServeDeploySchema

from ray_jobs import tune
from ray_jobs.job import run_job
from serve.app import ServeArgs, build_app
from tina.encoders import TABLE_FILE

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# --- what the manifests say of the code -----------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_versions_and_images_are_the_projects(overlay):
    stages = set(re.findall(r"^FROM runtime AS (\w+)$", DOCKERFILE, flags=re.MULTILINE))
    target = {"local": "cpu", "gpu": "cuda"}[overlay]
    assert target in stages
    found = list(clusters(overlay))
    assert len(found) == 6
    for cluster in found:
        assert cluster["rayVersion"] == ray.__version__
        images = {container["image"] for container in containers(cluster)}
        assert images == {f"tina:{PROJECT['version']}-{target}"}
        assert cluster["authOptions"]["mode"] == "token"
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (standing,) = of("RayCluster", overlay=overlay)
    assert {group["minReplicas"] for group in standing["spec"]["workerGroupSpecs"]} == {0}


def entrypoint(job):
    """Module and flags of a job, the image's files taken from here."""
    python, m, module, *argv = shlex.split(job["spec"]["entrypoint"])
    assert (python, m) == ("python", "-m")
    return module, [word.replace("/app/", f"{ROOT}/") for word in argv]


def dry_run(module, argv):
    if module == "ray_jobs.tune":
        return tune.main([*argv, "--dry-run"])
    return run_job(lambda run: None, [*argv, "--dry-run"], name=module, about="")


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("name", ["build-zoo", "train", "evaluate", "tune"])
def test_a_job_is_one_that_the_code_takes(overlay, name, capsys):
    (job,) = of("RayJob", name, overlay)
    module, argv = entrypoint(job)
    assert module == f"ray_jobs.{name.replace('-', '_')}"
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert dry_run(module, argv) == 0
    assert job["spec"]["entrypointNumCpus"] > 0, "the head has no CPU for the driver"
    assert dry_run(module, [*argv, "--cluster.zoo_worker", "8"]) == 2
    assert "valid keys" in capsys.readouterr().err


def test_the_image_holds_the_configurations_where_the_jobs_look():
    assert "\nWORKDIR /app\n" in DOCKERFILE
    assert DOCKERFILE.count("\nCOPY configs configs\n") == 2
    assert f'image.version="{PROJECT["version"]}"' in DOCKERFILE


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_jobs_and_endpoint_share_a_run_in_the_mounted_folder(overlay):
    homes = set()
    for name in ("build-zoo", "train", "evaluate"):
        _, argv = entrypoint(of("RayJob", name, overlay)[0])
        config = yaml.safe_load(Path(argv[argv.index("--config") + 1]).read_text())
        homes.add(f"{argv[argv.index('--storage') + 1]}/{config['name']}")
    (home,) = homes
    args = serve_args(overlay)
    assert args.checkpoint == f"{home}/checkpoint"
    mounts = {
        mount["mountPath"]
        for cluster in clusters(overlay)
        for container in containers(cluster)
        for mount in container["volumeMounts"]
    }
    assert mounts == {"/mnt/tina"}
    assert home.startswith("/mnt/tina/")
    assert args.storage.startswith("/mnt/tina/")


def test_training_begins_with_all_its_gpus():
    (job,) = of("RayJob", "train")
    (group,) = [
        g for g in job["spec"]["rayClusterSpec"]["workerGroupSpecs"] if g["groupName"] == "gpu"
    ]
    _, argv = entrypoint(job)
    ranks = int(argv[argv.index("--cluster.train_workers") + 1])
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == ranks


# --- Serve ----------------------------------------------------------------------------------------


def unknown(model, values, where=""):
    """Keys that Serve's schema would pass over."""
    for key, value in values.items():
        field = model.model_fields.get(key)
        if field is None:
            yield f"{where}{key}"
            continue
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
        for item in value if isinstance(value, list) else [value]:
            if inner and isinstance(item, dict):
                yield from unknown(inner[0], item, f"{where}{key}.")


def check_serve(values):
    """The applications' arguments; raises for what Serve or the application would not take."""
    ServeDeploySchema.model_validate(values)
    strange = list(unknown(ServeDeploySchema, values))
    if strange:
        raise ValueError(f"unknown: {', '.join(strange)}")
    (application,) = values["applications"]
    module, name = application["import_path"].split(":")
    builder = getattr(importlib.import_module(module), name)
    args = ServeArgs(**application["args"])
    assert builder is build_app
    builder(args)
    return args


def serve_config(overlay):
    return yaml.safe_load(of("RayService", overlay=overlay)[0]["spec"]["serveConfigV2"])


def serve_args(overlay):
    return check_serve(serve_config(overlay))


def serve_file(folder):
    text = (ROOT / "cluster" / folder / "serve.yaml").read_text()
    return yaml.safe_load(text.replace("@RUN@", "/run"))


@pytest.mark.parametrize(
    "config", [*map(serve_config, OVERLAYS), serve_file("local"), serve_file("launcher")]
)
def test_a_serve_configuration_is_one_that_serve_and_the_application_take(config):
    check_serve(config)


def test_the_endpoint_on_machines_in_a_cloud_is_the_one_on_kubernetes():
    assert serve_file("launcher") == serve_config("local")


@pytest.mark.parametrize(
    ("path", "key", "error"),
    [
        ("", "proxy_locations", ValueError),
        ("http_options", "prt", ValueError),
        ("applications.0", "route_prefx", ValueError),
        ("applications.0.args", "min_replica", ValueError),
        ("applications.0", "import_path", AttributeError),
    ],
)
def test_a_misspelt_key_of_serve_is_refused(path, key, error):
    config = serve_config("gpu")
    node = walk(config, [int(s) if s.isdigit() else s for s in path.split(".") if s])
    node[key] = "serve.app:build_ap"
    with pytest.raises(error, match="build_ap" if error is AttributeError else key):
        check_serve(config)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_endpoints_nodes_hold_its_replicas(overlay):
    (service,) = of("RayService", overlay=overlay)
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits, args = container["resources"]["limits"], serve_args(overlay)
    for nodes, replicas in (
        (group["minReplicas"], args.min_replicas),
        (group["maxReplicas"], min(args.max_replicas, group["maxReplicas"])),
    ):
        need = replicas * args.cpus + args.ingress_replicas * args.ingress_cpus
        assert need <= nodes * int(limits["cpu"])
        assert replicas * args.gpus <= nodes * int(limits.get("nvidia.com/gpu", 0))
    port = serve_config(overlay)["http_options"]["port"]
    assert {"name": "serve", "containerPort": port} in container["ports"]
    assert group["template"]["metadata"]["labels"]["tina/serves"] == "yes"


# --- what the documents say of each other ---------------------------------------------------------


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ports_are_rays_the_dockerfiles_and_serves(overlay):
    exposed = {int(port) for port in re.findall(r"^EXPOSE (.+)$", DOCKERFILE, re.M)[0].split()}
    known = {
        "gcs-server": ray_constants.DEFAULT_PORT,
        "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT,
        "client": 10001,
        "serve": 8000,
        "metrics": 8080,
    }
    assert exposed == set(known.values())
    for cluster in clusters(overlay):
        for ports in values(list(containers(cluster)), "ports"):
            assert all(known[port["name"]] == port["containerPort"] for port in ports)
    agent = f"localhost:{ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}"
    health = {
        f"http://{agent}/api/local_raylet_healthz",
        f"http://localhost:{ray_constants.DEFAULT_DASHBOARD_PORT}/api/gcs_healthz",
        "http://localhost:8000/-/healthz",
    }
    asked = {c[-1] for c in values(list(clusters(overlay)), "command") if c[0] == "wget"}
    assert asked == health
    assert f"http://{agent}/api/local_raylet_healthz" in DOCKERFILE
    for policy in of("NetworkPolicy", overlay=overlay):
        assert {p["port"] for ports in values(policy, "ports") for p in ports} <= exposed


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_secrets_are_references_that_the_readme_makes(overlay):
    assert not of("Secret", overlay=overlay)
    documents = RENDERED[overlay]
    used = {(r["name"], r["key"]) for r in values(documents, "secretKeyRef")}
    used |= {(name, "auth_token") for name in values(documents, "secretName")}
    made = set()
    for line in re.findall(r"create secret generic (.+)", README.replace("\\\n", " ")):
        name, *rest = line.split()
        made |= {(name, key) for key in re.findall(r"--from-literal=(\w+)=", " ".join(rest))}
    assert used == made
    claims = set(values(documents, "claimName"))
    assert claims == {d["metadata"]["name"] for d in of("PersistentVolumeClaim", overlay=overlay)}


def test_the_readmes_commands_fit_the_policies_and_the_data_the_code_reads():
    policies = of("NetworkPolicy")
    (operator,) = re.findall(r"helm install .* --namespace (\S+)", README)
    assert operator in values(policies, "kubernetes.io/metadata.name")
    copied = set(re.findall(r'cp -c ray-head "\$TINA_DATA/(\S+)" "\$HEAD":/mnt/tina/data', README))
    config = yaml.safe_load((ROOT / "configs" / "cifar100_cnn5k.yaml").read_text())
    assert copied == {config["data"]["name"], TABLE_FILE}
    (standing,) = of("RayCluster")
    (head,) = standing["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert head["name"] == "ray-head"
    assert {"name": "TINA_DATA", "value": "/mnt/tina/data"} in head["env"]


def test_variables_of_containers_are_read_by_the_code():
    code = "".join(
        file.read_text()
        for part in ("tina", "ray_jobs", "serve")
        for file in (ROOT / part).glob("*.py")
    )
    names = {v["name"] for env in values(list(clusters("gpu")), "env") for v in env}
    names |= set(re.findall(r"\b(TINA_\w+)=", DOCKERFILE))
    assert names == {"TINA_DATA", "TINA_SERVE_TOKEN", "TINA_SERVE_KEY", "TINA_COMMIT"}
    for name in names:
        assert f'"{name}"' in code, name
