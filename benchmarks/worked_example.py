"""The worked example of docs/dispatch.md: ten tokens, four experts, two choices a token, loads 5, 6, 4 and 5.

    python benchmarks/worked_example.py   # prints the shapes of every form and draws docs/images/worked_example.svg

tests/test_worked_example.py proves on the same layer that the forms agree.

Shape letters: B sequences, S tokens of a sequence, H hidden, T = B S tokens, E experts, K choices of a token, F expert FFN
width, R rows.
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_dist import MoELayer
from moe_dist.config.routing import RoutingConfig
from moe_dist.config.schema import MoEConfig
from moe_dist.routing import Routing, Tokens, real_pairs

IMAGE = Path(__file__).parents[1] / "docs" / "images" / "worked_example.svg"
B, S, H, E, K, F = 2, 5, 128, 4, 2, 64
SCORES_TE = [
    [0.46, 0.34, 0.15, 0.05],
    [0.10, 0.62, 0.22, 0.06],
    [0.58, 0.11, 0.07, 0.24],
    [0.10, 0.20, 0.15, 0.55],
    [0.28, 0.08, 0.52, 0.12],
    [0.35, 0.30, 0.25, 0.10],
    [0.13, 0.07, 0.32, 0.48],
    [0.08, 0.45, 0.33, 0.14],
    [0.07, 0.50, 0.16, 0.27],
    [0.31, 0.09, 0.06, 0.54],
]
FORMS: dict[str, dict[str, Any] | None] = {
    "dropless": None,
    "padded to 6": {"factor": 1.2, "pad": True},
    "dropped at 5": {"factor": 1.0, "pad": True},
    "rerouted at 5": {"factor": 1.0, "pad": True, "overflow": "reroute"},
}
"""`routing.capacity` of each: room for ceil(factor K T / E) pairs an expert, both sequences being one routing group."""


def make_hidden() -> torch.Tensor:
    """float64 [B, S, H]: the logarithms of the scores in the first E features, random numbers in the others."""
    hidden_BSH = torch.randn(B, S, H, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hidden_BSH.view(-1, H)[:, :E] = torch.tensor(SCORES_TE, dtype=torch.float64).log()
    return hidden_BSH


def make_layer(
    capacity: dict[str, Any] | None,
    backend: str = "auto",
    group: Any = "global",
    process_group: dist.ProcessGroup | None = None,
) -> MoELayer:
    """A float64 layer whose router picks out the first E features; their softmax is the table of scores again."""
    routing = RoutingConfig.model_validate({"top_k": K, "group": group, "capacity": capacity})
    moe = MoEConfig.model_validate({"num_experts": E, "ffn_size": F, "backend": backend})
    layer = MoELayer(H, moe, routing, process_group).double()
    layer.initialise(seed=0, name="moe", std=0.1)
    assert layer.router.weight is not None
    layer.router.weight.data.copy_(torch.eye(E, H))
    return layer


def route(capacity: dict[str, Any] | None) -> Routing:
    """What the router of such a layer decides for the ten tokens."""
    with torch.no_grad():
        return real_pairs(make_layer(capacity).router(make_hidden().view(-1, H), Tokens(num_sequences=B)))


def pairs_of(routing: Routing) -> list[tuple[int, int]]:
    """(token, expert) of each pair, in token order, a token's better expert first."""
    return list(zip(routing.token_P.tolist(), routing.expert_P.tolist(), strict=True))


def shapes_table() -> str:
    """Markdown: the shapes of every step in every form, from the tensors themselves."""
    columns = [shapes_of(capacity) for capacity in FORMS.values()]
    lines = [f"| | {' | '.join(FORMS)} |", "|---" * (1 + len(FORMS)) + "|"]
    lines += [f"| {step} | {' | '.join(column[step] for column in columns)} |" for step in columns[0]]
    return "\n".join(lines) + "\n"


def shapes_of(capacity: dict[str, Any] | None) -> dict[str, str]:
    layer, hidden_BSH, routing = make_layer(capacity), make_hidden(), route(capacity)
    hidden_TH = hidden_BSH.view(-1, H)
    with torch.no_grad():
        rows_RH, segments, ticket = layer.dispatcher.dispatch(hidden_TH, routing)
        out_RH = layer.experts(rows_RH, segments)
        out_TH = layer.dispatcher.combine(out_RH, ticket)
    num_pairs, num_rows = len(routing.token_P), len(rows_RH)
    dropped = 0 if routing.dropped_E is None else int(routing.dropped_E.sum())
    return {
        "tokens": f"{[*hidden_BSH.shape]} = {[*hidden_TH.shape]}",
        "scores": str([len(hidden_TH), E]),
        "chosen experts, weights": str([len(hidden_TH), K]),
        "pairs kept, dropped": f"{num_pairs}, {dropped}",
        "rows of experts 0 to 3": ", ".join(map(str, segments.sizes)),
        "rows sent": str([*rows_RH.shape]),
        "of these empty": str(num_rows - num_pairs),
        "after the gate and up GEMM": str([num_rows, 2 * F]),
        "after SwiGLU": str([num_rows, F]),
        "after the down GEMM": str([*out_RH.shape]),
        "combined": f"{[*out_TH.shape]} = {[*hidden_BSH.shape]}",
        "rows computed for each pair": f"{num_rows / num_pairs:.2f}",
    }


# The picture.

COLOURS = ["#8fbfe8", "#f4bd6a", "#86cfa8", "#d9a3cf"]
CELL = 21
FLOOR = 430
"""Where the stacks of step 3 stand; they are at most seven cells high."""


def main() -> None:
    print(shapes_table())
    IMAGE.write_text(draw())
    print(f"drew {IMAGE}")


