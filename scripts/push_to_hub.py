"""Show a tuned solver to others: `python -m scripts.push_to_hub exps/<run> --repo OWNER/NAME`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
from huggingface_hub import CommitOperationAdd, HfApi, metadata_load
from huggingface_hub.errors import HFValidationError, HTTPError

from errors import InputError, shows_input_errors
from models.asset_table import HUB_ID
from models.assets import reason_of
from training.diffusers_export import SOLVER_FILE, card_on_hub
from training.ppo.export_epd_predictor import DIFFUSERS
from training.runs.command_line import require_one_process

CARD = "README.md"
NEEDED = (CARD, SOLVER_FILE, "scheduler_config.json", "scheduling_epd.py")

EXAMPLES = """
\b
Examples:
  python -m scripts.push_to_hub exps/<timestamp>-sd15_base --repo OWNER/NAME
  python -m scripts.push_to_hub outputs/solver --repo OWNER/NAME --private     what scripts.export_diffusers wrote
  python sample.py --predictor_path OWNER/NAME --prompt "..."                  what anyone can do then
"""


@click.command(epilog=EXAMPLES)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--repo", required=True, metavar="OWNER/NAME", help="The repository; it is made where it is missing.")
@click.option("--private", is_flag=True, help="A new repository is seen by its owner alone.")
@shows_input_errors
def main(run: Path, repo: str, private: bool) -> None:
    """Upload the exported solver of a RUN, some 100 kB, as one commit; HF_TOKEN must be allowed to write there.

    The weights of its model stay where they are. HF_ENDPOINT names another hub.
    """
    require_one_process()
    if not HUB_ID.fullmatch(repo):
        raise InputError(f"--repo {repo}: write OWNER/NAME")
    contents = exported_files(run)
    contents[CARD] = card_on_hub(contents[CARD].decode(), repo).encode()
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    try:
        api = HfApi()
        page = api.create_repo(repo, private=private or None, exist_ok=True)
        commit = api.create_commit(repo, operations, commit_message="Add a few-step solver made by RLEPD")
    except (HTTPError, HFValidationError, OSError) as error:
        raise InputError(f"{repo}: nothing was uploaded: {reason_of(error, repo)}") from None
    click.echo(f"{page}: {len(operations)} files in commit {commit.oid}")


def exported_files(run: Path) -> dict[str, bytes]:
    """The files of a run's export for diffusers, or of such a folder, by name; hidden ones are left out.

    Raises InputError where there is no export, or its card names the model by a path that nobody else has.
    """
    folder = next((place for place in (run, run / "export" / DIFFUSERS) if (place / NEEDED[-1]).is_file()), None)
    if folder is None:
        typed = shlex.quote(str(run))
        way = f"has no export yet:  python -m training.ppo.export_epd_predictor {typed} --best"
        raise InputError(
            f"{run}: {way if run.is_dir() else 'no such folder of a run'}\n"
            f"Of a solver's file:  python -m scripts.export_diffusers {typed} --outdir FOLDER --base OWNER/NAME"
        )
    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if missing:
        raise InputError(f"{folder}: {', '.join(missing)} missing; export it anew")
    if not (metadata_load(folder / CARD) or {}).get("base_model"):
        raise InputError(
            f"{folder / CARD}: names the model by a path of this machine, where nobody else finds it; export it anew "
            "with --base OWNER/NAME, the model's repository on a hub"
        )
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in files}


if __name__ == "__main__":
    main()
