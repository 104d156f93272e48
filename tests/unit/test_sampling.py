from collections import Counter
from fractions import Fraction
from hashlib import sha256
from itertools import islice

import pytest

from fedpact_contract import sampling
from fedpact_contract.errors import InputError
from fedpact_contract.sampling import below, permutation, round_seed, standard_error, t_quantile, words

DIGESTS = [sha256(bytes([i])).hexdigest() for i in range(4)]
SEED = bytes(range(32))
KNOWN = ((3, 0, 7, 4, 1, 2, 5, 8, 6, 9), (8, 9, 4, 3, 6, 0, 5, 2, 7, 1))


def test_the_round_seed_is_made_of_type_number_and_sorted_digests_alone():
    text = b"fedpact.round-seed.v1:7:" + b"".join(sorted(map(bytes.fromhex, DIGESTS)))
    assert round_seed(7, DIGESTS) == sha256(text).digest()
    assert round_seed(7, DIGESTS[::-1]) == round_seed(7, DIGESTS)
    others = [round_seed(8, DIGESTS), round_seed(7, DIGESTS[:3]), round_seed(7, [*DIGESTS[:3], "f" * 64])]
    assert len({round_seed(7, DIGESTS), *others}) == 4


@pytest.mark.parametrize("digests", [[], [""], ["ab" * 31], ["xy" * 32], [*DIGESTS, "ab" * 33]])
def test_a_seed_of_anything_but_digests_is_refused(digests):
    with pytest.raises(InputError) as caught:
        round_seed(3, digests)
    assert (caught.value.code, caught.value.field) == ("ROUND_SEED", "round 3")
    assert caught.value.remedy


def test_words_are_those_of_the_counter_and_each_key_has_its_own():
    first = sha256(b"label:key" + bytes(8)).digest() + sha256(b"label:key" + bytes(7) + b"\1").digest()
    assert list(islice(words(b"label:", b"key"), 8)) == [
        int.from_bytes(first[k : k + 8], "big") for k in range(0, 64, 8)
    ]
    assert next(words(b"label:", b"kez")) != next(words(b"label:", b"key")) != next(words(b"labem:", b"key"))


def test_a_word_that_would_favour_small_numbers_is_passed_over():
    most = 2**64 - 2**64 % 3
    assert below(iter([most, 2**64 - 1, most - 1]), 3) == 2
    assert below(iter([2**64 - 1]), 4) == 3


def test_a_permutation_by_hand():
    """Fisher and Yates from above, as another language would write it."""
    stream = words(b"fedpact.permutation.v1:", SEED + bytes(7) + b"\5")
    order = list("abcdefg")
    for i in (6, 5, 4, 3, 2, 1):
        j = next(stream) % (i + 1)  # at such small bounds no word of this stream is passed over
        order[i], order[j] = order[j], order[i]
    assert ["abcdefg"[k] for k in permutation(SEED, 5, 7)] == order


def test_known_permutations_stay_what_they_are():
    assert permutation(SEED, 0, 10) == KNOWN[0]
    assert permutation(SEED, 1, 10) == KNOWN[1]
    assert permutation(SEED, 0, 1) == (0,)


def test_each_order_of_four_is_equally_likely():
    counts = Counter(permutation(SEED, k, 4) for k in range(12_000))
    chi_square = sum((count - 500) ** 2 / 500 for count in counts.values())
    assert len(counts) == 24
    assert chi_square < 49.7  # 0.1 % at 23 degrees of freedom


def test_quantiles_of_student_are_never_below_scipys_and_hardly_above():
    from scipy.stats import t

    for degrees in range(1, sampling.MOST_DEGREES + 1):
        exact = t.ppf(0.975, degrees)
        assert exact <= t_quantile(degrees) <= exact + 1e-4
    for degrees in (0, sampling.MOST_DEGREES + 1):
        with pytest.raises(ValueError, match="degrees"):
            t_quantile(degrees)


def test_roots_are_rounded_up():
    assert sampling.root(Fraction(9, 4)) == Fraction(3, 2)
    assert 0 < sampling.root(Fraction(2)) ** 2 - 2 < Fraction(1, 10**17)
    assert str(standard_error(Fraction(2))) == "1.415"
