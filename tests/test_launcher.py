"""Launcher files, local cluster, image: valid, and with the project's own names."""

import copy
import json
import math
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
from manifests import DOCKERFILE, KUBERAY, README, RENDERED, ROOT, read, values
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

SCHEMA = json.loads((ROOT / "cluster" / "schemas" / "launcher.json").read_text())
LOCAL = ROOT / "cluster" / "local"
BIN = Path(sys.executable).parent
CLOUDS = ("aws", "gcp")
FIRST = "initialization_commands"


def launcher(cloud):
    return read((ROOT / "cluster" / "launcher" / f"{cloud}.yaml").read_text())[0]


def check(config):
    """Ray's own validator, then what it leaves to the cloud."""
    validate_config(prepare_config(copy.deepcopy(config)))
    nodes = {name: node["node_config"] for name, node in config["available_node_types"].items()}
    schema = SCHEMA | {"$ref": f"#/$defs/{config['provider']['type']}"}
    document = {"provider": config["provider"], "nodes": nodes}
    jsonschema.Draft202012Validator(schema).validate(document)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_launcher_file_is_valid(cloud):
    check(launcher(cloud))


@pytest.mark.parametrize("cloud", CLOUDS)
@pytest.mark.parametrize(
    ("way", "typo"),
    [
        ([], "idle_timeout_minute"),
        (["auth"], "ssh_usr"),
        (["provider"], "regoin"),
        (["available_node_types", "cpu"], "min_worker"),
        (["available_node_types", "gpu", "node_config"], "machine"),
    ],
)
def test_a_misspelt_key_is_refused(cloud, way, typo):
    config = launcher(cloud)
    node = config
    for step in way:
        node = node[step]
    node[typo] = 1
    with pytest.raises(jsonschema.ValidationError, match=typo):
        check(config)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_head_works_not_and_workers_come_from_nothing_and_from_spot(cloud):
    config = launcher(cloud)
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    assert config["idle_timeout_minutes"] > 0
    assert types["gpu"]["resources"]["GPU"] == 1
    for name in ("cpu", "gpu"):
        assert types[name]["min_workers"] == 0
        node = types[name]["node_config"]
        spot = node.get("InstanceMarketOptions") == {"MarketType": "spot"}
        assert spot or {"preemptible": True} in node["scheduling"]
    assert sum(types[name]["max_workers"] for name in ("cpu", "gpu")) == config["max_workers"]