def draw() -> str:
    """The picture as SVG: tokens, pairs sorted by expert, and what each form makes of these."""
    dropless = route(None)
    parts = [*draw_tokens(24, 46, dropless), *draw_sorted(24, 160, dropless)]
    parts.append(text(24, 242, "3. What is sent and computed", "title left"))
    captions = ["grouped: segments of|5, 6, 4 and 5 rows", "nothing drops,|4 of 24 rows are empty"]
    captions += ["token 8 loses expert 1,|1 of 20 rows is empty", "token 8 goes on to|expert 2, no row is empty"]
    for place, (name, caption) in enumerate(zip(FORMS, captions, strict=True)):
        parts += draw_form(24 + place * 162, route(FORMS[name]), dropless)
        parts += draw_captions(84 + place * 162, name, caption)
    parts += draw_block_sparse(672, dropless)
    parts += draw_captions(758, "block-sparse", "the grouped product|written as one matrix")
    style = "text{font:12px sans-serif;text-anchor:middle;fill:#1a1a1a}.title{font-weight:bold}.left{text-anchor:start}"
    header = '<svg xmlns="http://www.w3.org/2000/svg" width="860" height="500" viewBox="0 0 860 500">'
    background = '<rect width="860" height="500" fill="#ffffff"/>'
    return "\n".join([header, f"<style>{style}</style>", background, *parts, "</svg>\n"])


def draw_tokens(x: float, y: float, routing: Routing) -> list[str]:
    """The tokens of both sequences, and below each the experts that it chose, with their scores."""
    parts = [text(x, y - 20, "1. Ten tokens, each with its two best experts and their scores", "title left")]
    for pair, (token, expert) in enumerate(pairs_of(routing)):
        left = x + token * 80 + token // S * 12
        if pair % K == 0:
            parts += cell(left, y, "#eeeeee", f"token {token}", width=72)
        score = f"{expert}: {SCORES_TE[token][expert]:.2f}"
        parts += cell(left, y + (1 + pair % K) * CELL, COLOURS[expert], score, width=72)
    return parts


def draw_sorted(x: float, y: float, routing: Routing) -> list[str]:
    """The pairs sorted by expert, as token numbers."""
    parts = [text(x, y - 12, "2. Their 20 pairs sorted by expert: the rows that travel", "title left")]
    for expert in range(E):
        tokens = tokens_of(routing, expert)
        for place, token in enumerate(tokens):
            parts += cell(x + 36 * place, y, COLOURS[expert], str(token), width=36)
        parts.append(text(x + 18 * len(tokens), y + CELL + 16, f"expert {expert}: {len(tokens)} rows"))
        x += 36 * len(tokens) + 24
    return parts


def draw_form(x: float, routing: Routing, dropless: Routing) -> list[str]:
    """A stack of rows for each expert: empty ones dashed, rerouted ones framed, lost ones crossed out above the stack."""
    parts: list[str] = []
    for expert in range(E):
        kept, wanted = tokens_of(routing, expert), tokens_of(dropless, expert)
        slots = routing.pairs_per_expert or len(kept)
        left, tops = x + 31 * expert, [FLOOR - (slot + 1) * CELL for slot in range(slots)]
        for top, token in zip(tops, kept, strict=False):
            parts += cell(left, top, COLOURS[expert], str(token), "plain" if token in wanted else "framed")
        for top in tops[len(kept) :]:
            parts += cell(left, top, "none", "", "dashed")
        above = FLOOR - (slots + 1) * CELL - 6
        for token in set(wanted) - set(kept):
            parts += cell(left, above, "none", str(token), "dashed")
            ends = f'x1="{left}" y1="{above}" x2="{left + 27}" y2="{above + CELL}"'
            parts.append(f'<line {ends} stroke="#b00000" stroke-width="2"/>')
        parts.append(text(left + 13.5, FLOOR + 16, str(expert)))
    return parts


def draw_block_sparse(x: float, routing: Routing) -> list[str]:
    """The rows as a block-diagonal matrix, times the stacked weights."""
    height, width = 7 * CELL, 25
    top: float = FLOOR - height
    parts = [box(x, top, E * width, height, "none"), text(x + E * width + 13, FLOOR - height / 2 + 4, "&#215;")]
    for expert in range(E):
        size = len(tokens_of(routing, expert))
        block = size * height / (S * B * K)
        parts += cell(x + expert * width, top, COLOURS[expert], str(size), width=width, height=block)
        parts += cell(x + E * width + 26, FLOOR - 133 + expert * 30, COLOURS[expert], f"W{expert}", width=30, height=30)
        top += block
    return [*parts, text(x + 50, FLOOR + 16, "[20, 512]"), text(x + 141, FLOOR + 16, "[512, 128]")]


def draw_captions(x: float, title: str, caption: str) -> list[str]:
    lines = [text(x, FLOOR + 38 + 16 * place, words) for place, words in enumerate(caption.split("|"))]
    return [text(x, 266, title, "title"), *lines]


def tokens_of(routing: Routing, expert: int) -> list[int]:
    return [token for token, e in pairs_of(routing) if e == expert]


def text(x: float, y: float, words: str, classes: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{classes}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, line: str = "plain") -> str:
    extra = {"plain": "", "dashed": ' stroke-dasharray="3 2"', "framed": ' stroke-width="2.5"'}[line]
    stroke = f'stroke="{"#b00000" if line == "framed" else "#777777"}"{extra}'
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" {stroke}/>'


def cell(
    x: float, y: float, fill: str, label: str, line: str = "plain", width: float = 27, height: float = CELL
) -> list[str]:
    """A box with a label in its middle."""
    return [box(x, y, width, height, fill, line), text(x + width / 2, y + height / 2 + 4.5, label)]


if __name__ == "__main__":
    main()
