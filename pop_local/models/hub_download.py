"""Find and download models on the Hugging Face Hub.

The huggingface_hub client finds the files and handles HF_ENDPOINT and HF_TOKEN.
"""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from pop_base.errors import PopError
from pop_base.progress import Progress
from pop_local.models.mmproj_files import mmproj_name
from pop_local.models.model_files import PARTIAL_SUFFIX
from pop_local.models.quants import choose, choose_mmproj, usual_ending
from pop_local.models.resumable_download import RemoteFile, download, reason_of
from pop_local.models.target import is_fetched, require_space, safe_name

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SPEC = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<file>.+))?", re.IGNORECASE)


@dataclass(frozen=True)
class HubModel:
    """A model at one commit of a hub repository, stored as one file or multiple parts.

    `mmproj` is the model's image encoder, or None if the repository does not contain one.
    """

    repo: str
    license: str
    files: tuple[RemoteFile, ...]
    mmproj: RemoteFile | None = None

    @property
    def all_files(self) -> tuple[RemoteFile, ...]:
        return (*self.files, self.mmproj) if self.mmproj else self.files

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.all_files)

    def targets(self, folder: Path) -> tuple[Path, ...]:
        """Return the local paths for `all_files`. The mmproj is renamed to match the model."""
        names = [PurePosixPath(usual_ending(file.name)).name for file in self.all_files]
        if self.mmproj:
            names[-1] = mmproj_name(names[0])
        return tuple(folder / safe_name(name) for name in names)


def find_on_hub(name: str) -> HubModel:
    """Find the model named hf:OWNER/REPO[:FILE]. FILE may be part of a file name, such as Q4_K_M.

    Raises PopError if the repository is missing or private. If FILE is unknown or ambiguous, the
    error's hint lists the repository's models.
    """
    match = _SPEC.fullmatch(name)
    if match is None:
        raise PopError(
            f"{name!r} is not the name of a hub model", "pass hf:OWNER/REPO or hf:OWNER/REPO:FILE"
        )
    from huggingface_hub import hf_hub_url

    repo = match["repo"]
    with _explain_errors(repo):
        info = _client().model_info(repo, files_metadata=True)
        headers = _client()._build_hf_headers()
    token = {key: headers[key] for key in headers if key.lower() == "authorization"}
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}

    def remote(name: str) -> RemoteFile:
        # The hub stores tiny files in git itself, and reports no hash for them.
        sha256 = lfs.sha256 if (lfs := siblings[name].lfs) else ""
        url = hf_hub_url(repo, name, revision=info.sha or "main")
        return RemoteFile(url, token, sha256, name, siblings[name].size or 0)

    files = choose(repo, tuple(siblings), match["file"] or "").files
    stated_license = info.card_data.get("license") if info.card_data else None
    mmproj = choose_mmproj(tuple(siblings), files[0])
    return HubModel(
        repo,
        str(stated_license or "not stated"),
        tuple(map(remote, files)),
        None if mmproj is None or mmproj in files else remote(mmproj),
    )


def fetch_from_hub(model: HubModel, folder: Path, advance: Progress, *, force: bool) -> Path:
    """Download a model's files into `folder` and return the first file's path.

    Existing files with the correct hash are kept. Calls `advance` with (done_bytes, total_bytes).
    Raises PopError, or OutputExistsError if a different file exists and `force` is false.
    """
    targets = model.targets(folder)
    missing = [
        (file, target)
        for file, target in zip(model.all_files, targets, strict=True)
        if not is_fetched(target, file.sha256, f"{model.repo}'s {file.name}", force=force)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(file.size_bytes for file, _ in missing)
    partials = [target.with_suffix(PARTIAL_SUFFIX) for _, target in missing]
    here = sum(path.stat().st_size for path in partials if path.exists())
    require_space(folder, total - here, model.repo)
    before = 0

    def advance_all(done: int, _: int) -> None:
        advance(before + done, total)

    for file, target in missing:
        with _explain_errors(model.repo):
            # Check access here, since even a gated model's description is public.
            _client().get_hf_file_metadata(url=file.url)
        download(file, target, advance_all)
        before += file.size_bytes
    return targets[0]


def _client() -> "HfApi":
    from huggingface_hub import HfApi

    # The client's warnings about retries would overwrite the progress bar.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    return HfApi(library_name="pop-local")


@contextmanager
def _explain_errors(repo: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise PopError(f"{repo!r} is not a repository name", "pass hf:OWNER/REPO") from error
    except errors.GatedRepoError as error:
        raise PopError(
            f"{repo} is gated: you must accept its owner's terms",
            "accept the terms on the repository's page, then set HF_TOKEN or run `hf auth login`",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise PopError(
            f"the repository {repo} does not exist or is private",
            "check the name; for a private repository, set HF_TOKEN or run `hf auth login`",
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise PopError("the hub client is in offline mode", "unset HF_HUB_OFFLINE") from error
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        raise PopError(
            f"the hub returned HTTP status {code} for {repo}",
            "check HF_TOKEN" if code in (401, 403) else "try again later",
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise PopError(
            f"the hub cannot be reached: {reason_of(error)}",
            "check the network, the proxy settings, and HF_ENDPOINT",
        ) from error
    except ValueError as error:  # an invalid reply or environment variable
        raise PopError(
            f"the hub request for {repo} failed ({type(error).__name__})",
            "check HF_ENDPOINT, HF_TOKEN, and the proxy settings",
        ) from error
