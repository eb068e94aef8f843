"""One commit or nothing, whatever the Hub and the way to it do."""

import json
import time
from pathlib import Path

import pytest
from huggingface_hub.utils import get_session

from hub import Hub, Repo, talking_to
from vit3d import repository
from vit3d.repository import HubRepository

REPO = "lab/our-network"
FILES = {"config.json": b'{"model_type": "vit3d"}', "README.md": b"---\nlicense: mit\n---\nwords", "old_vit3d.py": b"1"}
COMMIT, PUT, BATCH, WHOAMI = "/commit/main", "/lfs/", "/objects/batch", "/whoami"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "to share").mkdir()
    for name, data in {**FILES, "model.safetensors": bytes(range(256)) * 40}.items():
        (tmp_path / "to share" / name).write_bytes(data)
    return tmp_path / "to share"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(repository, "WAITS_S", (0, 0.01, 0.02))
    monkeypatch.setattr(repository, "TIMEOUT_S", 0.5)
    with Hub() as hub, talking_to(hub, monkeypatch, tmp_path):
        yield hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def published(hub: Hub, kind: str = "models") -> dict[str, bytes]:
    return {name: data for name, data in hub.files(REPO, kind).items() if name != ".gitattributes"}


def state(hub: Hub) -> dict:
    return {key: list(repo.commits) for key, repo in hub.repos.items()}


def change(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"another network")


# --- when all goes well ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, place", [("model", ""), ("dataset", "datasets/")])
def test_a_folder_becomes_one_commit_which_is_read_back(folder, hub, kind, place):
    pulled = {}
    address = HubRepository(REPO, kind).publish(
        folder, "all of it", private=True, check=lambda place: pulled.update(contents(place))
    )
    repo = hub.repos[f"{kind}s", REPO]
    assert address == f"{hub.url}/{place}{REPO}/commit/{repo.head}"
    assert len(repo.commits) == 2  # the empty one of every repository, and ours
    assert repo.private
    assert published(hub, f"{kind}s") == contents(folder)
    pulled.pop(".gitattributes")
    assert pulled == contents(folder)


def test_a_second_time_is_one_more_commit_without_code_that_is_no_longer_used(folder, hub):
    HubRepository(REPO).publish(folder, "first")
    hub.repos["models", REPO].commit({**hub.files(REPO), "notes.txt": b"theirs"})
    change(folder)
    (folder / "old_vit3d.py").unlink()
    HubRepository(REPO).publish(folder, "second")
    assert len(hub.repos["models", REPO].commits) == 4
    assert published(hub) == {**contents(folder), "notes.txt": b"theirs"}


def test_a_repository_of_a_licence_and_a_card_is_filled(folder, hub):
    hub.repos["models", REPO] = Repo()
    hub.repos["models", REPO].commit({"LICENSE": b"MIT", "README.md": b"soon"})
    HubRepository(REPO).publish(folder, "first")
    assert published(hub) == {**contents(folder), "LICENSE": b"MIT"}


def test_what_has_not_changed_is_no_new_commit(folder, hub):
    HubRepository(REPO).publish(folder, "first")
    HubRepository(REPO).publish(folder, "again")
    assert len(hub.repos["models", REPO].commits) == 2


# --- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_id", ["a/b/c", "no spaces/here", "-x/y", "alone", "lab/", ""])
def test_a_malformed_repository_id_is_refused(repo_id):
    with pytest.raises(ValueError, match="no repository id NAMESPACE/NAME"):
        HubRepository(repo_id)


def no_token(hub, patch):
    patch.delenv("HF_TOKEN")


def wrong_token(hub, patch):
    patch.setenv("HF_TOKEN", "hf_stolen")


def reading_token(hub, patch):
    patch.setenv("HF_TOKEN", "hf_reader")


def no_network(hub, patch):
    hub.server.shutdown()
    hub.server.server_close()


def offline(hub, patch):
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def taken_by_another_network(hub, patch):
    hub.repos["models", REPO] = Repo()
    hub.repos["models", REPO].commit({"config.json": b'{"model_type": "bert"}', "model.safetensors": b"theirs"})


