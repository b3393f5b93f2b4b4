"""The Helm chart, as Helm renders it: against Kubernetes' own schemas, and against Relay's settings and streams."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import relay
from relay import contract
from relay.bus.client import Bus
from relay.bus.jetstream import JetStream
from relay.cli.lifecycle import STOP_MARGIN_SECONDS
from relay.idempotency.ledger import Ledger
from relay.settings import Settings, rows
from relay.tracking.parked import ensure_parked_stream
from relay.tracking.storage import StorageConfig, ensure_storage
from scripts import chart_settings
from tests.conf.tools import CONF, run, tool
from tests.support.nats_server import NatsServer

CHART = CONF / "helm" / "relay"
KUBERNETES = ("1.25.0", "1.31.0", "1.37.0")
OTHERS = {"ExternalSecret", "SecretStore", "KeyValue", "Stream", "PodMonitor", "ServiceMonitor"}
"""Kinds that operators bring, of which there is no schema here."""

EVERYTHING: dict[str, Any] = {
    "replicaCount": 3,
    "image": {"repository": "registry.example.com/relay", "digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "pull"}],
    "settings": {
        "EMAIL_ENABLED": True,
        "NATS_URL": "nats://nats:4222",
        "SMTP_PORT": "587",
        "BACKLOG_LIMIT_BYTES": 64_000_000,
        "DRAIN_SECONDS": 40.5,
        "SMTP_ALLOWED_REPLY_TO_DOMAINS": "",
        "SMTP_HELO_NAME": "",
        "DEFAULT_SMTP_FROM_DISPLAY_NAME": 'A "quoted": name',
        "RELAY_REPLY_PREFIXES": ["_INBOX", "_R_"],
        "RELAY_STATE_DIR": "/run/relay",
        "TRACKING_REPLICAS": 3,
        "TRACKING_TTL_DAYS": 30,
        "REQUEST_ID_TTL_HOURS": 1.5,
        "PORT": 9090,
        "SES_EVENTING_ENABLED": True,
    },
    "secretEnv": {
        "SMTP_USERNAME": {"secret": "relay-smtp", "key": "smtp-username"},
        "SES_ENGAGEMENT_SQS_QUEUE_URL": {"secret": "relay-ses", "key": "sqs_queue_url", "optional": True},
    },
    "secretFiles": {
        "SMTP_PASSWORD_FILE": {"secret": "relay-smtp", "key": "smtp-password"},
        "SMTP_CA_FILE": {"secret": "our-ca", "key": "ca.crt"},
    },
    "extraEnv": [{"name": "OTEL_SERVICE_NAME", "value": "relay"}],
    "extraVolumes": [{"name": "more", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "more", "mountPath": "/more"}],
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::123456789012:role/relay"}},
    "service": {"annotations": {"example.com/scrape": "true"}},
    "metrics": {"monitor": "PodMonitor", "labels": {"release": "prometheus"}},
    "externalSecrets": {
        "awsRegion": "us-west-2",
        "secrets": {"relay-smtp": {"smtp-username": {"key": "/mail/relay", "property": "smtp_username"}}},
    },
    "jetstream": {"enabled": True},
    "podDisruptionBudget": {"minAvailable": 0},
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "mail", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "mail",
    "podLabels": {"team": "mail"},
    "podAnnotations": {"example.com/note": "hello"},
}


def helm() -> str:
    """Helm itself."""
    return tool("helm", "go install helm.sh/helm/v3/cmd/helm")


def attempted(values: dict[str, Any], directory: Path, *options: str) -> tuple[int, str, str]:
    """What ``helm template`` makes of the values: exit code, manifests, errors."""
    (directory / "values.json").write_text(json.dumps(values))
    done = run(
        *(helm(), "template", "relay", str(CHART), "--namespace", "mail", "--kube-version", KUBERNETES[-1]),
        *("--values", str(directory / "values.json"), *options),
    )
    return done.returncode, done.stdout, done.stderr


def rendered(values: dict[str, Any], directory: Path, *options: str) -> list[dict[str, Any]]:
    """The manifests."""
    code, manifests, errors = attempted(values, directory, *options)
    assert code == 0, errors
    return [each for each in yaml.safe_load_all(manifests) if each]


def of_kind(manifests: list[dict[str, Any]], kind: str, name: str = "relay") -> dict[str, Any]:
    """The one manifest of this kind and name."""
    (found,) = (each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def pod_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """The deployment's pod."""
    pod: dict[str, Any] = of_kind(manifests, "Deployment")["spec"]["template"]["spec"]
    return pod


