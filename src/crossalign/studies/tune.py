"""``tune``: search the settings of a recipe by ASHA, as CMDA §3.1.4 does.

Configurations are drawn from a space; each is trained to the first rung, and of every rung the better half goes on from its
checkpoint to the next. Validation alone chooses. The winner is trained again with other seeds, and those runs score the test
set, once each. Several methods get a search of the same size each.
"""

import dataclasses
import importlib.util
import multiprocessing
import secrets
import shutil
import time
from collections import Counter
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import yaml

from crossalign.config import FinetuneConfig, SearchConfig, flatten, to_dict, update, validate
from crossalign.config.effect import announce_unused
from crossalign.core.errors import UserError, missing_extra
from crossalign.core.files import remove, write_text
from crossalign.core.progress import progress
from crossalign.core.reading import read_word, read_yaml
from crossalign.recipes.space import Config, Space, open_space
from crossalign.runs.folder import differences, locked, read_into, saved_config, write_config
from crossalign.runs.names import RunFolder, SearchFolder
from crossalign.runs.promotion import resources
from crossalign.runs.search import read_search
from crossalign.studies.reproduce import configured, read_setting
from crossalign.studies.search.drive import DEATHS, base_work, check_base, drive, results_of
from crossalign.studies.search.follow import Follower
from crossalign.studies.search.journal import Journal
from crossalign.studies.search.session import RESUMED, SearchSession
from crossalign.studies.workers import WorkerPool, process_pool
from crossalign.training.stops import Interrupted

OWN = ("output", "overwrite", "score_test")
"""What a search says itself of each of its runs."""
AGAIN = "restore it, or search into another --output"
RECORD_SECONDS = 10.0  # between two writings of search.json


