"""``measure``: how aligned language models are with vision models, layer by layer, against chance."""

from crossalign.config import MeasureConfig
from crossalign.verbs import Verb


def run(config: MeasureConfig, _: str) -> str:
    """Measure, and tell in a line of each pair of models, and where the page is."""
    from crossalign.verbs.measure.job import measure

    lines = []
    for pair in measure(config)["alignment"]:
        low, high = pair["interval"]
        layers = f"layers {pair['language_layer']} × {pair['vision_layer']}"
        lines.append(
            f"{pair['language']} × {pair['vision']}: {pair['score']:.3f} [{low:.3f}, {high:.3f}], "
            f"calibrated {pair['calibrated']:.3f}, p = {pair['p']:.2g} ({layers})"
        )
    return "\n".join([*lines, str(config.output / "measure.md")])


MEASURE = Verb(MeasureConfig, run)
