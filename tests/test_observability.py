"""Dashboards, alerts and scrape configuration: valid, and built on metrics that exist."""

import copy
import json
import mmap
import re
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import ray
from manifests import README, ROOT, clusters, containers, of, read, values

from serve import metrics as serve_metrics
from serve.bodies import READ_S

FOLDER = ROOT / "cluster" / "observability"
SCHEMA = json.loads((ROOT / "cluster" / "schemas" / "monitoring.json").read_text())
BOARDS = {file.stem: json.loads(file.read_text()) for file in FOLDER.glob("*.json")}
(RULES,) = read((FOLDER / "alerts.yaml").read_text())
(MONITOR,) = read((FOLDER / "podmonitor.yaml").read_text())
(CONFIG,) = read((FOLDER / "prometheus.yaml").read_text())
RAY = Path(ray.__file__).parent
# From KubeRay's reference of its operator's metrics; the operator is not at hand to be asked.
KUBERAY = {"kuberay_job_deployment_status": {"name", "namespace", "deployment_status"}}
FUNCTIONS = {
    "histogram_quantile",
    "max_over_time",
    "last_over_time",
    "rate",
    "increase",
    "sum",
    "max",
}
FUNCTIONS |= {"min", "avg", "count"}


def check(name, document):
    jsonschema.Draft202012Validator(SCHEMA | {"$ref": f"#/$defs/{name}"}).validate(document)


def wrapped():
    """The README's lines that make a PrometheusRule of the rules, done in Python."""
    assert "sed 's/^/  /' cluster/observability/alerts.yaml" in README
    (head,) = re.findall(r"printf '(apiVersion: monitoring[^']+)'", README)
    rules = (FOLDER / "alerts.yaml").read_text()
    return read(head.replace("\\n", "\n") + "".join(f"  {line}\n" for line in rules.splitlines()))[
        0
    ]


