"""Several needles are asked for at once: the MQ-NIAH task of RULER (Hsieh et al., 2024, arXiv 2404.06654)."""

from gpt2.evaluation.tasks.needles import Needles


class NeedleMultiQuery(Needles):
    """Four things have a special number, two are asked for."""

    name = "needle_multi_query"
    keys = 4
    queries = 2
    max_new_tokens = 24
