"""The settings that make deprecated calls errors do so."""

import warnings

import pytest
import transformers
from deprecations import DEPRECATIONS


@pytest.mark.parametrize("module", ["gpt2.compression.cache.token_store", "__main__"])
@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_a_deprecated_call_of_ours_is_an_error(module, kind):
    with pytest.raises(kind):
        warnings.warn_explicit("old", kind, "some.py", 1, module=module)


def test_so_is_what_transformers_logs():
    transformers.utils.logging.get_logger("transformers.some").warning("`torch_dtype` is deprecated! Use `dtype`.")
    with pytest.raises(AssertionError, match="torch_dtype"):
        DEPRECATIONS.check()
    DEPRECATIONS.check()
