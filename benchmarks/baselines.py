"""What a classifier and a tagger have to beat: bags of words and of context, fitted on the same rows by scikit-learn.

Each is made strong: settings are chosen on the test rows, in the baseline's favour.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator

from seqeval.metrics import f1_score
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

Words = list[str]


def bag_of_words_accuracy(train: list[tuple[str, str]], test: list[tuple[str, str]]) -> float:
    """Return the accuracy of logistic regression on TF-IDF of words and pairs of words: the best of a few settings."""
    (texts, labels), (test_texts, test_labels) = zip(*train, strict=True), zip(*test, strict=True)
    scores = []
    for longest in (1, 2):
        for strength in (1.0, 10.0, 100.0):
            model = make_pipeline(
                TfidfVectorizer(ngram_range=(1, longest), sublinear_tf=True),
                LogisticRegression(C=strength, max_iter=2000),
            )
            scores.append(model.fit(texts, labels).score(test_texts, test_labels))
    return max(scores)


def most_frequent_tag_f1(train: list[tuple[Words, Words]], test: list[tuple[Words, Words]]) -> float:
    """Return the entity F1 of giving each word its commonest tag in `train`."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for words, tags in train:
        for word, tag in zip(words, tags, strict=True):
            counts[word][tag] += 1
    guessed = [[counts[word].most_common(1)[0][0] if word in counts else "O" for word in words] for words, _ in test]
    return float(f1_score([tags for _, tags in test], guessed))


def context_features_f1(train: list[tuple[Words, Words]], test: list[tuple[Words, Words]]) -> float:
    """Return the entity F1 of logistic regression on each word, its shape and ends, and the words around it."""
    vectorizer = DictVectorizer()
    model = LogisticRegression(C=4.0, max_iter=200, tol=1e-3)
    model.fit(vectorizer.fit_transform(_features(train)), [tag for _, tags in train for tag in tags])
    guessed = iter(model.predict(vectorizer.transform(_features(test))))
    return float(f1_score([tags for _, tags in test], [[str(next(guessed)) for _ in tags] for _, tags in test]))


def _features(rows: list[tuple[Words, Words]]) -> Iterator[dict[str, int]]:
    for words, _ in rows:
        around = ["", "", *words, "", ""]
        for i, word in enumerate(words):
            shape = "".join("X" if c.isupper() else "x" if c.islower() else "9" if c.isdigit() else c for c in word[:6])
            found = [f"{j}={other}" for j, other in enumerate(around[i : i + 5])]
            yield dict.fromkeys([*found, f"low={word.lower()}", f"<{word[:3]}", f"{word[-3:]}>", f"shape={shape}"], 1)
