"""What docs/performance.md shows of each record in benchmarks/results, as Markdown."""

from collections.abc import Callable, Iterable
from typing import Any

from layer_tables import overview, unit_of

MEMORY_KINDS = ("peak", "activation", "saved", "held")
PEER = "megatron"
SHORT_COMMIT = 7
COUNTS = (
    ("ranks", "rank", "ranks"),
    ("nodes", "node", "nodes"),
    ("threads_per_rank", "thread a rank", "threads a rank"),
    ("rounds", "round", "rounds"),
)
"""Keys of a record, and their words."""


def table_of(report: dict, name: str) -> str:
    """All that the page shows of the record `name`: where it was measured, tables, and what is absent from them."""
    return f"{origin(report, name)}\n\n{TABLES[report['benchmark']](report)}"


def origin(report: dict, name: str) -> str:
    """Machine, versions and commit, and the file."""
    machine = report.get("gpu") or f"{report['machine']['cpu']}, {report['machine']['cores']} cores"
    if report.get("device", "cpu") != "cpu":
        machine = report["device"]
    settings = [
        f"{number} {one if number == 1 else many}"
        for key, one, many in COUNTS
        if (number := report.get(key)) is not None
    ]
    settings += [f"{report['load']} load"] if "load" in report else []
    settings += [f"malloc {report['malloc']}"] if "malloc" in report else []
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items() if number)
    commit, _, dirty = (report["commit"] or "unknown").partition("-")
    commit = commit[:SHORT_COMMIT] + (" with changes" if dirty else "")
    dtype = [report["dtype"]] if "dtype" in report else []
    return (
        f"{', '.join([machine, *dtype, *settings])}.\n"
        f"[{report['date'][:10]}, commit {commit}](../benchmarks/results/{name}.json); {versions}."
    )


def layer(report: dict) -> str:
    """The overview that the script prints, with the limit's own time and speed above."""
    unit, scale = unit_of(report)
    head, rule, *rows = overview(report).splitlines()
    limits = [
        f"{result['rows']['limit']['median_ms']:.1f} ms, {result['gemm_flops_per_second'] / scale:.0f} {unit}"
        for result in report["shapes"]
    ]
    square = report["square_gemm"]
    table = "\n".join([head, rule, f"| limit | {' | '.join(limits)} |", *rows])
    speed = f"One square GEMM of {square['size']}: {square['flops_per_second'] / scale:.0f} {unit} a rank."
    return "\n\n".join([table, speed, *absences(report["shapes"])])


def memory(report: dict) -> str:
    """A table for each shape and setting of malloc, with ratios to one peer."""
    paragraphs = []
    for result in report["shapes"]:
        counted = {name: row for name, row in result["rows"].items() if name not in result["differing"]}
        paragraphs += [f"{shape_text(result['shape'])}; {report['layers']} layers, malloc: {result['malloc']}."]
        peer = counted.get(PEER, {})
        lines = ([name, *(_megabytes(row, peer, kind) for kind in MEMORY_KINDS)] for name, row in counted.items())
        paragraphs += [markdown([f"MB (x {PEER})", *MEMORY_KINDS], lines)]
    return "\n\n".join([*paragraphs, *absences(report["shapes"])])


def _megabytes(row: dict, peer: dict, kind: str) -> str:
    return f"{row[kind] / 1e6:.1f}" + (f" ({row[kind] / peer[kind]:.2f})" if peer.get(kind) else "")


def scaling(report: dict) -> str:
    """A table for each sweep; the host's cost of fake ranks last."""
    paragraphs = []
    for sweep, points in report["sweeps"].items():
        if sweep == "fake ranks":
            paragraphs += ["Host cost of one rank of a fake group, ms of CPU time:", fake_ranks(points)]
            continue
        shape = points[0]["shape"] | ({} if sweep == "ranks" else {sweep: "*"})
        paragraphs += [f"`{sweep}`; {shape_text(shape)}. us a token, growth over the first row, x limit:"]
        paragraphs += [sweep_table(sweep, points)]
        for point in points:
            paragraphs += [f"{name} differs at {_swept(sweep, point)}, not timed." for name in point["differing"]]
    return "\n\n".join(paragraphs)