def tune(config: SearchConfig) -> list[str]:
    """Search and train the winners, into ``config.output``; returns what failed, a sentence each.

    A second call with the same settings goes on where the first stopped; with more trials it goes further.

    Raises:
        UserError: bad input, before any trial. Interrupted: see ``training.stops``; what was trained is kept.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a worker, which runs the script that started it
        raise UserError("a script that calls tune must do so under if __name__ == '__main__', since workers import it")
    names = _names(config)
    _check(config)
    bases = {name: _base(config, name) for name in names}
    announce_unused(list(bases.values()), _fixed(config))
    spaces = {name: _space(config, base) for name, base in bases.items()}
    bases = {name: spaces[name].inside(base) for name, base in bases.items()}
    if config.show_space:
        for name in names:
            print(f"# the space of {name}\n{spaces[name].text()}" if len(names) > 1 else spaces[name].text(), end="")
        return []
    ends = {name: _ends(config, base) for name, base in bases.items()}
    if len({tuple(end) for end in ends.values()}) > 1:
        listed = "; ".join(f"{name}: {', '.join(map(str, end))}" for name, end in ends.items())
        raise UserError(f"--methods have different rungs ({listed}): give them one length with --set, such as loop.epochs=50")
    if importlib.util.find_spec("optuna") is None:
        raise missing_extra("optuna", "search", "a search")
    with locked(config.output, mark=SearchFolder.token.name), _pool(config) as pool, ExitStack() as locks:
        _token(config.output)
        searches: list[SearchSession] = []
        for name in names:
            home = (config.output / name if len(names) > 1 else config.output).resolve()
            if len(names) > 1:
                locks.enter_context(locked(home, mark=SearchFolder.token.name))
            like = searches[0].base if searches else None
            searches.append(_open(config, name, bases[name], spaces[name], ends[name], home, pool, like))
        return [sentence for search in searches for sentence in _run(search, pool)]


def _names(config: SearchConfig) -> list[str]:
    """The recipes to search over."""
    methods = list(dict.fromkeys(name for text in config.methods for name in text.split(",") if name))
    if methods and config.recipe:
        raise UserError(f"both the recipe {config.recipe} and --methods {','.join(methods)}: give one or the other")
    if not methods and not config.recipe:
        raise UserError("no recipe: name one, such as crossalign tune small-lora, or several with --methods")
    names = sorted(path.parent.name for path in config.output.glob(f"*/{SearchFolder.settings.name}"))
    if len(methods) > 1 and SearchFolder(config.output).settings.is_file():
        raise UserError(f"{config.output} holds the search of one recipe: choose another --output for --methods")
    if len(methods) < 2 and names:
        raise UserError(f"{config.output} holds searches of several recipes ({', '.join(names)}): choose another --output")
    return methods or [config.recipe]


def _space(config: SearchConfig, base: Config) -> Space:
    """The space without the fields that --set fixes."""
    space, fixed = open_space(config.space, base), set(_fixed(config))
    both = [field.name for field in space.fields if field.name in fixed]
    if both and config.space.endswith((".yaml", ".yml")):
        raise UserError(f"--set fixes {', '.join(both)}, which --space {config.space} varies: take it out of one of them")
    left = Space(tuple(field for field in space.fields if field.name not in fixed)).of(base)
    if not left.fields:
        raise UserError(f"--set fixes every field that the space varies ({', '.join(both)}): leave one of them to the search")
    return left


def _fixed(config: SearchConfig) -> dict[str, Any]:
    """What --set gives, by the name of each field, sections taken apart."""
    given = [read_setting(text) for text in config.set]
    return {name: value for key, _, part in given for name, value in flatten({key: part}).items()}


def _check(config: SearchConfig) -> None:
    validate(config)
    if not config.cluster and config.workers < 1:
        raise UserError(f"--workers is {config.workers}; it must be at least 1")
    if config.resources and list(config.resources) != sorted(set(config.resources)):
        raise UserError(f"--resources {' '.join(map(str, config.resources))} do not rise")
    for name, value in _fixed(config).items():
        if name in OWN:
            raise UserError(
                f"--set {name}={value}: a search says that itself; its --output tells where, and --seeds 0 scores no test"
            )


def _base(config: SearchConfig, recipe: str) -> Config:
    """The configuration that the trials share, checked as far as it can be without opening anything."""
    base: Config = configured(recipe, config.set)
    if isinstance(base, FinetuneConfig) and not (base.model and base.data.source) and not config.show_space:
        raise UserError(f"{recipe} names no model or no data: give --set model=FOLDER data.source=[tasks.jsonl]")
    return dataclasses.replace(base, tracking=dataclasses.replace(base.tracking, mlflow=False))  # the search follows its trials


def _ends(config: SearchConfig, base: Config) -> list[int]:
    """Epochs, or evaluations of a text run, at the end of each rung."""
    most = base.loop.validations
    if not config.resources:
        return resources(most, config.rungs, config.factor)
    if config.resources[-1] != most or config.resources[0] < 1:
        listed = " ".join(map(str, config.resources))
        raise UserError(f"--resources {listed}: they must begin at 1 or later, and end at {most}, where training ends")
    return list(config.resources)


def _pool(config: SearchConfig) -> AbstractContextManager[WorkerPool]:
    """Processes here, or the workers of a cluster; they are told to save and end when the search stops before its end."""
    if not config.cluster:
        return process_pool(config.workers, config.threads)
    from crossalign.studies.search.cluster import cluster_pool

    return cluster_pool(config.cluster, config.workers, config.output)


def _open(
    config: SearchConfig,
    recipe: str,
    base: Config,
    space: Space,
    ends: list[int],
    home: Path,
    pool: WorkerPool,
    like: Config | None,
) -> SearchSession:
    """The search in its folder, new or gone on with; its base resolved by a run that trains nothing.

    ``like`` is another method's base, whose number format is taken where this one leaves it open: a comparison has one.
    """
    file = SearchFolder(home).settings
    SearchFolder(home).refuse_links()
    _seconds_before(home)  # here, so that a damaged record is told before training
    token = _token(home)
    shutil.rmtree(SearchFolder(home).trials / "base", ignore_errors=True)  # of a call that was stopped there
    asked = {key: value for key, value in to_dict(config).items() if key not in RESUMED}
    asked |= {"recipe": recipe, "methods": [], "space": space.as_data(), "resources": ends, "base": to_dict(base)}
    if file.is_file():
        saved = read_yaml(file, dict, AGAIN)
        resolved = saved.pop("resolved", None)
        if not isinstance(resolved, dict):
            raise UserError(f"'{file}' has no 'resolved' settings: {AGAIN}")
        before, here = flatten(saved), flatten(asked)
        unlike = [
            f"{key} is {before.get(key)!r} there and {here.get(key)!r} here"
            for key in {**before, **here}  # a setting that is new in this version is no other
            if before.get(key) != here.get(key) and (key.startswith("space.") or (key in before and key in here))
        ]
        if unlike:
            listed = "; ".join(unlike[:4])
            raise UserError(f"{home} holds a search with other settings ({listed}): choose another --output")
    else:
        alike = {"loop": {"precision": like.loop.precision}} if like and base.loop.precision == "auto" else {}
        resolved = _resolve(update(base, alike), recipe, home, token, pool)
        write_text(file, yaml.safe_dump(asked | {"resolved": resolved}, sort_keys=False))
    journal = Journal(SearchFolder(home).journal, recipe, base.loop.watched.larger_is_better, ends, config.factor)
    return SearchSession(config, recipe, read_into(base, file, {"loop": resolved}), space, journal, home, token)


def _token(folder: Path) -> str:
    """What tells this search's folder from another host's of the same name."""
    file = SearchFolder(folder).token
    if not file.is_file() or not read_word(file):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, secrets.token_hex(8))
    return read_word(file)


def _resolve(base: Config, recipe: str, home: Path, token: str, pool: WorkerPool) -> dict[str, Any]:
    """Device, number format and compiling, which are to be the same for all trials; and whatever is wrong with the base.

    After it images, corpus and features are in the cache.
    """
    waiting, loop = [base_work(base, recipe, home, token)], dict[str, Any]()
    for work, result in results_of(pool, lambda flying: waiting.pop() if waiting else None):
        file = RunFolder(work.config.output).config
        loop = read_yaml(file)["loop"] if file.is_file() else {}
        check_base(work, result)
    return {key: loop[key] for key in ("device", "precision", "compile")}


def _run(search: SearchSession, pool: WorkerPool) -> list[str]:
    """One search to its end: the trials, the winner's seeds, the record. Returns what failed, a sentence each."""
    started = time.monotonic()
    before = _seconds_before(search.home)
    follower, journal = Follower(search), search.journal
    written, known = started, list[tuple[int, int]]()

    def record() -> None:
        search.write_record(before + time.monotonic() - started)

    def follow(ended: list[int]) -> None:
        nonlocal written, known
        for trial in ended:
            follower.trial(trial)
        now = [(trial.begun, len(trial.scores)) for trial in journal.trials]
        if now != known and time.monotonic() - written > RECORD_SECONDS:
            record()
            written, known = time.monotonic(), now

    try:
        record()
        drive(search, pool, follow)
        winner = journal.winner()
        if winner is not None:
            write_config(
                search.home, search.settled(winner.number), SearchFolder.winner_config.name, without=("output", "tracking")
            )
            record()
            failed = train_winner(search, winner.number, pool)
        else:
            text = f"all {len(journal.trials)} trials of {search.recipe} failed, the first: {journal.trials[0].reason}"
            failed = [f"{text}; search another --space into another --output, or draw more --trials"]
    except BaseException as error:
        record()
        follower.end("KILLED" if isinstance(error, Interrupted | KeyboardInterrupt) else "FAILED")
        raise
    if not search.config.keep_checkpoints:
        for trial in journal.trials:
            shutil.rmtree(RunFolder(search.folder(trial.number)).checkpoints, ignore_errors=True)
    record()
    follower.end("FINISHED" if winner else "FAILED")
    return failed


