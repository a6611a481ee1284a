"""The commands by name; each one's file is imported when it is called, its help is here."""

from cyclopts import App, Parameter

COMMANDS = {
    "demo": "Distil on embedded real data in about three minutes, and write report.html.",
    "run": "Run a recipe: a shipped name or a YAML file.\n\n"
    "Any key of the recipe can be set by its dotted path: --seed 1, --data.name mnist:PATH, or, under the name of a "
    "stage, --distil.train.steps 500, --distil.options.temperature 2. Values are read as YAML.",
    "plan": "Say what a recipe will cost before it is run: parameters, FLOPs, memory, disk, time.\n\n"
    "A few steps of every stage are taken and measured on this machine. Nothing is written into a run's folder. "
    "Any key of the recipe can be set by its dotted path, as for `limbeck run`.",
    "cache": "Run a recipe's teachers once and store what they say.\n\n"
    "Stages with the key cache then train without running their teachers. Started again it goes on where it stopped; "
    "started several times at once the processes share the work.",
    "methods": "List the methods, or show one with its options.",
    "eval": "Measure a finished run's student on its validation data.\n\n"
    "Accuracy comes with its 95 % interval, and agreement with the teacher where there is one.",
    "sample": "Draw images from a finished run's generator, as one picture.",
    "report": "Write one page that shows or compares runs.",
    "export": "Write a run's student for use elsewhere: timm, transformers, onnx.",
    "sweep": "Search options of a recipe with optuna; several processes can share the work.\n\n"
    "Each trial is a run in a folder of its own. Started again with the same storage the search goes on where it "
    "stopped; started several times at once the processes share the trials. Any key of the recipe can be set for all "
    "trials by its dotted path, as for `limbeck run`.",
}
"""What each command does: one line, and more for its own help."""

# Where a command's function is not called like the command.
_PLACES = {"eval": "evaluate:evaluate", "methods": "methods:list_or_show"}


def version() -> str:
    """The installed version."""
    import limbeck

    return limbeck.__version__


app = App(
    name="limbeck",
    help="All of distillation: what a big, slow or costly teacher knows, made small, fast or cheap.",
    help_epilogue="Add --debug to any command for the traceback of a failure. "
    "Exit codes: 0 done, 1 failure, 2 bad usage or recipe, 3 interrupted and resumable.",
    version=version,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
    help_format="plaintext",  # Markdown would take a tenth of a second to import
)
for _name, _help in COMMANDS.items():
    _place = _PLACES.get(_name, f"{_name}:{_name}")
    app.command(f"limbeck.cli.{_place}", name=_name, help=_help, help_epilogue="")