def sweep_table(sweep: str, points: list[dict]) -> str:
    names = list(dict.fromkeys(name for point in points for name in point["rows"]))
    first = {name: next(point["rows"][name] for point in points if name in point["rows"]) for name in names}

    def cell(name: str, row: dict | None) -> str:
        if row is None:
            return "-"
        growth = row["us_per_token"] / first[name]["us_per_token"]
        return f"{row['us_per_token']:.2f}, {growth:.2f}" + ("" if name == "limit" else f", {row['of_limit']:.2f}")

    lines = ([_swept(sweep, point), *(cell(name, point["rows"].get(name)) for name in names)] for point in points)
    return markdown([sweep, *names], lines)


def _swept(sweep: str, point: dict) -> int:
    return point["ranks"] if sweep == "ranks" else point["shape"][sweep]


def fake_ranks(points: list[dict]) -> str:
    lines = (
        [point["experts"], point["ranks"], point["path"], f"{point['build_ms']:.1f}"]
        + [f"{point[part]['median_ms']:.2f}" for part in ("dispatch", "layer")]
        for point in points
    )
    return markdown(["experts", "ranks", "path", "build", "dispatch", "layer"], lines)


def dispatch(report: dict) -> str:
    """A table for each shape and load."""
    paragraphs = []
    for result in report["results"]:
        bare = result["rows"]["all-to-all"]
        load = f"{result['load']}, heaviest rank {result['heaviest_rank']:.2f} x mean"
        lines = (
            [
                name,
                f"{row['median_ms']:.1f} ({row['min_ms']:.1f})",
                f"{row['median_ms'] / bare['median_ms']:.2f} ({row['min_ms'] / bare['min_ms']:.2f})",
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['bytes_between_nodes'] / 1e6:.1f}",
            ]
            for name, row in result["rows"].items()
        )
        head = ["", "ms: median (min)", "x all-to-all", "MB a rank", "MB between nodes"]
        paragraphs += [f"{shape_text(result['shape'])}; {load}.", markdown(head, lines)]
    return "\n\n".join([*paragraphs, *absences(report["results"])])


def parts(report: dict) -> str:
    """Shares of a step, one line for each dtype and shape."""
    names = list(report["results"][0]["shares"])
    lines = (
        [result["dtype"], "{tokens}, {hidden}, {ffn}, {experts}, {top_k}".format(**result["shape"])]
        + [f"{result[key]:.1f}" for key in ("limit_ms", "step_ms", "profiled_ms")]
        + [f"{100 * result['shares'][name]:.0f} %" for name in names]
        for result in report["results"]
    )
    return markdown(["", "shape", "limit ms", "step ms", "profiled ms", *names], lines)


def kernels(report: dict) -> str:
    """A table for each shape."""
    paragraphs = []
    for result in report["shapes"]:
        lines = (
            [
                *(case["case"], name, f"{row['median_ms']:.3f}", f"{row['min_ms']:.3f}", f"{row['of_torch']:.2f}"),
                f"{row['tflops']:.0f}" if row["tflops"] else "",
            ]
            for case in result["cases"]
            for name, row in case["rows"].items()
        )
        head = ["", "", "median ms", "min ms", "of torch", "TFLOP/s"]
        paragraphs += [f"{shape_text(result['shape'])}.", markdown(head, lines)]
        for case in result["cases"]:
            paragraphs += [f"{case['case']}: {name} differs, not timed." for name in case["differing"]]
    return "\n\n".join(paragraphs)


TABLES: dict[str, Callable[[dict], str]] = {
    "layer": layer,
    "memory": memory,
    "scaling": scaling,
    "dispatch": dispatch,
    "parts": parts,
    "kernels": kernels,
}
"""By the benchmark that wrote the record."""


def absences(results: Iterable[dict]) -> list[str]:
    """Why rows are not in the tables."""
    left_out, differing = {}, set()
    for result in results:
        left_out |= result["left_out"]
        differing |= set(result["differing"])
    paragraphs = []
    if left_out:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in left_out.items())
        paragraphs += [f"Left out: {reasons}."]
    if differing:
        paragraphs += [
            f"Different from the reference in some shape, and not timed there: {', '.join(sorted(differing))}."
        ]
    return paragraphs


def shape_text(shape: dict) -> str:
    return "{tokens} tokens, H {hidden}, F {ffn}, E {experts}, k {top_k}".format(**shape)


def markdown(head: list[str], lines: Iterable[list[Any]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, ["---"] * len(head), *lines))
