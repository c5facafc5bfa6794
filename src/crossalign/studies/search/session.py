"""One search: what it is made of, what a trial of it is, and search.json, which is all that a report of it needs."""

import dataclasses
from pathlib import Path
from typing import Any

from crossalign.config import SearchConfig, update
from crossalign.core.files import write_json
from crossalign.recipes import verb_of
from crossalign.recipes.space import Config, Space, nested
from crossalign.runs.names import SearchFolder
from crossalign.runs.promotion import Job
from crossalign.studies.search.jobs import Work
from crossalign.studies.search.journal import Journal

RESUMED = ("trials", "workers", "threads", "seeds", "cluster", "output", "show_space", "keep_checkpoints", "tracking",
           "set", "rungs")  # fmt: skip
"""Settings in which a call may differ from the one that it goes on with; what the last two come to is compared itself."""


@dataclasses.dataclass(frozen=True)
class SearchSession:
    """One search: its base configuration, its space, its journal and its folder."""

    config: SearchConfig
    recipe: str
    base: Config
    """Device, number format and compiling are resolved: they are the same for all trials."""
    space: Space
    journal: Journal
    home: Path
    token: str

    def draw(self, number: int, attempt: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Settings of a trial, which hang on the seed, its number and the attempt alone, and their distributions."""
        import numpy as np

        seed = int(np.random.SeedSequence([self.config.seed, number, attempt]).generate_state(1)[0])
        drawn = self.space.draw(self.base, seed)
        return drawn, self.space.distributions(drawn)

    def folder(self, trial: int) -> Path:
        """The run folder of a trial."""
        return SearchFolder(self.home).trials / f"{trial:04d}"

    def settled(self, trial: int) -> Config:
        """The configuration of a trial."""
        config = update(self.base, nested(self.journal.trials[trial].settings))
        return dataclasses.replace(config, output=self.folder(trial))

    def work(self, config: Config, job: Job | None = None) -> Work:
        """A run for a worker: to its end, or as far as ``job`` takes its trial."""
        done = len(self.journal.trials[job.trial].curve) if job else 0
        until = self.journal.ends[job.rung] if job else None
        return Work(config, self.recipe, until, self.home, self.token, job, done=done, threads=self.config.threads)

    def write_record(self, seconds: float) -> None:
        """Write search.json; ``seconds`` is the wall clock of all calls."""
        journal, config, watched = self.journal, self.config, self.base.loop.watched
        winner = journal.winner()
        # Of a stage before training: no rung counts its epochs, as in CMDA §3.1.4.
        aligned = [self.settled(trial.number).align for trial in journal.trials if trial.curve]
        record = {
            "title": f"ASHA over {self.recipe}",
            "recipe": self.recipe,
            "row": self.base.row,
            "verb": verb_of(type(self.base)),
            "score": f"validation {watched.name}",
            "larger_is_better": watched.larger_is_better,
            "unit": watched.unit,
            "rungs": journal.ends,
            "factor": config.factor,
            "trials_asked": config.trials,
            "seed": config.seed,
            "workers": config.workers,
            "threads": config.threads,
            "space": self.space.as_data(),
            "trials": [trial.as_data(journal.ends) for trial in journal.trials],
            "winner": None if winner is None else winner.number,
            "scored": journal.scored,
            "epochs": journal.epochs(),
            "epochs_in_full": len(journal.trials) * journal.ends[-1],
            "alignment_epochs": sum(getattr(align, "epochs", 0) for align in aligned if align.metric != "none"),
            "seconds": round(seconds, 1),
        }
        write_json(SearchFolder(self.home).record, record)
