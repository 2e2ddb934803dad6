"""Where a SOURCE lies: a local folder, or a Hugging Face Hub id of which the needed files come.

``huggingface_hub`` keeps whole files in its cache, resumes one that breaks off, and fetches only
what is missing when asked again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sdopt.errors import MissingDependencyError, SourceError
from sdopt.exporters.checkpoint import NAMES, no_weights, weights_files
from sdopt.exporters.components import COMPONENTS, SHARED
from sdopt.exporters.identify import PICKLES

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_SHARD = re.compile(
    r"(?P<stem>[^.-]+)(\.(?P<variant>[^.-]+))?-\d+-of-\d+(\.(?P<suffix>[^.]+))?\.safetensors"
)
_TEXT_SUFFIXES = (".json", ".txt", ".model")


def is_single_file(source: str) -> bool:
    """Whether ``source`` is meant as a file: it is one, or it ends as model files do."""
    path = Path(source).expanduser()
    ends = path.suffix in (".safetensors", ".onnx", *PICKLES)
    return path.is_file() or (ends and not path.is_dir())


def resolve(
    source: str, dtype: str | None = None, components: Sequence[str] | None = None
) -> Path:
    """The local folder of ``source``: a path, or ``org/name[@revision]`` on the Hub.

    From the Hub come configurations, scheduler, tokenizer, and the safetensors of ``components``
    (default: all); the fp16 variant where ``dtype`` is fp16 and there is one.

    Raises:
        SourceError: nothing there, not reachable, gated, or without safetensors.
        MissingDependencyError: huggingface_hub is not installed.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        return path
    match = _HUB_ID.fullmatch(source)
    if match is None:
        raise SourceError(
            "no such folder",
            where=source,
            hint="give a diffusers folder, or a Hub id (org/name or org/name@revision)",
        )
    return _fetch(match["repo"], match["revision"], dtype, components)


def select(
    files: Iterable[str], dtype: str | None = None, components: Sequence[str] | None = None
) -> list[str]:
    """The files of a repository that an export needs.

    Raises:
        SourceError: a component has pickled weights only.
    """
    wanted = [c for c in COMPONENTS.values() if components is None or c.name in components]
    folders = {component.folder for component in wanted}
    tree: dict[str, list[str]] = {}
    for file in files:
        folder, _, name = file.rpartition("/")
        tree.setdefault(folder, []).append(name)
    _refuse_single(tree, folders)
    chosen: list[str] = [
        name for name in ("model_index.json", "config.json") if name in tree.get("", [])
    ]
    for part in SHARED:
        names = [name for name in tree.get(part, []) if name.endswith(_TEXT_SUFFIXES)]
        chosen += [f"{part}/{name}" for name in names]
    for folder in sorted(folders & set(tree)):
        chosen += [f"{folder}/{name}" for name in _component(tree[folder], folder, dtype)]
    if "model_index.json" not in chosen and chosen == ["config.json"]:
        chosen += _component(tree[""], "", dtype)
    return sorted(set(chosen))


def _refuse_single(tree: dict[str, list[str]], folders: set[str]) -> None:
    """Refuse a repository that holds single files and no pipeline.

    Raises:
        SourceError: naming the files to download.
    """
    root = tree.get("", [])
    files = [name for name in root if name.endswith((".safetensors", *PICKLES))]
    if not files or "model_index.json" in root or "config.json" in root or folders & set(tree):
        return
    usable = [name for name in files if name.endswith(".safetensors")]
    raise SourceError(
        "this repository holds single files, and no diffusers pipeline",
        where=", ".join(files[:5]) + (", ..." if len(files) > 5 else ""),
        hint=f"download one and export that: hf download REPOSITORY {usable[0]} --local-dir ., "
        f"then sdopt export {usable[0]} -o BUNDLE"
        if usable
        else "they are pickles, which are refused: look for one that has .safetensors",
    )


def _component(names: Sequence[str], folder: str, dtype: str | None) -> list[str]:
    """``config.json`` and the weights of one variant out of a component's files."""
    found = weights_files(names)
    if not found:
        raise no_weights(names, folder or "the repository")
    variants = [kind for kind in (dtype, None) if kind in found]
    if not variants and len(found) > 1:
        raise SourceError(
            "several variants of the weights and none asked for",
            where=folder,
            why=f"there are {', '.join(sorted(str(kind) for kind in found))}",
            hint="ask for a dtype that is there",
        )
    variant = variants[0] if variants else next(iter(found))
    chosen = ["config.json", found[variant]]
    if found[variant].endswith(".json"):
        for name in names:
            match = _SHARD.fullmatch(name)
            if (
                match
                and match["stem"] in NAMES
                and variant == (match["variant"] or match["suffix"])
            ):
                chosen.append(name)
    return chosen


def _fetch(
    repo: str, revision: str | None, dtype: str | None, components: Sequence[str] | None
) -> Path:
    try:
        import huggingface_hub as hub
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise MissingDependencyError(
            f"{repo} is no local folder, and the Hub needs huggingface_hub",
            hint="pip install 'sdopt[export]', or give a local folder",
        ) from error
    where = f"{repo}@{revision}" if revision else repo
    try:
        if constants.is_offline_mode():
            # What an earlier run left in the cache; what it lacks, opening the folder tells.
            index = "model_index.json"
            return Path(
                hub.snapshot_download(
                    repo, revision=revision, allow_patterns=index, local_files_only=True
                )
            )
        info = hub.HfApi().model_info(repo, revision=revision)
        files = select([one.rfilename for one in info.siblings or ()], dtype, components)
        return Path(hub.snapshot_download(repo, revision=info.sha, allow_patterns=files))
    except errors.GatedRepoError as error:
        raise SourceError(
            "this model is gated",
            where=where,
            why="its authors want its terms accepted first",
            hint=f"accept them on {constants.ENDPOINT}/{repo}, then log in with `hf auth login`",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SourceError(
            "no such model on the Hub, or it is private, and no such local folder",
            where=where,
            hint="check the name; for a private model log in with `hf auth login`",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SourceError(
            f"the model has no revision {revision}",
            where=where,
            hint="check the branch, tag or commit after @",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise SourceError(
            "the model is not in the local cache, and the Hub cannot be asked",
            where=where,
            why="HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else str(error),
            hint="go online once, or give a local folder",
        ) from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise SourceError(
            "the Hub cannot be reached, or the download broke off",
            where=f"{where} from {constants.ENDPOINT}",
            why=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            hint="try again when online: whole files are kept; or give a local folder",
        ) from error