def taken_by_files(hub, patch):
    hub.repos["models", REPO] = Repo()
    hub.repos["models", REPO].commit({"holiday.png": b"theirs"})


TROUBLES = [
    (no_token, "There is no Hugging Face token: run `hf auth login`"),
    (wrong_token, "does not accept the token"),
    (reading_token, f"may not write to {REPO}"),
    (no_network, "does not answer .*: nothing was published"),
    (offline, "HF_HUB_OFFLINE is set"),
    (taken_by_another_network, f"{REPO} is taken: it holds a 'bert' model"),
    (taken_by_files, f"{REPO} is taken: it holds other files"),
]


@pytest.mark.parametrize("trouble, sentence", TROUBLES, ids=[trouble.__name__ for trouble, _ in TROUBLES])
def test_a_refusal_is_one_sentence_and_nothing_is_published(folder, hub, monkeypatch, trouble, sentence):
    trouble(hub, monkeypatch)
    before = state(hub)
    with pytest.raises((ValueError, ConnectionError), match=sentence) as refused:
        HubRepository(REPO).publish(folder, "all of it")
    assert "\n" not in str(refused.value).strip()
    assert state(hub) == before


def test_a_data_set_is_not_written_over_by_another_thing(folder, hub):
    hub.repos["datasets", REPO] = Repo()
    hub.repos["datasets", REPO].commit({"metadata.jsonl": b""})
    HubRepository(REPO, "dataset").publish(folder, "more")
    hub.repos["datasets", REPO].commit({"train.parquet": b""})
    with pytest.raises(ValueError, match="is taken"):
        HubRepository(REPO, "dataset").publish(folder, "more")


def test_a_public_repository_is_not_made_private_by_a_flag(folder, hub):
    HubRepository(REPO).publish(folder, "first")
    with pytest.raises(ValueError, match="exists and is public"):
        HubRepository(REPO).publish(folder, "second", private=True)


# --- a Hub that fails ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("faults", [(500, 503), ("cut", 500), ("timeout", 429), ("lost",), ("cut", "lost")], ids=str)
def test_two_faults_in_the_commit_are_survived_and_it_is_made_once(folder, hub, faults):
    for what in faults:
        hub.fault("POST", COMMIT, what)
    HubRepository(REPO).publish(folder, "all of it")
    assert len(hub.met) == len(faults)
    assert len(hub.repos["models", REPO].commits) == 2
    assert published(hub) == contents(folder)


def test_a_commit_that_also_removes_and_whose_answer_is_lost_is_found_done(folder, hub):
    HubRepository(REPO).publish(folder, "first")
    (folder / "old_vit3d.py").unlink()
    hub.fault("POST", COMMIT, "lost")
    HubRepository(REPO).publish(folder, "second")
    assert len(hub.repos["models", REPO].commits) == 3
    assert published(hub) == contents(folder)


def test_waiting_for_others_is_as_before_once_all_is_published(folder, hub):
    before = get_session().timeout
    HubRepository(REPO).publish(folder, "all of it")
    assert get_session().timeout == before != repository.TIMEOUT_S


@pytest.mark.slow
@pytest.mark.parametrize(
    "faults",
    [
        (("PUT", PUT, 500), ("POST", COMMIT, 502)),
        (("PUT", PUT, "cut"), ("POST", BATCH, 500)),
        (("PUT", PUT, "timeout"), ("POST", "/lfs/verify", 503)),
        (("POST", "/preupload", "cut"), ("PUT", PUT, "lost")),
        (("GET", PUT, 500), ("GET", PUT, "corrupt")),
        (("HEAD", "config.json", 503), ("GET", "config.json", "cut")),
    ],
    ids=str,
)
def test_two_faults_anywhere_are_survived(folder, hub, faults):
    for fault in faults:
        hub.fault(*fault)
    HubRepository(REPO).publish(folder, "all of it")
    assert len(hub.met) == 2
    assert len(hub.repos["models", REPO].commits) == 2
    assert published(hub) == contents(folder)


