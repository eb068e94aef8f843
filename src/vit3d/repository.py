"""NOUN  HubRepository: a model or a data set on the Hub, which gets everything in one commit, or nothing."""

import filecmp
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that huggingface_hub uses, whichever it is
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import get_session, get_token, validate_repo_id

TIMEOUT_S = 120  # for a connection, and for silence on it; huggingface_hub itself waits for ever
WAITS_S = (0, 2, 8)  # before each try; what cannot pass by itself is tried once
_PASSING = (408, 429, 500, 502, 503, 504)
_OWN_FILES = {"model": "config.json", "dataset": "metadata.jsonl"}


class HubRepository:
    """`repo_id` is NAMESPACE/NAME, `kind` "model" or "dataset". Nothing is asked of the Hub before `publish`.

    ValueError: `repo_id` is malformed.
    """

    def __init__(self, repo_id: str, kind: str = "model"):
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(f"{repo_id!r} is no repository id NAMESPACE/NAME: {error}") from error
        if "/" not in repo_id:
            raise ValueError(f"{repo_id!r} is no repository id NAMESPACE/NAME: the namespace is missing.")
        self.repo_id, self.kind = repo_id, kind
        self.place = {"repo_id": repo_id, "repo_type": kind}

    def check_token(self) -> None:
        """ValueError where no token is on this machine: said before any work, and without asking the Hub."""
        with self._sentences():
            if get_token() is None:
                raise LocalTokenNotFoundError

    def publish(
        self, folder: Path, message: str, *, private: bool = False, check: Callable[[Path], None] = lambda pulled: None
    ) -> str:
        """Put the files of `folder` (no sub-folders) into one commit, fetch them back and compare; its web address.

        `check` is called with the folder that was fetched. Whatever goes wrong, a repository that this call has made
        is taken away again, and one that was there keeps what it had. ValueError, ConnectionError: one sentence on
        why nothing was published.
        """
        with self._sentences(), _patience():
            api = HfApi()
            api.whoami()
            is_new = self._create(api, private)
            try:
                base = api.repo_info(**self.place)
                if not is_new:
                    self._check_ours(api, base, private)
                commit = self._commit(api, folder, message, base.sha)
                self._read_back(folder, commit, check, is_new)
            except BaseException:
                if is_new:
                    self._take_back(api)
                raise
        prefix = "" if self.kind == "model" else f"{self.kind}s/"
        return f"{constants.ENDPOINT}/{prefix}{self.repo_id}/commit/{commit}"

    def _create(self, api: HfApi, private: bool) -> bool:
        """True when the repository is new."""
        try:
            api.create_repo(**self.place, private=private, exist_ok=False)
        except HfHubHTTPError as error:
            if _status(error) != 409:
                raise
            return False
        return True

    def _check_ours(self, api: HfApi, info, private: bool) -> None:
        """Only a repository that holds the same kind of thing, or nothing, is written to."""
        if private and not info.private:
            raise ValueError(f"{self.repo_id} exists and is public; --private cannot hide it. Choose another name.")
        files = {sibling.rfilename for sibling in info.siblings} - {".gitattributes", "README.md", "LICENSE"}
        own = _OWN_FILES[self.kind]
        if not files:
            return
        holds = "other files" if own not in files else None
        if holds is None and self.kind == "model":
            with tempfile.TemporaryDirectory() as cache:
                path = api.hf_hub_download(**self.place, filename=own, revision=info.sha, cache_dir=cache)
                model_type = json.loads(Path(path).read_text()).get("model_type")
            holds = None if model_type == "vit3d" else f"a {model_type!r} model"
        if holds:
            raise ValueError(f"{self.repo_id} is taken: it holds {holds}. Choose another name.")

    def _commit(self, api: HfApi, folder: Path, message: str, base: str) -> str:
        """The new commit's id. `create_commit`, because `upload_folder` may make several."""

        def attempt() -> str:
            head = api.repo_info(**self.place).sha
            if head != base:
                return head  # done, and only the answer was lost; `_compare` looks whether it is ours
            operations = self._operations(api, folder, base)
            return api.create_commit(
                **self.place, operations=operations, commit_message=message, parent_commit=base
            ).oid

        return _persist(attempt)

    def _operations(self, api: HfApi, folder: Path, base: str) -> list:
        """Every file of the folder; code of an older version that is no longer part of it goes."""
        files = sorted(path for path in folder.iterdir() if path.is_file())
        names = {path.name for path in files}
        there = api.list_repo_files(**self.place, revision=base)
        stale = [name for name in there if name.endswith("_vit3d.py") and name not in names]
        additions = [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=str(path)) for path in files]
        return [*additions, *(CommitOperationDelete(path_in_repo=name) for name in stale)]

    def _read_back(self, folder: Path, commit: str, check: Callable[[Path], None], is_new: bool) -> None:
        try:
            self._compare(folder, commit, check)
        except (HTTPError, OSError) as error:
            if is_new:
                raise
            raise ConnectionError(
                f"Commit {commit} is on {self.repo_id}, but could not be read back ({type(error).__name__}): compare "
                "it with what you have before you use it."
            ) from error

    def _compare(self, folder: Path, commit: str, check: Callable[[Path], None]) -> None:
        """Fetch the commit into a fresh cache and compare every byte; once more, where the way back spoiled it."""
        different = ["everything"]
        for _ in range(2):
            with tempfile.TemporaryDirectory() as cache:
                place = {**self.place, "revision": commit, "cache_dir": cache}
                pulled = Path(_persist(lambda place=place: snapshot_download(**place)))
                names = [path.name for path in folder.iterdir() if path.is_file()]
                _, different, missing = filecmp.cmpfiles(folder, pulled, names, shallow=False)
                different = [*different, *missing]
                if not different:
                    return check(pulled)
        raise ValueError(
            f"The Hub gives back other bytes than were sent for {', '.join(different)}: do not use commit {commit}."
        )

    def _take_back(self, api: HfApi) -> None:
        """Remove the repository that this call has made; where that fails too, the first error is the one to tell."""
        try:
            api.delete_repo(**self.place, missing_ok=True)
        except (HTTPError, OSError):
            words = f"{self.repo_id} was made and could not be removed: remove it on {constants.ENDPOINT}."
            warnings.warn(words, stacklevel=2)

    @contextmanager
    def _sentences(self) -> Iterator[None]:
        """Whatever the Hub or the way to it raises becomes one sentence."""
        try:
            yield
        except LocalTokenNotFoundError:
            raise ValueError(
                "There is no Hugging Face token: run `hf auth login`, or set HF_TOKEN to one that may write."
            ) from None
        except HfHubHTTPError as error:
            raise ValueError(self._refusal(error)) from error
        except OfflineModeIsEnabled:
            raise ConnectionError("HF_HUB_OFFLINE is set: nothing is sent to the Hub; unset it to share.") from None
        except (HTTPError, LocalEntryNotFoundError) as error:
            said = f"The Hub at {constants.ENDPOINT} does not answer ({type(error).__name__})"
            raise ConnectionError(f"{said}: nothing was published.") from error

    def _refusal(self, error: HfHubHTTPError) -> str:
        status, said = _status(error), (error.server_message or "").strip().rstrip(".")
        said = f" ({said})" if said else ""
        login = "run `hf auth login`, or set HF_TOKEN to one that may write"
        sentences = {
            401: f"The Hub does not accept the token{said}: {login}.",
            403: f"The token may not write to {self.repo_id}{said}: use one that may, or another namespace.",
            409: f"{self.repo_id} is taken{said}: choose another name.",
            412: f"{self.repo_id} was changed by somebody else meanwhile{said}: look at it, then try again.",
        }
        if status in sentences:
            return sentences[status]
        return f"The Hub answered {status} for {self.repo_id}{said}: nothing was published."


def _persist(attempt: Callable[[], str]) -> str:
    """What `attempt` gives, tried again after each of `WAITS_S` where what went wrong may pass."""
    for left, wait in zip(reversed(range(len(WAITS_S))), WAITS_S, strict=True):
        time.sleep(wait)
        get_session().timeout = TIMEOUT_S  # a connection that broke may have brought a new session
        try:
            return attempt()
        except (HTTPError, OSError, RuntimeError) as error:
            # the upload of a large file fails with a RuntimeError around what happened
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            if not isinstance(cause, HTTPError | OSError):
                raise
            if not left or not _may_pass(cause):
                raise cause from None
    raise AssertionError("unreachable")


@contextmanager
def _patience() -> Iterator[None]:
    """A limit to how long a silent connection is waited for."""
    session = get_session()
    before, session.timeout = session.timeout, TIMEOUT_S
    try:
        yield
    finally:
        session.timeout = before


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _may_pass(error: Exception) -> bool:
    """A busy or failing server, a connection that broke; not a refusal."""
    if isinstance(error, OfflineModeIsEnabled):
        return False
    return not isinstance(error, HfHubHTTPError) or _status(error) in _PASSING
