"""Sharing a saved posterior on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from laplace_lora.storage.model_card import CARD, with_section

UNLESS_GIVEN = {"commit_message": "Upload Laplace posterior"}


def upload(folder: Path, repo_id: str, section: str, **kwargs: Any) -> str:
    """Upload a folder's files to a repository on the hub, beside an adapter that is there.

    The section goes into the repository's model card, in the same commit. Where the repository
    changes in between, the hub refuses the commit, so that nobody's card is lost.

    Args:
        folder: Where the files are; the card is put there, too.
        repo_id: ``"user/name"``; created if missing.
        section: For the model card.
        **kwargs: Arguments of `huggingface_hub.HfApi.upload_folder`, such as ``token``,
            ``commit_message`` and ``revision``; ``private`` goes to ``create_repo``.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError

    api = HfApi(token=kwargs.pop("token", None))
    api.create_repo(repo_id, private=kwargs.pop("private", None), exist_ok=True)
    options = {**UNLESS_GIVEN, **kwargs}
    if "parent_commit" not in options:
        options["parent_commit"] = api.repo_info(repo_id, revision=options.get("revision")).sha
    inside = options.get("path_in_repo")
    name = f"{inside}/{CARD}" if inside else CARD
    try:
        found = api.hf_hub_download(repo_id, name, revision=options["parent_commit"])
        card: str | None = Path(found).read_text(encoding="utf-8")
    except EntryNotFoundError:
        card = None
    (folder / CARD).write_text(with_section(card, section, repo_id), encoding="utf-8")
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
