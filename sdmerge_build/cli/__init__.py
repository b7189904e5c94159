"""Owns the door: the command `sdbuild`, its errors and exit codes.

Has never heard of how anything is done; each command is a file of this folder. The only place that prints errors.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from sdmerge_build import __version__
from sdmerge_build.cli.build import build_command
from sdmerge_build.cli.inspect import inspect_command
from sdmerge_build.cli.license import license_command
from sdmerge_build.cli.methods import methods_command
from sdmerge_build.cli.provision import fetch_command, lock_command
from sdmerge_build.console import issues_as_json, print_issues, print_json
from sdmerge_build.errors import Issue, SdbuildError

__all__ = ["main"]

_INTERRUPTED = 130


class _Commands(click.Group):
    """A group in which a recipe stands for `build RECIPE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put `build` in front when no command is named but a recipe is."""
        is_command = bool(args) and (args[0] in self.commands or args[0] in {"--help", "-h", "--version"})
        if not is_command and any(arg.endswith(".toml") for arg in args):
            args = ["build", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Options such as --models, --only and --dry-run: `sdbuild build --help`.",
)
@click.version_option(__version__, prog_name="sdbuild")
@click.pass_context
def sdbuild(context: click.Context) -> None:
    """Build merged Stable Diffusion checkpoints from recipes.

    `sdbuild RECIPE.toml` builds what the recipe asks for, does only what is missing, and writes each
    artifact with a manifest of how it was made. Without models at hand, try `--rehearse`.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (build_command, lock_command, fetch_command, inspect_command, license_command, methods_command):
    sdbuild.add_command(command)


def main() -> NoReturn:
    """Run the command line, print what went wrong, and leave with the exit code that says so.

    0 done, 1 a step failed, 2 the recipe or command line is wrong, 3 the terms forbid it, 4 bytes are not what they claim, 5 a source is missing,
    7 the disk is full, 130 interrupted.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  closed by whoever started us
        stream.reconfigure(errors="backslashreplace")  # a terminal or pipe that cannot show a sign shows its number
        setattr(sys, name, stream)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) is not signal.SIG_IGN:  # who was told to ignore hang-ups, does
            signal.signal(number, _interrupt)
    code = _run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except OSError:  # whoever read our output has gone, or the disk it went to is full
        code = code or 1
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(code)  # all is on disk and closed; taking torch apart would cost a third of a second, networkx a tenth of doing nothing


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _run(args: list[str]) -> int:
    as_json = "--json" in args
    try:
        return int(sdbuild.main(args=args, prog_name="sdbuild", standalone_mode=False) or 0)
    except SdbuildError as error:
        return _fail(error.exit_code, list(error.issues), as_json=as_json)
    except click.ClickException as error:
        hint = f"`{error.ctx.command_path} --help` lists what there is" if isinstance(error, click.UsageError) and error.ctx else ""
        return _fail(2, [Issue(what=_plain(error.format_message()), hint=hint)], as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        return _fail(_INTERRUPTED, [Issue(what="interrupted; what was finished is kept, nothing unfinished was left behind")], as_json=as_json)
    except BrokenPipeError:
        return 1  # whoever read our output has gone; nothing more to say
    except MemoryError:
        return _fail(1, [Issue(what="there is not enough memory", hint="close other programs, or use fewer --jobs")], as_json=as_json)
    except OSError as error:
        where = str(error.filename or "")
        return _fail(1, [Issue(where=where, what=f"{(error.strerror or str(error)).lower()}")], as_json=as_json)
    except Exception:  # noqa: BLE001  the one place that may: everything else is our mistake
        print(f"BUG: {traceback.format_exc()}\nPlease report this.", file=sys.stderr)
        return 1


def _fail(code: int, issues: list[Issue], *, as_json: bool) -> int:
    with contextlib.suppress(OSError):  # the exit code has to say it alone, when nothing can be printed
        if as_json:
            print_json({"error": {"exit": code, "issues": issues_as_json(issues)}})
        else:
            print_issues(issues)
    return code


def _plain(message: Any) -> str:
    text = str(message).rstrip(".")
    return text[:1].lower() + text[1:]
