"""Owns `sdbuild build`: its options, and the story from recipes to reports.

Has never heard of tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sdmerge_build.build import build, plan_build
from sdmerge_build.cli.reaching import reach_from, store_from
from sdmerge_build.console import issues_as_json, print_issues, print_json, report_as_json, report_as_text, watcher_for
from sdmerge_build.errors import Issue, RecipeError, SdbuildError
from sdmerge_build.plan import plan_file
from sdmerge_build.prepare import Options
from sdmerge_build.rehearse import SIZES
from sdmerge_build.report import Report

__all__ = ["build_command"]


class _BuildCommand(click.Command):
    """A command whose `--rehearse` may stand without a size."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give a bare `--rehearse` its size, so that it does not take the recipe for one."""
        return super().parse_args(ctx, [f"--rehearse={SIZES[0]}" if arg == "--rehearse" else arg for arg in args])


@click.command("build", cls=_BuildCommand)
@click.argument("recipes", metavar="RECIPE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--only", multiple=True, metavar="STEP", help="Build this artifact alone; may be given several times.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where artifacts appear.  [default: out]")
@click.option("--store", type=click.Path(path_type=Path, file_okay=False), help="Where finished work is kept, or SDBUILD_STORE.  [default: cache]")
@click.option("--models", multiple=True, type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="A folder that holds models you own; may be given several times, or SDBUILD_MODELS.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(1, 256), help="How many threads compute.  [default: one per core]")
@click.option("--locked", is_flag=True, help="Fail if anything is not as the recipe's lock says.")
@click.option("--offline", is_flag=True, help="Ask nobody: use what is on this machine.")
@click.option("--allow-private", is_flag=True, help="Download from private addresses too, such as a server of your own.")
@click.option("--dry-run", is_flag=True, help="Say what would be built and why, and build nothing.")
@click.option("--explain", is_flag=True, help="Say for each artifact which fact changed since it was last built, and draw block weights.")
@click.option("--rehearse", type=click.Choice(SIZES), metavar="[=tiny|full]",
              help="Replace every source by a stand-in: tiny ones take a second, full ones have the real size.")  # fmt: skip
@click.option("--keep-going", is_flag=True, help="Build what can be built when something else cannot.")
@click.option("--release", is_flag=True, help="Write folders that are ready to be uploaded; refuse what the terms forbid.")
@click.option("--sign", metavar="KEY|sigstore", default="",
              help="Release, and sign the folder with a private key (PEM), or through Sigstore; needs sdbuild[sign].")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of lines.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def build_command(recipes: tuple[Path, ...], as_json: bool, quiet: bool, dry_run: bool, explain: bool, **said: Any) -> int:
    """Build what recipes ask for.

    Artifacts appear in out/ as NAME.safetensors with NAME.manifest.toml. What is up to date is left
    alone: a second run does nothing.
    """
    options = _options(**said)
    watcher = watcher_for(is_quiet=quiet or as_json)
    if options.rehearse:
        watcher.note(f"rehearsal ({options.rehearse}): stand-ins take the place of the sources")
    _refuse_one_name_for_two(recipes)
    run = plan_build if dry_run else build
    reports: list[Report] = []
    error: SdbuildError | None = None
    try:
        for recipe in recipes:
            try:
                reports.append(run(recipe, options, watcher))
            except SdbuildError as failure:
                if len(recipes) == 1:
                    raise
                error = failure
                break
            if not as_json and not quiet:
                click.echo("\n".join(report_as_text(reports[-1], is_plan=dry_run, explains=explain)))
    finally:
        watcher.finished()
    issues = [issue for report in reports for wish in report.wishes if wish.error for issue in wish.error.issues]
    if as_json:
        failed = {"error": {"exit": error.exit_code, "issues": issues_as_json(error.issues)}} if error else {}
        print_json({"reports": [report_as_json(report, is_plan=dry_run, explains=explain) for report in reports]} | failed)
    else:
        print_issues(issues + list(error.issues if error else ()))
    return error.exit_code if error else next((report.exit_code for report in reports if report.exit_code), 0)


def _options(
    *, out: Path | None, store: Path | None, rehearse: str | None, only: tuple[str, ...], keep_going: bool, release: bool, sign: str, **rest: Any
) -> Options:
    """Put together what the command line and the environment say."""
    reach = reach_from(searches=not rehearse, **rest)
    return Options(
        out=out,
        store=store_from(store),
        reach=reach,
        rehearse=rehearse or "",
        only=only,
        keep_going=keep_going,
        release=release or bool(sign),
        sign=sign,
    )


def _refuse_one_name_for_two(recipes: tuple[Path, ...]) -> None:
    """Two recipes in one run must not make two artifacts of one name: the second would take the first's place."""
    if len(recipes) == 1:
        return
    makers: dict[str, Path] = {}
    issues = [
        Issue(where=str(recipe), what=f"artifact `{name}` is also made by {other}", hint="build them into different folders with --out")
        for recipe in dict.fromkeys(recipes)
        for name in plan_file(recipe).wanted
        if (other := makers.setdefault(name.casefold(), recipe)).resolve() != recipe.resolve()
    ]
    if issues:
        raise RecipeError(*issues)