LASTING = [
    (("POST", COMMIT, 500, 9), "answered 500"),
    (("POST", COMMIT, "cut", 9), "does not answer"),
    (("POST", COMMIT, 403), "may not write"),
    (("POST", COMMIT, 401), "does not accept the token"),
    (("POST", COMMIT, 409), "is taken"),
    (("POST", COMMIT, 412), "changed by somebody else"),
    (("PUT", PUT, "corrupt", 9), "answered 400 .*wrong checksum"),
    (("PUT", PUT, 403), "may not write"),
    (("GET", WHOAMI, 500), "answered 500"),
    (("GET", WHOAMI, "timeout"), "does not answer .*nothing was published"),
    (("POST", "/repos/create", 500), "answered 500"),
    (("POST", "/validate-yaml", 400), "Invalid metadata in README.md"),
]


@pytest.mark.parametrize("existed", [False, True], ids=["new", "existed"])
@pytest.mark.parametrize("fault, sentence", LASTING, ids=str)
def test_a_fault_that_stays_leaves_no_half_written_repository(folder, hub, existed, fault, sentence):
    if existed:
        HubRepository(REPO).publish(folder, "first")
        change(folder)
    before = state(hub)
    hub.fault(*fault)
    start = time.monotonic()
    with pytest.raises((ValueError, ConnectionError), match=sentence) as refused:
        HubRepository(REPO).publish(folder, "second")
    assert time.monotonic() - start < 40  # the Hub would be silent for 60
    assert hub.met
    assert "\n" not in str(refused.value).strip()
    assert state(hub) == before


@pytest.mark.parametrize("existed", [False, True], ids=["new", "existed"])
def test_bytes_that_come_back_different_are_said(folder, hub, existed):
    if existed:
        HubRepository(REPO).publish(folder, "first")
        change(folder)
    hub.fault("GET", "/lfs/", "corrupt", 9)
    with pytest.raises(ValueError, match=r"other bytes than were sent for model.safetensors: do not use commit \w+"):
        HubRepository(REPO).publish(folder, "second")
    assert (("models", REPO) in hub.repos) == existed


@pytest.mark.parametrize("existed", [False, True], ids=["new", "existed"])
def test_a_commit_that_cannot_be_read_back_is_said_to_be_there_or_taken_back(folder, hub, existed):
    if existed:
        HubRepository(REPO).publish(folder, "first")
        change(folder)
    hub.fault("HEAD", "README.md", 403, 9)
    sentence = r"Commit \w+ is on .* could not be read back" if existed else "does not answer .*nothing was published"
    with pytest.raises(ConnectionError, match=sentence):
        HubRepository(REPO).publish(folder, "second")
    assert (("models", REPO) in hub.repos) == existed


def test_an_error_of_our_own_is_not_tried_again():
    tries = []

    def attempt() -> str:
        tries.append(1)
        raise RuntimeError("no upload")

    with pytest.raises(RuntimeError, match="no upload"):
        repository._persist(attempt)
    assert len(tries) == 1


def test_a_file_that_does_not_come_back_is_said(folder, hub, monkeypatch):
    commit = Repo.commit
    monkeypatch.setattr(
        Repo, "commit", lambda repo, files: commit(repo, {name: files[name] for name in files if name[:3] != "old"})
    )
    with pytest.raises(ValueError, match=r"other bytes than were sent for old_vit3d\.py: do not use"):
        HubRepository(REPO).publish(folder, "all of it")
    assert not hub.repos


def test_a_check_of_what_came_back_that_fails_takes_a_new_repository_back(folder, hub):
    def check(pulled: Path) -> None:
        raise ValueError(json.loads((pulled / "config.json").read_text())["model_type"])

    with pytest.raises(ValueError, match="vit3d"):
        HubRepository(REPO).publish(folder, "all of it", check=check)
    assert not hub.repos


def test_a_repository_that_cannot_be_taken_back_is_said_to_be_left(folder, hub):
    hub.fault("POST", COMMIT, 403)
    hub.fault("DELETE", "/repos/delete", 500)
    with (
        pytest.warns(UserWarning, match=f"{REPO} was made and could not be removed"),
        pytest.raises(ValueError, match="may not write"),
    ):
        HubRepository(REPO).publish(folder, "all of it")
    assert not published(hub)