DOCUMENTS = {
    "rules": RULES,
    "PodMonitor": MONITOR,
    "PrometheusRule": wrapped(),
    "config": CONFIG,
    "dashboard": BOARDS["endpoint"],
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_are_valid(name):
    check(name, DOCUMENTS[name])
    for board in BOARDS.values():
        check("dashboard", board)
    assert set(BOARDS) == {"endpoint", "jobs"}


@pytest.mark.parametrize(
    ("name", "way", "typo"),
    [
        ("rules", ["groups", 0, "rules", 0], "fore"),
        ("PrometheusRule", ["spec"], "group"),
        ("PodMonitor", ["spec", "podMetricsEndpoints", 0], "prt"),
        ("config", ["scrape_configs", 0], "file_sd_config"),
        ("dashboard", ["panels", 0, "targets", 0], "expression"),
    ],
)
def test_a_misspelt_key_is_refused(name, way, typo):
    document = copy.deepcopy(DOCUMENTS[name])
    node = document
    for step in way:
        node = node[step]
    node[typo] = 1
    with pytest.raises(jsonschema.ValidationError, match=typo):
        check(name, document)


# --- metrics --------------------------------------------------------------------------------------


def queries():
    for board in BOARDS.values():
        for panel in board["panels"]:
            yield from (target["expr"] for target in panel["targets"])
    for group in RULES["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def plain(query):
    """A query without strings and label matchers."""
    return re.sub(r"\{[^}]*\}", "", query)


def metrics(query):
    """The names of what is measured: what is neither a label nor a function."""
    bare = re.sub(r"\b(?:by|on) \([^)]*\)", "", re.sub(r"\[\w+\]", "", plain(query)))
    return set(re.findall(r"\b[a-z][a-z_]*_[a-z_]+\b", bare)) - FUNCTIONS


def labels(query):
    """The labels that a query groups or selects by."""
    grouped = [
        x.strip() for part in re.findall(r"\b(?:by|on) \(([^)]*)\)", query) for x in part.split(",")
    ]
    selected = re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', query)
    return set(grouped + selected) - {"le"}


def text_of(*folders):
    return "".join(file.read_text() for f in folders for file in sorted((RAY / f).rglob("*.py")))


CODE = text_of(
    "dashboard/modules/metrics",
    "dashboard/modules/reporter",
    "serve/_private",
    "train/v2/_internal/metrics",
    "data/_internal",
)


def rays_names():
    """Metrics in the installed Ray's Python code: those of its own dashboards, and strings."""
    shown = re.findall(r"\bray_(\w+)", text_of("dashboard/modules/metrics"))
    protocols = {
        "serve_num_{}_requests",
        "serve_num_{}_error_requests",
        "serve_{}_request_latency_ms",
    }
    made = {p.format("http") for p in protocols if f'f"{p.format("{protocol_name}")}"' in CODE}
    return set(shown) | set(re.findall(r'"(\w+)"', CODE)) | made


def in_the_control_plane(name):
    """Whether the server's binary has the word: what it measures itself is not in Python."""
    server = RAY / "core/src/ray/gcs/gcs_server"
    with server.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return re.search(rb"(?<!\w)%b(?!\w)" % name.encode(), data) is not None


OURS = set(re.findall(r'"(tina_\w+)"', (ROOT / "serve" / "metrics.py").read_text()))
RAYS = rays_names()


def exists(name):
    """Whether something exports a metric of this name."""
    if name in KUBERAY:
        return True
    if not name.startswith("ray_"):
        return False
    base = name.removeprefix("ray_")
    forms = {base, re.sub(r"_(bucket|sum|count|total)$", "", base)}
    if base.startswith("tina_"):
        return bool(forms & OURS)
    return bool(forms & RAYS) or any(map(in_the_control_plane, forms))


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_a_query_asks_for_metrics_that_exist(query):
    assert metrics(query)
    for name in metrics(query):
        assert exists(name), name


@pytest.mark.parametrize(
    "name",
    [
        "ray_tina_batch_request_total",
        "tina_waiting_requests",
        "ray_serve_num_http_request_total",
        "ray_node_cpu_utilisation",
        "ray_finished_job",
        "kuberay_job_status",
    ],
)
def test_a_metric_that_nothing_exports_is_seen(name):
    assert metrics(f'sum by (x) (rate({name}{{a="b"}}[5m])) > 1') == {name}
    assert not exists(name)


def test_every_metric_of_the_endpoint_is_on_its_dashboard():
    shown = {name for query in queries() for name in metrics(query)}
    bases = {re.sub(r"_(bucket|sum|count)$", "", name.removeprefix("ray_")) for name in shown}
    assert bases >= OURS
    assert len(OURS) == 5


def test_no_query_asks_for_the_sum_of_a_histogram():
    """Ray's agents record the middle of a bucket for what was in it."""
    assert not [name for query in queries() for name in metrics(query) if name.endswith("_sum")]


def test_a_pass_is_counted_once_and_its_requests_one_by_one(monkeypatch):
    told = defaultdict(list)

    def metric(name, **_):
        def note(value, tags):
            told[name].append(value)

        return SimpleNamespace(inc=note, observe=note)

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(serve_metrics, kind, metric)
    made = serve_metrics.Metrics()
    made.batch("generate", 1, 0.5)
    made.batch("generate", 32, 0.7)
    assert told == {
        "tina_batch_requests_total": [1, 32],
        "tina_batch_duration_seconds": [0.5, 0.7],
    }


def rays_labels():
    """What the installed Ray declares as tags, and what its own dashboards group and select by."""
    declared = re.findall(
        r"tags?_keys?\s*=\s*(\([^)]*\)|\[[^\]]*\]|\"\w+\")", CODE, flags=re.IGNORECASE
    )
    shown = text_of("dashboard/modules/metrics/dashboards")
    grouped = re.findall(r"\bby ?\(([^)]*)\)", shown)
    selected = re.findall(r"\{\{\{([^}]*)\}\}\}", shown)
    return {
        *re.findall(r'(\w+)=~"\$', shown),
        *(word for part in declared for word in re.findall(r'"(\w+)"', part)),
        *(word for part in grouped for word in re.findall(r"\w+", part)),
        *(word for part in selected for word in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", part)),
    }


TAGS = set(re.findall(r'tag_keys=\("(\w+)",\)', (ROOT / "serve" / "metrics.py").read_text()))
LABELS = rays_labels()


def strange(query):
    """Labels of a query that its metrics do not have."""
    names = metrics(query)
    if any(name.startswith("ray_tina_") for name in names):
        return labels(query) - TAGS
    return labels(query) - LABELS.union(*(KUBERAY.get(name, ()) for name in names))


@pytest.mark.parametrize("query", sorted(set(queries())))
def test_a_query_uses_labels_that_exist(query):
    assert sorted(TAGS) == ["kind", "result"]
    assert not strange(query)


@pytest.mark.parametrize(
    ("query", "label"),
    [
        ("sum by (status_cod) (ray_serve_num_http_requests_total)", "status_cod"),
        ('ray_serve_num_http_requests_total{rout="/"}', "rout"),
        # a word of Ray's sources, and of KubeRay's metrics, but no label of Ray's
        ("sum by (deployment_status) (ray_serve_num_http_requests_total)", "deployment_status"),
        ("sum by (description) (ray_serve_num_http_requests_total)", "description"),
        ("sum by (route) (ray_tina_batch_requests_total)", "route"),
    ],
)
def test_a_label_that_does_not_exist_is_seen(query, label):
    assert strange(query) == {label}


def test_names_of_deployments_are_the_applications():
    text = "".join(queries())
    app = (ROOT / "serve" / "app.py").read_text()
    for name in re.findall(r'deployment="(\w+)"', text):
        assert f'name="{name}"' in app
    for value in re.findall(r'(?:kind|result)="(\w+)"', text):
        assert any(f'"{value}"' in f.read_text() for f in (ROOT / "serve").glob("*.py")), value


def test_slow_is_what_a_loaded_slow_machine_is_not():
    rules = {r["alert"]: r["expr"] for g in RULES["groups"] for r in g["rules"]}
    rows = (ROOT / "benchmarks" / "results" / "serve_load.jsonl").read_text().splitlines()
    (slow,) = [json.loads(row) for row in rows if '"cfbf15c64e7b"' in row]
    p99 = slow["clients_32"]["p99_ms"]
    assert f"p99 {p99:,.0f} ms" in (FOLDER / "alerts.yaml").read_text()
    limit = float(rules["TinaSlow"].split("> ")[-1])
    assert 1.5 * p99 < limit < 3 * p99


def test_what_takes_too_long_counts_as_failed():
    """Ray answers 408 after `request_timeout_s`: a generator that hangs gives no 5xx."""
    served = (ROOT / "cluster" / "kuberay" / "base" / "rayservice.yaml").read_text()
    limits = re.findall(r"request_timeout_s: (\d+)", served)
    assert limits
    # a slow body is ours to refuse, with a problem document
    assert all(int(limit) > READ_S for limit in limits)
    overload = 'error_code="503"'
    every = [query for query in queries() if "error_code" in query]
    assert all('route!~"/-/.*"}[5m])) / ' in " ".join(query.split()) for query in every)
    failed = [query for query in queries() if "error_code" in query and overload not in query]
    assert failed
    assert all('error_code=~"5..|408",error_code!="503"' in query for query in failed)


def test_alerts_and_dashboards_name_each_other():
    alerts = {rule["alert"] for group in RULES["groups"] for rule in group["rules"]}
    described = " ".join(panel["description"] for b in BOARDS.values() for panel in b["panels"])
    assert set(re.findall(r"Alert (\w+)\.", described)) == alerts


def panel_of(metric):
    (found,) = [
        (panel, target["expr"])
        for board in BOARDS.values()
        for panel in board["panels"]
        for target in panel["targets"]
        if metric in metrics(target["expr"])
    ]
    return found


def test_memory_of_gpus_is_in_mebibytes_as_ray_has_it():
    assert re.search(r"sum\(ray_node_gram_used\{\{[^}]*\}\}.* \* 1024 \* 1024", CODE)
    assert panel_of("ray_node_gram_used")[0]["fieldConfig"]["defaults"]["unit"] == "mbytes"


def test_what_a_controller_wanted_ends_with_it():
    """Serve sets the target once, its own status all the time, and a new one need not differ."""
    _, query = panel_of("ray_serve_autoscaling_target_replicas")
    alive = " and on (deployment, WorkerId) ray_serve_deployment_status)"
    assert query.endswith(alive)


def test_panels_do_not_overlap():
    for board in BOARDS.values():
        places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
        assert len(set(places)) == len(places)
        assert len({p["id"] for p in board["panels"]}) == len(places)


def test_the_readme_starts_prometheus_where_its_files_are_and_has_kuberay_scraped():
    local, head = re.findall(r"^prometheus --config\.file=(\S+) (\S+)$", README, re.M)
    folder = "cluster/observability"
    assert local[0] == f"{folder}/prometheus.yaml"
    for cloud in ("aws", "gcp"):
        (config,) = read((ROOT / "cluster" / "launcher" / f"{cloud}.yaml").read_text())
        assert config["file_mounts"][f"~/tina/{folder}"] == folder
    assert head[0] == f"$HOME/tina/{local[0]}"
    # its default is data/ where it was started, here the clone
    assert local[1] == head[1] == "--storage.tsdb.path=/tmp/tina-prometheus"
    versions = re.findall(r"^helm \w+ kuberay-operator \S+ --version (\S+) ", README, re.M)
    assert len(versions) == 2
    assert len(set(versions)) == 1
    (upgrade,) = re.findall(r"^helm upgrade .*", README, re.M)
    assert "--set metrics.serviceMonitor.enabled=true " in upgrade
    assert MONITOR["metadata"]["labels"] == {"release": "prometheus"}
    assert upgrade.endswith("--set metrics.serviceMonitor.selector.release=prometheus")


def test_prometheus_finds_the_nodes():
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    files = CONFIG["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert {Path(file).name for file in files} == {PROMETHEUS_SERVICE_DISCOVERY_FILE}
    state = re.findall(r"TINA_CLUSTER:-([^}]+)}", (ROOT / "cluster/local/env.sh").read_text())
    assert {str(Path(file).parent) for file in files} == {"/tmp/ray", f"{state[0]}/head"}
    (endpoint,) = MONITOR["spec"]["podMetricsEndpoints"]
    assert MONITOR["metadata"]["namespace"] == of("Namespace")[0]["metadata"]["name"]
    for cluster in clusters("gpu"):
        for ports in values(list(containers(cluster)), "ports"):
            assert endpoint["port"] in [port["name"] for port in ports]
