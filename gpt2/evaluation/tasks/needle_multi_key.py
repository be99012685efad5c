"""Several needles, one of which is asked for: the MK-NIAH task of RULER (Hsieh et al., 2024, arXiv 2404.06654)."""

from gpt2.evaluation.tasks.needles import Needles


class NeedleMultiKey(Needles):
    """Four things have a special number, one is asked for."""

    name = "needle_multi_key"
    keys = 4