def environment_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    """Name and value, or where the value comes from; each name once."""
    listed = pod_of(manifests)["containers"][0]["env"]
    made = {each["name"]: each.get("value", each.get("valueFrom")) for each in listed}
    assert len(made) == len(listed)
    return made


# -- what is generated -------------------------------------------------------------------------
def test_values_and_schema_hold_every_setting() -> None:
    remedy = "python -m scripts.chart_settings writes them anew"
    values = (CHART / "values.yaml").read_text()
    assert values == chart_settings.updated_values(values), remedy
    schema = (CHART / "values.schema.json").read_text()
    assert schema == chart_settings.updated_schema(schema), remedy
    names = {name for name, _, _, _ in rows()}
    assert set(yaml.safe_load(values)["settings"]) == names - chart_settings.secret_names()
    assert "SMTP_PASSWORD" in chart_settings.secret_names()


def test_the_schema_knows_every_value() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    for name, of_the_value in schema["properties"].items():
        if name != "settings" and "properties" in of_the_value:
            assert set(values[name]) == set(of_the_value["properties"]), name


def test_the_chart_is_of_this_version() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == relay.__version__


# -- what Helm makes of it ---------------------------------------------------------------------
def test_lint() -> None:
    done = run(helm(), "lint", "--strict", "--kube-version", KUBERNETES[-1], str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_manifests_fit_kubernetes(values: dict[str, Any], version: str, tmp_path: Path) -> None:
    program = tool("kubernetes-validate", "the Python package of that name")
    manifests = [each for each in rendered(values, tmp_path) if each["kind"] not in OTHERS]
    assert {each["kind"] for each in manifests} == {"Deployment", "Service", "ServiceAccount", "PodDisruptionBudget"}
    (tmp_path / "manifests.yaml").write_text(yaml.safe_dump_all(manifests))
    done = run(program, "--strict", "-k", version, str(tmp_path / "manifests.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr
    # It does find what is wrong
    manifests[0]["spec" if "spec" in manifests[0] else "metadata"]["nonsense"] = 1
    (tmp_path / "manifests.yaml").write_text(yaml.safe_dump_all(manifests))
    assert run(program, "--strict", "-k", version, str(tmp_path / "manifests.yaml")).returncode != 0


def test_settings_reach_the_container_as_relay_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment_of(rendered(EVERYTHING, tmp_path))
    assert found["BACKLOG_LIMIT_BYTES"] == "64000000"
    assert found["SMTP_ALLOWED_REPLY_TO_DOMAINS"] == ""
    assert found["SMTP_PASSWORD_FILE"] == "/etc/relay/secrets/SMTP_PASSWORD_FILE"
    assert found["SMTP_USERNAME"]["secretKeyRef"] == {
        "name": "relay-smtp",
        "key": "smtp-username",
        "optional": False,
    }
    plain = {name: value for name, value in found.items() if isinstance(value, str) and name in EVERYTHING["settings"]}
    assert set(plain) == set(EVERYTHING["settings"])
    for name, value in plain.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SES_ENGAGEMENT_SQS_QUEUE_URL", "https://sqs.us-west-2.amazonaws.com/123456789012/queue")
    settings = Settings()
    assert settings.email_enabled
    assert settings.drain_seconds == 40.5
    assert settings.relay_reply_prefixes == ("_INBOX", "_R_")
    assert settings.smtp_allowed_reply_to_domains == ()
    assert settings.default_smtp_from_display_name == 'A "quoted": name'


def test_unset_settings_are_left_to_relay(tmp_path: Path) -> None:
    assert environment_of(rendered({}, tmp_path)) == {"RELAY_STATE_DIR": "/var/lib/relay"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"settings": {"SMTP_PROT": 25}}, "SMTP_PROT"),
        ({"settings": {"SMTP_PASSWORD": "hunter2"}}, "SMTP_PASSWORD"),
        ({"settings": {"SMTP_PORT": 70_000}}, "SMTP_PORT': maximum"),
        ({"settings": {"SMTP_TLS": "maybe"}}, "SMTP_TLS"),
        ({"settings": {"EMAIL_ENABLED": "yes"}}, "EMAIL_ENABLED"),
        ({"settings": {"SMTP_POOL_SIZE": "many"}}, "SMTP_POOL_SIZE"),
        ({"replicas": 3}, "replicas"),
        ({"secretEnv": {"SMTP_USERNAME": {"name": "relay-smtp", "key": "user"}}}, "secret"),
        (
            {"settings": {"SMTP_USERNAME": "u"}, "secretEnv": {"SMTP_USERNAME": {"secret": "s", "key": "k"}}},
            "SMTP_USERNAME is given in settings and as a secret",
        ),
        (
            {
                "secretEnv": {"NATS_URL": {"secret": "s", "key": "k"}},
                "secretFiles": {"NATS_URL": {"secret": "s", "key": "k"}},
            },
            "NATS_URL is given in secretEnv and in secretFiles",
        ),
        ({"externalSecrets": {"secrets": {"relay-smtp": {"user": {"key": "/mail"}}}}}, "says where they are"),
        ({"metrics": {"monitor": "ServiceMonitor"}, "service": {"enabled": False}}, "there is no service to look at"),
    ],
)
def test_values_that_are_wrong_are_refused(values: dict[str, Any], said: str, tmp_path: Path) -> None:
    code, _, errors = attempted(values, tmp_path)
    assert code != 0
    assert said in errors


