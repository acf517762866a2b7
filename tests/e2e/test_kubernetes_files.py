"""The Kubernetes manifests, read as text: what must hold before any cluster sees them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from services.runtime.settings import Settings
from services.stack.identities import GRANTS

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
DOCUMENTS: list[dict[str, Any]] = [
    document for path in sorted(FOLDER.glob("*.yaml")) for document in yaml.safe_load_all(path.read_text())
]
RAY_VARIABLES = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED"}


def found(kind: str) -> list[dict[str, Any]]:
    """The documents of a kind."""
    return [document for document in DOCUMENTS if document["kind"] == kind]


def templates() -> Iterator[dict[str, Any]]:
    """The pods that there will be."""
    for deployment in found("Deployment"):
        yield deployment["spec"]["template"]
    for cluster in found("RayCluster"):
        groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
        yield from (group["template"] for group in groups)


CONTAINERS = {container["name"]: container for pod in templates() for container in pod["spec"]["containers"]}
ROLES = {name: "trainer" if name == "ray-head" else name for name in CONTAINERS if name != "ray-worker"}
each_container = pytest.mark.parametrize("name", CONTAINERS)


def settings_of(name: str) -> dict[str, str]:
    """All variables that a container's environment has."""
    named = {document["metadata"]["name"]: document for document in DOCUMENTS}
    variables = {entry["name"]: entry["value"] for entry in CONTAINERS[name].get("env", ())}
    for source in CONTAINERS[name]["envFrom"]:
        (reference,) = source.values()
        document = named[reference["name"]]
        variables |= document.get("data", {}) | document.get("stringData", {})
    return variables


def test_every_document_is_a_named_resource() -> None:
    """Each has a kind, a version and a name of its own, and all processes of the stack are there."""
    names = [(document["apiVersion"], document["kind"], document["metadata"]["name"]) for document in DOCUMENTS]
    assert len(names) == len(set(names))
    assert set(CONTAINERS) == {"ray-head", "ray-worker", "averager", "predictor", "api", "notifier"}


@each_container
def test_every_variable_is_one_that_the_code_reads(name: str) -> None:
    """A WA_ variable is a setting, with a value that it takes; others are Ray's."""
    variables = settings_of(name)
    ours = {key: value for key, value in variables.items() if key.startswith("WA_")}
    known = {f"WA_{field}".upper() for field in Settings.model_fields}
    assert ours.keys() <= known
    assert variables.keys() - ours.keys() <= RAY_VARIABLES
    Settings.model_validate({key.removeprefix("WA_").lower(): value for key, value in ours.items()})


@each_container
def test_every_image_and_module_is_there(name: str) -> None:
    """Images are those that the compose file builds; a module that is started exists."""
    container = CONTAINERS[name]
    image = container["image"].removeprefix("weight-averaging-")
    assert (ROOT / "deploy" / "images" / f"{image}.Dockerfile").exists()
    words = " ".join([*container["command"], *container.get("args", ())]).split()
    for before, module in itertools.pairwise(words):
        assert before != "-m" or importlib.util.find_spec(module) is not None


@each_container
def test_no_container_has_rights_that_it_does_not_need(name: str) -> None:
    """No capabilities, no way to more rights, a limit on memory, and a probe that says whether it lives."""
    container = CONTAINERS[name]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert "memory" in container["resources"]["limits"]
    assert "livenessProbe" in container


def test_ray_asks_for_a_token_and_its_workers_know_no_keys_of_the_bucket() -> None:
    """Who joins the cluster has its token; workers have neither keys of the bucket nor the API's token."""
    for name in ("ray-head", "ray-worker"):
        assert settings_of(name)["RAY_AUTH_MODE"] == "token"
        assert settings_of(name)["RAY_AUTH_TOKEN"]
    assert not {"WA_S3_SECRET_KEY", "WA_TOKEN"} & settings_of("ray-worker").keys()
    assert "RAY_AUTH_TOKEN" not in settings_of("averager").keys() | settings_of("api").keys()


@pytest.mark.parametrize(("name", "role"), ROLES.items())
def test_each_process_has_keys_of_its_own_kind_alone(name: str, role: str) -> None:
    """The Secret with the bucket's keys is that of the process's kind: no wider rights than its work needs."""
    secrets = [source["secretRef"]["name"] for source in CONTAINERS[name]["envFrom"] if "secretRef" in source]
    assert [secret for secret in secrets if "store" in secret] == [f"weight-averaging-store-{role}"]
    assert f"weight-averaging-store-{role}" in [document["metadata"]["name"] for document in found("Secret")]


def test_every_kind_of_process_runs() -> None:
    """No kind of process that has an identity is forgotten."""
    assert set(ROLES.values()) == set(GRANTS)


def test_every_process_can_be_scraped_and_probed() -> None:
    """All but Ray's nodes, which hold nothing of ours, listen beyond loopback on a port that has a name."""
    for name in ROLES:
        settings = settings_of(name)
        (port,) = (int(value) for key, value in settings.items() if key.endswith("_PORT"))
        assert {value for key, value in settings.items() if key.endswith("_HOST")} == {"0.0.0.0"}  # noqa: S104
        assert port in [entry["containerPort"] for entry in CONTAINERS[name]["ports"]]


def test_secrets_are_placeholders_in_secrets() -> None:
    """Nothing secret is in a ConfigMap or a pod, and what is in a Secret has to be changed."""
    for document in found("Secret"):
        assert set(document["stringData"].values()) == {"change-me"}
    for name, container in CONTAINERS.items():
        plain = {entry["name"] for entry in container.get("env", ())} | found("ConfigMap")[0]["data"].keys()
        assert not [key for key in plain if "SECRET" in key or key.endswith("TOKEN")], name


def test_ray_is_of_the_version_that_is_installed() -> None:
    """Head, nodes and drivers must be of one version, which the image installs."""
    (cluster,) = found("RayCluster")
    assert cluster["spec"]["rayVersion"] == importlib.metadata.version("ray")
