"""Table B1, which is not in the paper: boundary rules at equal FLOPs."""

from __future__ import annotations

from experiments.ablations.table import TEXT, Row, Table, resampling

# Bits per character or byte. Dynamic pooling: 12 layers in all rows, so shortened models cost half. H-Net: equal
# FLOPs, 100B tokens; plain is LlamaByte, spacelike SpaceByte++. SpaceByte: test split, 1e19 FLOPs.
COLUMNS = (
    "dynamic pooling, text8",
    "H-Net L, FineWeb-Edu",
    "H-Net XL, FineWeb-Edu",
    "SpaceByte, PG-19",
    "SpaceByte, arXiv",
    "SpaceByte, GitHub",
)
FIGURES = {
    "plain": (1.143, 0.859, None, 1.138, 0.909, 0.655),
    "fixed, k=2": (1.149, None, None, None, None, None),
    "fixed, k=3": (1.155, None, None, None, None, None),
    "fixed, k=4": (1.166, None, None, None, None, None),
    "fixed, k=6": (None, 0.780, None, 1.112, 0.804, 0.552),
    "whitespace": (1.133, 0.755, 0.726, None, None, None),
    "spacelike": (None, 0.760, 0.733, 1.009, 0.748, 0.500),
    "unigram pieces": (1.134, None, None, None, None, None),
    "gumbel": (1.136, None, None, None, None, None),
    "entropy": (1.138, None, None, None, None, None),
    "router": (None, 0.755, 0.728, None, None, None),
    "router, two levels": (None, 0.743, 0.715, None, None, None),
    "MegaByte": (None, None, None, 1.083, 0.822, 0.570),
    "subwords": (None, 0.756, 0.730, 0.989, 0.768, 0.508),
}
PUBLISHED_BOUNDARIES = {
    column: {row: values[i] for row, values in FIGURES.items() if values[i] is not None}
    for i, column in enumerate(COLUMNS)
}


def table_b1() -> Table:
    """Return boundary rules at equal FLOPs, within 5 %; gumbel, with its network, within 6 %."""

    light = resampling("average", "repeat")

    def by_events(boundaries: str, methods: dict[str, str] = light) -> Row:
        return Row(boundaries, methods | {"hierarchy": "2@1 9@6 2@1", "boundaries": boundaries})

    rows = (
        Row("plain", TEXT | {"hierarchy": "6@1"}),  # the same run as in Table 1
        Row("fixed, k=4", light | {"hierarchy": "2@1 10@4 2@1", "boundaries": "fixed"}),
        Row("fixed, k=6", light | {"hierarchy": "2@1 15@6 2@1", "boundaries": "fixed"}),
        by_events("whitespace"),
        by_events("spacelike"),
        by_events("router", resampling("select", "smooth")),  # as in H-Net
        by_events("gumbel"),
    )
    note = (
        "Groups that are not fixed are expected to have 6 characters, and there is room for 1.5 times as "
        "many and four more; their FLOPs are those of the whole room, used or not. Tokens a group, and the share of "
        "events that found no room and waited, are measured on the validation data. The published figures are of other "
        "data and sizes, those of dynamic pooling second-hand: only the order of a column can be compared."
    )
    return Table(
        "B1",
        "enwik8",
        "Where groups end",
        "boundaries",
        "bpc",
        rows,
        "whitespace",
        note,
        seeds=3,
        published=PUBLISHED_BOUNDARIES,
    )
