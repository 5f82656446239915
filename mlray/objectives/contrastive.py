"""Contrastive alignment: a text's translation, product or answer is to be nearer to it than everything else.

InfoNCE (van den Oord et al. 2018) over pairs, each with any number of hard negatives. The loss is a function of vectors
and gives its own gradient, row block by row block: no matrix of all similarities is ever held, and the vectors may have
been made by other workers, or without a graph (GradCache, Gao et al. 2021).
Shape letters: N texts, P pairs, M candidates, b pairs of a block, H width of a vector, L languages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from mlray.config import Contrastive
from mlray.objectives.pairing import QUERY, TARGET, Texts

_BLOCK_BYTES = 16 << 20
"""Of similarities in a block, of which some copies are held at once: what a step takes more for a larger batch."""


def groups(texts: Texts) -> np.ndarray:
    """Number of the item that a text means (N,): pairs with a text, or a known item, in common are of one item.

    And so on along a chain: two translations of a sentence, or two queries of a product, are no negatives.
    """
    _, names_N = np.unique(texts.names_N, return_inverse=True)
    queries_P, targets_P = (_by_pair(texts, role) for role in (QUERY, TARGET))
    ends = np.stack([names_N[queries_P], names_N[targets_P]], axis=1)
    return with_items(ends, texts.items_N[queries_P], int(names_N.max(initial=-1)) + 1)[names_N]


def together(texts: Texts, own_P: np.ndarray, items_N: np.ndarray) -> int:
    """How many own pairs meet another pair of the same item (`groups`): neither sought nor a negative."""
    items_P = items_N[_by_pair(texts, QUERY)]
    _, numbers_P, counts = np.unique(items_P, return_inverse=True, return_counts=True)
    return int((counts[numbers_P[own_P]] > 1).sum())


def with_items(ends_P2: np.ndarray, items_P: np.ndarray, size: int) -> np.ndarray:
    """As `linked`, and pairs of the same known item (not 0) are linked to each other."""
    known, numbers_K = np.unique(items_P[items_P != 0], return_inverse=True)
    about = np.stack([ends_P2[items_P != 0, 0], size + numbers_K], axis=1)
    return linked(np.concatenate([ends_P2, about]), size + len(known))[:size]


def linked(ends_P2: np.ndarray, size: int) -> np.ndarray:
    """The component (size,) that each node belongs to, where pairs of nodes are linked."""
    links = coo_array((np.ones(len(ends_P2), bool), (ends_P2[:, 0], ends_P2[:, 1])), shape=(size, size))
    return np.asarray(connected_components(links, directed=False)[1], dtype=np.int64)


def loss(
    vectors_NH: torch.Tensor,
    texts: Texts,
    own_P: np.ndarray,
    config: Contrastive,
    items_N: np.ndarray | None = None,
) -> tuple[float, int, torch.Tensor]:
    """The sum over own pairs of InfoNCE in nats, how many of them found their target first, and the gradient (N, H).

    First of all targets and hard negatives, whatever else is a negative: so that losses can be compared by it.

    The logit of two texts is the product of their vectors (`models.embedder`: cosine / temperature). With `dimensions`
    it is the mean over those prefixes and the whole, each brought to the length of the whole (Matryoshka, Kusupati et
    al. 2022). The right target's logit is lessened by margin / temperature (Yang et al. 2019). Negatives are the
    targets and hard negatives of all other pairs, and with `negatives=all` their queries, but for texts of the same
    item (see `groups`). A hard negative counts as `hard_weight` others; with `language_quota` those of one language
    other than the query's count together as so many at most. `symmetric`: the mean of this and of the loss of finding
    the query from the target.

    Args:
        vectors_NH: of all texts of the global batch, in fp32 or wider.
        texts: what they are.
        own_P: the pairs whose losses are summed here; the gradient is that of their sum to all vectors.
        config: the loss.
        items_N: of `groups`, where they are known already.
    """
    leaf_NH = vectors_NH.detach().requires_grad_()
    widths = [*config.dimensions, leaf_NH.shape[1]]
    ways = ((QUERY, TARGET), (TARGET, QUERY)) if config.symmetric else ((QUERY, TARGET),)
    items_N = groups(texts) if items_N is None else items_N
    searches = [_search(texts, items_N, way, config, leaf_NH.device) for way in ways]
    total, found = 0.0, 0
    for width in widths:
        with torch.enable_grad():
            prefix_NH = leaf_NH * 1.0 if width == leaf_NH.shape[1] else _prefix(leaf_NH, width)
        gradient_NH = torch.zeros_like(prefix_NH)
        for search in searches:
            lost, first = _add(prefix_NH.detach(), gradient_NH, search, own_P, config)
            total += lost
            found += first if search is searches[0] and width == widths[-1] else 0
        torch.autograd.backward(prefix_NH, gradient_NH)
    share = 1.0 / (len(widths) * len(ways))
    assert leaf_NH.grad is not None
    return total * share, found, leaf_NH.grad * share


def _prefix(vectors_NH: torch.Tensor, width: int) -> torch.Tensor:
    """The first dimensions, as long as the whole vector."""
    start_NW = torch.nn.functional.normalize(vectors_NH[:, :width], dim=-1)
    scaled: torch.Tensor = start_NW * torch.linalg.vector_norm(vectors_NH, dim=-1, keepdim=True)
    return scaled


@dataclass(frozen=True)
class _Search:
    """One direction: each pair's text of one side looks for that of the other among M candidates."""

    rows_P: torch.Tensor
    columns_M: torch.Tensor
    """Texts; the first P are the right ones, pair by pair, and hard negatives and queries follow."""
    answers: int
    """How many of them are no queries."""
    item_P: torch.Tensor
    item_M: torch.Tensor
    speaks_ML: torch.Tensor | None
    """One for the language of a candidate, if languages have a quota."""
    spoken_P: torch.Tensor
    """Language of the text that looks."""
    weight_M: torch.Tensor | None
    """Logarithm of what a candidate counts as, if hard negatives count as more or less than one."""


