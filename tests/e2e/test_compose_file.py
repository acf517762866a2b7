"""The compose file and its images, read as text: what must hold before any engine starts them."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.stack.identities import GRANTS, KeyPair, key_pair, seaweed_config

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "deploy" / "images"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILES = sorted(IMAGES.glob("*.Dockerfile"))
ROLES = {"ray-head": "trainer"} | {name: name for name in ("averager", "predictor", "api", "notifier")}
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)(:-)?")

each_service = pytest.mark.parametrize("name", SERVICES)
each_dockerfile = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def test_every_process_of_the_stack_is_a_service() -> None:
    """The containers are the processes of the embedded stack, with one more Ray node; the notifier is optional."""
    assert set(SERVICES) == {"store", "ray-head", "ray-worker", "averager", "predictor", "api", "notifier"}
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["notifier"]


def test_only_the_api_and_s3_are_published_and_only_on_loopback() -> None:
    """Two ports are published, both on 127.0.0.1 alone, and where they land can be chosen."""
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {
        "store": ["127.0.0.1:${WA_S3_PORT:-8333}:8333"],
        "api": ["127.0.0.1:${WA_API_PORT:-8000}:8000"],
    }
    assert not any("network_mode" in service for service in SERVICES.values())


@each_service
def test_no_service_has_rights_it_does_not_need(name: str) -> None:
    """Every service runs as one fixed user without capabilities, and cannot gain any."""
    service = SERVICES[name]
    assert service["user"] == "10001:10001"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "pid", "ipc", "devices"} & set(service)


@pytest.mark.parametrize("name", ["store", "averager", "predictor", "api", "notifier"])
def test_services_that_run_no_training_code_cannot_write_to_their_image(name: str) -> None:
    """Their root file system is read-only; what they write goes to a volume or to memory."""
    assert SERVICES[name]["read_only"] is True
    assert SERVICES[name]["tmpfs"] == ["/tmp"]  # noqa: S108  inside the container


@each_service
def test_every_service_is_watched_and_restarted(name: str) -> None:
    """A healthcheck says when a service is ready, and a dead one comes back; the image needs no curl for it."""
    service = SERVICES[name]
    assert service["restart"] == "unless-stopped"
    assert service["healthcheck"]["test"][:2] == ["CMD", "healthcheck"]
    assert "start_period" in service["healthcheck"]
    assert "container_name" not in service


@each_service
def test_services_wait_for_what_they_need(name: str) -> None:
    """Nothing but the store starts before the service that it needs is healthy."""
    needs = SERVICES[name].get("depends_on", {})
    assert {condition["condition"] for condition in needs.values()} == (
        set() if name == "store" else {"service_healthy"}
    )


def test_every_image_is_built_from_the_tree_and_once() -> None:
    """No image must be pulled but the base: for each one, one service names a Dockerfile that is there."""
    built = [service["image"] for service in SERVICES.values() if "build" in service]
    assert sorted(built) == sorted({service["image"] for service in SERVICES.values()})
    for service in SERVICES.values():
        assert "build" not in service or ROOT / service["build"]["dockerfile"] in DOCKERFILES
        assert "pull_policy" not in service


def test_a_bare_start_needs_no_settings() -> None:
    """Every variable of the compose file has a default, and .env.example explains each of them."""
    text = (ROOT / "docker-compose.yml").read_text()
    example = (ROOT / ".env.example").read_text()
    variables = {match[1]: bool(match[2]) for match in VARIABLE.finditer(text)}
    assert all(variables.values()), variables
    assert {name for name in variables if not re.search(rf"^#?{name}=", example, re.MULTILINE)} == set()


def test_the_store_keeps_its_objects_and_gets_time_to_stop() -> None:
    """Objects live in a named volume, which `docker compose down` keeps; stopping may take half a minute."""
    assert "objects:/data" in SERVICES["store"]["volumes"]
    assert set(COMPOSE["volumes"]) == {"objects", "scratch"} | {f"keys-{role}" for role in GRANTS}


@each_service
def test_a_service_has_the_keys_of_its_kind_and_no_others(name: str) -> None:
    """The store hands each kind of process its keys in a volume that these two see, and nobody else."""
    keys = {volume for volume in SERVICES[name].get("volumes", ()) if volume.startswith("keys-")}
    role = ROLES.get(name)
    expected = {f"keys-{role}:/keys:ro"} if role else set()
    assert keys == ({f"keys-{role}:/keys/{role}" for role in GRANTS} if name == "store" else expected)
    assert not {"WA_S3_ACCESS_KEY", "WA_S3_SECRET_KEY"} & set(SERVICES[name]["environment"])
    assert ("AWS_SECRET_ACCESS_KEY" in SERVICES[name]["environment"]) == (name == "store")


def test_every_kind_of_process_is_started_with_its_keys() -> None:
    """Whoever has an identity reads it before it begins, and begins anew when the store was given other keys."""
    assert set(ROLES.values()) == set(GRANTS)
    for name in ROLES:
        command = " ".join(SERVICES[name]["command"])
        starts = (IMAGES / "ray-head.sh").read_text() if name == "ray-head" else command
        assert "wa-with-keys python -m services." in starts
        assert SERVICES[name]["depends_on"]["store"]["restart"] is True


def test_the_store_knows_what_it_hands_out(tmp_path: Path) -> None:
    """Identities and keys are the embedded stack's, and what a shell reads of them, odd characters included."""
    admin = KeyPair("an access'key", "a $ecret")
    given = {"AWS_ACCESS_KEY_ID": admin.access_key, "AWS_SECRET_ACCESS_KEY": admin.secret_key, "WA_BUCKET": "b"}
    for role in GRANTS:
        (tmp_path / role).mkdir()
    for _ in ("first start", "restart"):
        _run("store_keys.py", str(tmp_path / "s3.json"), str(tmp_path), PYTHONPATH=str(ROOT), **given)

    assert (tmp_path / "s3.json").read_text() == seaweed_config(admin=admin, bucket="b")
    for role in GRANTS:
        file = tmp_path / role / "s3.env"
        show = '. "$0"; printf "%s\\n%s" "$WA_S3_ACCESS_KEY" "$WA_S3_SECRET_KEY"'
        told = subprocess.run(["sh", "-c", show, str(file)], capture_output=True, text=True, check=True)
        assert KeyPair(*told.stdout.splitlines()) == key_pair(role, admin=admin)
        assert file.stat().st_mode & 0o077 == 0


