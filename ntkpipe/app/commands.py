"""The commands of solvers and analyses, made of the table of steps. Loaded without scipy."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import click

from ntkpipe.base.arguments import Option, is_list, members_of
from ntkpipe.base.config import RunSpec
from ntkpipe.base.errors import ConfigError, needed_for
from ntkpipe.base.tables import print_rows
from ntkpipe.steps.registry import Entry
from ntkpipe.store.kernel_store import open_kernel

if TYPE_CHECKING:
    from distributed import Client

_METAVARS = {int: "INTEGER", float: "NUMBER"}
_NONE = "none"  # for an option whose default is another
# Second names of options.
_SHORT = {"num_probes": ["--probes"], "num_steps": ["--steps"], "smallest_eigenvalue": ["--smallest"], "k": ["-k"]}

# What several commands take.
STORE = click.Argument(["store"], metavar="STORE")
ARRAY = click.Option(["--array"], default="train", show_default=True, help="Which kernel, such as groups/NAME/train.")
MEMORY_LIMIT = click.Option(
    ["--memory-limit"], metavar="BYTES", help="Memory of this process, such as 8GiB; on a cluster of each worker."
)
SCHEDULER = click.Option(
    ["--scheduler"],
    metavar="ADDRESS",
    help="Work on a Dask cluster: tcp://host:8786, tls://…, or local for processes of this machine.",
)
AS_JSON = click.Option(["--json", "as_json"], is_flag=True, help="Print JSON.")


class StepCommand(click.Command):
    """The command of a step; its options are looked up once it is used."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        super().__init__(entry.name, callback=self._run, short_help=f"{entry.summary[0].upper()}{entry.summary[1:]}.")

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """The store, what the function takes, and what every step takes."""
        if not self.params:
            from ntkpipe.steps.inputs import help_of_step, options_of_step  # keeps scipy out of other commands

            about, texts = help_of_step(self._entry)
            self.help = f"{about}\n\nThe result is saved in results/{self.name} of STORE."
            own = [_parameter(one, texts.get(one.name, "")) for one in options_of_step(self._entry).values()]
            own.sort(key=lambda one: isinstance(one, click.Option))
            self.params = [STORE, *own, ARRAY, MEMORY_LIMIT, SCHEDULER, AS_JSON]
        return super().get_params(ctx)

    def _run(self, store: str, array: str, scheduler: str | None, as_json: bool, **options: Any) -> None:
        from ntkpipe.steps.run import run_step  # keeps scipy out of other commands

        given: Any = {name: None if value == _NONE else value for name, value in options.items() if value is not None}
        opened = open_kernel(store)
        with client_of(RunSpec(scheduler=scheduler)) as client:
            found = run_step(opened, self._entry.name, array=array, client=client, **given)
        show_result(f"{self.name} {store}", found, as_json=as_json)


def _reader(option: Option) -> Callable[..., Any]:
    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        try:
            return None if value is None else option.read(value)
        except ConfigError as error:
            raise click.BadParameter(str(error), ctx, param) from None

    return read


def _parameter(option: Option, text: str) -> click.Parameter:
    """An option of the command line; text that must be given is an argument."""
    members = [one for one in members_of(option.annotation) if one is not NoneType]
    if option.is_required and members == [str]:
        return click.Argument([option.name], metavar=option.name.upper())
    names = [option.name, *_SHORT.get(option.name, ()), f"--{option.name.replace('_', '-')}"]
    default = "" if option.is_required or option.default is None else f"  [default: {_shown(option.default)}]"
    if members == [bool]:
        names = [option.name, *(f"{one}/--no-{one[2:]}" for one in names[1:])]
        return click.Option(names, default=None, help=text + default)
    found: dict[str, Any] = {"required": option.is_required, "help": text + default}
    if len(members) == 1 and get_origin(members[0]) is Literal:
        has_none = NoneType in members_of(option.annotation) and default
        return click.Option(names, type=click.Choice([*get_args(members[0]), *([_NONE] if has_none else [])]), **found)
    metavar = "NUMBERS" if is_list(members[0]) else _METAVARS.get(members[0], "TEXT")
    return click.Option(names, callback=_reader(option), metavar=metavar, **found)


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return ",".join(map(str, default)) if isinstance(default, list | tuple) else str(default)


def show_result(title: str, found: Any, more: Sequence[tuple[str, str]] = (), *, as_json: bool) -> None:
    """Print a result or a report, and rows beside its own; exit with 1 if it is not what was asked for."""
    if as_json:
        print(json.dumps(found.to_json(), indent=1))
    else:
        print_rows(title, [*found.rows(), *more])
    if not found.is_good:
        sys.exit(1)


def client_of(run: RunSpec, *, num_gpus: int = 0) -> AbstractContextManager["Client | None"]:
    """A client of the cluster that a run names; None of none."""
    if run.scheduler is None:
        return nullcontext()
    with needed_for("a scheduler", "cluster"):
        from ntkpipe.executors.connect import connect  # keeps distributed out of runs on one machine

        return connect(run.scheduler, run, num_gpus=num_gpus)
