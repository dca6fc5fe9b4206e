"""Models that only count: what a neural network has to beat."""

import math

import numpy as np
import pandas as pd

CHUNK = 1 << 22  # tokens counted at a time, so that a large text is never whole in memory


def token_counts(split, vocab_size):
    """How often each id occurs in a split (N,): (V,)."""
    parts = (split[start : start + CHUNK] for start in range(0, len(split), CHUNK))
    return sum(np.bincount(part, minlength=vocab_size) for part in parts)


def ngram_nats(data, split):
    """Total nats of a split by uniform, unigram and bigram models of the training split, by name.

    Unigram counts are smoothed by one, bigrams by a Dirichlet prior around the unigrams (MacKay
    and Peto 1995) whose strength is chosen on validation. Only pairs of these splits are counted.
    """
    vocab, train = data.vocab_size, data.splits["train"]
    counts, found = token_counts(train, vocab), token_counts(data.splits[split], vocab)
    unigram = (counts + 1) / (len(train) + vocab)
    counts[train[-1]] -= 1  # from here on: how often a token is followed by one
    pairs = {name: _pair_counts(data.splits[name], vocab, data.bos_id) for name in ("val", split)}
    seen = pd.Series(0, index=pairs["val"].index.union(pairs[split].index))
    for keys in _pair_keys(train, vocab):
        places = seen.index.get_indexer(keys)
        seen += np.bincount(places[places >= 0], minlength=len(seen))

    def bigram_nats(name, strength):
        keys = pairs[name].index
        context, token = np.divmod(keys.to_numpy(), vocab)
        probs = (seen[keys] + strength * unigram[token]) / (counts[context] + strength)
        return float(-(pairs[name] * np.log(probs)).sum())

    best = min((10, 30, 100, 300, 1000, 3000), key=lambda strength: bigram_nats("val", strength))
    unigram_nats = float(-(found @ np.log(unigram)))
    uniform_nats = float(found.sum()) * math.log(vocab)
    return {"uniform": uniform_nats, "unigram": unigram_nats, "bigram": bigram_nats(split, best)}


def _pair_keys(split, vocab_size, bos_id=None):
    """Yield first * vocab_size + second (M,) for neighbouring tokens, some millions at a time."""
    for start in range(0, len(split), CHUNK):
        part = np.asarray(split[max(0, start - 1) : start + CHUNK]).astype(np.int64)
        if start == 0 and bos_id is not None:
            part = np.insert(part, 0, bos_id)
        yield part[:-1] * vocab_size + part[1:]


def _pair_counts(split, vocab_size, bos_id):
    parts = [pd.Series(keys).value_counts() for keys in _pair_keys(split, vocab_size, bos_id)]
    return pd.concat(parts).groupby(level=0).sum()