def test_values_given_as_text(tmp_path: Path) -> None:
    options = ("--set-string", "settings.SMTP_PORT=2525", "--set-string", "settings.EMAIL_ENABLED=true")
    found = environment_of(rendered({}, tmp_path, *options))
    assert (found["SMTP_PORT"], found["EMAIL_ENABLED"]) == ("2525", "true")


# -- the pod -----------------------------------------------------------------------------------
def test_the_pod_may_do_little(tmp_path: Path) -> None:
    pod = pod_of(rendered({}, tmp_path))
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    # All that it writes to
    mounted = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert set(mounted) == {"/tmp", "/var/lib/relay"}
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert all(volumes[name]["emptyDir"] == {} for name in mounted.values())


def test_the_user_is_the_image_s(tmp_path: Path) -> None:
    context = pod_of(rendered({}, tmp_path))["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in (CONF / "Dockerfile").read_text()


def test_directory_and_port_follow_the_settings(tmp_path: Path) -> None:
    manifests = rendered(EVERYTHING, tmp_path)
    (container,) = pod_of(manifests)["containers"]
    assert {"name": "state", "mountPath": "/run/relay"} in container["volumeMounts"]
    assert container["ports"] == [{"name": "http", "containerPort": 9090}]
    assert environment_of(manifests)["RELAY_STATE_DIR"] == "/run/relay"


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ({}, Settings.model_fields["drain_seconds"].default + STOP_MARGIN_SECONDS),
        ({"settings": {"DRAIN_SECONDS": 40.5}}, 41 + STOP_MARGIN_SECONDS),
        ({"settings": {"DRAIN_SECONDS": "100"}}, 100 + STOP_MARGIN_SECONDS),
        ({"terminationGracePeriodSeconds": 7}, 7),
    ],
)
def test_a_pod_is_given_time_to_drain(values: dict[str, Any], seconds: float, tmp_path: Path) -> None:
    assert pod_of(rendered(values, tmp_path))["terminationGracePeriodSeconds"] == seconds


def test_files_of_secrets_are_mounted_where_the_settings_say(tmp_path: Path) -> None:
    manifests = rendered(EVERYTHING, tmp_path)
    pod = pod_of(manifests)
    (volume,) = (each for each in pod["volumes"] if each["name"] == "secrets")
    (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "secrets")
    found = {
        f"{mount['mountPath']}/{item['path']}": (source["secret"]["name"], item["key"])
        for source in volume["projected"]["sources"]
        for item in source["secret"]["items"]
    }
    environment = environment_of(manifests)
    assert found == {
        environment[name]: (given["secret"], given["key"]) for name, given in EVERYTHING["secretFiles"].items()
    }
    assert volume["projected"]["defaultMode"] == 0o440


