"""Every parser of lm2_jax that reads what others may have written, with the inputs to fuzz it by.

A Parser's `prepare` runs in the process that fuzzes it, and only there jax begins to work.
"""

import fuzz_data
import fuzz_models
import fuzz_tokenizers

PARSERS = fuzz_data.PARSERS | fuzz_tokenizers.PARSERS | fuzz_models.PARSERS