@pytest.mark.parametrize("cloud", CLOUDS)
def test_nodes_install_what_is_locked(cloud):
    config = launcher(cloud)
    commands = "\n".join(config["setup_commands"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {"Makefile", "pyproject.toml", "requirements.lock", project["project"]["readme"]}
    needed |= set(project["project"]["license-files"])
    needed |= set(project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
    assert all((ROOT / name).exists() for name in needed)
    needed.add("cluster/observability")  # what Prometheus reads on the head
    # no more than these: `ray up` reads every file below what is mounted
    token = {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert config["file_mounts"] == {f"~/tina/{name}": name for name in needed} | token
    assert "make -C ~/tina install" in commands
    recipe = (ROOT / "Makefile").read_text().split("$(STAMP):")[1].split("\n\n")[0]
    assert "-r requirements.lock" in recipe
    # as the Makefile says where the operator is compiled
    makefile = (ROOT / "Makefile").read_text()
    assert "VENV := .venv\n" in makefile
    assert "TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions" in makefile
    assert "TORCH_EXTENSIONS_DIR=$HOME/tina/.venv/torch_extensions" in commands
    assert "RAY_AUTH_MODE=token" in commands
    # a list of a node type's own would take the place of these, and nothing would be installed
    for node in config["available_node_types"].values():
        assert "worker_setup_commands" not in node


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_fresh_node_waits_for_apt_and_may_write_to_the_share(cloud):
    config = launcher(cloud)
    wait, apt, mount, owner, *_ = config["setup_commands"]
    assert wait.startswith("cloud-init status --wait")
    assert "mount -t nfs" in mount
    # basic tiers of Filestore know version 3 only
    assert ("nfsvers" in mount) == (cloud == "aws")
    assert owner == f"sudo chown {config['auth']['ssh_user']}: /mnt/tina"
    # those that go where there is no share
    named = [c for c in config["setup_commands"] if "sudo" in c and "/mnt/tina" in c]
    assert named == [mount, owner]
    assert "the two lines of `setup_commands` that name `sudo` and `/mnt/tina`" in README
    first = [x for n in config["available_node_types"].values() for x in values(n, FIRST)]
    for command in [apt, *(line for lines in first for line in lines)]:
        assert command.count("apt-get") == command.count("apt-get -o DPkg::Lock::Timeout=") == 2


def test_efs_can_let_the_nodes_in_before_they_are_there():
    """Ray makes a group of its own only in `ray up`; one of this name it takes, for all nodes."""
    config = launcher("aws")
    group = config["provider"]["security_group"]["GroupName"]
    assert f"security group `{group}` without inbound" in README
    for node in config["available_node_types"].values():
        assert "SecurityGroupIds" not in node["node_config"]


def test_the_module_of_the_gpus_driver_is_the_running_kernels():
    gpu = launcher("gcp")["available_node_types"]["gpu"]
    (install,) = gpu[FIRST]
    (series,) = re.findall(r"linux-modules-nvidia-(\d+-server)-\$\(uname -r\) ", install)
    for part in ("headless-no-dkms", "utils"):
        assert f" nvidia-{part}-{series} " in install


def flags(text):
    """The flags of `ray start` in a text."""
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


STARTS = [
    *(
        "\n".join(launcher(c)[f"{n}_start_ray_commands"])
        for c in CLOUDS
        for n in ("head", "worker")
    ),
    "\n".join(
        re.findall(
            r"^start .*(?:\\\n.*)*|setsid ray start(?:.*\\\n)+", (LOCAL / "up.sh").read_text(), re.M
        )
    ),
    DOCKERFILE.split("\nCMD ")[1].split("\n")[0],
]


@pytest.mark.parametrize("text", STARTS)
def test_flags_of_ray_start_exist(text):
    known = {option for parameter in ray_start.params for option in parameter.opts}
    assert len(flags(text)) >= 3
    assert flags(text) <= known
    assert "--num-cpu" not in known


# --- the image ------------------------------------------------------------------------------------


def test_the_image_is_built_of_what_is_let_in():
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert all((ROOT / name).exists() for name in allowed)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {*project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], "configs"}
    needed |= {"pyproject.toml", "requirements.lock", project["project"]["readme"]}
    assert needed | set(project["project"]["license-files"]) == allowed
    python = re.findall(r"^ARG PYTHON=([\d.]+)$", DOCKERFILE, re.M)[0]
    classifiers = project["project"]["classifiers"]
    assert f"Programming Language :: Python :: {python}" in classifiers


def test_the_image_installs_what_is_locked_and_runs_as_nobody_in_particular():
    installs = [x for x in DOCKERFILE.replace("\\\n", " ").splitlines() if "uv pip install" in x]
    assert len(installs) == 3
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for line in installs[:2]:
        assert line.count("-c requirements.lock") == 2
        assert set(re.findall(r"--extra (\w+)", line)) == set(extras) - {"dev"}
    assert "--no-deps" in installs[2]
    for target in ("cpu", "cuda"):
        stage = DOCKERFILE.split(f"FROM runtime AS {target}\n")[1].split("\nFROM ")[0]
        assert stage.rstrip().endswith("USER 1000")
    # the last stage is CUDA's; an image that says which GPUs gives them to whoever asked for none
    assert "ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility\n" in stage
    assert "NVIDIA_VISIBLE_DEVICES" not in DOCKERFILE
    assert "TORCH_EXTENSIONS_DIR=" in DOCKERFILE
    assert "HEALTHCHECK" in DOCKERFILE
    # a head that is reached without a token runs anyone's code
    starts = re.findall(r"^docker run .*", README, re.M)
    assert starts
    assert all("-e RAY_AUTH_MODE=token -e RAY_AUTH_TOKEN=" in line for line in starts)
    assert f"ray[data,train,serve,tune]=={ray.__version__}" in (ROOT / "pyproject.toml").read_text()


# --- linters --------------------------------------------------------------------------------------


def lint(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_scripts_and_dockerfile_are_clean_and_a_fault_is_seen(tmp_path):
    recipe = (ROOT / "Makefile").read_text().split("\ncheck: ")[1].split("\n\n")[0]
    assert "shellcheck --external-sources .ci/run cluster/local/*.sh" in recipe
    assert "hadolint cluster/Dockerfile" in recipe
    scripts = [str(file) for file in LOCAL.glob("*.sh")]
    assert len(scripts) == 4
    shellcheck = [str(BIN / "shellcheck"), "--external-sources"]
    done = lint(*shellcheck, ".ci/run", *scripts)
    assert done.returncode == 0, done.stdout
    script = tmp_path / "up.sh"
    script.write_text(
        (LOCAL / "up.sh").read_text().replace('"$STATE/$node.pid"', "$STATE/$node.pid")
    )
    assert "SC2086" in lint(*shellcheck, str(script)).stdout
    done = lint(str(BIN / "hadolint"), "cluster/Dockerfile")
    assert done.returncode == 0, done.stdout
    image = tmp_path / "Dockerfile"
    image.write_text(DOCKERFILE.replace("--no-install-recommends ", ""))
    assert "DL3015" in lint(str(BIN / "hadolint"), str(image)).stdout


# --- the local cluster and its README -------------------------------------------------------------


def test_nodes_have_ports_of_their_own():
    env = (LOCAL / "env.sh").read_text()
    bases = [int(base) for base in re.findall(r"\) echo (\d+) ;;", env)]
    up = (LOCAL / "up.sh").read_text()
    offsets = [int(x) for x in re.findall(r"\$\(\(base \+ (\d+)\)\)", up)]
    assert sorted(set(offsets)) == sorted(offsets)
    used = [base + offset for base in bases for offset in (0, *offsets[:-2])]
    for base in bases:
        used += range(base + offsets[-2], base + offsets[-1] + 1)
    assert len(set(used)) == len(used)
    assert int(re.findall(r"SERVE_PORT=(\d+)", env)[0]) == 8000


def test_the_walkthrough_leaves_room_for_a_lost_node():
    """What remains on one worker holds the endpoint, and the job a worker at least."""
    from serve.app import ServeArgs

    up, walk = (LOCAL / "up.sh").read_text(), (LOCAL / "walkthrough.sh").read_text()
    cpus = int(re.findall(r"TINA_WORKER_CPUS:-(\d+)", up)[0])
    (config,) = read((LOCAL / "serve.yaml").read_text())
    args = ServeArgs(**config["applications"][0]["args"])
    endpoint = args.max_replicas * args.cpus + args.ingress_replicas * args.ingress_cpus
    assert endpoint + 1 <= cpus
    rank = float(re.findall(r"--cluster\.train_cpus (\S+)", walk)[0])
    assert cpus / 2 < rank <= cpus - 1, "one rank to a node, and a CPU left for the reader"


def commands(text):
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return "\n".join(blocks).replace("\\\n", " ")


def test_what_the_readme_names_is_there():
    text = commands(README)
    for path in re.findall(r"\b(?:cluster|configs)/[\w./-]+", text):
        assert (ROOT / path).exists(), path
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / "cluster" / link).exists(), link
    parts = {d["metadata"]["labels"]["app.kubernetes.io/component"] for d in RENDERED["local"]}
    named = {
        *re.findall(r"component=([\w-]+)", text),
        *re.findall(r"part in ([^;]+);", text)[0].split(),
    }
    assert named == parts - {"tune"}
    assert "`tune`" in README


def rows(benchmark):
    text = (ROOT / "benchmarks" / "results" / f"{benchmark}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_sizes_are_what_the_sources_say():
    table = README.split("## Sizes")[1]
    step = rows("classifier_step")[0]["ms_per_model_step"]["bf16 loop"]
    assert f"| {step:.1f} ms on one core |" in table
    report = json.loads((ROOT / "docs/results/cifar100_cnn5k/report.json").read_text())
    alone = report["timing"]["finetune_s_per_model"]
    assert f"| {alone:.0f} s a model, alone on both cores | E |" in table
    assert f"| {2106 * 2 / 122:.0f} s a model (122 in 2,106 s on two workers) | C |" in table
    size = report["generator"]["parameters"]
    assert f"generator of {size:,} parameters" in table
    (load,) = [row for row in rows("serve_load") if row["commit"] == "cfbf15c64e7b"]  # machine B
    assert (load["ha_proxy"], load["throughput_optimized"]) == ("1", "1")
    assert (load["replicas"], load["threads"]) == (2, 1)
    rate, p99 = (load["clients_32"][key] for key in ("models_per_s", "p99_ms"))
    assert f"| {rate:.1f} models/s, p99 {p99:,.0f} ms, on both cores" in table
    busy = load["cpu_ms_per_model"]["Ingress"]
    assert f"| {busy:.1f} ms | B |" in table
    scaling = rows("zoo_scaling")
    twice = sorted(row["two_over_one"] for row in scaling if "Intel" in row["hardware"])
    assert f"| {twice[0]} to {twice[-1]} times one | C |" in table
    peaks = sorted(peak for row in scaling for peak in row["peak_mib_of_a_worker"].values())
    assert f"| {peaks[0]} to {peaks[-1]} MiB, for 24 p-models as for 240 |" in table
    assert all(set(row["peak_mib_of_a_worker"]) == {"24", "240"} for row in scaling)
    log = (ROOT / "docs/log.md").read_text()
    for words in (
        r"zoo\s4, generator 18",
        r"generator 14\.5 minutes, direct",
        r"took 18\.6 to 27 ms",
        r"122 models in 2,106 s",
        r"5 to 8 ms.*0\.7 ms",
    ):
        assert re.search(words, log), words
    assert re.search(r"1,000 p-models of CNN-5K are 21 MB", (ROOT / "docs/design.md").read_text())
    # the arithmetic of what is extrapolated
    models, cores, minutes = 10_000, 32, 4
    each = minutes * 60 * 2 / 80
    assert f"{models:,} x {each:.0f} s = {models * each:,.0f} s" in table
    assert f"/ {cores} = {models * each / cores / 60:.0f} min" in table
    growth = 640e6 / size
    assert f"640M / {size / 1e6:.2f}M = {growth:.0f}; {15 / 60 * 2:g} x {growth:.0f}" in table
    assert f"| {15 / 60 * 2 * growth:.0f} core-hours" in table
    parted, whole = 5 * 4 * 640e6 / 1e9, 2 * 4 * 640e6 / 1e9
    assert f"| {parted + whole:.0f} GB a rank without ZeRO" in table
    assert f"on 8 ranks {parted / 8 + whole:.0f} GB, {whole:.0f} of them" in table
    assert f"| {2 * 20 * 640e6 / 1e9:.0f} GB for two states" in table
    alone = load["bare"]["alone"]["p50_ms"]
    growth = 640e6 / 2_490_913  # the generator of that row
    assert f"| {alone * growth / 1000:.0f} s on two cores of B" in table
    assert f"{alone} ms (bare pipeline" in table
    cores, per_ingress = round(1000 / rate * 2), 1000 / busy
    assert f"1,000 / {rate} x 2 = {cores}; {cores} x 4 / 3 = {cores * 4 // 3}" in table
    ingresses = math.ceil(1000 / per_ingress * 4 / 3)
    assert f"1,000 / {per_ingress:.0f} x 4 / 3 = {ingresses} of half a CPU" in table
    nodes = math.ceil((cores * 4 // 3 + ingresses / 2) / 2)
    asked = f"`max_replicas: {cores * 4 // 3}`, `ingress_replicas: {ingresses}`"
    assert f"{asked}, `maxReplicas: {nodes}` of two CPUs" in table
    service = (KUBERAY / "base" / "rayservice.yaml").read_text()
    for name in ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
        assert f"`{name}`" in table
        assert name not in service