def test_the_store_image_holds_what_writes_the_keys() -> None:
    """The image has a folder for each kind of process, and needs nothing but what it copies to fill them."""
    text = (IMAGES / "store.Dockerfile").read_text()
    assert all(f"/keys/{role}" in text for role in GRANTS)
    loaded = _run("../../services/stack/identities.py")
    assert (loaded.returncode, loaded.stderr) == (0, "")


def test_the_averager_works_on_a_disk_and_says_whether_it_gets_on() -> None:
    """Accumulators larger than memory go to a volume, not to the tmpfs, and the healthcheck asks the averager."""
    averager = SERVICES["averager"]
    assert f"scratch:{averager['environment']['WA_SCRATCH_DIR']}" in averager["volumes"]
    assert "install -d -o 10001 -g 10001 /scratch" in Path("deploy/images/compute.Dockerfile").read_text()
    port = averager["environment"]["WA_AVERAGER_PORT"]
    assert averager["healthcheck"]["test"][-1] == f"http://127.0.0.1:{port}/readyz"
    assert SERVICES["store"]["stop_grace_period"] == "30s"


@pytest.mark.parametrize("name", ["ray-head", "ray-worker"])
def test_ray_asks_for_a_token(name: str) -> None:
    """A Ray cluster without a token runs anybody's code."""
    environment = SERVICES[name]["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN"]
    assert environment["RAY_ADDRESS"] == "ray-head:6379"


@each_dockerfile
def test_images_build_without_a_registry_of_frontends(dockerfile: Path) -> None:
    """No `# syntax=` line and no digest: any engine that has the base image can build them."""
    text = dockerfile.read_text()
    assert "syntax=" not in text
    assert "@sha256" not in text + (ROOT / "docker-compose.yml").read_text()
    assert re.findall(r"^FROM (.*)", text, re.MULTILINE) == ["${PYTHON_IMAGE}"]


@each_dockerfile
def test_images_end_as_the_fixed_user_and_keep_bytecode(dockerfile: Path) -> None:
    """The last user is not root, and nothing stops Python from shipping compiled modules."""
    text = dockerfile.read_text()
    assert re.findall(r"^USER (.*)", text, re.MULTILINE) == ["10001:10001"]
    assert "PYTHONDONTWRITEBYTECODE" not in text
    assert "--no-compile" not in text


@each_dockerfile
def test_what_an_image_copies_is_there(dockerfile: Path) -> None:
    """Every COPY names files of the tree that .dockerignore lets through."""
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in re.findall(r"^COPY (.*)", dockerfile.read_text(), re.MULTILINE):
        sources = [word for word in line.split()[:-1] if not word.startswith("--")]
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(source == path or source.startswith(f"{path}/") for path in allowed), source


def test_the_images_install_what_pyproject_says() -> None:
    """The requirements printed for an image are the project's own, with the extras that were asked for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    printed = _run("requirements.py", "torch").stdout.splitlines()
    assert printed == project["dependencies"] + project["optional-dependencies"]["torch"]
    assert "no extra 'nonsense'" in _run("requirements.py", "nonsense").stderr


def test_the_healthcheck_tells_life_from_death() -> None:
    """It passes for a port that accepts and a process that runs, and names the target that does not."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        alive = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert _run("healthcheck.py", alive, "process:pytest").returncode == 0
    dead = _run("healthcheck.py", "process:pytest", alive)
    assert dead.returncode == 1
    assert alive in dead.stderr


@pytest.mark.parametrize("target", ["process:no-such-process-here", "ftp://127.0.0.1:1", "tcp://nowhere"])
def test_the_healthcheck_fails_on_what_it_cannot_find_or_understand(target: str) -> None:
    """A missing process and a misspelt target are failures in one line, not a pass and not a traceback."""
    ended = _run("healthcheck.py", target)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1


def _run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(IMAGES / script), *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
