"""What every script shares at the command line: flags and their types, the inputs that they name, and exit codes."""

from gpt2.cli.argument_types import fraction, int_list, natural, positive_int, ratio_list, word_list
from gpt2.cli.flags import (
    Parser,
    add_cache_flags,
    add_calibration_flags,
    add_codec_flag,
    add_eval_text_flag,
    add_evaluation_flags,
    add_model_flags,
    add_output_flag,
    add_shape_flags,
    add_text_flags,
    output_path,
    parser,
)
from gpt2.cli.running import run
from gpt2.cli.script import (
    Script,
    bar,
    chosen_caches,
    evaluation_length,
    evaluation_segments,
    open_script,
    output_files,
    write,
)

__all__ = [
    "Parser",
    "Script",
    "add_cache_flags",
    "add_calibration_flags",
    "add_codec_flag",
    "add_eval_text_flag",
    "add_evaluation_flags",
    "add_model_flags",
    "add_output_flag",
    "add_shape_flags",
    "add_text_flags",
    "bar",
    "chosen_caches",
    "evaluation_length",
    "evaluation_segments",
    "fraction",
    "int_list",
    "natural",
    "open_script",
    "output_files",
    "output_path",
    "parser",
    "positive_int",
    "ratio_list",
    "run",
    "word_list",
    "write",
]
