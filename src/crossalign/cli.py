"""The command line: ``crossalign VERB [RECIPE] [--key value …]``. Nothing heavy is imported before a verb runs."""

import atexit
import dataclasses
import difflib
import errno
import io
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

from crossalign.core.errors import UserError, unknown
from crossalign.core.reading import shown
from crossalign.training.stops import DiskFull, Diverged, Interrupted
from crossalign.verbs import Verb

VERBS: dict[str, tuple[str, str]] = {
    "quickstart": ("studies.commands:QUICKSTART", "both jobs in minutes on a CPU, without a model hub"),
    "adapt": ("verbs.adapt:ADAPT", "make a language model an image classifier"),
    "plan": ("verbs.plan:PLAN", "parameters, FLOPs, bytes and hours of a run, before it is paid for"),
    "pretrain": ("verbs.language_model:PRETRAIN", "pre-train a language model, pulled towards a vision model or not"),
    "finetune": ("verbs.language_model:FINETUNE", "fine-tune a language model, pulled towards a vision model or not"),
    "data prepare": ("verbs.prepare:PREPARE", "token files from text, to train a language model on"),
    "tune": ("studies.commands:TUNE", "search the settings of a recipe by ASHA, then train the winner"),
    "evaluate": ("verbs.evaluate:EVALUATE", "score a language model on benchmark tasks, or what a classifier's forgot"),
    "predict": ("verbs.adapt.predict:PREDICT", "classify images with a trained model"),
    "features": ("verbs.features:FEATURES", "a vision model's features of images with texts, written once"),
    "measure": ("verbs.measure:MEASURE", "how aligned language and vision models are, layer by layer, against chance"),
    "report": ("verbs.report:REPORT", "tables, figures and one HTML page from runs"),
    "compare": ("verbs.compare:COMPARE", "which rows differ, by how much and how surely"),
    "cache": ("verbs.cache:CACHE", "what lies in the cache, and how to be rid of it"),
    "reproduce": ("studies.commands:REPRODUCE", "run a whole table with seeds, a learning-rate sweep and controls"),
}
"""Each verb by the words that call it: where it stands in this package, and its line in the overview."""

UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
UNUSABLE |= {errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
"""What the system says of a path that is read-only, another's, a file where a folder is wanted, or one that cannot be made."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 bad input, 130 stopped and saved."""
    args = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    code = _run(args)
    leave_group(code)
    return code


def leave_group(code: int) -> None:
    """In one of several processes: leave the others in good order and end here with ``code``; otherwise do nothing.

    Python's own end would abort now and then: gloo's threads outlive the group as long as a module or a mesh refers to it, and
    may still be giving back a tensor, which takes an interpreter (https://github.com/pytorch/pytorch/pull/179291).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(args: list[str]) -> int:
    """The verb's exit code, or that of its error, which is told; errors that nobody foresaw stay tracebacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":  # what a terminal cannot show stops no result
            stream.reconfigure(errors="replace")
    try:
        return _dispatch(args) or 0
    except BrokenPipeError:  # the reader of our output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except UserError as error:
        code, sentence = 2, str(error)
        if os.environ.get("RANK", "0") != "0":  # all processes of a distributed run say the same
            return code
    except KeyboardInterrupt:
        code, sentence = 128 + signal.SIGINT, "stopped; the run resumes from its last checkpoint"
    except Interrupted as error:
        code, sentence = 130, f"{error}; the same command goes on from there"
    except (Diverged, DiskFull) as error:
        code, sentence = 1, str(error)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            where = error.filename or "writing results"
            code, sentence = 1, f"the disk is full ({where}); free some space, then run it again"
        elif error.errno in UNUSABLE and error.filename:
            code, sentence = 2, f"'{error.filename}' cannot be used ({error.strerror}): choose another path"
        else:
            raise
    with suppress(OSError):  # the terminal is gone
        print("crossalign: " + "\n".join(map(shown, sentence.split("\n"))), file=sys.stderr)
    return code


def _dispatch(args: list[str]) -> int | None:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if args[0] in ("-V", "--version"):
        from crossalign import __version__

        print(f"crossalign {__version__}")
        return 0
    if args[1:] in ([], ["-h"], ["--help"]) and any(name.startswith(f"{args[0]} ") for name in VERBS):
        print(_overview(f"{args[0]} "))
        return 0
    from crossalign.config import validate
    from crossalign.config.effect import announce_unused

    name, rest = find_verb(args)
    verb = load_verb(name)
    recipe = ""
    if verb.recipes is not None and rest and not rest[0].startswith("-"):
        recipe, rest = rest[0], rest[1:]
    if "--list" in rest and verb.recipes is not None:
        from crossalign.recipes import all_recipes

        recipes = all_recipes(tuple(verb.recipes) or None)
        width = max(map(len, recipes)) + 2
        print("\n".join(f"{name:<{width}}{recipe.summary}" for name, recipe in recipes.items()))
        return 0
    asked = _parse(verb, name, recipe, rest)
    validate(asked)
    announce_unused([asked], _given(type(asked), rest))
    result = verb.run(asked, recipe)
    if not isinstance(result, str):
        return result
    if os.environ.get("RANK", "0") == "0":
        print(result)
    return 0


def find_verb(args: list[str]) -> tuple[str, list[str]]:
    """The verb, which may be two words (``data prepare``), and what stands after it.

    Raises:
        UserError: there is no such verb; it names the nearest.
    """
    pairs = [name for name in VERBS if name.startswith(f"{args[0]} ")]
    words = 2 if pairs else 1
    name = " ".join(args[:words])
    if name not in VERBS:
        raise unknown("verb", name, pairs or {known.split()[0] for known in VERBS})
    return name, args[words:]


def load_verb(name: str) -> Verb:
    """The verb of that name, from the module that it stands in."""
    module, _, attribute = VERBS[name][0].partition(":")
    return getattr(import_module(f"crossalign.{module}"), attribute)  # type: ignore[no-any-return]


def _parse(verb: Verb, name: str, recipe: str, args: list[str]) -> Any:
    """Arguments to a configuration: the recipe, then --config, then the keys, each over the one before."""
    import tyro

    from crossalign.recipes import get_recipe

    kind = verb.args
    default = tyro.MISSING_NONPROP
    if verb.recipes:
        kinds = tuple(verb.recipes)
        default = get_recipe(recipe, kinds).make() if recipe else kinds[0]()
        file, args = _take(args, "--config")
        if file is not None:
            from crossalign.runs.folder import read_config

            default = read_config(default, Path(file))
        kind = verb.recipes[type(default)]
        default = kind(**{f.name: getattr(default, f.name) for f in dataclasses.fields(default)})
    _check_keys(kind, args)
    description = f"{kind.__doc__}" + (f"\n\nRecipes: crossalign {name} --list" if verb.recipes is not None else "")
    return tyro.cli(
        kind,
        prog=f"crossalign {name}" + (" [RECIPE]" if verb.recipes is not None else ""),
        description=description,
        args=args,
        config=(tyro.conf.PositionalRequiredArgs,),
        default=default,
    )


def _take(args: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of ``--name VALUE``, None where it is not there, and the arguments without it."""
    for i, arg in enumerate(args):
        if arg == name or arg.startswith(f"{name}="):
            value, after = (arg.partition("=")[2], i + 1) if "=" in arg else ("".join(args[i + 1 : i + 2]), i + 2)
            if not value or value.startswith("--"):
                raise UserError(f"{name} names no file: give the config.yaml of a run")
            return value, args[:i] + args[after:]
    return None, args


def _check_keys(cls: type, args: list[str]) -> None:
    """Name the nearest key for one that does not exist, in one sentence."""
    known = {"help", *_keys(cls)}
    for arg in args:
        key = arg[2:].split("=", 1)[0].replace("_", "-")
        if not arg.startswith("--") or arg == "--" or key in known:
            continue
        last = key.rpartition(".")[2]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        near = near or [k for k in sorted(known) if k.rpartition(".")[2] == last][:1]
        hint = f"; did you mean --{near[0]}?" if near else ""
        raise UserError(f"unknown option --{key}{hint} (all options: --help)")


def _given(cls: type, args: list[str]) -> list[str]:
    """The settings of an arguments class that a call names, by their names."""
    options = _keys(cls)
    keys = (arg[2:].split("=", 1)[0].replace("_", "-") for arg in args if arg.startswith("--"))
    return list(dict.fromkeys(options[key] for key in keys if key in options))


def _keys(cls: Any, prefix: str = "") -> dict[str, str]:
    """Every option of an arguments class, as written on the command line, with the name of its setting."""
    hints = get_type_hints(cls)
    keys: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(kind):
            keys |= _keys(kind, f"{name}.")
        else:
            forms = [name, f"{prefix}no-{field.name}"] if kind is bool else [name]
            keys |= {form.replace("_", "-"): name for form in forms}
    return keys


def _overview(start: str = "") -> str:
    lines = (f"  {name:<12} {summary}\n" for name, (_, summary) in VERBS.items() if name.startswith(start))
    return f"""crossalign: move representations across modalities, and know whether it really helped.

usage: crossalign VERB [RECIPE] [--key value ...]

{"".join(lines)}
crossalign VERB --help lists the keys; crossalign VERB --list the recipes, where it takes them."""


if __name__ == "__main__":
    sys.exit(main())
