"""What a language model has to beat: n-grams of the same tokens, fitted on the same rows.

Interpolated Kneser-Ney (Chen & Goodman 1998, section 4.1.7), counted by scikit-learn; and what these make of hidden
tokens, from both sides.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

BEFORE = -1  # stands before a document
Gram = tuple[int, ...]
Document = tuple[
    Sequence[int], Sequence[int]
]  # what is read, and what is wanted at each place, or a number for nothing


class NGrams:
    """An interpolated Kneser-Ney model of token ids: p(token | the `order` - 1 before it)."""

    def __init__(self, documents: Iterable[Sequence[int]], vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        counts = _counts([[BEFORE] * (order - 1) + list(ids) for ids in documents], order)
        self._grams = [counts]  # by length of the context: at the end what occurs, before it kinds of left sides
        for _ in range(order - 1):
            self._grams.insert(0, Counter(gram[1:] for gram in self._grams[0]))
        self._discounts = [_discount(grams) for grams in self._grams]
        self._followers: list[dict[Gram, dict[int, int]]] = []
        for grams in self._grams:
            followers: dict[Gram, dict[int, int]] = defaultdict(dict)
            for gram, count in grams.items():
                followers[gram[:-1]][gram[-1]] = count
            self._followers.append(dict(followers))
        self._sums = [
            {before: sum(tokens.values()) for before, tokens in followers.items()} for followers in self._followers
        ]

    def probability(self, context: tuple[int, ...], token: int) -> float:
        """Return p(token | context); `context` holds at most `order` - 1 tokens."""
        found = 1 / self.vocab_size
        for length in range(min(len(context), self.order - 1) + 1):
            before = context[len(context) - length :]
            if (followers := self._followers[length].get(before)) is None:
                break
            discount, total = self._discounts[length], self._sums[length][before]
            found = (max(followers.get(token, 0) - discount, 0.0) + discount * len(followers) * found) / total
        return found

    def distribution(self, before: Gram, shorter: np.ndarray) -> np.ndarray:
        """Return p(token | before) for every token, from that of the context without its first token."""
        if before not in self._followers[len(before)]:
            return shorter
        rest, followers = self.parts(before)
        found = rest * shorter
        found[list(followers)] += list(followers.values())
        return found

    def parts(self, before: Gram) -> tuple[float, dict[int, float]]:
        """Return what a context that occurs leaves to the shorter one, and what it adds to the tokens seen after it."""
        followers, total = self._followers[len(before)][before], self._sums[len(before)][before]
        discount = self._discounts[len(before)]
        added = {token: max(count - discount, 0.0) / total for token, count in followers.items()}
        return discount * len(followers) / total, added

    def contexts(self, length: int) -> Iterable[Gram]:
        """Return every context of so many tokens that something follows."""
        return self._followers[length].keys()

    def loss(self, documents: Iterable[Document], ignored: int) -> tuple[float, int]:
        """Return the summed loss in nats of each document's wanted tokens, each from what is read up to its place."""
        total, count = 0.0, 0
        for read, wanted in documents:
            padded = (BEFORE,) * self.order + tuple(read)
            for i, token in enumerate(wanted, start=self.order + 1):
                if token != ignored:
                    total -= np.log(self.probability(padded[i - self.order + 1 : i], token))
                    count += 1
        return total, count


class Fill:
    """What an n-gram model of order 3 makes of hidden tokens: p(token | two tokens before it and two after it).

    Exact, but where neighbours are hidden too: these are left out of what is known.
    """

    def __init__(self, ngrams: NGrams, mask_id: int) -> None:
        self.ngrams, self.mask_id = ngrams, mask_id
        tokens = range(ngrams.vocab_size)
        self.unigrams = np.array([ngrams.probability((), token) for token in tokens])
        self.bigrams = np.array(
            [self.ngrams.distribution((before,), self.unigrams) for before in tokens]
        )  # [before, token]
        self._after: dict[int, list[int]] = defaultdict(list)  # a -> each b of an "a b" that something follows
        self._ahead: dict[int, list[int]] = defaultdict(list)  # b -> each a
        for first, second in ngrams.contexts(2):
            if first != BEFORE:
                self._after[first].append(second)
                self._ahead[second].append(first)
        # p(next | token) is `_left` of the unigram's, and more where "token next" occurs.
        self._left = np.ones(ngrams.vocab_size)
        self._preceding: dict[int, dict[int, float]] = defaultdict(dict)
        for (token,) in ngrams.contexts(1):
            if token != BEFORE:
                rest, followers = ngrams.parts((token,))
                self._left[token] = rest
                for following, share in followers.items():
                    self._preceding[following][token] = share

    def loss(self, documents: Iterable[Document], ignored: int) -> tuple[float, int]:
        """Return the summed loss in nats of the wanted tokens, each hidden at its place, and how many these are.

        What is read in the place of a wanted token, if it is no mask, is the token itself half of the time.
        """
        total, count = 0.0, 0
        for read, wanted in documents:
            known = [None if token == self.mask_id else int(token) for token in read]
            padded = [BEFORE, BEFORE, *known, None, None]
            for i, token in enumerate(wanted):
                if token != ignored:
                    found = self._distribution(*padded[i : i + 2], *padded[i + 3 : i + 5])[token]
                    if (shown := known[i]) is not None:
                        found = (found + (shown == token)) / 2
                    total, count = total - np.log(found), count + 1
        return total, count

    def _distribution(self, l2: int | None, l1: int | None, r1: int | None, r2: int | None) -> np.ndarray:
        scores = self.unigrams
        if l1 is not None:
            scores = self.ngrams.distribution((l1,), self.unigrams)
            if l2 is not None:
                scores = self.ngrams.distribution((l2, l1), scores)
        if r1 is not None:
            scores = scores * self._of_next(l1, r1)
            if r2 is not None:
                scores = scores * self._of_next_but_one(r1, r2)
        return scores / scores.sum()

    def _of_next(self, l1: int | None, r1: int) -> np.ndarray:
        """p(r1 | l1, token) for every token."""
        found = self._left * self.unigrams[r1]
        for token, share in self._preceding[r1].items():
            found[token] += share
        for token in self._after.get(l1, ()) if l1 is not None else ():
            found[token] = self.ngrams.probability((l1, token), r1)
        return found

    def _of_next_but_one(self, r1: int, r2: int) -> np.ndarray:
        """p(r2 | token, r1) for every token."""
        found = np.full(len(self.unigrams), self.ngrams.probability((r1,), r2))
        for token in self._ahead.get(r1, ()):
            found[token] = self.ngrams.probability((token, r1), r2)
        return found


def _counts(documents: list[list[int]], order: int) -> Counter[Gram]:
    """How often each run of `order` tokens occurs."""
    counter = CountVectorizer(analyzer=lambda ids: list(zip(*(ids[i:] for i in range(order)), strict=False)))
    sums = np.asarray(counter.fit_transform(documents).sum(0)).ravel()
    return Counter({gram: int(sums[column]) for gram, column in counter.vocabulary_.items()})


def _discount(grams: dict[Gram, int]) -> float:
    once, twice = (sum(count == number for count in grams.values()) for number in (1, 2))
    return once / (once + 2 * twice) if once else 0.5