def test_probes_ask_what_the_health_page_has(tmp_path: Path) -> None:
    (container,) = pod_of(rendered({}, tmp_path))["containers"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    assert container["startupProbe"]["exec"] == {"command": ["relayctl", "status"]}


# -- around it ---------------------------------------------------------------------------------
def test_disruption_budget(tmp_path: Path) -> None:
    assert of_kind(rendered({}, tmp_path), "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    # 0 is a number too
    spec = of_kind(rendered(EVERYTHING, tmp_path), "PodDisruptionBudget")["spec"]
    assert (spec["minAvailable"], "maxUnavailable" in spec) == (0, False)
    off = rendered({"podDisruptionBudget": {"enabled": False}}, tmp_path)
    assert "PodDisruptionBudget" not in {each["kind"] for each in off}


def test_everything_selects_the_pods(tmp_path: Path) -> None:
    manifests = rendered(EVERYTHING, tmp_path)
    template = of_kind(manifests, "Deployment")["spec"]["template"]
    labels = template["metadata"]["labels"].items()
    selectors = [
        of_kind(manifests, "Deployment")["spec"]["selector"]["matchLabels"],
        of_kind(manifests, "Service")["spec"]["selector"],
        of_kind(manifests, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        of_kind(manifests, "PodMonitor")["spec"]["selector"]["matchLabels"],
        *(each["labelSelector"]["matchLabels"] for each in template["spec"]["topologySpreadConstraints"]),
    ]
    assert len(selectors) == 6
    assert all(selector and selector.items() <= labels for selector in selectors)


def test_service_account(tmp_path: Path) -> None:
    annotations = of_kind(rendered(EVERYTHING, tmp_path), "ServiceAccount")["metadata"]["annotations"]
    assert annotations == EVERYTHING["serviceAccount"]["annotations"]
    own = rendered({"serviceAccount": {"create": False, "name": "theirs"}}, tmp_path)
    assert pod_of(own)["serviceAccountName"] == "theirs"
    assert "ServiceAccount" not in {each["kind"] for each in own}


@pytest.mark.parametrize(
    ("kind", "endpoints"), [("PodMonitor", "podMetricsEndpoints"), ("ServiceMonitor", "endpoints")]
)
def test_monitor(kind: str, endpoints: str, tmp_path: Path) -> None:
    manifests = rendered({"metrics": {"monitor": kind}, "fullnameOverride": "mail-out"}, tmp_path)
    spec = of_kind(manifests, kind, "mail-out")["spec"]
    assert spec[endpoints] == [{"port": "http", "path": "/metrics", "interval": "30s"}]
    # The name of the job is what the alerts look for; by itself it would be the release's, or namespace/release
    jobs = set(re.findall(r'job="([^"]+)"', (CONF / "prometheus" / "alerts.yml").read_text()))
    template = of_kind(manifests, "Deployment", "mail-out")["spec"]["template"]
    for labelled in (template, of_kind(manifests, "Service", "mail-out")):
        assert {labelled["metadata"]["labels"][spec["jobLabel"]]} == jobs


def test_external_secrets(tmp_path: Path) -> None:
    manifests = rendered(EVERYTHING, tmp_path)
    spec = of_kind(manifests, "ExternalSecret", "relay-smtp")["spec"]
    assert spec["secretStoreRef"] == {"kind": "SecretStore", "name": "relay"}
    assert spec["data"] == [
        {"secretKey": "smtp-username", "remoteRef": {"key": "/mail/relay", "property": "smtp_username"}}
    ]
    store = of_kind(manifests, "SecretStore")["spec"]["provider"]["aws"]
    assert store["auth"]["jwt"]["serviceAccountRef"]["name"] == pod_of(manifests)["serviceAccountName"]
    values = {
        "externalSecrets": EVERYTHING["externalSecrets"]
        | {"awsRegion": "", "secretStoreRef": {"kind": "ClusterSecretStore", "name": "vault"}}
    }
    manifests = rendered(values, tmp_path)
    spec = of_kind(manifests, "ExternalSecret", "relay-smtp")["spec"]
    assert spec["secretStoreRef"] == {"kind": "ClusterSecretStore", "name": "vault"}
    assert "SecretStore" not in {each["kind"] for each in manifests}
    # Without secrets nothing of it, whatever else is said
    none = rendered({"externalSecrets": {"awsRegion": "us-west-2"}}, tmp_path)
    assert not {"SecretStore", "ExternalSecret"} & {each["kind"] for each in none}


# -- JetStream ---------------------------------------------------------------------------------
def seconds_of(duration: str) -> int:
    """Go's duration, of one number and one unit."""
    return int(duration[:-1]) * {"s": 1, "h": 3600}[duration[-1]]


@pytest.mark.parametrize(
    "settings", [{}, {"TRACKING_TTL_DAYS": 30, "TRACKING_STORAGE": "memory", "REQUEST_ID_TTL_HOURS": 1.5}]
)
def test_streams_are_those_that_relay_makes(
    settings: dict[str, Any],
    tmp_path: Path,
    new_nats_server: Callable[..., NatsServer],
    new_bus: Callable[[str], Bus],
) -> None:
    jetstream = JetStream(new_bus(new_nats_server().url))
    config = StorageConfig(1, settings.get("TRACKING_TTL_DAYS", 0), settings.get("TRACKING_STORAGE", "file"))
    assert ensure_storage(jetstream, config) == ""
    ensure_parked_stream(jetstream, config)
    ledger = Ledger(jetstream, config, settings.get("REQUEST_ID_TTL_HOURS", 24) * 3600)
    ledger.start()
    ledger.close(1)
    values = {"jetstream": {"enabled": True}, "settings": settings | {"SES_EVENTING_ENABLED": True}}
    manifests = [each for each in rendered(values, tmp_path) if each["kind"] in {"KeyValue", "Stream"}]
    specs = {each["spec"].get("name") or f"KV_{each['spec']['bucket']}": each["spec"] for each in manifests}
    assert set(specs) == {
        f"KV_{contract.RECIPIENTS_BUCKET}",
        f"KV_{contract.REQUESTS_BUCKET}",
        contract.LOG_STREAM,
        contract.PARKED_STREAM,
    }
    for name, spec in specs.items():
        made = jetstream.stream_info(name).config
        assert spec["storage"] == made["storage"], name
        assert spec["replicas"] == made["num_replicas"], name
        assert seconds_of(spec.get("ttl", spec.get("maxAge", "0s"))) == made["max_age"] / 10**9, name
        assert spec["preventDelete"] is True
        if "bucket" in spec:  # the rest is what every bucket has
            assert spec["history"] == made["max_msgs_per_subject"]
            continue
        assert spec["subjects"] == made["subjects"]
        assert spec["discard"] == made["discard"]
        assert spec["allowDirect"] == made["allow_direct"]
        assert spec["retention"] == made["retention"]
        assert seconds_of(spec["duplicateWindow"]) == made["duplicate_window"] / 10**9
        assert spec.get("maxBytes", -1) == made["max_bytes"]


def test_removing_the_release_keeps_the_records(tmp_path: Path) -> None:
    for manifest in rendered(EVERYTHING, tmp_path):
        if manifest["kind"] in {"KeyValue", "Stream"}:
            assert manifest["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
            assert manifest["spec"]["replicas"] == 3


# -- its README --------------------------------------------------------------------------------
def test_the_readme_s_values(tmp_path: Path) -> None:
    (values,) = re.findall(r"```yaml\n(.*?)```", (CHART / "README.md").read_text(), re.DOTALL)
    found = environment_of(rendered(yaml.safe_load(values), tmp_path))
    assert (found["SMTP_HOST"], found["EMAIL_ENABLED"]) == ("email-smtp.us-west-2.amazonaws.com", "true")
    assert found["SMTP_ALLOWED_FROM_DOMAINS"] == "example.com"


def test_the_readme_names_settings_that_there_are() -> None:
    told = (CHART / "README.md").read_text()
    named = set(re.findall(r"(?:settings|secretEnv|secretFiles)\.([A-Z][A-Z_]+[A-Z])\b", told))
    assert len(named) > 10
    assert named <= {name for name, _, _, _ in rows()}
