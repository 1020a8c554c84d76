"""Text, pictures and sounds as ids of one token space, and back.

`token_space` is what every id means, `uti_config` what a user writes, `unified_tokenizer` the two
put to work. Nothing in this room knows of training, models or data sets on disk.
"""