def _seconds_before(home: Path) -> float:
    """What earlier calls took. Raises UserError where search.json is damaged."""
    record = SearchFolder(home).record
    return read_search(record).seconds if record.exists() else 0.0


def train_winner(search: SearchSession, trial: int, pool: WorkerPool) -> list[str]:
    """Train a trial's settings with seeds that chose nothing, to the end; only these runs score the test set.

    Runs of an earlier winner, whom a longer search has overtaken, are deleted. Returns what failed, a sentence a run.

    Raises:
        Interrupted: see :func:`results_of`.
    """
    for folder in sorted(SearchFolder(search.home).winner.glob("seed-*")):
        config, saved = seeded(search, trial, int(folder.name.removeprefix("seed-"))), saved_config(folder)
        if not saved or differences(config, saved):
            remove(folder)
    chose = search.base.seed
    configs = [seeded(search, trial, seed) for seed in range(chose + 1, chose + 1 + search.config.seeds)]
    waiting = [search.work(config) for config in configs if not RunFolder(config.output).result.is_file()]
    if configs:
        search.journal.mark_scored(trial)
    failed = []
    deaths = Counter[Path]()
    with progress(len(waiting), "winner's seeds", unit="run") as bar:
        for work, result in results_of(pool, lambda flying: waiting.pop(0) if waiting else None):
            deaths[work.config.output] += bool(result.died)
            if result.died and deaths[work.config.output] < DEATHS:
                waiting.append(work)
                continue
            if result.reason or result.died:
                failed.append(f"seed {work.config.seed} of the winner failed: {result.reason or result.died}")
            bar.update(1)
    return failed


def seeded(search: SearchSession, trial: int, seed: int) -> Config:
    """A trial's settings for one of the final runs."""
    return dataclasses.replace(search.settled(trial), seed=seed, output=SearchFolder(search.home).winner / f"seed-{seed}")
