"""``data prepare``: token files from text, to train a language model on."""

from dataclasses import dataclass
from pathlib import Path

from crossalign.config import CorpusConfig
from crossalign.verbs import Verb


@dataclass
class PrepareArgs(CorpusConfig):
    """Token files from text, to train a language model on; a second call goes on where the first stopped."""

    output: Path = Path("runs/corpus")
    """Folder of the token files, the tokenizer and meta.json."""


def run(args: PrepareArgs, _: str) -> str:
    """Write the token files, and tell how much text they hold."""
    from crossalign.data.text.corpus import prepare

    corpus = prepare(args, args.output)
    lines = []
    for side in ("train", "validation"):
        counts = corpus.meta[side]
        lines.append(f"{side}: {counts['documents']:,} documents, {counts['bytes']:,} bytes, {counts['tokens']:,} tokens")
    dropped = [f"{corpus.meta['empty_documents']:,} empty documents"] if corpus.meta["empty_documents"] else []
    if dropped + corpus.meta["left_out"]:
        lines.append(f"left out: {', '.join(dropped + corpus.meta['left_out'])}")
    return "\n".join([*lines, f"vocabulary of {corpus.vocabulary:,}; {args.output}"])


PREPARE = Verb(PrepareArgs, run)
