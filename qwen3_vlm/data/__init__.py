"""From files on disk to model inputs: records, pictures, token ids, splits, batches.

The way of one record: `captions` reads it, `encode` turns it into token ids and labels, `splits`
puts it on the training or the evaluation side, `collate` packs it into a batch, `loader` does so in
worker processes. `features` keeps tower outputs on disk; `doctor` looks at everything beforehand.
It knows neither the models nor the training loop: a processor and callables are handed in.
"""
