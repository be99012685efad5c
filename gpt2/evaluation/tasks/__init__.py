"""Tasks that a cache must not make worse: retrieval, tracking, counting, copying and learning from examples.

A task is one module with a subclass of `Task`, and a line of TASKS. Prompts are generated, so no data set is needed:
each follows from a seed, a length in tokens, a tokenizer and an ordinary text.
"""

from gpt2.evaluation.tasks.base import Source, Task, TaskPrompt
from gpt2.evaluation.tasks.copying import Copying
from gpt2.evaluation.tasks.few_shot import FewShot
from gpt2.evaluation.tasks.frequent_words import FrequentWords
from gpt2.evaluation.tasks.key_value import KeyValue
from gpt2.evaluation.tasks.needle_multi_key import NeedleMultiKey
from gpt2.evaluation.tasks.needle_multi_query import NeedleMultiQuery
from gpt2.evaluation.tasks.needle_multi_value import NeedleMultiValue
from gpt2.evaluation.tasks.needle_single import NeedleSingle
from gpt2.evaluation.tasks.passkey import Passkey
from gpt2.evaluation.tasks.variable_tracking import VariableTracking

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        NeedleSingle(),
        NeedleMultiKey(),
        NeedleMultiValue(),
        NeedleMultiQuery(),
        VariableTracking(),
        FrequentWords(),
        KeyValue(),
        Copying(),
        FewShot(),
        Passkey(),
    )
}

__all__ = ["TASKS", "Source", "Task", "TaskPrompt"]