def _search(
    texts: Texts, items_N: np.ndarray, way: tuple[int, int], config: Contrastive, device: torch.device
) -> _Search:
    of, to = way
    rows_P, right_P = (_by_pair(texts, role) for role in (of, to))
    answers = [right_P]
    if to == TARGET:
        answers.append(np.flatnonzero(texts.roles_N > TARGET))
    columns_M = np.concatenate([*answers, rows_P] if config.negatives == "all" else answers)
    speaks_ML = None
    if config.language_quota:
        width = int(texts.languages_N.max(initial=0)) + 1
        speaks_ML = torch.eye(width, device=device)[torch.from_numpy(texts.languages_N[columns_M]).to(device)]
    weight_M = None
    if to == TARGET and config.hard_weight != 1.0:
        hard_M = torch.from_numpy(texts.roles_N[columns_M] > TARGET).to(device, torch.float64)
        weight_M = math.log(config.hard_weight) * hard_M
    told = (rows_P, columns_M, items_N[rows_P], items_N[columns_M], texts.languages_N[rows_P])
    rows, columns, item_P, item_M, spoken_P = (torch.from_numpy(array).to(device) for array in told)
    return _Search(rows, columns, sum(map(len, answers)), item_P, item_M, speaks_ML, spoken_P, weight_M)


def _by_pair(texts: Texts, role: int) -> np.ndarray:
    """The texts (P,) that have this role, in the order of their pairs' numbers."""
    places = np.flatnonzero(texts.roles_N == role)
    return places[np.argsort(texts.pairs_N[places])]


def _add(
    vectors_NH: torch.Tensor,
    gradient_NH: torch.Tensor,
    search: _Search,
    own_P: np.ndarray,
    config: Contrastive,
) -> tuple[float, int]:
    """Adds the gradient of one direction; returns the sum of its losses and how many found the right one first."""
    candidates_MH = vectors_NH[search.columns_M]
    towards_MH = torch.zeros_like(candidates_MH)
    total, found = 0.0, 0
    block = max(_BLOCK_BYTES // (vectors_NH.element_size() * len(candidates_MH)), 1)
    for own_b in torch.split(torch.from_numpy(own_P).to(vectors_NH.device), block):
        rows_b = search.rows_P[own_b]
        queries_bH = vectors_NH[rows_b]
        logits_bM = queries_bH @ candidates_MH.T
        right_b = own_b[:, None]
        same_bM = (search.item_P[own_b][:, None] == search.item_M[None]).scatter_(1, right_b, False)
        logits_bM.masked_fill_(same_bM, -math.inf)
        # Before the margin and the quota: whatever they make of it.
        found += int((logits_bM[:, : search.answers].argmax(-1) == own_b).sum())
        logits_bM.scatter_add_(1, right_b, -config.margin * queries_bH.square().sum(-1, keepdim=True))
        if search.speaks_ML is not None:
            speaks_ML, spoken_b = search.speaks_ML.to(logits_bM.dtype), search.spoken_P[own_b]
            logits_bM += _quota(same_bM, right_b, speaks_ML, spoken_b, config.language_quota)
        if search.weight_M is not None:
            logits_bM += search.weight_M.to(logits_bM.dtype)
        sums_b = logits_bM.logsumexp(-1)
        total += float((sums_b - logits_bM.gather(1, right_b)[:, 0]).sum())
        weights_bM = logits_bM.sub_(sums_b[:, None]).exp_()
        weights_bM.scatter_add_(1, right_b, torch.full_like(weights_bM[:, :1], -1.0))
        # The margin grows with the square of the query's length.
        length_b1 = 2.0 * config.margin * weights_bM.gather(1, right_b)
        gradient_NH[rows_b] += weights_bM @ candidates_MH - length_b1 * queries_bH
        towards_MH += weights_bM.T @ queries_bH
    gradient_NH.index_add_(0, search.columns_M, towards_MH)
    return total, found


def _quota(
    same_bM: torch.Tensor, right_b: torch.Tensor, speaks_ML: torch.Tensor, spoken_b: torch.Tensor, quota: int
) -> torch.Tensor:
    """Logarithm of the weight of each candidate (b, M): those of one language count as `quota` negatives at most.

    Those of the query's own language count as they are: they alone teach it that its language is no answer.
    """
    negative_bM = (~same_bM).to(speaks_ML.dtype).scatter_(1, right_b, 0.0)
    share_bL = (quota / (negative_bM @ speaks_ML).clamp(min=1.0)).clamp(max=1.0)
    share_bL.scatter_(1, spoken_b[:, None], 1.0)
    return (share_bL.log() @ speaks_ML.T).scatter_(1, right_b, 0.0)
