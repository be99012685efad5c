"""One needle: the S-NIAH task of RULER (Hsieh et al., 2024, arXiv 2404.06654)."""

from gpt2.evaluation.tasks.needles import Needles


class NeedleSingle(Needles):
    """One thing has a special number. Beside RULER's definition, two sentences of another form hold numbers too."""

    name = "needle_single"
    decoys = 2
