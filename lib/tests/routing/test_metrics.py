"""Metrics: hand-computed examples, bounds and invariances on random routings, null baselines, degenerate inputs."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from upcycling.routing.metrics import (
    balance_score,
    coactivation,
    coefficient_of_variation,
    dead_experts,
    domain_divergence,
    domain_specialization,
    effective_experts,
    jensen_shannon,
    load_per_expert,
    max_over_mean,
    router_entropy,
    router_margin,
    router_saturation,
    shuffled_baseline,
    uniform_baseline,
    vocabulary_specialization,
)

# Four tokens, top-2 of 4 experts. Token 3 repeats token 0's choice; expert 3 is used once.
IDS_NK = torch.tensor([[0, 1], [0, 2], [1, 3], [1, 0]])


def close(actual, expected, **tolerance):
    torch.testing.assert_close(torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), **tolerance)


@st.composite
def routings(draw, max_experts=6):
    """(expert_ids_NK, num_experts, generator): K different experts a token, some experts favoured."""
    num_experts = draw(st.integers(1, max_experts))
    top_k = draw(st.integers(1, num_experts))
    num_tokens = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    skew = draw(st.sampled_from([0.0, 1.0, 20.0]))
    scores_NE = torch.rand(num_tokens, num_experts, generator=generator) + skew * torch.arange(num_experts)
    return scores_NE.topk(top_k, dim=-1).indices, num_experts, generator


# ------------------------------------------------------------------------------------------------------------- load


def test_load_by_hand():
    load_E = load_per_expert(IDS_NK, 5)
    close(load_E, [3 / 8, 3 / 8, 1 / 8, 1 / 8, 0])
    close(max_over_mean(load_E), 5 * 3 / 8)
    squares = 2 * (3 / 8) ** 2 + 2 / 64
    close(coefficient_of_variation(load_E), math.sqrt(5 * squares - 1))
    close(effective_experts(load_E), 1 / squares)
    entropy = -2 * (3 / 8 * math.log(3 / 8) + 1 / 8 * math.log(1 / 8))
    close(balance_score(load_E), entropy / math.log(5))
    assert dead_experts(load_E).tolist() == [False, False, False, False, True]
    assert dead_experts(load_E, threshold=0.62).tolist() == [False, False, False, False, True]
    assert dead_experts(load_E, threshold=0.63).tolist() == [False, False, True, True, True]  # 1/8 is 0.625 of the mean


def test_dead_is_at_most_the_threshold():
    """At exactly the threshold an expert counts as dead; at threshold 0 only one that is never chosen does."""
    load_E = torch.tensor([0.625, 0.25, 0.125, 0.0], dtype=torch.float64)  # 2.5, 1, 0.5 and 0 times the mean
    assert dead_experts(load_E, threshold=0).tolist() == [False, False, False, True]
    assert dead_experts(load_E, threshold=0.5).tolist() == [False, False, True, True]
    assert dead_experts(load_E, threshold=1).tolist() == [False, True, True, True]
    rare_E = load_per_expert(torch.tensor([[0]] * 999 + [[1]]), 4)
    assert dead_experts(rare_E, threshold=0).tolist() == [False, False, True, True], "once in 1,000 is not never"
    by_default_E = torch.tensor([0.95, 0.025, 0.0249, 0.0001], dtype=torch.float64)  # 0.025 is a tenth of the mean
    assert dead_experts(by_default_E).tolist() == [False, True, True, True]
    assert dead_experts(torch.tensor([0.974, 0.026], dtype=torch.float64)).tolist() == [False, True]
    assert dead_experts(torch.tensor([0.948, 0.052], dtype=torch.float64)).tolist() == [False, False]
    assert not dead_experts(torch.full((3, 2), 0.5)).any()


def test_load_of_every_layer_at_once_is_the_load_of_each():
    ids_LNK = torch.stack([IDS_NK, IDS_NK.flip(0), torch.full((4, 2), 3)])
    load_LE = load_per_expert(ids_LNK, 4)
    assert load_LE.shape == (3, 4)
    for layer in range(3):
        close(load_LE[layer], load_per_expert(ids_LNK[layer], 4))
        close(balance_score(load_LE)[layer], balance_score(load_LE[layer]))


@settings(max_examples=60, deadline=None)
@given(routings())
def test_load_statistics_stay_in_their_ranges_and_do_not_care_how_experts_are_numbered(routing):
    ids_NK, num_experts, generator = routing
    top_k, eps = ids_NK.shape[1], 1e-9
    load_E = load_per_expert(ids_NK, num_experts)
    close(load_E.sum(), 1.0)
    assert load_E.max() <= 1 / top_k + eps
    assert 1 - eps <= max_over_mean(load_E) <= num_experts / top_k + eps
    assert -eps <= coefficient_of_variation(load_E) <= math.sqrt(num_experts / top_k - 1) + 1e-6
    lowest = math.log(top_k) / math.log(num_experts) if num_experts > 1 else 1.0
    assert lowest - eps <= balance_score(load_E) <= 1 + eps
    assert top_k - eps <= effective_experts(load_E) <= num_experts + eps
    renamed_E = torch.randperm(num_experts, generator=generator)
    renamed_load_E = load_per_expert(renamed_E[ids_NK], num_experts)
    for statistic in (max_over_mean, coefficient_of_variation, balance_score, effective_experts):
        close(statistic(renamed_load_E), statistic(load_E))
    assert dead_experts(renamed_load_E).sum() == dead_experts(load_E).sum()


def test_load_extremes_one_token_one_expert_all_experts():
    all_same = load_per_expert(torch.tensor([[2, 0]] * 7), 8)
    close(max_over_mean(all_same), 4.0)
    close(balance_score(all_same), math.log(2) / math.log(8))
    close(effective_experts(all_same), 2.0)
    assert dead_experts(all_same).sum() == 6
    everyone = load_per_expert(torch.arange(3).repeat(5, 1), 3)  # k = E
    close(max_over_mean(everyone), 1.0)
    close(balance_score(everyone), 1.0)
    only_one = load_per_expert(torch.zeros(4, 1, dtype=torch.long), 1)
    close(balance_score(only_one), 1.0)
    close(coefficient_of_variation(only_one), 0.0)
    one_token = load_per_expert(torch.tensor([[1]]), 2)
    close(balance_score(one_token), 0.0)
    assert str(float(balance_score(one_token))) == "0.0"  # not -0.0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[0, 4]]), "expert id 4 is outside 0..3"),
        (torch.tensor([[-1, 2]]), "expert id -1"),
        (torch.zeros(0, 2, dtype=torch.long), "at least one token"),
        (torch.tensor([0, 1]), r"\(N, K\)"),
    ],
)
def test_ids_that_cannot_be_are_named(ids, message):
    for call in (load_per_expert, coactivation):
        with pytest.raises(ValueError, match=message):
            call(ids, 4)


# --------------------------------------------------------------------------------------------------- specialisation


def test_domain_specialization_by_hand():
    share_CE = domain_specialization(IDS_NK, torch.tensor([0, 0, 2, 2]), 4)
    close(share_CE[0], [1.0, 0.5, 0.5, 0.0])  # tokens 0 and 1
    close(share_CE[2], [0.5, 1.0, 0.0, 0.5])  # tokens 2 and 3
    assert share_CE[1].isnan().all()  # the class without tokens
    assert domain_specialization(IDS_NK, torch.tensor([0, 0, 2, 2]), 4, num_classes=5).shape == (5, 4)


def test_divergence_by_hand():
    p, q = torch.tensor([0.5, 0.5, 0.0, 0.0]).double(), torch.tensor([0.0, 0.5, 0.5, 0.0]).double()
    close(jensen_shannon(p, q), 0.5)  # H(.25, .5, .25) - 1 = 1.5 - 1
    close(jensen_shannon(p, p), 0.0)
    close(jensen_shannon(p, q.flip(0)), 0.5)  # half of the mass is shared again
    apart = domain_divergence(torch.tensor([[1.0, 1.0, 0, 0], [0, 0, 1.0, 1.0], [1.0, 1.0, 0, 0]]).double())
    close(apart, 2 / 3)  # pairs: 1, 0, 1
    # rows need not be normalised, and a class without tokens is left out
    close(domain_divergence(torch.tensor([[3.0, 0], [0, 1.0], [torch.nan, torch.nan], [0, 0]]).double()), 1.0)


def test_divergence_of_fewer_than_two_domains_is_nan():
    assert domain_divergence(torch.tensor([[0.5, 0.5]])).isnan()
    assert domain_divergence(torch.tensor([[0.5, 0.5], [0, 0]])).isnan()
    assert domain_divergence(torch.full((3, 1, 2), 0.5)).shape == (3,)


@settings(max_examples=40, deadline=None)
@given(routings(), st.integers(1, 4))
def test_specialisation_bounds_and_relabelling(routing, num_classes):
    ids_NK, num_experts, generator = routing
    labels_N = torch.randint(0, num_classes, (len(ids_NK),), generator=generator)
    share_CE = domain_specialization(ids_NK, labels_N, num_experts, num_classes)
    present = labels_N.bincount(minlength=num_classes) > 0
    assert share_CE[~present].isnan().all()
    assert ((share_CE[present] >= 0) & (share_CE[present] <= 1)).all()
    close(share_CE[present].sum(-1), torch.full((int(present.sum()),), float(ids_NK.shape[1])))
    divergence = domain_divergence(share_CE)
    assert divergence.isnan() if present.sum() < 2 else 0 <= divergence <= 1
    renamed_E = torch.randperm(num_experts, generator=generator)
    renamed_C = torch.randperm(num_classes, generator=generator)
    again = domain_specialization(renamed_E[ids_NK], renamed_C[labels_N], num_experts, num_classes)
    close(domain_divergence(again), divergence, equal_nan=True)
    favourite = vocabulary_specialization(ids_NK, labels_N, num_experts, min_count=1)
    assert ids_NK.shape[1] / num_experts - 1e-9 <= favourite <= 1 + 1e-9
    close(vocabulary_specialization(renamed_E[ids_NK], renamed_C[labels_N], num_experts, min_count=1), favourite)


def test_vocabulary_specialization_counts_each_token_id_once():
    ids_NK = torch.tensor([[0, 1], [0, 2], [0, 3], [3, 2], [2, 1], [1, 0], [3, 0]])
    tokens_N = torch.tensor([5, 5, 5, 9, 9, 9, 7])
    # id 5: expert 0 in 3 of 3; id 9: experts 1 and 2 in 2 of 3; id 7: once, so 1 whatever happens
    close(vocabulary_specialization(ids_NK, tokens_N, 4, min_count=1), (1 + 2 / 3 + 1) / 3)
    close(vocabulary_specialization(ids_NK, tokens_N, 4, min_count=3), (1 + 2 / 3) / 2)
    close(vocabulary_specialization(ids_NK[:, :1], tokens_N, 4, min_count=3), (1 + 1 / 3) / 2)  # the first choice alone
    assert vocabulary_specialization(ids_NK, tokens_N, 4, min_count=4).isnan()


def test_labels_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="4 tokens; give one integer a token"):
        domain_specialization(IDS_NK, torch.tensor([0, 1]), 4)
    with pytest.raises(ValueError, match="one integer"):
        domain_specialization(IDS_NK, torch.zeros(4), 4)
    with pytest.raises(ValueError, match=r"label 3 is outside 0..2"):
        domain_specialization(IDS_NK, torch.tensor([0, 1, 2, 3]), 4, num_classes=3)
    with pytest.raises(ValueError, match="label -100"):
        domain_specialization(IDS_NK, torch.tensor([0, 1, 2, -100]), 4)


def test_coactivation_by_hand():
    share_EE = coactivation(IDS_NK, 5)
    close(share_EE[0], [1.0, 2 / 3, 1 / 3, 0.0, 0.0])
    close(share_EE[2], [1.0, 0.0, 1.0, 0.0, 0.0])
    assert share_EE[4].isnan().all()
    alone = coactivation(IDS_NK[:, :1], 2)  # k = 1: nothing is ever together
    close(alone, torch.eye(2))
    everyone = coactivation(torch.arange(3).repeat(5, 1), 3)  # k = E: everything always
    close(everyone, torch.ones(3, 3))
    close(coactivation(torch.stack([IDS_NK, IDS_NK]), 5)[1], share_EE, equal_nan=True)


@settings(max_examples=40, deadline=None)
@given(routings())
def test_coactivation_rows_add_up_and_follow_the_names(routing):
    ids_NK, num_experts, generator = routing
    share_EE = coactivation(ids_NK, num_experts)
    used = load_per_expert(ids_NK, num_experts) > 0
    close(share_EE[used].sum(-1), torch.full((int(used.sum()),), float(ids_NK.shape[1])))
    renamed_E = torch.randperm(num_experts, generator=generator)
    again_EE = coactivation(renamed_E[ids_NK], num_experts)
    close(again_EE[renamed_E][:, renamed_E], share_EE, equal_nan=True)


def test_saturation_by_hand():
    close(router_saturation(IDS_NK, IDS_NK.flip(-1)), 1.0)  # order among the K does not count
    later = torch.tensor([[0, 2], [1, 3], [1, 3], [2, 3]])
    close(router_saturation(IDS_NK, later), (1 + 0 + 2 + 0) / 8)
    close(router_saturation(torch.stack([IDS_NK, later]), torch.stack([later, later])), [3 / 8, 1.0])
    with pytest.raises(ValueError, match="same tokens with the same top_k"):
        router_saturation(IDS_NK, later[:3])


@settings(max_examples=40, deadline=None)
@given(routings())
def test_saturation_bounds_and_relabelling(routing):
    ids_NK, num_experts, generator = routing
    others_NK = ids_NK[torch.randperm(len(ids_NK), generator=generator)]
    value = router_saturation(ids_NK, others_NK)
    assert 0 <= value <= 1
    close(router_saturation(others_NK, ids_NK), value)
    renamed_E = torch.randperm(num_experts, generator=generator)
    close(router_saturation(renamed_E[ids_NK], renamed_E[others_NK]), value)


def test_confidence_by_hand():
    probabilities_NE = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.5, 0.2, 0.2, 0.1]]).double()
    close(router_margin(probabilities_NE), [0.0, 1.0, 0.3])
    third = -(0.5 * math.log2(0.5) + 0.4 * math.log2(0.2) + 0.1 * math.log2(0.1))
    close(router_entropy(probabilities_NE), [2.0, 0.0, third])
    close(router_entropy(probabilities_NE * 3), [2.0, 0.0, third])  # a sigmoid router's scores do not sum to 1
    assert router_margin(torch.ones(2, 1)).isnan().all()
    close(router_entropy(torch.ones(2, 1)), [0.0, 0.0])


# --------------------------------------------------------------------------------------------------- null baselines


def spread_of_domains(num_experts):
    return lambda ids_NK, labels_N: domain_divergence(domain_specialization(ids_NK, labels_N, num_experts))


def test_shuffled_baseline_tells_specialised_from_not():
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.randint(0, 2, (600,), generator=generator)
    blind_NK = torch.rand(600, 4, generator=generator).topk(2, dim=-1).indices
    expert_NK = torch.where(labels_N[:, None] == 0, torch.tensor([0, 1]), torch.tensor([2, 3]))
    ids_LNK, statistic = torch.stack([blind_NK, expert_NK]), spread_of_domains(4)
    baseline = shuffled_baseline(statistic, ids_LNK, labels_N, repeats=30)
    value_L = statistic(ids_LNK, labels_N)
    assert baseline.mean.shape == baseline.standard_deviation.shape == (2,)
    assert abs(float(baseline.spreads(value_L)[0])) < 3 < float(baseline.spreads(value_L)[1])
    close(value_L[1], 1.0)
    # the expectation that the docstring gives: (E-1) / (8 ln 2) * (1/n_1 + 1/n_2), a choice less free with k = 2 of 4
    expected = 3 / (8 * math.log(2)) * (2 / 600)
    assert expected / 2 < float(baseline.mean[0]) < expected * 1.5


def test_shuffling_is_repeatable_permutes_and_leaves_the_arguments_alone():
    labels_N = torch.arange(4)
    seen = []

    def statistic(ids_NK, shuffled_N):
        assert torch.equal(ids_NK, IDS_NK)
        seen.append(shuffled_N.tolist())
        return shuffled_N[0].double()

    first = shuffled_baseline(statistic, IDS_NK, labels_N, repeats=8, seed=3)
    assert all(sorted(labels) == [0, 1, 2, 3] for labels in seen) and len({tuple(labels) for labels in seen}) > 3
    assert torch.equal(labels_N, torch.arange(4))
    firsts = torch.tensor([labels[0] for labels in seen]).double()
    close(first.mean, firsts.mean())
    close(first.standard_deviation, firsts.std())
    again = shuffled_baseline(statistic, IDS_NK, labels_N, repeats=8, seed=3)
    assert seen[:8] == seen[8:] and again == first
    shuffled_baseline(statistic, IDS_NK, labels_N, repeats=8, seed=4)
    assert seen[16:] != seen[:8]


def test_shuffling_whole_documents_keeps_them_together_and_widens_the_spread():
    generator = torch.Generator().manual_seed(1)
    documents_N = torch.arange(20).repeat_interleave(30) + 7
    labels_N = (documents_N % 2).long()
    # each document has a favourite pair of experts, drawn without regard to its domain
    favourite_N2 = torch.rand(40, 6, generator=generator).topk(2, dim=-1).indices[documents_N]
    statistic = spread_of_domains(6)

    def together(ids_NK, shuffled_N):
        assert all(len(shuffled_N[documents_N == d].unique()) == 1 for d in documents_N.unique())
        return statistic(ids_NK, shuffled_N)

    by_document = shuffled_baseline(together, favourite_N2, labels_N, repeats=15, groups_N=documents_N)
    by_token = shuffled_baseline(statistic, favourite_N2, labels_N, repeats=15)
    value = statistic(favourite_N2, labels_N)
    assert by_document.mean > 5 * by_token.mean
    assert by_document.standard_deviation > 5 * by_token.standard_deviation
    assert by_token.spreads(value) > 5  # taken for specialisation …
    assert by_document.spreads(value) < 3  # … where there is none
    with pytest.raises(ValueError, match="more than one label"):
        shuffled_baseline(statistic, favourite_N2, torch.arange(600) % 2, groups_N=documents_N)
    with pytest.raises(ValueError, match="groups_N has shape"):
        shuffled_baseline(statistic, favourite_N2, labels_N, groups_N=documents_N[:5])


def test_shuffling_within_token_ids_keeps_what_the_words_alone_explain():
    generator = torch.Generator().manual_seed(3)
    labels_N = torch.randint(0, 2, (4000,), generator=generator)
    tokens_N = torch.randint(0, 6, (4000,), generator=generator) + 3 * labels_N  # ids 3, 4, 5 occur in both domains
    by_word_NK = (tokens_N % 4)[:, None]
    statistic = spread_of_domains(4)

    def same_words(ids_NK, shuffled_N):
        for token in tokens_N.unique():  # the labels of each id stay with that id
            assert torch.equal(shuffled_N[tokens_N == token].sort().values, labels_N[tokens_N == token].sort().values)
        return statistic(ids_NK, shuffled_N)

    value = statistic(by_word_NK, labels_N)
    close(shuffled_baseline(same_words, by_word_NK, labels_N, within_N=tokens_N).mean, value)  # words explain all of it
    assert shuffled_baseline(statistic, by_word_NK, labels_N).spreads(value) > 10
    by_domain_NK = (2 * labels_N + torch.randint(0, 2, (4000,), generator=generator))[:, None]
    within = shuffled_baseline(statistic, by_domain_NK, labels_N, within_N=tokens_N)
    assert within.spreads(statistic(by_domain_NK, labels_N)) > 10  # words do not
    with pytest.raises(ValueError, match="not both"):
        shuffled_baseline(statistic, by_word_NK, labels_N, groups_N=tokens_N, within_N=tokens_N)


def test_routings_of_all_layers_are_shuffled_over_tokens_not_over_layers():
    first_LNK = torch.stack([torch.zeros(50, 1, dtype=torch.long), torch.ones(50, 1, dtype=torch.long)])
    baseline = shuffled_baseline(router_saturation, first_LNK, first_LNK)
    close(baseline.mean, [1.0, 1.0])
    close(baseline.standard_deviation, [0.0, 0.0])
    with pytest.raises(ValueError, match="50 tokens but labels for 49"):
        shuffled_baseline(router_saturation, first_LNK, first_LNK[:, 1:])


def test_baseline_of_saturation_is_the_overlap_of_the_loads():
    generator = torch.Generator().manual_seed(2)
    ids_NK = torch.rand(2000, 5, generator=generator).topk(2, dim=-1).indices
    baseline = shuffled_baseline(router_saturation, ids_NK, ids_NK)
    close(baseline.mean, 2 / 5, atol=0.01, rtol=0)  # K/E, against 1 unshuffled
    close(router_saturation(ids_NK, ids_NK), 1.0)


@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 1), (16, 2), (8, 8)])
def test_uniform_baselines_are_what_the_docstrings_say(num_experts, top_k):
    n = 2000

    def statistic(ids_NK):
        load_E = load_per_expert(ids_NK, num_experts)
        off_diagonal = coactivation(ids_NK, num_experts).fill_diagonal_(torch.nan).nanmean()
        return torch.stack(
            [max_over_mean(load_E), coefficient_of_variation(load_E), balance_score(load_E), off_diagonal]
        )

    baseline = uniform_baseline(statistic, n, num_experts, top_k, repeats=10)
    biggest, cv, balance, together = baseline.mean.tolist()
    free = math.sqrt((num_experts - top_k) / (num_experts - 1))  # choices of one token exclude each other
    assert 1 <= biggest <= 1 + math.sqrt(2 * num_experts * math.log(num_experts) / (n * top_k))
    assert cv == pytest.approx(math.sqrt(num_experts / (n * top_k)) * free, rel=0.35)
    assert 1 - balance == pytest.approx(
        (num_experts - 1) / (2 * n * top_k * math.log(num_experts)) * free**2, rel=0.6, abs=1e-12
    )
    assert together == pytest.approx((top_k - 1) / (num_experts - 1), abs=0.01)


def test_uniform_baseline_draws_different_experts_equally_often():
    drawn = []
    uniform_baseline(lambda ids_NK: drawn.append(ids_NK) or torch.tensor(0.0), 500, 5, 3, repeats=4)
    ids_NK = torch.cat(drawn)
    assert (ids_NK.sort(-1).values.diff() > 0).all()
    close(load_per_expert(ids_NK, 5), torch.full((5,), 0.2), atol=0.02, rtol=0)


def test_baselines_without_a_spread_are_refused():
    with pytest.raises(ValueError, match="repeats=1"):
        shuffled_baseline(router_saturation, IDS_NK, IDS_NK, repeats=1)
    with pytest.raises(ValueError, match="repeats=0"):
        uniform_baseline(lambda ids_NK: ids_NK.sum(), 5, 4, 2, repeats=0)
    with pytest.raises(ValueError, match="top_k=5 but there are 4 experts"):
        uniform_baseline(lambda ids_NK: ids_NK.sum(), 5, 4, 5)
