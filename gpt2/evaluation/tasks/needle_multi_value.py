"""One key with several values: the MV-NIAH task of RULER (Hsieh et al., 2024, arXiv 2404.06654)."""

from gpt2.evaluation.tasks.needles import Needles


class NeedleMultiValue(Needles):
    """Three special numbers of one thing, all to be named; two other things have one each."""

    name = "needle_multi_value"
    keys = 3
    values = 3
    max_new_tokens = 32
